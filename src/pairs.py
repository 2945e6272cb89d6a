"""Images with their masks: where they are, whether they belong together, and both at CROP_SIZE."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
import images
import masks
from tables import is_file, some

MASKS_LOOKED_AT = 500  # of more masks, so many are decoded here; the first epoch meets the others

LEAVE_OUT = 'move them away, or list the others in a CSV with a column img (TRAIN_CSV)'


def files_of(name: str) -> tuple[Path, Path]:
    """The image file and the mask file of a training image."""
    return (
        config.path(config.TRAIN_PATH) / (name + config.IMAGE_SUFFIX),
        config.path(config.MASK_PATH) / (name + config.MASK_SUFFIX),
    )


def files_in(folder: Path, suffix: str, constant: str) -> list[str]:
    """Names, without the suffix, of a folder's files that end in it; hidden files do not count.

    Raises config.UserMistake where there are none, telling what else is there.
    """
    if not folder.is_dir():
        raise config.UserMistake(f'{folder}: no such folder: set {constant} or INPUT')
    files = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith('.'))
    names = [file.removesuffix(suffix) for file in files if file.endswith(suffix)]
    if not names:
        raise config.UserMistake(
            f'{folder}: no file named *{suffix}, but {endings(files)}: set {constant} (are '
            'TRAIN_PATH and MASK_PATH swapped?) or its suffix'
        )
    return names


def endings(files: list[str]) -> str:
    """How many files of which suffixes there are, in words."""
    counts = Counter(os.path.splitext(file)[1] or 'no suffix' for file in files)
    return ', '.join(f'{count} {end}' for end, count in counts.most_common(4)) or 'it is empty'


def check(names: list[str]) -> None:
    """Every image has a mask of its own size, and the masks hold classes; some are decoded."""
    image_folder, mask_folder = config.path(config.TRAIN_PATH), config.path(config.MASK_PATH)
    with_image = set(files_in(image_folder, config.IMAGE_SUFFIX, 'TRAIN_PATH'))
    with_mask = set(files_in(mask_folder, config.MASK_SUFFIX, 'MASK_PATH'))
    listed = is_file(config.TRAIN_CSV)
    source = f' in {config.TRAIN_CSV} (TRAIN_CSV)' if listed else ''
    remedy = 'set TRAIN_CSV=None to take the folder' if listed else LEAVE_OUT
    for missing, what in (
        ([n for n in names if n not in with_image], f'have no file in {config.TRAIN_PATH}'),
        ([n for n in names if n not in with_mask], f'have no mask in {config.MASK_PATH}'),
    ):
        if missing:
            raise config.UserMistake(
                f'{len(missing)} of {len(names)} images{source} {what}: {some(missing)}: {remedy}'
            )
    lonely = sorted(with_mask - with_image)
    if lonely and not listed:
        raise config.UserMistake(
            f'{len(lonely)} masks in {config.MASK_PATH} have no image *{config.IMAGE_SUFFIX} in '
            f'{config.TRAIN_PATH}: {some(lonely)}: {remedy}'
        )
    differ = []
    for name in tqdm(names, 'checking headers', disable=None, leave=False):
        image_file, mask_file = files_of(name)
        image_size = images.check_header(image_file)
        _, mask_size = images.header(mask_file)
        if image_size != mask_size:
            differ.append(f'{name} ({shape(image_size)} and {shape(mask_size)})')
    if differ:
        raise config.UserMistake(
            f'{len(differ)} images and their masks differ in size (width x height): {some(differ)}: '
            'resize the masks by the nearest pixel'
        )
    constant, seen = Counter(), set()
    step = max(1, len(names) // MASKS_LOOKED_AT)
    for name in tqdm(names[::step], 'checking masks', disable=None, leave=False):
        mask = masks.read_mask(files_of(name)[1], config.CLASSES, config.IGNORE_INDEX)
        seen.update(np.flatnonzero(np.bincount(mask.ravel())).tolist())
        if mask.min() == mask.max():
            constant[int(mask.min())] += 1
    if len(seen) == 1 and step == 1:
        raise config.UserMistake(
            f'{config.MASK_PATH}: the masks hold nothing but class {seen.pop()}: is it the right folder?'
        )
    if config.IGNORE_INDEX in seen and seen <= {0, config.IGNORE_INDEX}:
        raise config.UserMistake(
            f'{config.MASK_PATH}: the masks hold nothing but 0 and {config.IGNORE_INDEX}, which '
            'IGNORE_INDEX leaves out: IGNORE_INDEX=None, if that is the foreground'
        )
    for value, count in sorted(constant.items()):
        print(f'{count} of {len(names[::step])} masks looked at hold nothing but class {value}')


def shape(size: tuple[int, int]) -> str:
    return f'{size[1]}x{size[0]}'


def form() -> dict:
    """What config.py says of the pairs: the keyword arguments of read_pair."""
    return {
        'size': config.crop_size(),
        'channels': config.CHANNELS,
        'classes': config.CLASSES,
        'ignore_index': config.IGNORE_INDEX,
    }


def read_pair(image_file, mask_file, size, channels, classes, ignore_index) -> tuple:
    """The image, uint8 (H, W, channels), and its mask, uint8 (H, W), both resized to `size`."""
    image = images.read_image(image_file, channels, [size])[0]
    return image, masks.read_mask(mask_file, classes, ignore_index, size)
