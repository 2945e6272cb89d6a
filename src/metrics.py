"""Dice and IoU per image, as Kaggle scores them, and per class; the same on any number of devices.

For one image and class: Dice = 2 tp / (2 tp + fp + fn), IoU = tp / (tp + fp + fn), in pixels. With
one class the image's score is that of the foreground, 1 where it is neither there nor predicted.
With more it is the mean over the classes that the image or its prediction holds.
"""

import torch
from torchmetrics import Metric


def decide(probabilities: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Class indices (N, H, W) from probabilities (N, C, H, W): above the threshold, or the largest."""
    if probabilities.shape[1] == 1:
        return (probabilities[:, 0] > threshold).view(torch.uint8)
    return probabilities.argmax(1).to(torch.uint8)


def activate(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities, float32, from logits (N, C, H, W): sigmoid for one class, else softmax."""
    logits = logits.float()
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def count(prediction, mask, classes: int, ignore_index: int | None = None) -> torch.Tensor:
    """Pixels (N, 3, K) of tp, fp and fn, int64, of class indices (N, H, W); K = classes, or 1.

    With one class it is the foreground's, class 1. Pixels whose mask is `ignore_index` are left out.
    """
    valid = (
        torch.ones_like(mask, dtype=torch.bool) if ignore_index is None else mask != ignore_index
    )
    counts = []
    for index in [1] if classes == 1 else range(classes):
        predicted, true = (prediction == index) & valid, (mask == index) & valid
        tp, p, t = ((x.flatten(1)).sum(1) for x in (predicted & true, predicted, true))
        counts.append(torch.stack([tp, p - tp, t - tp], 1))
    return torch.stack(counts, 2)


def dice_and_iou(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dice and IoU of each image, float64 (N,), from counts (N, 3, K)."""
    tp, fp, fn = counts.double().unbind(1)
    present = tp + fp + fn > 0
    dice, iou = 2 * tp / (2 * tp + fp + fn).clamp(min=1), tp / (tp + fp + fn).clamp(min=1)
    number = present.sum(1)
    nothing = (number == 0).double()  # neither there nor predicted: right
    return tuple((x.sum(1) + nothing) / number.clamp(min=1) for x in (dice, iou))


def class_means(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per class, (K,): mean Dice over the images that hold it or are predicted to, mean IoU over
    them, and the IoU of the whole data set (of its summed pixels). NaN where the class is absent."""
    tp, fp, fn = counts.double().unbind(1)
    union = tp + fp + fn
    present = (union > 0).sum(0)
    dice, iou = 2 * tp / (union + tp).clamp(min=1), tp / union.clamp(min=1)
    return dice.sum(0) / present, iou.sum(0) / present, tp.sum(0) / union.sum(0)


class Scores(Metric):
    """Collects each image's counts and loss; an image that two devices saw is scored once.

    Under DDP the sampler repeats images to make the ranks' shares equal, so sums over the ranks
    would count those twice; rows that carry the image's index can be told apart.
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
        """val_loss, val_dice, val_iou: means over images; with several classes also
        val_iou_dataset, the mean over classes of the whole data set's IoU, and each class's
        val_dice_class# and val_iou_class#, where the class is there."""
        index, counts, loss = (
            (
                torch.cat(state) if isinstance(state, list) else state
            ).cpu()  # float64 is not everywhere
            for state in (self.index, self.counts, self.loss)
        )
        order = index.argsort(stable=True)
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = index[order][1:] != index[order][:-1]
        counts, loss = counts[order][first], loss[order][first]
        dice, iou = dice_and_iou(counts)
        scores = {'val_loss': loss.double().mean(), 'val_dice': dice.mean(), 'val_iou': iou.mean()}
        if counts.shape[2] > 1:
            dices, ious, whole = class_means(counts)
            scores['val_iou_dataset'] = whole.nanmean()
            for number in range(counts.shape[2]):
                if not dices[number].isnan():
                    scores[f'val_dice_class{number}'] = dices[number]
                    scores[f'val_iou_class{number}'] = ious[number]
        return {name: value.float().to(self.device) for name, value in scores.items()}
