"""Draw a synthetic data set in Carvana's layout, and run the three steps on it. No download.

The folds are trained side by side, each in its own process on its share of the cores.

Reads   nothing.
Writes  INPUT/demo: Kaggle's files, and test_masks_truth; OUTPUT/demo, LOGS_PATH/demo.

    python demo.py CROP_SIZE=128 EPOCHS=2                  with other constants for the steps
    python demo.py --cars 318 --test-cars 9 --size 1918x1280 --only-draw INPUT=/tmp/carvana
"""

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

import command_line
import config
import images

# test_resnet is timm's smallest ResNet: 0.4 million parameters, a block at each size.
SETTINGS = {
    'MODEL_NAME': 'smp_linknet_tu-test_resnet', 'ENCODER_WEIGHTS': None, 'CROP_SIZE': (96, 160),
    'N_FOLDS': 3, 'FOLDS': [0, 1, 2], 'AUGMENTATION': 'flip', 'LOSS': 'BCE_Dice', 'EPOCHS': 10,
    'LR': 0.005, 'ACCUMULATE_GRAD_BATCHES': 1, 'NUM_WORKERS': 0, 'CACHE': True}  # fmt: skip
CARS = 18
# Sedan, SUV, hatchback, pickup: metres up, back, ahead at underside, bumper, bonnet, sill, roof.
KINDS = [
    [(0.2, 0.5, 0.80, 0.96, 1.46), (-2.2, -2.3, -2.3, -1.7, -0.8), (2.3, 2.3, 2.2, 1.0, 0.1)],
    [(0.2, 0.6, 0.98, 1.08, 1.72), (-2.2, -2.3, -2.3, -2.2, -1.9), (2.2, 2.3, 2.1, 1.0, 0.3)],
    [(0.2, 0.5, 0.80, 0.95, 1.50), (-1.9, -2.0, -2.0, -1.9, -1.4), (2.0, 2.0, 1.9, 1.0, 0.2)],
    [(0.3, 0.6, 1.04, 1.15, 1.80), (-2.5, -2.6, -2.6, -0.6, -0.4), (2.5, 2.6, 2.4, 1.1, 0.5)],
]
COS, SIN = np.cos(np.radians(range(361))), np.sin(np.radians(range(361)))


def size(text: str) -> tuple[int, int]:
    """'1918x1280' -> (1918, 1280), width and height in pixels."""
    width, height = map(command_line.positive_int, text.split('x'))
    return width, height


def arguments(given: list[str], **paths) -> list[str]:
    """NAME=value arguments: SETTINGS, the paths, then the given ones, except for the paths."""
    given = [argument for argument in given if argument.partition('=')[0] not in paths]
    return [f'{name}={value}' for name, value in (SETTINGS | paths).items()] + given


def draw_car(image_folder, truths, name, car, side, size, seed) -> str:
    """Write image and mask of a car from side 1 (its front) to 16; returns its row for the CSV."""
    look, rng = np.random.default_rng([seed, car]), np.random.default_rng([seed, car, side])
    height, rear, front, _ = shape = [*KINDS[car % len(KINDS)], (0.86, 0.9, 0.9, 0.87, 0.67)]
    paint = 0.76 if car % 6 == 5 else 0.04 + 0.5 * look.random(3) ** 2  # every sixth is pale
    glass, wall, floor, light = look.uniform((0.1, 0.66, 0.44, 0.8), (0.4, 0.76, 0.52, 1.2))
    angle = np.radians(22.5 * (side - 1) + look.uniform(-5, 5))
    columns, rows = 3 * np.array(size)  # made smaller at the end, for smooth edges
    canvas = np.zeros((rows, columns, 4), np.uint8)  # RGB, and 255 where the car is
    tones = np.interp(np.linspace(0, 1, rows), [0, 0.43, 0.52], [wall - 0.1, wall, floor])
    canvas[..., :3] = np.uint8(255 * tones)[:, None, None]

    def fill(x, y, z, colour, opacity=1):
        """Fill the convex hull of points, in metres towards the nose, to the left, and up."""
        metre, cos, sin = min(columns, 1.5 * rows) / 6.2, np.cos(angle), np.sin(angle)
        column = columns / 2 + metre * (cos * y - sin * x)
        row = 0.66 * rows + metre * (0.13 * (cos * x + sin * y) - z)  # seen from above a little
        hull = cv2.convexHull(np.int32(np.broadcast_arrays(column, row)).reshape(2, -1).T)
        cv2.fillPoly(canvas, [hull], 255 * np.append(colour * np.ones(3), opacity))

    for grow in np.linspace(1.4, 0.9, 40):  # the shadow, darker inwards
        fill(grow * front[1] * COS, grow * 0.9 * SIN, 0, floor * (1 - 3.2 * (1.4 - grow) ** 2), 0)
    wheel, axles, near = 0.22 * height[4], (0.62 * rear[1], 0.62 * front[1]), np.sign(np.sin(angle))
    for y in (-0.9, 0.9):  # mirrors and tyres, in part behind the body
        fill(front[3] - 0.25, y * (1.06 + 0.17 * COS), height[3] + 0.07 + 0.08 * SIN, 0.8 * paint)
        for x in axles:
            fill(x + wheel * COS, y * np.array([[0.72], [0.97]]), wheel + wheel * SIN, 0.05)
    # The body is a pile of slices, and parts lie on it: from a level of KINDS to another, from
    # one direction to another in degrees (0: nose, 90: side, 180: tail), direction faced, colour.
    parts = []
    for low in np.arange(64) / 16:
        tone, high = np.interp(low, range(5), [0.1, 0.75, 1, 1.05, 1]) * paint, low + 1 / 16
        parts += [(low, high, 0, 361, None, tone), (low, high, 51, 130, 90, 0.85 * tone)]
    parts += [
        (3.06, 3.84, 0, 40, 0, glass), (3.06, 3.84, 53, 87, 90, glass),  # windows
        (3.06, 3.84, 92, 127, 90, glass), (3.06, 3.84, 140, 181, 180, glass),
        (1.2, 1.7, 27, 48, 0, 0.9), (1.2, 1.7, 133, 155, 180, (0.5, 0, 0)),  # lamps
        (0.8, 1.7, 0, 25, 0, 0.05), (0.8, 1, 0, 15, 0, 0.6), (0.4, 2, 89, 91, 90, 0.5 * paint),
    ]  # fmt: skip
    for low, high, start, stop, face, colour in parts:
        z, back, ahead, wide = (np.interp([[low], [high]], range(5), line) for line in shape)
        x, y = np.clip([1.27 * COS[start:stop], 1.27 * SIN[start:stop]], -1, 1)  # a round oblong
        for sign in (-1, 1):
            if face is None or np.cos(np.radians(sign * face) - angle) > 0.1:  # it is seen
                fill((ahead + back + (ahead - back) * x) / 2, sign * wide * y, z, colour)
    for x in axles:
        for radius, tone in ((1, 0.08), (0.7, 0.56), (0.55, 0.05), (0.48, 0.5), (0.2, 0.05)):
            fill(x + radius * wheel * COS, 0.9 * near, wheel + radius * wheel * SIN, tone)
    fill(rear[4] + np.array([0.3, 0.34, 0.1]), 0, height[4] + np.array([0, 0, 0.4]), 0.05)
    canvas = cv2.resize(canvas, size, interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(canvas[..., :3], (0, 0), 0.6) * np.linspace(1, light, size[0])[:, None]
    image = np.uint8((image + 3 * rng.standard_normal(image.shape, np.float32)).clip(0, 255))
    mask = np.uint8(canvas[..., 3] > 127)
    Image.fromarray(image).save(image_folder / f'{name}.jpg', quality=90)
    Image.fromarray(mask).save(truths / f'{name}_mask.gif', palette=bytes([0, 0, 0, 255, 255, 255]))
    return f'{name}.jpg,{images.rle_encode(mask)}'


def make_dataset(folder, cars=CARS, test_cars=2, size=(480, 320), seed=42) -> None:
    """Draw cars from 16 sides each into a folder, in Carvana's layout. The seed decides all."""
    folder, rng, jobs = config.path(folder), np.random.default_rng(seed), []
    for car in range(cars + test_cars):
        names = ('train_hq', 'train_masks') if car < cars else ('test_hq', 'test_masks_truth')
        paths, name = [folder / name for name in names], rng.bytes(6).hex()
        for path in paths:
            path.mkdir(parents=True, exist_ok=True)
        jobs += [(*paths, f'{name}_{side:02}', car, side, size, seed) for side in range(1, 17)]
    with ProcessPoolExecutor(min(8, config.cpu_count()), get_context('spawn')) as pool:
        rows = list(tqdm(pool.map(draw_car, *zip(*jobs)), 'cars', len(jobs), disable=None))
    test_rows = [f'{row.partition(",")[0]},1 1' for row in rows[16 * cars :]]
    for name, table in (('train_masks', rows[: 16 * cars]), ('sample_submission', test_rows)):
        (folder / f'{name}.csv').write_text('\n'.join(['img,rle_mask', *sorted(table)]) + '\n')


def run(script: str, *argument_lists: list[str]) -> None:
    """Run a script of this folder once for each list of arguments, side by side.

    Exits with the status of a run that fails, after the others have ended.
    """
    # Each run has its share of the cores: one thread uses a core better than two use two.
    threads = max(1, config.cpu_count() // len(argument_lists))
    environment = {'OMP_NUM_THREADS': str(threads)} | os.environ

    def run_once(words: list[str]) -> int:
        command = [sys.executable, config.path(f'src/{script}'), *words]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            for line in process.stdout:  # whole lines: progress bars would overwrite each other
                print(line, end='', flush=True)
        return process.returncode

    print(f'\n--- python src/{script}', flush=True)
    with ThreadPoolExecutor(len(argument_lists)) as pool:
        failed = [status for status in pool.map(run_once, argument_lists) if status]
    if failed:
        sys.exit(failed[0])


def main(options) -> None:
    paths = {name: f'{getattr(config, name)}/demo' for name in ('INPUT', 'OUTPUT', 'LOGS_PATH')}
    make_dataset(paths['INPUT'], options.cars, options.test_cars, options.size, config.SEED)
    print(f'{paths["INPUT"]}: {options.cars} cars to train on, {options.test_cars} to predict')
    if options.only_draw:
        return
    given = arguments(options.arguments, **paths)
    run('folds.py', given)
    run('Lightning_trainer.py', *([*given, f'FOLDS=[{fold}]'] for fold in config.FOLDS))
    run('Lightning_tester.py', given)
    print(f'\nthe pictures are in {paths["OUTPUT"]}')


OPTIONS = {
    '--cars': {'type': command_line.positive_int, 'default': CARS},
    '--test-cars': {'type': command_line.positive_int, 'default': 2},
    '--size': {'type': size, 'default': (480, 320)},
    '--only-draw': {'action': 'store_true'},
}
if __name__ == '__main__':
    command_line.run(main, __doc__, OPTIONS, arguments([]))
