"""SCALE: crops for training, windows for prediction."""

from math import ceil

import albumentations as A
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import settings
from PIL import Image

import command_line
import config
import dataset
import folds
import images
import Lightning_tester
import Lightning_trainer
import metrics


@pytest.mark.parametrize('size', [(64, 96), (70, 97), (33, 200), (20, 30), (1, 5), (32, 48)])
@pytest.mark.parametrize('batch_size', [1, 4])
def test_windows_of_a_model_that_returns_its_input_give_it_back(size, batch_size):
    x = torch.randn(2, 1, *size)
    seen = []

    def identity(batch):
        seen.append(batch.shape)
        return batch

    out = metrics.predict_windows(identity, x, (32, 48), batch_size)
    assert out.shape == x.shape and torch.allclose(out, x, atol=1e-5)
    assert all(shape[2:] == (32, 48) and shape[0] <= 2 * batch_size for shape in seen)
    # Half overlap, on an image that is an eighth of a window larger on every side.
    extra = 0 if size == (32, 48) else 1 / 4
    rows, columns = (1 + max(0, ceil(2 * (a / b + extra - 1))) for a, b in zip(size, (32, 48)))
    assert sum(shape[0] for shape in seen) == 2 * rows * columns


def test_windows_are_blended_smoothly():
    """Each window says its own mean, which rises by 1 from a window to the next: no seam between."""
    x = (torch.arange(160) / 16).expand(1, 1, 32, 160)
    means = metrics.predict_windows(
        lambda batch: 0 * batch + batch.mean((1, 2, 3), keepdim=True), x, (32, 32), 3
    )[0, 0]
    assert means.diff(dim=0).abs().max() < 1e-5
    assert means.diff(dim=1).abs().max() < 0.11 and means[0, -1] - means[0, 0] > 7


def test_a_models_faults_at_the_border_of_its_input_do_not_reach_the_border_of_the_image():
    def wrong_on_top(batch):
        return torch.cat([0 * batch[..., :4, :] + 100, batch[..., 4:, :]], 2)

    x = torch.randn(1, 1, 40, 70)
    out = metrics.predict_windows(wrong_on_top, x, (32, 32), 4)
    assert torch.allclose(out[..., :8, :], x[..., :8, :], atol=1e-5)


def test_scaled_sizes():
    assert images.scaled((100, 301), (32, 32), None) == (32, 32)
    assert images.scaled((100, 301), (32, 32), 1.0) == (100, 301)
    assert images.scaled((100, 301), (32, 32), 0.5) == (50, 150)
    assert images.scaled((1, 1), (32, 32), 0.1) == (1, 1)


def test_crops_fit_their_mask_and_a_third_holds_an_object():
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    mask = np.zeros((300, 400), np.uint8)
    mask[200:204, 3:6] = 1
    mask[:, 390:] = 9  # ignored
    image[..., 0] = mask
    crop, found, right = A.Compose(dataset.build_crop(64, 48, 9)), [], []
    for number in range(300):
        dataset.seed_augmentation(crop, f'{number}')
        cut = crop(image=image, mask=mask)
        assert cut['image'].shape == (64, 48, 3)
        assert np.array_equal(cut['image'][..., 0], cut['mask'])
        found.append((cut['mask'] == 1).any())
        right.append((cut['mask'] == 9).any())
    assert 0.28 < np.mean(found) < 0.42
    assert np.mean(right) < 0.3  # random crops alone: ignored pixels are no object


@pytest.mark.parametrize('channels', [1, 3])
def test_images_smaller_than_the_crop_get_a_reflected_border(channels):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, channels), dtype=np.uint8)
    mask = image[..., 0] // 128
    cut = A.Compose(dataset.build_crop(64, 48, None))(image=image, mask=mask)
    assert cut['image'].shape == (64, 48, channels) and cut['mask'].shape == (64, 48)
    small, truth = cut['image'], cut['mask']
    assert np.array_equal(small[:20, :30], image) and np.array_equal(truth[:20, :30], mask)
    assert np.array_equal(small[20], small[18]) and np.array_equal(small[:, 30], small[:, 28])
    assert np.array_equal(truth, small[..., 0] // 128)


# ------------------------------------------------------------ a field of discs
def draw_discs(folder, number, size, discs):
    """A dark picture with bright discs of radius 7; the mask."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[: size[0], : size[1]]
    mask = np.zeros(size, bool)
    for _ in range(discs):
        row, column = rng.integers(0, size[0]), rng.integers(0, size[1])
        mask |= (y - row) ** 2 + (x - column) ** 2 < 49
    image = rng.integers(0, 60, (*size, 3)) + 150 * mask[..., None]
    for name, array in (('img', image), ('msk', 255 * mask)):
        (folder / name).mkdir(exist_ok=True)
        Image.fromarray(array.astype(np.uint8)).save(folder / f'{name}/{number}.png')


@pytest.fixture
def discs(tmp_path):
    for number in range(6):
        draw_discs(tmp_path, number, (96 + 8 * number, 160), 8)
    words = [*settings(tmp_path), f'TRAIN_PATH={tmp_path}/img', f'MASK_PATH={tmp_path}/msk']
    words += ['IMAGE_SUFFIX=.png', 'MASK_SUFFIX=.png', 'GROUP_REGEX=None', 'TRAIN_CSV=None']
    words += ['N_FOLDS=2', 'FOLDS=[0]', 'CROP_SIZE=(32, 64)', 'SCALE=1.0', 'LR=0.01']
    command_line.override([*words, 'EPOCHS=5', 'TRAIN_BATCH_SIZE=2'])
    folds.main()
    return tmp_path


@pytest.mark.parametrize('cache', [False, True])
def test_the_items_with_scale(discs, cache):
    config.CACHE = cache
    train, whole = dataset.CarvanaDataset([0, 1]), dataset.CarvanaDataset([0])
    tiles = [(96 + 8 * number) // 32 * (160 // 64) for number in range(6)]
    assert len(train) == sum(tiles) and len(whole) == 3
    assert train[0, 0]['image'].shape == (3, 32, 64) and train[0, 0]['mask'].shape == (32, 64)
    assert torch.equal(train[0, 5]['image'], train[0, 5]['image'])
    assert not torch.equal(train[0, 5]['image'], train[0, 6]['image'])
    assert not torch.equal(train[0, 5]['image'], train[1, 5]['image'])
    config.AUGMENTATION = 'none'
    assert dataset.CarvanaDataset([0, 1])[0, 0]['image'].shape == (3, 32, 64)
    for item in (whole[index] for index in range(3)):
        picture = np.array(Image.open(discs / f'img/{item["img"]}.png'))
        assert np.array_equal(item['image'].permute(1, 2, 0).numpy(), picture)


def test_a_training_on_crops_and_its_scores_at_the_images_own_size(discs, capsys):
    Lightning_trainer.main()
    told = capsys.readouterr().out
    crops = len(dataset.CarvanaDataset([1], train=True))
    assert f'epochs of {-(-crops // 2)} batches' in told
    for number in range(3):
        (discs / 'test').mkdir(exist_ok=True)
        draw_discs(discs / 'test', number + 50, (200, 300), 30)
    config.TEST_PATH, config.TTA = str(discs / 'test/img'), True
    config.SCALE = None  # the tester goes by what the model was trained with
    Lightning_tester.main()
    assert 'four times as high' not in capsys.readouterr().out
    assert pd.read_csv(discs / 'output/oof.csv').dice.mean() > 0.9
    submission = pd.read_csv(discs / 'output/submission.csv')
    for row in submission.itertuples():
        truth = np.array(Image.open(discs / 'test/msk' / row.img)) > 0
        found = images.rle_decode(row.rle_mask, truth.shape)
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.9


@pytest.mark.parametrize('size', [(32, 32), (20, 300), (300, 32)])
def test_images_much_larger_than_the_model_is_fed_are_told(discs, capsys, size):
    """Much wider, or much higher."""
    config.SCALE, config.CROP_SIZE = None, size
    folds.main()
    told = f'6 images are more than four times as high or wide as CROP_SIZE={size}'
    assert told in capsys.readouterr().out
