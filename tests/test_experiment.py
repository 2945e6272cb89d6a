"""test_precision.py's rows, measured in this process: numbers, notes, the table and the picture."""

import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import Tiny

import command_line
import config
import folds
import metrics
import model_dispatcher
import runtime
import test_precision

COLUMNS = ['precision', 'images_per_second', 'step_ms', 'peak_memory_mb', 'val_dice', 'note']


@pytest.fixture
def experiment(carvana, monkeypatch):
    folds.main()
    monkeypatch.setitem(model_dispatcher.MODELS, 'tiny', Tiny)
    monkeypatch.setattr(runtime, 'EMULATE_FLOAT16', False)
    config.MODEL_NAME = 'tiny'
    options = SimpleNamespace(steps=3, seeds=2, row=None, arguments=['ACCELERATOR=cpu'])

    def in_this_process(name, steps, arguments):
        before = dict(vars(config))
        vars(config).update(SEED=int(arguments[-1].partition('=')[2]))
        try:
            return test_precision.measure(name, steps)
        finally:
            vars(config).update(before)

    monkeypatch.setattr(test_precision, 'run_row', in_this_process)
    monkeypatch.setattr(test_precision, 'WARM_UP', 1)
    return carvana, options


def test_differences_are_taken_seed_by_seed(capsys):
    runs = [(name, seed, dice) for name, dices in {
        '32': (0.5, 0.6), '16': (0.6, 0.8), '32 with TF32': (float('nan'),)}.items()
        for seed, dice in enumerate(dices)]  # fmt: skip
    test_precision.print_differences(pd.DataFrame(runs, columns=['precision', 'seed', 'val_dice']))
    told = 'Dice at 16 minus Dice at 32: +0.1500 +- 0.0500, standard error over 2 seeds\n'
    assert capsys.readouterr().out == told


def test_the_table_has_a_row_for_each_precision_and_says_why_one_is_missing(experiment):
    experiment, options = experiment
    test_precision.main(options)
    table = pd.read_csv(experiment / 'output/precision.csv', dtype={'precision': str})
    assert table.columns.tolist() == COLUMNS
    assert table.precision.tolist() == ['32', '32 with TF32', 'bf16', '16']
    rows = table.set_index('precision')
    for name in ('32', 'bf16', '16'):
        row = rows.loc[name]
        assert row.images_per_second > 0 and row.step_ms > 0
        assert 100 < row.peak_memory_mb < 1e5 and 0 <= row.val_dice <= 1
        # One note per seed; only a scaler, which is for 16, skips steps.
        assert row.note.count('0 of 4 steps skipped') == row.note.count('waited for data') == 2
        assert ('emulated: the rounding and the scaler are real' in row.note) == (name == '16')
        seeds = [float(dice) for dice in re.findall(r'Dice ([\d.]+)', row.note)]
        assert len(seeds) == 2 and sum(seeds) / 2 == pytest.approx(row.val_dice, abs=1e-4)
    tf32 = rows.loc['32 with TF32']
    assert tf32.drop('note').isna().all() and 'compute capability 8.0' in tf32.note
    assert (experiment / 'output/precision.png').stat().st_size > 10_000


def test_precisions_differ(experiment, monkeypatch):
    command_line.override([*experiment_words(), 'SEED=1'])
    first = test_precision.measure('32', 3)
    # Both come from one clock: whatever it showed, 8 training images make batches of 4.
    assert first['images_per_second'] * first['step_ms'] / 1e3 == pytest.approx(4)
    types, activate = set(), metrics.activate
    monkeypatch.setattr(metrics, 'activate', lambda x: types.add(x.dtype) or activate(x))
    for name in ('bf16', '16'):
        test_precision.measure(name, 3)
    assert types == {torch.bfloat16, torch.float16}


def experiment_words() -> list[str]:
    names = ('INPUT', 'OUTPUT', 'CROP_SIZE', 'MODEL_NAME', 'NUM_WORKERS', 'ACCELERATOR')
    return [*(f'{name}={getattr(config, name)}' for name in names), 'ENCODER_WEIGHTS=None']


def test_no_memory_is_a_note_and_a_row_without_numbers(experiment, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr('pytorch_lightning.Trainer.fit', full)
    run = {'precision': '32', **test_precision.measure('32', 3)}
    row = test_precision.summary([run]).iloc[0]
    assert row.note == 'not run: out of GPU memory' and row.drop(['precision', 'note']).isna().all()
