"""Image files: their names, headers and pixels."""

import io
import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

import config

# One thread per worker. Set it at import: changing it in a forked worker deadlocks OpenCV.
cv2.setNumThreads(1)

# Pillow's modes of 8 bits per channel, or fewer.
PLAIN_MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr')
# Last bytes of a complete file. If a file ends otherwise, only decoding can tell.
ENDINGS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND\xaeB`\x82', 'GIF': b';'}
DECODING_ERRORS = (OSError, SyntaxError, ValueError, cv2.error, Image.DecompressionBombError)
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height


def list_files(folder: Path, suffix: str, constant: str) -> list[str]:
    """Names, without the suffix, of a folder's files that end in it; there must be one."""
    if not folder.is_dir():
        raise config.UserMistake(f'{folder}: no such folder: set {constant} or INPUT')
    files = sorted(file for file in os.listdir(folder) if not file.startswith('.'))
    names = [file.removesuffix(suffix) for file in files if file.endswith(suffix)]
    if not names:
        endings = Counter(Path(file).suffix or 'no suffix' for file in files).most_common(4)
        there = ', '.join(f'{count} {ending}' for ending, count in endings) or 'it is empty'
        raise config.UserMistake(
            f'{folder}: no file *{suffix}, but {there}: set {constant} or its suffix'
        )
    return names


def unreadable(file, error) -> config.UserMistake:
    """The mistake to raise for a file that cannot be decoded."""
    if isinstance(error, FileNotFoundError):
        return config.UserMistake(f'{file}: no such file')
    reason = 'it is empty' if Path(file).stat().st_size == 0 else ' '.join(str(error).split())
    return config.UserMistake(f'{file}: not a readable image ({reason}): replace or remove it')


def displayed_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an opened image as viewers show it, with its EXIF rotation applied."""
    width, height = image.size
    return (width, height) if image.getexif().get(ORIENTATION, 1) >= 5 else (height, width)


def header(file) -> tuple[str, tuple[int, int]]:
    """(Pillow's mode, (height, width) as displayed) of an image file that is not truncated."""
    try:
        with Image.open(file) as image, Path(file).open('rb') as raw:
            if image.format in ENDINGS:
                raw.seek(-len(ENDINGS[image.format]), io.SEEK_END)
                if raw.read() != ENDINGS[image.format]:
                    image.load()
            return image.mode, displayed_size(image)
    except DECODING_ERRORS as error:
        raise unreadable(file, error) from None


def check_mode(file, mode: str) -> None:
    """Raise config.UserMistake for pixels that do not fit into 8 bits per channel."""
    if mode not in PLAIN_MODES:
        raise config.UserMistake(
            f'{file}: {mode} pixels have more than 8 bits: save the range that holds the picture in 8'
        )


def read_image(file, channels: int = 3, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image file as viewers show it: EXIF rotation applied, alpha left out.

    Args:
        channels: 3 for RGB, 1 for grey.
        size: (height, width) to resize to; None keeps the image's own size.

    Returns: uint8 (height, width, channels), 0..255.

    Raises config.UserMistake if the file is missing, truncated, no image, or has 16 bits.
    """
    try:
        data = Path(file).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            check_mode(file, image.mode)
            # OpenCV decodes JPEGs fastest, but fills the missing part of a truncated one with grey.
            complete = data.endswith(ENDINGS['JPEG'])
            if image.format == 'JPEG' and image.mode in ('RGB', 'L') and complete:
                pixels = decode_jpeg(data, channels, displayed_size(image), size)
            else:
                image = ImageOps.exif_transpose(image).convert('RGB' if channels == 3 else 'L')
                pixels = np.array(image)
    except config.UserMistake:
        raise
    except DECODING_ERRORS as error:
        raise unreadable(file, error) from None
    if size is not None:
        pixels = cv2.resize(pixels, size[::-1])  # bilinear
    return pixels.reshape(*pixels.shape[:2], channels)


def decode_jpeg(data: bytes, channels: int, own_size: tuple, size: tuple | None) -> np.ndarray:
    """The pixels of a JPEG by OpenCV, at 1/8, 1/4 or 1/2 of its size if that covers `size`."""
    fits = (n for n in (8, 4, 2) if size and all(a // n >= b for a, b in zip(own_size, size)))
    divisor, kind = next(fits, 1), 'COLOR' if channels == 3 else 'GRAYSCALE'
    flag = f'IMREAD_REDUCED_{kind}_{divisor}' if divisor > 1 else f'IMREAD_{kind}'
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), getattr(cv2, flag))
    if pixels is None:
        raise ValueError('its JPEG data are damaged')
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if channels == 3 else pixels
