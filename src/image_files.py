"""ImageFiles: images to predict, of any size, each read once; in batches that are always the same."""

from pathlib import Path

import torch
from torch.utils.data import Dataset

import config
import images
import masks as mask_files
import runtime
import tables
from dataset import stack


class ImageFiles(Dataset):
    """Image files to predict, at several models' sizes and, where given, with their own masks.

    Items: {'images': [uint8 (channels, H, W) for each of `inputs`], 'img': file name,
    'shape': (height, width) of the file's image}, with `masks` also 'mask': uint8 (height, width),
    and with `folds` 'fold'.

    Args:
        files: image files.
        inputs: what the models want to be fed, as (height, width, channels).
        masks, folds: mask file and fold of each image, or None.
        classes, ignore_index: how the masks are read, see masks.read_mask.
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
            mask = mask_files.read_mask(self.masks[index], self.classes, self.ignore_index)
            if mask.shape != item['shape']:
                raise config.UserMistake(
                    f'{self.masks[index]}: not the size of its image {file.name}'
                )
            item['mask'] = torch.from_numpy(mask)
        return item


def collate_files(items: list[dict]) -> dict:
    """A batch of ImageFiles: a tensor (N, channels, H, W) per input, lists of all the rest."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    batch['images'] = [stack(tensors) for tensors in zip(*batch['images'])]
    return batch


class Batches(Dataset):
    """ImageFiles in batches of VAL_BATCH_SIZE that are always the same; `keep` leaves some out.

    Images of different folds, which go to different models, are in different batches.
    """

    def __init__(self, data: ImageFiles):
        self.data, self.lists = data, []
        folds = data.folds or [0] * len(data)
        for fold in dict.fromkeys(folds):
            of_fold = [index for index, other in enumerate(folds) if other == fold]
            starts = range(0, len(of_fold), config.VAL_BATCH_SIZE)
            self.lists += [of_fold[start : start + config.VAL_BATCH_SIZE] for start in starts]

    def keep(self, done: set[str], rank: int, ranks: int) -> 'Batches':
        """This rank's share of the batches in which an image is not among the `done` names."""
        names = [file.name for file in self.data.files]
        left = [indices for indices in self.lists if not done.issuperset(names[i] for i in indices)]
        self.lists = left[rank::ranks]
        return self

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, number: int) -> dict:
        return collate_files([self.data[index] for index in self.lists[number]])


def test_files(folder: Path) -> list[Path]:
    """The images to predict: those of TEST_CSV, in its order, where it exists; else the folder's."""
    if not folder.is_dir():
        return []
    suffix, listing = config.IMAGE_SUFFIX, config.TEST_CSV
    there = sorted(f.name for f in folder.iterdir() if f.name.endswith(suffix) and f.is_file())
    if not there or not tables.is_file(listing):
        return [folder / name for name in there]
    table = tables.read_table(config.path(listing), ['img'], 'fix or remove it')
    asked = [name.removesuffix(suffix) + suffix for name in table.img.drop_duplicates()]
    missing, extra = set(asked) - set(there), set(there) - set(asked)
    if len(missing) == len(set(asked)):
        runtime.tell(f'{listing} lists none of the images in {folder}: all of these are predicted')
        return [folder / name for name in there]
    lacking = (missing, f'{listing} are not in {folder}'), (extra, f'{folder} are not in {listing}')
    for names, what in lacking:
        if names:
            runtime.tell(f'{len(names)} images of {what}: {tables.some(sorted(names))}')
    return [folder / name for name in asked if name not in missing]
