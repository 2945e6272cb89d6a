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
    check_mask_values(names)
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
    source = config.TRAIN_CSV if is_file(config.TRAIN_CSV) else folder
    twice = [name for name, count in Counter(names).items() if count > 1]
    for wrong, what in (
        (not names, f'no image *{suffix} (IMAGE_SUFFIX) in it'),
        (not all(names), 'a cell of img is empty: remove the row'),
        (twice, f'images are listed more than once: {first_few(twice)}: remove the other rows'),
    ):
        if wrong:
            raise config.UserMistake(f'{source}: {what}')
    return sorted(names)


def files_of(name: str) -> tuple[Path, Path]:
    """The image file and the mask file of a training image."""
    image, mask = name + config.IMAGE_SUFFIX, name + config.MASK_SUFFIX
    return config.path(config.TRAIN_PATH) / image, config.path(config.MASK_PATH) / mask


def check_pairs(names: list[str]) -> None:
    """Raise config.UserMistake unless each image can be read and has a mask of its size."""
    image_folder, mask_folder = config.path(config.TRAIN_PATH), config.path(config.MASK_PATH)
    with_image = set(images.list_files(image_folder, config.IMAGE_SUFFIX, 'TRAIN_PATH'))
    with_mask = set(images.list_files(mask_folder, config.MASK_SUFFIX, 'MASK_PATH'))
    remedy, unpaired = 'move them away, or list the others in TRAIN_CSV', with_mask - with_image
    if is_file(config.TRAIN_CSV):
        remedy, unpaired = 'set TRAIN_CSV=None to take all images of the folder', ()
    for missing, what in (
        (set(names) - with_image, 'images have no file in TRAIN_PATH'),
        (set(names) - with_mask, 'images have no mask in MASK_PATH'),
        (unpaired, 'masks have no image in TRAIN_PATH'),
    ):
        if missing:
            what = f'{len(missing)} {what}: {first_few(sorted(missing))}'
            raise config.UserMistake(f'{what}: {remedy}')
    differ = []
    for name in tqdm(names, 'checking headers', disable=None, leave=False):
        image_file, mask_file = files_of(name)
        mode, size = images.header(image_file)
        images.check_mode(image_file, mode)
        mask_size = images.header(mask_file)[1]
        if size != mask_size:
            differ.append(f'{name} ({size[1]}x{size[0]} and {mask_size[1]}x{mask_size[0]})')
    if differ:
        raise config.UserMistake(
            f'{len(differ)} images and their masks differ in size: {first_few(differ)}: resize the '
            'masks by the nearest pixel'
        )


def check_mask_values(names: list[str]) -> None:
    """Decode some masks; print how many hold one class alone; refuse them if all of them do."""
    constant, seen = Counter(), set()
    decoded = names[:: max(1, len(names) // MASKS_DECODED)]
    for name in tqdm(decoded, 'checking masks', disable=None, leave=False):
        mask = masks.read_mask(files_of(name)[1], config.CLASSES, config.IGNORE_INDEX)
        values = masks.values_in(mask)
        seen.update(values)
        constant.update(values if len(values) == 1 else [])
    all_seen = decoded == names or config.IGNORE_INDEX in seen
    if len(seen - {config.IGNORE_INDEX}) < 2 and all_seen:
        raise config.UserMistake(
            f'MASK_PATH={config.MASK_PATH}: all masks hold {first_few(sorted(seen))} alone, which with '
            f'IGNORE_INDEX={config.IGNORE_INDEX} leaves nothing to learn: set another of the two'
        )
    for value, count in sorted(constant.items()):
        print(f'{count} of {len(decoded)} masks that were decoded hold class {value} alone')


def empty_share(names: list[str]) -> float:
    """The share of masks without an object among some 50 of them; 0 with several classes."""
    if config.CLASSES > 1:
        return 0
    mask_files = [files_of(name)[1] for name in names[:: max(1, len(names) // 50)]]
    found = [(masks.read_mask(file, 1, config.IGNORE_INDEX) == 1).any() for file in mask_files]
    return 1 - sum(found) / len(found)


def assign_folds(names: list[str]) -> pd.DataFrame:
    """The table img,kfold,group: whole groups, shuffled by SEED, in N_FOLDS folds."""
    groups = [group_of(name) for name in names]
    different = sorted(set(groups))
    if len(different) < config.N_FOLDS:
        raise config.UserMistake(
            f'N_FOLDS={config.N_FOLDS}, but only {len(different)} different groups of images by '
            f'GROUP_REGEX={config.GROUP_REGEX!r}, such as {first_few(different)}: set fewer folds, or '
            'another GROUP_REGEX (None splits by image)'
        )
    table = pd.DataFrame({'img': names, 'kfold': -1, 'group': groups})
    splitter = GroupKFold(config.N_FOLDS, shuffle=True, random_state=config.SEED)
    for fold, (_, held_out) in enumerate(splitter.split(names, groups=groups)):
        table.loc[held_out, 'kfold'] = fold
    return table


def group_of(name: str) -> str:
    """The first capture group of GROUP_REGEX in an image's name; without GROUP_REGEX, the name."""
    match = re.search(config.GROUP_REGEX or '(.*)', name)
    if match is None or match.group(1) is None:
        raise config.UserMistake(
            f"GROUP_REGEX={config.GROUP_REGEX!r} does not fit the image name '{name}': set one that "
            'finds what must not be split (the patient, the car), or None to split by image'
        )
    return match.group(1)


def read_folds(folds: list[int] | None = None) -> pd.DataFrame:
    """The table img,kfold,group of TRAIN_FOLDS, or its rows of some folds.

    Raises config.UserMistake if a group is in two folds, an image listed twice, or a fold empty.
    """
    file = config.path(config.TRAIN_FOLDS)
    table = read_table(file, ['img', 'kfold', 'group'], 'run folds.py')
    if not table.kfold.str.fullmatch(r'\d+').all():
        raise config.UserMistake(f'{file}: kfold is not a whole number: run folds.py again')
    table['kfold'] = table.kfold.astype(int)
    split = table.groupby('group').kfold.nunique() > 1
    empty = sorted(set(folds or []) - set(table.kfold))
    for wrong, what in (
        (split.any(), f'group {first_few(split[split].index)} is in 2 folds'),
        (table.img.duplicated().any(), 'images are listed more than once'),
        (empty, f'no image in fold {first_few(empty)}'),
    ):
        if wrong:
            raise config.UserMistake(f'{file}: {what}: run folds.py again')
    return table if folds is None else table[table.kfold.isin(folds)].reset_index(drop=True)


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
    count, other = table.kfold.nunique(), sorted(set(table.img) ^ set(image_names()))
    for wrong, what in (
        (other, f'lists other images than there are ({first_few(other)})'),
        (count != config.N_FOLDS, f'has {count} folds, N_FOLDS={config.N_FOLDS}'),
    ):
        if wrong:
            raise config.UserMistake(f'{config.TRAIN_FOLDS} {what}: run folds.py again')


if __name__ == '__main__':
    command_line.run(main, __doc__)
