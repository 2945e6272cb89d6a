"""CarvanaDataset: augmented (image, mask) pairs of some folds; their cache, sampler and batches.

Images stay 8-bit until they are on the device, where the module normalises them. This copies a
quarter of the bytes and keeps float arithmetic out of the workers.
"""

import copy
import hashlib
import json
import os
import zlib
from pathlib import Path

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')  # else the import asks a server for updates

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, default_collate

import config
import files
import images

READING = 3  # raise it when files are read differently: older cache files are then not used
# The original's ShiftScaleRotate: one scale for both axes, a reflected border.
SHIFT_SCALE_ROTATE = {
    'translate_percent': {'x': (-0.0625, 0.0625), 'y': (-0.0625, 0.0625)},
    'scale': (0.9, 1.1),
    'keep_ratio': True,
    'rotate': (-15, 15),
    'border_mode': cv2.BORDER_REFLECT_101,
    'p': 0.9,
}
# AUGMENTATION in config.py -> transforms, applied in turn after the resize.
AUGMENTATIONS = {
    'none': [],
    'original': [A.Affine(**SHIFT_SCALE_ROTATE)],
    'flip': [A.HorizontalFlip(p=0.5), A.Affine(**SHIFT_SCALE_ROTATE)],
    # Light, blur, noise, compression, occlusion: for test images unlike the training images.
    'strong': [
        A.HorizontalFlip(p=0.5),
        A.Affine(**SHIFT_SCALE_ROTATE),
        A.Perspective(scale=(0.02, 0.06), border_mode=cv2.BORDER_REFLECT_101, p=0.3),
        A.RandomBrightnessContrast(brightness_limit=0.25, contrast_limit=0.25, p=0.5),
        A.RandomGamma(gamma_limit=(75, 130), p=0.3),
        A.HueSaturationValue(10, 25, 15, p=0.3),
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.5), p=0.2),
        A.GaussNoise(std_range=(0.01, 0.06), p=0.3),
        A.ImageCompression(quality_range=(50, 95), p=0.2),
        A.CoarseDropout((1, 4), (0.04, 0.12), (0.04, 0.12), fill='random_uniform', p=0.3),
    ],
}


def build_augmentation(name: str, channels: int) -> list:
    """New transforms of AUGMENTATIONS[name]; those of colour need 3 channels."""
    if name not in AUGMENTATIONS:
        hint, valid = config.did_you_mean(name, AUGMENTATIONS), ', '.join(AUGMENTATIONS)
        raise config.UserMistake(f'AUGMENTATION={name!r}: {hint}valid: {valid}')
    transforms = copy.deepcopy(AUGMENTATIONS[name])  # each dataset seeds its own
    return [t for t in transforms if channels == 3 or not isinstance(t, A.HueSaturationValue)]


def build_crop(height: int, width: int, ignored: int | None) -> list:
    """Transforms that cut a random crop, of images that are too small with a reflected border.

    A third of the crops hold a pixel of an object, as in nnU-Net (Isensee et al. 2021).
    """
    ignore_values = None if ignored is None else [ignored]
    return [
        A.PadIfNeeded(height, width, position='top_left', border_mode=cv2.BORDER_REFLECT_101),
        A.OneOf(
            [
                A.RandomCrop(height, width, p=2 / 3),
                A.CropNonEmptyMaskIfExists(height, width, ignore_values, p=1 / 3),
            ],
            p=1,
        ),
    ]


def seed_augmentation(augment: A.Compose, text: str) -> None:
    """Seed every transform from a text.

    In albumentations 2.0.8, all workers would inherit the same generator. Its set_random_seed gives
    all transforms one generator: those of equal p would all be applied, or none of them.
    """
    for position, transform in enumerate(augment.transforms):
        transform.set_random_seed(zlib.crc32(f'{text} {position}'.encode()))


def read_pair(image_file: Path, mask_file: Path | files.Runs, size, channels, *mask_rule) -> tuple:
    """An image, uint8 (H, W, channels), and its mask, uint8 (H, W), both resized to `size`."""
    image = images.read_image(image_file, channels, size)
    return image, images.read_mask(mask_file, *mask_rule, size)


def read_cached(folder: Path, *pair) -> tuple[np.ndarray, np.ndarray]:
    """The result of read_pair(*pair). The first call saves it in a folder, later calls load it.

    The file name is a hash of all that the pixels depend on, so a file that is found is up to date.
    """
    state = [READING, *pair[2:]]
    for file in pair[:2]:
        if isinstance(file, files.Runs):
            state.append((file.text, file.order))
        else:
            status = file.stat()
            state.append((str(file), status.st_size, status.st_mtime_ns))
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    saved = folder / f'{key}.image.npy', folder / f'{key}.mask.npy'
    if not saved[1].exists():  # it is written last
        for file, pixels in zip(saved, read_pair(*pair)):
            try:
                # Several processes may write it at once: each has its own temporary file.
                ending = f'.{os.getpid()}.tmp'
                with files.atomic_write(file, ending) as temporary, temporary.open('wb') as opened:
                    np.save(opened, pixels)
            except OSError as error:
                raise config.UserMistake(f'{error}: free disk space, or set CACHE=False') from None
    # Of a large image a crop reads only its own part, as it is mapped. Small ones are read faster whole.
    modes = ('c' if file.stat().st_size > 2**24 else None for file in saved)
    return tuple(np.asarray(np.load(file, mmap_mode=mode)) for file, mode in zip(saved, modes))


class CarvanaDataset(Dataset):
    """The images of some folds with their masks, resized to CROP_SIZE. With SCALE, training uses
    random crops, as many per image as tiles of CROP_SIZE fit into it; validation uses whole images.

    Items: {'image': uint8 (CHANNELS, H, W), 'mask': uint8 (H, W) of class indices, 'img': name,
    'row': index of the image in `names`}.

    An augmented item depends only on (SEED, epoch, name, number of its crop), not on the worker.
    Request (epoch, index), as EpochSampler does, to set the epoch. A plain index draws a random one.

    Args:
        folds: values of kfold in TRAIN_FOLDS.
        train: whether to augment; None: if there is more than one fold.
    """

    def __init__(self, folds: list[int], train: bool | None = None):
        train = len(folds) > 1 if train is None else train
        height, width = crop_size = config.crop_size()
        self.names = files.read_folds(folds).img.tolist()
        # Keep them: a spawned worker imports config.py again, without command-line arguments.
        self.seed, self.files = config.SEED, files.pairs_of(self.names)
        self.settings = config.CHANNELS, *images.mask_settings()
        self.cache = config.path(config.OUTPUT) / 'cache' if config.CACHE else None
        transforms = build_augmentation(config.AUGMENTATION, config.CHANNELS)
        self.sizes, tiles = [crop_size] * len(self.names), [1] * len(self.names)
        if config.SCALE is not None:
            own_sizes = [images.size_of(image_file) for image_file, _ in self.files]
            self.sizes = [images.scaled(size, crop_size, config.SCALE) for size in own_sizes]
            if train:
                tiles = [max(1, h // height * (w // width)) for h, w in self.sizes]
                ignored = images.ignored_value(config.IGNORE_INDEX)
                transforms = [*build_crop(height, width, ignored), *transforms]
        self.crops = [(row, n) for row, count in enumerate(tiles) for n in range(count)]
        self.augment = A.Compose(transforms) if train else None

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        epoch, index = item if isinstance(item, tuple) else (None, item)
        row, crop = self.crops[index]
        name, pair = self.names[row], (*self.files[row], self.sizes[row], *self.settings)
        image, mask = read_cached(self.cache, *pair) if self.cache else read_pair(*pair)
        if self.augment is not None:
            if epoch is None:  # the DataLoader seeds torch anew in each worker and epoch
                epoch = int(torch.randint(2**31, ()))
            seed_augmentation(self.augment, f'{self.seed} {epoch} {name} {crop}')
            augmented = self.augment(image=image, mask=mask)
            image, mask = augmented['image'], augmented['mask']
        return {
            'image': torch.from_numpy(image).permute(2, 0, 1),
            'mask': torch.from_numpy(mask),
            'img': name,
            'row': row,
        }


class EpochSampler(DistributedSampler):
    """DistributedSampler that yields (epoch, index). Lightning sets its epoch.

    The order depends only on (SEED, epoch), so a resumed run continues with the same batches.
    If nobody sets the epoch, each pass counts as the next epoch.
    """

    def __iter__(self):
        epoch = self.epoch
        self.epoch += 1
        for index in super().__iter__():
            yield epoch, index


def collate(items: list[dict]) -> dict:
    """A batch of CarvanaDataset items. Its images are channels-last in memory, for the models."""
    # Stack images as (H, W, C), the order of decoding: this copies each one in a single block.
    stacked = default_collate([item.pop('image').permute(1, 2, 0) for item in items])
    return {'image': stacked.permute(0, 3, 1, 2), **default_collate(items)}
