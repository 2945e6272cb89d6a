"""What annealing buys: SCHEDULE times OPTIMIZER, three seeds each, as a Markdown table.

    python tests/bench_schedules.py                                     on the cars of demo.py
    python tests/bench_schedules.py TRAIN_PATH=... MASK_PATH=... ...    on other images
    SEEDS=1 CARS=3 OPTIMIZERS=Adam python tests/bench_schedules.py EPOCHS=1     a short trial

Every run trains fold 0 with the demo's settings and the given constants, on the same split. Columns:
the val_dice of the last epoch and of the best one, mean and standard deviation over the seeds; the
difference of the last epoch's to the first row, the original's way, seed by seed.
"""

import itertools
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'src'))
os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # as in Lightning_trainer.py, before torch

import pandas as pd

import callbacks
import command_line
import config
import demo
import folds
import Lightning_trainer

SEEDS = range(1, 1 + int(os.environ.get('SEEDS', 3)))
CARS = int(os.environ.get('CARS', demo.CARS))
SCHEDULES = (None, 'poly', 'cosine')
OPTIMIZERS = os.environ.get('OPTIMIZERS', 'Adam,AdamW').split(',')


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = {'INPUT': folder, 'OUTPUT': folder, 'LOGS_PATH': f'{folder}/logs', 'FOLDS': [0]}
        words = [*demo.arguments([], **paths), *sys.argv[1:]]
        command_line.override(words)
        if not any(word.startswith(('INPUT=', 'TRAIN_PATH=')) for word in sys.argv):
            demo.make_dataset(Path(folder), cars=CARS, seed=config.SEED)
        folds.main()
        last, best = {}, {}
        for row in itertools.product(OPTIMIZERS, SCHEDULES):
            histories = [train(words, seed, *row) for seed in SEEDS]
            last[row] = pd.Series([history.val_dice.iloc[-1] for history in histories])
            best[row] = pd.Series([history.val_dice.max() for history in histories])
            print(row, last[row].round(4).tolist(), best[row].round(4).tolist(), flush=True)
    print('| OPTIMIZER | SCHEDULE | last epoch | best epoch | last epoch, difference |')
    print('|---|---|---|---|---|')
    for row, values in last.items():
        difference = values - next(iter(last.values()))
        print('|', ' | '.join([*map(str, row), *map(spread, (values, best[row], difference))]), '|')


def train(words: list[str], seed: int, optimizer: str, schedule) -> pd.DataFrame:
    """metrics.csv of a training of fold 0."""
    given = [f'SEED={seed}', f'OPTIMIZER={optimizer}', f'SCHEDULE={schedule}']
    command_line.override([*words, *given])
    Lightning_trainer.main()
    return pd.read_csv(callbacks.version_folders()[-1] / 'metrics.csv')


def spread(values: pd.Series) -> str:
    return f'{values.mean():.4f} +- {values.std():.4f}'


if __name__ == '__main__':
    main()
