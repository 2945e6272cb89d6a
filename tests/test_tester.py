"""The tester's parts in this process: what it predicts, what it refuses."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Evil, draw_ellipse, settings
from PIL import Image

import command_line
import config
import images
import Lightning_tester
import masks
import predictor
from Lightning_module import CarvanaModel


@pytest.fixture
def model(tmp_path):
    words = ['IMAGE_SUFFIX=.png', f'TEST_PATH={tmp_path}/test', 'MODEL_NAME=smp_unet_resnet18']
    command_line.override([*settings(tmp_path), *words])
    torch.manual_seed(0)
    (tmp_path / 'test').mkdir()
    return CarvanaModel([1], [0]).eval()


def predict(models, threshold=0.5):
    config.PATH = __file__  # stands for the checkpoint
    test_files = predictor.list_test_files(next(iter(models.values())))
    Lightning_tester.predict_test(models, threshold, test_files)


def submission(model):
    predict({0: model})
    table = pd.read_csv(config.path(config.OUTPUT) / 'submission.csv', keep_default_na=False)
    return dict(zip(table.img, table.rle_mask))


def test_images_of_every_kind_give_the_right_answer(model, tmp_path):
    """Each as the RGB picture that a viewer shows."""
    colours, _ = draw_ellipse(np.random.default_rng(3))
    picture, test = Image.fromarray(colours), tmp_path / 'test'
    picture.save(test / 'rgb.png')
    picture.convert('RGBA').save(test / 'rgba.png')
    picture.convert('L').save(test / 'grey.png')
    picture.convert('L').convert('RGB').save(test / 'grey_rgb.png')
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(test / 'turned.png', exif=exif)
    rows = submission(model)
    assert rows['rgb.png'] and rows['rgb.png'] == rows['rgba.png'] == rows['turned.png']
    assert rows['grey.png'] == rows['grey_rgb.png'] != rows['rgb.png']
    assert masks.rle_decode(rows['turned.png'], (48, 64)).any()


def test_images_of_different_sizes_share_a_batch(model, tmp_path):
    for number, size in enumerate([(40, 60), (61, 33), (32, 32)]):
        Image.fromarray(draw_ellipse(np.random.default_rng(1), *size)[0]).save(
            tmp_path / f'test/{number}.png'
        )
    rows = submission(model)
    for number, size in enumerate([(40, 60), (61, 33), (32, 32)]):
        mask = masks.rle_decode(rows[f'{number}.png'], size)
        batch = predictor.ImageBatches([tmp_path / f'test/{number}.png'], model)
        (alone,) = predictor.predict(predictor.Predictor([model], [0.5]), batch)
        assert mask.shape == alone.shape and (mask != alone).mean() < 1e-3


def test_no_images_to_predict_is_no_error(model, tmp_path, capsys):
    for folder in (tmp_path / 'test', tmp_path / 'none'):
        config.TEST_PATH = str(folder)
        predict({0: model})
        assert 'nothing to predict' in capsys.readouterr().out
    assert not (tmp_path / 'output/submission.csv').exists()


def test_sample_submission_gives_the_order(model, tmp_path, capsys):
    for name in 'abc':
        Image.fromarray(draw_ellipse(np.random.default_rng(3))[0]).save(
            tmp_path / f'test/{name}.png'
        )
    (tmp_path / 'order.csv').write_text('img,rle_mask\nc.png,\na.png,\ngone.png,\n')
    config.TEST_CSV = str(tmp_path / 'order.csv')
    assert list(submission(model)) == ['c.png', 'a.png']
    told = capsys.readouterr().out
    assert '1 test images left out, not in TEST_PATH: gone\n' in told
    assert '1 test images left out, not in TEST_CSV: b\n' in told


def test_without_a_trained_model_the_next_step_is_named(model):
    with pytest.raises(
        config.UserMistake, match=r'models\.csv: no such file: run Lightning_trainer'
    ):
        Lightning_tester.load_models()


def test_a_checkpoint_that_is_missing_or_no_checkpoint_is_named(tmp_path):
    (tmp_path / 'text.ckpt').write_text('hello')
    for name, message in (('gone.ckpt', 'no such checkpoint'), ('text.ckpt', 'not a checkpoint')):
        config.PATH = str(tmp_path / name)
        with pytest.raises(config.UserMistake, match=f'{name}.*{message}'):
            Lightning_tester.load_models()


@pytest.mark.parametrize('kind', ['truncated', 'empty', 'text', 'deep'])
def test_a_bad_image_is_named_before_anything_is_predicted(model, tmp_path, kind):
    colours, _ = draw_ellipse(np.random.default_rng(3))
    bad = tmp_path / 'test/bad.png'
    for name in ('a.png', 'bad.png', 'c.png'):
        Image.fromarray(colours).save(tmp_path / 'test' / name)
    if kind == 'deep':
        Image.fromarray(colours[..., 0].astype(np.uint16) * 200).save(bad)
    else:
        data = {'truncated': bad.read_bytes()[:-200], 'empty': b'', 'text': b'hello'}
        bad.write_bytes(data[kind])
    with pytest.raises(config.UserMistake, match=r'bad\.png'):
        submission(model)
    assert not config.path(config.OUTPUT).exists() or not list(config.path(config.OUTPUT).iterdir())


def test_an_empty_mask_is_an_empty_cell(model, tmp_path):
    Image.new('RGB', (64, 48)).save(tmp_path / 'test/a.png')
    predict({0: model}, 1.0)
    assert (tmp_path / 'output/submission.csv').read_text() == 'img,rle_mask\na.png,\n'


def test_probabilities_are_averaged_before_the_threshold_and_mirrored(model, tmp_path):
    other = CarvanaModel([0], [1]).eval()
    file = tmp_path / 'test/a.png'
    Image.fromarray(draw_ellipse(np.random.default_rng(3))[0]).save(file)
    runner = predictor.Predictor([model, other], [0.5], tta=True)
    x = predictor.ImageBatches([file], model)[0]['image']
    with torch.inference_mode():
        p = runner.probabilities(x)
        parts = [m(x).sigmoid() for m in (model, other)]
        parts += [m(x.flip(-1)).sigmoid().flip(-1) for m in (model, other)]
    assert torch.allclose(p, sum(parts) / 4, atol=1e-6)


def test_counts_at_many_thresholds_agree_with_each_by_itself(model):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(1, 1, 30, 40, generator=generator).round(decimals=2)  # some on the thresholds
    mask = torch.randint(0, 2, (30, 40), generator=generator).to(torch.uint8)
    mask[:3] = 255
    config.IGNORE_INDEX = 255
    runner = predictor.Predictor([CarvanaModel([1], [0])], Lightning_tester.THRESHOLDS)
    counts = runner.count(p, mask)
    for row, threshold in zip(counts, torch.tensor(Lightning_tester.THRESHOLDS)):
        positive, valid = (p[0, 0] > threshold) & (mask != 255), mask == 1
        expected = [(positive & valid).sum(), (positive & ~valid).sum(), (~positive & valid).sum()]
        assert row[:, 0].tolist() == [int(x) for x in expected]


def save_checkpoint(file, **constants):
    model = CarvanaModel([1], [0], pretrained=False, **constants)
    saved = {'state_dict': model.state_dict(), 'hyper_parameters': dict(model.hparams)}
    torch.save({**saved, 'pytorch-lightning_version': '2.6.0'}, file)


@pytest.mark.parametrize(('name', 'value'), [('CLASSES', 3), ('CROP_SIZE', 64), ('LOSS', 'CE')])
def test_models_trained_with_other_constants_are_refused_with_both_names(
    model, tmp_path, name, value
):
    save_checkpoint(tmp_path / 'one.ckpt')
    save_checkpoint(tmp_path / 'two.ckpt', **{name: value})
    (tmp_path / 'output').mkdir()
    rows = [f'{fold},v,{tmp_path}/{file}.ckpt,0.9,0.8' for fold, file in enumerate(['one', 'two'])]
    header = 'fold,version,checkpoint,val_dice,val_iou'
    (tmp_path / 'output/models.csv').write_text('\n'.join([header, *rows]) + '\n')
    first = f'one.ckpt has {name}={getattr(config, name)!r}'
    with pytest.raises(config.UserMistake, match=f'{first}, .*two.ckpt has {name}={value!r}'):
        Lightning_tester.load_models()


def test_code_in_a_checkpoint_is_never_run(model, tmp_path):
    torch.save({'state_dict': Evil()}, tmp_path / 'evil.ckpt')
    config.PATH = str(tmp_path / 'evil.ckpt')
    with pytest.raises(config.UserMistake, match=r'evil\.ckpt: not a checkpoint'):
        Lightning_tester.load_models()


def test_names_with_commas_and_quotes(model, tmp_path):
    for name in ('holiday, 2.png', 'a "b".png'):
        Image.fromarray(draw_ellipse(np.random.default_rng(1))[0]).save(tmp_path / 'test' / name)
    assert set(submission(model)) == {'holiday, 2.png', 'a "b".png'}


def test_images_of_one_name_in_two_folders_are_told_apart(model, tmp_path, monkeypatch):
    shown, draw = [], Lightning_tester.plots.samples
    monkeypatch.setattr(
        Lightning_tester.plots, 'samples', lambda masks, n: shown.extend(masks) or draw(masks, n)
    )
    for number in range(2):
        (tmp_path / f'test/p{number}').mkdir()
        picture = Image.fromarray(draw_ellipse(np.random.default_rng(number))[0])
        picture.save(tmp_path / f'test/p{number}/1.png')
    assert list(submission(model)) == shown == ['p0/1.png', 'p1/1.png']


def test_ones_own_images_are_predicted_beside_another_list(model, tmp_path, capsys):
    Image.fromarray(draw_ellipse(np.random.default_rng(1))[0]).save(tmp_path / 'test/mine.png')
    config.TEST_CSV = str(tmp_path / 'sample_submission.csv')
    (tmp_path / 'sample_submission.csv').write_text('img,rle_mask\nother.png,1 1\n')
    assert set(submission(model)) == {'mine.png'}
    assert 'lists no image of' in capsys.readouterr().out


def test_a_killed_run_on_other_images_is_not_resumed(model, tmp_path):
    """The files have the same names, in another folder."""
    config.RESUME, config.VAL_BATCH_SIZE, rows, unlink = True, 1, [], Path.unlink
    for number, folder in enumerate(('test', 'other')):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in 'ab':
            image, _ = draw_ellipse(np.random.default_rng(number))
            Image.fromarray(image).save(tmp_path / f'{folder}/{name}.png')
        config.TEST_PATH = str(tmp_path / folder)
        with pytest.MonkeyPatch.context() as patch:  # as if killed before the parts were joined
            patch.setattr(Path, 'unlink', lambda f, **k: '.part' in f.name or unlink(f, **k))
            rows.append(submission(model))
    assert len(list((tmp_path / 'output').glob('*.part0'))) == 2
    assert rows[0] != rows[1]


def test_what_is_not_predicted_is_told(model, tmp_path, capsys):
    (tmp_path / 'test/a.jpg').write_bytes(b'')
    with pytest.raises(config.UserMistake, match=r'no file \*.png, found .jpg 1: .* TEST_SUFFIX'):
        predict({0: model})
    (tmp_path / 'test/a.png').write_bytes(b'')
    config.TEST_CSV = str(tmp_path / 'list.csv')
    with pytest.raises(config.UserMistake, match='TEST_CSV=.*list.csv: no such file: correct it'):
        predict({0: model})
    with pytest.raises(config.UserMistake, match='no such checkpoint: .* PATH to a .ckpt'):
        Lightning_tester.load_model(str(tmp_path))
