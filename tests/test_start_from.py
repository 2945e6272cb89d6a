"""START_FROM: a new training starts from the whole model of another one."""

import pandas as pd
import pytest
import torch
from conftest import SRC, make_carvana, own_config, settings

import callbacks
import command_line
import config
import folds
import Lightning_trainer
from Lightning_module import CarvanaModel


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Folds 0 and 1 of 3 are trained."""
    folder = tmp_path_factory.mktemp('trained')
    make_carvana(folder / 'input', cars=6)
    words = [*settings(folder), 'N_FOLDS=3', 'CLASSES=2']
    with own_config(*words):
        folds.main()
        for fold in (0, 1):
            Lightning_trainer.train_fold(fold)
    return folder, words


def checkpoint(folder, fold: int) -> str:
    models = pd.read_csv(folder / 'output/models.csv', index_col='fold')
    return models.checkpoint[fold]


def first_weights(monkeypatch) -> dict:
    """The weights as a training begins, filled when it does."""
    weights, start = {}, CarvanaModel.on_fit_start

    def keep(self):
        weights.update({name: tensor.clone() for name, tensor in self.state_dict().items()})
        start(self)

    monkeypatch.setattr(CarvanaModel, 'on_fit_start', keep)
    return weights


def test_a_training_starts_from_all_weights_at_another_size_with_another_loss(
    trained, tmp_path, monkeypatch, capsys
):
    folder, words = trained
    weights, file = first_weights(monkeypatch), checkpoint(folder, 0)
    words = [*words, f'LOGS_PATH={tmp_path}/logs', f'START_FROM={file}', 'CROP_SIZE=64', 'LOSS=CE']
    command_line.override([*words, 'ENCODER_WEIGHTS=imagenet', 'EPOCHS=2'])  # it is not read
    Lightning_trainer.train_fold(0)
    told = capsys.readouterr().out
    assert f'starts from {file}\n' in told
    assert 'nobody can check' not in told
    saved = torch.load(file, weights_only=True)['state_dict']
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    config.RESUME, config.START_FROM = True, None  # RESUME does not compare it
    Lightning_trainer.train_fold(0)
    assert 'fold 0 is finished, 2 epochs' in capsys.readouterr().out


def test_each_fold_takes_its_own_of_a_models_csv(trained, tmp_path, monkeypatch):
    folder, words = trained
    weights = first_weights(monkeypatch)
    words = [*words, f'LOGS_PATH={tmp_path}/logs', f'START_FROM={folder}/output/models.csv']
    words += [f'OUTPUT={tmp_path}', f'TRAIN_FOLDS={folder}/output/train_folds.csv']
    command_line.override(words)
    Lightning_trainer.train_fold(1)
    saved = torch.load(checkpoint(folder, 1), weights_only=True)['state_dict']
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    with pytest.raises(config.UserMistake, match=r'START_FROM: \S+models.csv has no fold 2'):
        Lightning_trainer.train_fold(2)


def test_a_head_of_other_classes_starts_fresh(trained, tmp_path, monkeypatch, capsys):
    folder, words = trained
    weights = first_weights(monkeypatch)
    words = [*words, 'CLASSES=1', f'START_FROM={checkpoint(folder, 0)}']
    words += [f'OUTPUT={tmp_path}', f'TRAIN_FOLDS={folder}/output/train_folds.csv']
    command_line.override([*words, f'LOGS_PATH={tmp_path}/logs'])
    Lightning_trainer.train_fold(0)
    assert 'but its head has CLASSES=2: a new head' in capsys.readouterr().out
    saved = torch.load(checkpoint(folder, 0), weights_only=True)['state_dict']
    for name, tensor in saved.items():
        is_head = name.startswith('model.segmentation_head.')
        assert is_head == (weights[name].shape != tensor.shape), name
        assert is_head or torch.equal(weights[name], tensor), name


def test_a_model_that_has_seen_the_images_is_refused(trained, tmp_path, capsys):
    folder, words = trained
    words = [*words, f'START_FROM={checkpoint(folder, 1)}', f'LOGS_PATH={tmp_path}/logs']
    command_line.override(words)
    with pytest.raises(config.UserMistake, match='was trained on the images that fold 0 is valid'):
        Lightning_trainer.train_fold(0)
    other = make_carvana(tmp_path / 'other', cars=7)  # other images: nobody can check
    command_line.override([*words, f'INPUT={other}', f'OUTPUT={tmp_path}/output'])
    folds.main()
    Lightning_trainer.train_fold(0)
    assert 'nobody can check whether' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['MODEL_NAME=smp_unet_tu-test_resnet'], 'has MODEL_NAME=smp_linknet_tu-test_resnet: set'),
        (['CHANNELS=1'], 'has CHANNELS=3: set the same CHANNELS'),
        (['START_FROM=gone.ckpt'], 'gone.ckpt: no such file: set START_FROM to'),
        ([f'START_FROM={SRC / "config.py"}'], 'config.py: cannot be read'),
    ],
)
def test_what_does_not_fit_is_refused(trained, tmp_path, words, message):
    folder, given = trained
    start = f'START_FROM={checkpoint(folder, 0)}'
    command_line.override([*given, start, f'LOGS_PATH={tmp_path}/logs', *words])
    with pytest.raises(config.UserMistake, match=message):
        Lightning_trainer.train_fold(0)
    assert not (tmp_path / 'logs').exists() or not list((tmp_path / 'logs').glob('version_*'))


def test_a_file_of_weights_is_not_a_checkpoint(trained, tmp_path):
    torch.save({'state_dict': {'conv1.weight': torch.zeros(3)}}, tmp_path / 'weights.pth')
    remedy = 'set START_FROM to a checkpoint'
    with pytest.raises(config.UserMistake, match='not a checkpoint of Lightning_trainer.py: set'):
        callbacks.read_checkpoint(tmp_path / 'weights.pth', remedy)
