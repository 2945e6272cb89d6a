"""Dice and IoU per image, as on Kaggle, and per class. The number of devices changes nothing.

For one image and class: Dice = 2 tp / (2 tp + fp + fn), IoU = tp / (tp + fp + fn), in pixels. With
one class, an image's score is that of the foreground, or 1 if it is neither there nor predicted.
With more classes, it is the mean over the classes that are in the image or in its prediction.
"""

import itertools

import numpy as np
import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def decide(probabilities: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Class indices (N, H, W) from probabilities (N, C, H, W): above the threshold, or the largest."""
    if probabilities.shape[1] == 1:
        return (probabilities[:, 0] > threshold).view(torch.uint8)
    return probabilities.argmax(1).to(torch.uint8)


def activate(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities, float32, from logits (N, C, H, W): sigmoid for one class, else softmax."""
    logits = logits.float()
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def predict_windows(model, x: torch.Tensor, size: tuple[int, int], batch_size: int) -> torch.Tensor:
    """Logits (N, classes, H, W) of images (N, C, H, W) of any size; float32 if they are blended.

    Windows of `size` that overlap by half are predicted in batches and blended with the weights of
    a Hann window. A model is worst at the border of its input, so images are extended by reflection,
    by an eighth of a window, as in U-Net (Ronneberger et al. 2015, arXiv 1505.04597).
    """
    if x.shape[2:] == size:
        return model(x)
    (height, width), (top, left) = x.shape[2:], (side // 8 for side in size)
    rows, columns = extended(height, size[0]), extended(width, size[1])
    padded = x[..., rows[:, None], columns]
    hann = [torch.hann_window(n + 2, periodic=False, device=x.device)[1:-1] for n in size]
    weight = hann[0][:, None] * hann[1]
    total, weights = 0, weight.new_zeros(padded.shape[2:])
    row_slices, column_slices = (
        window_slices(len(rows), size[0]),
        window_slices(len(columns), size[1]),
    )
    windows = list(itertools.product(row_slices, column_slices))
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        logits = model(torch.cat([padded[..., r, c] for r, c in batch])).float()
        if first == 0:
            total = logits.new_zeros(len(x), logits.shape[1], len(rows), len(columns))
        for (r, c), part in zip(batch, logits.split(len(x))):
            total[..., r, c] += part * weight
            weights[r, c] += weight
    return total.div_(weights)[..., top : top + height, left : left + width]


def extended(side: int, length: int) -> torch.Tensor:
    """Pixel indices of an axis, reflected by an eighth of a window on each side, or until one fits."""
    border = length // 8
    widths = border, max(border, length - border - side)
    return torch.from_numpy(np.pad(np.arange(side), widths, 'reflect' if side > 1 else 'edge'))


def window_slices(side: int, length: int) -> list[slice]:
    """Slices of a length that cover a side, as evenly as can be, and overlap by half or more."""
    steps = -(-2 * (side - length) // length)  # of at most half a window, rounded up
    starts = (round(n * (side - length) / max(1, steps)) for n in range(steps + 1))
    return [slice(start, start + length) for start in starts]


def count(prediction, mask, classes: int, ignore_index: int | None = None) -> torch.Tensor:
    """Numbers of tp, fp and fn pixels, int64 (N, 3, K), from class indices (N, H, W); K = classes.

    With one class, only class 1, the foreground, is counted. Pixels of `ignore_index` are left out.
    """
    valid = True if ignore_index is None else mask != ignore_index
    counts = []
    for index in [1] if classes == 1 else range(classes):
        predicted, true = (prediction == index) & valid, (mask == index) & valid
        tp, p, t = (x.sum((1, 2)) for x in (predicted & true, predicted, true))
        counts.append(torch.stack([tp, p - tp, t - tp], 1))
    return torch.stack(counts, 2)


def per_class(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dice and IoU, float64 (..., K), from counts (..., 3, K); NaN for a class that is not there."""
    tp, fp, fn = counts.double().unbind(-2)
    return 2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn)


def dice_and_iou(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dice and IoU of each image, float64 (N,), from counts (N, 3, K)."""
    # NaN means that nothing is there and nothing is predicted: a perfect score.
    return tuple(x.nanmean(1).nan_to_num(nan=1) for x in per_class(counts))


def class_means(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per class, each (K,): mean Dice over images, mean IoU over images, and IoU of all pixels."""
    dice, iou = per_class(counts)
    return dice.nanmean(0), iou.nanmean(0), per_class(counts.sum(0))[1]


class Scores(Metric):
    """Collects the counts and the loss of each image. An image that two devices saw counts once.

    With DDP the sampler repeats images, so that all ranks get equally many. The index shows which.
    """

    full_state_update = False

    def __init__(self):
        super().__init__()
        for name in ('index', 'counts', 'loss'):
            self.add_state(name, [], dist_reduce_fx='cat')

    def update(self, index: torch.Tensor, counts: torch.Tensor, loss: torch.Tensor) -> None:
        """index (N,), counts (N, 3, K) as of `count`, loss: the batch's mean, a scalar."""
        self.index.append(index)
        self.counts.append(counts)
        self.loss.append(loss.detach().float().expand(len(index)))

    def compute(self) -> dict[str, torch.Tensor]:
        """val_loss, val_dice, val_iou: means over images. With several classes also
        val_iou_dataset (IoU of all pixels, mean over classes), val_dice_class#, val_iou_class#."""
        states = map(dim_zero_cat, (self.index, self.counts, self.loss))
        index, counts, loss = (state.cpu() for state in states)  # not every device has float64
        _, first = np.unique(index, return_index=True)
        counts, loss = counts[first], loss[first]
        dice, iou = dice_and_iou(counts)
        scores = {'val_loss': loss.double().mean(), 'val_dice': dice.mean(), 'val_iou': iou.mean()}
        if counts.shape[2] > 1:
            *means, whole = class_means(counts)
            scores['val_iou_dataset'] = whole.nanmean()
            for number, (dice, iou) in enumerate(zip(*means)):
                if not dice.isnan():
                    scores |= {f'val_dice_class{number}': dice, f'val_iou_class{number}': iou}
        return {name: value.float().to(self.device) for name, value in scores.items()}
