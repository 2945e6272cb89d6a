"""Training speed and start-up against the original's own way and against the imports; ratios.

    python tests/bench_training.py [--steps 6] [--crop 256] [--size 1918x1280] [--repeats 3]

The baseline trains the same network as the original did: PIL and albumentations with Normalize in
this process (NUM_WORKERS=0), float tensors, the default memory layout, plain Adam, in float32 and with
16 handed to Lightning as it is (bfloat16 on a CPU). All train at 256 pixels (--crop) on 1918x1280
images of demo.py, in turn, three times; medians. The last two rows are the real input (CACHE=True) and
the same batches already on the device. Start-up is the time from `python Lightning_trainer.py` to the
end of a first epoch of one step of 32 pixels, against the imports alone; the first such pair fills the
disk cache and is not counted.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'src'))

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

BATCH, WARM_UP = 4, 3


class OriginalModel(pl.LightningModule):
    """The network, trained as the original did."""

    def __init__(self, names: list[str], size: int):
        super().__init__()
        self.model, self.items = smp.Unet('resnet34', encoder_weights=None), NamedItems(names, size)

    def training_step(self, batch: dict, batch_index: int) -> torch.Tensor:
        p = self.model(batch['image']).sigmoid().float()
        both = (p * batch['mask']).sum()
        return 1 - both / (p.sum() + batch['mask'].sum() - both)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.items, BATCH, shuffle=True, drop_last=True)


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


def startup(folder: str, words: list[str]) -> tuple[float, float]:
    """Seconds until the first epoch of one step is over, and of the imports alone."""
    script = Path(config.__file__).with_name('Lightning_trainer.py')
    words = [*words, 'CROP_SIZE=32', 'EPOCHS=1', f'LOGS_PATH={folder}/logs', 'NUM_WORKERS=0']
    words += ['FOLDS=[0]', 'CACHE=True', 'TRAIN_BATCH_SIZE=16', 'VAL_BATCH_SIZE=16', 'RESUME=False']
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, script, *words], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if 'epoch   1/1' in line:
            break
    ours = time.perf_counter() - start
    process.communicate()
    packages = 'torch, pytorch_lightning, segmentation_models_pytorch, albumentations'
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', f'import {packages}'], check=True)
    return ours, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--steps', type=int, default=6)
    parser.add_argument('--crop', type=int, default=256)
    parser.add_argument('--size', type=demo.size, default=(1918, 1280))
    parser.add_argument('--repeats', type=int, default=3)
    options = parser.parse_args()
    os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'
    runtime.hide_warnings()
    with tempfile.TemporaryDirectory() as folder:
        demo.make_dataset(folder, cars=4, test_cars=0, size=options.size)
        words = [f'INPUT={folder}', f'OUTPUT={folder}/output', 'N_FOLDS=2', 'ENCODER_WEIGHTS=None']
        words += [
            f'CROP_SIZE={options.crop}',
            f'TRAIN_BATCH_SIZE={BATCH}',
            'ACCUMULATE_GRAD_BATCHES=1',
        ]
        command_line.override(words)
        folds.main()
        names = folds.read_folds().img.tolist()
        ours = runtime.precision()[0]

        def port():
            return CarvanaModel([0, 1], [0])

        runs = {
            'PRECISION=16': (port, ours, False),
            "PRECISION='bf16'": (port, 'bf16-mixed', False),
            'the original way at 32': (
                lambda: OriginalModel(names, options.crop),
                '32-true',
                False,
            ),
            'the original way at 16': (lambda: OriginalModel(names, options.crop), 16, False),
            'PRECISION=16 CACHE=True': (port, ours, True),
            'PRECISION=16, batches on the device': (lambda: ResidentModel([0, 1], [0]), ours, True),
        }
        rates = {name: [] for name in runs}
        for _ in range(options.repeats):
            for name, (make, precision, config.CACHE) in runs.items():
                rates[name].append(images_per_second(make(), options.steps, precision))
        for name, values in rates.items():
            ran = f'  (runs in {ours})' if name == 'PRECISION=16' else ''
            print(f'{name:36s}{statistics.median(values):6.2f} images/s{ran}', flush=True)
        if options.repeats > 1:
            startup(folder, words)
        times = [startup(folder, words) for _ in range(options.repeats)]
        first, imports = (statistics.median(seconds) for seconds in zip(*times))
        print(
            f'start to first epoch {first:.1f} s, imports {imports:.1f} s, ratio {first / imports:.2f}'
        )


if __name__ == '__main__':
    main()
