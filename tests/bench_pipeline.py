"""How fast images reach the model, in one process, against the original's own way; ratios.

    python tests/bench_pipeline.py [--cars 2] [--size 1918x1280] [--repeats 5]

The baseline is what the original did: each image and mask decoded by PIL at full size, albumentations
for Resize, ShiftScaleRotate (as Affine, its successor) and Normalize, float tensors. Both ways read
the same images of demo.py, 16 of each car, in turn, five times; medians. With CACHE=True the first
epoch, which builds the cache, is not timed. Last, how far a reduced JPEG decode is from a full one.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'src'))

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image
from torch.utils.data import Dataset

import command_line
import config
import dataset
import demo
import files
import folds
import images


class OriginalWay(Dataset):
    """PIL, albumentations with Normalize, float tensors."""

    def __init__(self, names: list[str], size: int):
        self.names = names
        self.transforms = A.Compose(
            [
                A.Resize(size, size),
                A.Affine(
                    translate_percent=(-0.0625, 0.0625),
                    scale=(0.9, 1.1),
                    rotate=(-15, 15),
                    border_mode=cv2.BORDER_REFLECT_101,
                    p=0.9,
                ),
                A.Normalize(),
                ToTensorV2(),
            ]
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        image_file, mask_file = files.pairs_of([self.names[index]])[0]
        image = np.array(Image.open(image_file).convert('RGB'))
        mask = np.array(Image.open(mask_file)).astype(np.float32)
        pair = self.transforms(image=image, mask=mask)
        return {'image': pair['image'], 'mask': pair['mask'].unsqueeze(0)}


def seconds(data: Dataset) -> float:
    start = time.perf_counter()
    for index in range(len(data)):
        data[index]
    return time.perf_counter() - start


def compare(label: str, ours: Dataset, original: Dataset, repeats: int) -> None:
    pairs = [(seconds(ours), seconds(original)) for _ in range(repeats)]
    our, their = (statistics.median(times) for times in zip(*pairs))
    print(
        f'{label:28s} {len(ours) / our:6.1f} images/s, the original way {len(ours) / their:6.1f}, '
        f'ratio {their / our:.1f}',
        flush=True,
    )


def reduced_decode(names: list[str], size: int) -> str:
    """How far images decoded at a fraction of their size are from those decoded in full."""
    largest, mean = 0, []
    for name in names:
        file = files.pairs_of([name])[0][0]
        whole = cv2.resize(images.read_image(file), (size, size))
        difference = np.abs(images.read_image(file, 3, (size, size)).astype(int) - whole)
        largest, mean = max(largest, difference.max()), [*mean, difference.mean()]
    return f'mean difference {np.mean(mean):.2f} of 255, largest {largest}'


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--cars', type=int, default=2)
    parser.add_argument('--size', type=demo.size, default=(1918, 1280))
    parser.add_argument('--repeats', type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        demo.make_dataset(folder, options.cars, test_cars=0, size=options.size)
        words = [f'INPUT={folder}', f'OUTPUT={folder}/output', 'N_FOLDS=2', 'NUM_WORKERS=2']
        for size in (1024, 512, 256):
            command_line.override([*words, f'CROP_SIZE={size}'])
            folds.main()
            ours = dataset.CarvanaDataset([0, 1], train=True)
            original = OriginalWay(ours.names, size)
            compare(f'CROP_SIZE={size}', ours, original, options.repeats)
            config.CACHE = True
            cached = dataset.CarvanaDataset([0, 1], train=True)
            seconds(cached)
            compare(f'CROP_SIZE={size} CACHE=True', cached, original, options.repeats)
            print(f'  reduced JPEG decoding: {reduced_decode(ours.names, size)}')


if __name__ == '__main__':
    main()
