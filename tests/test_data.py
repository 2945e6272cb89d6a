"""CarvanaDataset: what an item is, the augmentation's stream, the cache, files to predict."""

import warnings
from pathlib import Path

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
import files
import folds
import images
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
    image_file, mask_file = files.pairs_of([data.names[1]])[0]
    image = cv2.resize(np.array(Image.open(image_file)), (32, 32))
    assert np.abs(data[1]['image'].permute(1, 2, 0).numpy().astype(int) - image).max() <= 3
    assert np.array_equal(data[1]['mask'].numpy(), images.read_mask(mask_file, size=(32, 32)))
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


@pytest.mark.parametrize('workers', [0, 2])
def test_a_plain_index_is_augmented_anew_in_each_epoch_and_worker(prepared, workers):
    data = CarvanaDataset([0, 1], train=True)
    loader, runs = DataLoader(data, 1, num_workers=workers), []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append([item['image'] for _ in range(4) for item in loader])
    assert all(torch.equal(first, again) for first, again in zip(*runs))  # torch's seed decides
    assert len({image.numpy().tobytes() for image in runs[0]}) == 4 * len(data)


def test_items_say_in_which_row_of_the_names_they_are(prepared):
    data = CarvanaDataset([0, 3], train=False)
    for index in range(len(data)):
        assert data.names[data[index]['row']] == data[index]['img']
    rows = torch.cat([batch['row'] for batch in DataLoader(data, 3)])
    assert rows.tolist() == [0, 1, 2, 3] and rows.dtype == torch.int64


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


def cached() -> set:
    return set(config.path(config.OUTPUT).glob('cache/*'))


def test_cache_gives_what_the_files_give(prepared):
    config.AUGMENTATION = 'none'
    plain = CarvanaDataset([0, 1])
    config.CACHE = True
    for _ in range(2):  # when it is written, and when it is read
        data = CarvanaDataset([0, 1])
        for index in range(4):
            assert torch.equal(plain[index]['image'], data[index]['image'])
            assert torch.equal(plain[index]['mask'], data[index]['mask'])
    assert len(cached()) == 8 and {file.suffix for file in cached()} == {'.npy'}


def test_each_image_is_decoded_once_and_again_when_its_files_or_the_settings_change(
    prepared, monkeypatch
):
    decoded, read = [], dataset.read_pair
    monkeypatch.setattr(dataset, 'read_pair', lambda *pair: decoded.append(pair) or read(*pair))
    config.CACHE = True
    first = CarvanaDataset([0], train=False)
    for _ in range(2):
        assert first[0]['mask'].shape == (32, 32) and len(decoded) == 1
    image, new_mask = draw_ellipse(np.random.default_rng(9))
    mask_file = first.files[0][1]
    save_mask_gif(mask_file, new_mask)
    changed = images.read_mask(mask_file, size=(32, 32))
    assert np.array_equal(first[0]['mask'].numpy(), changed) and len(decoded) == 2
    config.CROP_SIZE = 16
    for _ in range(2):
        assert CarvanaDataset([0], train=False)[0]['mask'].shape == (16, 16) and len(decoded) == 3
    assert len(cached()) == 6  # older ones stay: a training beside this one may use them


def test_augmenting_does_not_change_the_cache(prepared):
    config.CACHE, config.AUGMENTATION = True, 'strong'
    plain, augmented = CarvanaDataset([0], train=False), CarvanaDataset([0], train=True)
    before = plain[0]
    for epoch in range(8):
        augmented[epoch, 0]['mask'][:] = 7
    assert torch.equal(plain[0]['image'], before['image'])
    assert torch.equal(plain[0]['mask'], before['mask'])


def test_a_large_image_is_mapped_and_stays_as_it_is(prepared):
    data = CarvanaDataset([0], train=False)
    pair = (config.path(config.OUTPUT) / 'cache', *data.files[0], (2400, 2400), *data.settings)
    dataset.read_cached(*pair)
    image, mask = dataset.read_cached(*pair)  # of 17 MB
    before = image[:2].copy()
    image[:] = 7
    assert np.array_equal(dataset.read_cached(*pair)[0][:2], before)
    assert not isinstance(image, np.memmap) and mask.any()


def test_a_cache_that_was_being_written_is_not_trusted(prepared, monkeypatch):
    def fail(opened, pixels):
        opened.write(b'half')
        raise KeyboardInterrupt

    config.CACHE = True
    data = CarvanaDataset([0], train=False)
    with monkeypatch.context() as patch:
        patch.setattr(np, 'save', fail)
        with pytest.raises(KeyboardInterrupt):
            data[0]
    assert not cached()
    assert data[0]['mask'].any()


def test_a_full_disk_is_told_with_what_to_do(prepared, monkeypatch):
    config.CACHE = True
    monkeypatch.setattr(np, 'save', lambda *_: Path('/dev/full').write_text('x'))
    with pytest.raises(config.UserMistake, match='No space left on device.*CACHE=False'):
        CarvanaDataset([0], train=False)[0]


def test_batches_to_predict(prepared):
    config.VAL_BATCH_SIZE = 2
    image_files, mask_files = zip(*files.pairs_of(folds.read_folds().img[:3]))
    batches = predictor.ImageBatches(image_files, model_of((16, 32, 1)), mask_files)
    assert [len(batches[number]['img']) for number in range(len(batches))] == [2, 1]
    batch = batches[0]
    assert batch['image'].shape == (2, 1, 16, 32) and batch['image'].dtype == torch.uint8
    assert list(batch['shape']) == [(48, 64)] * 2 and batch['mask'][0].shape == (48, 64)
    assert batch['img'] == [str(image) for image in image_files[:2]]


@pytest.mark.filterwarnings('error')
def test_masks_can_be_written_to(tmp_path):
    """PIL's arrays are read-only, of which torch warns."""
    Image.new('P', (8, 8)).save(tmp_path / 'm.png')
    torch.from_numpy(images.read_mask(tmp_path / 'm.png', classes=3))
