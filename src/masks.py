"""Masks: mask files and run lengths, read as class indices by one rule."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

import config
import files
import images
from files import first_few

CONSTANTS = 'CLASSES', 'IGNORE_INDEX', 'MASK_COLOURS'  # in config.py: arguments of read_mask
LOSSY = ('JPEG', 'MPO')  # formats that blur a mask's values
MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'I', 'I;16', 'I;16B', 'I;16L')  # of Pillow
PHOTOMETRIC, SAMPLE_FORMAT = 262, 339  # TIFF tags
MAKE_PLAIN = 'save it as a plain PNG: README.md, "Make any mask plain", has the lines'


def settings() -> tuple:
    """The constants that decide how masks are read: arguments of read_mask."""
    return tuple(getattr(config, name) for name in CONSTANTS)


def ignored_value(ignore_index: int | None) -> int | None:
    """The value of ignored pixels in an 8-bit mask: IGNORE_INDEX, or 255 if it does not fit."""
    return ignore_index if ignore_index is None or 0 <= ignore_index <= 255 else 255


def read_mask(
    file: Path | files.Runs, classes=1, ignore_index=None, colours=None, size=None
) -> np.ndarray:
    """Decode a mask, with its EXIF rotation applied, into class indices.

    With one or two classes, 0 is background, and 1 or 255 (65535 in 16 bits) is the object. With more
    classes, grey values or palette indices are class indices from 0 to classes - 1.

    Args:
        ignore_index: becomes `ignored_value`, and so do colours that are not in `colours`.
        colours: (r, g, b) of each class, or of background and object; read in place of the values.
        size: (height, width) to resize to, by the nearest pixel; None: the mask's own size.

    Returns: uint8 (height, width).

    Raises config.UserMistake, naming the file, for anything else: see README.md.
    """
    if isinstance(file, files.Runs):
        return nearest(decode_runs(file, classes), size)
    with images.opened(file) as image:
        check_plain(file, image)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ('LA', 'PA', 'RGBA') and image.getchannel('A').getextrema()[0] < 255:
            raise config.UserMistake(f'{file}: a mask with transparent pixels: {MAKE_PLAIN}')
        if image.format in LOSSY:
            values = nearest(lossy_values(file, image, classes, colours), size)
        elif colours:
            values = values_of_colours(file, image, colours, ignore_index, size)
        else:
            values = stored_values(file, image, classes, size)
    present = [value for value in values_in(values) if value != ignore_index]
    if classes <= 2:
        wrong = [] if any(set(present) <= {0, top} for top in (1, 255, 65535)) else present
        allowed = '0 and 1, or 0 and 255'
    else:
        wrong = [value for value in present if value not in range(classes)]
        allowed = f'0 to {classes - 1}'
    if wrong:
        raise config.UserMistake(
            f'{file}: mask values {first_few(wrong, 8)}; CLASSES={classes} allows {allowed}. If they '
            'are classes, set CLASSES; if they number objects, merge the objects (mask > 0); if they '
            'are colours or grey levels, set MASK_COLOURS, such as [(0, 0, 0), (206, 206, 206)]; to '
            f'leave one out, set IGNORE_INDEX (now {ignore_index}); if the mask was resized with '
            'interpolation or saved as JPEG, make it again'
        )
    mask = (values > 0 if classes <= 2 else values).astype(np.uint8)
    if ignore_index is not None:
        mask[values == ignore_index] = ignored_value(ignore_index)
    return mask


def check(file: Path) -> images.Header:
    """The Header of a mask file, see images.check. Its values are not read."""
    return images.check(file, check_plain)


def check_plain(file, image: Image.Image) -> None:
    """Raise config.UserMistake for kinds of pixels that programs disagree about."""
    tags = image.tag_v2 if image.format == 'TIFF' else {}
    depth = images.bits(image)
    if image.format == 'PPM':
        kind = 'a PPM, PGM or PBM file'
    elif image.mode == 'F':
        kind = 'floating values'
    elif image.mode in ('LA', 'RGB', 'RGBA') and depth > 8:
        kind = f'colours or alpha of {depth} bits'
    elif image.mode == 'L' and depth < 8:
        kind = f'grey of {depth} bits'
    elif image.mode == 'L' and tags.get(SAMPLE_FORMAT) == (2,):
        kind = 'signed bytes'
    elif tags.get(PHOTOMETRIC) == 0:
        kind = 'a TIFF in which 0 is white'
    elif image.mode not in MODES and image.format not in LOSSY:
        kind = f'pixels of the kind {image.mode}'
    else:
        return
    raise config.UserMistake(f'{file}: a mask of {kind}: {MAKE_PLAIN}')


def palette(image: Image.Image) -> list[tuple]:
    """The colours (r, g, b) of the palette of an opened image; [] for grey."""
    if image.mode != 'P' or image.palette is None:
        return []
    # An image of one pixel decodes the palette without the pixels of the file.
    pixel = Image.new('P', (1, 1))
    pixel.putpalette(image.palette)
    numbers = pixel.getpalette('RGB')
    colours = list(zip(numbers[::3], numbers[1::3], numbers[2::3]))
    # GIF has no grey mode: a grey image has a palette of greys.
    grey = image.format == 'GIF' and all(red == green == blue for red, green, blue in colours)
    return [] if grey else colours


# ------------------------------------------------------------ kinds of masks
def stored_values(file, image: Image.Image, classes: int, size) -> np.ndarray:
    """The values (height, width) of a mask that is not read by its colours."""
    colours = palette(image)
    if classes <= 2 and colours and colours[0] != (0, 0, 0):
        raise config.UserMistake(
            f'{file}: index 0 of its palette is {colours[0]}, not black: set '
            f'MASK_COLOURS=[background, object], two of {first_few(colours, 3)}'
        )
    if image.mode.startswith('I;16'):
        image = image.convert('I')
    elif image.mode in ('LA', 'PA', 'RGBA'):
        image = image.convert('RGB')
    values = nearest(np.array(image), size)  # resize first: the rest is then faster
    if image.mode == '1':
        return values.astype(np.uint8)
    if image.mode == 'P' and not colours:
        greys = np.zeros(256, np.uint8)
        levels = image.getpalette()[::3]
        greys[: len(levels)] = levels
        return cv2.LUT(values, greys)
    if values.ndim == 2:
        return values
    red, green, blue = cv2.split(values)
    if np.array_equal(red, green) and np.array_equal(red, blue):
        return red
    found = np.unique(values.reshape(-1, 3), axis=0).tolist()
    raise config.UserMistake(
        f'{file}: a coloured mask, {first_few([tuple(c) for c in found], 3)}: set MASK_COLOURS, or '
        'save a grey or palette PNG with one value per class'
    )


def values_of_colours(file, image: Image.Image, colours, ignore_index, size) -> np.ndarray:
    """Class indices (height, width), int32, from colours, one per class."""
    if image.mode.startswith('I'):
        raise config.UserMistake(f'{file}: MASK_COLOURS cannot read 16 or 32 bits: {MAKE_PLAIN}')
    image.info.pop('transparency', None)  # of palettes; Pillow warns of it
    pixels = nearest(np.array(image.convert('RGB')), size).astype(np.int32)
    codes = pixels @ [65536, 256, 1]
    values = np.full(codes.shape, -1, np.int32)
    for index, colour in enumerate(colours):
        values[codes == colour @ np.array([65536, 256, 1])] = index
    unlisted = values == -1
    if ignore_index is not None:
        values[unlisted] = ignore_index
    elif unlisted.any():
        found = [tuple(colour) for colour in np.unique(pixels[unlisted], axis=0).tolist()]
        raise config.UserMistake(
            f'{file}: colours that MASK_COLOURS does not list: {first_few(found, 3)}: add them, or '
            'ignore them with IGNORE_INDEX'
        )
    return values


def lossy_values(file, image: Image.Image, classes: int, colours) -> np.ndarray:
    """0 and 1 (height, width) from a mask in a format that blurs values: JPEG."""
    channels = np.array(image.convert('RGB'))
    values = channels[..., 0]
    between = cv2.calcHist([values], [0], None, [256], [0, 256])[64:192].sum() / values.size
    one_end, coloured = 1 < values.max() < 192, np.ptp(channels, 2).max() > 96
    if classes > 2 or colours or between > 0.02 or one_end or coloured:
        raise config.UserMistake(
            f'{file}: JPEG blurs values and colours. A JPEG mask works only if CLASSES=1, MASK_COLOURS '
            f'is None, and grey values are near 0 or 255; here {between:.0%} lie from 64 to 191, and '
            f'the largest is {values.max()}: make the masks again as PNG'
        )
    return (values >= 128).view(np.uint8)


def nearest(values: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Resize to (height, width) with nearest-neighbour interpolation; None keeps the size."""
    if size is None:
        return values
    if values.dtype == bool:  # 1 bit
        values = values.view(np.uint8)
    return cv2.resize(values, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def values_in(pixels: np.ndarray) -> list[int]:
    """The different values of an array of whole numbers."""
    if pixels.dtype == np.uint8:
        return np.flatnonzero(cv2.calcHist([pixels], [0], None, [256], [0, 256])).tolist()
    return np.unique(pixels).tolist()


# ------------------------------------------------------------ run lengths
def decode_runs(runs: files.Runs, classes: int) -> np.ndarray:
    """The mask, uint8 (height, width) of 0 and 1, of run lengths from TRAIN_CSV."""
    text = '' if runs.text.strip() == '-1' else runs.text  # some tables' empty mask
    if text and classes > 2:
        raise config.UserMistake(
            f'{runs.image}: rle_mask in TRAIN_CSV has one class, but CLASSES={classes}: make mask files'
        )
    try:
        return rle_decode(text, images.size_of(runs.image), runs.order)
    except ValueError as error:
        raise config.UserMistake(
            f'{runs.image}: rle_mask in TRAIN_CSV: {error}; write "start length" pairs, with pixels '
            f"counted from 1, along the {runs.order} (RLE_ORDER='{runs.order}')"
        ) from None


def rle_encode(mask: np.ndarray, order: str = 'rows') -> str:
    """Kaggle's run-length encoding of a mask (height, width), nonzero = foreground.

    'start length' pairs; '' for an empty mask. Pixels are counted from 1.

    Args:
        order: 'rows' counts along the rows, and a run continues into the next row; 'columns' counts
            down the columns.
    """
    flat = np.zeros(mask.size + 2, bool)
    flat[1:-1] = np.ravel(mask if order == 'rows' else mask.T)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges[1::2] -= edges[::2]
    return ' '.join(map(str, edges.tolist()))


def rle_decode(rle: str, shape: tuple[int, int], order: str = 'rows') -> np.ndarray:
    """Decode the text of `rle_encode` to a mask, uint8 (height, width) of 0/1; NaN: empty mask.

    Raises ValueError for a text that is not the encoding of a mask of this shape.
    """
    numbers = [int(number) for number in rle.split()] if isinstance(rle, str) else []
    flat = np.zeros(shape[0] * shape[1], np.uint8)
    for start, length in zip(numbers[::2], numbers[1::2]):
        flat[start - 1 : start - 1 + length] = 1
    if rle_encode(flat) != ' '.join(map(str, numbers)):
        raise ValueError(f'not the runs of a mask of {shape[0]} x {shape[1]} pixels')
    return flat.reshape(shape) if order == 'rows' else flat.reshape(shape[::-1]).T.copy()
