"""A made-up data set in the Carvana layout, and the three steps run on it: minutes, no download.

Reads   nothing.
Writes  INPUT/demo: train_hq, train_masks, train_masks.csv, test_hq, sample_submission.csv, and
        test_masks_truth, which Kaggle would keep; OUTPUT/demo, LOGS_PATH/demo: what the steps write.

    python demo.py                                    draw the cars, then run the three steps
    python demo.py FOLDS=[0] EPOCHS=2                 with other constants for the steps
    python demo.py --cars 40 --test-cars 8 --size 1918x1280       more cars, larger images
    python demo.py --cars 318 --size 1918x1280 --only-draw --folder /tmp/carvana

The steps run with small settings of MODEL_NAME, CROP_SIZE, N_FOLDS, FOLDS, AUGMENTATION, EPOCHS,
LR, ACCUMULATE_GRAD_BATCHES, CACHE, and ENCODER_WEIGHTS=None, so that no connection is needed.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import config

SETTINGS = {
    'MODEL_NAME': 'smp_linknet_tu-regnetx_002',
    'ENCODER_WEIGHTS': None,
    'CROP_SIZE': (96, 160),
    'N_FOLDS': 3,
    'FOLDS': [0, 1, 2],
    'AUGMENTATION': 'flip',
    'EPOCHS': 9,
    'LR': 0.002,
    'ACCUMULATE_GRAD_BATCHES': 1,
    'CACHE': True,
}
CARS = 18
STEPS = ('folds.py', 'Lightning_trainer.py', 'Lightning_tester.py')


def size(text: str) -> tuple[int, int]:
    """'1918x1280' -> (1918, 1280), width and height in pixels."""
    match = re.fullmatch(r'(\d+)x(\d+)', text)
    if match is None:
        raise argparse.ArgumentTypeError('write WIDTHxHEIGHT, such as 1918x1280')
    return int(match[1]), int(match[2])


def words(given: list[str], **paths) -> list[str]:
    """NAME=value words of the demo's settings, but for the given ones; the paths are the demo's own."""
    given = [word for word in given if word.partition('=')[0] not in ('INPUT', *paths)]
    return [f'{name}={value}' for name, value in (SETTINGS | paths).items()] + given


if __name__ == '__main__':
    import command_line

    OPTIONS = command_line.start(
        __doc__,
        {
            '--cars': {'type': command_line.positive, 'default': CARS},
            '--test-cars': {'type': command_line.positive, 'default': 2},
            '--size': {'type': size, 'default': (480, 320)},
            '--folder': {},
            '--only-draw': {'action': 'store_true'},
        },
        words([]),
    )

import demo_cars


def main() -> None:
    start = time.monotonic()
    cars, unseen = OPTIONS.cars, OPTIONS.test_cars
    folder = config.path(OPTIONS.folder or f'{config.INPUT}/demo')
    demo_cars.make_dataset(folder, cars, unseen, OPTIONS.size, config.SEED)
    print(f'{cars} cars and {unseen} unseen ones from 16 sides in {folder}', flush=True)
    if OPTIONS.only_draw:
        return
    output, logs = f'{config.OUTPUT}/demo', f'{config.LOGS_PATH}/demo'
    given = words(OPTIONS.words, INPUT=folder, OUTPUT=output, LOGS_PATH=logs)
    for step in STEPS:
        print(f'\n--- python {step}', flush=True)
        script = Path(__file__).with_name(step)
        status = subprocess.run([sys.executable, str(script), *given]).returncode
        if status:
            sys.exit(status)
    minutes = (time.monotonic() - start) / 60
    print(
        f'\n{minutes:.1f} minutes; pictures in {config.OUTPUT}/demo: oof_worst.png, test_samples.png'
    )


if __name__ == '__main__':
    command_line.run(main)
