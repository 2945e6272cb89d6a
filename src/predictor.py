"""Runs trained models over image files of any number, and keeps each image's result as it comes.

Every rank appends to its own part file in OUTPUT, one line per image; when all are done the parts
are joined. A batch is always made of the same images, however many ranks there are and wherever a
killed run stopped, so the joined result is the same to the byte.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path

import cv2
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import config
import metrics
import runtime
from dataset import ImageFiles, collate_files

GRID = [round(0.05 * step, 2) for step in range(1, 20)]  # thresholds tried out of fold


class Batches(Dataset):
    """ImageFiles in batches of VAL_BATCH_SIZE that are always the same; `keep` leaves some out.

    Images of different folds, which go to different models, are in different batches.
    """

    def __init__(self, data: ImageFiles):
        self.data, self.lists = data, []
        folds = data.folds or [0] * len(data)
        for fold in dict.fromkeys(folds):
            of_fold = [index for index, other in enumerate(folds) if other == fold]
            starts = range(0, len(of_fold), config.VAL_BATCH_SIZE)
            self.lists += [of_fold[start : start + config.VAL_BATCH_SIZE] for start in starts]

    def keep(self, done: set[str], rank: int, ranks: int) -> 'Batches':
        """This rank's share of the batches in which an image is not among the `done` names."""
        names = [file.name for file in self.data.files]
        left = [indices for indices in self.lists if not done.issuperset(names[i] for i in indices)]
        self.lists = left[rank::ranks]
        return self

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, number: int) -> dict:
        return collate_files([self.data[index] for index in self.lists[number]])


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
        if p.is_cuda or p.shape[1] > 1:
            return F.interpolate(p, shape, mode='bilinear')
        # The same to 1e-6, and several times as fast on a CPU: less arithmetic, and the memory of
        # the last image again.
        canvas = self.canvases.get(p.shape[2:])
        canvas = cv2.resize(p[0, 0].numpy(), shape[::-1], canvas, interpolation=cv2.INTER_LINEAR)
        self.canvases[p.shape[2:]] = canvas
        return torch.from_numpy(canvas)[None, None]

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


class PartWriter(BasePredictionWriter):
    """Appends a line per image to this rank's part file, from a thread of its own.

    Args:
        job: what is predicted with what, as one word; part files of another job are not continued.
        target: the file that the parts will be joined into; they lie beside it.
        line: (batch, number in the batch, result as a NumPy array) -> 'name,...', without its end.
        gather: called with this writer on every rank, when all parts are whole; gives `result`.
    """

    def __init__(self, job: str, target: Path, line, gather):
        super().__init__('batch')
        self.job, self.target, self.line, self.gather = job, target, line, gather

    def parts(self) -> list[Path]:
        return sorted(self.target.parent.glob(f'{self.target.name}.part*'))

    def prepare(self) -> set[str]:
        """Names of the images that a killed run of this job did, with RESUME; rank 0 removes all
        other part files, and cuts off a last line that was not finished."""
        if self.trainer.is_global_zero:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            for part in self.parts():
                with part.open('rb+') as file:
                    if config.RESUME and file.readline() == f'{self.job}\n'.encode():
                        whole = file.tell()
                        for line in file:
                            whole += len(line) if line.endswith(b'\n') else 0
                        file.truncate(whole)
                        continue
                part.unlink()
        self.trainer.strategy.barrier()
        done = set(self.find_lines())
        self.trainer.strategy.barrier()  # nobody writes before all have read
        return done

    def find_lines(self) -> dict[str, tuple[Path, int]]:
        """Image -> (part file, offset of its line); the lines themselves stay on the disk."""
        places = {}
        for part in self.parts():
            with part.open('rb') as file:
                offset = len(file.readline())
                for line in file:
                    places[line.partition(b',')[0].decode()] = part, offset
                    offset += len(line)
        return places

    def setup(self, trainer, module, stage) -> None:
        self.trainer = trainer

    def on_predict_start(self, trainer, module) -> None:
        part = self.target.with_name(f'{self.target.name}.part{trainer.global_rank}')
        self.file = part.open('ab')
        if not self.file.tell():
            self.file.write(f'{self.job}\n'.encode())
        self.thread, self.pending = ThreadPoolExecutor(1), []

    def write_on_batch_end(
        self, trainer, module, prediction, indices, batch, number, loader
    ) -> None:
        self.pending.append(self.thread.submit(self.write, batch, prediction))
        while len(self.pending) > 4 or (self.pending and self.pending[0].done()):
            self.pending.pop(0).result()

    def write(self, batch: dict, results: list[torch.Tensor]) -> None:
        for number, result in enumerate(results):
            self.file.write(f'{self.line(batch, number, result.cpu().numpy())}\n'.encode())
        self.file.flush()

    def on_predict_end(self, trainer, module) -> None:
        for future in self.pending:
            future.result()
        self.close()
        trainer.strategy.barrier()  # all parts are whole
        self.result = self.gather(self)
        trainer.strategy.barrier()  # all ranks have read them

    def on_exception(self, trainer, module, error) -> None:
        if hasattr(self, 'file'):
            self.close()

    def close(self) -> None:
        self.thread.shutdown()
        self.file.close()

    def lines(self, names):
        """The lines of these images, in this order, read one by one."""
        places = self.find_lines()
        files = {part: part.open('rb') for part in self.parts()}
        for name in names:
            part, offset = places[name]
            files[part].seek(offset)
            yield files[part].readline().decode().rstrip('\n')
        for file in files.values():
            file.close()

    def remove_parts(self) -> None:
        for part in self.parts():
            part.unlink()


def predict(predictor, data: ImageFiles, target: Path, line, settings: dict, gather=lambda _: None):
    """Run a Predictor over image files, going on after a killed run's with RESUME.

    Args:
        target, line, gather: see PartWriter.
        settings: whatever decides the result besides the files' names and the batch size.

    Returns: the PartWriter, which holds the lines and, on every rank, what `gather` made of them.
    """
    settings = {**settings, 'batch': config.VAL_BATCH_SIZE, 'files': [f.name for f in data.files]}
    job = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    writer = PartWriter(job, target, line, gather)
    predictor.data, predictor.prepare = data, writer.prepare
    trainer = pl.Trainer(
        **runtime.hardware(),
        callbacks=[writer, *runtime.progress_bars()],
        enable_progress_bar=bool(runtime.progress_bars()),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.predict(predictor, return_predictions=False)
    return writer
