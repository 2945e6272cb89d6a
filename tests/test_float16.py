"""PRECISION=16 emulated on the CPU: torch's own float16 autocast and GradScaler, with real rounding."""

import math
from functools import partial

import pandas as pd
import pytest
import torch
from conftest import Tiny, dies_in_epoch, last_checkpoint, settings

import command_line
import config
import files
import folds
import Lightning_tester
import Lightning_trainer
import metrics
import model_dispatcher
import runtime
from Lightning_module import CarvanaModel

START = 2.0**26  # a scale at which the first steps overflow
WORDS = ['MODEL_NAME=tiny', 'TRAIN_BATCH_SIZE=2', 'EPOCHS=3', 'PRECISION=16']  # 8 images: 12 steps


@pytest.fixture
def float16(carvana, monkeypatch):
    folds.main()
    monkeypatch.setitem(model_dispatcher.MODELS, 'tiny', Tiny)
    monkeypatch.setattr(runtime, 'EMULATE_FLOAT16', True)
    scaler = partial(torch.amp.GradScaler, init_scale=START, growth_interval=3)
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)
    return carvana


def train(folder, *words):
    command_line.override([*settings(folder), *WORDS, *words])
    Lightning_trainer.train_fold(0)


def test_skipped_steps_do_not_move_the_weights_and_are_no_nan(float16, monkeypatch):
    scales, step = [], CarvanaModel.optimizer_step

    def watch(self, *args, **kwargs):
        step(self, *args, **kwargs)
        scales.append(self.trainer.precision_plugin.scaler.get_scale())

    monkeypatch.setattr(CarvanaModel, 'optimizer_step', watch)
    train(float16)  # no NaN is told
    skipped = sum(after < before for before, after in zip([START, *scales], scales))
    grown = sum(after > before for before, after in zip([START, *scales], scales))
    assert len(scales) == 12 and 2 < skipped < 10 and grown > 0
    state = last_checkpoint(float16 / 'logs')
    assert state['MixedPrecision']['scale'] == scales[-1] == START * 2.0 ** (grown - skipped)
    steps = int(state['optimizer_states'][0]['state'][0]['step'])
    assert steps == 12 - skipped
    assert state['lr_schedulers'][0]['last_epoch'] == 12  # also at the skipped steps
    assert all(weight.isfinite().all() for weight in state['state_dict'].values())


@pytest.mark.parametrize('words', [[], ['GRADIENT_CLIP=0.1', 'SCHEDULE=poly']])
def test_resumed_to_the_bit_with_the_scaler(float16, words):
    train(float16, *words, f'LOGS_PATH={float16}/whole/logs')
    for stop in (1, 2):
        with dies_in_epoch(stop):
            train(float16, *words, 'RESUME=True')
    train(float16, *words, 'RESUME=True')
    first, second = last_checkpoint(float16 / 'whole/logs'), last_checkpoint(float16 / 'logs')
    assert first['MixedPrecision'] == second['MixedPrecision']
    assert first['MixedPrecision']['scale'] < START
    for name, weight in first['state_dict'].items():
        assert torch.equal(weight, second['state_dict'][name]), name


def test_gradients_are_clipped_after_they_are_unscaled(float16, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def watch(parameters, max_norm, **kwargs):
        parameters = list(parameters)
        norms.append(clip(parameters, max_norm, **kwargs).item())
        return torch.tensor(norms[-1])

    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', watch)
    train(float16, 'GRADIENT_CLIP=0.1')
    finite = [norm for norm in norms if math.isfinite(norm)]
    assert len(norms) == 12 and len(finite) > 2
    assert max(finite) < 1e3  # of the loss, not of the loss times 2^20


def test_a_real_nan_is_told(float16, monkeypatch):
    def broken(**keywords):
        model = Tiny(**keywords)
        model.layers[0].weight.data.fill_(math.nan)
        return model

    monkeypatch.setitem(model_dispatcher.MODELS, 'tiny', broken)
    told = r"run again with RESUME=True PRECISION='bf16' \(or 32\), or start again with a lower LR"
    with pytest.raises(config.UserMistake, match=told):
        train(float16)
    assert not files.models_file().exists()


def test_the_tester_runs_in_float16_too(float16, monkeypatch):
    train(float16)
    types, activate, dice = set(), metrics.activate, {}
    monkeypatch.setattr(metrics, 'activate', lambda x: types.add(x.dtype) or activate(x))
    models = Lightning_tester.load_models()
    for config.PRECISION in (32, 16):
        Lightning_tester.score_out_of_fold(models)
        dice[config.PRECISION] = pd.read_csv(float16 / 'output/oof.csv').dice
    assert types == {torch.float32, torch.float16}
    assert dice[16].tolist() == pytest.approx(dice[32].tolist(), abs=0.02)
