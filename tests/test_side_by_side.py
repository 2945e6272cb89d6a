"""Folds in several processes: started at once, and while config.py is edited."""

import shutil

import pandas as pd
import yaml
from conftest import SRC, finish, make_carvana, settings, start

import command_line
import folds
import Lightning_tester


def test_three_folds_at_once_share_a_cache_and_lose_nothing(tmp_path):
    make_carvana(tmp_path / 'input', cars=6)
    arguments = [*settings(tmp_path), 'N_FOLDS=3', 'FOLDS=[0, 1, 2]', 'CACHE=True']
    command_line.override(arguments)
    folds.main()
    processes = [start('Lightning_trainer.py', *arguments, f'FOLDS=[{f}]') for f in range(3)]
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [0, 0, 0], results
    models = pd.read_csv(tmp_path / 'output/models.csv')
    assert models.fold.tolist() == [0, 1, 2] and models.version.nunique() == 3
    for row in models.itertuples():
        hparams = yaml.safe_load((tmp_path / 'logs' / row.version / 'hparams.yaml').read_text())
        assert hparams['val_folds'] == [row.fold]
    saved = list((tmp_path / 'output/cache').iterdir())  # 12 images and masks
    assert len(saved) == 24 and {file.suffix for file in saved} == {'.npy'}
    Lightning_tester.main()
    assert len(pd.read_csv(tmp_path / 'output/oof.csv')) == 12


def test_editing_config_between_two_folds_changes_nothing(tmp_path):
    make_carvana(tmp_path / 'input', cars=6)
    shutil.copytree(SRC, tmp_path / 'src', ignore=shutil.ignore_patterns('__pycache__'))
    arguments = [*settings(tmp_path), 'N_FOLDS=3', 'FOLDS=[0, 1]']
    command_line.override(arguments)
    folds.main()
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
