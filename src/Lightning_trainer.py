"""Step 2: train one model per fold of FOLDS, each in a process of its own.

Reads   TRAIN_FOLDS, TRAIN_PATH, MASK_PATH (IMAGE_SUFFIX, MASK_SUFFIX); ENCODER_WEIGHTS.
Writes  LOGS_PATH/version_#/ for each fold: checkpoints (best by val_dice, and last.ckpt),
        hparams.yaml, metrics.csv, TensorBoard events, curves.png, profile.txt;
        OUTPUT/models.csv: fold,version,checkpoint,val_dice,val_iou; OUTPUT/cache with CACHE.

The model is MODEL_NAME on images of CROP_SIZE (CHANNELS, CLASSES, IGNORE_INDEX, MODEL_MEAN,
MODEL_STD, AUGMENTATION), trained by Adam at LR on LOSS (LOSS_ARGS) for EPOCHS, with
TRAIN_BATCH_SIZE, VAL_BATCH_SIZE, ACCUMULATE_GRAD_BATCHES, PRECISION, SEED, NUM_WORKERS, COMPILE, on
ACCELERATOR, DEVICES, NUM_NODES, STRATEGY. RESUME goes on where the last run stopped.

    python Lightning_trainer.py
    python Lightning_trainer.py FOLDS=[0] EPOCHS=1 CROP_SIZE=256
"""

import config

if __name__ == '__main__':
    import command_line

    command_line.start(__doc__)

import math
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    if len(config.FOLDS) > 1:
        train_all()
    else:
        train_fold(config.FOLDS[0])


def train_all() -> None:
    """Train each fold by this script in a new process, so that nothing of one reaches the next."""
    start = time.monotonic()
    for fold in config.FOLDS:
        words = [word for word in sys.argv[1:] if not word.startswith('FOLDS=')]
        child = subprocess.Popen([sys.executable, __file__, *words, f'FOLDS=[{fold}]'])
        # Ctrl-C reaches the child by itself; SIGTERM is sent to one process and passed on here.
        signal.signal(signal.SIGTERM, lambda *_, child=child: child.terminate())
        try:
            status = child.wait()
        except KeyboardInterrupt:
            status = child.wait()
        if status:
            sys.exit(status if status > 0 else 128 - status)
    import runtime

    models = read_models()
    models = models[models.fold.isin(config.FOLDS)]
    print(models.to_string(index=False))
    print(
        f'val_dice {models.val_dice.mean():.4f} +- {models.val_dice.std(ddof=0):.4f} over '
        f'{len(models)} folds at CROP_SIZE, {(time.monotonic() - start) / 60:.1f} minutes, '
        f'{runtime.relative(models_file())}'
    )


def train_fold(fold: int) -> None:
    """Train the model of one fold on all the other folds, and enter it in models.csv."""
    import folds

    folds.check_up_to_date()
    import pytorch_lightning as pl
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    import decoders
    import runtime
    from Lightning_module import CarvanaModel

    start = time.monotonic()
    runtime.silence()
    last = last_checkpoint(fold) if config.RESUME else None
    if last is not None and last['epoch'] + 1 >= config.EPOCHS:
        enter_model(fold, last['folder'], last['best'])
        print(f'fold {fold} has its {config.EPOCHS} epochs: {runtime.relative(last["folder"])}')
        return
    others = [k for k in range(config.N_FOLDS) if k != fold]
    pl.seed_everything(config.SEED + fold, workers=True, verbose=False)
    model = CarvanaModel(others, [fold], pretrained=last is None)
    decoders.check_size(model.model, config.crop_size())
    trainer = make_trainer(fold, last)
    if trainer.is_global_zero:
        print_start(fold, model, trainer)
    try:
        trainer.fit(model, ckpt_path=last['file'] if last else None, weights_only=True)
    except SIGTERMException:  # which would end this process with status 0
        sys.exit(128 + signal.SIGTERM)
    if trainer.is_global_zero:
        finish(fold, trainer, time.monotonic() - start)


# What a resumed run may change: how fast it goes, where things are, and what the tester does.
MAY_CHANGE = {
    'INPUT', 'OUTPUT', 'LOGS_PATH', 'TRAIN_PATH', 'MASK_PATH', 'TEST_PATH', 'TRAIN_CSV', 'TEST_CSV',
    'TRAIN_FOLDS', 'PATH', 'ENCODER_WEIGHTS', 'FOLDS', 'EPOCHS', 'NUM_WORKERS', 'CACHE', 'RESUME',
    'ACCELERATOR', 'DEVICES', 'NUM_NODES', 'STRATEGY', 'COMPILE', 'VAL_BATCH_SIZE', 'TTA', 'THRESHOLD',
    'SAVE_MASKS',
}  # fmt: skip


def last_checkpoint(fold: int) -> dict | None:
    """The last.ckpt of a fold's newest run: its file, folder, epoch (from 0) and best checkpoint.

    Raises config.UserMistake where that run had other constants than those that may change.
    """
    import torch

    runs = config.path(config.LOGS_PATH).glob('version_*/checkpoints/last.ckpt')
    for file in sorted(runs, key=lambda f: int(f.parts[-3].split('_')[1]), reverse=True):
        saved = torch.load(file, map_location='cpu', weights_only=True)
        constants = saved['hyper_parameters']
        if constants['val_folds'] != [fold]:
            continue
        now = config.constants()
        differ = [n for n in now if n not in MAY_CHANGE and constants.get(n, now[n]) != now[n]]
        if constants['EPOCHS'] > config.EPOCHS:
            differ.append('EPOCHS')
        if differ:
            was = ', '.join(f'{name}={constants[name]}' for name in differ)
            raise config.UserMistake(
                f'RESUME=True: {file.parent.parent.name} was begun with {was}: set the same, or '
                'RESUME=False to start anew'
            )
        (best,) = (v for k, v in saved['callbacks'].items() if k.startswith('ModelCheckpoint'))
        folder = file.parent.parent
        best = file.with_name(Path(best['best_model_path']).name)
        return {'file': file, 'folder': folder, 'epoch': saved['epoch'], 'best': best}
    return None


def finish(fold: int, trainer, seconds: float) -> None:
    """Write curves, profile and models.csv; say how the fold went and where things are."""
    import plots
    import runtime

    folder = Path(trainer.logger.log_dir)
    (folder / 'profile.txt').write_text(trainer.profiler.summary())
    title = f'fold {fold}: {config.MODEL_NAME}, {config.LOSS}, precision {trainer.precision}'
    plots.save(plots.curves(read_history(folder), title), folder / 'curves.png')
    best = Path(trainer.checkpoint_callback.best_model_path)
    row = enter_model(fold, folder, best)
    print(
        f'fold {fold}: best val_dice {row.val_dice:.4f} in epoch {int(row.epoch) + 1}, '
        f'{seconds / 60:.1f} minutes, peak memory {runtime.peak_memory()}, {runtime.relative(best)}',
        flush=True,
    )


def read_history(folder: Path):
    """A run's metrics.csv: a row for each epoch's training and one for its validation."""
    import pandas as pd

    return pd.read_csv(folder / 'metrics.csv')


def make_trainer(fold: int, last: dict | None):
    """Lightning's Trainer for one fold, logging into a new LOGS_PATH/version_#, or that of `last`."""
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
    from pytorch_lightning.profilers import SimpleProfiler

    import runtime

    torch.set_float32_matmul_precision('high')  # TF32 on the GPUs that have it
    logs = config.path(config.LOGS_PATH)
    version = last['folder'].name if last else None
    logger = TensorBoardLogger(logs, name='', version=version, default_hp_metric=False)
    table = CSVLogger(logs, name='', version=logger.version)
    if last:
        history = read_history(last['folder'])
        history = history[history.epoch <= last['epoch']]
        writer = table.experiment  # which removes metrics.csv, and does not know its columns
        history.to_csv(writer.metrics_file_path, index=False)
        writer.metrics_keys = list(history.columns)
    checkpoints = ModelCheckpoint(
        filename='{epoch}-{val_dice:.4f}',
        monitor='val_dice',
        mode='max',
        save_last=True,
        save_on_train_epoch_end=True,
    )
    return pl.Trainer(
        **runtime.hardware(),
        max_epochs=config.EPOCHS,
        accumulate_grad_batches=config.ACCUMULATE_GRAD_BATCHES,
        callbacks=[checkpoints, runtime.EpochLines(fold), *runtime.progress_bars()],
        enable_progress_bar=bool(runtime.progress_bars()),
        logger=[logger, table],
        profiler=SimpleProfiler(),
        benchmark=True,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )


def print_start(fold: int, model, trainer) -> None:
    """What is about to be trained, on what, and how."""
    import folds
    import runtime

    table = folds.read_folds()
    held_out = table.kfold == fold
    batches = math.ceil((~held_out).sum() / (config.TRAIN_BATCH_SIZE * trainer.world_size))
    steps = math.ceil(batches / config.ACCUMULATE_GRAD_BATCHES)
    parameters = sum(p.numel() for p in model.model.parameters())
    name, why = runtime.precision()
    groups = table.group.nunique() != len(table)
    counts = ' and '.join(
        f'{which.sum()} images' + (f' of {table.group[which].nunique()} groups' if groups else '')
        for which in (~held_out, held_out)
    )
    lines = {
        'fold': f'{fold}: trains on, validates on {counts}',
        'model': f'{config.MODEL_NAME}, {parameters / 1e6:.1f} M parameters, encoder weights '
        f'{config.ENCODER_WEIGHTS}, input {tuple(config.INPUT_SHAPE)}',
        'training': f'{config.LOSS}, Adam at {config.LR}, {config.EPOCHS} epochs of {batches} batches '
        f'of {config.TRAIN_BATCH_SIZE} and {steps} optimizer steps',
        'device': f'{runtime.device_name(trainer)}, {config.NUM_WORKERS} workers',
        'precision': f'{name}: {why}',
        'logs': runtime.relative(Path(trainer.logger.log_dir)),
    }
    print('\n'.join(f'{key:10s}{value}' for key, value in lines.items()), flush=True)
    if steps < 10 and config.ACCUMULATE_GRAD_BATCHES > 1:
        fitting = max(1, batches // 10)
        print(
            f'warning   only {steps} optimizer steps per epoch: ACCUMULATE_GRAD_BATCHES='
            f'{config.ACCUMULATE_GRAD_BATCHES} is made for thousands of images; '
            f'ACCUMULATE_GRAD_BATCHES={fitting} gives {math.ceil(batches / fitting)}',
            flush=True,
        )


def models_file() -> Path:
    return config.path(config.OUTPUT) / 'models.csv'


def read_models():
    """Table fold,version,checkpoint,val_dice,val_iou of the trained folds."""
    import folds

    columns = ['fold', 'version', 'checkpoint', 'val_dice', 'val_iou']
    table = folds.read_table(models_file(), columns, 'run Lightning_trainer.py')
    return table.astype({'fold': int, 'val_dice': float, 'val_iou': float})


def enter_model(fold: int, folder: Path, checkpoint: Path):
    """Put a run's best checkpoint in models.csv, in place of an older run's; returns its epoch's row
    of metrics.csv."""
    import pandas as pd

    import folds
    import runtime

    history = read_history(folder)
    best = history.loc[history.val_dice.idxmax()]  # the first of equals, as ModelCheckpoint has it
    columns = ['fold', 'version', 'checkpoint', 'val_dice', 'val_iou']
    values = [fold, folder.name, runtime.relative(checkpoint), best.val_dice, best.val_iou]
    table = pd.DataFrame([values], columns=columns)
    if models_file().exists():
        older = read_models()
        table = pd.concat([older[older.fold != fold], table])
    folds.write_table(table.sort_values('fold'), models_file())
    return best


if __name__ == '__main__':
    command_line.run(main)
