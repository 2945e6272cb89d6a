"""The tester's parts in this process: what it predicts, what it refuses."""

import os

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Evil, draw_ellipse, settings
from PIL import Image

import command_line
import config
import files
import folds
import images
import Lightning_tester
import predictor
from Lightning_module import CarvanaModel


@pytest.fixture
def model(tmp_path):
    words = ['IMAGE_SUFFIX=.png', f'TEST_PATH={tmp_path}/test', 'MODEL_NAME=smp_unet_resnet18']
    command_line.override([*settings(tmp_path), *words])
    torch.manual_seed(0)
    (tmp_path / 'test').mkdir()
    return CarvanaModel([1], [0]).eval()


def predict(*models, threshold=0.5):
    test_files = predictor.list_test_files(models[0])
    Lightning_tester.predict_test(list(models), threshold, test_files)


def submission(model):
    predict(model)
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
    assert images.rle_decode(rows['turned.png'], (48, 64)).any()


def test_a_prediction_that_is_not_finite_is_refused_with_its_image(model, tmp_path):
    """As float16 may give it, although the weights are finite."""
    Image.fromarray(draw_ellipse(np.random.default_rng(0))[0]).save(tmp_path / 'test/a.png')
    model.model.segmentation_head[0].weight.data[0, 0] = torch.inf
    with pytest.raises(config.UserMistake, match=r'predictions for a\.png are not finite'):
        predict(model)
    assert not (tmp_path / 'output/submission.csv').exists()


def test_images_of_different_sizes_share_a_batch(model, tmp_path):
    for number, size in enumerate([(40, 60), (61, 33), (32, 32)]):
        Image.fromarray(draw_ellipse(np.random.default_rng(1), *size)[0]).save(
            tmp_path / f'test/{number}.png'
        )
    rows = submission(model)
    for number, size in enumerate([(40, 60), (61, 33), (32, 32)]):
        mask = images.rle_decode(rows[f'{number}.png'], size)
        batch = predictor.ImageBatches([tmp_path / f'test/{number}.png'], model)
        (alone,) = predictor.predict(predictor.Predictor([model], [0.5]), batch)
        assert mask.shape == alone.shape and (mask != alone).mean() < 1e-3


def test_no_images_to_predict_is_no_error(model, tmp_path, capsys):
    for folder in (tmp_path / 'test', tmp_path / 'none'):
        config.TEST_PATH = str(folder)
        predict(model)
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
    assert capsys.readouterr().out.splitlines()[0] == (
        f'{tmp_path}/order.csv and TEST_PATH differ in 2 images (b, gone): 2 are predicted'
    )


def test_without_a_trained_model_the_next_step_is_named(model):
    with pytest.raises(
        config.UserMistake, match=r'models\.csv: no such file: run Lightning_trainer'
    ):
        Lightning_tester.load_models()


def test_a_checkpoint_that_is_missing_or_no_checkpoint_is_named(tmp_path):
    (tmp_path / 'text.ckpt').write_text('hello')
    for name, message in (('gone.ckpt', 'no such checkpoint'), ('text.ckpt', 'not a checkpoint')):
        with pytest.raises(config.UserMistake, match=f'{name}.*{message}'):
            Lightning_tester.load_checkpoints([str(tmp_path / name)])


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
    predict(model, threshold=1.0)
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


def save_checkpoint(file, model=None, **constants):
    model = model or CarvanaModel([1], [0], pretrained=False, **constants)
    saved = {'state_dict': model.state_dict(), 'hyper_parameters': dict(model.hparams)}
    torch.save({**saved, 'pytorch-lightning_version': '2.6.0'}, file)


def enter_models(folder, *names):
    """models.csv with a fold for each checkpoint."""
    rows = [f'{fold},v,{folder}/{name},0.9,0.8' for fold, name in enumerate(names)]
    (folder / 'output').mkdir(exist_ok=True)
    header = 'fold,version,checkpoint,val_dice,val_iou'
    (folder / 'output/models.csv').write_text('\n'.join([header, *rows]) + '\n')


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('CLASSES', 3),
        ('CROP_SIZE', 64),
        ('SCALE', 0.5),
        ('IGNORE_INDEX', 255),
        ('MASK_COLOURS', [[0, 0, 0], [255, 0, 0]]),
    ],
)
def test_models_whose_masks_mean_different_things_are_refused_with_both_names(
    model, tmp_path, name, value
):
    small = {'MODEL_NAME': 'smp_linknet_tu-test_resnet'}
    save_checkpoint(tmp_path / 'one.ckpt', **small)
    save_checkpoint(tmp_path / 'two.ckpt', **small, **{name: value})
    enter_models(tmp_path, 'one.ckpt', 'two.ckpt')
    with pytest.raises(
        config.UserMistake, match=f'one.ckpt and .*two.ckpt differ in {name}: their masks'
    ):
        Lightning_tester.load_models()


def test_other_differences_between_models_are_one_line(model, tmp_path, capsys):
    save_checkpoint(tmp_path / 'one.ckpt', CROP_SIZE=32)
    other = {
        'CROP_SIZE': [32, 32],
        'LR': 0.5,
        'PRECISION': 'bf16',
        'MODEL_NAME': 'smp_fpn_resnet18',
    }
    save_checkpoint(tmp_path / 'two.ckpt', **other)
    enter_models(tmp_path, 'one.ckpt', 'two.ckpt')
    assert set(Lightning_tester.load_models()) == {0, 1}
    told = 'the models differ in LR, MODEL_NAME, PRECISION: averaged all the same'
    assert capsys.readouterr().out.splitlines()[-1] == told


def test_the_constants_in_a_checkpoint_count_and_a_line_says_so(model, tmp_path, capsys):
    save_checkpoint(tmp_path / 'one.ckpt')
    Lightning_tester.load_checkpoints([f'{tmp_path}/one.ckpt'])
    assert len(capsys.readouterr().out.splitlines()) == 1
    command_line.override(
        [*settings(tmp_path), 'CROP_SIZE=[64, 32]', 'SCALE=0.5', 'MODEL_NAME=smp_fpn_resnet18']
    )
    (loaded,) = Lightning_tester.load_checkpoints([f'{tmp_path}/one.ckpt'])
    assert loaded.input_size == (32, 32, 3) and loaded.hparams.SCALE is None
    assert capsys.readouterr().out.splitlines()[1:] == [
        "the checkpoint's values count, not config.py's: CROP_SIZE, MODEL_NAME, SCALE"
    ]


def test_a_list_of_checkpoints_predicts_their_mean_and_scores_nothing(model, tmp_path, capsys):
    """Of two networks; recomputed by other code."""
    names = ['smp_unet_resnet18', 'smp_fpn_resnet18']
    for name in names:
        torch.manual_seed(1)
        save_checkpoint(tmp_path / f'{name}.ckpt', MODEL_NAME=name)
    image, _ = draw_ellipse(np.random.default_rng(3), 32, 32)
    Image.fromarray(image).save(tmp_path / 'test/a.png')
    config.PATH = [f'{tmp_path}/{name}.ckpt' for name in names]
    command_line.check()
    Lightning_tester.main()
    told = capsys.readouterr().out
    assert 'PATH is set: no scores, no export; the threshold is 0.5\n' in told
    assert 'the models differ in MODEL_NAME' in told
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.inference_mode():
        parts = [Lightning_tester.load_model(file)(x).sigmoid() for file in config.PATH]
    mask = (sum(parts) / 2 > 0.5)[0, 0].numpy()
    assert 0 < mask.mean() < 1 and ((parts[0] > 0.5)[0, 0].numpy() != mask).any()
    text = (tmp_path / 'output/submission.csv').read_text()
    assert text == f'img,rle_mask\na.png,{images.rle_encode(mask)}\n'
    written = {file.name for file in (tmp_path / 'output').iterdir() if file.name[0] != '.'}
    assert written == {'submission.csv', 'test_samples.png'}


@pytest.mark.parametrize('value', [[], '', ['a.ckpt', ''], ['a.ckpt', 3], 3])
def test_path_is_a_checkpoint_or_a_list_of_them(value):
    config.PATH = value
    with pytest.raises(config.UserMistake, match='PATH=.* a checkpoint or a list of checkpoints'):
        command_line.check()


def test_a_model_is_scored_only_on_images_that_it_was_not_trained_on(carvana, capsys):
    """TRAIN_FOLDS is drawn anew after the training, so a fold holds images of the training."""
    command_line.override([*settings(carvana), 'N_FOLDS=2', 'FOLDS=[0]'])
    folds.main()
    model = CarvanaModel([1], [0]).eval()
    model.image_digests = folds.digests(0)
    assert Lightning_tester.score_out_of_fold({0: model}) in Lightning_tester.THRESHOLDS
    scored = pd.read_csv(carvana / 'output/oof.csv', dtype={'img': str})
    assert set(scored.img) == set(folds.read_folds([0]).img)
    (carvana / 'output/oof.csv').unlink()
    file = config.path(config.TRAIN_FOLDS)
    table = pd.read_csv(file, dtype={'img': str})
    table['kfold'] = 1 - table.kfold
    files.write_table(table, file)
    with pytest.raises(config.UserMistake, match='fold 0 of .*csv has other images than when it'):
        Lightning_tester.score_out_of_fold({0: model})
    assert not (carvana / 'output/oof.csv').exists()
    file.unlink()  # on a machine that only predicts
    config.THRESHOLD = 0.3
    assert Lightning_tester.score_out_of_fold({0: model}) == 0.3
    assert 'does not exist: no out-of-fold scores; the threshold is 0.3' in capsys.readouterr().out


def test_a_picture_shows_the_mask_that_was_scored(carvana, monkeypatch):
    """Each image is predicted again, alone, with the model of its fold and the chosen threshold."""
    command_line.override([*settings(carvana), 'N_FOLDS=2', 'FOLDS=[0, 1]', 'VAL_BATCH_SIZE=4'])
    folds.main()
    shown, draw = [], Lightning_tester.plots.comparison
    monkeypatch.setattr(
        Lightning_tester.plots, 'comparison', lambda rows, *a: shown.extend(rows) or draw(rows, *a)
    )
    torch.manual_seed(2)
    Lightning_tester.score_out_of_fold({f: CarvanaModel([1 - f], [f]).eval() for f in (0, 1)})
    scored = pd.read_csv(carvana / 'output/oof.csv', dtype={'img': str}).set_index('img').dice
    assert len(shown) == 8 and len({name for _, name, *_ in shown}) == 8
    assert sorted(scored)[:4] == pytest.approx([row[-1] for row in shown[:4]])
    for _, name, image, truth, mask, dice in shown:
        assert image.shape == (48, 64, 3)
        both = ((mask > 0) & (truth > 0)).sum()
        assert 2 * both / (mask.sum() + truth.sum()) == pytest.approx(dice, abs=1e-3)
        assert scored[name] == pytest.approx(dice)


def test_code_in_a_checkpoint_is_never_run(model, tmp_path):
    torch.save({'state_dict': Evil()}, tmp_path / 'evil.ckpt')
    with pytest.raises(config.UserMistake, match=r'evil\.ckpt: not a checkpoint'):
        Lightning_tester.load_checkpoints([str(tmp_path / 'evil.ckpt')])


@pytest.mark.filterwarnings('error:Glyph')
def test_names_with_commas_quotes_formulas_and_japanese_letters(model, tmp_path):
    names = {'holiday, 2.png', 'a "b".png', 'a$_$.png', '\u65e5\u672c.png'}
    for name in names:
        Image.fromarray(draw_ellipse(np.random.default_rng(1))[0]).save(tmp_path / 'test' / name)
    assert set(submission(model)) == names
    assert (tmp_path / 'output/test_samples.png').stat().st_size > 1000


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
    told = capsys.readouterr().out.splitlines()[0]
    assert told.endswith('csv and TEST_PATH differ in 2 images (mine, other): 1 are predicted')


def killed_before_the_end(*models):
    """Predict as a run that is killed when all rows are written, before the parts are joined."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(files, 'atomic_write', lambda file: 1 / 0)
        predict(*models)
    return list((config.path(config.OUTPUT)).glob('submission.*.part0'))


@pytest.fixture
def two_images(model, tmp_path):
    config.RESUME, config.VAL_BATCH_SIZE = True, 1
    for number, name in enumerate('ab'):
        image, _ = draw_ellipse(np.random.default_rng(number))
        Image.fromarray(image).save(tmp_path / f'test/{name}.bmp')
    config.TEST_SUFFIX = '.bmp'
    return model


def test_a_killed_run_goes_on_after_everything_was_copied(two_images, tmp_path, monkeypatch):
    """Copies and unzipped files have other times, but the same names, sizes and contents."""
    (part,) = killed_before_the_end(two_images)
    last = part.read_bytes().splitlines()[1]
    part.write_bytes(b'a.bmp,1 1\n')  # a row that shows where it comes from
    for file in (tmp_path / 'test').iterdir():
        os.utime(file, (1, 1))
    seen, step = [], predictor.Predictor.predict_step
    monkeypatch.setattr(
        predictor.Predictor, 'predict_step', lambda *a: seen.append(a[1]['img']) or step(*a)
    )
    save_checkpoint(tmp_path / 'copy.ckpt', two_images)
    predict(Lightning_tester.load_model(f'{tmp_path}/copy.ckpt'))
    assert seen == [['b.bmp']]
    text = (tmp_path / 'output/submission.csv').read_bytes()
    assert text.splitlines() == [b'img,rle_mask', b'a.bmp,1 1', last]
    assert not list((tmp_path / 'output').glob('*.part*'))


def change_weights(model, tmp_path):
    with torch.no_grad():
        next(model.parameters())[0] += 1e-3


def change_folder(model, tmp_path):
    (tmp_path / 'test').rename(tmp_path / 'other')
    config.TEST_PATH = str(tmp_path / 'other')


def change_size(model, tmp_path):
    image, _ = draw_ellipse(np.random.default_rng(9), 50, 64)
    Image.fromarray(image).save(tmp_path / 'test/a.bmp')


def change_scale(model, tmp_path):
    model.hparams.MODEL_MEAN = [0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    'change',
    [
        change_weights,
        change_folder,
        change_size,
        change_scale,
        lambda *_: setattr(config, 'TTA', True),
        lambda *_: setattr(config, 'PRECISION', 'bf16'),
        lambda *_: setattr(config, 'VAL_BATCH_SIZE', 2),
        lambda *_: setattr(config, 'SAVE_MASKS', True),
        lambda *_: setattr(config, 'RLE_ORDER', 'columns'),
    ],
)
def test_a_killed_run_with_anything_else_starts_anew(two_images, tmp_path, monkeypatch, change):
    monkeypatch.setattr(config, 'RLE_ORDER', 'rows', raising=False)
    (earlier,) = killed_before_the_end(two_images)
    change(two_images, tmp_path)
    assert len(killed_before_the_end(two_images)) == 2
    assert earlier.read_bytes().count(b'\n') == 2


def test_another_threshold_or_number_of_processes_starts_anew(two_images, tmp_path):
    batches = predictor.ImageBatches(predictor.list_test_files(two_images), two_images)
    keys = {
        predictor.fingerprint(predictor.Predictor([two_images], [threshold]), batches, False, ranks)
        for threshold, ranks in ((0.5, 1), (0.4, 1), (0.5, 2), (0.5, 1))
    }
    assert len(keys) == 3


def test_a_name_as_long_as_a_file_system_takes_has_its_mask_written(model, tmp_path):
    name = 'n' * 249 + '.png'
    Image.fromarray(draw_ellipse(np.random.default_rng(1))[0]).save(tmp_path / 'test' / name)
    config.SAVE_MASKS = True
    rows = submission(model)
    mask = np.array(Image.open(tmp_path / 'output/test_masks' / name))
    assert np.array_equal(mask, 255 * images.rle_decode(rows[name], (48, 64)))
    assert [file.name for file in (tmp_path / 'output/test_masks').iterdir()] == [name]


def test_what_is_not_predicted_is_told(model, tmp_path, capsys):
    (tmp_path / 'test/a.jpg').write_bytes(b'')
    with pytest.raises(
        config.UserMistake, match=r'no image file of TEST_SUFFIX=.\.png., found .jpg 1: '
    ):
        predict(model)
    (tmp_path / 'test/a.png').write_bytes(b'')
    config.TEST_CSV = str(tmp_path / 'list.csv')
    with pytest.raises(config.UserMistake, match='TEST_CSV=.*list.csv: no such file: correct it'):
        predict(model)
    with pytest.raises(config.UserMistake, match='no such checkpoint: .* PATH to a .ckpt'):
        Lightning_tester.load_model(str(tmp_path))
