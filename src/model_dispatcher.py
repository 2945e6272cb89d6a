"""MODELS: name -> builder, from an encoder and a decoder: smp_<decoder>_<encoder>."""

import copy
import shutil
import warnings
from functools import partial
from pathlib import Path

import torch

import config
import decoders
import encoders


def build(decoder: str, encoder: str, weights=None, channels: int = 3, classes: int = 1):
    """A fresh model: images (N, channels, H, W), normalised -> logits (N, classes, H, W).

    Args:
        weights: of the encoder: 'imagenet' or another set that the encoder has, downloaded once
            into the hub's cache; the path of a weights file; or None for random ones.

    Raises config.UserMistake for unknown names and weights, a download that fails, and a pair that
    segmentation_models_pytorch cannot build.
    """
    decoders.check_name(decoder)
    encoders.check_name(encoder)
    hub = encoders.hub_weights(encoder, weights)
    make = partial(
        decoders.DECODERS[decoder], encoder_name=encoder, in_channels=channels, classes=classes
    )
    with warnings.catch_warnings():
        # timm-* still load; that they will go one day is for this project to act on.
        warnings.filterwarnings('ignore', message='.*timm-.* encoders are deprecated')
        try:
            model = make(encoder_weights=hub)
        except Exception as error:
            if hub is None or not isinstance(error, (OSError, RuntimeError)):
                raise unfit(decoder, encoder, error) from error
            raise encoders.no_download(encoder, weights, error) from None
    if encoders.is_file(weights):
        print(encoders.load_file(model.encoder, weights))
    return model


def unfit(decoder: str, encoder: str, error: Exception) -> config.UserMistake:
    """The mistake to raise for a decoder and an encoder that do not go together: with the reason, and
    the nearest pairs that do."""
    others = [(other, encoder) for other in ('unet', 'fpn', 'linknet', 'dpt')]
    others += [(decoder, other) for other in ('resnet34', 'tu-vit_base_patch16_224')]
    pairs = [f'smp_{d}_{e}' for d, e in others if (d, e) != (decoder, encoder) and builds(d, e)]
    pairs = dict.fromkeys([*pairs[:1], *pairs[-1:]])
    return config.UserMistake(
        f'MODEL_NAME=smp_{decoder}_{encoder}: {decoder} cannot be built on {encoder} '
        f'({config.in_short(error)}); {" and ".join(pairs) or "smp_unet_resnet34"} can'
    )


def builds(decoder: str, encoder: str) -> bool:
    """Whether a pair can be built."""
    try:
        decoders.DECODERS[decoder](encoder_name=encoder, encoder_weights=None)
    except Exception:  # whatever segmentation_models_pytorch or timm say, it does not
        return False
    return True


def try_out(model: torch.nn.Module, name: str, batch_size: int, shape: tuple) -> None:
    """Raise config.UserMistake where a training batch of `shape` (channels, height, width) does not
    go through the model. Nothing is computed: shapes alone go through a copy without memory."""
    shadow = copy.deepcopy(model).to('meta').train()
    try:
        shadow(torch.zeros(batch_size, *shape, device='meta'))
    except NotImplementedError:
        return  # an operation that has no such shadow: the first step will tell
    except Exception as error:  # whatever the model's own checks and layers raise
        raise config.UserMistake(
            f'CROP_SIZE={config.CROP_SIZE}, TRAIN_BATCH_SIZE={batch_size}: {name} does not take such '
            f'a batch ({config.in_short(error)}): another size, or another model'
        ) from None


def export(model: torch.nn.Module, folder: Path, facts: dict) -> None:
    """Write a model as segmentation_models_pytorch.from_pretrained reads it; `facts` are added to
    its config.json, each after an underscore, as names are that do not build the model."""
    temporary = folder.with_name(f'{folder.name}.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    model.config.update({f'_{name}': value for name, value in facts.items()})
    model.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


# Every pair of segmentation_models_pytorch's own; the original's seven are among them.
MODELS = {
    f'smp_{decoder}_{encoder}': partial(build, decoder, encoder)
    for decoder in decoders.DECODERS
    for encoder in encoders.SMP_ENCODERS
}


def build_model(name: str, weights=None, channels: int = 3, classes: int = 1) -> torch.nn.Module:
    """The model smp_<decoder>_<encoder>, built anew at each call; arguments as for `build`."""
    if name in MODELS:
        return MODELS[name](weights=weights, channels=channels, classes=classes)
    parts = name.split('_', 2)
    if len(parts) != 3 or parts[0] != 'smp':
        raise config.UserMistake(
            f"MODEL_NAME='{name}': write smp_<decoder>_<encoder>, such as smp_unet_resnet34; all "
            'names: test_model.py --list'
        )
    return build(parts[1], parts[2], weights, channels, classes)
