"""Validates a model with weights made from a seed, as one of any number of processes, and prints
val_dice: run by test_devices.py, also under torchrun.

    python tests/validate_alone.py DEVICES=2 STRATEGY=ddp ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'src'))

import pytorch_lightning as pl

import command_line
import runtime
from Lightning_module import CarvanaModel


def main() -> None:
    runtime.hide_warnings()
    pl.seed_everything(3, verbose=False)
    model = CarvanaModel([1, 2], [0])
    trainer = runtime.make_trainer()
    trainer.validate(model, verbose=False)
    if trainer.is_global_zero:
        scores = {name: value.item() for name, value in trainer.callback_metrics.items()}
        print(f'scores {scores["val_dice"]:.9f} {scores["val_iou"]:.9f} {scores["val_loss"]:.9f}')


if __name__ == '__main__':
    command_line.run(main, __doc__)
