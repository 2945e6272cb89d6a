"""CarvanaDataset: (image, mask) pairs of some folds.

Images stay 8 bit until they are on the device, where the module normalises them: a quarter of the
bytes to copy, and no float arithmetic in the workers.
"""

import torch
from torch.utils.data import Dataset, DistributedSampler, default_collate

import augmentation
import cache
import config
import folds as fold_table
import pairs


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
        self.files = {name: pairs.files_of(name) for name in self.names}
        self.seed, self.form = config.SEED, pairs.form()
        self.augment = None
        if len(folds) > 1 if train is None else train:
            self.augment = augmentation.build(config.AUGMENTATION, config.CHANNELS)
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
            image, mask = pairs.read_pair(*self.files[name], **self.form)
        else:
            image, mask = self.cache.load(name)
        if self.augment is not None:
            augmentation.seed(self.augment, f'{self.seed} {epoch} {name}')
            augmented = self.augment(image=image, mask=mask)
            image, mask = augmented['image'], augmented['mask']
        return {
            'image': torch.from_numpy(image).permute(2, 0, 1),
            'mask': torch.from_numpy(mask),
            'img': name,
        }


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


def stack(tensors) -> torch.Tensor:
    """Images (C, H, W) that lie in memory as they were decoded, as a batch (N, C, H, W).

    It stays channels-last, as the models want it: whole images are copied, not single pixels.
    """
    return default_collate([image.permute(1, 2, 0) for image in tensors]).permute(0, 3, 1, 2)


def collate(items: list[dict]) -> dict:
    """A batch of CarvanaDataset."""
    images = {'image': stack([item.pop('image') for item in items])}
    return {**images, **default_collate(items)}
