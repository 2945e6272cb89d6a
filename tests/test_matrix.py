"""Every decoder on five kinds of encoders: forward and backward at the smallest size, or refused."""

import pytest
import torch
from conftest import settings

import command_line
import config
import decoders
import model_dispatcher

ENCODERS = ['resnet18', 'efficientnet-b0', 'mit_b0', 'tu-convnext_atto', 'mobilenet_v2']
REFUSED = {'smp_unetplusplus_mit_b0', 'smp_linknet_mit_b0'}  # by segmentation_models_pytorch
REFUSED |= {f'smp_dpt_{name}' for name in ENCODERS if not name.startswith('tu-')}


@pytest.mark.parametrize('encoder', ENCODERS)
@pytest.mark.parametrize('decoder', decoders.DECODERS)
def test_a_pair_learns_or_is_refused_with_the_reason(tmp_path, decoder, encoder):
    command_line.override(settings(tmp_path))
    name, side = f'smp_{decoder}_{encoder}', 128 if decoder == 'pan' else 32
    try:
        model = model_dispatcher.build_model(name, classes=2)
        model_dispatcher.try_out(model, name, 2, (3, side, side))
    except config.UserMistake as refusal:
        assert name in REFUSED, str(refusal)
        assert 'cannot be built on' in str(refusal) and '\n' not in str(refusal)
        return
    assert name not in REFUSED
    logits = model(torch.rand(2, 3, side, side))
    assert logits.shape == (2, 2, side, side)
    logits.square().mean().backward()
    gradients = [p.grad for p in model.encoder.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)


def test_a_size_that_is_too_small_is_refused_before_the_training():
    model = model_dispatcher.build_model('smp_pan_resnet18')
    with pytest.raises(config.UserMistake, match='smp_pan_resnet18 does not accept such a batch'):
        model_dispatcher.try_out(model, 'smp_pan_resnet18', 2, (3, 64, 64))
    assert next(model.parameters()).device.type == 'cpu'
