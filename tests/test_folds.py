"""Step 1: names, pairs, groups; every mistake with its message."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import make_carvana, run_script, save_mask_gif, settings
from PIL import Image

import command_line
import config
import folds


def test_groups_stay_together_and_nothing_is_lost(carvana, capsys):
    folds.main()
    table = folds.read_folds()
    assert list(table.columns) == ['img', 'kfold', 'group']
    assert len(table) == table.img.nunique() == 10
    assert (table.groupby('group').kfold.nunique() == 1).all()
    assert sorted(table.kfold.unique()) == [0, 1, 2, 3, 4]
    assert all(row.img.startswith(row.group) for row in table.itertuples())
    assert re.search(r'^all +10 +5 +10$', capsys.readouterr().out, re.MULTILINE)


def test_the_split_depends_on_the_seed_alone(carvana):
    names = [f'{car:012x}_{side:02d}' for car in range(40) for side in range(4)]
    first = folds.assign_folds(names, {})
    assert first.equals(folds.assign_folds(names, {}))
    config.SEED = 43
    assert not first.equals(folds.assign_folds(names, {}))


def test_without_groups_images_are_split(carvana):
    config.GROUP_REGEX = None
    table = folds.assign_folds([f'x{n}' for n in range(10)], {})
    assert (table.groupby('kfold').size() == 2).all()


def test_names_come_from_the_csv_where_there_is_one(carvana):
    pd.DataFrame({'img': ['000000000001_01.jpg', '000000000000_02.jpg'], 'rle_mask': ''}).to_csv(
        carvana / 'input/train_masks.csv', index=False
    )
    assert folds.image_names() == ['000000000000_02', '000000000001_01']


def test_masks_beside_the_images(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / 'all').mkdir()
    for n in range(6):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(
            tmp_path / f'all/{n}.png'
        )
        Image.fromarray(np.eye(9, dtype=np.uint8)).save(tmp_path / f'all/{n}_mask.png')
    words = [f'TRAIN_PATH={tmp_path}/all', f'MASK_PATH={tmp_path}/all', f'OUTPUT={tmp_path}/out']
    words += ['IMAGE_SUFFIX=.png', 'MASK_SUFFIX=_mask.png', 'GROUP_REGEX=None', 'INPUT=nowhere']
    command_line.override([*words, 'N_FOLDS=3', 'FOLDS=[0]'])
    folds.main()
    assert len(folds.read_folds()) == 6


def image(folder, name='000000000000_01'):
    return folder / f'input/train_hq/{name}.jpg'


def mask(folder, name='000000000000_01'):
    return folder / f'input/train_masks/{name}_mask.gif'


def csv(folder, text):
    (folder / 'input/train_masks.csv').write_text(text)


MISTAKES = {
    'no image folder': (lambda f: (f / 'input/train_hq').rename(f / 'gone'), 'train_hq: no such folder'),
    'no mask folder': (lambda f: (f / 'input/train_masks').rename(f / 'gone'), 'train_masks: no such'),
    'no images': (lambda f: [x.unlink() for x in (f / 'input/train_hq').iterdir()], 'found nothing'),
    'swapped': (lambda f: setattr(config, 'TRAIN_PATH', config.MASK_PATH), r'found \.gif 10: set'),
    'no mask': (lambda f: mask(f).unlink(), '1 images have no mask.*000000000000_01'),
    'no image': (lambda f: image(f).unlink(), '1 masks .*have no image.*000000000000_01'),
    'sizes': (lambda f: Image.new('RGB', (9, 8)).save(image(f)), r'_01 have sizes .8, 9. and .48'),
    'empty file': (lambda f: image(f).write_bytes(b''), '000000000000_01.jpg.*it is empty'),
    'empty mask file': (lambda f: mask(f).write_bytes(b''), '_mask.gif.*it is empty'),
    'text': (lambda f: image(f).write_text('hello'), '000000000000_01.jpg: not a readable image'),
    'truncated': (lambda f: image(f).write_bytes(image(f).read_bytes()[:-99]), '01.jpg: not a readable'),
    'twice': (lambda f: csv(f, 'img\na.jpg\na.jpg\n'), 'twice: a: make a table .*Other competitions'),
    'twice but for the suffix': (lambda f: csv(f, 'img\na.jpg\na\n'), 'listed twice: a'),
    'empty cell': (lambda f: csv(f, 'img,rle\na.jpg,1 1\n,1 1\n'), 'masks.csv: img is empty'),
    'not a table': (lambda f: csv(f, 'img\n1,2,3\n4,5\n6,7,8,9\n'), 'masks.csv: not a readable table'),
    'no column': (lambda f: csv(f, 'image\na.jpg\n'), 'no column img, only image: make a table'),
    'unknown': (lambda f: csv(f, 'img\na.jpg\n'), '1 images are not in TRAIN_PATH: a: correct TRAIN'),
    'outside': (lambda f: csv(f, 'img\n../a.jpg\n'), '1 images are not in TRAIN_PATH: ../a:'),
    'only a header': (lambda f: csv(f, 'img\n'), 'train_masks.csv: img is empty: make a table'),
    'empty csv': (lambda f: csv(f, ''), 'not a readable table'),
    'few groups': (lambda f: setattr(config, 'N_FOLDS', 6), 'only 5 different groups'),
    'regex': (lambda f: setattr(config, 'GROUP_REGEX', '^(z+)'), "does not fit .*'000000000000_01'"),
}  # fmt: skip


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_told_and_leave_an_earlier_table_alone(carvana, mistake):
    folds.main()
    earlier = config.path(config.TRAIN_FOLDS).read_bytes()
    break_it, message = MISTAKES[mistake]
    break_it(carvana)
    with pytest.raises(config.UserMistake, match=message) as raised:
        folds.main()
    assert '\n' not in str(raised.value)
    assert config.path(config.TRAIN_FOLDS).read_bytes() == earlier
    assert [f.name for f in config.path(config.OUTPUT).iterdir()] == ['train_folds.csv']


def test_constant_masks_are_allowed_and_told(carvana, capsys):
    save_mask_gif(mask(carvana), np.zeros((48, 64), np.uint8))
    save_mask_gif(mask(carvana, '000000000001_01'), np.ones((48, 64), np.uint8))
    folds.main()
    told = capsys.readouterr().out
    assert '1 of 10 decoded masks have only class 0' in told
    assert '1 of 10 decoded masks have only class 1' in told


def test_a_table_that_splits_a_group_is_refused(carvana):
    folds.main()
    table = pd.read_csv(config.path(config.TRAIN_FOLDS), dtype=str)
    table.loc[0, 'kfold'] = str((int(table.kfold[0]) + 1) % 5)
    table.to_csv(config.path(config.TRAIN_FOLDS), index=False)
    with pytest.raises(config.UserMistake, match='group 000000000000 is in 2 folds'):
        folds.read_folds()


def test_a_table_of_other_images_is_refused(carvana):
    folds.main()
    folds.check_up_to_date()
    make_carvana(carvana / 'more', cars=6)
    config.TRAIN_PATH, config.MASK_PATH = f'{carvana}/more/train_hq', f'{carvana}/more/train_masks'
    with pytest.raises(
        config.UserMistake, match='does not match the training images .000000000005_01'
    ):
        folds.check_up_to_date()


def test_a_fold_without_images_is_named(carvana):
    folds.main()
    with pytest.raises(config.UserMistake, match='no image in fold 7'):
        folds.read_folds([0, 7])


def test_no_table_yet(carvana):
    with pytest.raises(config.UserMistake, match='train_folds.csv: no such file: run folds.py'):
        folds.read_folds()


def test_an_unwritable_output_is_told(carvana):
    (carvana / 'output').write_text('a file where the folder should be')
    result = run_script('folds.py', *settings(carvana))
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert f'{carvana}/output' in result.stderr and 'set OUTPUT' in result.stderr


def test_ignoring_the_foreground_is_refused(carvana):
    """255 is the foreground of a grey mask of 0 and 255, also of Carvana's black and white GIFs."""
    config.IGNORE_INDEX = 255
    for file in (carvana / 'input/train_masks').iterdir():
        Image.fromarray(255 * np.array(Image.open(file))).save(file.with_suffix('.png'))
    for config.MASK_SUFFIX in ('_mask.gif', '_mask.png'):
        with pytest.raises(
            config.UserMistake,
            match='all masks hold 0, 255 alone: check MASK_SUFFIX, IGNORE_INDEX=255',
        ):
            folds.main()


def test_more_folds_than_asked_for_are_told(carvana):
    folds.main()
    config.N_FOLDS = 3
    with pytest.raises(
        config.UserMistake, match='has 5 folds, but N_FOLDS=3: give the same constants, or run'
    ):
        folds.check_up_to_date()


def test_masks_without_any_object_are_refused(carvana):
    for file in (carvana / 'input/train_masks').iterdir():
        save_mask_gif(file, np.zeros((48, 64), np.uint8))
    with pytest.raises(config.UserMistake, match='MASK_PATH=.*: all masks hold 0 alone'):
        folds.main()


def test_the_folder_is_taken_where_no_list_is_wanted(carvana):
    csv(carvana, 'img\n000000000000_01.jpg\n')
    config.TRAIN_CSV = None
    command_line.check()
    folds.main()
    assert len(folds.read_folds()) == 10
