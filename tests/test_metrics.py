"""Dice and IoU by hand, against torchmetrics-free references, and over ranks."""

import numpy as np
import pytest
import torch

import metrics


def scores_of(prediction, mask, classes=1, ignore=None):
    counts = metrics.count(torch.tensor(prediction), torch.tensor(mask), classes, ignore)
    return [x.tolist() for x in metrics.dice_and_iou(counts)]


def test_by_hand():
    mask = [[[0, 1], [1, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    prediction = [[[1, 1], [0, 1]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]]
    dice, iou = scores_of(prediction, mask)
    assert dice == pytest.approx([4 / 6, 1, 0])  # an empty mask predicted empty scores 1
    assert iou == pytest.approx([2 / 4, 1, 0])


def test_ignored_pixels_do_not_count():
    dice, iou = scores_of([[[1, 1, 0]]], [[[1, 255, 255]]], ignore=255)
    assert dice == iou == [1]


def test_an_absent_class_does_not_count():
    dice, iou = scores_of([[[0, 0, 1, 1]]], [[[0, 0, 0, 1]]], classes=5)
    assert dice == pytest.approx([(4 / 5 + 2 / 3) / 2])
    assert iou == pytest.approx([(2 / 3 + 1 / 2) / 2])


def test_against_numpy_on_random_masks():
    rng = np.random.default_rng(0)
    prediction, mask = rng.integers(0, 4, (2, 6, 9, 7))
    expected = []
    for p, m in zip(prediction, mask):
        values = [
            2 * ((p == k) & (m == k)).sum() / ((p == k).sum() + (m == k).sum()) for k in range(4)
        ]
        expected.append(np.mean(values))
    assert scores_of(prediction, mask, 4)[0] == pytest.approx(expected)


def test_class_means():
    counts = metrics.count(
        torch.tensor([[[0, 1]], [[0, 0]]]), torch.tensor([[[0, 0]], [[0, 0]]]), 3
    )
    dice, iou, whole = metrics.class_means(counts)
    assert dice[:2].tolist() == pytest.approx([(2 / 3 + 1) / 2, 0])
    assert iou[:2].tolist() == pytest.approx([0.75, 0])
    assert whole[0] == pytest.approx(3 / 4) and whole[2].isnan()


def test_scores_do_not_depend_on_batches_or_repeats():
    rng = torch.Generator().manual_seed(0)
    prediction, mask = torch.randint(0, 2, (2, 7, 5, 5), generator=rng)
    counts = metrics.count(prediction, mask, 1)
    rows = torch.arange(7)
    once, repeated = metrics.Scores(), metrics.Scores()
    once.update(rows, counts, torch.tensor(0.5))
    for part in ([0, 3], [6, 5, 3], [4, 2, 1, 0]):  # as the ranks of DDP share them out
        repeated.update(rows[part], counts[part], torch.tensor(0.5))
    first, second = once.compute(), repeated.compute()
    assert first == second
    assert first['val_dice'] == pytest.approx(metrics.dice_and_iou(counts)[0].mean().item())


def test_decide_and_activate():
    logits = torch.tensor([0.1, -0.1, 60.0, -60.0]).reshape(1, 1, 1, 4)
    assert metrics.decide(metrics.activate(logits.half())).tolist() == [[[1, 0, 1, 0]]]
    assert metrics.activate(logits.half()).dtype == torch.float32
    many = torch.tensor([[[[1.0, 5]], [[2, 4]], [[0, 0]]]])
    assert metrics.decide(metrics.activate(many)).tolist() == [[[1, 0]]]
    assert metrics.activate(many).sum(1) == pytest.approx(1)
