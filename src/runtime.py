"""Hardware and precision for Lightning's Trainer, and messages about a run."""

import logging
import os
import re
import sys
import warnings
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.warnings import PossibleUserWarning
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import config

# Emulate PRECISION=16 on a CPU: real rounding and scaler, but slow. test_precision.py sets it.
EMULATE_FLOAT16 = False

# What gloo and NCCL say when another process of a run has ended.
LOST_PEER = 'closed by peer|reset by peer|remote process|broken pipe|likely closed'

print_once = rank_zero_only(print)  # prints once, not in every process


# ------------------------------------------------------------ hardware
def on_cuda() -> bool:
    """Whether ACCELERATOR means an NVIDIA GPU, and there is one."""
    return config.ACCELERATOR in ('auto', 'gpu', 'cuda') and torch.cuda.is_available()


def precision() -> tuple[str, str]:
    """Lightning's name of the precision that really runs, and the reason."""
    if config.PRECISION == 'bf16':
        return 'bf16-mixed', "bfloat16 where it is safe, because PRECISION='bf16'"
    if config.PRECISION == 32:
        return '32-true', 'float32 (TF32 on GPUs that have it), because PRECISION=32'
    if on_cuda() or EMULATE_FLOAT16:
        return '16-mixed', 'float16 where it is safe, with a gradient scaler (native torch AMP)'
    return '32-true', (
        "float32: PRECISION=16 needs a CUDA GPU; PRECISION='bf16' may be faster, try test_precision.py"
    )


def launched_by_srun() -> bool:
    """Whether srun has started the processes of one training.

    It also starts independent trainings, one for each task: then DEVICES and NUM_NODES are 1. A shell
    of salloc has SLURM's variables too, but no SLURM_STEP_ID.
    """
    several = (config.DEVICES, config.NUM_NODES) != (1, 1)
    return 'SLURM_STEP_ID' in os.environ and several and not TorchElasticEnvironment.detect()


def is_one_task() -> bool:
    """Whether SLURM's variables are set, but the training has only this process."""
    launched = TorchElasticEnvironment.detect() or launched_by_srun()
    return 'SLURM_NTASKS' in os.environ and not launched


def set_rank() -> None:
    """Lightning takes SLURM_PROCID for the rank. In a training of one process it is 0."""
    if is_one_task():
        rank_zero_only.rank = 0


def make_trainer(**arguments) -> pl.Trainer:
    """Lightning's Trainer on the hardware of config.py. It has no logger, checkpoints, bar or
    summary, unless the arguments say so.

    Raises:
        config.UserMistake: if this machine does not have that hardware.
    """
    names = ('ACCELERATOR', 'DEVICES', 'NUM_NODES', 'STRATEGY')
    settings = {name.lower(): getattr(config, name) for name in names}
    for name in ('logger', 'enable_checkpointing', 'enable_progress_bar', 'enable_model_summary'):
        settings[name] = False
    settings |= {'precision': precision()[0], 'use_distributed_sampler': False}  # we use our own
    plugins = arguments.pop('plugins', [])
    if is_one_task():
        plugins.append(LightningEnvironment())
    if settings['precision'] == '16-mixed' and not on_cuda():
        # On a CPU, Lightning reads '16-mixed' as bfloat16, but not from a plugin.
        plugins.append(MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu')))
        settings['precision'] = None
    try:
        if launched_by_srun():
            # Lightning's requeue would resume from a checkpoint that we have not checked.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        return pl.Trainer(**{**settings, 'plugins': plugins, **arguments})
    except (MisconfigurationException, ValueError, RuntimeError, ModuleNotFoundError) as error:
        shown = ', '.join(f'{name}={getattr(config, name)!r}' for name in names)
        raise config.UserMistake(
            f'{shown}: {config.shorten(error, 300)}: set what is there'
        ) from None


class ProgressBar(TQDMProgressBar):
    """Counts epochs from 1, and leaves the scores to EpochLog."""

    def on_train_epoch_start(self, trainer, *rest) -> None:
        super().on_train_epoch_start(trainer, *rest)
        self.train_progress_bar.set_description(f'epoch {trainer.current_epoch + 1}')

    def get_metrics(self, trainer, module) -> dict:
        return {}


def progress_bars() -> list[TQDMProgressBar]:
    """A progress bar, if standard output is a terminal."""
    return [ProgressBar(leave=False)] if sys.stdout.isatty() else []


def device_name(trainer) -> str:
    device = trainer.strategy.root_device
    name = f'{device.type} with {config.cpu_count()} cores'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    if trainer.world_size > 1:
        name = f'{trainer.world_size} x {name}'
    return name


def peak_memory_mb() -> float:
    """Peak memory of this process: on the GPU if it used one, else main memory; NaN on Windows."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ModuleNotFoundError:
        return float('nan')
    unit = 1 if sys.platform == 'darwin' else 2**10  # bytes per unit of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# ------------------------------------------------------------ messages
def trial_note(limit: int | None) -> str:
    """A note that follows the scores of a training with LIMIT_BATCHES."""
    return '' if limit is None else f' (LIMIT_BATCHES={limit}: A TRIAL ON A FEW BATCHES, NO SCORE)'


def hide_warnings() -> None:
    """Hide messages of other packages that the user can do nothing about."""
    for name in ('pytorch_lightning', 'lightning', 'lightning_fabric'):
        for logger in (name, f'{name}.utilities.rank_zero', f'{name}.accelerators.cuda'):
            logging.getLogger(logger).setLevel(logging.WARNING)
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # ours says what failed
    warnings.filterwarnings('ignore', category=PossibleUserWarning)
    warnings.filterwarnings('ignore', module='pytorch_lightning')
    warnings.filterwarnings('ignore', module='torch.utils.data')
    # The GradScaler may skip the first step.
    warnings.filterwarnings('ignore', message=r'Detected call of `lr_scheduler.step\(\)` before')


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory ran out, in the words of torch, cuDNN or cuBLAS."""
    words = r'out of memory|(CUDNN|CUBLAS)_STATUS_\w*ALLOC|CUBLAS_STATUS_NOT_INITIALIZED'
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(words, str(error)))


def out_of_memory_advice(training: bool) -> str:
    name = 'TRAIN_BATCH_SIZE' if training else 'VAL_BATCH_SIZE'
    size, advice = getattr(config, name), 'fewer FOLDS at once'
    if training:
        advice = f'CROP_SIZE={tuple(side * 3 // 4 // 32 * 32 for side in config.crop_size())}'
        if size > 1:
            advice = f'{name}={size // 2} and double ACCUMULATE_GRAD_BATCHES or {advice}'
    elif size > 1:
        advice = f'{name}={size // 2}'
    return (
        f'out of GPU memory with {name}={size}, CROP_SIZE={config.CROP_SIZE}, '
        f'PRECISION={config.PRECISION}: try {advice}'
    )


@contextmanager
def explain_errors(training: bool = True):
    """Turn errors that are not bugs into a config.UserMistake that says what to do."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if is_out_of_memory(error):
            message = out_of_memory_advice(training)
        elif 'shared memory' in text or 'bus error' in text:
            message = (
                '/dev/shm is too small for the workers: set fewer NUM_WORKERS, or docker --shm-size'
            )
        elif re.search(LOST_PEER, text):
            message = 'another process has ended, see its message: run again with RESUME=True'
        elif type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
            message = (
                f'COMPILE=True fails on this machine ({config.shorten(error)}): set COMPILE=False'
            )
        else:
            raise
        raise config.UserMistake(message) from None


def data_wait_share(durations: dict[str, list[float]]) -> float:
    """Share of the training time, 0..1, spent waiting for batches.

    Args:
        durations: recorded_durations of a Lightning profiler. The first batch does not count,
            because it waits for the workers to start.
    """
    loops = ('_TrainingEpochLoop].train_dataloader_next', '_EvaluationLoop].val_next')
    waits = [durations.get(f'[{loop}') or [0, 0] for loop in loops]
    waited = sum(sum(seconds[1:]) for seconds in waits)
    total = sum(durations.get('run_training_epoch', [])) - sum(seconds[0] for seconds in waits)
    return waited / total if total > 0 else 0.0


def faster_input(share: float) -> str:
    """What to change if the device waits for its data more than a tenth of the time, else ''."""
    if share <= 0.1:
        return ''
    if config.cpu_count() > config.NUM_WORKERS:
        return f': try NUM_WORKERS={config.cpu_count()}'
    return ': try a smaller CROP_SIZE' if config.CACHE else ': try CACHE=True'
