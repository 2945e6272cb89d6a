"""RESUME=True: after kills the result is that of an undisturbed run."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time

import pandas as pd
import pytest
import torch
from conftest import (
    Tiny,
    dies_in_epoch,
    finish,
    last_checkpoint,
    make_carvana,
    own_config,
    run_script,
    settings,
    start,
)
from PIL import Image

import callbacks
import command_line
import config
import folds
import Lightning_tester
import Lightning_trainer
import model_dispatcher

# By hand, some four minutes: KILLS=20 python -m pytest tests/test_resume.py -k again
KILLS = int(os.environ.get('KILLS', 1))
SETTINGS = ['N_FOLDS=3', 'EPOCHS=12', 'NUM_WORKERS=0']
SETTINGS += ['FOLDS=[0]'] if KILLS == 1 else ['FOLDS=[0, 1]']


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    make_carvana(folder / 'input', cars=6)
    words = [*settings(folder), *SETTINGS]
    with own_config(*words):
        for script in (folds, Lightning_trainer, Lightning_tester):
            script.main()
    return folder, words


def weights(folder, version, name):
    file = folder / 'logs' / version / 'checkpoints' / name
    return torch.load(file, weights_only=True)['state_dict']


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    """Also with other numbers of workers, which decide nothing."""
    make_carvana(tmp_path / 'input', cars=6)
    words = [*settings(tmp_path), *SETTINGS, 'RESUME=True']
    command_line.override(words)
    folds.main()
    seconds = random.Random(KILLS)
    for kill in range(KILLS):
        workers = f'NUM_WORKERS={4 * (kill % 2)}'
        process = start('Lightning_trainer.py', *words, workers, stderr=None)
        if kill % 3:  # as it starts, or while it trains
            time.sleep(seconds.uniform(0, 8))
        else:
            while '  epoch ' not in process.stdout.readline() and process.poll() is None:
                pass
            time.sleep(seconds.uniform(0, 0.5))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    result = run_script('Lightning_trainer.py', *words, 'NUM_WORKERS=4')
    assert result.returncode == 0, result.stderr
    if KILLS == 1:
        assert 'resumes   after epoch' in result.stdout
    Lightning_tester.main()
    for name in ('models.csv', 'oof.csv'):
        first, second = (folder / 'output' / name for folder in (undisturbed[0], tmp_path))
        assert first.read_text() == second.read_text().replace(str(tmp_path), str(undisturbed[0]))
    for row in pd.read_csv(tmp_path / 'output/models.csv').itertuples():
        first, second = (
            weights(folder, row.version, 'last.ckpt') for folder in (undisturbed[0], tmp_path)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)
        history = pd.read_csv(tmp_path / 'logs' / row.version / 'metrics.csv')
        assert history[history.val_dice.notna()].epoch.tolist() == list(range(12))
        assert (tmp_path / 'logs' / row.version / 'curves.png').is_file()
    assert len(list((tmp_path / 'logs').glob('version_*'))) == (1 if KILLS == 1 else 2)
    left = {file.name for file in (tmp_path / 'output').iterdir()}
    assert left == {file.name for file in (undisturbed[0] / 'output').iterdir()}
    assert not list(tmp_path.rglob('*.tmp'))


def test_finished_folds_are_left_alone_and_other_constants_refused(undisturbed, capsys):
    folder, words = undisturbed
    before = (folder / 'output/models.csv').read_bytes()
    command_line.override([*words, 'RESUME=True'])
    Lightning_trainer.train_fold(0)
    assert f'fold 0 is finished, {config.EPOCHS} epochs' in capsys.readouterr().out
    assert (folder / 'output/models.csv').read_bytes() == before
    command_line.override([*words, 'RESUME=True', 'LR=0.5', 'LOSS=CE'])
    with pytest.raises(
        config.UserMistake, match='started with LOSS=IoULoss, LR=0.001: set the same'
    ):
        Lightning_trainer.train_fold(0)
    for epochs in (2, 15):
        command_line.override([*words, 'RESUME=True', f'EPOCHS={epochs}'])
        with pytest.raises(config.UserMistake, match='started with EPOCHS=12: set .*START_FROM'):
            Lightning_trainer.train_fold(0)


def test_a_run_goes_on_in_a_folder_that_was_moved(undisturbed, tmp_path, capsys):
    folder, words = undisturbed
    words = [*words, f'LOGS_PATH={tmp_path}/logs', f'OUTPUT={tmp_path}/output']
    words += [f'TRAIN_FOLDS={folder}/output/train_folds.csv', 'EPOCHS=5']
    command_line.override(words)
    with dies_in_epoch(3):
        Lightning_trainer.train_fold(0)
    shutil.move(tmp_path / 'logs', tmp_path / 'moved')
    capsys.readouterr()
    command_line.override([*words, f'LOGS_PATH={tmp_path}/moved', 'RESUME=True'])
    Lightning_trainer.train_fold(0)
    told = capsys.readouterr().out
    assert 'epoch   5/5' in told and 'epoch   3/5' not in told
    row = pd.read_csv(tmp_path / 'output/models.csv').iloc[0]
    assert row.checkpoint == f'{tmp_path}/moved/version_0/checkpoints/best.ckpt'
    history = pd.read_csv(tmp_path / 'moved/version_0/metrics.csv')
    assert row.val_dice == pytest.approx(history.val_dice.max()) and len(history) == 5
    best = torch.load(row.checkpoint, weights_only=True)
    assert best['epoch'] == history.val_dice.idxmax()
    assert not (tmp_path / 'logs').exists()


@pytest.mark.parametrize(
    'words',
    [
        ['SCHEDULE=cosine', 'NUM_WORKERS=2'],
        ['SCHEDULE=poly', 'OPTIMIZER=SGD', "OPTIMIZER_ARGS={'momentum': 0.9}", 'GRADIENT_CLIP=0.1'],
        ['SCHEDULE=None', 'PATIENCE=9', 'OPTIMIZER=AdamW', "OPTIMIZER_ARGS={'weight_decay': 0.1}"],
    ],
    ids=lambda words: words[0],
)
def test_stopped_three_times_ends_in_the_same_weights_to_the_bit(
    undisturbed, tmp_path, monkeypatch, words
):
    folder, settings = undisturbed
    monkeypatch.setitem(model_dispatcher.MODELS, 'tiny', Tiny)
    ends = []
    for stops in ([], [1, 2, 5]):
        paths = [f'LOGS_PATH={tmp_path}/{len(stops)}', f'OUTPUT={tmp_path}/output']
        paths.append(f'TRAIN_FOLDS={folder}/output/train_folds.csv')
        command_line.override([*settings, *paths, 'MODEL_NAME=tiny', *words])
        for stop in stops:
            with dies_in_epoch(stop):
                Lightning_trainer.train_fold(0)
            config.RESUME = True
        Lightning_trainer.train_fold(0)
        ends.append(last_checkpoint(tmp_path / str(len(stops))))
    first, second = ends
    for name, tensor in first['state_dict'].items():
        assert torch.equal(tensor, second['state_dict'][name]), name
    assert first['lr_schedulers'] == second['lr_schedulers']
    assert first['callbacks']['EpochLog'] == second['callbacks']['EpochLog']
    rates = [row['lr'] for row in first['callbacks']['EpochLog']['history']]
    assert (rates[-1] < max(rates)) == (words[0] != 'SCHEDULE=None')


def test_an_epoch_that_is_not_the_best_is_kept_as_the_last(undisturbed, tmp_path, capsys):
    folder, words = undisturbed
    given = [f'LOGS_PATH={tmp_path}/logs', f'OUTPUT={tmp_path}/output', 'EPOCHS=2', 'LR=1e-12']
    given.append(f'TRAIN_FOLDS={folder}/output/train_folds.csv')
    command_line.override([*words, *given])
    Lightning_trainer.train_fold(0)
    checkpoints = tmp_path / 'logs/version_0/checkpoints'
    assert {file.name for file in checkpoints.iterdir()} == {'best.ckpt', 'last.ckpt'}
    history = pd.read_csv(tmp_path / 'logs/version_0/metrics.csv')
    epochs = [
        torch.load(checkpoints / f'{n}.ckpt', weights_only=True)['epoch'] for n in ('best', 'last')
    ]
    assert epochs == [history.val_dice.idxmax(), 1]
    config.RESUME = True
    assert callbacks.find_run(0) == tmp_path / 'logs/version_0'
    Lightning_trainer.train_fold(0)
    assert 'fold 0 is finished, 2 epochs' in capsys.readouterr().out


def test_a_best_last_epoch_is_written_once(undisturbed, tmp_path, monkeypatch):
    """best.ckpt and last.ckpt are then one file, or two equal ones where the disk has no links."""
    folder, words = undisturbed

    def refuse(*paths):
        raise OSError('no links here')

    for name in ('link', 'copy'):
        given = [f'LOGS_PATH={tmp_path}/{name}', f'OUTPUT={tmp_path}/output', 'EPOCHS=1']
        given.append(f'TRAIN_FOLDS={folder}/output/train_folds.csv')
        command_line.override([*words, *given])
        if name == 'copy':
            monkeypatch.setattr(os, 'link', refuse)
        Lightning_trainer.train_fold(0)
        best, last = (tmp_path / name / f'version_0/checkpoints/{n}.ckpt' for n in ('best', 'last'))
        assert best.samefile(last) == (name == 'link')
        assert best.read_bytes() == last.read_bytes()
        assert len(list(best.parent.iterdir())) == 2


def test_a_kill_between_the_two_checkpoints_repeats_an_epoch(undisturbed, tmp_path, monkeypatch):
    folder, words = undisturbed
    given = [f'LOGS_PATH={tmp_path}/logs', f'OUTPUT={tmp_path}/output', 'EPOCHS=4']
    given.append(f'TRAIN_FOLDS={folder}/output/train_folds.csv')
    command_line.override([*words, *given, 'RESUME=True'])
    link, calls = callbacks.link_or_copy, []

    def dies_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise ZeroDivisionError
        link(source, target)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(callbacks, 'link_or_copy', dies_at_the_second)
        Lightning_trainer.train_fold(0)
    best, last = (tmp_path / f'logs/version_0/checkpoints/{n}.ckpt' for n in ('best', 'last'))
    assert (
        torch.load(best, weights_only=True)['epoch'] > torch.load(last, weights_only=True)['epoch']
    )
    Lightning_trainer.train_fold(0)
    whole = [*words, f'LOGS_PATH={tmp_path}/whole', f'OUTPUT={tmp_path}/output', 'EPOCHS=4']
    command_line.override([*whole, given[-1]])
    Lightning_trainer.train_fold(0)
    for name in ('best.ckpt', 'last.ckpt'):
        first, second = (
            torch.load(tmp_path / logs / f'version_0/checkpoints/{name}', weights_only=True)
            for logs in ('logs', 'whole')
        )
        assert first['epoch'] == second['epoch']
        for key, weight in first['state_dict'].items():
            assert torch.equal(weight, second['state_dict'][key]), key


def test_what_is_not_a_run_of_ours_is_passed_over(undisturbed, tmp_path, capsys):
    """Another project's runs, one killed before its first checkpoint, one of before fixed names."""
    folder, words = undisturbed
    shutil.copytree(folder / 'logs', tmp_path / 'logs')
    command_line.override([*words, f'LOGS_PATH={tmp_path}/logs', 'RESUME=True'])
    for number, hparams in enumerate(('lr: 0.1\n', '!!python/object:x.Y {}\n', '- a\n', None), 1):
        checkpoints = tmp_path / f'logs/version_{number}/checkpoints'
        checkpoints.mkdir(parents=True)
        torch.save({'state_dict': {}}, checkpoints / 'last.ckpt')
        if hparams is not None:
            (checkpoints.parent / 'hparams.yaml').write_text(hparams)
    ours = (tmp_path / 'logs/version_0/hparams.yaml').read_text()
    for number in (5, 6):
        (tmp_path / f'logs/version_{number}/checkpoints').mkdir(parents=True)
        (tmp_path / f'logs/version_{number}/hparams.yaml').write_text(ours)
    (tmp_path / 'logs/version_6/checkpoints/last.ckpt').write_bytes(b'')
    (tmp_path / 'logs/version_7').mkdir()
    (tmp_path / 'logs/version_7/notes.txt').write_text('mine')
    before = set((tmp_path / 'logs').rglob('*'))
    assert callbacks.find_run(0) == tmp_path / 'logs/version_0'
    assert 'version_6 has no best.ckpt' in capsys.readouterr().out
    assert callbacks.find_run(1) is None
    assert set((tmp_path / 'logs').rglob('*')) == before  # nothing is tidied up


def test_sigterm_ends_tidily(undisturbed, tmp_path):
    """Also if it reaches the parent, the training and its workers at once, as from scancel."""
    make_carvana(tmp_path / 'input', cars=6)
    words = [*settings(tmp_path), *SETTINGS, 'EPOCHS=500', 'FOLDS=[0, 1]', 'NUM_WORKERS=2']
    command_line.override(words)
    folds.main()
    process = start('Lightning_trainer.py', *words, stderr=subprocess.STDOUT)
    # The line of an epoch is printed before its checkpoint is saved, so wait for the second one.
    while 'epoch   2/500' not in process.stdout.readline() and process.poll() is None:
        pass
    os.killpg(process.pid, signal.SIGTERM)
    log = finish(process).stdout
    assert process.returncode == 143
    assert 'fold 0 was stopped: run again with RESUME=True' in log and 'Traceback' not in log


def test_a_killed_tester_goes_on_to_the_same_bytes(undisturbed, tmp_path):
    folder, words = undisturbed
    test = tmp_path / 'test'
    test.mkdir()
    source = Image.open(next((folder / 'input/test_hq').iterdir())).resize((640, 480))
    for number in range(150):
        source.rotate(number).save(test / f'{number:03d}.jpg', quality=90)
    checkpoint = pd.read_csv(folder / 'output/models.csv').checkpoint[0]
    given = [f'PATH={folder / checkpoint}', f'TEST_PATH={test}', 'INPUT=/none', 'THRESHOLD=0.5']
    given += ['NUM_WORKERS=0', 'ACCELERATOR=cpu']
    two = start('Lightning_tester.py', *given, f'OUTPUT={tmp_path}/two', 'DEVICES=2')
    killed = [*given, f'OUTPUT={tmp_path}/killed', 'RESUME=True']

    def part():
        return next((tmp_path / 'killed').glob('submission.*.part0'), tmp_path / 'none')

    for lines, kill, status in ((10, signal.SIGKILL, -9), (80, signal.SIGTERM, 143)):
        process = start('Lightning_tester.py', *killed)
        while process.poll() is None:
            time.sleep(0.01)
            if part().exists() and part().read_bytes().count(b'\n') > lines:
                break
        process.send_signal(kill)
        assert finish(process).returncode == status
        assert 10 < part().read_bytes().count(b'\n') < 150
        assert not (tmp_path / 'killed/submission.csv').exists()
    with part().open('ab') as file:
        file.write(b'149.jpg,1 2')  # a line that was being written
    for outputs in (killed, [*given, f'OUTPUT={tmp_path}/whole']):
        command_line.override(outputs)
        Lightning_tester.main()
    submission = (tmp_path / 'whole/submission.csv').read_bytes()
    assert submission.count(b'\n') == 151
    assert (tmp_path / 'killed/submission.csv').read_bytes() == submission
    result = finish(two)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'two/submission.csv').read_bytes() == submission
    assert not list(tmp_path.glob('*/*.part*'))


def test_other_images_in_the_folds_are_refused(undisturbed, tmp_path):
    """Also by the tester: an image that a model was trained on would be scored as unseen."""
    folder, words = undisturbed
    other = f'TRAIN_FOLDS={tmp_path}/other.csv'
    command_line.override([*words, other, 'SEED=7'])
    folds.main()
    command_line.override([*words, other, 'RESUME=True'])
    with pytest.raises(config.UserMistake, match='started with other images in its folds'):
        Lightning_trainer.train_fold(0)
    command_line.override([*words, other, f'OUTPUT={tmp_path}/out'])
    checkpoint = str(folder / pd.read_csv(folder / 'output/models.csv').checkpoint[0])
    models = {0: Lightning_tester.load_model(checkpoint)}
    with pytest.raises(config.UserMistake, match='fold 0 of .*other.csv has other images'):
        Lightning_tester.score_out_of_fold(models)
    assert not (tmp_path / 'out').exists()
