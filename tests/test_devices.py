"""Several processes: the same scores as one, whoever starts them; files by rank 0 alone."""

import os
import signal
import socket
import subprocess
import sys

import pandas as pd
import pytest
from conftest import SRC, environment, make_carvana, run_script, settings

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(scope='module')
def uneven(tmp_path_factory):
    """7 cars in 3 folds: fold 0 has 9 images, which two processes cannot share evenly."""
    folder = tmp_path_factory.mktemp('devices')
    make_carvana(folder / 'input', cars=7, sides=3)
    words = [*settings(folder), 'N_FOLDS=3', 'FOLDS=[0]', 'TRAIN_BATCH_SIZE=2', 'VAL_BATCH_SIZE=2']
    assert run_script('folds.py', *words).returncode == 0
    return folder, words


def launch(*command) -> subprocess.Popen:
    out = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    return subprocess.Popen([*map(str, command)], env=environment(), start_new_session=True, **out)


def scores(text: str) -> list[float]:
    (line,) = (line for line in text.splitlines() if line.startswith('scores '))
    return [float(word) for word in line.split()[1:]]


def test_scores_of_two_processes_and_of_two_nodes_are_those_of_one(uneven):
    _, words = uneven
    script = f'{HERE}/validate_alone.py'
    one = launch(sys.executable, script, *words).communicate()[0]
    two = launch(sys.executable, script, *words, 'DEVICES=2').communicate()[0]
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    address = ['--nnodes=2', '--master-addr=127.0.0.1', f'--master-port={port}']
    torchrun = [sys.executable, '-m', 'torch.distributed.run', *address, '--nproc-per-node=1']
    nodes = [
        launch(*torchrun, f'--node-rank={rank}', script, *words, 'NUM_NODES=2') for rank in (0, 1)
    ]
    both = '\n'.join(node.communicate()[0] for node in nodes)
    assert scores(two) == pytest.approx(scores(one), abs=1e-6)
    assert scores(both) == pytest.approx(scores(one), abs=1e-6)


def test_training_on_two_devices_and_the_death_of_one(uneven):
    folder, words = uneven
    result = run_script('Lightning_trainer.py', *words, 'DEVICES=2')
    assert result.returncode == 0, result.stderr
    assert result.stderr == '' and '2 x cpu' in result.stdout
    assert result.stdout.count('fold 0  epoch   1/1') == 1
    assert [f.name for f in (folder / 'logs').glob('version_*')] == ['version_0']
    assert len(pd.read_csv(folder / 'output/models.csv')) == 1

    process = launch(
        sys.executable, SRC / 'Lightning_trainer.py', *words, 'DEVICES=2', 'EPOCHS=9999'
    )
    for line in process.stdout:
        if 'epoch   1/' in line:
            break
    (rank1,) = (pid for pid in children(process.pid) if b'LOCAL_RANK=1' in environ(pid))
    os.kill(rank1, signal.SIGKILL)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode not in (0, None)
    assert 'RESUME=True goes on' in rest and 'Traceback' not in rest


def children(pid: int) -> list[int]:
    return [int(word) for word in subprocess.getoutput(f'pgrep -P {pid}').split()]


def environ(pid: int) -> bytes:
    with open(f'/proc/{pid}/environ', 'rb') as file:
        return file.read()


def test_several_folds_in_one_launch_are_refused(uneven):
    _, words = uneven
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    text = launch(*torchrun, SRC / 'Lightning_trainer.py', *words, 'FOLDS=[0, 1]').communicate()[0]
    assert 'FOLDS=[0, 1]: torchrun and srun train one fold each' in text


def test_more_processes_than_batches(uneven, tmp_path):
    """3 images are one batch: the second process has nothing to do."""
    folder, words = uneven
    test = tmp_path / 'test'
    test.mkdir()
    for file in sorted((folder / 'input/train_hq').iterdir())[:3]:
        (test / file.name).write_bytes(file.read_bytes())
    checkpoint = pd.read_csv(folder / 'output/models.csv').checkpoint[0]
    texts = []
    for devices in (1, 2):
        given = [*words, f'PATH={checkpoint}', f'TEST_PATH={test}', f'DEVICES={devices}']
        given += ['VAL_BATCH_SIZE=4', f'OUTPUT={tmp_path}/{devices}']
        given.append(f'TRAIN_FOLDS={folder}/output/train_folds.csv')
        result = run_script('Lightning_tester.py', *given)
        assert result.returncode == 0, result.stderr
        texts.append(
            [(tmp_path / f'{devices}/{name}.csv').read_text() for name in ('oof', 'submission')]
        )
    assert texts[0] == texts[1] and texts[0][1].count('\n') == 4
