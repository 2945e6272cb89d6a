"""Overlap losses (Dice, IoU, Tversky, ...), and build_loss. ND_Crossentropy.py explains the symbols.

The formulas use soft counts: tp = sum(p y), fp = sum(p (1 - y)), fn = sum((1 - p) y) and
tn = sum((1 - p) (1 - y)). Most losses take smooth (added to numerator and denominator, as masks
may be empty), batch_dice (counts of the whole batch) and do_bg (class 0 counts, unless CLASSES=1).
"""

import torch

import config
from ND_Crossentropy import LOSSES, TopKLoss, loss, safe_pow


def counted(pixels, do_bg):
    """p and y (N, K, P) of the classes that count; both are 0 in ignored pixels."""
    first = 0 if do_bg or pixels.binary else 1
    p, y = pixels.p[:, first:], pixels.y[:, first:]
    if pixels.ignore_index is not None:
        p = p * pixels.valid[:, None]
    return p, y


def rest(pixels, y):
    """1 - y, but 0 in ignored pixels."""
    return pixels.valid[:, None].to(y) - y


def total(values, batch_dice):
    """The sum (N, K) of values (N, K, P) over the pixels; (1, K) over the batch with batch_dice."""
    sums = values.sum(2)
    return sums.sum(0, keepdim=True) if batch_dice else sums


def soft_counts(pixels, batch_dice, do_bg):
    """tp, fp, fn, each (N, K), or (1, K) with batch_dice."""
    p, y = counted(pixels, do_bg)
    both = p * y
    return [total(part, batch_dice) for part in (both, p - both, y - both)]


def true_negatives(pixels, batch_dice, do_bg):
    """tn, (N, K), or (1, K) with batch_dice. Only some losses need it."""
    p, y = counted(pixels, do_bg)
    return total((1 - p) * rest(pixels, y), batch_dice)


def one_minus_index(wrong, right):
    """1 - right / (right + wrong), written so that a large empty mask has a gradient as well."""
    ratio = wrong / right.clamp_min(1e-12)
    return torch.where(ratio < 1, ratio / (1 + ratio), 1 - 1 / (1 + ratio))


@loss
def SoftDiceLoss(pixels, smooth=1.0, batch_dice=False, do_bg=True):
    """Soft Dice, Carvana's metric. Take it for most tasks.
    Formula (Milletari et al. 2016, arXiv 1606.04797): 1 - 2 tp / (2 tp + fp + fn)"""
    return TverskyLoss(pixels, 0.5, 0.5, smooth / 2, batch_dice, do_bg)


@loss
def IoULoss(pixels, smooth=1.0, batch_dice=False, do_bg=True):
    """Soft IoU (Jaccard). Like Dice, but harder on half-right images.
    Formula (Rahman and Wang 2016, doi 10.1007/978-3-319-50835-1_22): 1 - tp / (tp + fp + fn)"""
    return TverskyLoss(pixels, 1, 1, smooth, batch_dice, do_bg)


@loss
def TverskyLoss(pixels, alpha=0.3, beta=0.7, smooth=1.0, batch_dice=False, do_bg=True):
    """Dice with weights for false and missed pixels. Take beta > alpha if small objects are missed.
    Formula (Salehi et al. 2017, arXiv 1706.05721): 1 - tp / (tp + alpha fp + beta fn)"""
    tp, fp, fn = soft_counts(pixels, batch_dice, do_bg)
    return one_minus_index(alpha * fp + beta * fn, tp + smooth)


@loss
def FocalTversky_loss(
    pixels, alpha=0.3, beta=0.7, gamma=0.75, smooth=1.0, batch_dice=False, do_bg=True
):
    """TverskyLoss to a power. With gamma < 1 the gradient stays large near the end.
    Formula (Abraham and Khan 2018, arXiv 1810.07842): TverskyLoss^gamma (there 1 / gamma)"""
    return safe_pow(TverskyLoss(pixels, alpha, beta, smooth, batch_dice, do_bg), gamma)


@loss
def AsymLoss(pixels, beta=1.5, smooth=1.0, batch_dice=False, do_bg=True):
    """1 - F_beta: TverskyLoss with one argument. A larger beta finds more of small objects.
    Formula (Hashemi et al. 2018, arXiv 1803.11078): 1 - tp / (tp + (1 - w) fp + w fn), w below"""
    w = beta**2 / (1 + beta**2)
    return TverskyLoss(pixels, 1 - w, w, smooth, batch_dice, do_bg)


@loss
def SSLoss(pixels, r=0.1, smooth=1.0, batch_dice=False, do_bg=True):
    """Squared errors inside (sensitivity) and outside objects. A larger r finds more small objects.
    Formula (Brosch et al. 2015, doi 10.1007/978-3-319-24574-4_1), with smooth below the bars alone:
    r sum((1 - p)^2 y) / sum(y) + (1 - r) sum(p^2 (1 - y)) / sum(1 - y)"""
    p, y = counted(pixels, do_bg)
    not_y = rest(pixels, y)
    missed, added = total((1 - p) ** 2 * y, batch_dice), total(p**2 * not_y, batch_dice)
    inside, outside = total(y, batch_dice) + smooth, total(not_y, batch_dice) + smooth
    return r * missed / inside.clamp_min(1e-12) + (1 - r) * added / outside.clamp_min(1e-12)


@loss
def GDiceLoss(pixels, smooth=1e-5, batch_dice=False, do_bg=True):
    """Generalised Dice, background included. Take it for classes of unequal size.
    Formula (Sudre et al. 2017, arXiv 1707.03237), with w = 1 / sum(y)^2 and sums over the classes:
    1 - 2 sum(w tp) / sum(w (2 tp + fp + fn))"""
    tp, fp, fn = soft_counts(pixels, batch_dice, do_bg)
    wrong, size = fp + fn, (tp + fn).detach()  # size = sum(y)
    if pixels.binary and do_bg:  # the background is wrong where the foreground is
        tn = true_negatives(pixels, batch_dice, do_bg)
        size = torch.cat([(tn + fp).detach(), size], 1)
        tp, wrong = torch.cat([tn, tp], 1), torch.cat([wrong, wrong], 1)
    # w is scaled to at most 1, so that smooth stays small beside it. Absent classes get w = 1.
    smallest = size.masked_fill(size == 0, torch.inf).amin(1, keepdim=True)
    w = (smallest / size.clamp_min(1)).clamp_max(1) ** 2
    return one_minus_index((w * wrong).sum(1), 2 * (w * tp).sum(1) + smooth)


@loss
def GDiceLossV2(pixels, smooth=1e-5, batch_dice=True, do_bg=True):
    """GDiceLoss of the whole batch. Take it for classes that few images have.
    Formula (Sudre et al. 2017, arXiv 1707.03237): that of GDiceLoss, on the counts of the batch"""
    return GDiceLoss(pixels, smooth, batch_dice, do_bg)


@loss
def PenaltyGDiceLoss(pixels, k=2.5, smooth=1e-5, batch_dice=False, do_bg=True):
    """GDiceLoss in which wrong pixels cost up to 1 + k times as much. Take it for thin structures.
    Formula (Yang et al. 2019, MIDL): 1 - G / (1 + k (1 - G)), G = 1 - GDiceLoss"""
    gdice = GDiceLoss(pixels, smooth, batch_dice, do_bg)
    return (1 + k) * gdice / (1 + k * gdice)


@loss
def DC_and_CE_loss(pixels, smooth=1.0, batch_dice=False, do_bg=True):
    """A good start on new data, as CE has a gradient everywhere.
    Formula (Isensee et al. 2018, arXiv 1809.10486): SoftDiceLoss + CE"""
    return SoftDiceLoss(pixels, smooth, batch_dice, do_bg).mean() + pixels.mean(pixels.ce)


@loss
def DC_and_topk_loss(pixels, k=10, smooth=1.0, batch_dice=False, do_bg=True):
    """Take it instead of DC_and_CE_loss if most pixels are easy.
    Formula (Isensee et al. 2021, doi 10.1038/s41592-020-01008-z): SoftDiceLoss + TopKLoss"""
    return SoftDiceLoss(pixels, smooth, batch_dice, do_bg).mean() + TopKLoss(pixels, k)


@loss
def CE_Dice(pixels, dice_weight=0.5, smooth=1.0, batch_dice=False, do_bg=True):
    """SoftDiceLoss and CE in any proportion. Also named BCE_Dice.
    Formula (Kaggle's Carvana winners 2017): (1 - dice_weight) CE + dice_weight SoftDiceLoss"""
    dice = SoftDiceLoss(pixels, smooth, batch_dice, do_bg).mean()
    return (1 - dice_weight) * pixels.mean(pixels.ce) + dice_weight * dice


BCE_Dice = loss(CE_Dice, 'BCE_Dice')


@loss
def ExpLog_loss(pixels, gamma=0.3, dice_weight=0.8, smooth=1.0, batch_dice=False, do_bg=True):
    """Powers of log Dice and of weighted cross-entropy. Take it for classes of very unequal size.
    Formula (Wong et al. 2018, arXiv 1809.00076), with w = sqrt(P / sum(y)) for P pixels:
    dice_weight mean((-ln Dice)^gamma) + (1 - dice_weight) mean(w_y ce^gamma)"""
    tp, fp, fn = soft_counts(pixels, batch_dice, do_bg)
    log_dice = torch.log1p((fp + fn) / (2 * tp + smooth).clamp_min(1e-12))
    size = pixels.sizes()
    w = (size.sum(1, keepdim=True) / size.clamp_min(1)).sqrt().gather(1, pixels.target)
    cross_entropy = pixels.mean(w * safe_pow(pixels.ce, gamma))
    return dice_weight * safe_pow(log_dice, gamma).mean() + (1 - dice_weight) * cross_entropy


@loss
def MCCLoss(pixels, smooth=1e-5, batch_dice=False, do_bg=True):
    """1 - Matthews correlation, for objects of any size. No useful gradient on masks of one class.
    Formula (Abhishek and Hamarneh 2021, arXiv 2010.13454), with smooth added to each count:
    1 - (tp tn - fp fn) / sqrt((tp + fp) (tp + fn) (tn + fp) (tn + fn))"""
    counts = [*soft_counts(pixels, batch_dice, do_bg), true_negatives(pixels, batch_dice, do_bg)]
    tp, fp, fn, tn = (count + smooth for count in counts)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    mcc = (tp * tn - fp * fn) / product.clamp_min(1e-30).sqrt()
    return (1 - mcc).clamp_min(0) * (sum(counts) > 0)  # 0 if all pixels are ignored


@loss
def LovaszLoss(pixels):
    """Convex surrogate of the IoU: hinge if CLASSES=1, else softmax. Take it for fine-tuning.
    Formula (Berman et al. 2018, arXiv 1705.08790): sum(error times added 1 - IoU), largest first"""
    y = pixels.y
    if pixels.binary:
        errors = torch.relu(1 - pixels.logits * (2 * y - 1))
    else:
        errors = (y - pixels.p).abs()
    errors, order = errors.masked_fill(~pixels.valid[:, None], 0).sort(2, descending=True)
    y, size = y.gather(2, order), y.sum(2, keepdim=True)
    left, union = size - y.cumsum(2), size + (1 - y).cumsum(2)
    added = torch.where(y > 0, 1 / union, left / (union * (union - 1).clamp_min(1)))
    added[:, :, :1] += size == 0
    present = (size[:, :, 0] > 0) | pixels.binary
    return ((errors * added).sum(2) * present).sum(1) / present.sum(1).clamp_min(1)


def build_loss(name, classes=1, **args):
    """A new loss of LOSSES, called as loss(logits (N, C, H, W), mask (N, H, W))."""
    if name not in LOSSES:
        meant = config.did_you_mean(name, LOSSES)
        raise config.UserMistake(f"LOSS: no loss is called '{name}'; {meant}valid: {list(LOSSES)}")
    return LOSSES[name](classes, **args)
