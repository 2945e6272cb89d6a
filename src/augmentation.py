"""AUGMENTATIONS: the transforms of training images, by name.

This file imports nothing that takes time, so that a wrong name is told at once.
"""

import os
import zlib

REFLECT = 4  # cv2.BORDER_REFLECT_101


def shift_scale_rotate(A):
    """The original's ShiftScaleRotate: one scale for both axes, reflected border."""
    return A.Affine(
        translate_percent={'x': (-0.0625, 0.0625), 'y': (-0.0625, 0.0625)},
        scale=(0.9, 1.1),
        keep_ratio=True,
        rotate=(-15, 15),
        border_mode=REFLECT,
        p=0.9,
    )


def strong(A) -> list:
    """What a model meets outside the training set: other light, blur, noise, JPEG, occlusion."""
    return [
        A.HorizontalFlip(p=0.5),
        shift_scale_rotate(A),
        A.Perspective(scale=(0.02, 0.06), border_mode=REFLECT, p=0.3),
        A.RandomBrightnessContrast(brightness_limit=0.25, contrast_limit=0.25, p=0.5),
        A.RandomGamma(gamma_limit=(75, 130), p=0.3),
        A.HueSaturationValue(10, 25, 15, p=0.3),
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.5), p=0.2),
        A.GaussNoise(std_range=(0.01, 0.06), p=0.3),
        A.ImageCompression(quality_range=(50, 95), p=0.2),
        A.CoarseDropout(
            num_holes_range=(1, 4),
            hole_height_range=(0.04, 0.12),
            hole_width_range=(0.04, 0.12),
            fill='random_uniform',
            p=0.3,
        ),
    ]


# AUGMENTATION in config.py -> the transforms, applied in turn after the resize; A is albumentations.
AUGMENTATIONS = {
    'original': lambda A: [shift_scale_rotate(A)],
    'flip': lambda A: [A.HorizontalFlip(p=0.5), shift_scale_rotate(A)],
    'strong': strong,
    'none': lambda A: [],
}


def build(name: str, channels: int):
    """The transforms of a name, as one: called with image=, mask=; those of colour need 3 channels."""
    os.environ.setdefault(
        'NO_ALBUMENTATIONS_UPDATE', '1'
    )  # or its import asks a server for updates
    import albumentations as A

    transforms = AUGMENTATIONS[name](A)
    if channels == 1:
        transforms = [t for t in transforms if not isinstance(t, A.HueSaturationValue)]
    return A.Compose(transforms)


def seed(augment, words: str) -> None:
    """Set every transform's random generator from a text.

    albumentations 2.0.8 keeps its own generators, which all workers would inherit alike, and
    Compose.set_random_seed gives all transforms the same one: then those with the same p are
    applied together or not at all.
    """
    for position, transform in enumerate(augment.transforms):
        transform.set_random_seed(zlib.crc32(f'{words} {position}'.encode()))
