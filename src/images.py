"""Image files: headers and pixels."""

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
Image.MAX_IMAGE_PIXELS = None  # allow large scans; `opened` checks the memory instead

# Pillow's modes of 8 bits per channel, or fewer.
PLAIN_MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr')
# Last bytes of a complete file. A file with another end is decoded to check it.
LAST_BYTES = {'JPEG': b'\xff\xd9', 'PNG': b'IEND\xaeB`\x82', 'GIF': b';'}
DECODING_ERRORS = (OSError, SyntaxError, ValueError, cv2.error)
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height


# ------------------------------------------------------------ headers
class Header(NamedTuple):
    """What is known of an image without its pixels.

    size: (height, width) as viewers show it. turned: EXIF's orientation, 1 if none.
    """

    size: tuple[int, int]
    turned: int
    format: str


def unreadable(file, error) -> config.UserMistake:
    """The mistake to raise for a file that cannot be decoded."""
    if isinstance(error, FileNotFoundError):
        return config.UserMistake(f'{file}: no such file')
    if Path(file).stat().st_size == 0:
        reason = 'it is empty'
    elif isinstance(error, UnidentifiedImageError):
        reason = 'its format is unknown'
    else:
        reason = config.shorten(error)
    return config.UserMistake(f'{file}: not a readable image ({reason}): replace or remove it')


@contextmanager
def opened(file):
    """Yield a Pillow image of one page that fits into memory; errors inside name the file."""
    try:
        # Open a file object: given a name, Pillow 13 garbles uncompressed TIFFs that EXIF turns.
        with Path(file).open('rb') as raw, Image.open(raw) as image:
            need = image.width * image.height * 4 / 1e9
            if hasattr(os, 'sysconf'):
                have = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
                if need > have:
                    raise config.UserMistake(
                        f'{file}: its pixels take {need:.0f} GB, this machine has {have:.0f} GB '
                        'of memory: make the image smaller'
                    )
            if image.format == 'TIFF' and image.n_frames > 1:
                raise config.UserMistake(
                    f'{file}: a TIFF of {image.n_frames} pages: save each page as its own file'
                )
            yield image
    except config.UserMistake:
        raise
    except DECODING_ERRORS as error:
        raise unreadable(file, error) from None


def white(image: Image.Image) -> int:
    """The value in an opened file that Pillow shows as white: 255 for 8 bits, 3 for 2 bits.

    Pillow scales 2-bit and 4-bit values to 0..255, and drops the lower byte of 16-bit colours.
    """
    raw = image.tile[0][3] if image.tile else ''
    raw, *rest = raw if isinstance(raw, tuple) else (raw,)
    if image.format == 'PPM':
        return rest[0] if image.tile[0][0] == 'ppm' else 65535 if image.mode == 'I' else 255
    bits = re.search(r';(\d+)', str(raw)) if image.format in ('PNG', 'TIFF') else None
    return 2 ** int(bits[1]) - 1 if bits and image.mode not in ('1', 'P') else 255


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, or XMP's, from 1 to 8; 1 if there is none."""
    turned = image.getexif().get(ORIENTATION, 1)
    return turned if turned in range(1, 9) else 1


def check_bits(file, image: Image.Image) -> None:
    """Raise config.UserMistake for pixels that do not fit into 8 bits per channel."""
    if image.mode not in PLAIN_MODES or white(image) > 255:
        raise config.UserMistake(
            f'{file}: more than 8 bits per channel ({image.mode}): convert it to 8-bit RGB or grey, '
            'scaled to the range of values that matters'
        )


def header(file, check=lambda file, image: None) -> Header:
    """The Header of an image file that is not truncated and passes a check."""
    with opened(file) as image:
        check(file, image)
        if image.format != 'MPO' and getattr(image, 'is_animated', False):
            raise config.UserMistake(f'{file}: it is animated: save one frame of it')
        turned = orientation(image)
        # Pillow opens a TIFF with its sides already swapped.
        swapped = turned >= 5 and image.format != 'TIFF'
        size = image.size if swapped else image.size[::-1]
        with Path(file).open('rb') as raw:
            last = LAST_BYTES.get(image.format)
            raw.seek(-len(last or '.'), os.SEEK_END)
            if raw.read() != last:
                image.load()
        return Header(size, turned, image.format)


def tell_wide(headers: list[Header], width: int, scale: float | None) -> None:
    """Print one line if images are much wider than the model's input."""
    wide = sum(header.size[1] > 4 * width for header in headers)
    if wide and scale is None:
        print(
            f'{wide} images are more than four times as wide as the {width} pixels of CROP_SIZE: small '
            'objects may vanish when resized; training with SCALE=1.0 avoids this'
        )


# ------------------------------------------------------------ pixels
def read_image(file, channels: int = 3, size: tuple[int, int] | None = None) -> np.ndarray:
    """The pixels of an image file, see read_with_size."""
    return read_with_size(file, channels, size)[0]


def read_with_size(file, channels: int, size: tuple | None, scale: float | None = None) -> tuple:
    """Decode an image file as viewers show it: EXIF rotation applied, alpha left out.

    Args:
        channels: 3 for RGB, 1 for grey.
        size, scale: see `scaled`; size=None keeps the image's own size.

    Returns: uint8 (height, width, channels), 0..255; the image's own (height, width).

    Raises config.UserMistake if the file is missing, truncated, no image, or has 16 bits.
    """
    with opened(file) as image:
        check_bits(file, image)
        data = Path(file).read_bytes() if image.format == 'JPEG' else b''
        # OpenCV decodes JPEGs fastest, but fills the missing part of a truncated one with grey.
        complete = data.endswith(LAST_BYTES['JPEG'])
        if complete and image.mode in ('RGB', 'L') and orientation(image) == 1:
            own_size = image.size[::-1]
            pixels = decode_jpeg(data, channels, own_size, size and scaled(own_size, size, scale))
        else:
            ImageOps.exif_transpose(image, in_place=True)
            pixels = np.array(image.convert('RGB' if channels == 3 else 'L'))
            own_size = pixels.shape[:2]
    if size is not None:
        pixels = resize(pixels, scaled(own_size, size, scale))
    return pixels.reshape(*pixels.shape[:2], channels), own_size


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


def sizes_of(image_files) -> list[tuple[int, int]]:
    """(height, width) that each image file is resized to."""
    if config.SCALE is None:
        return [config.crop_size()] * len(image_files)
    sizes = (header(file).size for file in image_files)
    return [scaled(size, config.crop_size(), config.SCALE) for size in sizes]


def random_crop(image, mask, size: tuple[int, int], rng, ignored: int | None) -> tuple:
    """A copy of a random crop of an image (H, W, C) and its mask (H, W), padded by reflection.

    A third of the crops are centred on a pixel of an object, or as near to it as the border allows,
    as in nnU-Net (Isensee et al. 2021).
    """
    place = [rng.integers(max(0, side - length) + 1) for side, length in zip(mask.shape, size)]
    if rng.random() < 1 / 3:
        objects = np.argwhere((mask > 0) & (mask != (0 if ignored is None else ignored)))
        if len(objects):
            middle = objects[rng.integers(len(objects))] - np.array(size) // 2
            place = np.clip(middle, 0, np.maximum(0, np.array(mask.shape) - size))
    rows, columns = (slice(start, start + length) for start, length in zip(place, size))
    cut = image[rows, columns], mask[rows, columns]
    bottom, right = np.array(size) - cut[1].shape
    pads = 0, bottom, 0, right, cv2.BORDER_REFLECT_101
    return tuple(cv2.copyMakeBorder(c, *pads).reshape(*size, *c.shape[2:]) for c in cut)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to (height, width): average areas if a side is more than halved, else bilinear.

    Down to half the size, bilinear interpolation still uses every pixel and is three times as fast.
    """
    if any(side > 2 * length for side, length in zip(pixels.shape, size)):
        smaller = np.minimum(pixels.shape[:2], size).tolist()
        pixels = cv2.resize(pixels, smaller[::-1], interpolation=cv2.INTER_AREA)
    return pixels if pixels.shape[:2] == tuple(size) else cv2.resize(pixels, size[::-1])


def nearest(values: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Resize to (height, width) with nearest-neighbour interpolation; None keeps the size."""
    if size is None:
        return values
    return cv2.resize(values, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def values_in(pixels: np.ndarray) -> list[int]:
    """The different values of an array of whole numbers."""
    if pixels.dtype == np.uint8:
        return np.flatnonzero(cv2.calcHist([pixels], [0], None, [256], [0, 256])).tolist()
    return np.unique(pixels).tolist()
