"""Any decoder of segmentation_models_pytorch by name."""

import segmentation_models_pytorch as smp

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
