"""Schedule, optimizer, average, clipping and stopping, in whole trainings of seconds."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from conftest import Tiny, last_checkpoint, run_script, save_mask_gif, settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import callbacks
import command_line
import config
import dice_loss
import files
import folds
import Lightning_tester
import Lightning_trainer
import model_dispatcher
import optimizers
from Lightning_module import CarvanaModel, NotFinite


@pytest.fixture
def ready(carvana, monkeypatch):
    monkeypatch.setitem(model_dispatcher.MODELS, 'tiny', Tiny)
    folds.main()
    return carvana


def train(*words):
    folder = config.path(config.OUTPUT).parent
    command_line.override([*settings(folder), 'MODEL_NAME=tiny', *words])
    Lightning_trainer.train_fold(0)


# ------------------------------------------------------------ schedule
def rates(name, steps, kind=torch.optim.SGD):
    optimizer = kind([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, seen = optimizers.build_schedule(name, optimizer, steps), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    return [*seen, optimizer.param_groups[0]['lr']]


def test_schedules_by_hand():
    """20 steps: 3 of them rise, 17 fall."""
    cosine, poly, onecycle = (rates(name, 20) for name in ('cosine', 'poly', 'onecycle'))
    rising = [1 / 3, 5 / 9, 7 / 9, 1]
    assert cosine[:4] == pytest.approx(rising) and poly[:4] == pytest.approx(rising)
    for step in range(3, 21):
        angle = math.pi * (step - 3) / 17
        assert cosine[step] == pytest.approx(0.01 + 0.99 * (1 + math.cos(angle)) / 2)
        assert poly[step] == pytest.approx((1 - (step - 3) / 17) ** 0.9, abs=1e-9)
    assert onecycle[0] == pytest.approx(1 / 25) and max(onecycle) == pytest.approx(1)
    assert onecycle.index(max(onecycle)) == 2 and onecycle[19] == pytest.approx(4e-6)


@pytest.mark.parametrize('name', ['cosine', 'poly', 'onecycle'])
@pytest.mark.parametrize('steps', [1, 2, 3, 7])
def test_the_shortest_trainings_have_a_schedule(name, steps):
    assert all(0 <= rate <= 1 for rate in rates(name, steps, torch.optim.AdamW))
    assert max(rates(name, steps)[:steps]) > 0


def test_the_rate_on_a_plateau_is_halved():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = optimizers.build_schedule('plateau', optimizer, 100)
    seen = []
    for val_dice in (0.1, 0.5, 0.5, 0.4, 0.6, 0.3):
        schedule.step(val_dice)
        seen.append(optimizer.param_groups[0]['lr'])
    assert seen == [1, 1, 1, 0.5, 0.5, 0.5]


def test_the_rate_falls_within_epochs_and_the_picture_shows_it(ready, capsys):
    train('EPOCHS=2', 'TRAIN_BATCH_SIZE=2', 'LR=0.01')  # 8 images: 4 steps an epoch
    state = last_checkpoint(ready / 'logs')
    epochs, seen = zip(*state['callbacks']['EpochLog']['rates'])
    assert epochs == (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75)
    fall = [0.0001 + 0.0099 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert seen == pytest.approx([0.005, 0.0075, *fall])
    assert state['optimizer_states'][0]['param_groups'][0]['lr'] == pytest.approx(0.0001)
    assert 'Adam at 0.01, SCHEDULE=cosine, EMA=' in capsys.readouterr().out
    assert (ready / 'logs/version_0/curves.png').is_file()


# ------------------------------------------------------------ optimizer
@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['OPTIMIZER=AdamV'], "torch.optim has no 'AdamV'; did you mean Adam"),
        (['OPTIMIZER=Optimizer'], "torch.optim has no 'Optimizer'"),
        (["OPTIMIZER_ARGS={'momentum': 0.9}"], 'OPTIMIZER=Adam does not take .*momentum'),
        (['OPTIMIZER=SGD', "OPTIMIZER_ARGS={'momentum': -1}"], 'Invalid momentum value'),
    ],
)
def test_what_torch_does_not_take_is_told_before_the_training(ready, words, message):
    with pytest.raises(config.UserMistake, match=message):
        train(*words)
    assert not (ready / 'logs').exists() or not list((ready / 'logs').glob('version_*'))


@pytest.mark.parametrize(
    ('words', 'kind', 'fused'),
    [
        ([], torch.optim.Adam, True),
        (['GRADIENT_CLIP=1.0'], torch.optim.Adam, None),
        (['OPTIMIZER=AdamW', "OPTIMIZER_ARGS={'weight_decay': 0.3}"], torch.optim.AdamW, True),
        (['OPTIMIZER=RAdam', "OPTIMIZER_ARGS={'betas': (0.8, 0.9)}"], torch.optim.RAdam, None),
        (["OPTIMIZER_ARGS={'fused': False}"], torch.optim.Adam, False),
    ],
)
def test_any_optimizer_of_torch(carvana, words, kind, fused):
    command_line.override([*settings(carvana), *words])
    optimizer = optimizers.build_optimizer(CarvanaModel([1], [0]))
    assert type(optimizer) is kind and optimizer.defaults.get('fused') == fused
    assert optimizer.defaults['lr'] == 0.001
    for name, value in config.OPTIMIZER_ARGS.items():
        assert optimizer.defaults[name] == value


def test_gradients_are_clipped(ready, monkeypatch):
    norms = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, 'step', lambda self, closure=None: step(self, lambda: after(closure))
    )
    models = []
    build = optimizers.build_optimizer
    monkeypatch.setattr(
        optimizers, 'build_optimizer', lambda model: models.append(model) or build(model)
    )

    def after(closure):
        loss = closure()
        gradients = [p.grad for p in models[-1].parameters() if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        return loss

    train('GRADIENT_CLIP=0.001')
    assert norms and max(norms) <= 0.001 * 1.001


# ------------------------------------------------------------ average
def test_the_average_by_hand_is_what_is_kept(ready, monkeypatch):
    weights, module_step = [], CarvanaModel.optimizer_step

    def step(self, *args, **kwargs):
        module_step(self, *args, **kwargs)
        weights.append({k: v.clone() for k, v in self.state_dict().items()})

    monkeypatch.setattr(CarvanaModel, 'optimizer_step', step)
    train('EPOCHS=2', 'TRAIN_BATCH_SIZE=2', 'LR=0.01', 'EMA=0.3')
    average = weights[0]
    for number, now in enumerate(weights[1:], 1):
        decay = min(0.3, (1 + number) / (10 + number))
        average = {k: decay * average[k] + (1 - decay) * now[k] for k in now}
    kept, last = last_checkpoint(ready / 'logs'), weights[-1]
    for name, value in kept['state_dict'].items():
        if value.is_floating_point():
            assert torch.allclose(value, average[name], atol=1e-6), name
            assert torch.equal(kept['current_model_state'][name], last[name])
    assert any(not torch.equal(v, last[k]) for k, v in kept['state_dict'].items())
    # The score beside it is that of the average, and the tester takes the same.
    best = files.read_models().checkpoint[0]
    model = Lightning_tester.load_model(best).eval()
    state = torch.load(config.path(best), weights_only=True)['state_dict']
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    trainer = pl.Trainer(accelerator='cpu', logger=False, enable_progress_bar=False)
    scores = trainer.validate(model, verbose=False)[0]
    assert scores['val_dice'] == pytest.approx(files.read_models().val_dice[0], abs=1e-6)


# ------------------------------------------------------------ length
def test_patience_ends_a_training_and_resume_leaves_it_so(ready, capsys):
    words = ['EPOCHS=9', 'PATIENCE=2', 'LR=1e-12', 'EMA=None', "OPTIMIZER_ARGS={'eps': 1.0}"]
    train(*words)
    epochs = len(pd.read_csv(ready / 'logs/version_0/metrics.csv'))
    best = int(pd.read_csv(ready / 'logs/version_0/metrics.csv').val_dice.idxmax())
    assert epochs == best + 3 < 9
    assert f'stopped after epoch {epochs}: no better val_dice in' in capsys.readouterr().out
    files.models_file().unlink()
    train(*words, 'RESUME=True')
    assert f'fold 0 is finished, {epochs} epochs' in capsys.readouterr().out
    assert files.read_models().fold.tolist() == [0]


def test_a_trial_on_a_few_batches_is_called_one_everywhere(ready, capsys):
    name = next(word for word in settings(ready) if word.startswith('MODEL_NAME'))
    train(name, 'LIMIT_BATCHES=2', 'TRAIN_BATCH_SIZE=2', 'VAL_BATCH_SIZE=1', 'EPOCHS=2')
    assert pd.read_csv(ready / 'logs/version_0/metrics.csv').step.tolist() == [2, 4]
    assert 'LIMIT_BATCHES=2: A TRIAL' in capsys.readouterr().out
    config.LIMIT_BATCHES = None  # the tester goes by what the model was trained with
    Lightning_tester.main()
    told = capsys.readouterr().out
    assert 'own size (LIMIT_BATCHES=2: A TRIAL' in told
    assert told.count('A TRIAL') == 1


# ------------------------------------------------------------ not finite
def poison(monkeypatch, epoch, value=math.nan):
    """Make the gradients of an epoch's last batch NaN."""
    step = CarvanaModel.training_step

    def poisoned(self, batch, index):
        bad = self.current_epoch == epoch and index == self.trainer.num_training_batches - 1
        return step(self, batch, index) * (value if bad else 1)

    monkeypatch.setattr(CarvanaModel, 'training_step', poisoned)


@pytest.mark.parametrize('schedule', ['cosine', 'onecycle', 'plateau', 'None'])
def test_after_nan_a_lower_rate_goes_on_from_the_last_good_checkpoint(
    ready, monkeypatch, capsys, schedule
):
    words = ['EPOCHS=4', f'SCHEDULE={schedule}', 'LR=0.004']
    with monkeypatch.context() as patch:
        poison(patch, epoch=2)  # the weights of the third epoch become NaN, and so does val_loss
        with pytest.raises(
            NotFinite, match=r'val_loss is nan in epoch 3: run again with RESUME=True and a lower'
        ):
            train(*words)
    assert not files.models_file().exists()
    assert 'val_loss is nan' in (ready / 'logs/version_0' / callbacks.NOT_FINITE).read_text()
    good = last_checkpoint(ready / 'logs')
    assert good['epoch'] == 1
    told = capsys.readouterr().out
    assert 'epoch   2/4' in told and 'epoch   3/4' not in told
    with pytest.raises(config.UserMistake, match='started with LOSS=IoULoss: set the same'):
        train(*words, 'RESUME=True', 'LR=0.001', 'LOSS=CE')
    train(*words, 'RESUME=True', 'LR=0.001', "PRECISION='bf16'")
    told = capsys.readouterr().out
    assert 'with LR=0.001, was 0.004' in told and 'with PRECISION=bf16, was 16' in told
    assert 'resumes   after epoch 2 of 4' in told and 'epoch   3/4' in told
    state = last_checkpoint(ready / 'logs')
    assert state['hyper_parameters']['LR'] == 0.001
    before, after = ([r for e, r in s['callbacks']['EpochLog']['rates']] for s in (good, state))
    assert after[: len(before)] == before and len(after) == 2 * len(before)
    train(*words, f'LOGS_PATH={ready}/whole')
    whole = last_checkpoint(ready / 'whole')
    planned = [r for e, r in whole['callbacks']['EpochLog']['rates']]
    assert after[len(before) :] == pytest.approx([r / 4 for r in planned[len(before) :]])


def test_another_rate_is_refused_where_nothing_was_nan(ready):
    train('EPOCHS=2')
    with pytest.raises(config.UserMistake, match='started with LR=0.001'):
        train('EPOCHS=2', 'RESUME=True', 'LR=0.0001')


def test_a_wild_rate_ends_with_status_1_and_a_low_one_goes_on(ready, capsys):
    words = ['FOLDS=[0]', 'EPOCHS=3', 'RESUME=True', 'SCHEDULE=None', 'TRAIN_BATCH_SIZE=2']
    words = [*settings(ready), *words, 'ACCUMULATE_GRAD_BATCHES=2']
    wild = run_script('Lightning_trainer.py', *words, 'LR=1e30')
    assert wild.returncode == 1 and wild.stderr.count('\n') == 1
    assert 'the loss is nan in epoch' in wild.stderr
    assert 'only 2 optimizer steps per epoch' in wild.stdout
    assert 'a smaller ACCUMULATE_GRAD_BATCHES: 1 gives 4' in wild.stdout
    assert not files.models_file().exists()
    train(*words, 'LR=0.001')
    told = capsys.readouterr().out
    assert 'has no run to resume' in told or 'with LR=0.001' in told
    assert files.read_models().fold.tolist() == [0]


def test_the_tester_refuses_weights_that_are_not_finite(ready):
    train()
    file = config.path(files.read_models().checkpoint[0])
    state = torch.load(file, weights_only=True)
    next(iter(state['state_dict'].values()))[0] = math.nan
    torch.save(state, file)
    with pytest.raises(config.UserMistake, match=rf'{file.name}: its weights are not finite'):
        Lightning_tester.main()
    assert not (ready / 'output/oof.csv').exists()


# ------------------------------------------------------------ what is said and kept
@pytest.mark.parametrize(('empty', 'loss', 'told'), [(1, 'IoULoss', ''), (2, 'IoULoss', '20% of'),
                                                     (2, 'CE', '')])  # fmt: skip
def test_empty_masks_ask_for_another_loss(ready, capsys, empty, loss, told):
    for file in sorted((ready / 'input/train_masks').iterdir())[:empty]:  # of 10
        save_mask_gif(file, np.zeros((48, 64), np.uint8))
    train(f'LOSS={loss}')
    out = capsys.readouterr().out
    assert ('set LOSS=DC_and_CE_loss' in out) == bool(told) and told in out


def test_the_losses_that_need_an_object_are_those_without_a_gradient():
    torch.manual_seed(0)
    start, y = torch.randn(1, 1, 128, 128), torch.arange(128)
    disc = ((y - 64) ** 2 + (y[:, None] - 64) ** 2 < 900).long()[None]
    weak = set()
    for name in dice_loss.LOSSES:
        sums = []
        for mask in (disc * 0, disc):
            logits = start.clone().requires_grad_()
            dice_loss.build_loss(name)(logits, mask).backward()
            sums.append(logits.grad.abs().sum())
        weak |= {name} if sums[0] < 0.01 * sums[1] else set()
    assert weak == set(dice_loss.NEED_AN_OBJECT)


def test_tensorboard_shows_the_runs_with_their_score(ready):
    train()
    events = EventAccumulator(str(ready / 'logs/version_0')).Reload()
    assert events.Scalars('best_val_dice')[0].value == pytest.approx(
        files.read_models().val_dice[0]
    )
    assert '_hparams_/session_start_info' in events.summary_metadata


def test_thresholds_reach_from_one_to_ninety_nine_hundredths():
    thresholds = Lightning_tester.THRESHOLDS
    assert thresholds == sorted(thresholds) and 0.5 in thresholds
    assert (thresholds[0], thresholds[-1]) == (0.01, 0.99)


def test_constants_are_checked_before_anything_is_read():
    for word in ('SCHEDULE=linear', 'EMA=1.5', 'EMA=0', 'PATIENCE=0', 'LIMIT_BATCHES=0.5',
                 'GRADIENT_CLIP=-1', 'OPTIMIZER_ARGS=3'):  # fmt: skip
        command_line.override([word])
        with pytest.raises(config.UserMistake, match=word.partition('=')[0]):
            command_line.check()


def test_a_trial_shows_its_own_batches_and_warns_by_those_of_the_whole_training(capsys):
    command_line.override(['LIMIT_BATCHES=2', 'ACCUMULATE_GRAD_BATCHES=2', 'TRAIN_BATCH_SIZE=4'])
    table = pd.DataFrame({'img': ['a', 'b'], 'kfold': [0, 1], 'group': ['a', 'b']})
    model = SimpleNamespace(model=torch.nn.Linear(1, 1))
    trainer = SimpleNamespace(
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device('cpu')),
        logger=SimpleNamespace(log_dir='logs'),
    )
    config.LOSS = 'CE'
    for items, warns in ((4 * 24, False), (4 * 6, True)):
        Lightning_trainer.print_start(0, table, items, model, trainer)
        told = capsys.readouterr().out
        assert 'epochs of 2 batches of 4 and 1 optimizer steps' in told
        assert ('only 3 optimizer steps per epoch' in told) == warns == ('warning' in told)
