"""Any decoder of segmentation_models_pytorch by name."""

import functools
import warnings

import segmentation_models_pytorch as smp
import torch

import config

# Name -> model class, called as DECODERS[name](encoder_name=..., encoder_weights=..., classes=...).
DECODERS = dict(smp.MODEL_ARCHITECTURES_MAPPING)


def check_name(name: str) -> None:
    """Raise config.UserMistake if there is no such decoder."""
    if name not in DECODERS:
        meant = config.did_you_mean(name, DECODERS)
        raise config.UserMistake(
            f"MODEL_NAME: no decoder '{name}'; {meant}valid: {', '.join(DECODERS)}"
        )


@functools.cache
def upsample_in_half() -> torch.library.Library:
    """Keep nearest-neighbour upsampling in float16 or bfloat16 under CUDA's autocast.

    Autocast runs it in float32, and concatenation then promotes the skip connection as well
    (pytorch issue 121072). It only copies values, so half precision loses nothing.

    Returns: the registration, which holds as long as the object lives.
    """
    library = torch.library.Library('aten', 'IMPL')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # some versions of torch warn of the replaced rule
        for operator in ('upsample_nearest2d', 'upsample_nearest2d.vec'):
            library.impl(operator, torch.library.fallthrough_kernel, 'AutocastCUDA')
    return library
