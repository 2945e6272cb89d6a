"""The three steps as a user runs them: processes, files, scores, interruptions."""

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import make_carvana, run_here, run_script, settings
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import command_line
import config
import files
import folds
import images
from dataset import CarvanaDataset
from Lightning_module import CarvanaModel


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder in which folds 0 and 1 were trained and tested by the scripts; with its words."""
    folder = tmp_path_factory.mktemp('run')
    make_carvana(folder / 'input', cars=6, sides=3, test=3)
    words = [*settings(folder), 'N_FOLDS=3', 'FOLDS=[0, 1]', 'EPOCHS=12', 'LR=0.001']
    results = {}
    for script in ('folds.py', 'Lightning_trainer.py', 'Lightning_tester.py'):
        results[script] = run_script(script, *words, cwd=folder)
        assert results[script].returncode == 0, results[script].stderr
    return folder, words, results


def test_the_files_of_the_contract_are_there(trained):
    folder, _, _ = trained
    models = pd.read_csv(folder / 'output/models.csv')
    assert list(models.columns) == ['fold', 'version', 'checkpoint', 'val_dice', 'val_iou']
    assert models.fold.tolist() == [0, 1]
    for row in models.itertuples():
        version = folder / 'logs' / row.version
        assert (folder / row.checkpoint).is_file()
        for name in (
            'checkpoints/last.ckpt',
            'metrics.csv',
            'curves.png',
            'profile.txt',
            'hparams.yaml',
        ):
            assert (version / name).stat().st_size > 0
        events = EventAccumulator(str(version)).Reload().Tags()
        assert 'truth and prediction' in events['images'] and 'val_dice' in events['scalars']
        saved = yaml.safe_load((version / 'hparams.yaml').read_text())
        assert set(config.constants()) < set(saved) and saved['val_folds'] == [row.fold]
        history = pd.read_csv(version / 'metrics.csv')
        assert history.val_dice.max() == pytest.approx(row.val_dice)
        assert history.epoch.tolist() == list(range(12))  # one row an epoch
    names = {file.name for file in (folder / 'output').iterdir() if file.name[0] != '.'}
    assert names == {
        'train_folds.csv', 'models.csv', 'oof.csv', 'oof_worst.png', 'oof_histogram.png',
        'submission.csv', 'test_samples.png', 'model_fold0', 'model_fold1'}  # fmt: skip


def test_what_is_printed(trained):
    _, _, results = trained
    out = results['Lightning_trainer.py'].stdout
    for text in ('12 images of 4 groups', '6 images of 2 groups', '32-true: float32: PRECISION=16 needs',
                 'fold 1  epoch  12/12', 'peak memory',
                 'val_dice ', 'over 2 folds'):  # fmt: skip
        assert text in out
    assert results['Lightning_trainer.py'].stderr == ''
    assert results['Lightning_tester.py'].stderr == ''


def test_the_folds_models_start_apart_and_differ(trained):
    folder, _, _ = trained
    models = pd.read_csv(folder / 'output/models.csv')
    first, second = (
        torch.load(folder / c, weights_only=True)['state_dict'] for c in models.checkpoint
    )
    name = next(iter(first))
    assert first[name].ndim == 4 and not torch.equal(first[name], second[name])


def test_out_of_fold_scores_can_be_recomputed(trained):
    """From the checkpoints, image by image, by other code."""
    folder, words, _ = trained
    command_line.override(words)
    table = pd.read_csv(folder / 'output/oof.csv', dtype={'img': str})
    assert list(table.columns) == ['img', 'kfold', 'dice', 'iou']
    assignment = folds.read_folds([0, 1])
    assert dict(zip(table.img, table.kfold)) == dict(zip(assignment.img, assignment.kfold))
    printed = [
        line for line in trained[2]['Lightning_tester.py'].stdout.split('\n') if 'threshold' in line
    ]
    threshold = float(printed[0].split()[1].rstrip(':'))
    for row in pd.read_csv(folder / 'output/models.csv').itertuples():
        model = CarvanaModel.load_from_checkpoint(folder / row.checkpoint, weights_only=True).eval()
        data = CarvanaDataset([row.fold])
        for index, name in enumerate(data.names):
            truth = np.array(Image.open(files.pairs_of([name])[0][1]))
            with torch.inference_mode():
                p = model(data[index]['image'][None]).sigmoid()
                full = F.interpolate(p, truth.shape, mode='bilinear', align_corners=False)[
                    0, 0
                ].numpy()
            mask = full > threshold
            both = (mask & (truth == 1)).sum()
            found = table[table.img == name].iloc[0]
            assert found.dice == pytest.approx(2 * both / (mask.sum() + truth.sum()), abs=1e-4)
            assert found.iou == pytest.approx(both / (mask | (truth == 1)).sum(), abs=1e-4)


def test_the_submission_decodes_to_masks_that_fit(trained):
    folder, _, _ = trained
    table = pd.read_csv(folder / 'output/submission.csv')
    assert list(table.columns) == ['img', 'rle_mask']
    assert table.img.tolist() == sorted(f.name for f in (folder / 'input/test_hq').iterdir())
    for row in table.itertuples():
        mask = images.rle_decode(row.rle_mask, (48, 64))
        bright = np.array(Image.open(folder / 'input/test_hq' / row.img)).mean(2) > 115
        assert 2 * (mask & bright).sum() / (mask.sum() + bright.sum()) > 0.7


def test_a_checkpoint_and_a_folder_are_enough_to_predict(trained, tmp_path, monkeypatch, capsys):
    folder, words, _ = trained
    checkpoint = folder / pd.read_csv(folder / 'output/models.csv').checkpoint[0]
    given = [f'PATH={checkpoint}', f'TEST_PATH={folder}/input/test_hq', f'OUTPUT={tmp_path}/out']
    given += [f'INPUT={tmp_path}/nothing', 'NUM_WORKERS=0', 'ACCELERATOR=cpu']
    given += ['SAVE_MASKS=True', 'TTA=True', 'THRESHOLD=0.4']
    run_here(monkeypatch, 'Lightning_tester.py', *given)
    assert 'no scores, no export; the threshold is 0.4' in capsys.readouterr().out
    table = pd.read_csv(tmp_path / 'out/submission.csv')
    for row in table.itertuples():
        png = np.array(Image.open(tmp_path / 'out/test_masks' / row.img.replace('.jpg', '.png')))
        assert np.array_equal(png, 255 * images.rle_decode(row.rle_mask, (48, 64)))


def test_a_broken_image_is_named_by_the_worker_that_meets_it(carvana, monkeypatch):
    words = [*settings(carvana), 'N_FOLDS=3', 'FOLDS=[0]', 'NUM_WORKERS=2']
    run_here(monkeypatch, 'folds.py', *words)
    bad = next((carvana / 'input/train_masks').iterdir())
    Image.fromarray(np.full((48, 64), 7, np.uint8)).save(bad)
    with pytest.raises(SystemExit, match=rf'^.*{bad.name}: mask values 7.*$') as stop:
        run_here(monkeypatch, 'Lightning_trainer.py', *words)
    assert '\n' not in str(stop.value)
    assert not (carvana / 'output/models.csv').exists()


def test_looking_at_data_and_model(trained, monkeypatch, capsys):
    folder, words, _ = trained
    picture = folder / 'output/test_dataset.png'
    run_here(monkeypatch, 'test_dataset.py', *words)
    assert picture.stat().st_size > 10_000
    picture.unlink()
    run_here(monkeypatch, 'test_model.py', *words, 'MODEL_NAME=smp_unet_resnet18')
    assert '14.33 M parameters' in capsys.readouterr().out


def test_nothing_is_written_under_input(trained):
    folder, _, _ = trained
    files = {
        str(f.relative_to(folder / 'input')).split('/')[0] for f in (folder / 'input').rglob('*')
    }
    assert files == {'train_hq', 'train_masks', 'test_hq'}
