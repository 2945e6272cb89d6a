"""How models run: the hardware and precision that Lightning is given, and what is printed."""

import logging
import os
import sys
import threading
import time
import warnings
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import config

tell = rank_zero_only(print)  # where every process would say the same


def hardware() -> dict:
    """The arguments of Lightning's Trainer that training and prediction share."""
    return {
        'accelerator': config.ACCELERATOR,
        'devices': config.DEVICES,
        'num_nodes': config.NUM_NODES,
        'strategy': config.STRATEGY,
        'precision': precision()[0],
        'use_distributed_sampler': False,  # this project's own samplers know the ranks
    }


def trainer(**arguments) -> pl.Trainer:
    """Lightning's Trainer on the hardware of config.py; or a config.UserMistake that names it."""
    try:
        return pl.Trainer(**{**hardware(), **arguments})
    except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
        names = ('ACCELERATOR', 'DEVICES', 'NUM_NODES', 'STRATEGY')
        shown = ', '.join(f'{name}={getattr(config, name)!r}' for name in names)
        raise config.UserMistake(f'{shown}: {config.in_short(error, 300)}') from None


def bare_trainer(**arguments) -> pl.Trainer:
    """Lightning's Trainer that shows and keeps nothing, but for what the arguments say."""
    quiet = {
        'logger': False,
        'enable_checkpointing': False,
        'enable_progress_bar': False,
        'enable_model_summary': False,
    }
    return trainer(**{**quiet, **arguments})


def on_cuda() -> bool:
    """Whether ACCELERATOR means an NVIDIA GPU, and there is one."""
    return config.ACCELERATOR in ('auto', 'gpu', 'cuda') and torch.cuda.is_available()


def precision() -> tuple[str, str]:
    """Lightning's name of the precision that really runs, and why that one."""
    if config.PRECISION == 'bf16':
        return 'bf16-mixed', "bfloat16 where it is safe, as PRECISION='bf16' asks"
    if config.PRECISION == 32:
        return '32-true', 'float32 (TF32 on GPUs that have it), as PRECISION=32 asks'
    if on_cuda():
        return '16-mixed', 'float16 where it is safe, with a gradient scaler (native torch AMP)'
    return '32-true', (
        "float32: PRECISION=16 needs a CUDA GPU; PRECISION='bf16' may be faster, test_precision.py tells"
    )


def silence() -> None:
    """Drop the notices of other packages that the user can do nothing about."""
    for name in ('pytorch_lightning', 'lightning', 'lightning_fabric'):
        for logger in (name, f'{name}.utilities.rank_zero', f'{name}.accelerators.cuda'):
            logging.getLogger(logger).setLevel(logging.WARNING)
    for message in (
        r'.*does not have many workers.*',
        r'.*The number of training batches .* is smaller than the logging interval.*',
        r'.*Checkpoint directory .* exists and is not empty.*',
        r'.*Experiment logs directory .* exists and is not empty.*',
        r'.*The dirpath has changed from.*',
        r".*Couldn't infer the batch indices.*",
        r'.*`isinstance\(treespec, LeafSpec\)` is deprecated.*',
        r".*'pin_memory' argument is set as true but no accelerator is found.*",
    ):
        warnings.filterwarnings('ignore', message=message)


def waiting(durations: dict[str, list[float]]) -> float:
    """Share of the training time, 0..1, in which no batch was ready, from a Lightning profiler's
    recorded durations. The first batch, which waits for the workers to start, does not count."""
    loops = ('_TrainingEpochLoop].train_dataloader_next', '_EvaluationLoop].val_next')
    waits = [durations.get(f'[{loop}') or [0, 0] for loop in loops]
    waited = sum(sum(seconds[1:]) for seconds in waits)
    total = sum(durations.get('run_training_epoch', [])) - sum(seconds[0] for seconds in waits)
    return waited / total if total > 0 else 0.0


def advice(share: float) -> str:
    """What to change where the device waited too long for its data; '' where it did not."""
    if share <= 0.1:
        return ''
    if config.cores() > config.NUM_WORKERS:
        return f'NUM_WORKERS from {config.NUM_WORKERS} to {config.cores()} would feed it faster'
    if not config.CACHE:
        return 'CACHE=True would feed it faster'
    return 'a smaller CROP_SIZE, or more cores, would feed it faster'


def follow_parent() -> None:
    """End this process when the one that started it is gone, and would leave it behind unseen."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def told_plainly(training: bool = True):
    """Turn what may happen to any run, and is no bug, into a message that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        train, val = config.TRAIN_BATCH_SIZE, config.VAL_BATCH_SIZE
        if training:
            tries = [f'CROP_SIZE={tuple(side * 3 // 4 // 32 * 32 for side in config.crop_size())}']
            if train > 1:
                window = f'ACCUMULATE_GRAD_BATCHES={config.ACCUMULATE_GRAD_BATCHES * 2}'
                tries.insert(0, f'TRAIN_BATCH_SIZE={train // 2} with {window} (as many per step)')
        else:
            tries = [f'VAL_BATCH_SIZE={val // 2}' if val > 1 else 'fewer FOLDS at once']
        sizes = f'TRAIN_BATCH_SIZE={train}, ' * training + f'VAL_BATCH_SIZE={val}'
        raise config.UserMistake(
            f'out of GPU memory with {sizes}, CROP_SIZE={config.CROP_SIZE}, '
            f'PRECISION={config.PRECISION}: try {", or ".join(tries)}'
        ) from None
    except RuntimeError as error:
        words = str(error).lower()
        if 'shared memory' in words or 'bus error' in words:
            raise config.UserMistake(
                'no room in /dev/shm for the batches of the workers: fewer NUM_WORKERS (0 needs none), '
                'or a container with more (docker run --shm-size=8g)'
            ) from None
        if not any(text in words for text in ('closed by peer', 'reset by peer', 'remote process')):
            raise
        raise config.UserMistake(
            'another process of this training has ended, see its own message; RESUME=True goes on '
            'after the last finished epoch'
        ) from None


def device_name(trainer) -> str:
    if trainer.strategy.root_device.type == 'cuda':
        kind = torch.cuda.get_device_name(trainer.strategy.root_device)
    else:
        kind = f'{trainer.strategy.root_device.type} with {config.cores()} cores'
    return f'{trainer.world_size} x {kind}' if trainer.world_size > 1 else kind


def used_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0


def peak_megabytes() -> float:
    """The most that this process has held at once: on the GPU, or else in main memory; NaN on
    Windows, which does not tell."""
    if used_gpu():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ModuleNotFoundError:
        return float('nan')
    unit = 1 if sys.platform == 'darwin' else 2**10  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def peak_memory() -> str:
    """`peak_megabytes` in words."""
    megabytes = peak_megabytes()
    return f'{megabytes:.0f} MB{" of the GPU" * used_gpu()}' if megabytes > 0 else 'unknown'
