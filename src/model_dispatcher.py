"""MODELS: name -> function that builds the model. Names are smp_<decoder>_<encoder>."""

import copy
import os
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import config
import decoders
import encoders


def build(decoder: str, encoder: str, weights=None, channels: int = 3, classes: int = 1):
    """A new model: normalised images (N, channels, H, W) -> logits (N, classes, H, W).

    Args:
        weights: those of the encoder: a name such as 'imagenet', a weights file, or None (random).

    Raises config.UserMistake for unknown names, weights that do not load, or a pair that does not fit.
    """
    decoders.upsample_in_half()
    decoders.check_name(decoder)
    encoders.check_name(encoder)
    hub = encoders.hub_weights(encoder, weights)

    try:
        model = decoders.DECODERS[decoder](
            encoder_name=encoder, encoder_weights=hub, in_channels=channels, classes=classes
        )
    except Exception as error:  # smp, timm, the hub and a wrong proxy raise many types
        reason = config.shorten(error)
        if hub is None:
            raise config.UserMistake(
                f'MODEL_NAME=smp_{decoder}_{encoder}: {decoder} cannot be built on {encoder} '
                f'({reason})'
            ) from error
        build(decoder, encoder, None, channels, classes)  # raises if the weights are not at fault
        proxies = sorted(name for name in os.environ if name.lower().endswith('_proxy'))
        proxy = f', with the proxy that {" and ".join(proxies)} set' if proxies else ''
        raise config.UserMistake(
            f"ENCODER_WEIGHTS='{weights}': the weights of {encoder} could not be downloaded{proxy} "
            f'({reason}): set a weights file, or None for random weights'
        ) from error
    if weights and not hub:
        print(encoders.load_file(model.encoder, weights))
    return model


MODELS = {
    f'smp_{decoder}_{encoder}': partial(build, decoder, encoder)
    for decoder in decoders.DECODERS
    for encoder in encoders.SMP_ENCODERS
}


def build_model(name: str, weights=None, channels: int = 3, classes: int = 1) -> torch.nn.Module:
    """A new model of MODELS, or smp_<decoder>_tu-<encoder of timm>. Arguments as for `build`."""
    if name in MODELS:
        return MODELS[name](weights=weights, channels=channels, classes=classes)
    if not name.startswith('smp_') or name.count('_') < 2:
        raise config.UserMistake(
            f"MODEL_NAME='{name}': write smp_<decoder>_<encoder>; test_model.py --list shows all names"
        )
    _, decoder, encoder = name.split('_', 2)
    return build(decoder, encoder, weights, channels, classes)


class CheckUpsampling(TorchDispatchMode):
    """Raises ValueError where an upsampled activation has 2**31 elements or more. CUDA's nearest
    upsampling of channels-last images then returns zeros (pytorch issue 141831)."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if 'upsample_nearest' in operator.name() and result.numel() >= 2**31:
            raise ValueError(f'an activation of {result.numel()} elements: the limit is 2**31 - 1')
        return result


def try_out(model: torch.nn.Module, name: str, batch_size: int, shape: tuple) -> None:
    """Raise config.UserMistake if the model cannot be trained on batches (batch_size, *shape)."""
    try:  # on the meta device, which computes shapes only
        batch = torch.zeros(batch_size, *shape, device='meta')
        with CheckUpsampling():
            copy.deepcopy(model).to('meta').train()(batch)
    except NotImplementedError:
        pass  # an operation that the meta device lacks: the first training step will show
    except Exception as error:  # each layer raises its own type
        raise config.UserMistake(
            f'CROP_SIZE={config.CROP_SIZE}, TRAIN_BATCH_SIZE={batch_size}: {name} does not accept '
            f'such a batch ({config.shorten(error, 250)}): set another size or another model'
        ) from None
