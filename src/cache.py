"""CACHE=True: every image and mask decoded and resized once, kept on disk as 8-bit arrays.

OUTPUT/cache/<key>/images.npy, uint8 (N, H, W, CHANNELS), and masks.npy, uint8 (N, H, W), in the
order of TRAIN_FOLDS. The key is a digest of all that the arrays depend on: constants, names, and
each file's size and time of change; so a cache is right or it is not found. All workers and all
folds share its pages in memory.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
import folds
import pairs
import tables


class Cache:
    """The arrays, mapped into memory; `load(name)` copies an image and its mask out of them."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder = folder
        self.row = {name: row for row, name in enumerate(names)}
        self.images = np.load(folder / 'images.npy', mmap_mode='r')
        self.masks = np.load(folder / 'masks.npy', mmap_mode='r')

    def __reduce__(self):
        return Cache, (self.folder, list(self.row))  # a spawned worker maps the files itself

    def load(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """uint8 image (H, W, CHANNELS) and mask (H, W) at CROP_SIZE."""
        row = self.row[name]
        return self.images[row].copy(), self.masks[row].copy()


def open_cache() -> Cache:
    """The cache of all images in TRAIN_FOLDS; built first where there is none that fits the files."""
    names = folds.read_folds().img.tolist()
    folder = config.path(config.OUTPUT) / 'cache' / key(names)
    if not folder.is_dir():
        lock = config.path(config.OUTPUT) / '.cache.lock'
        with tables.locked(lock):  # another machine may be building it
            if not folder.is_dir():
                build(folder, names)
    return Cache(folder, names)


def key(names: list[str]) -> str:
    """Digest of everything that decides what is in the arrays."""
    state = [config.crop_size(), config.CHANNELS, config.CLASSES, config.IGNORE_INDEX]
    for name in names:
        for file in pairs.files_of(name):
            try:
                status = file.stat()
            except OSError:
                raise config.UserMistake(f'{file}: no such file: run folds.py again') from None
            state.append((str(file), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def build(folder: Path, names: list[str]) -> None:
    """Write the arrays beside `folder`, then rename: a killed run leaves nothing that is trusted."""
    shutil.rmtree(folder.parent, ignore_errors=True)  # of other sizes or files, or half-written
    temporary = folder.with_name(f'{folder.name}.{os.getpid()}.tmp')
    shape = (len(names), *config.crop_size())
    try:
        temporary.mkdir(parents=True)
        need = np.prod(shape, dtype=np.int64) * (config.CHANNELS + 1)
        free = shutil.disk_usage(temporary).free
        if need > 0.95 * free:
            raise config.UserMistake(
                f'CACHE=True needs {need / 1e9:.1f} GB at CROP_SIZE={config.CROP_SIZE}, '
                f'{config.OUTPUT} has {free / 1e9:.1f} GB left: a smaller CROP_SIZE, or CACHE=False'
            )
        image_rows = create(temporary / 'images.npy', (*shape, config.CHANNELS))
        mask_rows = create(temporary / 'masks.npy', shape)

        def write(row: int) -> None:
            files = pairs.files_of(names[row])
            image_rows[row], mask_rows[row] = pairs.read_pair(*files, **pairs.form())

        # Threads will do: the decoders work outside Python's lock.
        with ThreadPoolExecutor(max(1, config.NUM_WORKERS)) as pool:
            rows = pool.map(write, range(len(names)))
            for _ in tqdm(rows, 'building the cache', len(names), disable=None, leave=False):
                pass
        image_rows.flush()
        mask_rows.flush()
        temporary.rename(folder)
    except OSError as error:
        raise config.UserMistake(f'{temporary}: cannot be written ({error.strerror})') from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def create(file: Path, shape: tuple) -> np.memmap:
    return np.lib.format.open_memmap(file, mode='w+', dtype=np.uint8, shape=shape)
