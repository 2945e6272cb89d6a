"""Schedule, optimizer, clipping and stopping, in whole trainings of seconds."""

import math
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import Tiny, last_checkpoint, run_script, settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import command_line
import config
import files
import folds
import Lightning_tester
import Lightning_trainer
import model_dispatcher
from Lightning_module import CarvanaModel, learning_rate_factor


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
def rates(name, steps):
    """Learning rates of an optimizer at LR 1, before each step and after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = learning_rate_factor(name, steps)
    schedule, seen = torch.optim.lr_scheduler.LambdaLR(optimizer, factor), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    return [*seen, optimizer.param_groups[0]['lr']]


def test_schedules_by_hand():
    """20 steps: 3 of them rise, 17 fall."""
    cosine, poly = rates('cosine', 20), rates('poly', 20)
    rising = [1 / 3, 2 / 3, 1]
    assert cosine[:3] == pytest.approx(rising) and poly[:3] == pytest.approx(rising)
    for step in range(3, 21):
        angle = math.pi * (step - 3) / 17
        assert cosine[step] == pytest.approx(0.01 + 0.99 * (1 + math.cos(angle)) / 2)
        assert poly[step] == pytest.approx((1 - (step - 3) / 17) ** 0.9, abs=1e-9)


@pytest.mark.parametrize('name', ['cosine', 'poly'])
@pytest.mark.parametrize('steps', [1, 2, 3, 7])
def test_the_shortest_trainings_have_a_schedule(name, steps):
    seen = rates(name, steps)
    assert all(0 <= rate <= 1 for rate in seen) and max(seen[:steps]) > 0


def test_the_rate_falls_within_epochs(ready, capsys):
    train('EPOCHS=2', 'TRAIN_BATCH_SIZE=2', 'LR=0.01')  # 8 images: 4 steps an epoch
    state = last_checkpoint(ready / 'logs')
    assert state['lr_schedulers'][0]['last_epoch'] == 8
    assert state['optimizer_states'][0]['param_groups'][0]['lr'] == pytest.approx(0.0001)
    # At the start of each epoch: the first of 2 rising steps, then the third of 6 falling ones.
    third = 0.0001 + 0.0099 * (1 + math.cos(math.pi * 2 / 6)) / 2
    history = state['callbacks']['EpochLog']['history']
    assert [row['lr'] for row in history] == pytest.approx([0.005, third])
    assert 'Adam at 0.01, SCHEDULE=cosine' in capsys.readouterr().out
    assert (ready / 'logs/version_0/curves.png').is_file()


# ------------------------------------------------------------ optimizer
@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['OPTIMIZER=AdamV'], "torch.optim has no 'AdamV'; did you mean Adam"),
        (['OPTIMIZER=Optimizer'], "torch.optim has no 'Optimizer'"),
        (["OPTIMIZER_ARGS={'momentum': 0.9}"], 'OPTIMIZER=Adam does not work with .*momentum'),
        (['OPTIMIZER=SGD', "OPTIMIZER_ARGS={'momentum': -1}"], 'Invalid momentum value'),
        (["OPTIMIZER_ARGS={'betas': 0.9}"], 'OPTIMIZER=Adam does not work with'),
        (['OPTIMIZER=SparseAdam'], 'OPTIMIZER=SparseAdam does not work.*dense gradients'),
        (['OPTIMIZER=LBFGS'], 'OPTIMIZER=LBFGS does not work.*closure'),
        (['LOSS=FocalLoss', "LOSS_ARGS={'alpha': [1, 2]}"], 'LOSS=FocalLoss does not work with'),
        (['LOSS=TopKLoss', "LOSS_ARGS={'k': 150}"], 'LOSS=TopKLoss does not work with'),
        (["LOSS_ARGS={'smooth': '1'}"], 'LOSS=IoULoss does not work with'),
        (['LOSS=WeightedCrossEntropyLoss', "LOSS_ARGS={'weights': 5}"], 'does not work with'),
        (['LOSS=WeightedCrossEntropyLoss', "LOSS_ARGS={'weights': [5]}"], 'takes 2 weights'),
        (['LOSS=WeightedCrossEntropyLoss', "LOSS_ARGS={'weights': [1, 5, 9]}"], 'takes 2 weights'),
    ],
)
def test_what_torch_does_not_take_is_told_before_the_training(ready, words, message):
    with pytest.raises(config.UserMistake, match=message):
        train(*words)
    assert not list((ready / 'logs').glob('version_*'))


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
    model = CarvanaModel([1], [0])
    optimizer = model.build_optimizer(model.parameters())
    assert type(optimizer) is kind and optimizer.defaults.get('fused') == fused
    assert optimizer.defaults['lr'] == 0.001
    for name, value in config.OPTIMIZER_ARGS.items():
        assert optimizer.defaults[name] == value


def test_gradients_are_clipped(ready, monkeypatch):
    norms = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        'step',
        lambda self, closure=None: step(self, closure and partial(after, closure)),
    )
    models, fit_start = [], CarvanaModel.on_fit_start
    monkeypatch.setattr(
        CarvanaModel, 'on_fit_start', lambda self: models.append(self) or fit_start(self)
    )

    def after(closure):
        loss = closure()
        gradients = [p.grad for p in models[-1].parameters() if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        return loss

    train('GRADIENT_CLIP=0.001')
    assert norms and max(norms) <= 0.001 * 1.001


# ------------------------------------------------------------ length
def test_patience_ends_a_training_and_resume_leaves_it_so(ready, capsys):
    words = ['EPOCHS=9', 'PATIENCE=2', 'LR=1e-12', "OPTIMIZER_ARGS={'eps': 1.0}"]
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


def test_after_nan_another_precision_goes_on_from_the_last_good_checkpoint(
    ready, monkeypatch, capsys
):
    name = next(word for word in settings(ready) if word.startswith('MODEL_NAME'))
    words = [name, 'EPOCHS=4', 'LR=0.004']
    with monkeypatch.context() as patch:
        poison(patch, epoch=2)  # the weights of the third epoch become NaN, and so does val_loss
        told = 'val_loss is nan in epoch 3: start again with a lower LR than 0.004'
        with pytest.raises(config.UserMistake, match=told):
            train(*words)
    assert not files.models_file().exists()
    good = last_checkpoint(ready / 'logs')
    assert good['epoch'] == 1
    told = capsys.readouterr().out
    assert 'epoch   2/4' in told and 'epoch   3/4' not in told
    train(*words, 'RESUME=True', "PRECISION='bf16'")
    told = capsys.readouterr().out
    assert 'resuming version_0 with PRECISION=bf16, was 16' in told
    assert 'resumes   after epoch 2 of 4' in told and 'epoch   3/4' in told
    assert last_checkpoint(ready / 'logs')['hyper_parameters']['PRECISION'] == 'bf16'
    before = [row['lr'] for row in good['callbacks']['EpochLog']['history']]
    after = last_checkpoint(ready / 'logs')['callbacks']['EpochLog']['history']
    assert [row['lr'] for row in after[:2]] == before and len(after) == 4
    Lightning_tester.main()  # the advice ends in scores
    assert len(pd.read_csv(ready / 'output/oof.csv')) == 2


def test_another_rate_is_refused(ready):
    train('EPOCHS=2')
    with pytest.raises(config.UserMistake, match='started with LR=0.001'):
        train('EPOCHS=2', 'RESUME=True', 'LR=0.0001')


def test_a_wild_rate_ends_with_status_1_and_a_low_one_goes_on(ready, capsys):
    words = ['FOLDS=[0]', 'EPOCHS=3', 'RESUME=True', 'SCHEDULE=None', 'TRAIN_BATCH_SIZE=2']
    words = [*settings(ready), *words, 'ACCUMULATE_GRAD_BATCHES=2']
    wild = run_script('Lightning_trainer.py', *words, 'LR=1e30')
    assert wild.returncode == 1 and wild.stderr.count('\n') == 1
    assert 'the loss is nan in epoch' in wild.stderr
    assert 'only 2 optimizer step(s) per epoch' in wild.stdout
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
    words = ['SCHEDULE=linear', 'PATIENCE=0', 'LIMIT_BATCHES=0.5', 'GRADIENT_CLIP=-1']
    for word in [*words, 'SCHEDULE=onecycle', 'OPTIMIZER_ARGS=3', 'START_FROM=']:
        command_line.override([word])
        with pytest.raises(config.UserMistake, match=word.partition('=')[0]):
            command_line.check()


def test_a_trial_shows_its_own_batches_and_warns_by_those_of_the_whole_training(capsys):
    command_line.override(['LIMIT_BATCHES=2', 'ACCUMULATE_GRAD_BATCHES=2', 'TRAIN_BATCH_SIZE=4'])
    table = pd.DataFrame({'img': ['a', 'b'], 'kfold': [0, 1], 'group': ['a', 'b']})
    trainer = SimpleNamespace(
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device('cpu')),
        logger=SimpleNamespace(log_dir='logs'),
    )
    config.LOSS = 'CE'
    for items, warns in ((4 * 24, False), (4 * 6, True)):
        model = SimpleNamespace(model=torch.nn.Linear(1, 1), train_data=range(items))
        Lightning_trainer.print_start(0, table, model, trainer)
        told = capsys.readouterr().out
        assert 'epochs of 2 batches of 4,' in told
        assert ('only 3 optimizer step(s) per epoch' in told) == warns == ('warning' in told)
