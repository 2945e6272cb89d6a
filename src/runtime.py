"""How models run: the hardware and precision that Lightning is given, and what is printed."""

import logging
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.utilities.exceptions import SIGTERMException

import config


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


def precision() -> tuple[str, str]:
    """Lightning's name of the precision that really runs, and why that one."""
    on_cuda = config.ACCELERATOR in ('auto', 'gpu', 'cuda') and torch.cuda.is_available()
    if config.PRECISION == 'bf16':
        return 'bf16-mixed', "bfloat16 where it is safe, as PRECISION='bf16' asks"
    if config.PRECISION == 32:
        return '32-true', 'float32, as PRECISION=32 asks'
    if on_cuda:
        return '16-mixed', 'float16 where it is safe, with a gradient scaler (native torch AMP)'
    return '32-true', (
        'float32: PRECISION=16 needs a CUDA GPU, and bfloat16 is slower than float32 on most CPUs'
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
        r".*Couldn't infer the batch indices.*",
        r'.*`isinstance\(treespec, LeafSpec\)` is deprecated.*',
        r".*'pin_memory' argument is set as true but no accelerator is found.*",
    ):
        warnings.filterwarnings('ignore', message=message)


def progress_bars() -> list[Callback]:
    """Lightning's progress bar where somebody watches; it looks at the device every 20 batches."""
    return [TQDMProgressBar(refresh_rate=20)] if sys.stderr.isatty() else []


class EpochLines(Callback):
    """Prints one aligned line per epoch: losses, scores at CROP_SIZE, seconds."""

    def __init__(self, fold: int):
        self.fold = fold

    def on_train_epoch_start(self, trainer, module) -> None:
        self.start = time.monotonic()

    def on_exception(self, trainer, module, exception) -> None:
        stopped = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        if stopped and trainer.is_global_zero:
            score = trainer.checkpoint_callback.best_model_score
            best = 'before its first epoch ended' if score is None else f'at val_dice {score:.4f}'
            print(f'fold {self.fold} was stopped {best}; RESUME=True goes on from here', flush=True)

    def on_train_epoch_end(self, trainer, module) -> None:
        if trainer.is_global_zero:
            shown = ('train_loss', 'val_loss', 'val_dice', 'val_iou', 'val_iou_dataset')
            values = trainer.callback_metrics
            scores = '  '.join(f'{name} {values[name]:.4f}' for name in shown if name in values)
            epoch = f'{trainer.current_epoch + 1:3d}/{trainer.max_epochs}'
            seconds = time.monotonic() - self.start
            print(f'fold {self.fold}  epoch {epoch}  {scores}  {seconds:6.1f} s', flush=True)


def device_name(trainer) -> str:
    if trainer.strategy.root_device.type == 'cuda':
        kind = torch.cuda.get_device_name(trainer.strategy.root_device)
    else:
        kind = f'{trainer.strategy.root_device.type} with {os.cpu_count()} cores'
    return f'{trainer.world_size} x {kind}' if trainer.world_size > 1 else kind


def peak_memory() -> str:
    """The most that this process has held at once: on the GPU, or else in main memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f'{torch.cuda.max_memory_allocated() / 2**20:.0f} MB of the GPU'
    import resource

    return f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MB'


def relative(file: Path) -> str:
    """A path as users write it: from the project's root, where it is in there."""
    root = config.path('.')
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
