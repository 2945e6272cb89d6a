"""Step 2: train one model for each fold in FOLDS.

Reads   TRAIN_FOLDS (N_FOLDS), TRAIN_PATH, MASK_PATH (IMAGE_PREFIX, IMAGE_SUFFIX, MASK_PREFIX,
        MASK_SUFFIX, TRAIN_CSV, RLE_ORDER, EMPTY_IF_NO_MASK, MASK_COLOURS); ENCODER_WEIGHTS.
Writes  LOGS_PATH/version_#/ for each fold: checkpoints/best.ckpt (by val_dice) and last.ckpt,
        hparams.yaml, metrics.csv, TensorBoard events, curves.png, profile.txt;
        OUTPUT/models.csv: fold,version,checkpoint,val_dice,val_iou; OUTPUT/cache with CACHE.

Model and data: MODEL_NAME, CROP_SIZE, SCALE, CHANNELS, CLASSES, IGNORE_INDEX, MODEL_MEAN, MODEL_STD,
AUGMENTATION. Training: LOSS (LOSS_ARGS), OPTIMIZER (OPTIMIZER_ARGS), LR, SCHEDULE, EPOCHS, PATIENCE,
LIMIT_BATCHES, TRAIN_BATCH_SIZE, VAL_BATCH_SIZE, ACCUMULATE_GRAD_BATCHES, GRADIENT_CLIP, PRECISION,
SEED. Hardware: ACCELERATOR, DEVICES, NUM_NODES, STRATEGY, NUM_WORKERS, COMPILE. START_FROM trains
on from the weights of another training. RESUME continues where the last run stopped. Several folds
are trained one after the other, each in its own process.

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

# A thread that waits for the others spins shortly, then sleeps: beside other programs, spinning makes
# steps many times slower. Set before torch loads OpenMP.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.profilers import SimpleProfiler
from pytorch_lightning.utilities import rank_zero_only

import callbacks
import command_line
import config
import files
import folds
import model_dispatcher
import plots
import runtime
from Lightning_module import CarvanaModel


def main() -> None:
    runtime.set_rank()
    folds.check_up_to_date()
    for folder in (config.OUTPUT, config.LOGS_PATH):
        files.check_writable(config.path(folder))
    if len(config.FOLDS) == 1:
        train_fold(config.FOLDS[0])
        return
    if runtime.launched_by_srun() or int(os.environ.get('WORLD_SIZE', 1)) > 1:
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
    try:
        status = process.wait()
    except KeyboardInterrupt:  # it reaches the child, too
        status = process.wait()
    except SystemExit:  # SIGTERM reaches only this process
        process.terminate()
        process.wait()
        raise
    if status < 0 and status != -signal.SIGINT:
        hint = ''
        if status == -signal.SIGKILL:
            hint = ' (often because memory ran out)'
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
    lock = (
        nullcontext() if rank_zero_only.rank else files.file_lock(logs / f'.fold{fold}.lock', busy)
    )
    with lock:
        run = callbacks.find_run(fold) if config.RESUME else None
        if run is None:
            if config.RESUME:
                runtime.print_once(f'RESUME=True: fold {fold} has no run to resume: starting anew')
            fit(fold)
            return
        last = run / 'checkpoints/last.ckpt'
        remedy = f'remove {files.relative(run)} to start again'
        checkpoint = callbacks.read_checkpoint(last, remedy)
        callbacks.check_resumable(run, fold, checkpoint)
        if not callbacks.is_finished(checkpoint):
            fit(fold, run, checkpoint)
        elif not rank_zero_only.rank:
            history = callbacks.history_of(checkpoint)
            record(fold, run, history)
            print(f'fold {fold} is finished, {len(history)} epochs: {files.relative(run)}')


def fit(fold: int, run: Path | None = None, resumed: dict | None = None) -> None:
    """Train a fold, and log to a new version folder.

    Args:
        run, resumed: the version folder and the last.ckpt of a run to continue instead.
    """
    start = time.monotonic()
    table = folds.read_folds()
    pl.seed_everything(config.SEED + fold, workers=True, verbose=False)
    others = [other for other in range(config.N_FOLDS) if other != fold]
    pretrained = resumed is None and config.START_FROM is None
    model = CarvanaModel(others, [fold], pretrained)
    if resumed is None and config.START_FROM is not None:
        start_from(model, fold)
    model.try_step()
    model_dispatcher.try_out(
        model.model, config.MODEL_NAME, config.TRAIN_BATCH_SIZE, config.INPUT_SHAPE
    )
    log, folder = callbacks.EpochLog(fold), run or callbacks.new_version_folder()
    trainer = make_trainer(folder, log)
    per_device = math.ceil(len(model.train_data) / trainer.world_size)
    if per_device < config.TRAIN_BATCH_SIZE:
        raise config.UserMistake(
            f'TRAIN_BATCH_SIZE={config.TRAIN_BATCH_SIZE} is more than the {per_device} training images '
            f'that fold {fold} has per device: set at most {per_device}'
        )
    if trainer.is_global_zero:
        print_start(fold, table, model, trainer)
        if resumed:
            done = len(callbacks.history_of(resumed))
            print(f'resumes   after epoch {done} of {config.EPOCHS}', flush=True)
    try:
        with runtime.explain_errors():
            last = folder / 'checkpoints/last.ckpt' if resumed else None
            trainer.fit(model, ckpt_path=last, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        if trainer.is_global_zero:
            print(f'fold {fold} was stopped: run again with RESUME=True', flush=True)
        raise
    if trainer.is_global_zero:
        finish(fold, trainer, log.history, time.monotonic() - start)


def start_from(model: CarvanaModel, fold: int) -> None:
    """Load the whole model of START_FROM: a checkpoint, or a models.csv with one for each fold.

    Raises config.UserMistake if it does not fit, or if it was trained on images of this fold.
    """
    file, remedy = config.path(config.START_FROM), 'set START_FROM to a checkpoint or a models.csv'
    if file.suffix == '.csv':
        models = files.read_models(file)
        rows = models[models.fold == fold]
        if rows.empty:
            raise config.UserMistake(f'START_FROM: {file} has no fold {fold}: set a checkpoint')
        file = config.path(rows.checkpoint.iloc[0])
    checkpoint = callbacks.read_checkpoint(file, remedy)
    saved = checkpoint['hyper_parameters']
    for name in ('MODEL_NAME', 'CHANNELS'):
        if saved[name] != getattr(config, name):
            raise config.UserMistake(
                f'START_FROM: {file} has {name}={saved[name]}: set the same {name}'
            )
    there, here = checkpoint.get('image_digests') or {}, folds.digests(fold)
    if there.get('all') != here['all']:
        runtime.print_once(
            f'START_FROM: nobody can check whether {file} was trained on images of fold {fold}: if so, '
            'its scores are too good'
        )
    elif there['val'] != here['val']:
        raise config.UserMistake(
            f'START_FROM: {file} was trained on the images that fold {fold} is validated on: set the '
            'models.csv of that training, so that each fold starts from its own'
        )
    same_head = model.load_model(checkpoint)
    head = '' if same_head else f', but its head has CLASSES={saved["CLASSES"]}: a new head'
    runtime.print_once(f'starts from {files.relative(file)}{head}')


def make_trainer(folder: Path, log: callbacks.EpochLog) -> pl.Trainer:
    """The Trainer of a fold, which logs to a version folder."""
    torch.set_float32_matmul_precision('high')  # TF32 on the GPUs that have it
    bars, stop = runtime.progress_bars(), []
    if config.PATIENCE is not None:
        stop.append(EarlyStopping('val_dice', mode='max', patience=config.PATIENCE))
    checkpoints = callbacks.Checkpoints(folder / 'checkpoints')
    return runtime.make_trainer(
        max_epochs=config.EPOCHS,
        accumulate_grad_batches=config.ACCUMULATE_GRAD_BATCHES,
        gradient_clip_val=config.GRADIENT_CLIP,
        limit_train_batches=config.LIMIT_BATCHES,
        limit_val_batches=config.LIMIT_BATCHES,
        callbacks=[*stop, log, callbacks.PredictionImages(), *bars, checkpoints],
        plugins=[callbacks.AtomicCheckpointIO()],
        enable_checkpointing=True,
        enable_progress_bar=bool(bars),
        logger=TensorBoardLogger(
            folder.parent, name='', version=folder.name, default_hp_metric=False
        ),
        default_root_dir=folder,
        profiler=SimpleProfiler(),
        benchmark=True,
        num_sanity_val_steps=0,
    )


def print_start(fold: int, table: pd.DataFrame, model: CarvanaModel, trainer: pl.Trainer) -> None:
    """Print a summary before the training."""
    groups = table.groupby(table.kfold == fold).group.nunique()
    validated = (table.kfold == fold).sum()
    batches = math.ceil(len(model.train_data) / (config.TRAIN_BATCH_SIZE * trainer.world_size))
    used = min(batches, config.LIMIT_BATCHES or batches)
    parameters = sum(p.numel() for p in model.model.parameters()) / 1e6
    weights = config.START_FROM or f'encoder weights {config.ENCODER_WEIGHTS}'
    lines = [
        f'fold      {fold}: trains on {len(table) - validated} images of {groups[False]} groups, '
        f'validates on {validated} images of {groups[True]} groups',
        f'model     {config.MODEL_NAME}, {parameters:.1f} M parameters, {weights}, '
        f'input {tuple(config.INPUT_SHAPE)}',
        f'training  {config.LOSS}, {config.EPOCHS} epochs of {used} batches of '
        f'{config.TRAIN_BATCH_SIZE}, {config.OPTIMIZER} at {config.LR}, SCHEDULE={config.SCHEDULE}',
        f'device    {runtime.device_name(trainer)}, {config.NUM_WORKERS} workers',
        f'precision {": ".join(runtime.precision())}',
        f'logs      {files.relative(Path(trainer.logger.log_dir))}',
    ]
    steps = math.ceil(batches / config.ACCUMULATE_GRAD_BATCHES)
    if steps < 10 and config.ACCUMULATE_GRAD_BATCHES > 1:
        lines.append(
            f'warning   only {steps} optimizer step(s) per epoch: set a smaller '
            f'ACCUMULATE_GRAD_BATCHES: {max(1, batches // 10)} gives {min(batches, 10)} or more'
        )
    print('\n'.join(lines), flush=True)


def record(fold: int, folder: Path, history: list[dict]) -> dict:
    """Write curves.png and models.csv. Returns the logged values of the epoch of best.ckpt."""
    plots.save(plots.curves(history, f'fold {fold}: {config.MODEL_NAME}'), folder / 'curves.png')
    file = folder / 'checkpoints/best.ckpt'
    checkpoint = callbacks.read_checkpoint(file, f'remove {files.relative(folder)} to start again')
    best = callbacks.history_of(checkpoint)[-1]
    files.enter_model(fold, folder.name, file, best)
    return best


def finish(fold: int, trainer: pl.Trainer, history: list[dict], seconds: float) -> None:
    """Write profile, curves and models.csv; print the best score and where things are."""
    folder = Path(trainer.logger.log_dir)
    (folder / 'profile.txt').write_text(trainer.profiler.summary())
    best = record(fold, folder, history)
    # TensorBoard's tab HPARAMS shows runs that log a metric with their constants.
    hparams = trainer.lightning_module.hparams
    trainer.logger.log_hyperparams(hparams, {'best_val_dice': best['val_dice']})
    trainer.logger.finalize('success')
    if len(history) < config.EPOCHS:
        print(f'stopped after epoch {len(history)}: no better val_dice in {config.PATIENCE} epochs')
    share = runtime.data_wait_share(trainer.profiler.recorded_durations)
    print(
        f'fold {fold}: best val_dice {best["val_dice"]:.4f} in epoch {best["epoch"] + 1}, '
        f'{seconds / 60:.1f} minutes, peak memory {runtime.peak_memory_mb():.0f} MB, '
        f'{files.relative(folder / "checkpoints/best.ckpt")}\n'
        f'the {trainer.strategy.root_device.type} waited for data {share:.0%} of the time'
        f'{runtime.faster_input(share)}{runtime.trial_note(config.LIMIT_BATCHES)}',
        flush=True,
    )


if __name__ == '__main__':
    command_line.run(main, __doc__)
