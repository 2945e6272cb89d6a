"""Runs trained models over image files of any number.

A batch is always made of the same images, however many ranks there are and wherever a killed run
stopped, so the result is the same to the byte.
"""

import hashlib
import json
from functools import reduce
from pathlib import Path

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import callbacks
import config
import metrics
import runtime
from image_files import Batches, ImageFiles, collate_files
from part_writer import PartWriter


class Predictor(pl.LightningModule):
    """Class indices, or counts against the true masks, at each image's own size.

    Args:
        models: fold -> CarvanaModel; their probabilities are averaged, or, with `out_of_fold`, each
            image is given to the model of its fold alone.
        thresholds: above which probability a pixel is foreground (one class).
        mirrored: average with the prediction for the mirrored image (TTA).
    """

    def __init__(self, models: dict, thresholds: list[float], mirrored: bool = False):
        super().__init__()
        self.models = torch.nn.ModuleList(models.values())
        self.folds = list(models)
        self.inputs = sorted({model.input_form for model in self.models})
        self.mirrored = mirrored
        self.register_buffer('thresholds', torch.tensor(thresholds), persistent=False)
        self.data, self.prepare = None, None  # set by `predict`
        self.canvases = {}

    def predict_dataloader(self) -> DataLoader:
        batches = Batches(self.data)
        return DataLoader(
            batches.keep(self.prepare(), self.trainer.global_rank, self.trainer.world_size),
            batch_size=None,
            num_workers=config.NUM_WORKERS,
            pin_memory=self.device.type == 'cuda',
            prefetch_factor=2 if config.NUM_WORKERS else None,
        )

    def probabilities(self, batch: dict, models: list):
        """For each image of a batch of ImageFiles, in turn, the mean probabilities (1, C, height,
        width); to be used up before the next, which is written in the same place."""
        totals = {}  # a model's output is resized with all others of its size, as a mean is linear
        for model in models:
            x = batch['images'][self.inputs.index(model.input_form)]
            p = metrics.activate(model(x))
            if self.mirrored:
                p = (p + metrics.activate(model(x.flip(-1))).flip(-1)) / 2
            p = p / len(models) if len(models) > 1 else p
            totals[p.shape[2:]] = totals[p.shape[2:]] + p if p.shape[2:] in totals else p
        for n, shape in enumerate(batch['shape']):
            yield reduce(torch.add, (self.enlarge(p[[n]], shape) for p in totals.values()))

    def enlarge(self, p: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Probabilities (1, C, H, W) at an image's own (height, width), bilinear."""
        if p.device.type != 'cpu' or p.shape[1] > 1:
            return F.interpolate(p, shape, mode='bilinear')
        # The same to 1e-6, and several times as fast on a CPU: less arithmetic, and the memory of
        # the last image again.
        canvas = self.canvases.get(p.shape[2:])
        canvas = cv2.resize(p[0, 0].numpy(), shape[::-1], canvas, interpolation=cv2.INTER_LINEAR)
        self.canvases[p.shape[2:]] = canvas
        return torch.from_numpy(canvas)[None, None]

    def identity(self) -> list:
        """What tells this Predictor from others, to recognise the job that a killed run was doing."""
        sums = [sum(p.detach().double().sum().item() for p in m.parameters()) for m in self.models]
        return [self.folds, sums, self.thresholds.tolist(), self.mirrored]

    def predict_step(self, batch: dict, batch_index: int) -> list[torch.Tensor]:
        """Per image: class indices uint8 (height, width), or with masks `counts`."""
        if 'mask' not in batch:
            return [
                metrics.decide(p, self.thresholds[0])[0]
                for p in self.probabilities(batch, self.models)
            ]
        model = self.models[self.folds.index(batch['fold'][0])]
        return [
            self.counts(p, mask.to(p.device), model.hparams.IGNORE_INDEX)
            for p, mask in zip(self.probabilities(batch, [model]), batch['mask'])
        ]

    def counts(self, p: torch.Tensor, mask: torch.Tensor, ignore_index) -> torch.Tensor:
        """tp, fp, fn of an image, int64: (T, 3, 1) for the thresholds, or (1, 3, C) of the classes."""
        if p.shape[1] > 1:
            return metrics.count(metrics.decide(p), mask[None], p.shape[1], ignore_index)
        # above[j] pixels have p > thresholds[j]: those with more than j thresholds below p.
        above = []
        for index in (1, 0):
            below = torch.bucketize(p[0, 0][mask == index], self.thresholds)
            bins = torch.bincount(below, minlength=len(self.thresholds) + 1)
            above.append(bins.flip(0).cumsum(0).flip(0))
        tp, fp = (x[1:] for x in above)
        return torch.stack([tp, fp, above[0][0] - tp], 1)[:, :, None]


def predict(predictor, data: ImageFiles, target: Path, line, gather=lambda _: None, form=None):
    """Run a Predictor over image files, going on after a killed run's with RESUME.

    Args:
        target, line, gather: see PartWriter.
        form: whatever decides what `line` does, besides what is predicted.

    Returns: the PartWriter, which holds the lines and, on every rank, what `gather` made of them.
    """
    settings = {
        'models': predictor.identity(),
        'batch': config.VAL_BATCH_SIZE,
        'files': [(str(f), f.stat().st_size) for f in data.files],
        'form': form,
    }
    job = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    writer = PartWriter(job, target, line, gather)
    predictor.data, predictor.prepare = data, writer.prepare
    bars = callbacks.progress_bars()
    trainer = runtime.bare_trainer(callbacks=[writer, *bars], enable_progress_bar=bool(bars))
    with runtime.told_plainly(training=False):
        trainer.predict(predictor, return_predictions=False)
    return writer


def predict_one(model, file: Path, threshold: float) -> np.ndarray:
    """The prediction for one image, uint8 (height, width), as in the run over many."""
    runner = Predictor({0: model}, [threshold], config.TTA)
    with torch.inference_mode():
        batch = collate_files([ImageFiles([file], runner.inputs)[0]])
        return runner.predict_step(batch, 0)[0].cpu().numpy()
