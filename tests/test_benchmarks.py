"""Every benchmark runs, at its smallest size, and prints its rows. What they measure is not checked."""

import importlib
import re
import sys
from pathlib import Path

import pytest

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
    'bench_training': (
        ['--steps', '1', '--crop', '32', *SMALL],
        [
            rf'PRECISION=16 +{RATE}  \(runs in 32-true\)',
            rf"PRECISION='bf16' +{RATE}",
            rf'the original way at 32 +{RATE}',
            rf'the original way at 16 +{RATE}',
            rf'PRECISION=16 CACHE=True +{RATE}',
            rf'PRECISION=16, batches on the device +{RATE}',
            r'start to first epoch [\d.]+ s, imports [\d.]+ s, ratio',
        ],
    ),
}
ELSEWHERE = {'bench_schedules'}


@pytest.mark.parametrize('script', BENCHMARKS)
def test_a_benchmark_prints_its_rows(script, tmp_path, monkeypatch, capsys):
    arguments, rows = BENCHMARKS[script]
    config.INPUT, config.OUTPUT = f'{tmp_path}/input', f'{tmp_path}/output'
    if script == 'bench_losses':
        demo.make_dataset(tmp_path / 'input/demo', cars=1, test_cars=0, size=(96, 64))
    monkeypatch.setattr(sys, 'argv', [f'{script}.py', *arguments])
    importlib.import_module(script).main()
    told = capsys.readouterr().out
    for row in rows:
        assert re.search(row, told), (row, told)


def test_no_benchmark_is_left_out():
    scripts = {file.stem for file in Path(__file__).parent.glob('bench_*.py')}
    assert set(BENCHMARKS) == scripts - ELSEWHERE
