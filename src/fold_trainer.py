"""One fold's training, in the process that Lightning_trainer.py starts for it."""

import math
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.profilers import SimpleProfiler
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException

import callbacks
import config
import decoders
import folds
import model_dispatcher
import plots
import runs
import runtime
import tables
from Lightning_module import CarvanaModel


def train_fold(fold: int) -> None:
    """Train the model of one fold on all the other folds, and enter it in models.csv; with RESUME go
    on where its last run stopped."""
    runtime.silence()
    runtime.follow_parent()
    with runs.alone('LOGS_PATH'):
        last = runs.last_run(fold) if config.RESUME else None
        if last is None or last['epoch'] + 1 < config.EPOCHS:
            train(fold, last)
        elif rank_zero_only.rank == 0:
            draw_curves(fold, last['folder'], last['history'])
            tables.enter_model(fold, last['folder'], last['best'], last['history'])
            print(
                f'fold {fold} is finished, {config.EPOCHS} epochs: {tables.relative(last["folder"])}'
            )


def train(fold: int, last: dict | None) -> None:
    """Train a fold from its start, or from its `last` run's newest checkpoint."""
    start = time.monotonic()
    table = folds.read_folds()
    others = [k for k in range(config.N_FOLDS) if k != fold]
    pl.seed_everything(config.SEED + fold, workers=True, verbose=False)
    model = CarvanaModel(others, [fold], pretrained=last is None)
    decoders.check_size(model.model, config.crop_size())
    model_dispatcher.try_out(
        model.model, config.MODEL_NAME, config.TRAIN_BATCH_SIZE, config.INPUT_SHAPE
    )
    trainer = make_trainer(fold, last)
    check_batch_size(fold, math.ceil((table.kfold != fold).sum() / trainer.world_size))
    if trainer.is_global_zero:
        print_start(fold, table, model, trainer)
        if last:
            print(f'resumes   after epoch {last["epoch"] + 1} of {config.EPOCHS}', flush=True)
    try:
        with runtime.told_plainly():
            trainer.fit(model, ckpt_path=last['file'] if last else None, weights_only=True)
    except SIGTERMException:  # which would end this process with status 0
        sys.exit(128 + signal.SIGTERM)
    if trainer.is_global_zero:
        finish(fold, trainer, time.monotonic() - start)


def check_batch_size(fold: int, images: int) -> None:
    """Raise config.UserMistake where a device's training images are fewer than one batch."""
    if images < config.TRAIN_BATCH_SIZE:
        raise config.UserMistake(
            f'TRAIN_BATCH_SIZE={config.TRAIN_BATCH_SIZE} is more than the {images} training images '
            f'that fold {fold} has per device: at most {images}'
        )


def finish(fold: int, trainer, seconds: float) -> None:
    """Write curves, profile and models.csv; say how the fold went and where things are."""
    folder = Path(trainer.logger.log_dir)
    (folder / 'profile.txt').write_text(trainer.profiler.summary())
    (lines,) = (c for c in trainer.callbacks if isinstance(c, callbacks.EpochLines))
    draw_curves(fold, folder, lines.history)
    checkpoint = Path(trainer.checkpoint_callback.best_model_path)
    best = tables.enter_model(fold, folder, checkpoint, lines.history)
    share = runtime.waiting(trainer.profiler.recorded_durations)
    advice = runtime.advice(share)
    device = trainer.strategy.root_device.type
    print(
        f'fold {fold}: best val_dice {best["val_dice"]:.4f} in epoch {best["epoch"] + 1}, '
        f'{seconds / 60:.1f} minutes, peak memory {runtime.peak_memory()}, '
        f'{tables.relative(checkpoint)}\n'
        f'the {device} waited for data in {share:.0%} of the time{": " * bool(advice)}{advice}',
        flush=True,
    )


def draw_curves(fold: int, folder: Path, history: list[dict]) -> None:
    """Draw a run's curves.png; an older one is drawn again."""
    title = f'fold {fold}: {config.MODEL_NAME}, {config.LOSS}'
    plots.save(plots.curves(pd.DataFrame(history), title), folder / 'curves.png')


def make_trainer(fold: int, last: dict | None):
    """Lightning's Trainer for one fold, logging into a new LOGS_PATH/version_#, or that of `last`."""
    torch.set_float32_matmul_precision('high')  # TF32 on the GPUs that have it
    logs = config.path(config.LOGS_PATH)
    version = last['folder'].name if last else None
    logger = TensorBoardLogger(logs, name='', version=version, default_hp_metric=False)
    table = CSVLogger(logs, name='', version=logger.version)
    if last:
        # Its writer begins a new metrics.csv: with the epochs that the checkpoint knows.
        writer, history = table.experiment, pd.DataFrame(last['history'])
        writer.metrics_keys = sorted(history.columns)
        history.to_csv(writer.metrics_file_path, columns=writer.metrics_keys, index=False)
    bars = callbacks.progress_bars()
    return runtime.trainer(
        max_epochs=config.EPOCHS,
        accumulate_grad_batches=config.ACCUMULATE_GRAD_BATCHES,
        callbacks=[
            runs.BestCheckpoint(),
            runs.last_checkpoint(),
            callbacks.EpochLines(fold),
            callbacks.Overlays(),
            *bars,
        ],
        plugins=[runs.Whole()],
        enable_progress_bar=bool(bars),
        logger=[logger, table],
        profiler=SimpleProfiler(),
        benchmark=True,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )


def print_start(fold: int, table: pd.DataFrame, model, trainer) -> None:
    """What is about to be trained, on what, and how."""
    held_out = table.kfold == fold
    batches = math.ceil((~held_out).sum() / (config.TRAIN_BATCH_SIZE * trainer.world_size))
    steps = math.ceil(batches / config.ACCUMULATE_GRAD_BATCHES)
    parameters = sum(p.numel() for p in model.model.parameters())
    name, why = runtime.precision()
    groups = table.group.nunique() != len(table)
    trains, validates = (
        f'{which.sum()} images' + (f' of {table.group[which].nunique()} groups' if groups else '')
        for which in (~held_out, held_out)
    )
    lines = {
        'fold': f'{fold}: trains on {trains}, validates on {validates}',
        'model': f'{config.MODEL_NAME}, {parameters / 1e6:.1f} M parameters, encoder weights '
        f'{config.ENCODER_WEIGHTS}, input {tuple(config.INPUT_SHAPE)}',
        'training': f'{config.LOSS}, Adam at {config.LR}, {config.EPOCHS} epochs of {batches} batches '
        f'of {config.TRAIN_BATCH_SIZE} and {steps} optimizer steps',
        'device': f'{runtime.device_name(trainer)}, {config.NUM_WORKERS} workers',
        'precision': f'{name}: {why}',
        'logs': tables.relative(Path(trainer.logger.log_dir)),
    }
    print('\n'.join(f'{key:10s}{value}' for key, value in lines.items()), flush=True)
    if steps < 10 and config.ACCUMULATE_GRAD_BATCHES > 1:
        fitting = max(1, batches // 10)
        print(
            f'warning   only {steps} optimizer step{"s" * (steps > 1)} per epoch: '
            f'ACCUMULATE_GRAD_BATCHES={config.ACCUMULATE_GRAD_BATCHES} is made for thousands of images; '
            f'ACCUMULATE_GRAD_BATCHES={fitting} gives {math.ceil(batches / fitting)}',
            flush=True,
        )
