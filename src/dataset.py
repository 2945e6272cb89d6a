"""CarvanaDataset: (image, mask) pairs of some folds; augmentation by name.

Images stay 8 bit until they are on the device, where the module normalises them: a quarter of the
bytes to copy, and no float arithmetic in the workers.
"""

import os
import zlib

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')  # or its import asks a server for updates

import albumentations as A
import cv2
import torch
from torch.utils.data import Dataset, DistributedSampler, default_collate

import cache
import config
import folds as fold_table
import images


def shift_scale_rotate() -> A.Affine:
    """The original's ShiftScaleRotate: one scale for both axes, reflected border."""
    return A.Affine(
        translate_percent={'x': (-0.0625, 0.0625), 'y': (-0.0625, 0.0625)},
        scale=(0.9, 1.1),
        keep_ratio=True,
        rotate=(-15, 15),
        border_mode=cv2.BORDER_REFLECT_101,
        p=0.9,
    )


def strong() -> list:
    """What a model meets outside the training set: other light, blur, noise, JPEG, occlusion."""
    colour = [A.HueSaturationValue(10, 25, 15, p=0.3)] if config.CHANNELS == 3 else []
    return [
        A.HorizontalFlip(p=0.5),
        shift_scale_rotate(),
        A.Perspective(scale=(0.02, 0.06), border_mode=cv2.BORDER_REFLECT_101, p=0.3),
        A.RandomBrightnessContrast(brightness_limit=0.25, contrast_limit=0.25, p=0.5),
        A.RandomGamma(gamma_limit=(75, 130), p=0.3),
        *colour,
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.5), p=0.2),
        A.GaussNoise(std_range=(0.01, 0.06), p=0.3),
        A.ImageCompression(quality_range=(50, 95), p=0.2),
        A.CoarseDropout(
            num_holes_range=(1, 4),
            hole_height_range=(0.04, 0.12),
            hole_width_range=(0.04, 0.12),
            fill='random_uniform',
            p=0.3,
        ),
    ]


# AUGMENTATION in config.py -> the transforms, applied in turn after the resize. One line adds one.
AUGMENTATIONS = {
    'original': lambda: [shift_scale_rotate()],
    'flip': lambda: [A.HorizontalFlip(p=0.5), shift_scale_rotate()],
    'strong': strong,
    'none': list,
}


class CarvanaDataset(Dataset):
    """The images of some folds with their masks, resized to CROP_SIZE.

    Items: {'image': uint8 (CHANNELS, H, W), 'mask': uint8 (H, W) of class indices, 'img': name}.

    What an augmented item looks like is a function of (SEED, epoch, name) alone, whichever worker
    makes it. The epoch is given by asking for `(epoch, index)`, as EpochSampler does; for a plain
    index it is the number of times that the index has been asked for, counted in memory that all
    workers share.

    Args:
        folds: the values of kfold to take.
        train: whether to augment; None: where more than one fold is asked for.
    """

    def __init__(self, folds: list[int], train: bool | None = None):
        self.names = fold_table.read_folds(folds).img.tolist()
        # Kept here, as a worker that is spawned rather than forked has config.py's own values.
        self.files = {name: fold_table.files_of(name) for name in self.names}
        self.seed, self.form = config.SEED, images.form()
        self.augment = None
        if len(folds) > 1 if train is None else train:
            self.augment = A.Compose(AUGMENTATIONS[config.AUGMENTATION]())
        self.visits = torch.zeros(len(self), dtype=torch.int32).share_memory_()
        self.cache = cache.open_cache() if config.CACHE else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        if isinstance(item, tuple):
            epoch, index = item
        else:
            epoch, index = int(self.visits[item]), item
            self.visits[item] += 1
        name = self.names[index]
        if self.cache is None:
            image, mask = images.read_pair(*self.files[name], **self.form)
        else:
            image, mask = self.cache.load(name)
        if self.augment is not None:
            self.seed_augmentation(epoch, name)
            augmented = self.augment(image=image, mask=mask)
            image, mask = augmented['image'], augmented['mask']
        return {
            'image': torch.from_numpy(image).permute(2, 0, 1),
            'mask': torch.from_numpy(mask),
            'img': name,
        }

    def seed_augmentation(self, epoch: int, name: str) -> None:
        """Set every transform's random generator from (SEED, epoch, name).

        albumentations 2.0.8 keeps its own generators, which all workers would inherit alike, and
        Compose.set_random_seed gives all transforms the same one: then those with the same p are
        applied together or not at all.
        """
        for position, transform in enumerate(self.augment.transforms):
            words = f'{self.seed} {epoch} {name} {position}'
            transform.set_random_seed(zlib.crc32(words.encode()))


class EpochSampler(DistributedSampler):
    """DistributedSampler whose items are (epoch, index); the epoch is set by Lightning.

    The order is a function of (SEED, epoch), so a resumed run goes on with the same batches.
    Where nobody sets the epoch, each pass is the next one.
    """

    def __iter__(self):
        epoch = self.epoch
        self.epoch += 1
        for index in super().__iter__():
            yield epoch, index


class ImageFiles(Dataset):
    """Image files to predict, at several models' sizes and, where given, with their own masks.

    Items: {'images': [uint8 (channels, H, W) for each of `inputs`], 'img': file name,
    'shape': (height, width) of the file's image}, with `masks` also 'mask': uint8 (height, width),
    and with `folds` 'fold'.

    Args:
        files: image files.
        inputs: what the models want to be fed, as (height, width, channels).
        masks, folds: mask file and fold of each image, or None.
        classes, ignore_index: how the masks are read, see images.read_mask.
    """

    def __init__(self, files, inputs, masks=None, folds=None, classes=1, ignore_index=None):
        self.files, self.inputs, self.masks, self.folds = list(files), list(inputs), masks, folds
        self.classes, self.ignore_index = classes, ignore_index

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        file = self.files[index]
        item = {'img': file.name, 'shape': images.header(file)[1]}
        read = {}
        for channels in {channels for _, _, channels in self.inputs}:
            forms = [form for form in self.inputs if form[2] == channels]
            read |= zip(forms, images.read_image(file, channels, [form[:2] for form in forms]))
        item['images'] = [torch.from_numpy(read[form]).permute(2, 0, 1) for form in self.inputs]
        if self.folds is not None:
            item['fold'] = self.folds[index]
        if self.masks is not None:
            mask = images.read_mask(self.masks[index], self.classes, self.ignore_index)
            if mask.shape != item['shape']:
                raise config.UserMistake(
                    f'{self.masks[index]}: not the size of its image {file.name}'
                )
            item['mask'] = torch.from_numpy(mask)
        return item


def stack(tensors) -> torch.Tensor:
    """Images (C, H, W) that lie in memory as they were decoded, as a batch (N, C, H, W).

    It stays channels-last, as the models want it: whole images are copied, not single pixels.
    """
    return default_collate([image.permute(1, 2, 0) for image in tensors]).permute(0, 3, 1, 2)


def collate(items: list[dict]) -> dict:
    """A batch of CarvanaDataset."""
    images = {'image': stack([item.pop('image') for item in items])}
    return {**images, **default_collate(items)}


def collate_files(items: list[dict]) -> dict:
    """A batch of ImageFiles: a tensor (N, channels, H, W) per input, lists of all the rest."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    batch['images'] = [stack(tensors) for tensors in zip(*batch['images'])]
    return batch
