"""The decoder half of "Unetify": any decoder of segmentation_models_pytorch by name."""

import segmentation_models_pytorch as smp

import config

# name -> class; called as DECODERS[name](encoder_name=..., encoder_weights=..., classes=...)
DECODERS = dict(smp.MODEL_ARCHITECTURES_MAPPING)


def check_name(name: str) -> None:
    """Raise config.UserMistake, with the legal names, for a decoder that does not exist."""
    if name not in DECODERS:
        raise config.UserMistake(
            f"MODEL_NAME: no decoder '{name}'; {config.nearest(name, DECODERS)}legal: "
            + ', '.join(DECODERS)
        )


def check_size(model: smp.base.SegmentationModel, size: tuple[int, int]) -> None:
    """Raise config.UserMistake where images of (height, width) pixels do not fit the model."""
    stride = model.encoder.output_stride if model.requires_divisible_input_shape else 1
    if any(side % stride for side in size):
        legal = tuple(max(stride, round(side / stride) * stride) for side in size)
        shown = legal[0] if legal[0] == legal[1] else legal
        raise config.UserMistake(
            f'CROP_SIZE={config.CROP_SIZE}: {type(model).__name__} takes multiples of {stride} pixels, '
            f'such as CROP_SIZE={shown}'
        )
