"""The experiment of the title: the same training in float32, TF32, bfloat16 and float16.

Reads   TRAIN_FOLDS, TRAIN_PATH, MASK_PATH as Lightning_trainer.py does. If there are no training
        images, it draws the demo's cars (INPUT/demo) and uses the demo's settings.
Writes  OUTPUT/precision.csv: precision,images_per_second,step_ms,peak_memory_mb,val_dice,note;
        OUTPUT/precision_ranges.csv: what float16 loses of each part of the trained model's
        activations and gradients; OUTPUT/precision.png, OUTPUT/precision_ranges.png.

Each row trains on one device of ACCELERATOR, with MODEL_NAME, ENCODER_WEIGHTS, CROP_SIZE,
TRAIN_BATCH_SIZE, LR, SCHEDULE, LOSS, AUGMENTATION and SEED, one step per batch. The first of FOLDS
is validated. The first 10 steps are not timed. Memory is that of a GPU. Without a GPU, float16 is
emulated: slow, but with the same rounding. If the hardware cannot run a row, its note says why.

    python test_precision.py
    python test_precision.py --steps 500 --seeds 3      longer; val_dice is the mean over the seeds
    python test_precision.py CROP_SIZE=1024 TRAIN_BATCH_SIZE=8 CACHE=True
"""

import gc
import os

os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # as in Lightning_trainer.py

import time

import pandas as pd
import pytorch_lightning as pl
import torch

import command_line
import config
import demo
import files
import folds
import plots
import precision_ranges
import runtime
from Lightning_module import CarvanaModel, NotFinite

OPTIONS = {
    '--steps': {'type': command_line.positive_int, 'default': 100},
    '--seeds': {'type': command_line.positive_int, 'default': 1},
}

# name -> PRECISION, and whether float32 products may be computed in TF32
ROWS = {'32': (32, False), '32 with TF32': (32, True), 'bf16': ('bf16', True), '16': (16, True)}
DIGITS = {'images_per_second': 2, 'step_ms': 2, 'peak_memory_mb': 0, 'val_dice': 4}
WARM_UP = 10  # steps in which cuDNN tries its algorithms and the workers start


def main(options) -> None:
    runtime.hide_warnings()
    if not config.path(config.TRAIN_PATH).is_dir():
        print(f"no images in {config.TRAIN_PATH}: using the demo's cars", flush=True)
        table = f'{config.OUTPUT}/demo/train_folds.csv'
        paths = {'INPUT': f'{config.INPUT}/demo', 'TRAIN_FOLDS': table}
        command_line.override(demo.arguments(options.arguments, **paths))
        demo.make_dataset(config.INPUT, seed=config.SEED)
        folds.main()
    folds.check_up_to_date()
    runs, model, scale, first_seed = [], None, 65536.0, config.SEED
    for name in ROWS:
        for seed in range(first_seed, first_seed + options.seeds):
            run = measure(name, options.steps, seed)
            print(f'{name}: {run["note"]}', flush=True)
            model, scale = run.pop('model', model), run.pop('scale', scale)
            runs.append({'precision': name, 'seed': seed, **run})
    table, output = summary(runs), config.path(config.OUTPUT)
    files.write_table(table, output / 'precision.csv')
    print(table.drop(columns='note').to_string(index=False, na_rep='-'))
    print_differences(runs)
    device = torch.cuda.get_device_name() if runtime.on_cuda() else 'CPU'
    title = f'{config.MODEL_NAME}, {config.CROP_SIZE} pixels, {device}'
    plots.save(plots.precision(table, title), output / 'precision.png')
    if model is None:
        print('precision_ranges.csv needs a model from row 32, which did not run')
    else:
        precision_ranges.write(model, scale)
    print(f'{config.OUTPUT}/precision*; torch {torch.__version__}, Lightning {pl.__version__}')


def summary(runs: list[dict]) -> pd.DataFrame:
    """The table of precision.csv. Over the seeds: mean of val_dice, else medians, and all notes."""
    table = pd.DataFrame(runs, columns=['precision', *DIGITS, 'note'])
    rules = {**dict.fromkeys(DIGITS, 'median'), 'val_dice': 'mean'}
    rules['note'] = lambda notes: '; '.join(notes.unique())
    return table.groupby('precision', sort=False).agg(rules).round(DIGITS).reset_index()


def print_differences(runs: list[dict]) -> None:
    """Print each precision's Dice minus that of 32, seed by seed, if there are several seeds."""
    table = pd.DataFrame(runs, columns=['precision', 'seed', 'val_dice'])
    dice = table.pivot(index='seed', columns='precision', values='val_dice').dropna(axis=1)
    if len(dice) == 1 or '32' not in dice:
        return
    for name in dice.columns.drop('32'):
        differences = dice[name] - dice['32']
        error = f'{differences.sem():.4f}, standard error over {len(dice)} seeds'
        print(f'Dice at {name} minus Dice at 32: {differences.mean():+.4f} +- {error}')


class Clock(pl.Callback):
    """Times the steps after the warm-up. It waits for the device only twice, not at every step."""

    def __init__(self, warm_up: int):
        self.warm_up, self.images, self.start = warm_up, 0, 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        if trainer.global_step > self.warm_up:
            self.images += len(batch['img'])
        if trainer.global_step in (self.warm_up, trainer.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds, self.start = now - self.start, now
        if trainer.global_step == self.warm_up and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # cuDNN's trials need more than the steps


def measure(name: str, steps: int, seed: int | None = None) -> dict:
    """Train with one precision, then validate. This sets PRECISION, and SEED if one is given.

    Returns: the numbers of a row, if it ran, and its note. Row 32 has its trained `model` as well,
        and row 16 the last `scale` of its gradient scaler.
    """
    cuda = runtime.on_cuda()
    needs_ampere = name == '32 with TF32' or (name == 'bf16' and cuda)
    is_ampere = cuda and torch.cuda.get_device_capability() >= (8, 0)
    if needs_ampere and not is_ampere:
        return {'note': f'not run: {name} needs an NVIDIA GPU of compute capability 8.0 or more'}
    config.PRECISION, tf32 = ROWS[name]
    if seed is not None:
        config.SEED = seed
    runtime.EMULATE_FLOAT16 = name == '16' and not cuda
    torch.set_float32_matmul_precision('high' if tf32 else 'highest')
    torch.backends.cudnn.allow_tf32 = tf32
    gc.collect()  # frees the model of the row before
    if cuda:
        torch.cuda.empty_cache()
    if config.COMPILE:
        torch.compiler.reset()  # torch compiles only a few models
    held_out = config.FOLDS[0]
    pl.seed_everything(config.SEED, workers=True, verbose=False)
    model = CarvanaModel([k for k in range(config.N_FOLDS) if k != held_out], [held_out])
    clock, last = Clock(WARM_UP), WARM_UP + steps
    trainer = runtime.quiet_trainer(
        devices=1,
        num_nodes=1,
        strategy='auto',
        max_steps=last,
        limit_val_batches=100,
        check_val_every_n_epoch=last + 1,  # not in between: it would be timed
        callbacks=[clock],
        benchmark=True,
        num_sanity_val_steps=0,
        profiler='simple',
    )
    try:
        trainer.fit(model)
        peak = runtime.peak_memory_mb() if cuda else float('nan')
        trainer.validate(model, verbose=False)
    except torch.OutOfMemoryError:
        return {'note': 'not run: out of GPU memory'}
    except NotFinite as mistake:
        return {'note': f'seed {config.SEED}: stopped, {str(mistake).partition(":")[0]}'}
    share = runtime.data_wait_share(trainer.profiler.recorded_durations)
    dice = trainer.callback_metrics['val_dice'].item()
    states = trainer.optimizers[0].state.values()
    done = max((int(state.get('step', last)) for state in states), default=0)
    note = (
        f'seed {config.SEED}: Dice {dice:.4f}, {last - done} of {last} steps skipped because of '
        f'overflow, waited for data {share:.0%} of the time'
    )
    if runtime.EMULATE_FLOAT16:
        note = f'emulated: the rounding and the scaler are real, the speed is not; {note}'
    row = {
        'images_per_second': clock.images / clock.seconds,
        'step_ms': 1e3 * clock.seconds / steps,
        'peak_memory_mb': peak,
        'val_dice': dice,
        'note': note,
    }
    if name == '32':
        model.trainer = None  # which would keep its workers alive
        row['model'] = model
    if name == '16':
        row['scale'] = trainer.precision_plugin.scaler.get_scale()
    return row


if __name__ == '__main__':
    command_line.run(main, __doc__, OPTIONS)
