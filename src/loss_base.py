"""The code that all losses share. Each loss is a formula in ND_Crossentropy.py or dice_loss.py.

A loss is called as loss(logits, mask) and returns a scalar: the mean over images, at least 0, and 0
for a perfect prediction. It is computed in float32 (or float64), under autocast as well. Pixels of
IGNORE_INDEX do not count.

Shape:
    logits: (N, C, H, W), from the model. C = 1 uses a sigmoid, C > 1 a softmax.
    mask: (N, H, W), class indices. 0 and 1 for C = 1, 0 to C - 1 for C > 1.

Symbols in the docstrings of the losses: p is the probability of a class, y is 1 in its pixels and 0
elsewhere, p_y is the probability of a pixel's true class, ce is -ln(p_y).
"""

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import nn

import config

EPSILON = 1e-18  # powers are constant below it: the gradient of a root is infinite at 0
GRADIENT_FLOOR = 1e-20  # least dp/dlogit, where float32 rounds p (1 - p) to 0
LOSSES = {}  # name -> builder(classes=1, **args) of a new loss; filled by @loss


class Pixels:
    """The input of a formula: N images of P pixels, with K = max(2, C) classes."""

    def __init__(self, logits, mask, ignore_index):
        x = (logits if logits.dtype == torch.float64 else logits.float()).flatten(2)
        if x.shape[1] == 1:  # channels for background and foreground
            self.logits = torch.cat([-x, x], 1)
            self.log_p = F.logsigmoid(self.logits)
        else:
            self.logits, self.log_p = x, x.log_softmax(1)
        self.binary, self.mask_shape = x.shape[1] == 1, mask.shape
        mask = mask.flatten(1).long()
        self.valid = torch.ones_like(mask, dtype=torch.bool)
        if ignore_index is not None:
            self.valid = mask != ignore_index
        self.target = mask.masked_fill(~self.valid, 0)
        self.count = self.valid.sum(1)
        if mask.device.type == 'cpu':  # on a GPU, reading the values would make the CPU wait
            low, high = torch.stack(self.target.aminmax()).tolist()
            top = self.log_p.shape[1] - 1
            if low < 0 or high > top:
                raise config.UserMistake(
                    f'a mask has the value {low if low < 0 else high}, but CLASSES={x.shape[1]} allows '
                    f'0 to {top}: correct the mask, CLASSES or IGNORE_INDEX (now {ignore_index})'
                )

    @functools.cached_property
    def p(self):
        """Probabilities (N, K, P)."""
        p = self.log_p.exp()
        if not self.binary:
            # The largest is 1 - sum(others), so its gradient does not round to 0 for confidently
            # wrong pixels.
            top = self.log_p.detach().argmax(1, keepdim=True)
            p = p.scatter(1, top, 0)
            p = p.scatter(1, top, 1 - p.sum(1, keepdim=True))
        return p + GRADIENT_FLOOR * (self.logits - self.logits.detach())  # adds 0 to the value

    @functools.cached_property
    def y(self):
        """One-hot masks (N, K, P), 0 in ignored pixels."""
        classes = torch.arange(self.log_p.shape[1], device=self.target.device)[:, None]
        return ((self.target[:, None] == classes) & self.valid[:, None]).to(self.log_p)

    @functools.cached_property
    def ce(self):
        """Cross-entropy (N, P), 0 in ignored pixels."""
        return F.nll_loss(self.log_p, self.target, reduction='none').masked_fill(~self.valid, 0)

    def mean(self, values, weights=None):
        """Mean (N,) of values (N, P) over the valid pixels of each image, weighted if given."""
        if weights is None:
            return values.sum(1) / self.count.clamp_min(1)
        return (values * weights).sum(1) / (weights * self.valid).sum(1).clamp_min(1e-30)


class Loss(nn.Module):
    """A loss of LOSSES as a module: checks its input and averages the formula over the images."""

    def __init__(self, name, classes=1, ignore_index=None, **args):
        super().__init__()
        if classes > 1 and name.startswith('BCE'):
            raise config.UserMistake(f'{name} is not for CLASSES={classes}: take {name[1:]}')
        self.name, self.classes, self.ignore_index = name, classes, ignore_index
        parameters = list(inspect.signature(LOSSES[name].formula).parameters.values())[1:]
        self.args = {p.name: p.default for p in parameters}
        for key in args.keys() - self.args.keys():
            takes = ', '.join(f'{arg}={default!r}' for arg, default in self.args.items())
            meant = config.did_you_mean(key, self.args)
            raise config.UserMistake(
                f'{name} has no argument {key}; {meant}it takes {takes or "no arguments"}'
            )
        self.args |= args

    def forward(self, logits, mask):
        shape = (len(mask), self.classes, *mask.shape[1:])
        if logits.ndim != 4 or logits.shape != shape or mask.is_floating_point():
            raise config.UserMistake(
                f'{self.name} expects logits (N, {self.classes}, H, W) and integer masks (N, H, W), '
                f'not {tuple(logits.shape)} and {tuple(mask.shape)} of {mask.dtype}'
            )
        with torch.autocast(device_type=logits.device.type, enabled=False):
            pixels = Pixels(logits, mask, self.ignore_index)
            return LOSSES[self.name].formula(pixels, **self.args).mean()


def loss(formula, name=None):
    """Add formula(pixels, **args), which returns one value per image (N,), to LOSSES."""
    name = name or formula.__name__
    LOSSES[name] = functools.wraps(formula)(functools.partial(Loss, name))
    LOSSES[name].formula = formula
    return LOSSES[name]
