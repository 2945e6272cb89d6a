"""RESUME=True: after kills the result is that of an undisturbed run."""

import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import SRC, environment, make_carvana, run_script, settings
from PIL import Image

SETTINGS = ['N_FOLDS=3', 'FOLDS=[0]', 'EPOCHS=3', 'MODEL_NAME=smp_fpn_resnet18', 'NUM_WORKERS=0']


def start(folder, script, *words):
    command = [sys.executable, str(SRC / script), *words]
    out = (folder / 'log.txt').open('a')
    # As many threads as in run_script: sums in another order differ in their last bits.
    return subprocess.Popen(command, stdout=out, stderr=out, env=environment())


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    make_carvana(folder / 'input', cars=6)
    words = [*settings(folder), *SETTINGS]
    for script in ('folds.py', 'Lightning_trainer.py'):
        result = run_script(script, *words)
        assert result.returncode == 0, result.stderr
    return folder, words


def weights(folder, row):
    return torch.load(folder / row.checkpoint, weights_only=True)['state_dict']


def assert_same(first, second):
    tables = [pd.read_csv(folder / 'output/models.csv') for folder in (first, second)]
    for one, other in zip(*(table.itertuples() for table in tables), strict=True):
        assert one.val_dice == other.val_dice and one.val_iou == other.val_iou
        a, b = weights(first, one), weights(second, other)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    make_carvana(tmp_path / 'input', cars=6)
    words = [*settings(tmp_path), *SETTINGS, 'RESUME=True']
    assert run_script('folds.py', *words).returncode == 0
    waits = [9.0, 11.0]
    for wait in waits:
        process = start(tmp_path, 'Lightning_trainer.py', *words)
        time.sleep(wait)
        children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True)
        process.kill()
        for child in children.stdout.split():
            subprocess.run(['kill', '-9', child])
        process.wait()
    result = run_script('Lightning_trainer.py', *words)
    assert result.returncode == 0, result.stderr
    assert_same(undisturbed[0], tmp_path)
    for row in pd.read_csv(tmp_path / 'output/models.csv').itertuples():
        history = pd.read_csv(tmp_path / 'logs' / row.version / 'metrics.csv')
        assert history[history.val_dice.notna()].epoch.tolist() == [0, 1, 2]
    left = {file.name for file in (tmp_path / 'output').iterdir()}
    assert left == {'train_folds.csv', 'models.csv'}


def test_finished_folds_are_left_alone_and_other_constants_refused(undisturbed):
    folder, words = undisturbed
    before = (folder / 'output/models.csv').read_bytes()
    result = run_script('Lightning_trainer.py', *words, 'RESUME=True')
    assert result.returncode == 0 and result.stdout.count('has its 3 epochs') == 1
    assert (folder / 'output/models.csv').read_bytes() == before
    result = run_script('Lightning_trainer.py', *words, 'RESUME=True', 'LR=0.5', 'LOSS=CE')
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert 'LOSS=IoULoss' in result.stderr and 'LR=0.001' in result.stderr


def test_more_epochs_go_on_from_the_last(undisturbed, tmp_path):
    folder, words = undisturbed
    result = run_script('Lightning_trainer.py', *words, 'RESUME=True', 'EPOCHS=4')
    assert result.returncode == 0, result.stderr
    assert 'epoch   4/4' in result.stdout and 'epoch   3/4' not in result.stdout


def test_sigterm_ends_tidily(undisturbed, tmp_path):
    make_carvana(tmp_path / 'input', cars=6)
    words = [*settings(tmp_path), *SETTINGS, 'EPOCHS=500', 'FOLDS=[0, 1]']
    assert run_script('folds.py', *words).returncode == 0
    process = start(tmp_path, 'Lightning_trainer.py', *words)
    for _ in range(600):
        time.sleep(0.1)
        if 'epoch   1/500' in (tmp_path / 'log.txt').read_text():
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    log = (tmp_path / 'log.txt').read_text()
    assert 'was stopped at val_dice' in log and 'RESUME=True' in log and 'Traceback' not in log


def test_a_killed_tester_goes_on_to_the_same_bytes(undisturbed, tmp_path):
    folder, words = undisturbed
    test = tmp_path / 'test'
    test.mkdir()
    source = next((folder / 'input/test_hq').iterdir())
    for number in range(150):
        Image.open(source).rotate(number).save(test / f'{number:03d}.jpg', quality=90)
    checkpoint = pd.read_csv(folder / 'output/models.csv').checkpoint[0]
    given = [f'PATH={folder / checkpoint}', f'TEST_PATH={test}', 'INPUT=/none', 'THRESHOLD=0.5']
    given += ['NUM_WORKERS=0', 'ACCELERATOR=cpu']
    whole = run_script('Lightning_tester.py', *given, f'OUTPUT={tmp_path}/whole')
    assert whole.returncode == 0, whole.stderr
    killed = [*given, f'OUTPUT={tmp_path}/killed', 'RESUME=True']
    part = tmp_path / 'killed/submission.csv.part0'
    for lines in (10, 80):
        process = start(tmp_path, 'Lightning_tester.py', *killed)
        for _ in range(600):
            time.sleep(0.05)
            if part.exists() and part.read_bytes().count(b'\n') > lines:
                break
        process.kill()
        process.wait()
        assert not (tmp_path / 'killed/submission.csv').exists()
    with part.open('ab') as file:
        file.write(b'149.jpg,1 2')  # a line that was being written
    result = run_script('Lightning_tester.py', *killed)
    assert result.returncode == 0, result.stderr
    submission = (tmp_path / 'whole/submission.csv').read_bytes()
    assert submission.count(b'\n') == 151
    assert (tmp_path / 'killed/submission.csv').read_bytes() == submission
    two = run_script(
        'Lightning_tester.py', *given, f'OUTPUT={tmp_path}/two', 'DEVICES=2', 'STRATEGY=ddp'
    )
    assert two.returncode == 0, two.stderr
    assert (tmp_path / 'two/submission.csv').read_bytes() == submission
    assert not list(tmp_path.glob('*/*.part*'))
