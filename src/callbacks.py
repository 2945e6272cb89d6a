"""Callbacks for epoch lines, pictures and checkpoints; finding a run to resume."""

import io
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only

import config
import files
import folds
import plots
import runtime


class EpochLog(Callback):
    """Prints one line per epoch, and writes metrics.csv: one row per epoch.

    `history` has one dictionary of logged values per epoch. Every checkpoint has it, for a resumed
    run.
    """

    def __init__(self, fold: int):
        self.fold, self.history = fold, []

    def state_dict(self) -> dict:
        return {'history': self.history}

    def load_state_dict(self, state: dict) -> None:
        self.history = list(state['history'])

    def on_train_epoch_start(self, trainer, module) -> None:
        self.start = time.monotonic()

    def on_train_epoch_end(self, trainer, module) -> None:
        values = {'epoch': trainer.current_epoch, 'step': trainer.global_step}
        values |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.history.append(values)
        if not trainer.is_global_zero:
            return
        files.write_table(pd.DataFrame(self.history), Path(trainer.logger.log_dir) / 'metrics.csv')
        shown = ('train_loss', 'val_loss', 'val_dice', 'val_iou', 'val_iou_dataset')
        scores = '  '.join(f'{name} {values[name]:.4f}' for name in shown if name in values)
        epoch = f'{trainer.current_epoch + 1:3d}/{trainer.max_epochs}'
        seconds = time.monotonic() - self.start
        line = f'fold {self.fold}  epoch {epoch}  {scores}  {seconds:6.1f} s'
        bar = trainer.progress_bar_callback
        bar.print(line) if bar else print(line, flush=True)


class PredictionImages(Callback):
    """Logs the first validation images of each epoch to TensorBoard: truth left, prediction right."""

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_index, loader=0):
        if batch_index or not trainer.is_global_zero:
            return
        rows = []
        for image, *masks in zip(batch['image'][:4], batch['mask'], outputs):
            image = plots.small(image.permute(1, 2, 0).cpu().numpy(), 320)
            masks = (plots.small(mask.cpu().numpy(), 320) for mask in masks)
            panels = [plots.overlay(image, mask, module.hparams.CLASSES) for mask in masks]
            rows.append(np.concatenate(panels, 1))
        log, picture = trainer.logger.experiment, np.concatenate(rows)
        log.add_image('truth and prediction', picture, trainer.current_epoch, dataformats='HWC')


# ------------------------------------------------------------ checkpoints
class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder, then renames it.

    Lightning moves it from the system's temporary folder. If that is on another disk, the move is a
    copy, and a kill can leave half a file.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        content = io.BytesIO()  # torch.save to a full disk raises RuntimeError, not OSError
        torch.save(checkpoint, content)
        with files.atomic_write(Path(path)) as temporary:
            temporary.write_bytes(content.getbuffer())


class Checkpoints(Checkpoint):
    """After each epoch, saves best.ckpt if val_dice is the best so far, then last.ckpt.

    A kill between the two leaves the older last.ckpt: the resumed run repeats the epoch. Lightning's
    ModelCheckpoint would write the same content twice.

    Args:
        folder: where to save; the same for a resumed run, also if it was moved.
    """

    def __init__(self, folder: Path):
        self.best, self.last, self.best_score = folder / 'best.ckpt', folder / 'last.ckpt', -1.0

    def state_dict(self) -> dict:
        return {'best_score': self.best_score}

    def load_state_dict(self, state: dict) -> None:
        self.best_score = state['best_score']

    def on_train_epoch_end(self, trainer, module) -> None:
        score = float(trainer.callback_metrics['val_dice'])
        if score <= self.best_score:
            trainer.save_checkpoint(self.last)
            return
        self.best_score = score
        trainer.save_checkpoint(self.best)
        if trainer.is_global_zero:
            link_or_copy(self.best, self.last)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy where the disk has no links."""
    with files.atomic_write(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def read_checkpoint(file: Path, remedy: str) -> dict:
    """A checkpoint with memory-mapped tensors; code in it is never run.

    Raises config.UserMistake, with the remedy, if it is missing, damaged, or not of this project.
    """
    try:
        checkpoint = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
    except FileNotFoundError:
        raise config.UserMistake(f'{file}: no such file: {remedy}') from None
    except Exception as error:  # a damaged file raises whatever pickle, zipfile and torch raise
        raise config.UserMistake(
            f'{file}: cannot be read ({config.shorten(error, 120)}): {remedy}'
        ) from None
    if not isinstance(checkpoint, dict) or 'val_folds' not in checkpoint.get(
        'hyper_parameters', ()
    ):
        raise config.UserMistake(f'{file}: not a checkpoint of Lightning_trainer.py: {remedy}')
    return checkpoint


def history_of(checkpoint: dict) -> list[dict]:
    """The logged values of each epoch that a checkpoint contains, see EpochLog."""
    return checkpoint['callbacks']['EpochLog']['history']


def is_finished(checkpoint: dict) -> bool:
    """Whether a training has done all EPOCHS, or was stopped by PATIENCE."""
    for name, state in checkpoint['callbacks'].items():
        if name.startswith('EarlyStopping') and state['wait_count'] >= state['patience']:
            return True
    return len(history_of(checkpoint)) >= config.EPOCHS


# ------------------------------------------------------------ version folders
def version_folders() -> list[Path]:
    """LOGS_PATH/version_#, the oldest first."""
    found = config.path(config.LOGS_PATH).glob('version_*')
    numbers = {int(f.name[8:]): f for f in found if f.name[8:].isdigit()}
    return [numbers[number] for number in sorted(numbers)]


def new_version_folder() -> Path:
    """Make the next LOGS_PATH/version_#. Folds that start at the same time get different ones."""
    older = version_folders()
    number = int(older[-1].name[8:]) + 1 if older else 0
    while True:
        folder = config.path(config.LOGS_PATH) / f'version_{number}'
        if rank_zero_only.rank:
            return folder  # only rank 0 writes, and Lightning broadcasts its paths
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def fold_of(folder: Path) -> int | None:
    """The fold of a version folder, from its hparams.yaml; None if it is not of this project."""
    try:
        hparams = yaml.safe_load((folder / 'hparams.yaml').read_text(encoding='utf-8'))
        return hparams['val_folds'][0]
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return None


def find_run(fold: int) -> Path | None:
    """The version folder of the newest run of a fold that can be resumed; None if there is none."""
    for folder in reversed(version_folders()):
        if fold_of(folder) != fold or not (folder / 'checkpoints/last.ckpt').exists():
            continue
        if (folder / 'checkpoints/best.ckpt').exists():
            return folder
        runtime.print_once(f'{folder.name} has no best.ckpt, as before 2026-11-26: passed over')
    return None


def check_resumable(folder: Path, fold: int, checkpoint: dict) -> None:
    """Raise config.UserMistake if a run was started with other constants or images."""
    saved = checkpoint['hyper_parameters']
    differ = config.differing_constants(saved, config.constants())
    if 'PRECISION' in differ:  # a remedy for NaN
        differ.remove('PRECISION')
        runtime.print_once(
            f'resuming {folder.name} with PRECISION={config.PRECISION}, was {saved["PRECISION"]}'
        )
    if differ:
        was = ', '.join(f'{name}={saved[name]}' for name in differ)
        raise config.UserMistake(
            f'RESUME=True: {folder.name} was started with {was}: set the same, or set RESUME=False '
            'to start a new run (START_FROM can take its weights)'
        )
    if checkpoint['image_digests'] != folds.digests(fold):
        raise config.UserMistake(
            f'RESUME=True: {folder.name} was started with other images in its folds than '
            f'{config.TRAIN_FOLDS} has now: restore the old file, or set RESUME=False'
        )
