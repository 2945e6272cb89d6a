"""The demo's cars: files as Carvana's, masks that fit their images, the same cars every time;
runs side by side."""

import cv2
import numpy as np
import pytest
from PIL import Image

import demo
import images

CARS, TEST_CARS, SIZE = 2, 1, (120, 80)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('demo')
    demo.make_dataset(folder, CARS, TEST_CARS, SIZE, seed=1)
    return folder


def read_rows(file) -> dict[str, str]:
    head, *rows = file.read_text().splitlines()
    assert head == 'img,rle_mask' and rows == sorted(rows)
    return dict(row.split(',') for row in rows)


def pairs(folder, images, truths) -> list:
    """(image file, mask file) of one of the two sets."""
    files = sorted((folder / images).iterdir())
    found = [(file, folder / truths / f'{file.stem}_mask.gif') for file in files]
    assert [mask for _, mask in found] == sorted((folder / truths).iterdir())
    return found


def test_the_layout_is_carvanas(folder):
    train = pairs(folder, 'train_hq', 'train_masks')
    test = pairs(folder, 'test_hq', 'test_masks_truth')
    for files, cars, table in (
        (train, CARS, 'train_masks.csv'),
        (test, TEST_CARS, 'sample_submission.csv'),
    ):
        names = [image.name for image, _ in files]
        assert list(read_rows(folder / table)) == names
        assert len(names) == 16 * cars
        ids = {name[:12] for name in names}
        assert len(ids) == cars and all(int(car, 16) >= 0 for car in ids)
        assert set(names) == {f'{car}_{side:02}.jpg' for car in ids for side in range(1, 17)}
    assert set(read_rows(folder / 'sample_submission.csv').values()) == {'1 1'}


def test_masks_are_black_and_white_gifs_of_one_car_each(folder):
    rows = read_rows(folder / 'train_masks.csv')
    train = pairs(folder, 'train_hq', 'train_masks')
    for image_file, mask_file in train + pairs(folder, 'test_hq', 'test_masks_truth'):
        with Image.open(image_file) as image, Image.open(mask_file) as gif:
            assert image.size == gif.size == SIZE and (image.mode, gif.mode) == ('RGB', 'P')
            assert gif.getpalette()[:6] == [0, 0, 0, 255, 255, 255]
            mask = np.asarray(gif)
        assert set(np.unique(mask)) == {0, 1} and 0.05 < mask.mean() < 0.5
        assert images.rle_encode(mask) == rows.get(image_file.name, images.rle_encode(mask))
        areas = cv2.connectedComponentsWithStats(mask)[2][1:, cv2.CC_STAT_AREA]
        assert areas.max() > 0.97 * areas.sum()  # an antenna or a mirror may be apart


def read_all(folder) -> dict[str, bytes]:
    files = [file for file in folder.rglob('*') if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_sides_differ_and_only_the_seed_decides(folder, tmp_path, monkeypatch):
    truths = [mask.read_bytes() for _, mask in pairs(folder, 'train_hq', 'train_masks')]
    assert len(set(truths)) == len(truths)
    monkeypatch.setattr(demo.config, 'cpu_count', lambda: 1)
    demo.make_dataset(tmp_path / 'same', CARS, TEST_CARS, SIZE, seed=1)
    assert read_all(tmp_path / 'same') == read_all(folder)
    demo.make_dataset(tmp_path / 'other', 1, 0, SIZE, seed=2)
    other = [mask.read_bytes() for _, mask in pairs(tmp_path / 'other', 'train_hq', 'train_masks')]
    assert not set(other) & set(truths)
    assert not (tmp_path / 'other' / 'test_hq').exists()


def test_every_sixth_car_is_pale(tmp_path):
    brightness = []
    for car in range(6):
        demo.draw_car(tmp_path, tmp_path, 'x', car, 5, SIZE, 42)
        with Image.open(tmp_path / 'x.jpg') as image, Image.open(tmp_path / 'x_mask.gif') as mask:
            brightness.append(np.asarray(image)[np.asarray(mask) == 1].mean())
    assert np.argmax(brightness) == 5


def test_the_users_arguments_win_but_for_the_paths():
    given = demo.arguments(['INPUT=/x', 'EPOCHS=2'], INPUT='/x/demo')
    assert (
        given[-2:] == ['INPUT=/x/demo', 'EPOCHS=2'] and f'EPOCHS={demo.SETTINGS["EPOCHS"]}' in given
    )
    assert demo.size('1918x1280') == (1918, 1280)


SCRIPT = """
import os, pathlib, sys, time
own, other, status = sys.argv[1:]
pathlib.Path(own).touch()
while not pathlib.Path(other).exists():
    time.sleep(0.01)
print(f'{own} with {os.environ["OMP_NUM_THREADS"]} threads')
sys.exit(int(status))
"""


def test_runs_side_by_side_share_the_cores_and_a_failure_ends_the_demo(
    tmp_path, monkeypatch, capfd
):
    (tmp_path / 'src').mkdir()
    (tmp_path / 'src' / 'wait.py').write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.config, 'path', tmp_path.joinpath)
    monkeypatch.setattr(demo.config, 'cpu_count', lambda: 5)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    demo.run('wait.py', ['a', 'b', '0'], ['b', 'a', '0'])
    title, *lines = capfd.readouterr().out.split('\n')[1:-1]
    assert title == '--- python src/wait.py'
    assert sorted(lines) == ['a with 2 threads', 'b with 2 threads']
    demo.run('wait.py', ['a', 'a', '0'])
    assert capfd.readouterr().out.endswith('\na with 5 threads\n')
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    with pytest.raises(SystemExit) as stop:
        demo.run('wait.py', ['c', 'd', '0'], ['d', 'c', '7'])
    assert stop.value.code == 7
    assert sorted(capfd.readouterr().out.split('\n')[-3:-1]) == [
        'c with 3 threads', 'd with 3 threads',
    ]  # fmt: skip
