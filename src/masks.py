"""Masks: find the mask of an image, read it as class indices by one rule, encode run lengths."""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

import config
import images
from files import NothingFound, first_few, is_file, list_files, train_rows

LOSSY = ('JPEG', 'MPO')  # formats that blur a mask's values
RULE = 'CLASSES', 'IGNORE_INDEX', 'MASK_COLOURS'  # the constants that are arguments of read_mask


class Runs(NamedTuple):
    """Run lengths from TRAIN_CSV that replace a mask file; '' means that there is no object."""

    image: Path
    text: str


def files_of(names) -> list[tuple[Path, Path | Runs]]:
    """The image file and the mask (see masks.read_mask) of each training image.

    Raises config.UserMistake, with what to do, if one is missing.
    """
    image_files, mask_files, nothing = list_files('TRAIN_PATH')[0], {}, None
    try:
        mask_files = list_files('MASK_PATH')[0]
    except NothingFound as mistake:
        nothing = mistake
    if not set(names) <= set(mask_files):
        runs = dict.fromkeys(names, '' if config.EMPTY_IF_NO_MASK else None)
        rows = train_rows() if is_file(config.TRAIN_CSV) else []
        runs |= {name: text for name, text in rows if text is not None}
        known = [name for name, text in runs.items() if text is not None and name in image_files]
        mask_files = {name: Runs(image_files[name], runs[name]) for name in known} | mask_files
    for files, constant, remedy in (
        (image_files, 'TRAIN_PATH', 'put them back, or drop them from TRAIN_CSV and run folds.py'),
        (mask_files, 'MASK_PATH', 'without IMAGE_PREFIX and IMAGE_SUFFIX, MASK_PREFIX and MASK_SUFFIX '
         'both names must be the same: set these, or EMPTY_IF_NO_MASK=True'),
    ):  # fmt: skip
        missing = [name for name in names if name not in files]
        if missing and nothing and files is mask_files:
            raise nothing
        if missing:
            what = 'image' if constant == 'TRAIN_PATH' else 'mask'
            raise config.UserMistake(
                f'{len(missing)} images have no {what} file in {constant}: {first_few(missing)}: '
                f'{remedy}'
            )
    pairs = [(image_files[name], mask_files[name]) for name in names]
    if any(image == mask for image, mask in pairs):
        raise config.UserMistake('the images are their own masks: set MASK_PATH or MASK_SUFFIX')
    return pairs


def read_mask(file, classes=1, ignore_index=None, colours=None, size=None) -> np.ndarray:
    """Decode a mask, with its EXIF rotation applied, into class indices, by one rule:

    - The stored values are used: grey levels, 1-bit values, or palette indices. With one or two
      classes, black is background at any palette index. A GIF with a palette of greys is read as
      grey. RGB(A) must be grey. Alpha is ignored, unless only the alpha channel has the mask.
    - With `colours`, one (r, g, b) per class (background and foreground for one class), the colour
      of a pixel gives its class.
    - `ignore_index` becomes `ignored_value`. If it is set, so do colours that are not listed.
    - With one or two classes, 0 is background, and 1 or 255 (65535 in 16 bits) is foreground. In a
      JPEG, values must be near 0 or 255, and 128 and above is foreground.
    - With more classes, values are class indices from 0 to classes - 1.

    Args:
        file: a mask file, or Runs.
        size: (height, width) to resize to, by the nearest pixel; None: the mask's own size.

    Returns: uint8 (height, width).

    Raises config.UserMistake for anything else, naming the file.
    """
    return read_with_palette(file, classes, ignore_index, colours, size)[0]


def read_with_palette(file, classes, ignore_index, colours, size=None) -> tuple[np.ndarray, dict]:
    """What read_mask returns, and value -> colour if the mask has a palette."""
    if isinstance(file, Runs):
        try:
            text = '' if file.text.strip() == '-1' else file.text  # some tables' empty mask
            values = rle_decode(text, images.header(file.image).size)
        except ValueError as error:
            raise config.UserMistake(
                f'{file.image}: rle_mask in TRAIN_CSV: {error}; write "start length" '
                'pairs, with pixels counted from 1, row by row'
            ) from None
        return images.nearest(values, size), {}
    palette = {}
    with images.opened(file) as image:
        white = images.white(image)
        ImageOps.exif_transpose(image, in_place=True)
        picture = image if colours else without_alpha(file, image)
        if white > 255 and (colours or not picture.mode.startswith(('I', 'L', 'F'))):
            raise config.UserMistake(f'{file}: colours of 16 bits: save it in 8 bits per channel')
        if colours:
            values = values_of_colours(file, image, colours, ignore_index, size)
        elif image.format in LOSSY:
            values = images.nearest(lossy_values(file, image, classes), size)
        else:
            values, palette = stored_values(file, picture, white, classes, ignore_index, size)
    present = {value for value in images.values_in(values) if value != ignore_index}
    tops = (1, 255, 65535) if classes <= 2 else ()
    legal = [{0, top} for top in tops] or [set(range(classes))]
    if not any(present <= allowed for allowed in legal):
        wrong = sorted(present if classes <= 2 else present - legal[0])
        takes = '0 and 1, or 0 and 255' if classes <= 2 else f'0 to {classes - 1}'
        raise config.UserMistake(
            f'{file}: mask values {first_few(wrong, 8)}; CLASSES={classes} allows {takes}: set CLASSES '
            f'for more classes, IGNORE_INDEX (now {ignore_index}) for a value to leave out. Or make '
            'the mask again if it was resized with interpolation or saved as JPEG. Or check MASK_PATH'
        )
    mask = (values > 0 if classes <= 2 else values).astype(np.uint8)
    if ignore_index is not None:
        mask[values == ignore_index] = ignored_value(ignore_index)
    return mask, palette


def ignored_value(ignore_index: int | None) -> int | None:
    """The value of ignored pixels in an 8-bit mask: IGNORE_INDEX, or 255 if it does not fit."""
    return ignore_index if ignore_index is None or 0 <= ignore_index <= 255 else 255


def lossy_values(file, image: Image.Image, classes: int) -> np.ndarray:
    """0 and 1 (height, width) from a mask in a format that blurs values, such as JPEG."""
    channels = np.array(image.convert('RGB'))
    values = channels[..., 0]
    between = cv2.calcHist([values], [0], None, [256], [0, 256])[64:192].sum() / values.size
    one_end, coloured = 1 < values.max() < 192, np.ptp(channels, 2).max() > 96
    if classes > 2 or between > 0.02 or one_end or coloured:
        raise config.UserMistake(
            f'{file}: {image.format} blurs masks. It works only if CLASSES=1 and values are near 0 or '
            f'255, but {between:.0%} lie from 64 to 191, and the largest is {values.max()}: '
            'save masks as PNG'
        )
    return (values >= 128).view(np.uint8)


def without_alpha(file, image: Image.Image) -> Image.Image:
    """The colours of an image, or its alpha channel if that alone has the mask."""
    if image.mode not in ('LA', 'PA', 'RGBA'):
        return image
    *visible, (lowest, _) = image.convert('RGBA').getextrema()
    constant, alpha = all(low == high for low, high in visible), image.getchannel('A')
    shown, grey = np.array(alpha) > 127, np.array(image.convert('RGB').convert('L')) > 0
    if not constant and not shown.all() and not np.array_equal(shown, grey):
        raise config.UserMistake(
            f'{file}: its colours and its alpha channel are different masks: save only one'
        )
    return alpha if constant and lowest < 255 else image.convert('RGB')


def stored_values(file, image: Image.Image, white: int, classes, ignore_index, size) -> tuple:
    """The values (height, width) of a mask, and value -> colour of a palette. `white`: images.white."""
    form = image.format
    signed = form == 'TIFF' and image.tag_v2.get(339) == (2,)  # SampleFormat
    palette = np.array(image.getpalette('RGB') or [], np.uint8).reshape(-1, 3)
    if image.mode not in ('1', 'L', 'P', 'RGB', 'I', 'F'):
        image = image.convert('I' if image.mode.startswith('I;16') else 'RGB')
    values = images.nearest(np.array(image), size)  # resize first: the rest is then faster
    if image.mode == 'P':
        return palette_values(values, palette, classes, ignore_index, form)
    if image.mode == 'RGB':
        red, green, blue = cv2.split(values)
        if not (np.array_equal(red, green) and np.array_equal(red, blue)):
            found = np.unique(values.reshape(-1, 3), axis=0)
            raise config.UserMistake(
                f'{file}: a coloured mask, {first_few([tuple(c) for c in found.tolist()], 3)}: set '
                'MASK_COLOURS, or save a grey or palette PNG with one value per class'
            )
        values = red
    if image.mode == 'F':
        if not np.array_equal(values, np.floor(values)):
            fraction = values[values != np.floor(values)][0]
            raise config.UserMistake(f'{file}: mask values are fractions, such as {fraction:.3g}')
        values = values.astype(np.int64)
    if image.mode == '1':
        values = values.astype(np.uint8)
    if image.mode == 'L' and signed:
        values = values.view(np.int8)
    scaled = white < 255 or form == 'PPM'  # Pillow scaled the values: undo it, unless 0 and 255
    if scaled and (classes > 2 or not set(images.values_in(values)) <= {0, 255}):
        values = np.rint(values * (white / (65535 if image.mode == 'I' else 255))).astype(int)
    return values, {}


def palette_values(values, palette, classes: int, ignore_index, form) -> tuple[np.ndarray, dict]:
    """Class indices, uint8, and value -> colour, from palette indices (see read_mask)."""
    given, palette = len(palette), np.pad(palette, ((0, 256 - len(palette)), (0, 0)))
    used = [value for value in images.values_in(values) if value != ignore_index]
    black = [value for value in range(256) if not palette[value].any()]
    colours = {tuple(palette[value].tolist()) for value in used}
    # Colours decide if all used indices have different ones. If white is the only one, it is the
    # object, provided that the palette also has black.
    white = colours == {(255, 255, 255)} and any(value < given for value in black)
    decides = len(colours) == len(used) and max(used, default=0) < given
    decides = decides and ((0, 0, 0) in colours or white)
    if classes <= 2 and decides and len(colours - {(0, 0, 0)}) < 2:
        table = np.ones(256, np.uint8)
        table[black] = 0
        if ignore_index in range(256):
            table[ignore_index] = ignore_index
        return cv2.LUT(values, table), {0: (0, 0, 0)}
    # GIF has no grey mode: a grey image comes back with a palette of greys.
    if form == 'GIF' and (palette == palette[:, :1]).all():
        return cv2.LUT(values, palette[:, 0].copy()), {}
    return values, {value: tuple(palette[value].tolist()) for value in used}


def values_of_colours(file, image: Image.Image, colours, ignore_index, size) -> np.ndarray:
    """Class indices (height, width), int32, from colours, one per class."""
    channels = images.nearest(np.array(image.convert('RGB')), size).astype(np.int32)
    codes = channels @ [65536, 256, 1]
    values = np.full(codes.shape, -1, np.int32)
    for index, (red, green, blue) in enumerate(colours):
        values[codes == 65536 * red + 256 * green + blue] = index
    other = values == -1
    if other.any() and ignore_index is None:
        found = np.unique(channels[other], axis=0).tolist()
        raise config.UserMistake(
            f'{file}: colours that MASK_COLOURS does not list: '
            f'{first_few([tuple(c) for c in found], 3)}: add them or ignore them with IGNORE_INDEX'
        )
    values[other] = -1 if ignore_index is None else ignore_index
    return values


def rle_encode(mask: np.ndarray) -> str:
    """Kaggle's run-length encoding of a mask (height, width), nonzero = foreground.

    'start length' pairs, pixels counted from 1 along the rows; a run continues into the next row;
    '' for an empty mask.
    """
    flat = np.zeros(mask.size + 2, bool)
    flat[1:-1] = np.ravel(mask)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges[1::2] -= edges[::2]
    return ' '.join(map(str, edges.tolist()))


def rle_decode(rle: str, shape: tuple[int, int]) -> np.ndarray:
    """Decode the text of `rle_encode` to a mask, uint8 (height, width) of 0/1; NaN: empty mask.

    Raises ValueError for a text that is not the encoding of a mask of this shape.
    """
    numbers = [int(number) for number in rle.split()] if isinstance(rle, str) else []
    mask = np.zeros(shape, np.uint8)
    for start, length in zip(numbers[::2], numbers[1::2]):
        mask.ravel()[start - 1 : start - 1 + length] = 1
    if rle_encode(mask) != ' '.join(map(str, numbers)):
        raise ValueError(f'not the runs of a mask of {shape[0]} x {shape[1]} pixels')
    return mask
