"""Several processes: the same scores as one, whoever starts them; files by rank 0 alone."""

import os
import signal
import socket
import subprocess
import sys
import time

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
    (rank0,) = children(process.pid)
    (rank1,) = (pid for pid in children(rank0) if b'LOCAL_RANK=1' in environ(pid))
    os.kill(rank1, signal.SIGKILL)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode not in (0, None)
    assert 'RESUME=True goes on' in rest and 'Traceback' not in rest
    time.sleep(3)
    assert not os.path.exists(f'/proc/{rank0}')


def children(pid: int) -> list[int]:
    return [int(word) for word in subprocess.getoutput(f'pgrep -P {pid}').split()]


def environ(pid: int) -> bytes:
    with open(f'/proc/{pid}/environ', 'rb') as file:
        return file.read()


def test_the_folds_processes_meet_at_ports_of_their_own(monkeypatch):
    """Under torchrun, whose agent keeps its own port, and under SLURM; elsewhere Lightning chooses."""
    import Lightning_trainer

    for name in ('MASTER_PORT', 'SLURM_NTASKS', 'SLURM_JOB_ID'):
        monkeypatch.delenv(name, raising=False)
    assert 'MASTER_PORT' not in Lightning_trainer.environment(2)
    monkeypatch.setenv('SLURM_JOB_ID', '123456')
    assert 'MASTER_PORT' not in Lightning_trainer.environment(2)
    monkeypatch.setenv('SLURM_NTASKS', '4')
    ports = {Lightning_trainer.environment(fold)['MASTER_PORT'] for fold in range(5)}
    assert len(ports) == 5 and all(15000 <= int(port) < 65536 for port in ports)
    monkeypatch.setenv('MASTER_PORT', '29500')
    found = Lightning_trainer.environment(2)
    assert found['MASTER_PORT'] == '29503' and found['TORCHELASTIC_USE_AGENT_STORE'] == 'False'
