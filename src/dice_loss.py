"""Overlap losses (Dice, IoU, Tversky, ...), and build_loss. loss_base.py explains the symbols.

The formulas use the soft counts of each image and class:

    tp = sum(p y)    fp = sum(p (1 - y))    fn = sum((1 - p) y)    tn = sum((1 - p) (1 - y))

Most losses take smooth (added to counts: it keeps empty masks defined), batch_dice (sums the counts
over the batch first) and do_bg (whether class 0 counts; with CLASSES=1 only the foreground does).
The losses of segmentation_models_pytorch pool the batch, and some lack ignored pixels or float64.
"""

from functools import partial

import torch
import torch.nn.functional as F

import config
from loss_base import EPSILON, LOSSES, loss
from ND_Crossentropy import TopKLoss


def soft_counts(pixels, batch_dice, do_bg, background=False, squared=False):
    """tp, fp, fn, tn, each (N, K), or (1, K) with batch_dice; of p^2 and (1 - p)^2 if squared."""
    first = 0 if do_bg and (background or not pixels.binary) else 1
    p, y = pixels.p[:, first:], pixels.y[:, first:]
    not_y = pixels.valid[:, None].to(y) - y  # 0 in ignored pixels
    p, not_p = (p**2, (1 - p) ** 2) if squared else (p, 1 - p)
    counts = [(a * b).sum(2) for a in (p, not_p) for b in (y, not_y)]
    return [count.sum(0, keepdim=True) for count in counts] if batch_dice else counts


def tversky_ratio(pixels, alpha, beta, smooth, batch_dice, do_bg):
    """(alpha fp + beta fn) / (tp + smooth), the ratio of wrong to right pixels (N, K)."""
    tp, fp, fn, _ = soft_counts(pixels, batch_dice, do_bg)
    return (alpha * fp + beta * fn) / (tp + smooth).clamp_min(1e-12)


def one_minus_index(ratio):
    """1 - right / (right + wrong), from the ratio wrong / right."""
    # Neither form subtracts nearly equal numbers, so a large empty mask has a gradient as well.
    return torch.where(ratio < 1, ratio / (1 + ratio), 1 - 1 / (1 + ratio))


def safe_pow(x, gamma):
    """x^gamma, but 0 below EPSILON, where the gradient of a root is infinite."""
    return x.clamp_min(EPSILON) ** gamma * (x > EPSILON)


@loss
def SoftDiceLoss(pixels, smooth=1.0, batch_dice=False, do_bg=True):
    """Soft Dice, Carvana's metric. Take it for most tasks.
    Formula: 1 - (2 tp + smooth) / (2 tp + fp + fn + smooth)
    Reference: Milletari et al. 2016, arXiv 1606.04797 (squares p and y in the denominator)"""
    return one_minus_index(tversky_ratio(pixels, 0.5, 0.5, smooth / 2, batch_dice, do_bg)).mean(1)


@loss
def IoULoss(pixels, smooth=1.0, batch_dice=False, do_bg=True):
    """Soft IoU (Jaccard). Like Dice, but harder on half-right images.
    Formula: 1 - (tp + smooth) / (tp + fp + fn + smooth)
    Reference: Rahman and Wang 2016, doi 10.1007/978-3-319-50835-1_22"""
    return one_minus_index(tversky_ratio(pixels, 1, 1, smooth, batch_dice, do_bg)).mean(1)


@loss
def TverskyLoss(pixels, alpha=0.3, beta=0.7, smooth=1.0, batch_dice=False, do_bg=True):
    """Dice with weights for false and missed pixels. Take beta > alpha if small objects are missed.
    Formula: 1 - (tp + smooth) / (tp + alpha fp + beta fn + smooth)
    Reference: Salehi et al. 2017, arXiv 1706.05721"""
    return one_minus_index(tversky_ratio(pixels, alpha, beta, smooth, batch_dice, do_bg)).mean(1)


@loss
def FocalTversky_loss(
    pixels, alpha=0.3, beta=0.7, gamma=0.75, smooth=1.0, batch_dice=False, do_bg=True
):
    """TverskyLoss to a power. With gamma < 1 the gradient stays large near the end.
    Formula: mean over classes of TverskyLoss^gamma
    Reference: Abraham and Khan 2018, arXiv 1810.07842 (sum over classes; gamma is 1 / gamma there)"""
    ratio = tversky_ratio(pixels, alpha, beta, smooth, batch_dice, do_bg)
    return safe_pow(one_minus_index(ratio), gamma).mean(1)


@loss
def AsymLoss(pixels, beta=1.5, smooth=1.0, batch_dice=False, do_bg=True):
    """1 - F_beta: TverskyLoss with one argument. A larger beta finds more of small objects.
    Formula: TverskyLoss with weights 1 - w and w, w = beta^2 / (1 + beta^2)
    Reference: Hashemi et al. 2018, arXiv 1803.11078"""
    w = beta**2 / (1 + beta**2)
    return one_minus_index(tversky_ratio(pixels, 1 - w, w, smooth, batch_dice, do_bg)).mean(1)


@loss
def SSLoss(pixels, r=0.1, smooth=1.0, batch_dice=False, do_bg=True):
    """Squared errors inside (sensitivity) and outside objects. A larger r finds more small objects.
    Formula: r sum((1 - p)^2 y) / (sum(y) + smooth) + (1 - r) sum(p^2 (1 - y)) / (sum(1 - y) + smooth)
    Reference: Brosch et al. 2015, doi 10.1007/978-3-319-24574-4_1"""
    tp, fp, fn, tn = soft_counts(pixels, batch_dice, do_bg)
    _, fp2, fn2, _ = soft_counts(pixels, batch_dice, do_bg, squared=True)
    inside, outside = ((n + smooth).detach().clamp_min(1e-12) for n in (tp + fn, fp + tn))
    return (r * fn2 / inside + (1 - r) * fp2 / outside).mean(1)


@loss
def GDiceLoss(pixels, smooth=1e-5, batch_dice=False, do_bg=True):
    """Generalised Dice, background included. Take it for classes of unequal size.
    Formula: 1 - (2 sum_k(w tp) + smooth) / (sum_k(w (2 tp + fp + fn)) + smooth), w = 1 / sum(y)^2
    Reference: Sudre et al. 2017, arXiv 1707.03237"""
    tp, fp, fn, _ = soft_counts(pixels, batch_dice, do_bg, background=True)
    size = (tp + fn).detach()  # sum(y)
    # w is scaled to at most 1, so that smooth stays small beside it. Absent classes get w = 1.
    smallest = size.masked_fill(size == 0, torch.inf).amin(1, keepdim=True)
    w = (smallest / size.clamp_min(1)).clamp_max(1) ** 2
    right = 2 * (w * tp).sum(1) + smooth
    return one_minus_index((w * (fp + fn)).sum(1) / right.clamp_min(1e-12))


# GDiceLoss of the whole batch. Take it for classes that few images have.
GDiceLossV2 = loss(partial(GDiceLoss.formula, batch_dice=True), 'GDiceLossV2')


@loss
def PenaltyGDiceLoss(pixels, k=2.5, smooth=1e-5, batch_dice=False, do_bg=True):
    """GDiceLoss in which wrong pixels cost up to 1 + k times as much. Take it for thin structures.
    Formula: 1 - G / (1 + k (1 - G)), G = 1 - GDiceLoss
    Reference: Yang et al. 2019 (MIDL)"""
    gdice = GDiceLoss.formula(pixels, smooth, batch_dice, do_bg)
    return (1 + k) * gdice / (1 + k * gdice)


@loss
def DC_and_CE_loss(pixels, smooth=1.0, batch_dice=False, do_bg=True):
    """SoftDiceLoss + CE. A good start on new data, as CE has a gradient everywhere.
    Reference: Isensee et al. 2018 (nnU-Net), arXiv 1809.10486"""
    return SoftDiceLoss.formula(pixels, smooth, batch_dice, do_bg) + pixels.mean(pixels.ce)


@loss
def DC_and_topk_loss(pixels, k=10, smooth=1.0, batch_dice=False, do_bg=True):
    """SoftDiceLoss + TopKLoss. Take it instead of DC_and_CE_loss if most pixels are easy.
    Reference: Isensee et al. 2021 (nnU-Net), doi 10.1038/s41592-020-01008-z"""
    return SoftDiceLoss.formula(pixels, smooth, batch_dice, do_bg) + TopKLoss.formula(pixels, k)


@loss
def CE_Dice(pixels, dice_weight=0.5, smooth=1.0, batch_dice=False, do_bg=True):
    """(1 - dice_weight) CE + dice_weight SoftDiceLoss: the two in any proportion.
    Reference: winners of Kaggle's Carvana challenge 2017, as BCE_Dice"""
    dice = SoftDiceLoss.formula(pixels, smooth, batch_dice, do_bg)
    return (1 - dice_weight) * pixels.mean(pixels.ce) + dice_weight * dice


BCE_Dice = loss(CE_Dice.formula, 'BCE_Dice')


@loss
def ExpLog_loss(pixels, gamma=0.3, dice_weight=0.8, smooth=1.0, batch_dice=False, do_bg=True):
    """Powers of log Dice and of weighted cross-entropy. Take it for classes of very unequal size.
    Formula: a mean((-ln Dice)^gamma) + (1 - a) mean(w_y ce^gamma), a = dice_weight,
        w = sqrt(P / sum(y)) for P pixels, background included
    Reference: Wong et al. 2018, arXiv 1809.00076"""
    ratio = tversky_ratio(pixels, 0.5, 0.5, smooth / 2, batch_dice, do_bg)
    w = (pixels.count[:, None] / pixels.y.sum(2).clamp_min(1)).sqrt().gather(1, pixels.target)
    cross_entropy = pixels.mean(w * safe_pow(pixels.ce, gamma))
    log_dice = safe_pow(torch.log1p(ratio), gamma).mean(1)
    return dice_weight * log_dice + (1 - dice_weight) * cross_entropy


@loss
def MCCLoss(pixels, smooth=1e-5, batch_dice=False, do_bg=True):
    """1 - Matthews correlation, for objects of any size. Masks of one class give no useful gradient.
    Formula: 1 - (tp tn - fp fn) / sqrt((tp + fp) (tp + fn) (tn + fp) (tn + fn)), counts + smooth
    Reference: Abhishek and Hamarneh 2021, arXiv 2010.13454"""
    counts = soft_counts(pixels, batch_dice, do_bg)
    tp, fp, fn, tn = (count + smooth for count in counts)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    mcc = (tp * tn - fp * fn) / product.clamp_min(1e-30).sqrt()
    return ((1 - mcc).clamp_min(0) * (sum(counts) > 0)).mean(1)  # 0 if all pixels are ignored


@loss
def LovaszLoss(pixels):
    """Convex surrogate of the IoU: hinge if CLASSES=1, else softmax. Take it for fine-tuning.
    Formula: sum of sorted errors, each times its increase of 1 - IoU; mean over classes in the mask
    Reference: Berman et al. 2018, arXiv 1705.08790"""
    y, errors = pixels.y, torch.where(pixels.y > 0, 1 - pixels.p, pixels.p)
    if pixels.binary:
        y, logits = y[:, 1:], pixels.logits[:, 1:]
        errors = F.relu(1 - logits * (2 * y - 1))
    errors, order = errors.masked_fill(~pixels.valid[:, None], -1).sort(2, descending=True)
    errors, y, size = F.relu(errors), y.gather(2, order), y.sum(2, keepdim=True)
    left, union = size - y.cumsum(2), size + (1 - y).cumsum(2)
    added = torch.where(y > 0, 1 / union, left / (union * (union - 1).clamp_min(1)))
    added[:, :, :1] += size == 0
    # Equal errors get the mean of their increases: their order is arbitrary.
    group = F.pad((errors.detach().diff(dim=2) != 0).long().cumsum(2), (1, 0))
    sums, members = (torch.zeros_like(y).scatter_add(2, group, v) for v in (added, y * 0 + 1))
    losses = (errors * (sums / members.clamp_min(1)).gather(2, group)).sum(2)
    present = (size[:, :, 0] > 0) | pixels.binary
    return (losses * present).sum(1) / present.sum(1).clamp_min(1)


def build_loss(name, classes=1, **args):
    """A new loss of LOSSES, called as loss(logits (N, C, H, W), mask (N, H, W))."""
    if name not in LOSSES:
        meant = config.did_you_mean(name, LOSSES)
        legal = ', '.join(LOSSES)
        raise config.UserMistake(f"LOSS: no loss is called '{name}'; {meant}legal: {legal}")
    return LOSSES[name](classes, **args)
