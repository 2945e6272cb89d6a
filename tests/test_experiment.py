"""test_precision.py: its rows and notes, the tables and the pictures."""

import math
import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import Tiny, run_script, settings

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
    monkeypatch.setattr(test_precision, 'WARM_UP', 1)
    config.MODEL_NAME = 'tiny'
    return carvana


def test_differences_are_taken_seed_by_seed(capsys):
    runs = [(name, seed, dice) for name, dices in {
        '32': (0.5, 0.6), '16': (0.6, 0.8), '32 with TF32': (float('nan'),)}.items()
        for seed, dice in enumerate(dices)]  # fmt: skip
    test_precision.print_differences(
        [dict(zip(['precision', 'seed', 'val_dice'], run)) for run in runs]
    )
    told = 'Dice at 16 minus Dice at 32: +0.1500 +- 0.0500, standard error over 2 seeds\n'
    assert capsys.readouterr().out == told


def test_the_table_has_a_row_for_each_precision_and_says_why_one_is_missing(experiment, capsys):
    test_precision.main(SimpleNamespace(steps=3, seeds=2, arguments=[]))
    table = pd.read_csv(experiment / 'output/precision.csv', dtype={'precision': str})
    assert table.columns.tolist() == COLUMNS
    assert table.precision.tolist() == ['32', '32 with TF32', 'bf16', '16']
    rows = table.set_index('precision')
    for name in ('32', 'bf16', '16'):
        row = rows.loc[name]
        assert row.images_per_second > 0 and row.step_ms > 0
        assert math.isnan(row.peak_memory_mb) and 0 <= row.val_dice <= 1  # a CPU's is not measured
        # One note per seed; only a scaler, which is for 16, skips steps.
        assert row.note.count('0 of 4 steps skipped') == row.note.count('waited for data') == 2
        assert ('emulated: the rounding and the scaler are real' in row.note) == (name == '16')
        assert re.findall(r'seed (\d+)', row.note) == ['42', '43']
        seeds = [float(dice) for dice in re.findall(r'Dice ([\d.]+)', row.note)]
        assert len(seeds) == 2 and sum(seeds) / 2 == pytest.approx(row.val_dice, abs=1e-4)
    tf32 = rows.loc['32 with TF32']
    assert tf32.drop('note').isna().all() and tf32.note.count('compute capability 8.0') == 1
    assert (experiment / 'output/precision.png').stat().st_size > 10_000
    ranges = pd.read_csv(experiment / 'output/precision_ranges.csv')
    assert ranges.part.tolist() == ['layers.0', 'layers.3', 'loss']
    assert (ranges.scale == 65536).all() and (ranges.largest_activation < 65504).all()
    assert (experiment / 'output/precision_ranges.png').stat().st_size > 10_000
    told = capsys.readouterr().out
    assert 'float16 is safe here: the largest activation is ' in told
    assert told.count('32 with TF32: not run') == 1  # and not once for each seed


def test_a_row_is_the_same_after_other_rows_and_precisions_differ(experiment, monkeypatch):
    first = test_precision.measure('32', 3, seed=1)
    # Both come from one clock: whatever it showed, 8 training images make batches of 4.
    assert first['images_per_second'] * first['step_ms'] / 1e3 == pytest.approx(4)
    types, activate = set(), metrics.activate
    monkeypatch.setattr(metrics, 'activate', lambda x: types.add(x.dtype) or activate(x))
    for name in ('bf16', '16'):
        test_precision.measure(name, 3, seed=1)
    assert types == {torch.bfloat16, torch.float16}
    again = test_precision.measure('32', 3, seed=1)
    assert again['val_dice'] == first['val_dice']
    weights = again['model'].state_dict()
    for key, weight in first['model'].state_dict().items():
        assert torch.equal(weight, weights[key]), key
    other = test_precision.measure('32', 3, seed=2)['model'].state_dict()
    assert not torch.equal(weights['model.layers.0.weight'], other['model.layers.0.weight'])


def test_row_16_tells_the_last_scale_of_its_scaler(experiment, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device: scaler(device, init_scale=2.0**40))
    row = test_precision.measure('16', 3)
    skipped = int(re.search(r'(\d+) of 4 steps skipped', row['note'])[1])
    assert skipped > 0 and row['scale'] == 2.0 ** (40 - skipped)


@pytest.mark.parametrize('failure', ['not finite', 'no memory'])
def test_a_row_that_fails_is_a_note_and_the_others_follow(experiment, monkeypatch, capsys, failure):
    fit = test_precision.pl.Trainer.fit

    def fail(trainer, model):
        if config.PRECISION != 32:
            return fit(trainer, model)
        if failure == 'no memory':
            raise torch.OutOfMemoryError('CUDA out of memory')
        raise test_precision.NotFinite('the loss is nan in epoch 1: run again')

    monkeypatch.setattr('pytorch_lightning.Trainer.fit', fail)
    test_precision.main(SimpleNamespace(steps=3, seeds=2, arguments=[]))
    table = pd.read_csv(experiment / 'output/precision.csv', dtype={'precision': str})
    rows = table.set_index('precision')
    note = 'not run: out of GPU memory'
    if failure == 'not finite':
        note = '; '.join(f'seed {seed}: stopped, the loss is nan in epoch 1' for seed in (42, 43))
    assert rows.note['32'] == note and rows.loc['32'].drop('note').isna().all()
    assert rows.val_dice[['bf16', '16']].notna().all()
    told = capsys.readouterr().out
    assert 'precision_ranges.csv needs a model from row 32' in told and 'minus' not in told
    assert not (experiment / 'output/precision_ranges.csv').exists()


def test_the_script_names_the_layer_that_overflows(carvana, tmp_path):
    """As users run it, with a model that overflows in one layer of its encoder."""
    model = model_dispatcher.build_model('smp_linknet_tu-test_resnet')
    weights = model.encoder.state_dict()
    weights['model.layer2.0.conv1.weight'] *= 1e6
    torch.save(weights, tmp_path / 'large.pth')
    words = [*settings(tmp_path), f'ENCODER_WEIGHTS={tmp_path}/large.pth', 'FOLDS=[1]']
    assert run_script('folds.py', *words).returncode == 0
    result = run_script('test_precision.py', '--steps', '1', *words)
    assert result.returncode == 0, result.stderr
    assert (
        'float16 overflows in encoder.model.layer2.0.conv1: its largest activation' in result.stdout
    )
