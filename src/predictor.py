"""Runs trained models on any number of image files. The result has the size of each image.

A batch always contains the same images, with any number of processes and after any kill. So the
result is always the same, byte for byte. In the order of the work: list_test_files, ImageBatches
reads, Predictor predicts, SubmissionWriter writes; write_submission puts them together.
"""

import csv
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.utilities import rank_zero_only
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import config
import files
import images
import metrics
import runtime


def list_test_files(model) -> list[Path]:
    """The images that a CarvanaModel is to predict: those of TEST_CSV, in its order. If it lists
    none of those in TEST_PATH, or there is no TEST_CSV, all images of TEST_PATH.

    Raises:
        config.UserMistake: for an image that cannot be read.
    """
    folder = config.TEST_PATH
    if not files.walk(config.path(folder)):
        runtime.print_once(f'nothing to predict: TEST_PATH={folder} does not exist, or it is empty')
        return []
    found = files.list_files('TEST_PATH')
    names = list(found)
    if files.is_table('TEST_CSV', 'sample_submission.csv'):
        table = files.read_table(config.path(config.TEST_CSV), ['img'], 'fix or remove it')
        listed = dict.fromkeys(files.name_in_table(cell, 'TEST_PATH') for cell in table.img)
        names = [name for name in listed if name in found] or names
        differing = sorted(listed.keys() ^ found.keys())
        if differing:
            runtime.print_once(
                f'{config.TEST_CSV} and TEST_PATH differ in {len(differing)} images '
                f'({files.first_few(differing)}): {len(names)} are predicted'
            )
    paths = [found[name] for name in names]
    checked = tqdm(paths, 'checking headers', disable=None, leave=False)
    sizes = [images.check(file).size for file in checked]
    if rank_zero_only.rank == 0:
        images.print_large(sizes, model.input_size[:2], model.hparams.SCALE)
        files.print_unused('TEST_PATH', set(paths), 'predicted')
    return paths


class ImageBatches(Dataset):
    """Image files in batches of VAL_BATCH_SIZE; with SCALE, a batch is one image.

    Items are whole batches: {'image': uint8 (N, channels, H, W), 'img': paths, relative to TEST_PATH
    if inside it, 'shape': each image's own (height, width)}; if there are mask files, also 'mask': a
    list of uint8 (height, width).
    """

    def __init__(self, image_files, model, mask_files=()):
        self.image_files, self.mask_files = list(image_files), list(mask_files)
        self.input_size, self.mask_rule = model.input_size, model.mask_rule
        self.scale = model.hparams.SCALE
        self.batch_size = config.VAL_BATCH_SIZE if self.scale is None else 1
        self.folder = config.path(config.TEST_PATH)

    def __len__(self) -> int:
        return -(-len(self.image_files) // self.batch_size)

    def __getitem__(self, number: int) -> dict:
        rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
        image_files, (*crop_size, channels) = self.image_files[rows], self.input_size
        shapes = [images.size_of(file) for file in image_files]
        sizes = [images.scaled(shape, crop_size, self.scale) for shape in shapes]
        pixels = [images.read_image(f, channels, size) for f, size in zip(image_files, sizes)]
        batch = {
            'image': torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2),  # channels-last
            'img': [files.relative(file, self.folder) for file in image_files],
            'shape': shapes,
        }
        for file, shape in zip(self.mask_files[rows], shapes):
            mask = torch.from_numpy(images.read_mask(file, *self.mask_rule))
            if mask.shape != shape:
                raise config.UserMistake(f'{file}: mask and image differ in size: run folds.py')
            batch.setdefault('mask', []).append(mask)
        return batch


class Predictor(pl.LightningModule):
    """Predicts class indices, or counts right and wrong pixels, from the mean of some models.

    Args:
        models: CarvanaModels of the same input size and classes.
        thresholds: probabilities above which a pixel is foreground (for one class).
        tta: average with the prediction for the mirrored image.
    """

    def __init__(self, models: list, thresholds: list[float], tta: bool = False):
        super().__init__()
        self.models, self.tta = torch.nn.ModuleList(models), tta
        self.ignore_index = models[0].ignored
        self.register_buffer('thresholds', torch.tensor(thresholds), persistent=False)

    def probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """Mean probabilities, float32 (N, classes, H, W), of 8-bit images (N, channels, H, W)."""
        mean = 0
        for model in self.models:
            mean += metrics.activate(model.predict(x))  # in place: a scan's are large
            if self.tta:
                mean += metrics.activate(model.predict(x.flip(-1))).flip(-1)
        return mean.div_(len(self.models) * (2 if self.tta else 1))

    def predict_step(self, batch: dict, batch_index: int) -> list[np.ndarray]:
        """Per image of a batch of ImageBatches: class indices, uint8 (height, width); if the batch
        has masks, counts instead."""
        if not batch:
            return []  # of a process that has no images, see `run`
        results, probabilities = [], self.probabilities(batch['image'])
        if not probabilities.sum().isfinite():  # a NaN stays in the sum
            raise config.UserMistake(
                f'the predictions for {files.first_few(batch["img"])} are not finite with '
                f"PRECISION={config.PRECISION}: try PRECISION='bf16' or 32"
            )
        for n, p in enumerate(probabilities):
            p, shape = p[None], batch['shape'][n]
            if p.shape[2:] != shape:
                p = F.interpolate(p, shape, mode='bilinear')
            if 'mask' in batch:
                results.append(self.count(p, batch['mask'][n]).cpu().numpy())
            else:
                results.append(metrics.decide(p, self.thresholds[0])[0].cpu().numpy())
        return results

    def count(self, p: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """tp, fp, fn from probabilities (1, K, height, width) and a mask (height, width), int64:
        (T, 3, 1) for T thresholds, or (1, 3, K) for K classes."""
        if p.shape[1] > 1:
            return metrics.count(metrics.decide(p), mask[None], p.shape[1], self.ignore_index)
        inside, outside = p[0, 0][mask == 1], p[0, 0][mask == 0]  # neither: ignored
        tp, fp = (torch.stack([(x > t).sum() for t in self.thresholds]) for x in (inside, outside))
        return torch.stack([tp, fp, len(inside) - tp], 1)[:, :, None]


class SubmissionWriter(BasePredictionWriter):
    """Appends a row img,rle_mask per image to this process's part file, and writes mask files.

    Memory stays flat, and a killed run can resume.

    Args:
        part: the part file.
        mask_folder: where to write <img>.png; None: nowhere.
    """

    def __init__(self, part: Path, mask_folder: Path | None):
        super().__init__('batch')
        self.part, self.mask_folder = part, mask_folder

    def write_on_batch_end(self, trainer, module, results, indices, batch, number, loader) -> None:
        value = 255 if module.models[0].hparams.CLASSES == 1 else 1  # of class 1 in a mask file
        with self.part.open('a', encoding='utf-8', newline='') as part:
            rows = csv.writer(part, lineterminator='\n')
            for name, mask in zip(batch.get('img', ()), results):
                if self.mask_folder is not None:
                    png = cv2.imencode('.png', mask * np.uint8(value))[1]
                    file = self.mask_folder / Path(name).with_suffix('.png')
                    with files.atomic_write(file) as temporary:
                        temporary.write_bytes(png)
                rows.writerow([name, images.rle_encode(mask, config.RLE_ORDER)])


def trainer_with_bar() -> pl.Trainer:
    """A Trainer that predicts, with a progress bar on a terminal."""
    bars = runtime.progress_bars()
    return runtime.make_trainer(callbacks=bars, enable_progress_bar=bool(bars))


def run(trainer, predictor: Predictor, batches: ImageBatches, done: int = 0, keep: bool = True):
    """Predict this process's share of the batches, without the first `done` of them.

    Returns: a list of the results of Predictor.predict_step; None unless `keep`.
    """
    first, end = (len(batches) * (trainer.global_rank + i) // trainer.world_size for i in (0, 1))
    rest = torch.utils.data.Subset(batches, range(min(first + done, end), end))
    loader = DataLoader(
        rest if len(rest) else [{}],  # Lightning needs a batch in every process
        batch_size=None,
        num_workers=min(config.NUM_WORKERS, len(rest)),
        pin_memory=trainer.strategy.root_device.type == 'cuda',
    )
    with runtime.explain_errors(training=False):
        return trainer.predict(predictor, loader, return_predictions=keep)


def predict(predictor: Predictor, batches: ImageBatches) -> list[np.ndarray]:
    """The results of Predictor.predict_step for all images, in order, on every process."""
    trainer = trainer_with_bar()
    ranks = [run(trainer, predictor, batches)]
    if trainer.world_size > 1:
        this_rank, ranks = ranks[0], [None] * trainer.world_size
        torch.distributed.all_gather_object(ranks, this_rank)
    return [result for rank in ranks for batch in rank for result in batch]


def write_submission(predictor: Predictor, batches: ImageBatches, mask_folder: Path | None) -> None:
    """Predict all images and write OUTPUT/submission.csv. RESUME continues a killed run of the same
    fingerprint. mask_folder: see SubmissionWriter."""
    trainer = trainer_with_bar()
    key = fingerprint(predictor, batches, mask_folder is not None, trainer.world_size)
    target = config.path(config.OUTPUT) / 'submission.csv'
    target.parent.mkdir(parents=True, exist_ok=True)
    parts = [target.with_name(f'submission.{key}.part{r}') for r in range(trainer.world_size)]
    part, lines = parts[trainer.global_rank], []
    if config.RESUME and part.exists():
        lines = part.read_bytes().splitlines(keepends=True)
    # The last batch may be unfinished: its rows are dropped.
    done = sum(line.endswith(b'\n') for line in lines) // batches.batch_size
    part.write_bytes(b''.join(lines[: done * batches.batch_size]))
    trainer.callbacks.append(SubmissionWriter(part, mask_folder))
    run(trainer, predictor, batches, done, keep=False)
    trainer.strategy.barrier()  # all parts are complete
    if trainer.is_global_zero:
        with files.atomic_write(target) as temporary:
            temporary.write_bytes(b'img,rle_mask\n' + b''.join(p.read_bytes() for p in parts))
        for part in target.parent.glob('submission.*.part*'):
            part.unlink()


def fingerprint(predictor: Predictor, batches: ImageBatches, save_masks: bool, ranks: int) -> str:
    """A digest of all that a run's results depend on. It survives a copy to another machine."""
    settings = [
        [config.TEST_PATH, config.RLE_ORDER, batches.batch_size, save_masks, ranks],
        [files.relative(file, batches.folder) for file in batches.image_files],
        [file.stat().st_size for file in batches.image_files],
        [predictor.thresholds.tolist(), predictor.tta, runtime.precision()[0]],
        [dict(model.hparams) for model in predictor.models],
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for tensor in predictor.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
