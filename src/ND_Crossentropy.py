"""Cross-entropy losses, and the code that they share with the losses of dice_loss.py.

A loss is called as loss(logits, mask). Logits are (N, C, H, W). Masks are (N, H, W) and hold class
indices, 0 and 1 for C = 1. Pixels of IGNORE_INDEX do not count. The loss is the mean over images: 0
for a perfect prediction, never negative. It is computed in float32 or float64, also under autocast.

In the docstrings, p is the probability of a class (sigmoid for C = 1, else softmax), y is 1 in its
pixels and 0 elsewhere, p_y is the probability of a pixel's true class, ce is -ln(p_y).
"""

import functools
import inspect

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt

import config

LOSSES = {}  # name -> builder(classes=1, **args) of a new loss; filled by @loss


class Pixels:
    """The input of a formula: N images of P pixels and C channels. Each part is computed when a
    formula first asks for it.

    logits: float32 or float64 (N, C, P). valid: bool (N, P), False in ignored pixels.
    """

    def __init__(self, logits, mask, ignore_index):
        self.logits = (logits if logits.dtype == torch.float64 else logits.float()).flatten(2)
        self.mask, self.mask_shape, self.ignore_index = mask.flatten(1), mask.shape, ignore_index
        self.classes = max(2, logits.shape[1])
        self.binary = logits.shape[1] == 1
        known = (self.mask >= 0) & (self.mask < self.classes)
        # It raises without a wait for the device. On a CPU it raises RuntimeError at once.
        torch._assert_async(
            (known if ignore_index is None else known | ~self.valid).all(),
            f'a mask holds a value that is no class from 0 to {self.classes - 1}',
        )

    @functools.cached_property
    def valid(self):
        if self.ignore_index is None:
            return torch.ones_like(self.mask, dtype=torch.bool)
        return self.mask != self.ignore_index

    @functools.cached_property
    def target(self):
        """Class indices, int64 (N, P); 0 in ignored pixels."""
        target = self.mask.long()
        return target if self.ignore_index is None else target.masked_fill(~self.valid, 0)

    @functools.cached_property
    def log_p(self):
        """Logarithms of the probabilities (N, C, P); for C = 1, those of the foreground."""
        return F.logsigmoid(self.logits) if self.binary else self.logits.log_softmax(1)

    @functools.cached_property
    def ce(self):
        """Cross-entropy (N, P), 0 in ignored pixels."""
        if self.binary:
            x = self.logits[:, 0]
            ce = -F.logsigmoid(torch.where(self.mask == 1, x, -x))
        else:
            ce = F.nll_loss(self.log_p, self.target, reduction='none')
        return ce if self.ignore_index is None else ce.masked_fill(~self.valid, 0)

    @functools.cached_property
    def p(self):
        """Probabilities (N, C, P); for C = 1, those of the foreground."""
        p = self.log_p.exp()
        if not self.binary:
            # The largest as 1 - sum(others) keeps the gradient of confidently wrong pixels.
            top = torch.zeros_like(p).scatter(1, self.log_p.argmax(1, keepdim=True), 1)
            p = p + top * (1 - p.sum(1, keepdim=True))
            # A gradient where p is 0 or 1. For C = 1, that of logsigmoid reaches as far.
            p = p.add(self.logits - self.logits.detach(), alpha=1e-20)
        return p

    @functools.cached_property
    def y(self):
        """One-hot masks (N, C, P), 0 in ignored pixels; for C = 1, the foreground."""
        if self.binary:
            return (self.mask == 1)[:, None].to(self.logits)
        y = torch.zeros_like(self.logits).scatter(1, self.target[:, None], 1)
        return y if self.ignore_index is None else y * self.valid[:, None]

    def sizes(self):
        """Number of valid pixels of each class (N, max(2, C)): sum(y)."""
        sizes = self.y.sum(2)
        if self.binary:
            sizes = torch.cat([self.valid.sum(1, keepdim=True) - sizes, sizes], 1)
        return sizes

    def mean(self, values, weights=None):
        """Mean (N,) of values (N, P), 0 in ignored pixels, over the valid pixels of each image."""
        if weights is None:
            return values.sum(1) / self.valid.sum(1).clamp_min(1)
        return (values * weights).sum(1) / (weights * self.valid).sum(1).clamp_min(1e-30)


class Loss(torch.nn.Module):
    """A loss of LOSSES as a module: checks its input and averages the formula over the images."""

    def __init__(self, name, formula, /, classes=1, ignore_index=None, **args):
        super().__init__()
        if classes > 1 and name.startswith('BCE'):
            raise config.UserMistake(f'LOSS={name} is not for CLASSES={classes}: use {name[1:]}')
        takes = inspect.signature(functools.partial(formula, None))
        for key in args.keys() - takes.parameters.keys():
            meant = config.did_you_mean(key, takes.parameters)
            raise config.UserMistake(f'{name} has no argument {key}; {meant}it takes {takes}')
        self.formula = functools.partial(formula, **args)
        self.classes, self.ignore_index = classes, ignore_index

    def forward(self, logits, mask):
        if logits.shape != (len(mask), self.classes, *mask.shape[1:]) or mask.is_floating_point():
            raise config.UserMistake(f'use logits (N, {self.classes}, H, W), int masks (N, H, W)')
        with torch.autocast(device_type=logits.device.type, enabled=False):
            return self.formula(Pixels(logits, mask, self.ignore_index)).mean()


def loss(formula, name=None):
    """Add formula(pixels, **args), which returns (N,) or (N, classes) values, to LOSSES."""
    name = name or formula.__name__
    LOSSES[name] = functools.partial(Loss, name, formula)
    return formula


def safe_pow(x, gamma):
    """x^gamma, but 0 where x is almost 0: the gradient of a root is infinite there."""
    return x.clamp_min(1e-18) ** gamma * (x > 1e-18)


@loss
def CrossentropyND(pixels):
    """Cross-entropy, the safe first choice. Small objects hardly count. Also named CE and BCE.
    Formula: mean(ce)"""
    return pixels.mean(pixels.ce)


CE, BCE = loss(CrossentropyND, 'CE'), loss(CrossentropyND, 'BCE')


@loss
def TopKLoss(pixels, k=10):
    """Cross-entropy of the k % worst pixels of each image. Take it if most pixels are easy.
    Formula (Wu et al. 2016, arXiv 1605.06885): mean(ce) over these pixels, at least one"""
    count = (pixels.valid.sum(1, keepdim=True) * k // 100).clamp_min(1)  # of valid pixels
    worst = pixels.ce.topk(max(1, int(pixels.ce.shape[1] * k // 100))).values / count
    return (worst * (torch.arange(worst.shape[1], device=worst.device) < count)).sum(1)


@loss
def WeightedCrossEntropyLoss(pixels, weights=None):
    """Cross-entropy with weights [background, class 1, ...], for classes of known frequencies.
    Formula (Ronneberger et al. 2015, arXiv 1505.04597): sum(w_y ce) / sum(w_y)"""
    if weights and len(weights) != pixels.classes:
        raise config.UserMistake(
            f'WeightedCrossEntropyLoss takes {pixels.classes} weights, one for each class and the '
            f'background, not {len(weights)}: correct LOSS_ARGS'
        )
    w = pixels.logits.new_tensor(weights or [1] * pixels.classes)
    return pixels.mean(pixels.ce, w[pixels.target])


@loss
def WeightedCrossEntropyLossV2(pixels):
    """Cross-entropy weighted by the prediction. Take it for classes of unknown frequencies.
    Formula (Sudre et al. 2017, arXiv 1707.03237): weighted mean(ce), w = sum(1 - p) / sum(p)"""
    p = torch.cat([1 - pixels.p, pixels.p], 1) if pixels.binary else pixels.p
    valid = pixels.valid[:, None]
    own, rest = (p * valid).sum(2), ((1 - p) * valid).sum(2)
    w = rest.clamp_min(1e-6) / own.clamp_min(1e-6)
    return pixels.mean(pixels.ce, w.gather(1, pixels.target))


@loss
def DisPenalizedCE(pixels):
    """Cross-entropy with more weight near outlines. Slow: 0.3 s per 1280x1918 mask, on the CPU.
    Formula (Caliva et al. 2019, arXiv 1908.03679): mean((1 + phi) ce), phi: 1 at edges, 0 inside"""
    phis = np.zeros(pixels.mask_shape)
    masks, valids = (v.reshape(phis.shape).cpu().numpy() for v in (pixels.target, pixels.valid))
    for phi, mask, valid in zip(phis, masks, valids):
        labels = np.unique(mask[valid])
        for label in labels if len(labels) > 1 else ():  # a mask of one label has no edge
            region = (mask == label) & valid
            depth = distance_transform_edt(region | ~valid)[region]  # ignored pixels are no edge
            phi[region] = (depth.max() - depth) / np.ptp(depth) if np.ptp(depth) else 1
    return pixels.mean(pixels.ce * (1 + torch.from_numpy(phis).flatten(1).to(pixels.ce)))


@loss
def FocalLoss(pixels, gamma=2.0, alpha=None):
    """Cross-entropy with less weight on easy pixels. Take it for few hard among many easy pixels.
    Formula (Lin et al. 2017, arXiv 1708.02002): mean((1 - p_y)^gamma ce)"""
    focus = safe_pow(-torch.expm1(-pixels.ce), gamma)
    if alpha is not None:  # alpha weights the foreground, 1 - alpha the background
        focus = focus * torch.where(pixels.target > 0, alpha, 1 - alpha).to(focus)
    return pixels.mean(focus * pixels.ce)
