"""Training speed against the original's own way, start-up against the imports, and the overhead of
an epoch against a bare loop; ratios.

    python tests/bench_training.py               some ten minutes on two cores
    python tests/bench_training.py --smallest    only shows that every row can be measured

The baseline trains the same network as the original did: PIL and albumentations with Normalize in
this process (NUM_WORKERS=0), float tensors, the default memory layout, plain Adam, in float32 and with
16 handed to Lightning as it is (bfloat16 on a CPU). All train at 256 pixels on 1918x1280 images of
demo.py, in turn, three times; medians. Two more rows are the real input (CACHE=True) and the same
batches already on the device. Start-up is the time from `python Lightning_trainer.py` to the
end of a first epoch of one step of 32 pixels, against the imports alone. The overhead is what
Lightning, callbacks, checkpoints and pictures cost: an epoch of `python Lightning_trainer.py` with the
demo's settings on its cars, against the same batches in a bare loop; the first epoch is not timed.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'src'))
os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'
os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # as in Lightning_trainer.py, before torch

import numpy as np
import pytorch_lightning as pl
import segmentation_models_pytorch as smp
import torch
from bench_pipeline import OriginalWay
from torch.utils.data import DataLoader

import command_line
import config
import demo
import folds
import runtime
from Lightning_module import CarvanaModel
from test_precision import Clock

SCRIPT = Path(config.__file__).with_name('Lightning_trainer.py')
SIZE, BATCH, WARM_UP = 256, 4, 3


class OriginalModel(pl.LightningModule):
    """The network, trained as the original did."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.model, self.names = smp.Unet('resnet34', encoder_weights=None), names

    def training_step(self, batch: dict, batch_index: int) -> torch.Tensor:
        p = self.model(batch['image']).sigmoid().float()
        both = (p * batch['mask']).sum()
        return 1 - both / (p.sum() + batch['mask'].sum() - both)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            NamedItems(self.names, config.CROP_SIZE), BATCH, shuffle=True, drop_last=True
        )


class NamedItems(OriginalWay):
    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index), 'img': self.names[index]}


class ResidentModel(CarvanaModel):
    """CarvanaModel whose batches lie on the device already."""

    def train_dataloader(self) -> DataLoader:
        batches = list(super().train_dataloader())
        batches = [b for b in batches if len(b['img']) == BATCH]
        for batch in batches:
            batch.update({key: batch[key].to(self.device) for key in ('image', 'mask')})
        return DataLoader(batches, batch_size=None)


def images_per_second(model, steps: int, precision) -> float:
    clock = Clock(WARM_UP)
    trainer = runtime.make_trainer(
        precision=precision,
        max_steps=WARM_UP + steps,
        limit_val_batches=0,
        callbacks=[clock],
        benchmark=True,
    )
    trainer.fit(model)
    return clock.images / clock.seconds


def arguments(folder: str, *given: str) -> list[str]:
    """NAME=value arguments for the images in a folder, then the given ones."""
    words = [f'INPUT={folder}', f'OUTPUT={folder}/output', 'N_FOLDS=2', 'ENCODER_WEIGHTS=None']
    return [*words, 'ACCUMULATE_GRAD_BATCHES=1', *given]


def speed(folder: str, rounds: int, steps: int, size: int) -> None:
    command_line.override(arguments(folder, f'CROP_SIZE={size}', f'TRAIN_BATCH_SIZE={BATCH}'))
    folds.main()
    names = folds.read_folds().img.tolist()
    ours = runtime.precision()[0]

    def port():
        return CarvanaModel([0, 1], [0])

    runs = {
        'PRECISION=16': (port, ours, False),
        "PRECISION='bf16'": (port, 'bf16-mixed', False),
        'the original way at 32': (lambda: OriginalModel(names), '32-true', False),
        'the original way at 16': (lambda: OriginalModel(names), 16, False),
        'PRECISION=16 CACHE=True': (port, ours, True),
        'PRECISION=16, batches on the device': (lambda: ResidentModel([0, 1], [0]), ours, True),
    }
    rates = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (make, precision, config.CACHE) in runs.items():
            rates[name].append(images_per_second(make(), steps, precision))
    for name, values in rates.items():
        ran = f'  (runs in {ours})' if name == 'PRECISION=16' else ''
        print(f'{name:36s}{statistics.median(values):6.2f} images/s{ran}', flush=True)


def epoch_ends(words: list[str]) -> list[float]:
    """When `python Lightning_trainer.py` printed the line of each epoch, in seconds of the clock."""
    process = subprocess.Popen([sys.executable, SCRIPT, *words], stdout=subprocess.PIPE, text=True)
    ends = [time.perf_counter() for line in process.stdout if re.search(r'epoch +\d+/', line)]
    process.communicate()
    return ends


def startup(folder: str) -> tuple[float, float]:
    """Seconds until the first epoch of one step is over, and of the imports alone."""
    given = ['CROP_SIZE=32', 'EPOCHS=1', f'LOGS_PATH={folder}/logs', 'NUM_WORKERS=0', 'FOLDS=[0]']
    given += ['CACHE=True', 'TRAIN_BATCH_SIZE=16', 'VAL_BATCH_SIZE=16']
    words = arguments(folder, *given)
    start = time.perf_counter()
    ours = epoch_ends(words)[0] - start
    packages = 'torch, pytorch_lightning, segmentation_models_pytorch, albumentations'
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', f'import {packages}'], check=True)
    return ours, time.perf_counter() - start


def bare_epochs(epochs: int) -> list[float]:
    """Seconds of each epoch of a bare loop over the same batches, in training and in validation."""
    model = CarvanaModel([1, 2], [0])
    optimizer = model.build_optimizer(model.parameters())
    train, validation = model.train_dataloader(), model.val_dataloader()
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        model.train()
        for batch in train:
            loss = model.loss(model(batch['image']), batch['mask'])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            for batch in validation:
                model.loss(model(batch['image']), batch['mask'])
        seconds.append(time.perf_counter() - start)
    return seconds


def overhead(folder: str, cars: int, rounds: int, epochs: int) -> tuple[float, float]:
    """Median seconds of an epoch of the demo: of the trainer, and of the bare loop."""
    demo.make_dataset(folder, cars, test_cars=0)
    paths = {name: f'{folder}/{name.lower()}' for name in ('OUTPUT', 'LOGS_PATH')}
    words = demo.arguments(['FOLDS=[0]', f'EPOCHS={epochs}'], INPUT=folder, **paths)
    command_line.override(words)
    folds.main()
    ours, bare = [], []
    for _ in range(rounds):
        ours += np.diff(epoch_ends(words)).tolist()
        bare += bare_epochs(epochs)[1:]
    return statistics.median(ours), statistics.median(bare)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--smallest', action='store_true')
    smallest = parser.parse_args().smallest
    runtime.hide_warnings()
    # First, as the bare loop runs in this process: later, memory of the other rows would speed it up.
    with tempfile.TemporaryDirectory() as folder:
        if smallest:
            ours, bare = overhead(folder, cars=3, rounds=1, epochs=2)
        else:
            ours, bare = overhead(folder, demo.CARS, rounds=3, epochs=5)
        print(f'an epoch of the demo {ours:.2f} s, bare {bare:.2f} s, ratio {ours / bare:.2f}')
    with tempfile.TemporaryDirectory() as folder:
        size = (96, 64) if smallest else (1918, 1280)
        demo.make_dataset(folder, cars=4, test_cars=0, size=size)
        if smallest:
            speed(folder, rounds=1, steps=1, size=32)
        else:
            speed(folder, rounds=3, steps=6, size=SIZE)
        if not smallest:
            startup(folder)  # fills the disk cache
        times = [startup(folder) for _ in range(1 if smallest else 3)]
        first, imports = (statistics.median(seconds) for seconds in zip(*times))
        print(
            f'start to first epoch {first:.1f} s, imports {imports:.1f} s, ratio {first / imports:.2f}',
            flush=True,
        )


if __name__ == '__main__':
    main()
