"""Every benchmark runs, at its smallest size, and prints its rows. What they measure is not checked."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import bench_gpu
import pytest
import torch
from conftest import environment

import config
import demo

SMALL = ['--size', '96x64', '--repeats', '1']
RATE = r'[\d.]+ images/s'
# Script -> arguments for its smallest size, and the rows that it prints.
BENCHMARKS = {
    'bench_losses': (
        ['CE', 'IoULoss', '--steps', '1', '--size', '96x64'],
        [r'\| CE \| 0\.\d{4} \| [\d.]+ \|', r'\| IoULoss \| 0\.\d{4} \| [\d.]+ \|'],
    ),
    'bench_pipeline': (
        SMALL,
        [
            *(
                rf'CROP_SIZE={size} +{RATE}, the original way +[\d.]+, ratio'
                for size in (1024, 256)
            ),
            rf'CROP_SIZE=512 CACHE=True +{RATE}',
            r'reduced JPEG decoding: mean difference [\d.]+ of 255',
        ],
    ),
    'bench_prediction': (
        ['--images', '5', *SMALL],
        [
            rf'CROP_SIZE 512: predicted {RATE}, only decoded {RATE}, ratio',
            rf'CROP_SIZE 1024: predicted {RATE}',
            r'run lengths of a mask [\d.]+ ms, its JPEG [\d.]+ ms',
        ],
    ),
    'bench_scale': (
        ['EPOCHS=1', 'MODEL_NAME=smp_linknet_tu-test_resnet'],
        [r'\| SEED \| SCALE=None \| SCALE=1.0 \|', r'\| 1 \| [01]\.\d+ \| [01]\.\d+ \|'],
    ),
    'bench_schedules': (
        ['EPOCHS=1', 'MODEL_NAME=smp_linknet_tu-test_resnet', 'CROP_SIZE=32', 'NUM_WORKERS=0'],
        [rf'\| Adam \| {name} \| 0\.\d+ \+- ' for name in ('None', 'poly', 'cosine')],
    ),
    'bench_training': (
        ['--smallest'],
        [
            rf'PRECISION=16 +{RATE}  \(runs in 32-true\)',
            rf"PRECISION='bf16' +{RATE}",
            rf'the original way at 32 +{RATE}',
            rf'the original way at 16 +{RATE}',
            rf'PRECISION=16 CACHE=True +{RATE}',
            rf'PRECISION=16, batches on the device +{RATE}',
            r'start to first epoch [\d.]+ s, imports [\d.]+ s, ratio',
            r'an epoch of the demo [\d.]+ s, bare [\d.]+ s, ratio',
        ],
    ),
}


# These train in processes of their own. They run side by side, and beside the others.
SLOW = ('bench_scale', 'bench_schedules', 'bench_training', 'bench_gpu')
HERE = Path(__file__).parent


@pytest.fixture(scope='module')
def running(tmp_path_factory):
    """The processes of SLOW, and the file of bench_gpu."""
    file = tmp_path_factory.mktemp('gpu') / 'gpu.txt'
    small = {'SEEDS': '1', 'OPTIMIZERS': 'Adam', 'CARS': '3', 'COPIES': '1', 'N_FOLDS': '3'}
    small |= {'SIZE': '128', 'BATCH': '2', 'STEPS': '2', 'DRAW': '96x64', 'PARTS': '32'}
    small |= {'ANY_DEVICE': '1', 'MODEL': 'smp_linknet_tu-test_resnet', 'PYTHON': sys.executable}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    processes = {}
    for script in SLOW:
        command = ['bash', HERE / 'bench_gpu.sh', file]
        if script in BENCHMARKS:
            command = [sys.executable, HERE / f'{script}.py', *BENCHMARKS[script][0]]
        processes[script] = subprocess.Popen(command, env=environment() | small, **pipes)
    yield processes, file
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize('script', sorted(BENCHMARKS, key=lambda script: script in SLOW))
def test_a_benchmark_prints_its_rows(running, script, tmp_path, monkeypatch, capsys):
    arguments, rows = BENCHMARKS[script]
    config.INPUT, config.OUTPUT = f'{tmp_path}/input', f'{tmp_path}/output'
    if script in SLOW:
        told, errors = running[0][script].communicate(timeout=300)
        assert running[0][script].returncode == 0, errors
    else:
        if script == 'bench_losses':
            demo.make_dataset(tmp_path / 'input/demo', cars=1, test_cars=0, size=(96, 64))
        monkeypatch.setattr(sys, 'argv', [f'{script}.py', *arguments])
        importlib.import_module(script).main()
        told = capsys.readouterr().out
    for row in rows:
        assert re.search(row, told), (row, told)


def test_the_script_for_a_gpu_runs_its_parts(running):
    processes, file = running
    _, errors = processes['bench_gpu'].communicate(timeout=300)
    assert processes['bench_gpu'].returncode == 0, errors
    assert re.findall(r'--- (.*): status \[0\]', file.read_text()) == ['draw', 'folds', '32']
    (row,) = map(json.loads, Path(f'{file}.rows').read_text().splitlines())
    assert row['label'] == '32' and row['images_per_second'] > 0


def test_no_benchmark_is_left_out():
    scripts = {file.stem for file in HERE.glob('bench_*.py')}
    assert set(BENCHMARKS) == scripts - {'bench_gpu'}


def test_a_part_that_needs_more_time_than_is_left_is_left_out(tmp_path, capsys):
    log = bench_gpu.Log(tmp_path / 'gpu.txt')
    bench_gpu.run_part(log, '16', bench_gpu.LIMIT + 1, ['-c', 'print("it ran")'])
    bench_gpu.run_part(log, 'folds', 0, ['-c', 'print("it ran")'])
    told = (tmp_path / 'gpu.txt').read_text()
    assert told == capsys.readouterr().out
    assert told.startswith('--- 16: left out') and told.count('it ran') == 1
    assert '--- folds: status [0]' in told


def test_a_machine_without_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='no GPU here that torch can use'):
        bench_gpu.main(tmp_path / 'gpu.txt')
