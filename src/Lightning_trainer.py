"""Step 2: train one model for each fold in FOLDS.

Reads   TRAIN_FOLDS, TRAIN_PATH, MASK_PATH (IMAGE_PREFIX, IMAGE_SUFFIX, MASK_PREFIX, MASK_SUFFIX,
        TRAIN_CSV, RLE_ORDER, EMPTY_IF_NO_MASK, MASK_COLOURS); ENCODER_WEIGHTS.
Writes  LOGS_PATH/version_#/ for each fold: checkpoints (best by val_dice, and last.ckpt),
        hparams.yaml, metrics.csv, TensorBoard events, curves.png, profile.txt;
        OUTPUT/models.csv: fold,version,checkpoint,val_dice,val_iou; OUTPUT/cache with CACHE.

Model and data: MODEL_NAME, CROP_SIZE, SCALE, CHANNELS, CLASSES, IGNORE_INDEX, MODEL_MEAN, MODEL_STD,
AUGMENTATION. Training: LOSS (LOSS_ARGS), OPTIMIZER (OPTIMIZER_ARGS), LR, SCHEDULE, EMA, EPOCHS,
PATIENCE, LIMIT_BATCHES, TRAIN_BATCH_SIZE, VAL_BATCH_SIZE, ACCUMULATE_GRAD_BATCHES, GRADIENT_CLIP,
PRECISION, SEED. Hardware: ACCELERATOR, DEVICES, NUM_NODES, STRATEGY, NUM_WORKERS, COMPILE.
RESUME continues where the last run stopped. Several folds are trained one after the other, each in
its own process.

    python Lightning_trainer.py
    python Lightning_trainer.py FOLDS=[0] EPOCHS=1 CROP_SIZE=256
"""

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

# A thread that waits for the others spins shortly, then sleeps: beside other programs, spinning made
# a step up to 40 times slower. Set before torch loads OpenMP.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.profilers import SimpleProfiler
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException

import callbacks
import command_line
import config
import files
import folds
import model_dispatcher
import optimizers
import plots
import runtime
from Lightning_module import CarvanaModel, NotFinite


def main() -> None:
    folds.check_up_to_date()
    for folder in (config.OUTPUT, config.LOGS_PATH):
        files.check_writable(config.path(folder))
    if len(config.FOLDS) == 1:
        train_fold(config.FOLDS[0])
        return
    ranks = int(os.environ.get('WORLD_SIZE') or os.environ.get('SLURM_NTASKS') or 1)
    if ranks > 1:
        raise config.UserMistake(
            f'FOLDS={config.FOLDS}: torchrun and srun can train only one fold: start one per fold'
        )
    start = time.monotonic()
    for fold in config.FOLDS:
        train_in_new_process(fold)
    models = files.read_models()
    models = models[models.fold.isin(config.FOLDS)]
    print(models.to_string(index=False))
    print(
        f'val_dice {models.val_dice.mean():.4f} +- {models.val_dice.std(ddof=0):.4f} over '
        f'{len(models)} folds at CROP_SIZE, {(time.monotonic() - start) / 60:.1f} minutes, '
        f'{files.relative(files.models_file())}{runtime.trial_note(config.LIMIT_BATCHES)}'
    )


def train_in_new_process(fold: int) -> None:
    """Train a fold with this script in a new process, with all constants as they are now."""
    process = subprocess.Popen([sys.executable, __file__, *command_line.as_arguments(FOLDS=[fold])])
    # Ctrl-C also reaches the child. SIGTERM reaches only this process, so pass it on.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    except KeyboardInterrupt:
        status = process.wait()
    if status < 0 and status != -signal.SIGINT:
        hint = ' (often because memory ran out)' * (status == -signal.SIGKILL)
        print(
            f'fold {fold}: its process was ended by {signal.Signals(-status).name}{hint}: run '
            'again with RESUME=True to continue after the last finished epoch',
            file=sys.stderr,
        )
    if status:
        sys.exit(status if status > 0 else 128 - status)


def train_fold(fold: int) -> None:
    """Train the model of a fold on all other folds, or resume it. Enter it into models.csv."""
    runtime.hide_warnings()
    logs = config.path(config.LOGS_PATH)
    busy = f'fold {fold} is being trained in {logs} already: wait, or change LOGS_PATH and OUTPUT'
    rank_zero = rank_zero_only.rank == 0
    with files.file_lock(logs / f'.fold{fold}.lock', busy) if rank_zero else nullcontext():
        run = callbacks.find_run(fold) if config.RESUME else None
        if config.RESUME and run is None:
            runtime.print_once(f'RESUME=True: fold {fold} has no run to resume: starting a new one')
        if run is None or not run.finished:
            fit(fold, run)
        elif rank_zero:
            record(fold, run.folder, run.best, run.log)
            epochs = len(run.log['history'])
            print(f'fold {fold} is finished, {epochs} epochs: {files.relative(run.folder)}')


def fit(fold: int, run: callbacks.Run | None) -> None:
    """Train a fold from the start, or from the newest checkpoint of an earlier run."""
    start = time.monotonic()
    table = folds.read_folds()
    pl.seed_everything(config.SEED + fold, workers=True, verbose=False)
    others = [other for other in range(config.N_FOLDS) if other != fold]
    model = CarvanaModel(others, [fold], pretrained=run is None)
    optimizers.build_optimizer(model)
    model_dispatcher.try_out(
        model.model, config.MODEL_NAME, config.TRAIN_BATCH_SIZE, config.INPUT_SHAPE
    )
    items = len(model.train_data)
    trainer, log = make_trainer(fold, run)
    per_device = math.ceil(items / trainer.world_size)
    if per_device < config.TRAIN_BATCH_SIZE:
        raise config.UserMistake(
            f'TRAIN_BATCH_SIZE={config.TRAIN_BATCH_SIZE} is more than the {per_device} training images '
            f'that fold {fold} has per device: set at most {per_device}'
        )
    if trainer.is_global_zero:
        print_start(fold, table, items, model, trainer)
        if run:
            done = len(run.log['history'])
            print(f'resumes   after epoch {done} of {config.EPOCHS}', flush=True)
    checkpoint = run.checkpoint if run else None
    try:
        with runtime.explain_errors():
            trainer.fit(model, ckpt_path=checkpoint, weights_only=True)
    except NotFinite as mistake:
        (Path(trainer.logger.log_dir) / callbacks.NOT_FINITE).write_text(f'{mistake}\n')
        raise
    except SIGTERMException:  # Lightning would end this process with status 0
        sys.exit(128 + signal.SIGTERM)
    if trainer.is_global_zero:
        finish(fold, trainer, log, time.monotonic() - start)


def make_trainer(fold: int, run: callbacks.Run | None) -> tuple[pl.Trainer, callbacks.EpochLog]:
    """The Trainer of a fold. It logs to a new version folder, or to that of the resumed run."""
    torch.set_float32_matmul_precision('high')  # TF32 on the GPUs that have it
    folder = run.folder if run else callbacks.new_version_folder()
    log, bars = callbacks.EpochLog(fold), callbacks.progress_bars()
    plugins = [callbacks.AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        # Lightning's requeue would resume from a checkpoint that we have not checked.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    trainer = runtime.trainer(
        max_epochs=config.EPOCHS,
        accumulate_grad_batches=config.ACCUMULATE_GRAD_BATCHES,
        gradient_clip_val=config.GRADIENT_CLIP,
        limit_train_batches=config.LIMIT_BATCHES,
        limit_val_batches=config.LIMIT_BATCHES,
        callbacks=[*callbacks.checkpoints_and_stop(), log, callbacks.PredictionImages(), *bars],
        plugins=plugins,
        enable_progress_bar=bool(bars),
        logger=TensorBoardLogger(
            folder.parent, name='', version=folder.name, default_hp_metric=False
        ),
        default_root_dir=folder,
        profiler=SimpleProfiler(),
        benchmark=True,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    if config.EMA is not None:
        average = optimizers.weight_average(config.EMA, trainer.strategy.root_device)
        trainer.callbacks.insert(0, average)
    return trainer, log


def print_start(fold: int, table: pd.DataFrame, items: int, model, trainer: pl.Trainer) -> None:
    """Print a summary before the training. `items`: number of training images or crops."""
    parts = {'trains on': table.kfold != fold, 'validates on': table.kfold == fold}
    images = (
        f'{what} {rows.sum()} images of {table.group[rows].nunique()} groups'
        for what, rows in parts.items()
    )
    batches = math.ceil(items / (config.TRAIN_BATCH_SIZE * trainer.world_size))
    trial = min(batches, config.LIMIT_BATCHES or batches)  # the warning is about all batches
    steps, trial_steps = (math.ceil(n / config.ACCUMULATE_GRAD_BATCHES) for n in (batches, trial))
    parameters = sum(p.numel() for p in model.model.parameters()) / 1e6
    lines = {
        'fold': f'{fold}: {", ".join(images)}',
        'model': f'{config.MODEL_NAME}, {parameters:.1f} M parameters, encoder weights '
        f'{config.ENCODER_WEIGHTS}, input {tuple(config.INPUT_SHAPE)}',
        'training': f'{config.LOSS}, {config.EPOCHS} epochs of {trial} batches of '
        f'{config.TRAIN_BATCH_SIZE} and {trial_steps} optimizer steps',
        'optimizer': f'{config.OPTIMIZER} at {config.LR}, SCHEDULE={config.SCHEDULE}, EMA={config.EMA}',
        'device': f'{runtime.device_name(trainer)}, {config.NUM_WORKERS} workers',
        'precision': ': '.join(runtime.precision()),
        'logs': files.relative(Path(trainer.logger.log_dir)),
    }
    if steps < 10 and config.ACCUMULATE_GRAD_BATCHES > 1:
        lines['warning'] = (
            f'only {steps} optimizer step{"s" * (steps > 1)} per epoch: set a smaller '
            f'ACCUMULATE_GRAD_BATCHES: {max(1, batches // 10)} gives {min(batches, 10)} or more'
        )
    print('\n'.join(f'{key:10s}{value}' for key, value in lines.items()), flush=True)


def record(fold: int, folder: Path, checkpoint: Path, log: dict) -> dict:
    """Write curves.png and models.csv. Returns the logged values of the best epoch."""
    curves = plots.curves(log['history'], log['rates'], f'fold {fold}: {config.MODEL_NAME}')
    plots.save(curves, folder / 'curves.png')
    return files.enter_model(fold, folder, checkpoint, log['history'])


def finish(fold: int, trainer: pl.Trainer, log: callbacks.EpochLog, seconds: float) -> None:
    """Write profile, curves and models.csv; print the best score and where things are."""
    folder = Path(trainer.logger.log_dir)
    (folder / 'profile.txt').write_text(trainer.profiler.summary())
    checkpoint = Path(trainer.checkpoint_callback.best_model_path)
    best = record(fold, folder, checkpoint, log.state_dict())
    # TensorBoard's tab HPARAMS shows runs that log a metric with their constants.
    hparams = trainer.lightning_module.hparams
    trainer.logger.log_hyperparams(hparams, {'best_val_dice': best['val_dice']})
    trainer.logger.finalize('success')
    epochs = len(log.history)
    if epochs < config.EPOCHS:
        print(f'stopped after epoch {epochs}: no better val_dice in {config.PATIENCE} epochs')
    share = runtime.data_wait_share(trainer.profiler.recorded_durations)
    print(
        f'fold {fold}: best val_dice {best["val_dice"]:.4f} in epoch {best["epoch"] + 1}, '
        f'{seconds / 60:.1f} minutes, peak memory {runtime.peak_memory_mb():.0f} MB, '
        f'{files.relative(checkpoint)}\n'
        f'the {trainer.strategy.root_device.type} waited for data {share:.0%} of the time'
        f'{runtime.faster_input(share)}{runtime.trial_note(config.LIMIT_BATCHES)}',
        flush=True,
    )


if __name__ == '__main__':
    command_line.run(main, __doc__)
