"""What all losses of the project share; each is a formula in ND_Crossentropy.py or dice_loss.py.

Every loss is called as loss(logits, mask): logits (N, C, H, W) of any float type, straight from
the model, mask (N, H, W) of class indices. C = 1 is a sigmoid over masks {0, 1}, C > 1 a softmax
over masks {0..C-1}. The result is a scalar, never negative, 0 for a perfect prediction, computed
in float32 (float64 stays) whatever autocast does. Pixels of IGNORE_INDEX count nowhere. The loss
of a batch is the mean over its images, so that no image changes the loss of another.

A loss is written as formula(px, its arguments), with one value per image. In the texts p is the
probability of a class, y its mask, p_y that of a pixel's true class and ce = -ln p_y.
"""

import functools
import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn

import config

EPSILON = 1e-18  # powers are flat below it, as the gradient of roots at 0 is infinite
GRADIENT_FLOOR = 1e-20  # of dp/dlogit: what is left where float32 rounds p (1 - p) to 0
MOST = {'ignore_index': 255, 'k': 100, 'r': 1, 'dice_weight': 1, 'FocalLoss.alpha': 1}  # else: any
LOSSES = {}  # name -> builder(classes=1, **args) of a fresh loss; filled by @loss


class Pixels:
    """A batch as the formulas see it: N images, P pixels, K = max(2, C) classes."""

    def __init__(self, logits, mask, ignore_index):
        x = (logits if logits.dtype == torch.float64 else logits.float()).flatten(2)
        if x.shape[1] == 1:  # background and foreground
            self.x = torch.cat([-x, x], 1)
            self.log_p = F.logsigmoid(self.x)
        else:
            self.x, self.log_p = x, x.log_softmax(1)
        self.classes, self.size, top = x.shape[1], mask.shape, self.log_p.shape[1] - 1
        mask = mask.flatten(1).long()
        self.keep = torch.ones_like(mask, dtype=torch.bool)
        if ignore_index is not None:
            self.keep = mask != ignore_index
        self.target = mask.masked_fill(~self.keep, 0)
        self.count = self.keep.sum(1)
        if mask.device.type == 'cpu':  # elsewhere a look would make the host wait for the device
            low, high = torch.stack(self.target.aminmax()).tolist()
            if low < 0 or high > top:
                raise config.UserMistake(
                    f'a mask holds the value {low if low < 0 else high}; CLASSES={self.classes} wants '
                    f'0 to {top}, or IGNORE_INDEX, which is {ignore_index}'
                )

    @functools.cached_property
    def p(self):
        """Probabilities (N, K, P), whose gradient is not lost to rounding where a pixel is wrong with
        confidence: it is a product p (1 - p), as the largest of several is 1 - the others."""
        p = self.log_p.exp()
        if self.classes > 1:
            top = self.log_p.detach().max(1, keepdim=True).indices
            p = p.scatter(1, top, 0)
            p = p.scatter(1, top, 1 - p.sum(1, keepdim=True))
        return p + GRADIENT_FLOOR * (self.x - self.x.detach())

    @functools.cached_property
    def y(self):
        """Masks of the classes (N, K, P), 0 or 1."""
        classes = torch.arange(self.log_p.shape[1], device=self.target.device)[:, None]
        return ((self.target[:, None] == classes) & self.keep[:, None]).to(self.log_p)

    @functools.cached_property
    def ce(self):
        """Cross-entropy (N, P), 0 where ignored."""
        return F.nll_loss(self.log_p, self.target, reduction='none').masked_fill(~self.keep, 0)

    def mean(self, values, weights=None):
        """(N,): mean of (N, P) values, 0 where ignored, over the pixels of each image."""
        if weights is None:
            return values.sum(1) / self.count.clamp_min(1)
        return (values * weights).sum(1) / (weights * self.keep).sum(1).clamp_min(1e-30)


class Loss(nn.Module):
    """The loss `name` of LOSSES: its arguments, checks, float32, the mean over images."""

    def __init__(self, name, classes=1, **args):
        super().__init__()
        if type(classes) is not int or classes < 1 or (classes > 1 and name.startswith('BCE')):
            instead = f', take {name[1:]}' if name.startswith('BCE') else ''
            raise config.UserMistake(f'{name} is not for CLASSES={classes!r}{instead}')
        self.name, self.classes = name, classes
        legal = list(inspect.signature(LOSSES[name].formula).parameters.values())[1:]
        self.args = {'ignore_index': None} | {arg.name: arg.default for arg in legal}
        for key, value in args.items():
            if key not in self.args:
                takes = ', '.join(f'{key}={default!r}' for key, default in self.args.items())
                meant = config.nearest(key, self.args)
                raise config.UserMistake(f'{name} has no argument {key}; {meant}it takes {takes}')
            self.check(key, value)
        self.args |= args
        self.ignore_index = self.args.pop('ignore_index')

    def check(self, key, value):
        default, most = self.args[key], MOST.get(f'{self.name}.{key}', MOST.get(key, math.inf))
        kinds, count, wants = (int, float), 1, f'a number from 0 to {most}'
        if isinstance(default, bool):
            kinds, wants = (bool,), 'True or False'
        elif key == 'weights':
            count = max(2, self.classes)
            wants = f'{count} numbers'
        values = value if count > 1 and isinstance(value, (list, tuple)) else [value]
        fits = all(type(v) in kinds and 0 <= v <= most and v != math.inf for v in values)
        if not (fits and len(values) == count) and not (value is None and default is None):
            raise config.UserMistake(f'{key} of {self.name} is {wants}, not {value!r}')

    def forward(self, logits, mask):
        shape = (len(mask), self.classes, *mask.shape[1:])
        if logits.ndim != 4 or logits.shape != shape or mask.is_floating_point():
            raise config.UserMistake(
                f'{self.name} takes logits (N, {self.classes}, H, W) and masks (N, H, W) of whole '
                f'numbers, not {tuple(logits.shape)} and {tuple(mask.shape)} of {mask.dtype}'
            )
        with torch.autocast(device_type=logits.device.type, enabled=False):
            px = Pixels(logits, mask, self.ignore_index)
            return LOSSES[self.name].formula(px, **self.args).mean()


def loss(formula, name=None):
    """The builder of the loss that `formula` writes, entered into LOSSES under its name."""
    name = name or formula.__name__
    LOSSES[name] = functools.wraps(formula)(functools.partial(Loss, name))
    LOSSES[name].formula = formula
    return LOSSES[name]
