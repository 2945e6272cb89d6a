"""Image files: what their headers tell, and their pixels."""

import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

import config

# One thread per worker. Set it at import: changing it in a forked worker deadlocks OpenCV.
cv2.setNumThreads(1)
Image.MAX_IMAGE_PIXELS = None  # allow large scans

# Pillow's modes of 8 bits per channel, or fewer.
PLAIN_MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr')
LAST_BYTES = {'JPEG': b'\xff\xd9', 'GIF': b';'}  # of a complete file
DECODING_ERRORS = (OSError, SyntaxError, ValueError, cv2.error)
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height
SUBFILE_TYPE = 254  # TIFF tag: 1 = overview, 4 = transparency mask


# ------------------------------------------------------------ headers
class Header(NamedTuple):
    """What is known of an image without its pixels."""

    size: tuple[int, int]  # (height, width) as viewers show it
    orientation: int  # EXIF's, 1 if none
    format: str  # Pillow's name


def unreadable(file, error) -> config.UserMistake:
    """The mistake to raise for a file that cannot be decoded."""
    if isinstance(error, FileNotFoundError):
        if os.path.islink(file):
            what = f'a broken link to {os.readlink(file)}: put that file back, or remove the link'
        else:
            what = 'no such file'
        return config.UserMistake(f'{file}: {what}')
    if isinstance(error, OSError) and error.errno is not None:
        return config.UserMistake(f'{file}: cannot be read: {error.strerror}')
    with open(file, 'rb') as raw:
        start = raw.read(200)
    if not start:
        reason = 'it is empty'
    elif start.startswith(b'version https://git-lfs'):
        reason = 'it is a Git LFS pointer: run git lfs pull'
    elif not isinstance(error, UnidentifiedImageError):
        reason = config.shorten(error)
    elif start.isascii() and b'\0' not in start:
        reason = 'it is a text file'
    elif start[:3] in (b'II*', b'MM\0', b'II+'):
        reason = (
            'a TIFF that Pillow does not read, of 64 bits, many bands or the like: save it as PNG'
        )
    else:
        reason = 'of a format that Pillow does not know: save it as PNG'
    return config.UserMistake(f'{file}: not a readable image ({reason}): replace or remove it')


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
    except DECODING_ERRORS as error:
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
        what = f'a TIFF of {len(pages)} pages'
        raise config.UserMistake(f'{file}: {what}: save each page as its own file')


def bits(image: Image.Image) -> int:
    """Bits per channel in the file of an opened grey or coloured image.

    Pillow drops the lower byte of 16-bit colours, and scales grey of 2 and 4 bits to 0..255.
    """
    codec, _, _, arguments = image.tile[0] if image.tile else ('', None, 0, '')
    raw_mode, *rest = arguments if isinstance(arguments, tuple) else (arguments,)
    if codec == 'ppm':
        return 16 if rest[0] > 255 else 8  # the largest value
    named = re.search(r';(\d+)', str(raw_mode)) if image.format in ('PNG', 'TIFF') else None
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


def check_pixels(file, image: Image.Image) -> None:
    """Raise config.UserMistake for pixels other than RGB or grey with 8 bits per channel."""
    if image.mode not in PLAIN_MODES or bits(image) > 8:
        kind = (
            'pixels of the kind'
            if image.mode in ('LAB', 'HSV')
            else 'more than 8 bits per channel,'
        )
        raise config.UserMistake(
            f'{file}: {kind} {image.mode}: convert it to 8-bit RGB or grey, scaled to the range of '
            'values that matters'
        )


def check(file, check_kind=check_pixels) -> Header:
    """The Header of an image file that is neither truncated, damaged nor animated.

    Args:
        check_kind: called with the file and the opened image; raises if they cannot be used.
    """
    with opened(file) as image:
        check_kind(file, image)
        if image.format not in ('MPO', 'TIFF') and getattr(image, 'is_animated', False):
            raise config.UserMistake(f'{file}: it is animated: save one frame of it')
        header = Header(shown_size(image), orientation(image), image.format)
        with Path(file).open('rb') as raw:
            if image.format == 'PNG':
                with Image.open(raw) as unread:
                    unread.verify()  # checksums: decoding does not notice zeros in place of data
                return header
            last = LAST_BYTES.get(image.format, b'')
            raw.seek(-len(last), os.SEEK_END)
            if not last or raw.read() != last:  # truncated, or something follows the image
                image.load()
        return header


def print_large(sizes: list[tuple], crop_size: tuple[int, int], scale: float | None) -> None:
    """Print one line if images (height, width) are much larger than the model's input."""
    height, width = crop_size
    large = sum(size[0] > 4 * height or size[1] > 4 * width for size in sizes)
    if large and scale is None:
        print(
            f'{large} images are more than four times as high or wide as CROP_SIZE={config.CROP_SIZE}: '
            'small objects may vanish when resized; training with SCALE=1.0 avoids this'
        )


# ------------------------------------------------------------ pixels
def read_image(file, channels: int = 3, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image file as viewers show it: EXIF rotation applied, alpha left out.

    Args:
        channels: 3 for RGB, 1 for grey.
        size: (height, width) to resize to; None keeps the image's own size.

    Returns: uint8 (height, width, channels), 0..255.

    Raises config.UserMistake if the file is missing, truncated, no image, or has 16 bits.
    """
    with opened(file) as image:
        check_pixels(file, image)
        return decode(image, channels, size)


def decode(image: Image.Image, channels: int, size: tuple[int, int] | None) -> np.ndarray:
    """The pixels of an opened image, see read_image."""
    pixels = None
    if image.format == 'JPEG' and image.mode in ('RGB', 'L') and orientation(image) == 1:
        image.fp.seek(0)
        data = image.fp.read()
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
