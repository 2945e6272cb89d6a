"""Mask files, read into class indices by one rule; Kaggle's run-length encoding."""

import cv2
import numpy as np
from PIL import Image

import config
import images
from files import first_few


def read_mask(file, classes: int = 1, ignore_index: int | None = None, size=None) -> np.ndarray:
    """Decode a mask file into class indices, by one rule:

    - The values are those stored: grey levels, 1-bit values, or palette indices. With one class
      (or two), a palette's black and white alone are 0 and 1; a GIF's palette of greys stands for
      them. RGB(A) must be grey; alpha is left out.
    - Values equal to `ignore_index` stay as they are.
    - With one class (or two) 0 is background and 1 or 255 (65535 in 16 bits) foreground.
    - With more, values are class indices from 0 to classes - 1.

    Args:
        size: (height, width) to resize to, by the nearest pixel; None: the mask's own size.

    Returns: uint8 (height, width).

    Raises config.UserMistake for anything else, naming the file and its values.
    """
    try:
        with Image.open(file) as image:
            pixels = stored_values(image, classes, size)
    except images.DECODING_ERRORS as error:
        raise images.unreadable(file, error) from None
    if pixels is None:
        raise config.UserMistake(
            f'{file}: a coloured mask: save it as a grey or palette PNG, one value per class'
        )
    values = {value for value in values_in(pixels) if value != ignore_index}
    legal = [{0, 1}, {0, 255}] if classes <= 2 else [set(range(classes))]
    if not any(values <= allowed for allowed in legal):
        wrong = sorted(values if classes <= 2 else values - legal[0])
        takes = '0 and 1, or 0 and 255' if classes <= 2 else f'0 to {classes - 1}'
        raise config.UserMistake(
            f'{file}: mask values {first_few(wrong, 8)}; CLASSES={classes} takes {takes}, and '
            f'IGNORE_INDEX={ignore_index}: set them, or make masks anew that were resized smoothly or '
            'saved as JPEG'
        )
    if classes <= 2 and 255 in values:
        pixels[pixels == 255] = 1
    return pixels


def stored_values(image: Image.Image, classes: int, size: tuple | None) -> np.ndarray | None:
    """The uint8 values (height, width) that a mask holds, see read_mask; None if it is coloured."""
    if image.mode not in ('1', 'L', 'P', 'RGB', 'I', 'F'):
        mode = 'I' if image.mode.startswith('I;16') else 'L' if image.mode == 'LA' else 'RGB'
        image = image.convert(mode)
    stored = np.array(image)
    if size is not None:  # before palettes are looked up: that takes its time
        stored = cv2.resize(stored, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    if image.mode == 'P':
        colours = np.array(image.getpalette('RGB'), np.uint8).reshape(-1, 3)
        colours = np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
        used = colours[values_in(stored)]
        if classes <= 2 and np.isin(used.sum(1, dtype=int), (0, 3 * 255)).all():
            return cv2.LUT(stored, (colours[:, 0] > 0).astype(np.uint8))
        # GIF knows no grey images: what was saved as one comes back as a palette of greys.
        grey = image.format == 'GIF' and (colours == colours[:, :1]).all()
        return cv2.LUT(stored, colours[:, 0].copy()) if grey else stored
    if image.mode == 'RGB':
        red, green, blue = cv2.split(stored)
        return red if np.array_equal(red, green) and np.array_equal(red, blue) else None
    if image.mode in ('I', 'F'):
        stored[stored == 65535] = 255
        if image.mode == 'F' or stored.max() > 255:
            raise ValueError(f'mask values up to {stored.max()}, more than 8 bits')
    return stored.astype(np.uint8, copy=False)


def values_in(pixels: np.ndarray) -> list[int]:
    """The different values of a uint8 array."""
    return np.flatnonzero(cv2.calcHist([pixels], [0], None, [256], [0, 256])).tolist()


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
    """The mask, uint8 (height, width) of 0/1, of `rle_encode`; an empty table cell (NaN) is empty.

    Raises ValueError for a text that is not the encoding of a mask of this shape.
    """
    numbers = [int(number) for number in rle.split()] if isinstance(rle, str) else []
    mask = np.zeros(shape, np.uint8)
    for start, length in zip(numbers[::2], numbers[1::2]):
        mask.ravel()[start - 1 : start - 1 + length] = 1
    if rle_encode(mask) != ' '.join(map(str, numbers)):
        raise ValueError(f'not the runs of a mask of {shape[0]} x {shape[1]} pixels')
    return mask
