"""The experiment of the title: the same training in float32, TF32, bfloat16 and float16.

Reads   TRAIN_FOLDS, TRAIN_PATH, MASK_PATH as Lightning_trainer.py does. If there are no training
        images, it draws the demo's cars (INPUT/demo) and uses the demo's settings.
Writes  OUTPUT/precision.csv: precision,images_per_second,step_ms,peak_memory_mb,val_dice,note;
        OUTPUT/precision.png.

Each row runs in its own process on one device of ACCELERATOR, with MODEL_NAME, ENCODER_WEIGHTS,
CROP_SIZE, TRAIN_BATCH_SIZE, LR, SCHEDULE, LOSS, AUGMENTATION and SEED, one step per batch and no
EMA. The first of FOLDS is validated. The first 10 steps are not timed. Without a GPU, float16 is
emulated: slow, but with the same rounding. If the hardware cannot run a row, its note says why.

    python test_precision.py
    python test_precision.py --steps 500 --seeds 3      longer; val_dice is the mean over the seeds
    python test_precision.py CROP_SIZE=1024 TRAIN_BATCH_SIZE=8 CACHE=True
    python test_precision.py --row 32          one row, as JSON; no files
"""

import json
import os
import subprocess
import sys
import time

os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # as in Lightning_trainer.py

import pandas as pd
import pytorch_lightning as pl
import torch

import command_line
import config
import demo
import files
import folds
import plots
import runtime
from Lightning_module import CarvanaModel

OPTIONS = {
    '--steps': {'type': command_line.positive_int, 'default': 100},
    '--seeds': {'type': command_line.positive_int, 'default': 1},
    '--row': {},  # set for the process of one row
}

# name -> PRECISION, and whether float32 products may be computed in TF32
ROWS = {'32': (32, False), '32 with TF32': (32, True), 'bf16': ('bf16', True), '16': (16, True)}
DIGITS = {'images_per_second': 2, 'step_ms': 2, 'peak_memory_mb': 0, 'val_dice': 4}
HARDWARE = {'devices': 1, 'num_nodes': 1, 'strategy': 'auto'}
WARM_UP = 10  # steps in which cuDNN tries its algorithms and the workers start


def main(options) -> None:
    runtime.hide_warnings()
    if options.row is not None:
        print(json.dumps(measure(options.row, options.steps)))
        return
    arguments = options.arguments
    if not config.path(config.TRAIN_PATH).is_dir():
        folder, table = f'{config.INPUT}/demo', f'{config.OUTPUT}/demo/train_folds.csv'
        arguments = demo.arguments(arguments, INPUT=folder, TRAIN_FOLDS=table)
        print(f"no images in {config.TRAIN_PATH}: using the demo's cars", flush=True)
        command_line.override(arguments)
        demo.make_dataset(config.INPUT, seed=config.SEED)
        folds.main()
    folds.check_up_to_date()
    runs = []
    for name in ROWS:
        reason = impossible(name)
        for seed in range(config.SEED, config.SEED + (1 if reason else options.seeds)):
            words = [*arguments, f'SEED={seed}']
            run = {'note': reason} if reason else run_row(name, options.steps, words)
            print(f'{name}: {run["note"]}', flush=True)
            runs.append({'precision': name, 'seed': seed, **run})
    table, output = summary(runs), config.path(config.OUTPUT)
    files.write_table(table, output / 'precision.csv')
    print(table.drop(columns='note').to_string(index=False, na_rep='-'))
    print_differences(pd.DataFrame(runs))
    device = runtime.device_name(runtime.make_trainer(**HARDWARE))
    title = f'{config.MODEL_NAME}, {config.CROP_SIZE} pixels, {device}'
    plots.save(plots.precision(table, title), output / 'precision.png')
    print(f'{config.OUTPUT}/precision.csv; torch {torch.__version__}, Lightning {pl.__version__}')


def impossible(name: str) -> str:
    """Why this hardware cannot run a row; '' where it can."""
    cuda = runtime.on_cuda()
    old = not cuda or torch.cuda.get_device_capability() < (8, 0)
    if old and (name == '32 with TF32' or (name == 'bf16' and cuda)):
        return f'not run: {name} needs an NVIDIA GPU of compute capability 8.0 or more'
    return ''


def run_row(name: str, steps: int, arguments: list[str]) -> dict:
    """The result of `measure`, run in a new process."""
    command = [sys.executable, __file__, '--row', name, '--steps', str(steps), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict]) -> pd.DataFrame:
    """The table of precision.csv. Over the seeds: mean of val_dice, else medians, and all notes."""
    table = pd.DataFrame(runs, columns=['precision', *DIGITS, 'note'])
    rules = {**dict.fromkeys(DIGITS, 'median'), 'val_dice': 'mean', 'note': '; '.join}
    return table.groupby('precision', sort=False).agg(rules).round(DIGITS).reset_index()


def print_differences(runs: pd.DataFrame) -> None:
    """Print each precision's Dice minus that of 32, seed by seed, if there are several seeds."""
    dice = runs.pivot(index='seed', columns='precision', values='val_dice').dropna(axis=1)
    for name in dice.columns.drop('32') if len(dice) > 1 else ():
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


def measure(name: str, steps: int) -> dict:
    """Train with one precision, then validate: the numbers of a row, and a note."""
    config.PRECISION, tf32 = ROWS[name]
    runtime.EMULATE_FLOAT16 = emulated = name == '16' and not runtime.on_cuda()
    torch.set_float32_matmul_precision('high' if tf32 else 'highest')
    torch.backends.cudnn.allow_tf32 = tf32
    held_out = config.FOLDS[0]
    pl.seed_everything(config.SEED, workers=True, verbose=False)
    model = CarvanaModel([k for k in range(config.N_FOLDS) if k != held_out], [held_out])
    clock, last = Clock(WARM_UP), WARM_UP + steps
    trainer = runtime.make_trainer(
        **HARDWARE,
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
    except torch.OutOfMemoryError:
        return {'note': 'not run: out of GPU memory'}
    peak = runtime.peak_memory_mb()
    share = runtime.data_wait_share(trainer.profiler.recorded_durations)
    trainer.validate(model, verbose=False)
    dice = trainer.callback_metrics['val_dice'].item()
    done = max(int(state.get('step', last)) for state in trainer.optimizers[0].state.values())
    note = 'emulated: the rounding and the scaler are real, the speed is not; ' * emulated
    return {
        'images_per_second': clock.images / clock.seconds,
        'step_ms': 1e3 * clock.seconds / steps,
        'peak_memory_mb': peak,
        'val_dice': dice,
        'note': f'{note}seed {config.SEED}: Dice {dice:.4f}, {last - done} of {last} steps skipped '
        f'because of overflow, waited for data {share:.0%} of the time',
    }


if __name__ == '__main__':
    command_line.run(main, __doc__, OPTIONS)
