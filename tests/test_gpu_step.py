"""What a GPU would wait for, move and run, counted without one."""

import gc

import pytest
import pytorch_lightning as pl
import torch
from conftest import Tiny, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import command_line
import config
import decoders
import dice_loss
import folds
import Lightning_trainer
import model_dispatcher
import runtime
from Lightning_module import CarvanaModel


class Operators(TorchDispatchMode):
    """Collects (name, results) of the operators that are called while it is on."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.called.append((operator.name(), operator, (args, result)))
        return result

    def names(self) -> list[str]:
        return [name for name, *_ in self.called]


# ------------------------------------------------------------ waits
WAITS = ('aten::_local_scalar_dense', 'aten::is_nonzero', 'aten::equal', 'aten::nonzero')


@pytest.fixture
def counted(carvana, monkeypatch):
    """Trains with a float16 scaler. Collects the waits of each batch: between the batch's start and
    the next one's, or the epoch's end."""
    folds.main()
    monkeypatch.setitem(model_dispatcher.MODELS, 'tiny', Tiny)
    monkeypatch.setattr(runtime, 'EMULATE_FLOAT16', True)
    waits = []

    class Counter(pl.Callback):
        def on_train_batch_start(self, trainer, *rest):
            self.operators = Operators()
            self.operators.__enter__()

        def on_train_batch_end(self, trainer, *rest):
            self.operators.__exit__(None, None, None)
            waits.append([name for name in self.operators.names() if name in WAITS])
            assert len(self.operators.called) > 20  # the step itself was seen

    bars = runtime.progress_bars
    monkeypatch.setattr(runtime, 'progress_bars', lambda: [*bars(), Counter()])

    def train(*words):
        command_line.override([*settings(carvana), 'MODEL_NAME=tiny', 'TRAIN_BATCH_SIZE=2', *words])
        Lightning_trainer.train_fold(0)
        return waits

    return train


@pytest.mark.parametrize('optimizer', ['Adam', 'AdamW', 'SGD'])
def test_a_training_step_never_waits(counted, optimizer):
    assert counted(f'OPTIMIZER={optimizer}', 'EPOCHS=2') == [[]] * 8


def test_the_count_sees_a_wait(counted, monkeypatch):
    step = CarvanaModel.training_step

    def waits(self, *args):
        loss = step(self, *args)
        loss.item()
        return loss

    monkeypatch.setattr(CarvanaModel, 'training_step', waits)
    assert counted() == [['aten::_local_scalar_dense']] * 4


def test_validation_makes_no_tensor_of_a_list(carvana):
    folds.main()
    module = CarvanaModel([1, 2], [0]).eval()
    batch = next(iter(module.val_dataloader()))
    assert batch['row'].tolist() == list(range(len(batch['img'])))
    with torch.no_grad(), Operators() as operators:
        module.validation_step(batch, 0)
    assert not set(operators.names()) & {*WAITS, 'aten::lift_fresh'}


# ------------------------------------------------------------ dtypes
@pytest.fixture
def cuda_autocast():
    """float16 autocast of CUDA, also on a machine without a GPU, where torch.autocast refuses."""
    before = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
    torch.set_autocast_enabled('cuda', True)
    torch.set_autocast_dtype('cuda', torch.float16)
    yield
    torch.set_autocast_enabled('cuda', before[0])
    torch.set_autocast_dtype('cuda', before[1])


def upsampled_types(name: str) -> dict[str, set]:
    """The types of what a model's forward upsamples and concatenates on a fake GPU."""
    with FakeTensorMode(), torch.device('cuda'):
        model = model_dispatcher.build_model(name)
        with Operators() as operators:
            model(torch.empty(2, 3, 64, 64, device='cuda'))
    types = {}
    for operator, _, (_, result) in operators.called:
        if 'upsample_nearest' in operator or operator == 'aten::cat':
            types.setdefault(operator, set()).add(result.dtype)
    return types


def test_nearest_upsampling_stays_in_half(cuda_autocast):
    for name in ('smp_unet_resnet18', 'smp_unetplusplus_resnet18', 'smp_fpn_resnet18'):
        types = upsampled_types(name)
        assert types.pop('aten::upsample_nearest2d') == {torch.float16}
        assert types.pop('aten::cat', {torch.float16}) == {torch.float16}


def test_without_the_rule_autocast_promotes_the_skips_too(cuda_autocast, monkeypatch):
    """The mend is what makes the difference, and bilinear upsampling stays in float32."""
    decoders.upsample_in_half.cache_clear()
    gc.collect()  # the registration ends with its object
    monkeypatch.setattr(decoders, 'upsample_in_half', lambda: None)
    types = upsampled_types('smp_unet_resnet18')
    assert types == {'aten::upsample_nearest2d': {torch.float32}, 'aten::cat': {torch.float32}}


def test_values_and_gradients_of_upsampling_are_those_of_float32():
    decoders.upsample_in_half()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.interpolate(x, scale_factor=2.0, mode='nearest')
    assert torch.equal(y, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4))


# ------------------------------------------------------------ sizes
def test_activations_beyond_2_to_the_31_are_refused(monkeypatch):
    """64 images of 1024 pixels: CUDA's nearest upsampling would return zeros."""
    model = model_dispatcher.build_model('smp_unet_resnet34')
    model_dispatcher.try_out(model, 'smp_unet_resnet34', 63, (3, 1024, 1024))
    with pytest.raises(config.UserMistake, match='TRAIN_BATCH_SIZE=64: .*2147483648 elements'):
        model_dispatcher.try_out(model, 'smp_unet_resnet34', 64, (3, 1024, 1024))


# ------------------------------------------------------------ kernels
def kernels_and_bytes(name: str, classes: int = 1, size: int = 64) -> tuple[int, float]:
    """Kernels of a loss, forward and backward on half logits, and bytes moved per pixel."""
    logits = torch.randn(2, classes, size, size).half().requires_grad_()
    mask = torch.arange(2 * size * size, dtype=torch.uint8).reshape(2, size, size) % 2
    with Operators() as operators:
        dice_loss.build_loss(name, classes)(logits, mask).backward()
    kernels, moved = 0, 0
    for _, operator, tensors in operators.called:
        is_view = any(result.alias_info for result in operator._schema.returns)
        if is_view:
            continue
        kernels += 1
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and 0 not in tensor.stride():
                moved += tensor.numel() * tensor.element_size()
    return kernels, moved / mask.numel()


@pytest.mark.parametrize(
    ('name', 'kernels', 'moved'),
    # Before each part was computed only where it is asked for: 538, 632 and 250 bytes.
    [('IoULoss', 69, 176), ('DC_and_CE_loss', 94, 304), ('CE', 31, 141)],
)
def test_losses_move_little(name, kernels, moved):
    counted = kernels_and_bytes(name)
    assert counted[0] <= kernels and counted[1] <= moved
