"""README.md's arguments for other competitions read small synthetic files in the same layouts."""

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SRC
from PIL import Image

import command_line
import config
import files
import folds
import images
import predictor
from Lightning_module import CarvanaModel

TEXT = (SRC.parent / 'README.md').read_text(encoding='utf-8')
SECTION = TEXT[TEXT.index('## Other competitions') : TEXT.index('## How it works')]
ROWS = re.findall(r'^\| ([\w-]+).*\| `(.*)` \|$', SECTION, re.MULTILINE)
rng = np.random.default_rng(0)


def save(array: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)


def picture(height: int, width: int) -> np.ndarray:
    return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


def rectangle(height: int, width: int) -> np.ndarray:
    """A mask of 0 and 1 that is not its own transpose."""
    mask = np.zeros((height, width), np.uint8)
    top, left = rng.integers(height // 2), rng.integers(width // 2)
    mask[top : top + height // 4, left : left + width // 3] = 1
    return mask


def run_lines(folder: Path, submission: bool) -> None:
    """Run README's lines that merge the rows of a table, or those that split the submission's."""
    (block,) = re.findall(r'```python\n(.*?)```', SECTION, re.DOTALL)
    imports, merge, split = block.split('\n\n')
    lines = f'{imports}\n{split if submission else merge}'
    exec(lines.replace("'input/", f"'{folder}/").replace("'output/", f"'{folder}/"), {})


def airbus(folder: Path) -> dict[str, np.ndarray]:
    """A row for each ship, down the columns; a ship-free image has an empty cell. README's lines."""
    truth, rows = {}, []
    for number in range(6):
        ships = [rectangle(768, 768) for _ in range(number % 3)]
        truth[f'{number:05x}'] = np.max([np.zeros((768, 768), np.uint8), *ships], axis=0)
        save(picture(768, 768), folder / f'train_v2/{number:05x}.jpg')
        runs = [images.rle_encode(ship, 'columns') for ship in ships] or [None]
        rows += [(f'{number:05x}.jpg', text) for text in runs]
    table = pd.DataFrame(rows, columns=['ImageId', 'EncodedPixels'])
    table.to_csv(folder / 'train_ship_segmentations_v2.csv', index=False)
    save(picture(768, 768), folder / 'test_v2/0.jpg')
    run_lines(folder, submission=False)
    return truth


def hubmap(folder: Path) -> dict[str, np.ndarray]:
    """One row for each TIFF, down the columns, beside JSON files; the columns are renamed."""
    truth, rows = {}, []
    for number in range(6):
        mask = truth[f'a{number}'] = rectangle(80 + number, 60)
        save(picture(*mask.shape), folder / f'train/a{number}.tiff')
        (folder / f'train/a{number}.json').write_text('{}')
        rows.append((f'a{number}', images.rle_encode(mask, 'columns')))
    pd.DataFrame(rows, columns=['img', 'rle_mask']).to_csv(folder / 'train.csv', index=False)
    (folder / 'sample_submission.csv').write_text('id,predicted\nb0,\n')
    save(picture(64, 64), folder / 'test/b0.tiff')
    return truth


def severstal(folder: Path) -> dict[str, np.ndarray]:
    """Class indices for images with a defect alone."""
    truth = {}
    for number in range(6):
        mask = truth[f'c{number}'] = rectangle(256, 1600) * (number % 5)
        save(picture(256, 1600), folder / f'train_images/c{number}.jpg')
        if mask.any():
            save(mask, folder / f'train_masks/c{number}.png')
    (folder / 'sample_submission.csv').write_text('ImageId,EncodedPixels,ClassId\nd.jpg,1 1,1\n')
    save(picture(256, 1600), folder / 'test_images/d.jpg')
    return truth


def dsb2018(folder: Path) -> dict[str, np.ndarray]:
    """RGBA images, and the masks merged by README's line."""
    truth = {}
    (merge,) = re.findall(r'mask = (.*)  # a file for each object', TEXT)
    for number in range(6):
        nuclei = [rectangle(64, 48) for _ in range(3)]
        masks = [folder / f'masks/e{number}_{i}.png' for i in range(3)]
        for nucleus, file in zip(nuclei, masks):
            save(255 * nucleus, file)
        merged = eval(merge, {'np': np, 'Image': Image, 'files': masks})
        save(np.uint8(255 * merged), folder / f'train_masks/e{number}.png')
        truth[f'e{number}'] = np.max(nuclei, axis=0)
        image = Image.fromarray(picture(64, 48)).convert('RGBA')
        save(np.array(image), folder / f'train_hq/e{number}.png')
    save(picture(64, 48), folder / 'test_hq/f.png')
    return truth


def camvid(folder: Path) -> dict[str, np.ndarray]:
    """Colours, one for each line of label_colors.txt; four films."""
    colours, truth = np.uint8(rng.permutation(256)[:32, None] * [1, 0, 0]), {}
    for film in ('0001TP', '0006R0', '0016E5', 'Seq05VD'):
        for number in range(2):
            name = f'{film}_f{number:05d}'
            truth[name] = np.repeat(rng.permutation(32).astype(np.uint8), 4).reshape(8, 16)
            save(picture(8, 16), folder / f'701_StillsRaw_full/{name}.png')
            save(colours[truth[name]], folder / f'LabeledApproved_full/{name}_L.png')
    lines = [f'{red} {green} {blue}\tname' for red, green, blue in colours]
    (folder / 'label_colors.txt').write_text('\n'.join(lines))
    return truth


def kvasir(folder: Path) -> dict[str, np.ndarray]:
    """JPEG masks with three equal channels."""
    truth = {}
    for number in range(6):
        mask = truth[f'g{number}'] = np.kron(rectangle(8, 12), np.ones((8, 8), np.uint8))
        save(picture(64, 96), folder / f'images/g{number}.jpg')
        save(255 * mask[..., None].repeat(3, 2), folder / f'masks/g{number}.jpg')
    return truth


LAYOUTS = {
    'Airbus': airbus,
    'HuBMAP': hubmap,
    'Severstal': severstal,
    'DSB2018': dsb2018,
    'CamVid': camvid,
    'Kvasir-SEG': kvasir,
}


@pytest.mark.parametrize(('name', 'arguments'), ROWS, ids=[name for name, _ in ROWS])
def test_each_mask_is_read_as_it_was_drawn(tmp_path, name, arguments):
    truth = LAYOUTS[name](tmp_path)
    words = [f'INPUT={tmp_path}', f'OUTPUT={tmp_path}/output']
    words += shlex.split(arguments.replace('input/', f'{tmp_path}/'))
    if name == 'CamVid':
        colours = np.loadtxt(tmp_path / 'label_colors.txt', int, usecols=(0, 1, 2))
        words.append(f'MASK_COLOURS={colours.tolist()}')
    command_line.override(words)
    command_line.check()
    folds.main()
    assert sorted(folds.read_folds().img) == sorted(truth)
    for image, (_, mask) in zip(truth, files.pairs_of(truth)):
        assert np.array_equal(images.read_mask(mask, *images.mask_settings()), truth[image])
    if config.path(config.TEST_PATH).is_dir():
        small = {'MODEL_NAME': 'smp_linknet_tu-test_resnet', 'ENCODER_WEIGHTS': None}
        assert len(predictor.list_test_files(CarvanaModel([0], [1], **small))) == 1


def test_the_submission_becomes_a_row_for_each_ship(tmp_path):
    ships = np.zeros((2, 768, 768), np.uint8)
    ships[0, 5:9, 7:30], ships[1, 100:103, 7:30] = 1, 1
    both = images.rle_encode(ships.sum(0), 'columns')
    (tmp_path / 'submission.csv').write_text(f'img,rle_mask\na.jpg,{both}\nb.jpg,\n')
    run_lines(tmp_path, submission=True)
    table = pd.read_csv(tmp_path / 'ships.csv', keep_default_na=False)
    assert table.columns.tolist() == ['ImageId', 'EncodedPixels']
    rows = [('a.jpg', images.rle_encode(ship, 'columns')) for ship in ships] + [('b.jpg', '')]
    assert list(table.itertuples(index=False, name=None)) == rows


def test_each_row_has_a_layout():
    assert [name for name, _ in ROWS] == list(LAYOUTS)
