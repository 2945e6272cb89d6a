"""Several processes: the same scores as one, whoever starts them; files by rank 0 alone."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pandas as pd
import pytest
import validate_alone
from conftest import finish, make_carvana, own_config, run_script, settings, start

import command_line
import config
import folds
import Lightning_tester
import Lightning_trainer
import runtime

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(scope='module')
def uneven(tmp_path_factory):
    """7 cars in 3 folds: fold 0 has 9 images, which two processes cannot share evenly."""
    folder = tmp_path_factory.mktemp('devices')
    make_carvana(folder / 'input', cars=7, sides=3)
    words = [*settings(folder), 'N_FOLDS=3', 'FOLDS=[0]', 'TRAIN_BATCH_SIZE=2', 'VAL_BATCH_SIZE=2']
    with own_config(*words):
        folds.main()
    return folder, words


def scores(text: str) -> list[float]:
    (line,) = (line for line in text.splitlines() if line.startswith('scores '))
    return [float(word) for word in line.split()[1:]]


def test_scores_of_two_processes_and_of_two_nodes_are_those_of_one(uneven, capsys):
    _, words = uneven
    script = f'{HERE}/validate_alone.py'
    two = start(script, *words, 'DEVICES=2')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    address = ['--nnodes=2', '--master-addr=127.0.0.1', f'--master-port={port}']
    torchrun = [sys.executable, '-m', 'torch.distributed.run', *address, '--nproc-per-node=1']
    nodes = [
        start(script, *words, 'NUM_NODES=2', python=[*torchrun, f'--node-rank={rank}'])
        for rank in (0, 1)
    ]
    command_line.override(words)
    validate_alone.main()
    one = scores(capsys.readouterr().out)
    assert scores(finish(two).stdout) == pytest.approx(one, abs=1e-6)
    both = ''.join(finish(node).stdout for node in nodes)
    assert scores(both) == pytest.approx(one, abs=1e-6)


def test_training_on_two_devices_and_the_death_of_one(uneven, tmp_path):
    folder, words = uneven
    long = [f'LOGS_PATH={tmp_path}/logs', f'OUTPUT={tmp_path}/output', 'EPOCHS=9999']
    long.append(f'TRAIN_FOLDS={folder}/output/train_folds.csv')
    process = start('Lightning_trainer.py', *words, *long, 'DEVICES=2', stderr=subprocess.STDOUT)
    result = run_script('Lightning_trainer.py', *words, 'DEVICES=2')
    assert result.returncode == 0, result.stderr
    assert result.stderr == '' and '2 x cpu' in result.stdout
    assert result.stdout.count('fold 0  epoch   1/1') == 1
    assert [f.name for f in (folder / 'logs').glob('version_*')] == ['version_0']
    assert len(pd.read_csv(folder / 'output/models.csv')) == 1

    for line in process.stdout:
        if 'epoch   1/' in line:
            break
    (rank1,) = (pid for pid in children(process.pid) if b'LOCAL_RANK=1' in environ(pid))
    os.kill(rank1, signal.SIGKILL)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode not in (0, None)
    assert 'run again with RESUME=True' in rest and 'Traceback' not in rest


def children(pid: int) -> list[int]:
    return [int(word) for word in subprocess.getoutput(f'pgrep -P {pid}').split()]


def environ(pid: int) -> bytes:
    with open(f'/proc/{pid}/environ', 'rb') as file:
        return file.read()


TORCHRUN = {'TORCHELASTIC_RUN_ID': 'x', 'WORLD_SIZE': '2'}
SRUN = {'SLURM_STEP_ID': '0', 'SLURM_NTASKS': '2', 'SLURM_JOB_ID': '1', 'SLURM_PROCID': '1'}


@pytest.mark.parametrize('variables', [TORCHRUN, SRUN])
def test_several_folds_in_one_launch_are_refused(uneven, monkeypatch, variables):
    _, words = uneven
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command_line.override([*words, 'FOLDS=[0, 1]', 'DEVICES=2'])
    refused = r'FOLDS=\[0, 1\]: torchrun and srun can train only one fold'
    with pytest.raises(config.UserMistake, match=refused):
        Lightning_trainer.main()


def test_what_lightning_does_not_take_of_srun_is_one_line(uneven, monkeypatch):
    """--ntasks without --ntasks-per-node, for one training on two devices."""
    _, words = uneven
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    command_line.override([*words, 'DEVICES=2'])
    with pytest.raises(config.UserMistake, match='DEVICES=2, .*--ntasks-per-node=2') as raised:
        runtime.make_trainer()
    assert '\n' not in str(raised.value)


def test_each_task_of_srun_trains_its_own_fold(uneven, tmp_path):
    """srun --ntasks=2, one fold a task; and a shell of salloc, which starts no step."""
    folder, words = uneven
    words = [*words, f'LOGS_PATH={tmp_path}/logs', f'OUTPUT={tmp_path}/output']
    words.append(f'TRAIN_FOLDS={folder}/output/train_folds.csv')
    tasks = [
        start(
            'Lightning_trainer.py',
            *words,
            f'FOLDS=[{n}]',
            variables=SRUN | {'SLURM_PROCID': str(n)},
        )
        for n in (0, 1)
    ]
    results = [finish(task) for task in tasks]
    salloc = {'SLURM_NTASKS': '2', 'SLURM_JOB_ID': '1', 'SLURM_JOB_NAME': 'job'}
    results.append(run_script('Lightning_trainer.py', *words, 'FOLDS=[2]', variables=salloc))
    for result in results:
        assert result.returncode == 0 and result.stderr == '', result.stderr
        assert 'epoch   1/1' in result.stdout
    assert pd.read_csv(tmp_path / 'output/models.csv').fold.tolist() == [0, 1, 2]
    assert len(list((tmp_path / 'logs').glob('version_*'))) == 3


def test_more_processes_than_batches(uneven, tmp_path):
    """3 images are one batch: the second process has nothing to do."""
    folder, words = uneven
    test = tmp_path / 'test'
    test.mkdir()
    for file in sorted((folder / 'input/train_hq').iterdir())[:3]:
        (test / file.name).write_bytes(file.read_bytes())
    given = [*words, f'TEST_PATH={test}', 'VAL_BATCH_SIZE=4']
    given.append(f'TRAIN_FOLDS={folder}/output/train_folds.csv')
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
        shutil.copy(folder / 'output/models.csv', tmp_path / name)
    result = run_script('Lightning_tester.py', *given, f'OUTPUT={tmp_path}/two', 'DEVICES=2')
    assert result.returncode == 0, result.stderr
    command_line.override([*given, f'OUTPUT={tmp_path}/one'])
    Lightning_tester.main()
    for name, lines in (('oof', 10), ('submission', 4)):
        text = (tmp_path / f'one/{name}.csv').read_text()
        assert text == (tmp_path / f'two/{name}.csv').read_text() and text.count('\n') == lines
