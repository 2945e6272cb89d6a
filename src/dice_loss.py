"""Overlap losses (Dice, IoU, Tversky, ...), and build_loss: any loss of the project by its name.

loss_base.py says how a loss is called and what holds for all. Here each is a formula of a few
lines on the soft counts of each image and class,

    tp = sum(p y)    fp = sum(p (1 - y))    fn = sum((1 - p) y)    tn = sum((1 - p) (1 - y)),

averaged over the classes: the foreground alone for CLASSES=1, unless the text names the background;
all for CLASSES=N, or those from 1 on with do_bg=False. batch_dice=True adds up the counts of a
batch first; its images then depend on each other. smp's DiceLoss and JaccardLoss are not used: they
pool the batch, give no gradient on an empty mask and overflow on half-precision logits.
"""

from functools import cached_property

import torch
import torch.nn.functional as F

import config
from loss_base import EPSILON, LOSSES, loss
from ND_Crossentropy import TopKLoss


class Counts:
    """The soft counts, (N, K), or (1, K) of a whole batch."""

    def __init__(self, px, batch_dice, do_bg, background=False):
        first = 0 if do_bg and (background or px.classes > 1) else 1
        self.p, self.y, self.pool = px.p[:, first:], px.y[:, first:], batch_dice
        self.n = px.keep[:, None].to(self.y) - self.y

    def sum(self, values):
        return values.sum(2).sum(0, keepdim=True) if self.pool else values.sum(2)

    tp = cached_property(lambda self: self.sum(self.p * self.y))
    fp = cached_property(lambda self: self.sum(self.p * self.n))
    fn = cached_property(lambda self: self.sum((1 - self.p) * self.y))
    tn = cached_property(lambda self: self.sum((1 - self.p) * self.n))


def distance(odds):
    """1 - index, where index = right / (right + wrong) = 1 / (1 + odds). From odds = wrong / right, no
    gradient is a difference of nearly equal numbers: a large, empty mask teaches, too."""
    return torch.where(odds < 1, odds / (1 + odds), 1 - 1 / (1 + odds))


def tversky(px, alpha, beta, smooth, batch_dice, do_bg):
    """The odds of Dice, IoU and their kind."""
    c = Counts(px, batch_dice, do_bg)
    return (alpha * c.fp + beta * c.fn) / (c.tp + smooth).clamp_min(1e-12)


def power(x, gamma):
    """x^gamma, but flat near 0, where the gradient of a root has no bound."""
    return x.clamp_min(EPSILON) ** gamma * (x > EPSILON)


@loss
def SoftDiceLoss(px, smooth=1.0, batch_dice=False, do_bg=True):
    """1 - (2 tp + smooth) / (2 tp + fp + fn + smooth): Carvana's metric made soft, for most tasks.
    Milletari et al. 2016 (arXiv 1606.04797, with squares in the denominator)."""
    return distance(tversky(px, 0.5, 0.5, smooth / 2, batch_dice, do_bg)).mean(1)


@loss
def IoULoss(px, smooth=1.0, batch_dice=False, do_bg=True):
    """1 - (tp + smooth) / (tp + fp + fn + smooth): like Dice, harder on half-right images. Rahman
    and Wang 2016."""
    return distance(tversky(px, 1, 1, smooth, batch_dice, do_bg)).mean(1)


@loss
def TverskyLoss(px, alpha=0.3, beta=0.7, smooth=1.0, batch_dice=False, do_bg=True):
    """1 - (tp + smooth) / (tp + alpha fp + beta fn + smooth): for small objects that are missed, as
    beta > alpha asks for recall. Salehi et al. 2017 (arXiv 1706.05721)."""
    return distance(tversky(px, alpha, beta, smooth, batch_dice, do_bg)).mean(1)


@loss
def FocalTversky_loss(
    px, alpha=0.3, beta=0.7, gamma=0.75, smooth=1.0, batch_dice=False, do_bg=True
):
    """(1 - Tversky index)^gamma of each class, then the mean (the paper: the sum): gamma < 1 keeps
    the gradient up to the end. Abraham and Khan 2018 (arXiv 1810.07842); exponent 1 / (4/3)."""
    return power(distance(tversky(px, alpha, beta, smooth, batch_dice, do_bg)), gamma).mean(1)


@loss
def AsymLoss(px, beta=1.5, smooth=1.0, batch_dice=False, do_bg=True):
    """1 - F_beta, Tversky by one number: 1 - (tp + smooth) / (tp + w fn + (1 - w) fp + smooth),
    w = beta^2 / (1 + beta^2). Hashemi et al. 2018 (arXiv 1803.11078)."""
    w = beta**2 / (1 + beta**2)
    return distance(tversky(px, 1 - w, w, smooth, batch_dice, do_bg)).mean(1)


@loss
def SSLoss(px, r=0.1, smooth=1.0, batch_dice=False, do_bg=True):
    """r sum((1 - p)^2 y) / (sum(y) + smooth) + (1 - r) sum(p^2 (1 - y)) / (sum(1 - y) + smooth): the
    squared error inside the object (sensitivity, weight r) and outside (specificity). A larger r
    finds more of small objects. Brosch et al. 2015 (MICCAI); r as in the original."""
    c = Counts(px, batch_dice, do_bg)
    inside = c.sum((1 - c.p) ** 2 * c.y) / (c.sum(c.y) + smooth).clamp_min(1e-12)
    outside = c.sum(c.p**2 * c.n) / (c.sum(c.n) + smooth).clamp_min(1e-12)
    return (r * inside + (1 - r) * outside).mean(1)


@loss
def GDiceLoss(px, smooth=1e-5, batch_dice=False, do_bg=True):
    """1 - (2 sum_k w tp + smooth) / (sum_k w (2 tp + fp + fn) + smooth), w = 1 / sum(y)^2, background
    included: for classes of unequal size. An absent class has the largest weight of the others; w
    is scaled to at most 1, or smooth would outweigh large images. Sudre et al. 2017 (arXiv
    1707.03237)."""
    c = Counts(px, batch_dice, do_bg, background=True)
    size = c.sum(c.y)
    smallest = size.masked_fill(size == 0, torch.inf).amin(1, keepdim=True)
    w = (smallest / size.clamp_min(1)).clamp_max(1) ** 2
    right = 2 * (w * c.tp).sum(1) + smooth
    return distance((w * (c.fp + c.fn)).sum(1) / right.clamp_min(1e-12))


@loss
def GDiceLossV2(px, smooth=1e-5, batch_dice=True, do_bg=True):
    """GDiceLoss of the whole batch, whose images then depend on each other (unless batch_dice=False):
    for classes that few images hold."""
    return GDiceLoss.formula(px, smooth, batch_dice, do_bg)


@loss
def PenaltyGDiceLoss(px, k=2.5, smooth=1e-5, batch_dice=False, do_bg=True):
    """1 - G / (1 + k (1 - G)), G = 1 - GDiceLoss: false pixels cost up to 1 + k times as much. For
    thin structures. Yang et al. 2019 (MIDL)."""
    d = GDiceLoss.formula(px, smooth, batch_dice, do_bg)
    return (1 + k) * d / (1 + k * d)


@loss
def DC_and_CE_loss(px, smooth=1.0, batch_dice=False, do_bg=True):
    """SoftDiceLoss + CE: overlap, with a gradient that never fades; a good start on new data.
    Isensee et al. 2018 (nnU-Net, arXiv 1809.10486)."""
    return SoftDiceLoss.formula(px, smooth, batch_dice, do_bg) + px.mean(px.ce)


@loss
def DC_and_topk_loss(px, k=10, smooth=1.0, batch_dice=False, do_bg=True):
    """SoftDiceLoss + TopKLoss: DC_and_CE_loss where most pixels are easy. Isensee et al. 2021."""
    return SoftDiceLoss.formula(px, smooth, batch_dice, do_bg) + TopKLoss.formula(px, k)


@loss
def CE_Dice(px, dice_weight=0.5, smooth=1.0, batch_dice=False, do_bg=True):
    """(1 - dice_weight) CE + dice_weight SoftDiceLoss: the two in any proportion. As BCE_Dice, for
    CLASSES=1 alone, the choice of the winners of Kaggle's Carvana challenge (2017)."""
    dice = SoftDiceLoss.formula(px, smooth, batch_dice, do_bg)
    return (1 - dice_weight) * px.mean(px.ce) + dice_weight * dice


BCE_Dice = loss(CE_Dice.formula, 'BCE_Dice')


@loss
def ExpLog_loss(px, gamma=0.3, dice_weight=0.8, smooth=1.0, batch_dice=False, do_bg=True):
    """dice_weight mean((-ln Dice)^gamma) + (1 - dice_weight) mean(w_y ce^gamma), where w_k =
    sqrt(P / sum(y_k)) in the image, background included: for very unequal sizes. Both powers are
    flat below 1e-18, where their gradient has no bound. Wong et al. 2018 (arXiv 1809.00076)."""
    odds = tversky(px, 0.5, 0.5, smooth / 2, batch_dice, do_bg)
    w = (px.count[:, None] / px.y.sum(2).clamp_min(1)).sqrt().gather(1, px.target)
    cross = px.mean(w * power(px.ce, gamma))
    return dice_weight * power(torch.log1p(odds), gamma).mean(1) + (1 - dice_weight) * cross


@loss
def MCCLoss(px, smooth=1e-5, batch_dice=False, do_bg=True):
    """1 - (tp tn - fp fn) / sqrt((tp + fp) (tp + fn) (tn + fp) (tn + fn)), smooth added to each
    count: for objects of any size; undefined on masks of one label. Abhishek, Hamarneh 2021 (arXiv
    2010.13454). smp's is the same on one image; it pools a batch and cannot ignore pixels."""
    c = Counts(px, batch_dice, do_bg)
    tp, fp, fn, tn = (count + smooth for count in (c.tp, c.fp, c.fn, c.tn))
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    mcc = (tp * tn - fp * fn) / product.clamp_min(1e-30).sqrt()
    return ((1 - mcc).clamp_min(0) * (c.sum(c.y + c.n) > 0)).mean(1)


@loss
def LovaszLoss(px):
    """Sum of the sorted errors, each times what it adds to 1 - IoU; errors are |y - p|, and the mean
    over classes in the mask taken, or the hinge of the logit for CLASSES=1. For fine-tuning. Berman
    et al. 2018 (arXiv 1705.08790). smp's (per_image=True) is the same, but has no float64, fails on
    an image ignored altogether, and lets the order of pixels pick from equal errors."""
    y, errors = px.y, torch.where(px.y > 0, 1 - px.p, px.p)
    if px.classes == 1:
        y, x = y[:, 1:], px.x[:, 1:]
        errors = F.relu(1 - x * (2 * y - 1))
    errors, order = errors.masked_fill(~px.keep[:, None], -1).sort(2, descending=True)
    errors, y, size = F.relu(errors), y.gather(2, order), y.sum(2, keepdim=True)
    left, union = size - y.cumsum(2), size + (1 - y).cumsum(2)
    added = torch.where(y > 0, 1 / union, left / (union * (union - 1).clamp_min(1)))
    added[:, :, :1] += size == 0
    equal = F.pad((errors.detach().diff(dim=2) != 0).long().cumsum(2), (1, 0))  # groups of errors
    sums, members = (torch.zeros_like(y).scatter_add(2, equal, v) for v in (added, y * 0 + 1))
    losses = (errors * (sums / members.clamp_min(1)).gather(2, equal)).sum(2)
    held = (size[:, :, 0] > 0) | (px.classes == 1)
    return (losses * held).sum(1) / held.sum(1).clamp_min(1)


def build_loss(name, classes=1, **args):
    """A fresh loss of LOSSES, called as loss(logits (N, C, H, W), mask (N, H, W))."""
    if name not in LOSSES:
        raise config.UserMistake(
            f'LOSS: no loss is called {name!r}; {config.nearest(name, LOSSES)}legal: '
            + ', '.join(LOSSES)
        )
    return LOSSES[name](classes, **args)
