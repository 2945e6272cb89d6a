"""Step 1: check the training images and masks, and assign every image to a fold.

Reads   TRAIN_CSV (its column img) or, without it, the image files of TRAIN_PATH; the headers of
        all images and of their masks in MASK_PATH (IMAGE_SUFFIX, MASK_SUFFIX); the pixels of up to
        500 masks (CLASSES, IGNORE_INDEX).
Writes  TRAIN_FOLDS: img,kfold,group (img without folder and suffix).

Images of one group, found by GROUP_REGEX, are never split between folds: Carvana shows each car from
16 sides. The split depends on the names, SEED and N_FOLDS alone. Run it again when images change:

    python folds.py
"""

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold
from tqdm import tqdm

import command_line
import config
import images
import masks
from files import first_few, is_file, read_table, write_table

MASKS_DECODED = 500  # of more masks, this many are decoded here; the first epoch meets the others


def main() -> None:
    names = image_names()
    check_pairs(names)
    table = assign_folds(names)
    write_table(table, config.path(config.TRAIN_FOLDS))
    counts = table.groupby('kfold').agg(images=('img', 'size'), groups=('group', 'nunique'))
    counts.loc['all'] = counts.sum()
    print(counts.to_string())
    print(f'{config.N_FOLDS} folds that share no group: {config.TRAIN_FOLDS}')


def image_names() -> list[str]:
    """Names, without folder and suffix, of the training images: from TRAIN_CSV or the folder."""
    folder, suffix = config.path(config.TRAIN_PATH), config.IMAGE_SUFFIX
    if is_file(config.TRAIN_CSV):
        table = read_table(config.path(config.TRAIN_CSV), ['img'], 'fix or remove it')
        names = [name.removesuffix(suffix) for name in table.img]
    else:
        names = images.list_files(folder, suffix, 'TRAIN_PATH')
        if folder == config.path(config.MASK_PATH) and suffix != config.MASK_SUFFIX:
            names = [name for name in names if not (name + suffix).endswith(config.MASK_SUFFIX)]
    if not names:
        source = config.TRAIN_CSV if is_file(config.TRAIN_CSV) else folder
        raise config.UserMistake(f'{source}: no image *{suffix} (IMAGE_SUFFIX) in it')
    return sorted(names)


def files_of(name: str) -> tuple[Path, Path]:
    """The image file and the mask file of a training image."""
    return (
        config.path(config.TRAIN_PATH) / (name + config.IMAGE_SUFFIX),
        config.path(config.MASK_PATH) / (name + config.MASK_SUFFIX),
    )


def check_pairs(names: list[str]) -> None:
    """Raise config.UserMistake unless each image has a mask of its size, and masks hold classes."""
    with_image, with_mask = (
        set(images.list_files(config.path(folder), suffix, constant))
        for folder, suffix, constant in (
            (config.TRAIN_PATH, config.IMAGE_SUFFIX, 'TRAIN_PATH'),
            (config.MASK_PATH, config.MASK_SUFFIX, 'MASK_PATH'),
        )
    )
    remedy = 'move them away, or list the others in a CSV with a column img (TRAIN_CSV)'
    unpaired = sorted(with_mask - with_image)
    if is_file(config.TRAIN_CSV):
        remedy, unpaired = 'set TRAIN_CSV=None to take all images of the folder', []
    for missing, what in (
        ([name for name in names if name not in with_image], 'images have no file in TRAIN_PATH'),
        ([name for name in names if name not in with_mask], 'images have no mask in MASK_PATH'),
        (unpaired, 'masks have no image in TRAIN_PATH'),
    ):
        if missing:
            raise config.UserMistake(f'{len(missing)} {what}: {first_few(missing)}: {remedy}')
    differ = []
    for name in tqdm(names, 'checking headers', disable=None, leave=False):
        image_file, mask_file = files_of(name)
        mode, size = images.header(image_file)
        images.check_mode(image_file, mode)
        sizes = size, images.header(mask_file)[1]
        if sizes[0] != sizes[1]:
            shown = ' and '.join(f'{width}x{height}' for height, width in sizes)
            differ.append(f'{name} ({shown})')
    if differ:
        raise config.UserMistake(
            f'{len(differ)} images and their masks differ in size (width x height): '
            f'{first_few(differ)}: resize the masks by the nearest pixel'
        )
    check_mask_values(names)


def check_mask_values(names: list[str]) -> None:
    """Decode some masks; print how many hold one class alone; refuse them if all of them do."""
    constant, seen = Counter(), set()
    decoded = names[:: max(1, len(names) // MASKS_DECODED)]
    for name in tqdm(decoded, 'checking masks', disable=None, leave=False):
        mask = masks.read_mask(files_of(name)[1], config.CLASSES, config.IGNORE_INDEX)
        values = np.flatnonzero(np.bincount(mask.ravel())).tolist()
        seen.update(values)
        constant.update(values if len(values) == 1 else [])
    if len(seen) == 1 and decoded == names:
        raise config.UserMistake(
            f'{config.MASK_PATH}: all masks hold class {seen.pop()} alone: is it the right folder?'
        )
    if config.IGNORE_INDEX in seen and seen <= {0, config.IGNORE_INDEX}:
        raise config.UserMistake(
            f'{config.MASK_PATH}: the masks hold 0 and {config.IGNORE_INDEX} alone, and IGNORE_INDEX '
            f'leaves {config.IGNORE_INDEX} out: set IGNORE_INDEX=None if it is the foreground'
        )
    for value, count in sorted(constant.items()):
        print(f'{count} of {len(decoded)} masks that were decoded hold class {value} alone')


def assign_folds(names: list[str]) -> pd.DataFrame:
    """The table img,kfold,group: whole groups, shuffled by SEED, in N_FOLDS folds."""
    groups = [group_of(name) for name in names]
    if len(set(groups)) < config.N_FOLDS:
        raise config.UserMistake(
            f'N_FOLDS={config.N_FOLDS}, but only {len(set(groups))} different groups of images by '
            f'GROUP_REGEX={config.GROUP_REGEX!r}, such as {first_few(sorted(set(groups)))}: fewer '
            'folds' + (', or GROUP_REGEX=None to split by image' if config.GROUP_REGEX else '')
        )
    table = pd.DataFrame({'img': names, 'kfold': -1, 'group': groups})
    splitter = GroupKFold(config.N_FOLDS, shuffle=True, random_state=config.SEED)
    for fold, (_, held_out) in enumerate(splitter.split(names, groups=groups)):
        table.loc[held_out, 'kfold'] = fold
    check_table(table, '', 'correct TRAIN_CSV')
    return table


def group_of(name: str) -> str:
    """The first capture group of GROUP_REGEX in an image's name; without GROUP_REGEX, the name."""
    if config.GROUP_REGEX is None:
        return name
    match = re.search(config.GROUP_REGEX, name)
    if match is None or match.group(1) is None:
        raise config.UserMistake(
            f"GROUP_REGEX={config.GROUP_REGEX!r} does not fit the image name '{name}': set one that "
            'finds what must not be split (the patient, the car), or None to split by image'
        )
    return match.group(1)


def read_folds(folds: list[int] | None = None) -> pd.DataFrame:
    """The checked table img,kfold,group of TRAIN_FOLDS, or its rows of some folds."""
    file, again = config.path(config.TRAIN_FOLDS), 'run folds.py again'
    table = read_table(file, ['img', 'kfold', 'group'], 'run folds.py')
    if not table.kfold.str.fullmatch(r'\d+').all():
        raise config.UserMistake(f'{file}: kfold is not a whole number: {again}')
    table['kfold'] = table.kfold.astype(int)
    check_table(table, f'{file}: ', again)
    empty = sorted(set(folds or []) - set(table.kfold))
    if empty:
        raise config.UserMistake(f'{file}: no image in fold {empty[0]}: {again}')
    return table if folds is None else table[table.kfold.isin(folds)].reset_index(drop=True)


def check_table(table: pd.DataFrame, where: str, remedy: str) -> None:
    """Raise config.UserMistake if a group is in two folds, or an image is listed twice."""
    split = table.groupby('group').kfold.nunique()
    if (split > 1).any():
        raise config.UserMistake(f'{where}group {split.idxmax()} is in 2 folds: {remedy}')
    if not table.img.is_unique:
        twice = first_few(table.img[table.img.duplicated()].tolist())
        raise config.UserMistake(f'{where}images are listed more than once: {twice}: {remedy}')


def digests(fold: int) -> dict[str, str]:
    """Digests of the images that a fold's model is trained and validated on, for its checkpoint."""
    table = read_folds()
    return {
        name: hashlib.sha256('/'.join(table.img[rows]).encode()).hexdigest()[:16]
        for name, rows in (('train', table.kfold != fold), ('val', table.kfold == fold))
    }


def check_up_to_date() -> None:
    """Raise config.UserMistake unless TRAIN_FOLDS has N_FOLDS folds of the images that there are."""
    table = read_folds()
    if table.kfold.nunique() != config.N_FOLDS:
        raise config.UserMistake(
            f'{config.TRAIN_FOLDS} has {table.kfold.nunique()} folds, N_FOLDS={config.N_FOLDS}: run '
            'folds.py again'
        )
    other = set(table.img) ^ set(image_names())
    if other:
        raise config.UserMistake(
            f'{config.TRAIN_FOLDS} lists other images than there are ({first_few(sorted(other))}): '
            'run folds.py'
        )


if __name__ == '__main__':
    command_line.run(main, __doc__)
