"""A made-up data set in the Carvana layout, and the three steps run on it: minutes, no download.

Reads   nothing.
Writes  INPUT/demo: train_hq, train_masks, train_masks.csv, test_hq, sample_submission.csv, and
        test_masks_truth, which Kaggle would keep; OUTPUT/demo, LOGS_PATH/demo: what the steps write.

    python demo.py                                    draw the cars, then run the three steps
    python demo.py FOLDS=[0] EPOCHS=2                 with other constants for the steps
    python demo.py --cars 40 --size 1918x1280         more cars, larger images
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


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--cars', type=int, default=CARS)
    parser.add_argument('--test-cars', type=int, default=2)
    parser.add_argument('--size', type=size, default=(480, 320))
    parser.add_argument('--folder', default=None)
    parser.add_argument('--only-draw', action='store_true')
    parser.add_argument('words', nargs='*')
    return parser.parse_args()


def size(text: str) -> tuple[int, int]:
    """'1918x1280' -> (1918, 1280), width and height in pixels."""
    match = re.fullmatch(r'(\d+)x(\d+)', text)
    if match is None:
        raise argparse.ArgumentTypeError('write WIDTHxHEIGHT, such as 1918x1280')
    return int(match[1]), int(match[2])


def words(folder: Path) -> list[str]:
    """NAME=value words of the demo's settings, for the cars in a folder."""
    return [*(f'{name}={value}' for name, value in SETTINGS.items()), f'INPUT={folder}']


if __name__ == '__main__':
    import command_line

    if {'-h', '--help'} & set(sys.argv[1:]):
        command_line.start(__doc__, ['--help'])
    OPTIONS = options()
    command_line.start(__doc__, OPTIONS.words)

import demo_cars


def main() -> None:
    start = time.monotonic()
    cars, unseen = OPTIONS.cars, OPTIONS.test_cars
    folder = config.path(OPTIONS.folder or f'{config.INPUT}/demo')
    demo_cars.make_dataset(folder, cars, unseen, OPTIONS.size, config.SEED)
    print(f'{cars} cars and {unseen} unseen ones from 16 sides in {folder}', flush=True)
    if OPTIONS.only_draw:
        return
    given = [*words(folder), f'OUTPUT={config.OUTPUT}/demo', f'LOGS_PATH={config.LOGS_PATH}/demo']
    given += OPTIONS.words
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
