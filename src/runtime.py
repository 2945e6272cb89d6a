"""Hardware and precision for Lightning's Trainer, and messages about a run."""

import logging
import sys
import warnings
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import config

# Emulate PRECISION=16 on a CPU: real rounding and scaler, but slow. test_precision.py sets it.
EMULATE_FLOAT16 = False

print_once = rank_zero_only(print)  # prints once, not in every process


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


def trainer(**arguments) -> pl.Trainer:
    """Lightning's Trainer on the hardware of config.py.

    Raises:
        config.UserMistake: if this machine does not have that hardware.
    """
    names = ('ACCELERATOR', 'DEVICES', 'NUM_NODES', 'STRATEGY')
    hardware = {name.lower(): getattr(config, name) for name in names}
    hardware |= {'precision': precision()[0], 'use_distributed_sampler': False}  # we use our own
    if hardware['precision'] == '16-mixed' and not on_cuda():
        # On a CPU, Lightning reads '16-mixed' as bfloat16, but not from a plugin.
        plugin = MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu'))
        hardware |= {'precision': None, 'plugins': [plugin, *arguments.pop('plugins', [])]}
    try:
        return pl.Trainer(**{**hardware, **arguments})
    except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
        shown = ', '.join(f'{name}={getattr(config, name)!r}' for name in names)
        raise config.UserMistake(
            f'{shown}: {config.shorten(error, 300)}: set what is there'
        ) from None


def quiet_trainer(**arguments) -> pl.Trainer:
    """Lightning's Trainer without logger, checkpoints, bar and summary, unless arguments say so."""
    quiet = ('logger', 'enable_checkpointing', 'enable_progress_bar', 'enable_model_summary')
    return trainer(**{**dict.fromkeys(quiet, False), **arguments})


def trial_note(limit: int | None) -> str:
    """A note that follows every score of a training with LIMIT_BATCHES."""
    return '' if limit is None else f' (LIMIT_BATCHES={limit}: A TRIAL ON A FEW BATCHES, NO SCORE)'


def hide_warnings() -> None:
    """Hide messages of other packages that the user can do nothing about."""
    for name in ('pytorch_lightning', 'lightning', 'lightning_fabric'):
        for logger in (name, f'{name}.utilities.rank_zero', f'{name}.accelerators.cuda'):
            logging.getLogger(logger).setLevel(logging.WARNING)
    logging.getLogger('huggingface_hub').setLevel(
        logging.ERROR
    )  # its retries; ours says what failed
    for message in (
        r'.*does not have many workers.*',
        r".*Consider setting `?persistent_workers=True`? in '.*_dataloader'.*",
        r'.*The number of training batches .* is smaller than the logging interval.*',
        r'.*Checkpoint directory .* exists and is not empty.*',
        r'.*Experiment logs directory .* exists and is not empty.*',
        r'.*The dirpath has changed from.*',
        r".*Couldn't infer the batch indices.*",
        r'.*`isinstance\(treespec, LeafSpec\)` is deprecated.*',
        r".*'pin_memory' argument is set as true but no accelerator is found.*",
    ):
        warnings.filterwarnings('ignore', message=message)


@contextmanager
def explain_errors(training: bool = True):
    """Turn errors that are not bugs into a config.UserMistake that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        name = 'TRAIN_BATCH_SIZE' if training else 'VAL_BATCH_SIZE'
        size, sides = getattr(config, name), [n * 3 // 4 // 32 * 32 for n in config.crop_size()]
        tries = [f'{name}={size // 2}'] * (size > 1)
        if training:
            tries = [f'{smaller} and double ACCUMULATE_GRAD_BATCHES' for smaller in tries]
            tries.append(f'CROP_SIZE={tuple(sides)}')
        raise config.UserMistake(
            f'out of GPU memory with {name}={size}, CROP_SIZE={config.CROP_SIZE}, '
            f'PRECISION={config.PRECISION}: try {" or ".join(tries) or "fewer FOLDS at once"}'
        ) from None
    except RuntimeError as error:
        text = str(error).lower()
        if 'shared memory' in text or 'bus error' in text:
            raise config.UserMistake(
                '/dev/shm is too small for the batches of the workers: set fewer NUM_WORKERS (0 '
                'does not use it), or give the container more (docker run --shm-size=8g)'
            ) from None
        lost = ('closed by peer', 'reset by peer', 'remote process', 'broken pipe', 'likely closed')
        if any(words in text for words in lost):
            raise config.UserMistake(
                'another process of this run has ended, see its message: run again with RESUME=True'
            ) from None
        if type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
            raise config.UserMistake(
                f'COMPILE=True fails on this machine ({config.shorten(error)}): set COMPILE=False, or '
                'install a C++ compiler'
            ) from None
        raise


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


def device_name(trainer) -> str:
    device = trainer.strategy.root_device
    name = f'{device.type} with {config.cpu_count()} cores'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    return f'{trainer.world_size} x {name}' if trainer.world_size > 1 else name


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
