"""MODELS: name -> builder, from an encoder and a decoder: smp_<decoder>_<encoder>."""

import warnings
from functools import partial

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
    """The mistake to raise for a decoder and an encoder that do not go together."""
    reason = ' '.join(str(error).split())[:200]
    return config.UserMistake(
        f'MODEL_NAME=smp_{decoder}_{encoder}: {decoder} cannot be built on {encoder} ({reason}); '
        f'smp_unet_{encoder} and smp_{decoder}_resnet34 are the nearest to try'
    )


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
            'names: python test_model.py --list'
        )
    return build(parts[1], parts[2], weights, channels, classes)
