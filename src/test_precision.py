"""The experiment of the title: the same training in float32, TF32, bfloat16 and float16.

Reads   TRAIN_FOLDS, TRAIN_PATH, MASK_PATH as Lightning_trainer.py does; where there are no training
        images, it draws the demo's (INPUT/demo) and takes the demo's settings.
Writes  OUTPUT/precision.csv: precision,images_per_second,step_ms,peak_memory_mb,val_dice,note;
        OUTPUT/precision.png.

Each row is a process of its own: MODEL_NAME at CROP_SIZE, TRAIN_BATCH_SIZE, LR, LOSS, AUGMENTATION,
SEED and ENCODER_WEIGHTS, on one device of ACCELERATOR, an optimizer step per batch, the first of
FOLDS held out. The first 10 steps are not timed. A row that the hardware cannot run says why.

    python test_precision.py
    python test_precision.py --steps 500 --seeds 3      longer; val_dice is the mean over the seeds
    python test_precision.py CROP_SIZE=1024 TRAIN_BATCH_SIZE=8 CACHE=True
"""

import json
import subprocess
import sys
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
import runtime
from Lightning_module import CarvanaModel

OPTIONS = {
    '--steps': {'type': command_line.positive_int, 'default': 100},
    '--seeds': {'type': command_line.positive_int, 'default': 1},
    '--row': {},  # set for the process of one row
}

# name -> PRECISION, and whether float32 products may be computed in TF32
ROWS = {'32': (32, False), '32 with TF32': (32, True), 'bf16': ('bf16', True), '16': (16, True)}
WARM_UP = 10  # steps in which cuDNN tries its algorithms and the workers start


def main(options) -> None:
    if options.row is not None:
        print(json.dumps(measure(options.row, options.steps)))
        return
    start, arguments = time.monotonic(), options.arguments
    if not config.path(config.TRAIN_PATH).is_dir():
        folder, table = f'{config.INPUT}/demo', f'{config.OUTPUT}/demo/train_folds.csv'
        arguments = demo.arguments(arguments, INPUT=folder, TRAIN_FOLDS=table)
        print(f"no images in {config.TRAIN_PATH}: using the demo's cars", flush=True)
        command_line.override(arguments)
        demo.make_dataset(config.path(config.INPUT), seed=config.SEED)
        folds.main()
    folds.check_up_to_date()
    rows, devices = [], []
    for name in ROWS:
        reason = impossible(name)
        seeds = range(config.SEED, config.SEED + (0 if reason else options.seeds))
        results = [run_row(name, options.steps, [*arguments, f'SEED={seed}']) for seed in seeds]
        rows.append(summary(name, results, reason))
        devices += [result['device'] for result in results]
        print(f'{name}: {rows[-1]["note"]}', flush=True)
    table, output = pd.DataFrame(rows), config.path(config.OUTPUT)
    files.write_table(table, output / 'precision.csv')
    print(table.drop(columns='note').to_string(index=False, na_rep='-'))
    title = f'{config.MODEL_NAME}, {config.CROP_SIZE} pixels, {devices[0]}'
    plots.save(plots.precision(table, title), output / 'precision.png')
    print(
        f'{(time.monotonic() - start) / 60:.1f} minutes; torch {torch.__version__}, '
        f'pytorch-lightning {pl.__version__}; {config.OUTPUT}/precision.csv, precision.png'
    )


def impossible(name: str) -> str:
    """Why this hardware cannot run a row; '' where it can."""
    cuda = runtime.on_cuda()
    capability = torch.cuda.get_device_capability() if cuda else (0, 0)
    if name == '32 with TF32' and capability < (8, 0):
        return 'not run: TF32 needs an NVIDIA GPU of compute capability 8.0 or more'
    if name == '16' and not cuda:
        return 'not run: float16 with a gradient scaler needs a CUDA GPU'
    if name == 'bf16' and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return 'not run: bfloat16 needs a GPU of compute capability 8.0 or more'
    return ''


def run_row(name: str, steps: int, arguments: list[str]) -> dict:
    """What `measure` gives, from a process of its own; or its device and a note where memory ran out."""
    command = [sys.executable, __file__, '--row', name, '--steps', str(steps), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def summary(name: str, results: list[dict], reason: str) -> dict:
    """A row of precision.csv: medians over the seeds, but the mean of val_dice."""
    measured = [result for result in results if 'val_dice' in result]
    row = {'precision': name}
    for key, digits in (('images_per_second', 2), ('step_ms', 2), ('peak_memory_mb', 0)):
        values = pd.Series([result[key] for result in measured], dtype=float)
        row[key] = round(values.median(), digits) if measured else None
    dice = pd.Series([result['val_dice'] for result in measured], dtype=float)
    row['val_dice'] = round(dice.mean(), 4) if measured else None
    notes = list(dict.fromkeys(result['note'] for result in results)) or [reason]
    if len(measured) > 1:
        notes.append(f'val_dice of the seeds {", ".join(f"{value:.4f}" for value in dice)}')
    return {**row, 'note': '; '.join(notes)}


class Clock(pl.Callback):
    """Times the steps after the first ones; the device is waited for twice, not at every step."""

    def __init__(self, warm_up: int):
        self.warm_up, self.images = warm_up, 0

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        if trainer.global_step == self.warm_up:
            self.start = self.now()
        if trainer.global_step >= self.warm_up:
            self.images += len(batch['img'])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        if trainer.global_step == trainer.max_steps:
            self.seconds = self.now() - self.start

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(name: str, steps: int) -> dict:
    """Train `steps` steps with one precision, then validate: the numbers of a row."""
    runtime.hide_warnings()
    config.PRECISION, tf32 = ROWS[name]
    torch.set_float32_matmul_precision('high' if tf32 else 'highest')
    torch.backends.cudnn.allow_tf32 = tf32
    held_out = config.FOLDS[0]
    pl.seed_everything(config.SEED, workers=True, verbose=False)
    model = CarvanaModel([k for k in range(config.N_FOLDS) if k != held_out], [held_out])
    clock = Clock(WARM_UP)
    trainer = runtime.quiet_trainer(
        devices=1,
        num_nodes=1,
        strategy='auto',
        max_steps=WARM_UP + steps,
        limit_val_batches=100,
        check_val_every_n_epoch=None,
        val_check_interval=WARM_UP + steps + 1,  # not in between: it would be timed
        callbacks=[clock],
        benchmark=True,
        num_sanity_val_steps=0,
        profiler='simple',
    )
    device = runtime.device_name(trainer)
    try:
        trainer.fit(model)
    except torch.OutOfMemoryError:
        return {'device': device, 'note': 'not run: out of GPU memory'}
    peak = runtime.peak_memory_mb()
    share = runtime.data_wait_share(trainer.profiler.recorded_durations)
    trainer.validate(model, verbose=False)
    done = max(int(state['step']) for state in trainer.optimizers[0].state.values())
    return {
        'device': device,
        'images_per_second': clock.images / clock.seconds,
        'step_ms': 1e3 * clock.seconds / steps,
        'peak_memory_mb': peak,
        'val_dice': trainer.callback_metrics['val_dice'].item(),
        'note': f'{WARM_UP + steps - done} of {WARM_UP + steps} steps skipped by the scaler, '
        * (trainer.precision == '16-mixed')
        + f'waited for data {share:.0%} of the time',
    }


if __name__ == '__main__':
    command_line.run(main, __doc__, OPTIONS)
