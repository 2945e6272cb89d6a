"""precision_ranges: what float16 loses, counted by hand; parts of every kind of model; the picture."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import model_dispatcher
import plots
import test_precision
from dice_loss import build_loss
from test_precision import Magnitudes


def network(**children: nn.Module) -> nn.Sequential:
    """Modules in a row, by name."""
    return nn.Sequential(OrderedDict(children))


def convolution(weight: float) -> nn.Conv2d:
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    return layer


def test_values_are_counted_as_float16_rounds_them():
    found = Magnitudes(scale=2.0**16)
    found.add(torch.tensor([
        0, -0.0,  # zero in float32
        2.0**-25, -(2.0**-40), 2.0**-41, 2.0**-130,  # lost: up to half of 2^-24, ties to even
        2.0**-25 * 1.001, 2.0**-24, -(2.0**-14) * 0.99,  # subnormal
        2.0**-14, 1, -0.99,  # normal, and lost if scaled by 2^16: only 1
        65504, 65519.9, 65520, -1e9, torch.inf,  # lost: the last three
    ]))  # fmt: skip
    assert (found.zero, found.nonzero) == (2, 15)
    assert found.lost == 4 + 3
    assert found.subnormal == 3
    # 2^-41 * 2^16 is 2^-25, which is rounded to 0, and so is 2^-130. From 1 up, all are infinite.
    assert found.lost_scaled == 2 + 1 + 5
    assert found.share('zero') == 2 / 17 and found.share('lost') == 7 / 15
    exponents = {int(n) - 127: int(c) for n, c in enumerate(found.histogram) if c}
    assert exponents == {
        -127: 1, -41: 1, -40: 1, -25: 2, -24: 1, -15: 1, -14: 1, -1: 1, 0: 1, 15: 3, 29: 1, 128: 1
    }  # fmt: skip


def test_two_layers_by_hand():
    """x (1, 2) times 3 is (3, 6), times 2^-20 is the logits; the loss is their sum times 2^-10."""
    model = network(encoder=convolution(3), decoder=convolution(2.0**-20))
    x = torch.tensor([1.0, 2.0]).reshape(1, 1, 1, 2)
    parts = test_precision.measure_ranges(model, lambda: model(x).sum() * 2.0**-10, scale=2.0**16)
    assert [*parts] == ['encoder', 'decoder', 'loss']
    assert parts['encoder'].largest == {'encoder': 6}
    assert parts['decoder'].largest == {'decoder': 6 * 2.0**-20}
    table = test_precision.ranges_table(parts, 2.0**16).set_index('part')
    assert table.largest_activation.tolist() == [6, 6 * 2.0**-20, 6 * 2.0**-20]
    # Gradients: 2^-10 of both logits, 2^-30 of the encoder's two outputs; of the decoder's weight
    # (3 + 6) 2^-10, of the encoder's (1 + 2) 2^-30. Scaled, 2^-30 becomes 2^-14.
    grads = table.filter(regex='^activation_grad')
    assert grads.loc['encoder'].tolist() == [0, 1, 0, 0]
    assert grads.loc['decoder'].tolist() == grads.loc['loss'].tolist() == [0, 0, 0, 0]
    assert parts['encoder'].activation_grad.histogram.nonzero().tolist() == [[127 - 30]]
    assert parts['encoder'].weight_grad.histogram.nonzero().tolist() == [[127 - 29]]  # 1.5 * 2^-29
    assert parts['decoder'].weight_grad.histogram.nonzero().tolist() == [[127 - 7]]  # 9/8 * 2^-7
    assert table.weight_grad_lost.tolist()[:2] == [1, 0] and table.weight_grad_lost.isna()['loss']
    # The activations' gradients 2 + 2, the weights' 1 + 1: lost are 2 + 1 of 6.
    assert test_precision.verdict(parts, 2.0**16) == (
        'float16 is safe here: the largest activation is 6 (65504 is the limit); without scaling '
        '50 % of the gradients would be lost, with scale 65536 0 %'
    )


def test_gradients_that_the_scale_does_not_save():
    model = network(encoder=convolution(1), decoder=convolution(1))
    x = torch.ones(1, 1, 1, 4)
    factors = 2.0 ** torch.tensor([-60.0, -30, -20, 0])
    parts = test_precision.measure_ranges(model, lambda: (model(x) * factors).sum(), scale=2.0**10)
    table = test_precision.ranges_table(parts, 2.0**10)
    for share, value in {'zero': 0, 'lost': 0.5, 'subnormal': 0.25, 'lost_scaled': 0.25}.items():
        assert table[f'activation_grad_{share}'].tolist() == [value] * 3
    told = test_precision.verdict(parts, 2.0**10)
    assert told.startswith('float16 loses gradients here: the largest activation is 1 (65504')
    assert '40 % of the gradients would be lost, with scale 1024 20 %' in told  # 4 and 2 of 10
    assert told.endswith("set PRECISION='bf16', or another LOSS")


def test_zeros_of_float32_are_not_lost():
    model = network(
        encoder=network(conv=convolution(1), relu=nn.ReLU(inplace=True)), head=convolution(1)
    )
    x = torch.tensor([-1.0, 2.0, 3.0, -4.0]).reshape(1, 1, 2, 2)
    parts = test_precision.measure_ranges(model, lambda: model(x).sum(), scale=1.0)
    # The ReLU, in place, passes on half of its gradients (1, 1, 1, 1) to the convolution.
    assert parts['encoder'].activation_grad.zero == 2
    assert parts['encoder'].activation_grad.nonzero == 2 + 4
    assert parts['encoder'].largest == {'encoder.conv': 4, 'encoder.relu': 3}
    assert parts['encoder'].activations.zero == 2


@pytest.mark.parametrize('name', ['encoder.layer2.0.conv1', 'decoder.blocks.2.conv1.0'])
def test_the_layer_that_overflows_is_named_although_batch_norm_hides_it(name):
    torch.manual_seed(0)
    model = model_dispatcher.build_model('smp_unet_resnet18')
    model.get_submodule(name).weight.data *= 1e5
    image, mask = torch.randn(2, 3, 64, 64), torch.ones(2, 64, 64, dtype=torch.long)
    loss = build_loss('IoULoss')
    parts = test_precision.measure_ranges(model, lambda: loss(model(image), mask), 65536.0)
    assert model(image).abs().max() < 100
    told = test_precision.verdict(parts, 65536.0)
    assert told.startswith(f'float16 overflows in {name}: its largest activation is ')
    assert told.endswith("(65504 is the limit): set PRECISION='bf16', or a lower LR")
    table = test_precision.ranges_table(parts, 65536.0)
    over = table[table.largest_activation > 65504]
    assert over.layer.tolist() == [name] and name.startswith(over.part.item())


MODELS = {
    'smp_unet_resnet18': (
        ['encoder.conv1', *(f'encoder.layer{n}' for n in range(1, 5))],
        [f'decoder.blocks.{n}' for n in range(5)]),
    'smp_linknet_tu-regnetx_002': (
        ['encoder.model.stem', *(f'encoder.model.s{n}' for n in range(1, 5))],
        [f'decoder.blocks.{n}' for n in range(5)]),
    'smp_segformer_mit_b0': (
        [f'encoder.{name}{n}' for n in range(1, 5) for name in ('patch_embed', 'block')],
        [*(f'decoder.mlp_stage.{n}' for n in range(4)), 'decoder.fuse_stage.0']),
    'smp_fpn_efficientnet-b0': (
        ['encoder._conv_stem', *(f'encoder._blocks.{n}' for n in range(16))],
        ['decoder.p5', 'decoder.p4', 'decoder.p3', 'decoder.p2', 'decoder.seg_blocks']),
}  # fmt: skip


@pytest.mark.parametrize('name', MODELS)
def test_parts_are_stages_and_blocks_and_all_is_measured(name):
    """Against torch.autograd.grad and NumPy's float16, on all layers at once."""
    torch.manual_seed(0)
    model, loss = model_dispatcher.build_model(name).eval(), build_loss('BCE')  # no drop path
    image, mask = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.long)
    parts = test_precision.measure_ranges(model, lambda: loss(model(image), mask), 65536.0)
    encoder, decoder = MODELS[name]
    assert [*parts] == [*encoder, *decoder, 'segmentation_head', 'loss']
    assert all(part.largest and part.activation_grad.nonzero for part in parts.values())
    assert not any(module._forward_hooks for module in model.modules())

    kernels = [p for n, p in model.named_parameters() if n.endswith('.weight') and p.ndim > 1]
    logits = model(image)
    grads = torch.autograd.grad(loss(logits, mask), [logits, *kernels], allow_unused=True)
    of_logits, *of_kernels = (g.numpy() for g in grads if g is not None)
    of_kernels = np.concatenate([g.ravel() for g in of_kernels])
    total = sum(part.weight_grad.histogram.sum().item() for part in parts.values())
    assert total == np.count_nonzero(of_kernels)
    lost = sum(part.weight_grad.lost for part in parts.values())
    assert lost == pytest.approx(
        np.sum((of_kernels != 0) & (of_kernels.astype(np.float16) == 0)), rel=1e-3
    )
    assert parts['loss'].activation_grad.lost == np.sum(of_logits.astype(np.float16) == 0)
    assert parts['loss'].largest['logits'] == logits.abs().max().item()


def test_a_compiled_network_is_measured_too():
    model = network(encoder=convolution(3), decoder=convolution(2))
    model.compile(backend='eager')
    x = torch.ones(1, 1, 2, 2)
    model(x).sum().backward()  # compiled before the hooks are there
    parts = test_precision.measure_ranges(model, lambda: model(x).sum(), 1.0)
    assert {name: part.activations.nonzero for name, part in parts.items()} == {
        'encoder': 4, 'decoder': 4, 'loss': 4}  # fmt: skip
    assert parts['encoder'].weight_grad.nonzero == 1


def test_the_picture_has_the_limits_the_scale_and_the_names(tmp_path):
    model = network(encoder=convolution(3), decoder=convolution(2.0**-60), head=convolution(1e30))
    x = torch.ones(1, 1, 2, 2)
    parts = test_precision.measure_ranges(model, lambda: model(x).sum(), 2.0**12)
    figure = plots.precision_ranges(parts, 2.0**12, 'a title')
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [*parts]
    texts = {text.get_text() for text in axis.texts}
    assert {'scale 4096', 'subnormal', 'becomes 0', 'float16, up to 65504', 'infinite'} <= texts
    assert any('bfloat16' in text for text in texts)
    lines = {line.get_xdata()[0] for line in axis.lines}
    assert {-25, 16, -25 - 12} <= lines
    file = plots.save(figure, tmp_path / 'ranges.png')
    assert file.stat().st_size > 10_000


def test_bars_beyond_the_picture_are_drawn_at_its_edges():
    values = Magnitudes()
    values.add(torch.tensor([2.0**-50, 2.0**-3, 2.0**-3, 2.0**9]))
    assert plots.bar_heights(values, np.arange(-4, 2)).tolist() == [0.425, 0.85, 0, 0, 0.425]
