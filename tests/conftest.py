"""Shared pieces: settings that are put back after each test, and a tiny data set like Carvana's."""

import os
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'
# On a busy machine, threads make small tensors many times slower. Processes inherit it.
os.environ['OMP_NUM_THREADS'] = '1'

import numpy as np
import pytest
import torch
from PIL import Image

import callbacks
import command_line
import config
import files

SRC = Path(config.__file__).parent


@contextmanager
def own_config(*words: str):
    """config.py with these NAME=value words, then as it was before."""
    before = dict(vars(config))
    try:
        command_line.override(words)
        yield
    finally:
        vars(config).update(before)


@pytest.fixture(autouse=True)
def restore_config(monkeypatch):
    """Whatever a test sets in config.py, the next one meets the defaults. Folders are listed anew,
    as a test may change its files."""
    monkeypatch.setattr(files, 'walk', files.walk.__wrapped__)
    with own_config():
        yield


def draw_ellipse(rng, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A bright ellipse on a dark, noisy ground: uint8 image (H, W, 3) and mask (H, W) of 0/1."""
    y, x = np.mgrid[:height, :width]
    centre, radii = rng.uniform(0.4, 0.6, 2), rng.uniform(0.2, 0.35, 2)
    mask = ((y / height - centre[0]) / radii[0]) ** 2 + (
        (x / width - centre[1]) / radii[1]
    ) ** 2 < 1
    image = np.where(mask[..., None], rng.uniform(150, 220, 3), rng.uniform(20, 80, 3))
    return np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8), mask.astype(
        'uint8'
    )


def save_mask_gif(file: Path, mask: np.ndarray) -> None:
    """As Carvana's: palette indices 0 and 1, black and white."""
    picture = Image.fromarray(mask, mode='L').convert('P')
    picture.putdata(mask.ravel().tolist())
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save(file)


def make_carvana(folder: Path, cars: int = 5, sides: int = 2, test: int = 2, size=(48, 64)) -> Path:
    """A data set in the Carvana layout of `cars` times `sides` training images; returns `folder`."""
    rng = np.random.default_rng(0)
    for name in ('train_hq', 'train_masks', 'test_hq'):
        (folder / name).mkdir(parents=True)
    for car in range(cars):
        for side in range(sides):
            name = f'{car:012x}_{side + 1:02d}'
            image, mask = draw_ellipse(rng, *size)
            Image.fromarray(image).save(folder / 'train_hq' / f'{name}.jpg', quality=95)
            save_mask_gif(folder / 'train_masks' / f'{name}_mask.gif', mask)
    for car in range(test):
        image, _ = draw_ellipse(rng, *size)
        Image.fromarray(image).save(folder / 'test_hq' / f'{car + 100:012x}_01.jpg', quality=95)
    return folder


@pytest.fixture
def carvana(tmp_path):
    """A tiny data set and settings for it, in this process; returns the folder."""
    make_carvana(tmp_path / 'input')
    command_line.override(settings(tmp_path))
    return tmp_path


def settings(folder: Path) -> list[str]:
    """NAME=value words for the tiny data set in `folder`/input: seconds, no download, no workers."""
    return [
        f'INPUT={folder}/input',
        f'OUTPUT={folder}/output',
        f'LOGS_PATH={folder}/logs',
        'CROP_SIZE=32',
        'MODEL_NAME=smp_linknet_tu-test_resnet',
        'ENCODER_WEIGHTS=None',
        'ACCUMULATE_GRAD_BATCHES=1',
        'EPOCHS=1',
        'NUM_WORKERS=0',
        'ACCELERATOR=cpu',
    ]


class Tiny(torch.nn.Module):
    """float16 convolutions are slow on a CPU."""

    def __init__(self, weights=None, channels=3, classes=1):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(channels, 4, 3, padding=1),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Conv2d(4, classes, 1),
        )

    def forward(self, x):
        return self.layers(x)


def model_of(input_size, scale=None) -> SimpleNamespace:
    """What reading images needs to know of a model."""
    hparams = SimpleNamespace(SCALE=scale)
    return SimpleNamespace(input_size=input_size, mask_rule=(), hparams=hparams)


@contextmanager
def dies_in_epoch(epoch: int):
    """A training in this process ends with an error as it begins the epoch, counted from 0."""
    start_epoch = callbacks.EpochLog.on_train_epoch_start

    def die(log, trainer, module):
        if trainer.current_epoch == epoch:
            raise ZeroDivisionError
        start_epoch(log, trainer, module)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(callbacks.EpochLog, 'on_train_epoch_start', die)
        yield


def last_checkpoint(logs: Path) -> dict:
    """last.ckpt of the only run in a LOGS_PATH."""
    return torch.load(logs / 'version_0/checkpoints/last.ckpt', weights_only=True)


class Evil:
    """Pickled, code that a file of weights could hold."""

    def __reduce__(self):
        return exec, ('raise AssertionError("code in a pickle was run")',)


def environment() -> dict:
    """Of a script's process: no model hub."""
    return {**os.environ, 'HF_HUB_OFFLINE': '1'}


def start(script, *words, python=(sys.executable,), variables=(), **keywords) -> subprocess.Popen:
    """Start a script, by default one of src/, as a user does, in a process group of its own."""
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **keywords}
    command = [*python, SRC / script, *words]
    env = environment() | dict(variables)
    return subprocess.Popen(command, text=True, env=env, start_new_session=True, **pipes)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for a script's end; what it printed is in stdout and stderr."""
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_script(script, *words, **keywords) -> subprocess.CompletedProcess:
    return finish(start(script, *words, **keywords))


def run_here(monkeypatch, script: str, *words: str) -> None:
    """Run a script of src/ in this process, where the libraries are already loaded."""
    monkeypatch.setattr(sys, 'argv', [script, *words])
    runpy.run_path(str(SRC / script), run_name='__main__')
