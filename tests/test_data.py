"""CarvanaDataset: what an item is, the augmentation's stream, the cache, files to predict."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from conftest import draw_ellipse, model_of, save_mask_gif
from PIL import Image
from torch.utils.data import DataLoader

import config
import dataset
import folds
import masks
import predictor
from dataset import CarvanaDataset, EpochSampler


@pytest.fixture
def prepared(carvana):
    folds.main()
    return carvana


def test_items_are_eight_bit_tensors(prepared):
    data = CarvanaDataset([0, 1, 2])
    item = data[0]
    assert item['image'].dtype == item['mask'].dtype == torch.uint8
    assert item['image'].shape == (3, 32, 32) and item['mask'].shape == (32, 32)
    assert item['img'] == data.names[0]
    assert set(item['mask'].unique().tolist()) == {0, 1}


def test_validation_items_are_only_resized(prepared):
    data = CarvanaDataset([3])
    image_file, mask_file = masks.files_of([data.names[1]])[0]
    image = cv2.resize(np.array(Image.open(image_file)), (32, 32))
    assert np.abs(data[1]['image'].permute(1, 2, 0).numpy().astype(int) - image).max() <= 3
    assert np.array_equal(data[1]['mask'].numpy(), masks.read_mask(mask_file, size=(32, 32)))
    assert torch.equal(data[1]['image'], data[1]['image'])


def test_crop_size_may_be_height_and_width(prepared):
    config.CROP_SIZE = (32, 64)
    assert CarvanaDataset([0])[0]['image'].shape == (3, 32, 64)


def test_one_channel(prepared):
    config.CHANNELS = 1
    assert CarvanaDataset([0])[0]['image'].shape == (1, 32, 32)


def epochs_of(workers, persistent, count=3):
    """All items of some epochs, by (epoch, name), as a training loader gives them."""
    data = CarvanaDataset([0, 1, 2, 3], train=True)
    sampler = EpochSampler(data, 1, 0, shuffle=True, seed=1)
    loader = DataLoader(
        data, 2, sampler=sampler, num_workers=workers, persistent_workers=persistent and workers > 0
    )
    found = {}
    for epoch in range(count):
        for batch in loader:
            for image, mask, name in zip(batch['image'], batch['mask'], batch['img']):
                found[epoch, name] = image, mask
    return found


def test_augmentation_is_the_same_for_any_workers_and_never_twice(prepared):
    alone = epochs_of(0, False)
    assert len(alone) == 24
    for workers, persistent in ((1, True), (2, True), (2, False)):
        other = epochs_of(workers, persistent)
        assert other.keys() == alone.keys()
        for key in alone:
            assert torch.equal(alone[key][0], other[key][0])
            assert torch.equal(alone[key][1], other[key][1])
    seen = {image.numpy().tobytes() for image, _ in alone.values()}
    assert len(seen) == 24


def test_plain_indices_count_their_epochs_across_workers(prepared):
    data = CarvanaDataset([0, 1], train=True)
    expected = [data[epoch, 0]['image'] for epoch in range(3)]
    again = CarvanaDataset([0, 1], train=True)
    loader = DataLoader(again, 1, num_workers=2)
    got = [next(iter(loader))['image'][0] for _ in range(1)]
    got += [batch['image'][0] for batch in loader if batch['img'][0] == data.names[0]]
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert not torch.equal(expected[1], expected[2])


def test_the_seed_changes_the_stream(prepared):
    first = CarvanaDataset([0, 1])[0, 0]['image']
    config.SEED = 7
    assert not torch.equal(first, CarvanaDataset([0, 1])[0, 0]['image'])


def test_image_and_mask_move_together(prepared):
    """The ellipse is bright, the ground dark: after any augmentation the mask still tells which."""
    data = CarvanaDataset([0, 1, 2, 3], train=True)
    for epoch in range(5):
        for index in range(len(data)):
            item = data[epoch, index]
            grey = item['image'].float().mean(0)
            assert ((grey > 115) == (item['mask'] == 1)).float().mean() > 0.93


def test_the_border_is_reflected(prepared):
    """A constant border would show as black corners in a white image."""
    data = CarvanaDataset([0, 1], train=True)
    white = np.full((32, 32, 3), 255, np.uint8)
    for epoch in range(20):
        dataset.seed_augmentation(data.augment, f'{epoch}')
        assert data.augment(image=white, mask=white[..., 0])['image'].min() == 255


def test_the_original_augmentation_is_the_originals():
    """Fit the affine map of many draws: shift up to 0.0625, scale 0.9 to 1.1, +-15 degrees, p 0.9."""
    config.CROP_SIZE = 200
    transform = A.Affine(**dataset.SHIFT_SCALE_ROTATE)
    shifts, scales, angles, still = [], [], [], 0
    y, x = np.mgrid[:200, :200].astype(np.float32)
    coordinates = np.stack([x, y, np.zeros_like(x)], 2) / 200
    for seed in range(300):
        transform.set_random_seed(seed)
        moved = transform(image=coordinates)['image'][90:110, 90:110, :2] * 200
        if np.allclose(moved, np.stack([x, y], 2)[90:110, 90:110]):
            still += 1
            continue
        dx, dy = moved[0, -1] - moved[0, 0], moved[-1, 0] - moved[0, 0]
        scales.append(19 / np.hypot(*dx))
        assert np.hypot(*dx) == pytest.approx(np.hypot(*dy), rel=1e-2)  # one scale for both axes
        angles.append(np.degrees(np.arctan2(dx[1], dx[0])))
        shifts.append((moved.mean((0, 1)) - 99.5) * scales[-1])
    assert 10 < still < 55
    assert np.abs(angles).max() <= 15.2 and np.abs(angles).max() > 13
    assert min(scales) >= 0.89 and max(scales) <= 1.11 and np.ptp(scales) > 0.17
    assert np.abs(shifts).max() <= 0.0625 * 200 + 1 and np.abs(shifts).max() > 0.05 * 200


@pytest.mark.parametrize('name', dataset.AUGMENTATIONS)
@pytest.mark.parametrize('channels', [1, 3])
def test_no_argument_of_an_augmentation_is_ignored(prepared, name, channels):
    config.AUGMENTATION, config.CHANNELS = name, channels
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data = CarvanaDataset([0, 1, 2, 3], train=True)
        for epoch in range(6):
            for index in range(len(data)):
                item = data[epoch, index]
                assert item['image'].shape == (channels, 32, 32)
                assert item['image'].dtype == item['mask'].dtype == torch.uint8
                assert set(item['mask'].unique().tolist()) <= {0, 1}


def test_transforms_of_like_probability_are_drawn_apart(prepared):
    """One generator for all would apply those with the same p together or not at all."""
    config.AUGMENTATION = 'strong'
    data = CarvanaDataset([0, 1], train=True)
    flips = [t for t in data.augment.transforms if t.p == 0.5]
    draws = []
    for epoch in range(64):
        dataset.seed_augmentation(data.augment, f'{epoch}')
        draws.append([t.py_random.random() < t.p for t in flips])
    assert len(flips) >= 2 and len({tuple(draw) for draw in draws}) > 2


def test_cache_gives_what_the_files_give(prepared):
    config.AUGMENTATION = 'none'
    plain = [CarvanaDataset([0, 1])[i] for i in range(4)]
    config.CACHE = True
    data = CarvanaDataset([0, 1])
    assert data.cache is not None
    for index in range(4):
        assert torch.equal(plain[index]['image'], data[index]['image'])
        assert torch.equal(plain[index]['mask'], data[index]['mask'])
    assert [f.suffix for f in config.path(config.OUTPUT).glob('cache/*')] == ['']


def caches() -> set:
    return set(config.path(config.OUTPUT).glob('cache/*'))


def test_cache_is_built_once_and_again_when_something_changes(prepared):
    """Older caches stay: a training beside this one may use them."""
    dataset.open_cache()
    (first,) = caches()
    written = (first / 'images.npy').stat().st_mtime_ns
    dataset.open_cache()
    assert (first / 'images.npy').stat().st_mtime_ns == written
    image, new_mask = draw_ellipse(np.random.default_rng(9))
    name = folds.read_folds().img[0]
    save_mask_gif(masks.files_of([name])[0][1], new_mask)
    assert np.array_equal(
        dataset.open_cache().load(name)[1],
        masks.read_mask(masks.files_of([name])[0][1], size=(32, 32)),
    )
    assert len(caches()) == 2
    config.CROP_SIZE = 16
    assert dataset.open_cache().images.shape == (10 * 16 * 16, 3)
    assert len(caches()) == 3 and first in caches()


def test_a_cache_that_was_being_built_is_not_trusted(prepared, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset, 'read_pair', fail)
        with pytest.raises(KeyboardInterrupt):
            dataset.open_cache()
    assert not list(config.path(config.OUTPUT).glob('cache/*'))
    assert dataset.open_cache().load(folds.read_folds().img[0])[0].any()


def test_batches_to_predict(prepared):
    config.VAL_BATCH_SIZE = 2
    files = masks.files_of(folds.read_folds().img[:3])
    image_files, mask_files = zip(*files)
    batches = predictor.ImageBatches(image_files, model_of((16, 32, 1)), mask_files)
    assert [len(batches[number]['img']) for number in range(len(batches))] == [2, 1]
    batch = batches[0]
    assert batch['image'].shape == (2, 1, 16, 32) and batch['image'].dtype == torch.uint8
    assert list(batch['shape']) == [(48, 64)] * 2 and batch['mask'][0].shape == (48, 64)
    assert batch['img'] == [str(image) for image in image_files[:2]]


def test_a_cache_is_built_once_by_two_that_want_it(prepared, monkeypatch):
    """As two machines on one disk; threads stand for their processes."""
    built, build = [], dataset.build_cache
    monkeypatch.setattr(dataset, 'build_cache', lambda *args: (built.append(1), build(*args)))
    with ThreadPoolExecutor(2) as pool:
        names = [f.result().row for f in [pool.submit(dataset.open_cache) for _ in range(2)]]
    assert len(built) == 1 and names[0] == names[1]


@pytest.mark.filterwarnings('error')
def test_masks_can_be_written_to(tmp_path):
    """PIL's arrays are read-only, of which torch warns."""
    Image.new('P', (8, 8)).save(tmp_path / 'm.png')
    torch.from_numpy(masks.read_mask(tmp_path / 'm.png', classes=3))
