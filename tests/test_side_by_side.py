"""Folds in several processes: started at once, and while config.py is edited."""

import shutil
import subprocess
import sys

import pandas as pd
import yaml
from conftest import SRC, environment, make_carvana, run_script, settings


def start(script, *arguments) -> subprocess.Popen:
    out = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    return subprocess.Popen([sys.executable, script, *arguments], env=environment(), **out)


def test_three_folds_at_once_share_a_cache_and_lose_nothing(tmp_path):
    make_carvana(tmp_path / 'input', cars=6)
    arguments = [*settings(tmp_path), 'N_FOLDS=3', 'FOLDS=[0, 1, 2]', 'CACHE=True']
    assert run_script('folds.py', *arguments).returncode == 0
    script = SRC / 'Lightning_trainer.py'
    processes = [start(script, *arguments, f'FOLDS=[{fold}]') for fold in range(3)]
    texts = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], texts
    models = pd.read_csv(tmp_path / 'output/models.csv')
    assert models.fold.tolist() == [0, 1, 2] and models.version.nunique() == 3
    for row in models.itertuples():
        hparams = yaml.safe_load((tmp_path / 'logs' / row.version / 'hparams.yaml').read_text())
        assert hparams['val_folds'] == [row.fold]
    assert len(list((tmp_path / 'output/cache').iterdir())) == 1
    tested = run_script('Lightning_tester.py', *arguments)
    assert tested.returncode == 0, tested.stderr


def test_editing_config_between_two_folds_changes_nothing(tmp_path):
    make_carvana(tmp_path / 'input', cars=6)
    shutil.copytree(SRC, tmp_path / 'src', ignore=shutil.ignore_patterns('__pycache__'))
    arguments = [*settings(tmp_path), 'N_FOLDS=3', 'FOLDS=[0, 1]']
    assert run_script('folds.py', *arguments).returncode == 0
    process = start(tmp_path / 'src/Lightning_trainer.py', *arguments)
    for line in process.stdout:
        if line.startswith('fold      0'):
            form = (tmp_path / 'src/config.py').read_text()
            edited = form.replace("LOSS: str = 'IoULoss'", "LOSS: str = 'CE'")
            assert edited != form
            (tmp_path / 'src/config.py').write_text(edited)
    assert process.wait() == 0
    saved = [
        yaml.safe_load((tmp_path / f'logs/version_{n}/hparams.yaml').read_text()) for n in (0, 1)
    ]
    for hparams in saved:
        del hparams['train_folds'], hparams['val_folds'], hparams['FOLDS']
    assert saved[0] == saved[1] and saved[0]['LOSS'] == 'IoULoss'
