"""Where float16 loses: the magnitudes of a model's activations and gradients against its range.

Values are taken in float32, so every device can measure them, and then rounded to float16.
Reference: Micikevicius et al. 2018, Mixed Precision Training (arXiv 1710.03740), section 3.2.
"""

import pandas as pd
import torch

import config
import files
import plots
import runtime

LIMIT = 65504  # the largest float16 number; from 65520 up, values are rounded to infinity
SMALLEST_NORMAL = 2.0**-14  # smaller float16 numbers are subnormal: they have fewer digits
TOO_MANY = 0.01  # a larger share of gradients lost in spite of the scale is worth a warning
PARTS = 4  # the encoder and the decoder are divided into at least this many parts, if they can be


def write(model, scale: float) -> None:
    """Measure a trained CarvanaModel on one training batch. Write the table and the picture."""
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    batch = next(iter(model.train_dataloader()))
    device = 'cuda' if runtime.on_cuda() else 'cpu'
    model.to(device).train()
    image, mask = batch['image'].to(device), batch['mask'].to(device)
    with runtime.explain_errors():
        parts = measure(model.model, lambda: model.loss(model(image), mask), scale)
    output, title = config.path(config.OUTPUT), f'{config.MODEL_NAME}, {config.LOSS}'
    files.write_table(table(parts, scale), output / 'precision_ranges.csv')
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


def measure(network: torch.nn.Module, compute_loss, scale: float) -> dict[str, Part]:
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


def table(parts: dict[str, Part], scale: float) -> pd.DataFrame:
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
