"""Callbacks for epoch lines, progress bar, pictures, checkpoints; finding a run to resume."""

import io
import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only

import config
import files
import folds
import plots
import runtime

NOT_FINITE = 'not_finite.txt'  # in a version folder: why its training stopped


class ProgressBar(TQDMProgressBar):
    """Counts epochs from 1, and leaves the scores to EpochLog."""

    def on_train_epoch_start(self, trainer, *rest) -> None:
        super().on_train_epoch_start(trainer, *rest)
        self.train_progress_bar.set_description(f'epoch {trainer.current_epoch + 1}')

    def get_metrics(self, trainer, module) -> dict:
        return {}


def progress_bars() -> list[Callback]:
    """A progress bar, if standard output is a terminal."""
    return [ProgressBar(leave=False)] if sys.stdout.isatty() else []


class EpochLog(Callback):
    """Prints one line per epoch, and writes metrics.csv: one row per epoch.

    `history` has one dictionary of logged values per epoch. `rates` has pairs: epochs so far, such
    as 2.5, and learning rate. Both are saved in every checkpoint, for a resumed run.
    """

    def __init__(self, fold: int):
        self.fold, self.history, self.rates = fold, [], []

    def state_dict(self) -> dict:
        return {'history': self.history, 'rates': self.rates}

    def load_state_dict(self, state: dict) -> None:
        self.history, self.rates = list(state['history']), list(state['rates'])

    def on_train_epoch_start(self, trainer, module) -> None:
        self.start = time.monotonic()

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        batches = trainer.num_training_batches
        if batch_index % max(1, batches // 20) == 0:
            rate = float(module.optimizers().param_groups[0]['lr'])
            self.rates.append([trainer.current_epoch + batch_index / batches, rate])

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

    def on_exception(self, trainer, module, exception) -> None:
        stopped = isinstance(exception, (KeyboardInterrupt, SystemExit))
        if stopped and trainer.is_global_zero:
            score = trainer.checkpoint_callback.best_model_score
            best = 'in its first epoch' if score is None else f'with best val_dice {score:.4f}'
            print(f'fold {self.fold} was stopped {best}: run again with RESUME=True', flush=True)


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


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the best val_dice. Its folder may be moved between two runs."""

    def load_state_dict(self, state: dict) -> None:
        def here(file: str) -> str:
            return os.path.join(self.dirpath, os.path.basename(file)) if file else file

        paths = {key: here(state[key]) for key in state if key.endswith('model_path')}
        best = {here(file): score for file, score in state['best_k_models'].items()}
        super().load_state_dict({**state, **paths, 'dirpath': self.dirpath, 'best_k_models': best})


def checkpoints_and_stop() -> list[Callback]:
    """Callbacks for the best checkpoint, last.ckpt after every epoch, and PATIENCE."""
    always, best = {'save_on_train_epoch_end': True}, {'monitor': 'val_dice', 'mode': 'max'}
    stop = [] if config.PATIENCE is None else [EarlyStopping(**best, patience=config.PATIENCE)]
    return [
        BestCheckpoint(filename='{epoch}-{val_dice:.4f}', **best, **always),
        # `save_last` would write last.ckpt only after the best epochs.
        ModelCheckpoint(filename='last', enable_version_counter=False, **always),
        *stop,
    ]


class Run(NamedTuple):
    """What an earlier training of a fold left in its version folder."""

    folder: Path
    checkpoint: Path  # the newest
    best: Path
    log: dict  # state of EpochLog
    finished: bool  # all EPOCHS done, or stopped by PATIENCE


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


def find_run(fold: int) -> Run | None:
    """The newest run of a fold, to resume it; None if there is none.

    Rank 0 also removes checkpoints that a kill left: all but the newest and the best one.

    Raises:
        config.UserMistake: if a checkpoint cannot be read, or the run was started with other
            constants that change its result, or with other images in its folds.
    """
    for folder in reversed(version_folders()):
        names = ('last.ckpt', 'epoch=*.ckpt')  # other files are the user's
        found = [file for name in names for file in (folder / 'checkpoints').glob(name)]
        states = {file: state for file in sorted(found) if (state := read_checkpoint(file))}
        newest = max(
            states, key=lambda f: (states[f]['epoch'], f.name == 'last.ckpt'), default=None
        )
        state = states.get(newest)
        if state is None or state['hyper_parameters']['val_folds'] != [fold]:
            continue
        check_resumable(folder, fold, state)
        saved = {key.partition('{')[0]: value for key, value in state['callbacks'].items()}
        best = newest.with_name(Path(saved['BestCheckpoint']['best_model_path']).name)
        stop = saved.get('EarlyStopping', {'wait_count': 0, 'patience': 1})
        done = len(saved['EpochLog']['history']) >= config.EPOCHS
        finished = done or stop['wait_count'] >= stop['patience']
        if rank_zero_only.rank == 0:
            if newest.name != 'last.ckpt':  # killed between saving the two
                with files.atomic_write(newest.with_name('last.ckpt')) as temporary:
                    shutil.copyfile(newest, temporary)
                newest = newest.with_name('last.ckpt')
            for other in set(states) - {newest, best}:
                other.unlink(missing_ok=True)
        return Run(folder, newest, best, saved['EpochLog'], finished)
    return None


def read_checkpoint(file: Path) -> dict | None:
    """A checkpoint with memory-mapped tensors; None if rank 0 has just removed it."""
    try:
        return torch.load(file, map_location='cpu', weights_only=True, mmap=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file raises whatever pickle, zipfile and torch raise
        raise config.UserMistake(
            f'{files.relative(file)}: cannot be read ({config.shorten(error, 120)}): remove it to '
            f'resume from an older checkpoint, or remove {file.parent.parent.name} to start again'
        ) from None


def check_resumable(folder: Path, fold: int, state: dict) -> None:
    """Raise config.UserMistake if a run was started with other constants or images."""
    saved = state['hyper_parameters']
    may_differ = {'LR', 'PRECISION'} if (folder / NOT_FINITE).exists() else set()
    schedule = saved.get('SCHEDULE')
    if schedule in (None, 'plateau') and saved['EPOCHS'] < config.EPOCHS:
        may_differ.add('EPOCHS')
    differ = config.differing_constants(saved, config.constants())
    if set(differ) - may_differ:
        was = ', '.join(f'{name}={saved[name]}' for name in differ if name not in may_differ)
        planned = f" (SCHEDULE='{schedule}' depends on EPOCHS)" * ('EPOCHS' in differ)
        raise config.UserMistake(
            f'RESUME=True: {folder.name} was started with {was}{planned}: set the same, or '
            'set RESUME=False to start a new run'
        )
    for name in differ:
        now = getattr(config, name)
        runtime.print_once(f'resuming {folder.name} with {name}={now}, was {saved[name]}')
    if state['image_digests'] != folds.digests(fold):
        raise config.UserMistake(
            f'RESUME=True: {folder.name} was started with other images in its folds than '
            f'{config.TRAIN_FOLDS} has now: restore the old file, or set RESUME=False'
        )
