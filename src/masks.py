"""Mask files, read into class indices by one rule; Kaggle's run-length encoding."""

import cv2
import numpy as np
from PIL import Image

import config
import images


def read_mask(file, classes: int = 1, ignore_index: int | None = None, size=None) -> np.ndarray:
    """Decode a mask file into class indices, by one rule:

    - The values are those stored: grey levels, 1-bit values, or palette indices. A mask of
      one class (or two) in a palette's black and white alone is 0 and 1; a GIF's palette of greys
      stands for them. RGB(A) must be grey; alpha is left out.
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
            f'{file}: a coloured mask; save it as class indices (a grey or palette PNG), one value '
            'per class'
        )
    pixels = np.require(resize_nearest(pixels, size), requirements='W')  # PIL's own are read-only
    found = np.flatnonzero(cv2.calcHist([pixels], [0], None, [256], [0, 256]))
    values = [value for value in found.tolist() if value != ignore_index]
    if classes <= 2:
        legal, right = '0 and 1, or 0 and 255', set(values) <= {0, 1} or set(values) <= {0, 255}
    else:
        legal, right = f'0 to {classes - 1}', max(values, default=0) < classes
    if not right:
        wrong = [value for value in values if classes <= 2 or value >= classes]
        legal += '' if ignore_index is None else f', and IGNORE_INDEX={ignore_index}'
        remedy = (
            'Masks that were resized smoothly or saved as JPEG have values in between: make them '
            'again; or TRAIN_PATH and MASK_PATH are swapped, or CLASSES is too small'
        )
        if wrong == [255]:
            remedy = (
                'Masks of 0 and 255 have CLASSES=1; where 255 is not to count, IGNORE_INDEX=255'
            )
        shown = ', '.join(map(str, wrong[:8])) + ', ...' * (len(wrong) > 8)
        raise config.UserMistake(
            f'{file}: mask values {shown}; CLASSES={classes} takes {legal}. {remedy}'
        )
    if classes <= 2 and 255 in values:
        pixels[pixels == 255] = 1
    return pixels


def resize_nearest(values: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """An array (height, width) resized to `size` by the nearest pixel; as it is for None."""
    if size is None or values.shape == tuple(size):
        return values
    return cv2.resize(values, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def stored_values(image: Image.Image, classes: int, size=None) -> np.ndarray | None:
    """The uint8 values (height, width) that a mask holds, see read_mask; None if it is coloured.

    Palette indices are resized to `size` first, as looking them up in full takes its time.
    """
    if image.mode == 'P':
        indices = resize_nearest(np.asarray(image), size)
        colours = np.array(image.getpalette('RGB'), np.uint8).reshape(-1, 3)
        colours = np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
        used = np.flatnonzero(cv2.calcHist([indices], [0], None, [256], [0, 256]))
        if classes <= 2 and np.isin(colours[used].sum(1, dtype=int), (0, 3 * 255)).all():
            return cv2.LUT(indices, (colours[:, 0] > 0).astype(np.uint8))
        # GIF knows no grey images: what was saved as one comes back as a palette of greys.
        grey = image.format == 'GIF' and (colours == colours[:, :1]).all()
        return cv2.LUT(indices, colours[:, 0].copy()) if grey else indices
    if image.mode == '1':
        return np.asarray(image).astype(np.uint8)
    if image.mode in ('I', 'I;16', 'I;16B', 'I;16L'):
        wide = np.asarray(image).astype(np.int64)
        wide[wide == 65535] = 255
        return np.clip(wide, 0, 254).astype(np.uint8) if wide.max() > 255 else wide.astype(np.uint8)
    if image.mode in ('L', 'LA'):
        return np.array(image.getchannel(0))
    if image.mode == 'F':
        raise ValueError('floating-point values')
    red, green, blue = (np.asarray(band) for band in image.convert('RGB').split())
    return np.array(red) if np.array_equal(red, green) and np.array_equal(red, blue) else None


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
    numbers = np.array([] if rle != rle or rle is None else rle.split(), dtype=np.int64)
    starts, lengths = numbers[::2] - 1, numbers[1::2]
    height, width = shape
    if len(starts) != len(lengths):
        raise ValueError('an odd count of numbers: not start length pairs')
    ends = starts + lengths
    if (
        (lengths <= 0).any()
        or (starts[1:] < ends[:-1]).any()
        or (len(starts) and (starts[0] < 0 or ends[-1] > height * width))
    ):
        raise ValueError(f'runs that overlap or leave a mask of {height} x {width} pixels')
    flat = np.zeros(height * width + 1, np.int8)
    flat[starts] += 1
    flat[ends] -= 1
    return np.cumsum(flat[:-1], dtype=np.int8).astype(np.uint8).reshape(shape)
