"""Image files: their headers and their pixels."""

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

import config

# The workers of a DataLoader share the cores already. It has to be said before the first call: a
# forked worker that changes it, or needs the threads that its parent had, waits for ever.
cv2.setNumThreads(1)

# Modes of PIL that turn into 8 bits per channel without a choice that is the user's to make.
PLAIN_MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr')
# Last bytes of a whole file; where they differ, decoding tells whether something is missing.
ENDINGS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND\xaeB`\x82', 'GIF': b';'}
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height


def broken(file, error) -> config.UserMistake:
    """The mistake to raise for a file that cannot be decoded."""
    if isinstance(error, FileNotFoundError):
        return config.UserMistake(f'{file}: no such file')
    reason = 'it is empty' if Path(file).stat().st_size == 0 else str(error).replace('\n', ' ')
    return config.UserMistake(f'{file}: not a readable image ({reason}): replace or remove it')


def displayed_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an opened image as viewers show it, its EXIF rotation applied."""
    width, height = image.size
    return (width, height) if image.getexif().get(ORIENTATION, 1) >= 5 else (height, width)


def header(file) -> tuple[str, tuple[int, int]]:
    """(PIL's mode, (height, width) as displayed) of an image file.

    Its pixels are decoded only where its last bytes are not those that end a whole file.
    Raises config.UserMistake for a file that is missing, truncated or no image.
    """
    try:
        with Image.open(file) as image, Path(file).open('rb') as raw:
            if image.format in ENDINGS:
                raw.seek(-len(ENDINGS[image.format]), io.SEEK_END)
                if raw.read() != ENDINGS[image.format]:
                    image.load()
            return image.mode, displayed_size(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise broken(file, error) from None


def too_deep(file, mode: str) -> config.UserMistake:
    """The mistake to raise for an image whose pixels do not fit into 8 bits per channel."""
    return config.UserMistake(
        f'{file}: {mode} pixels have more than 8 bits: which of them hold the picture is yours to '
        'say, save it with 8 bits per channel'
    )


def check_header(file) -> tuple[int, int]:
    """(height, width) of an image that read_image will take; or a config.UserMistake."""
    mode, size = header(file)
    if mode not in PLAIN_MODES:
        raise too_deep(file, mode)
    return size


def read_image(file, channels: int = 3, sizes: tuple = ()) -> list[np.ndarray]:
    """Decode an image file once, as viewers show it (EXIF rotation applied, alpha left out).

    Args:
        channels: 3 for RGB, 1 for grey.
        sizes: (height, width) pairs to resize to; none: the image's own size. A JPEG is decoded at
            1/2, 1/4 or 1/8 where that is at least as large as every size asked for.

    Returns: one uint8 array (height, width, channels), 0..255, for each size (or for its own).

    Raises config.UserMistake where the file is missing, truncated, no image, or has 16 bits.
    """
    try:
        data = Path(file).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in PLAIN_MODES:
                raise too_deep(file, image.mode)
            whole = data.endswith(ENDINGS['JPEG'])  # or OpenCV fills what is missing with grey
            if image.format == 'JPEG' and image.mode in ('RGB', 'L') and whole:
                pixels = decode_jpeg(data, channels, reduction(image, sizes))
            else:
                image = ImageOps.exif_transpose(image).convert('RGB' if channels == 3 else 'L')
                pixels = np.array(image)
    except (OSError, SyntaxError, ValueError, cv2.error, Image.DecompressionBombError) as error:
        raise error if isinstance(error, config.UserMistake) else broken(file, error) from None
    resized = [cv2.resize(pixels, (w, h), interpolation=cv2.INTER_LINEAR) for h, w in sizes]
    return [array.reshape(*array.shape[:2], channels) for array in resized or [pixels]]


def reduction(image: Image.Image, sizes) -> int:
    """The largest of 8, 4, 2, 1 by which the image may be divided and still cover every size."""
    if not sizes:
        return 1
    height, width = displayed_size(image)
    need = [(max(h for h, _ in sizes), height), (max(w for _, w in sizes), width)]
    return next(n for n in (8, 4, 2, 1) if n == 1 or all(own // n >= asked for asked, own in need))


def decode_jpeg(data: bytes, channels: int, divisor: int) -> np.ndarray:
    """The pixels of a JPEG, by OpenCV: the fastest decoder that the requirements bring along."""
    flags = {
        (1, 1): cv2.IMREAD_GRAYSCALE,
        (1, 2): cv2.IMREAD_REDUCED_GRAYSCALE_2,
        (1, 4): cv2.IMREAD_REDUCED_GRAYSCALE_4,
        (1, 8): cv2.IMREAD_REDUCED_GRAYSCALE_8,
        (3, 1): cv2.IMREAD_COLOR,
        (3, 2): cv2.IMREAD_REDUCED_COLOR_2,
        (3, 4): cv2.IMREAD_REDUCED_COLOR_4,
        (3, 8): cv2.IMREAD_REDUCED_COLOR_8,
    }
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags[channels, divisor])
    if pixels is None:
        raise ValueError('its JPEG data are damaged')
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if channels == 3 else pixels
