"""Image files: their headers and their pixels."""

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

import config

# One thread per worker. Set it at import: changing it in a forked worker deadlocks OpenCV.
cv2.setNumThreads(1)

# Modes of Pillow that convert to 8 bits per channel without losing anything.
PLAIN_MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr')
# Last bytes of a complete file. If a file ends otherwise, only decoding can tell if it is complete.
ENDINGS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND\xaeB`\x82', 'GIF': b';'}
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height


def unreadable(file, error) -> config.UserMistake:
    """The mistake to raise for a file that cannot be decoded."""
    if isinstance(error, FileNotFoundError):
        return config.UserMistake(f'{file}: no such file')
    reason = 'it is empty' if Path(file).stat().st_size == 0 else str(error).replace('\n', ' ')
    return config.UserMistake(f'{file}: not a readable image ({reason}): replace or remove it')


def displayed_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an opened image as viewers show it, with its EXIF rotation applied."""
    width, height = image.size
    return (width, height) if image.getexif().get(ORIENTATION, 1) >= 5 else (height, width)


def header(file) -> tuple[str, tuple[int, int]]:
    """(Pillow's mode, (height, width) as displayed) of an image file.

    Raises:
        config.UserMistake: if the file is missing, truncated or no image.
    """
    try:
        with Image.open(file) as image, Path(file).open('rb') as raw:
            if image.format in ENDINGS:
                raw.seek(-len(ENDINGS[image.format]), io.SEEK_END)
                if raw.read() != ENDINGS[image.format]:
                    image.load()
            return image.mode, displayed_size(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise unreadable(file, error) from None


def check_mode(file, mode: str) -> None:
    """Raise config.UserMistake for pixels that do not fit into 8 bits per channel."""
    if mode not in PLAIN_MODES:
        raise config.UserMistake(
            f'{file}: {mode} pixels have more than 8 bits: save it with 8 bits per channel, after '
            'choosing the range of values that holds the picture'
        )


def check_header(file) -> tuple[int, int]:
    """(height, width) of an image that read_image can read; or a config.UserMistake."""
    mode, size = header(file)
    check_mode(file, mode)
    return size


def read_image(file, channels: int = 3, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image file as viewers show it: EXIF rotation applied, alpha left out.

    Args:
        channels: 3 for RGB, 1 for grey.
        size: (height, width) to resize to; None keeps the image's own size.

    Returns: uint8 (height, width, channels), 0..255.

    Raises:
        config.UserMistake: if the file is missing, truncated, no image, or has 16 bits.
    """
    try:
        data = Path(file).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            check_mode(file, image.mode)
            # OpenCV decodes JPEGs fastest, but fills the missing part of a truncated one with grey.
            complete = data.endswith(ENDINGS['JPEG'])
            if image.format == 'JPEG' and image.mode in ('RGB', 'L') and complete:
                pixels = decode_jpeg(data, channels, reduction(image, size))
            else:
                image = ImageOps.exif_transpose(image).convert('RGB' if channels == 3 else 'L')
                pixels = np.array(image)
    except (OSError, SyntaxError, cv2.error, Image.DecompressionBombError) as error:
        raise unreadable(file, error) from None
    except ValueError as error:
        raise error if isinstance(error, config.UserMistake) else unreadable(file, error) from None
    if size is not None:
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
    return pixels.reshape(*pixels.shape[:2], channels)


def reduction(image: Image.Image, size: tuple[int, int] | None) -> int:
    """The largest of 8, 4, 2, 1 that divides the image's sides and leaves them at least `size`."""
    if size is None:
        return 1
    height, width = displayed_size(image)
    fits = (n for n in (8, 4, 2) if height // n >= size[0] and width // n >= size[1])
    return next(fits, 1)


def decode_jpeg(data: bytes, channels: int, divisor: int) -> np.ndarray:
    """The pixels of a JPEG at 1/divisor of its size, by OpenCV."""
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
