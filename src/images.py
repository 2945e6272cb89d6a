"""Image and mask files: what their headers tell, their pixels, and run lengths."""

import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

import config
import files

# One thread per worker. Set it at import: changing it in a forked worker deadlocks OpenCV.
cv2.setNumThreads(1)
Image.MAX_IMAGE_PIXELS = None  # allow large scans

# Pillow's modes of 8 bits per channel, or fewer.
IMAGE_MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr')
MASK_MODES = ('1', 'P', 'I', 'I;16', 'I;16B', 'I;16L')  # of any number of bits
MASK_MODES_8_BITS = ('L', 'LA', 'RGB', 'RGBA')
LAST_BYTES = {'JPEG': b'\xff\xd9', 'GIF': b';'}  # of a complete file
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height
# TIFF tags. Subfile type: 1 = overview, 4 = transparency mask. Sample format: 2 = signed.
SUBFILE_TYPE, PHOTOMETRIC, SAMPLE_FORMAT = 254, 262, 339
MASK_CONSTANTS = 'CLASSES', 'IGNORE_INDEX', 'MASK_COLOURS'  # in config.py: arguments of read_mask
MAKE_PLAIN = 'save it as a plain PNG: README.md, "Make any mask plain"'


# ------------------------------------------------------------ headers
class Header(NamedTuple):
    """What is known of an image without its pixels."""

    size: tuple[int, int]  # (height, width) as viewers show it
    orientation: int  # EXIF's, 1 if none
    format: str  # Pillow's name
    palette: list[tuple]  # see `palette`


def unreadable(file, error) -> config.UserMistake:
    """The mistake to raise for a file that cannot be decoded."""
    if os.path.islink(file) and not os.path.exists(file):
        return config.UserMistake(f'{file}: a broken link to {os.readlink(file)}: remove it')
    if isinstance(error, OSError) and error.errno is not None:
        return config.UserMistake(f'{file}: {error.strerror}')
    with open(file, 'rb') as raw:
        start = raw.read(200)
    reason = config.shorten(error)
    if not start:
        reason = 'it is empty'
    elif start.startswith(b'version https://git-lfs'):
        reason = 'it is a Git LFS pointer: run git lfs pull'
    elif isinstance(error, UnidentifiedImageError):
        reason = 'Pillow does not read files of this kind: save it as PNG'
        if start.isascii() and b'\0' not in start:
            reason = 'it is a text file'
    return config.UserMistake(f'{file}: not a readable image ({reason})')


@contextmanager
def opened(file):
    """Yield a Pillow image of one page; errors inside name the file."""
    try:
        # Open a file object: given a name, Pillow 13 garbles uncompressed TIFFs that EXIF turns.
        with Path(file).open('rb') as raw, Image.open(raw) as image:
            if image.format == 'TIFF' and image.n_frames > 1:
                check_pages(file, image)
            yield image
    except config.UserMistake:
        raise
    except (OSError, SyntaxError, ValueError, cv2.error) as error:
        raise unreadable(file, error) from None


def check_pages(file, image: Image.Image) -> None:
    """Raise config.UserMistake if a TIFF has several pages. Overviews of the first are no pages."""
    pages = []
    for number in range(image.n_frames):
        image.seek(number)
        if not image.tag_v2.get(SUBFILE_TYPE, 0) & (1 | 4):
            pages.append(number)
    image.seek(0)
    if pages != [0]:
        problem = f'a TIFF of {len(pages)} pages'
        raise config.UserMistake(f'{file}: {problem}: save each as a file, or colours as RGB')


def bits(image: Image.Image) -> int:
    """Bits per channel in the file of an opened grey or coloured image.

    Pillow drops the lower byte of 16-bit colours, and scales grey of 2 and 4 bits to 0..255.
    """
    if image.format == 'PPM' and image.tile[0].codec_name == 'ppm':
        return 16 if image.tile[0].args[1] > 255 else 8  # the largest value
    named = re.search(r';(\d+)', str(image.tile)) if image.format in ('PNG', 'TIFF') else None
    return int(named[1]) if named else 8


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, or XMP's, from 1 to 8; 1 if there is none."""
    value = image.getexif().get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def shown_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an opened image as viewers show it: with the EXIF rotation."""
    # Pillow opens a TIFF with its sides already swapped.
    swapped = orientation(image) >= 5 and image.format != 'TIFF'
    return image.size if swapped else image.size[::-1]


def size_of(file) -> tuple[int, int]:
    """(height, width) of an image file as viewers show it."""
    with opened(file) as image:
        return shown_size(image)


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


def check_image_kind(file, image: Image.Image) -> None:
    """Raise config.UserMistake for pixels other than colours or grey with 8 bits per channel."""
    depth = bits(image)
    if image.mode not in IMAGE_MODES or depth > 8:
        kind = f'{image.mode} of {depth} bits per channel'
        raise config.UserMistake(f'{file}: {kind}: convert it to 8-bit RGB or grey')


def check_mask_kind(file, image: Image.Image) -> None:
    """Raise config.UserMistake for kinds of pixels that programs disagree about."""
    if image.format == 'JPEG':
        return  # lossy_values looks at the pixels
    tags = image.tag_v2 if image.format == 'TIFF' else {}
    depth, kind = bits(image), ''
    plain = image.mode in MASK_MODES or (image.mode in MASK_MODES_8_BITS and depth == 8)
    if image.format == 'PPM':
        kind = 'a PPM, PGM or PBM file'
    elif not plain:
        kind = f'{image.format} {image.mode} of {depth} bits'
    elif image.mode == 'L' and tags.get(SAMPLE_FORMAT) == (2,):
        kind = 'signed bytes'
    elif tags.get(PHOTOMETRIC) == 0:
        kind = 'a TIFF in which 0 is white'
    if kind:
        raise config.UserMistake(f'{file}: a mask that is not plain, {kind}: {MAKE_PLAIN}')


def check(file, check_kind=check_image_kind) -> Header:
    """The Header of a file. Refuse it if it is truncated, damaged, animated, or by `check_kind`."""
    with opened(file) as image:
        check_kind(file, image)
        if image.format not in ('MPO', 'TIFF') and getattr(image, 'is_animated', False):
            raise config.UserMistake(f'{file}: it is animated: save one frame of it')
        header = Header(shown_size(image), orientation(image), image.format, palette(image))
        with Path(file).open('rb') as raw:
            raw.seek(-2, os.SEEK_END)
            complete = raw.read().endswith(LAST_BYTES.get(image.format, ()))
        if image.format == 'PNG':
            with Image.open(file) as unread:
                unread.verify()  # checksums: decoding does not notice zeros in place of data
        elif not complete:  # truncated, or of a format without a fixed end
            image.load()
        return header


def print_large(sizes: list[tuple], crop_size: tuple[int, int], scale: float | None) -> None:
    """Print one line if images (height, width) are much larger than the model's input."""
    height, width = crop_size
    large = sum(size[0] > 4 * height or size[1] > 4 * width for size in sizes)
    if large and scale is None:
        size = f'more than four times as high or wide as CROP_SIZE={config.CROP_SIZE}'
        print(f'{large} images are {size}: training with SCALE=1.0 keeps small objects')


# ------------------------------------------------------------ images
def read_image(file, channels: int = 3, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image file as viewers show it: EXIF rotation applied, alpha left out.

    Args:
        channels: 3 for RGB, 1 for grey.
        size: (height, width) to resize to; None keeps the image's own size.

    Returns: uint8 (height, width, channels), 0..255.

    Raises config.UserMistake if the file is missing, truncated, no image, or has 16 bits.
    """
    pixels = None
    with opened(file) as image:
        check_image_kind(file, image)
        if image.format == 'JPEG' and image.mode in ('RGB', 'L') and orientation(image) == 1:
            data = Path(file).read_bytes()
            # OpenCV decodes JPEGs fastest, but fills the missing part of a truncated one with grey.
            if data.endswith(LAST_BYTES['JPEG']):
                pixels = decode_jpeg(data, channels, image.size[::-1], size)
        if pixels is None:
            ImageOps.exif_transpose(image, in_place=True)
            image.info.pop('transparency', None)  # of palettes; Pillow warns of it
            pixels = np.array(image.convert('RGB' if channels == 3 else 'L'))
    if size is not None:
        pixels = resize(pixels, size)
    return pixels.reshape(*pixels.shape[:2], channels)  # OpenCV drops a single channel


def decode_jpeg(data: bytes, channels: int, own_size: tuple, size: tuple | None) -> np.ndarray:
    """Decode a JPEG with OpenCV, at 1/8, 1/4 or 1/2 of its size if that is at least `size`."""
    divisor, kind = 1, 'COLOR' if channels == 3 else 'GRAYSCALE'
    for n in (2, 4, 8) if size else ():
        # If n does not divide the sides, the image would be shifted against its mask.
        if all(own % n == 0 and own // n >= side for own, side in zip(own_size, size)):
            divisor = n
    flag = f'IMREAD_REDUCED_{kind}_{divisor}' if divisor > 1 else f'IMREAD_{kind}'
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), getattr(cv2, flag))
    if pixels is None:
        raise ValueError('its JPEG data are damaged')
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if channels == 3 else pixels


def scaled(size: tuple[int, int], crop_size: tuple, scale: float | None) -> tuple[int, int]:
    """(height, width) that an image is resized to: CROP_SIZE, or its own size times SCALE."""
    return crop_size if scale is None else tuple(max(1, round(side * scale)) for side in size)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to (height, width): average areas if a side is more than halved, else bilinear.

    Down to half the size, bilinear interpolation still uses every pixel and is three times as fast.
    """
    if any(side > 2 * length for side, length in zip(pixels.shape, size)):
        smaller = np.minimum(pixels.shape[:2], size).tolist()
        pixels = cv2.resize(pixels, smaller[::-1], interpolation=cv2.INTER_AREA)
    return pixels if pixels.shape[:2] == tuple(size) else cv2.resize(pixels, size[::-1])


# ------------------------------------------------------------ masks
def mask_settings() -> tuple:
    """The constants that decide how masks are read: arguments of read_mask."""
    return tuple(getattr(config, name) for name in MASK_CONSTANTS)


def ignored_value(ignore_index: int | None) -> int | None:
    """The value of ignored pixels in an 8-bit mask: IGNORE_INDEX, or 255 if it does not fit."""
    return ignore_index if ignore_index is None or 0 <= ignore_index <= 255 else 255


def read_mask(
    file: Path | files.Runs, classes=1, ignore_index=None, colours=None, size=None
) -> np.ndarray:
    """Decode a mask, with its EXIF rotation applied, into class indices, uint8 (height, width).

    With one or two classes, 0 is background, and 1 or 255 (65535 in 16 bits) is the object. With more
    classes, grey values or palette indices are class indices from 0 to classes - 1. Anything else
    raises config.UserMistake: see README.md.

    Args:
        ignore_index: becomes `ignored_value`, and so do colours that are not in `colours`.
        colours: (r, g, b) of each class, or of background and object; read in place of the values.
        size: (height, width) to resize to, by the nearest pixel; None: the mask's own size.
    """
    if isinstance(file, files.Runs):
        return resize_mask(decode_runs(file, classes), size)
    with opened(file) as image:
        check_mask_kind(file, image)
        ImageOps.exif_transpose(image, in_place=True)
        image_format, palette_colours, greys = image.format, palette(image), None
        if image.mode in ('LA', 'RGBA') and image.getchannel('A').getextrema()[0] < 255:
            raise config.UserMistake(f'{file}: a mask with transparent pixels: {MAKE_PLAIN}')
        if colours and image.mode.startswith('I'):
            raise config.UserMistake(f'{file}: MASK_COLOURS with 16 or 32 bits: {MAKE_PLAIN}')
        image.info.pop('transparency', None)  # of palettes; Pillow warns of it
        if colours or image_format == 'JPEG' or image.mode in ('LA', 'RGBA'):
            image = image.convert('RGB')
        elif image.mode == 'P' and not palette_colours:  # a grey GIF
            greys = np.zeros(256, np.uint8)
            entries = image.getpalette()[::3]
            greys[: len(entries)] = entries
        elif image.mode.startswith('I;16'):
            image = image.convert('I')
        pixels = np.array(image)
        if image_format == 'JPEG':  # at its own size: resized, it may lose the brightest pixels
            pixels = lossy_values(file, pixels, classes, colours)
        pixels = resize_mask(pixels, size)  # before the rest, which is then faster
        if greys is not None:
            pixels = cv2.LUT(pixels, greys)
    if colours:
        values = values_of_colours(file, pixels, colours, ignore_index)
    else:
        values = stored_values(file, pixels, palette_colours, classes)
    present = [value for value in values_in(values) if value != ignore_index]
    if classes <= 2:
        wrong = [] if any(set(present) <= {0, top} for top in (1, 255, 65535)) else present
        allowed = '0 and 1, or 0 and 255'
    else:
        wrong = [value for value in present if value not in range(classes)]
        allowed = f'0 to {classes - 1}'
    if wrong:
        raise config.UserMistake(
            f'{file}: mask values {files.first_few(wrong, 8)}; CLASSES={classes} allows {allowed}: set '
            'CLASSES or IGNORE_INDEX; if they number objects, merge the objects (mask > 0); if they '
            'are grey levels, set MASK_COLOURS, such as [(0, 0, 0), (206, 206, 206)]'
        )
    mask = (values > 0 if classes <= 2 else values).astype(np.uint8)
    if ignore_index is not None:
        mask[values == ignore_index] = ignored_value(ignore_index)
    return mask


def stored_values(file, pixels: np.ndarray, palette_colours: list, classes: int) -> np.ndarray:
    """The values (height, width) of a mask that is not read by its colours."""
    if classes <= 2 and palette_colours and palette_colours[0] != (0, 0, 0):
        problem = f'index 0 of its palette is {palette_colours[0]}, not black'
        raise config.UserMistake(f'{file}: {problem}: set MASK_COLOURS=[background, object]')
    if pixels.ndim == 2:
        return pixels
    red, green, blue = cv2.split(pixels)
    if not np.array_equal(red, green) or not np.array_equal(red, blue):
        shown = different_colours(pixels)
        raise config.UserMistake(f'{file}: a coloured mask, {shown}: set MASK_COLOURS')
    return red


def values_of_colours(file, pixels: np.ndarray, colours, ignore_index) -> np.ndarray:
    """Class indices (height, width), int32, from pixels (height, width, 3) of listed colours."""
    weights = np.array([65536, 256, 1])  # one whole number per colour
    codes = pixels @ weights
    values = np.full(codes.shape, -1, np.int32)
    for index, colour in enumerate(colours):
        values[codes == colour @ weights] = index
    unlisted = values == -1
    if ignore_index is not None:
        values[unlisted] = ignore_index
    elif unlisted.any():
        problem = f'MASK_COLOURS does not list {different_colours(pixels[unlisted])}'
        raise config.UserMistake(f'{file}: {problem}: add them, or ignore them with IGNORE_INDEX')
    return values


def different_colours(pixels: np.ndarray) -> str:
    """The first colours in an array (..., 3), for a message."""
    colours = np.unique(pixels.reshape(-1, 3), axis=0).tolist()
    return files.first_few([tuple(colour) for colour in colours], 3)


def lossy_values(file, pixels: np.ndarray, classes: int, colours) -> np.ndarray:
    """0 and 1 (height, width) from pixels (height, width, 3) of a JPEG, which blurs values."""
    values, coloured = pixels[..., 0], np.ptp(pixels, 2).max() > 96
    between, largest = ((values >= 64) & (values < 192)).mean(), values.max()
    if classes > 2 or colours or coloured or between > 0.02 or 1 < largest < 192:
        problem = f'JPEG blurs values ({between:.0%} lie from 64 to 191, the largest is {largest})'
        needs = 'a JPEG mask needs CLASSES=1, MASK_COLOURS=None, and black and white'
        raise config.UserMistake(f'{file}: {problem}: {needs}: save it as PNG')
    return (values >= 128).view(np.uint8)


def resize_mask(values: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Resize to (height, width) with nearest-neighbour interpolation; None keeps the size."""
    if values.dtype == bool:  # grey of 1 bit
        values = values.view(np.uint8)
    if size is None:
        return values
    return cv2.resize(values, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def values_in(pixels: np.ndarray) -> list[int]:
    """The different values of an array of whole numbers."""
    flat = pixels.ravel()
    # Each value starts a run of equal pixels. Masks have few runs, so sorting their starts is fast.
    starts = np.append(True, flat[1:] != flat[:-1])
    return np.unique(flat[starts]).tolist()


# ------------------------------------------------------------ run lengths
def decode_runs(runs: files.Runs, classes: int) -> np.ndarray:
    """The mask, uint8 (height, width) of 0 and 1, of run lengths from TRAIN_CSV."""
    text = '' if runs.text.strip() == '-1' else runs.text  # some tables' empty mask
    if text and classes > 2:
        raise config.UserMistake(f'rle_mask has one class, but CLASSES={classes}: make mask files')
    size = size_of(runs.image)
    try:
        return rle_decode(text, size, runs.order)
    except ValueError as error:
        raise config.UserMistake(f'{runs.image}: rle_mask in TRAIN_CSV: {error}') from None


def rle_encode(mask: np.ndarray, order: str = 'rows') -> str:
    """Kaggle's run-length encoding of a mask (height, width), nonzero = foreground.

    'start length' pairs; '' for an empty mask. Pixels are counted from 1, along the rows ('rows', a
    run continues into the next row) or down the columns ('columns').
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
        raise ValueError(f'not the runs of a mask of {shape} pixels along the {order}')
    return flat.reshape(shape) if order == 'rows' else flat.reshape(shape[::-1]).T.copy()
