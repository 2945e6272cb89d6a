"""Small objects in large images: whole images resized, against SCALE=1.0, as a Markdown table.

    python tests/bench_scale.py
    SEEDS=1 python tests/bench_scale.py EPOCHS=1     a short trial

A model trains on images of 64 x 48 pixels with one disc each, in which a disc is 20 pixels wide. It is
scored on images of 640 x 480 pixels with 48 such discs, which a resize to CROP_SIZE makes 2 pixels wide.
Both kinds are one data set with two groups, so that the fold of the large images is out of fold. Dice is
the mean of oof.csv; a row takes the same number of optimizer steps with each value of SCALE.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'src'))

import numpy as np
import pandas as pd
from bench_schedules import SEEDS
from PIL import Image

import command_line
import config
import folds
import Lightning_tester
import Lightning_trainer

SETTINGS = [
    'IMAGE_SUFFIX=.png', 'MASK_SUFFIX=.png', 'GROUP_REGEX=^(small|large)', 'N_FOLDS=2',
    'MODEL_NAME=smp_linknet_tu-regnetx_002', 'ENCODER_WEIGHTS=None', 'CROP_SIZE=64', 'EPOCHS=20',
    'LR=0.003', 'ACCUMULATE_GRAD_BATCHES=1', 'PRECISION=32', 'NUM_WORKERS=0',
]  # fmt: skip
TILE = (48, 64)  # height and width of an image with one disc


def draw_disc(rng) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc of radius 10 on a dark, noisy ground: image and mask (48, 64), 8 bits."""
    rows, columns = np.mgrid[: TILE[0], : TILE[1]]
    middle = rng.uniform(10, np.array(TILE) - 10)
    disc = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < 100
    image = np.where(disc, rng.uniform(120, 200), rng.uniform(40, 90)) + rng.normal(0, 20, TILE)
    return np.uint8(image.clip(0, 255)), np.uint8(255 * disc)


def draw_tiles(rng) -> tuple[np.ndarray, np.ndarray]:
    """48 such discs, each in a place of 80 x 80 pixels: image and mask (480, 640), 8 bits."""
    image, mask = np.full((480, 640), 65, np.uint8), np.zeros((480, 640), np.uint8)
    for top in range(0, 480, 80):
        for left in range(0, 640, 80):
            place = np.s_[top : top + TILE[0], left : left + TILE[1]]
            image[place], mask[place] = draw_disc(rng)
    return image, mask


def draw(folder: Path) -> None:
    """40 small images and 4 large ones, and their masks."""
    rng = np.random.default_rng(0)
    pairs = {f'small{number:02d}': draw_disc(rng) for number in range(40)}
    pairs |= {f'large{number:02d}': draw_tiles(rng) for number in range(4)}
    for place in ('train_hq', 'train_masks'):
        (folder / place).mkdir()
    for name, (image, mask) in pairs.items():
        Image.fromarray(image).save(folder / f'train_hq/{name}.png')
        Image.fromarray(mask).save(folder / f'train_masks/{name}.png')


def dice(words: list[str], seed: int, scale: float | None) -> float:
    """Train and test the fold of the large images. Return their mean Dice out of fold."""
    command_line.override([*words, f'SEED={seed}', f'SCALE={scale}'])
    Lightning_trainer.main()
    Lightning_tester.main()
    return pd.read_csv(config.path(config.OUTPUT) / 'oof.csv').dice.mean()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        paths = [f'INPUT={folder}', f'OUTPUT={folder}/output', f'LOGS_PATH={folder}/logs']
        words = [*paths, *SETTINGS, *sys.argv[1:]]
        command_line.override(words)
        folds.main()
        table = folds.read_folds()
        large = table.kfold[table.img.str.startswith('large')].iloc[0]
        words.append(f'FOLDS=[{large}]')
        rows = [(seed, dice(words, seed, None), dice(words, seed, 1.0)) for seed in SEEDS]
    print('| SEED | SCALE=None | SCALE=1.0 |')
    print('|---|---|---|')
    for seed, resized, windows in rows:
        print(f'| {seed} | {resized:.3f} | {windows:.3f} |')


if __name__ == '__main__':
    main()
