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

# Of the ranges:
LIMIT = 65504  # the largest float16 number; from 65520 up, values are rounded to infinity
SMALLEST_NORMAL = 2.0**-14  # smaller float16 numbers are subnormal: they have fewer digits
TOO_MANY = 0.01  # a larger share of gradients lost in spite of the scale is worth a warning
PARTS = 4  # the encoder and the decoder are divided into at least this many parts, if they can be


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
            if run['note'].startswith('not run'):
                break  # no seed changes the hardware
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
        write_ranges(model, scale)
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
    trainer = runtime.make_trainer(
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


# ------------------------------------------------------------ where float16 loses
# Values are taken in float32, so every device can measure them, and then rounded to float16.
# Reference: Micikevicius et al. 2018, Mixed Precision Training (arXiv 1710.03740), section 3.2.
def write_ranges(model, scale: float) -> None:
    """Measure a trained CarvanaModel on one training batch. Write the table and the picture."""
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    batch = next(iter(model.train_dataloader()))
    device = 'cuda' if runtime.on_cuda() else 'cpu'
    model.to(device).train()
    image, mask = batch['image'].to(device), batch['mask'].to(device)
    with runtime.explain_errors():
        parts = measure_ranges(model.model, lambda: model.loss(model(image), mask), scale)
    output, title = config.path(config.OUTPUT), f'{config.MODEL_NAME}, {config.LOSS}'
    files.write_table(ranges_table(parts, scale), output / 'precision_ranges.csv')
    plots.save(plots.precision_ranges(parts, scale, title), output / 'precision_ranges.png')
    print(verdict(parts, scale))


def count_lost(values: torch.Tensor) -> int:
    """How many values are 0 or infinite in float16."""
    half = values.half()
    return torch.count_nonzero((half == 0) | ~half.isfinite()).item()


class Magnitudes:
    """Counts values by their magnitude, and by what becomes of them in float16.

    Attributes:
        histogram: int64 (256,). Entry n counts the values from 2^(n - 127) up to 2^(n - 126).
        zero, nonzero: numbers of values that are 0 in float32 itself, and that are not.
        lost, subnormal: numbers of nonzero values that are so in float16.
        lost_scaled: number of nonzero values that are lost if they are multiplied by `scale` first.
    """

    def __init__(self, scale: float = 1.0):
        self.scale = scale
        self.histogram = torch.zeros(256, dtype=torch.int64)
        self.zero = self.nonzero = self.lost = self.subnormal = self.lost_scaled = 0

    def add(self, values: torch.Tensor) -> None:
        values = values.float().abs().flatten()
        half = values.half()
        zero = torch.count_nonzero(values == 0).item()
        self.zero += zero
        self.nonzero += len(values) - zero
        self.lost += count_lost(values) - zero
        self.subnormal += torch.count_nonzero((half > 0) & (half < SMALLEST_NORMAL)).item()
        self.lost_scaled += count_lost(values * self.scale) - zero
        exponents = values.view(torch.int32) >> 23  # without the 23 bits of the mantissa
        self.histogram += torch.bincount(exponents, minlength=256).cpu()
        self.histogram[0] -= zero

    def share(self, name: str) -> float:
        """`zero` as a share of all values, another count as one of the nonzero ones; NaN if none."""
        whole = self.nonzero
        if name == 'zero':
            whole += self.zero
        return getattr(self, name) / whole if whole else float('nan')


class Part:
    """What was measured in an encoder stage, a decoder block, the head, or at the logits."""

    def __init__(self, scale: float):
        self.largest = {}  # layer -> its largest activation
        self.activations = Magnitudes()
        self.activation_grad = Magnitudes(scale)
        self.weight_grad = Magnitudes(scale)


def measure_ranges(network: torch.nn.Module, compute_loss, scale: float) -> dict[str, Part]:
    """Run one forward and one backward pass, and count the values at every layer.

    A layer is a module that has a kernel or no children. A layer without a kernel, such as batch
    norm, belongs to the part before it. Only kernels count as weights: autocast casts them, and so
    their gradients, to float16, but not the vectors of norms.

    Args:
        network: its children are the encoder, the decoder and the head.
        compute_loss: runs the network once, in float32, and returns the loss, a scalar.
        scale: that of the gradient scaler.

    Returns: the parts by name, in the order in which they run. The last, `loss`, is the logits.
    """
    kernels = {}
    for name, parameter in network.named_parameters():
        if name.endswith('.weight') and parameter.ndim > 1:
            kernels[name.removesuffix('.weight')] = parameter
    starts, parts, current = part_names(network, kernels), {}, 'input'

    def watch(path: str, start: str | None):
        """A hook for the layer at this path. `start` is the part in which it lies, if known."""

        def hook(layer, inputs, output: torch.Tensor) -> None:
            nonlocal current
            current = start or current
            part, values = parts.setdefault(current, Part(scale)), output.detach()
            part.largest[path] = max(part.largest.get(path, 0.0), values.abs().max().item())
            part.activations.add(values)
            if output.requires_grad:
                output.register_hook(part.activation_grad.add)

        return hook

    hooks = [network.register_forward_hook(watch('logits', 'loss'))]
    for path, layer in network.named_modules():
        if path in kernels or not list(layer.children()):
            start = next((name for name in starts if f'{path}.'.startswith(f'{name}.')), None)
            hooks.append(layer.register_forward_hook(watch(path, start)))
    network.zero_grad()
    try:
        # Eager, because a network that is compiled already would not call the hooks.
        with torch.compiler.set_stance('force_eager'):
            compute_loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
    for part in parts.values():
        for path in kernels.keys() & part.largest.keys():
            if kernels[path].grad is not None:
                part.weight_grad.add(kernels[path].grad)
    return parts


def part_names(network: torch.nn.Module, kernels) -> set[str]:
    """The modules to measure as one part: so deep in each child that PARTS of them have kernels."""
    names = set()
    for child, _ in network.named_children():
        inside = [path.split('.') for path in kernels if path.split('.')[0] == child]
        depth, found = 0, set()
        while len(found) < min(PARTS, len(inside)):
            depth += 1
            found = {'.'.join(path[:depth]) for path in inside}
        names |= found
    return names


def ranges_table(parts: dict[str, Part], scale: float) -> pd.DataFrame:
    """precision_ranges.csv: a row per part. `zero` is a share of all gradients. `lost`, `subnormal`
    and `lost_scaled` are shares of those that are not zero."""
    rows = []
    for name, part in parts.items():
        layer = max(part.largest, key=part.largest.get)
        row = {'part': name, 'largest_activation': part.largest[layer], 'layer': layer}
        for count in ('zero', 'lost', 'subnormal', 'lost_scaled'):
            row[f'activation_grad_{count}'] = part.activation_grad.share(count)
            row[f'weight_grad_{count}'] = part.weight_grad.share(count)
        rows.append({**row, 'scale': scale})
    return pd.DataFrame(rows)


def verdict(parts: dict[str, Part], scale: float) -> str:
    """One sentence: whether float16 is safe here, or what it loses and what to do."""
    largest, gradients = 0.0, Magnitudes()
    for name, part in parts.items():
        for layer, value in part.largest.items():
            if value >= 65520:
                return (
                    f'float16 overflows in {layer}: its largest activation is {value:.3g} ({LIMIT} is '
                    "the limit): set PRECISION='bf16', or a lower LR"
                )
            largest = max(largest, value)
        for found in (part.activation_grad, part.weight_grad):
            if name != 'loss':  # the head has these gradients as well
                gradients.nonzero += found.nonzero
                gradients.lost += found.lost
                gradients.lost_scaled += found.lost_scaled
    lost, lost_scaled = 100 * gradients.share('lost'), 100 * gradients.share('lost_scaled')
    facts = (
        f'the largest activation is {largest:.3g} ({LIMIT} is the limit); without scaling '
        f'{lost:.3g} % of the gradients would be lost, with scale {scale:g} {lost_scaled:.3g} %'
    )
    if gradients.share('lost_scaled') > TOO_MANY:
        return f"float16 loses gradients here: {facts}: set PRECISION='bf16', or another LOSS"
    return f'float16 is safe here: {facts}'


if __name__ == '__main__':
    command_line.run(main, __doc__, OPTIONS)
