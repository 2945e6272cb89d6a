"""Step 1: check the training images and masks, and assign every image to a fold.

Reads   TRAIN_CSV (its column img) or, without it, the image files of TRAIN_PATH; the headers of
        all images and of their masks in MASK_PATH (IMAGE_PREFIX, IMAGE_SUFFIX, MASK_PREFIX,
        MASK_SUFFIX, EMPTY_IF_NO_MASK, RLE_ORDER); the pixels of up to 500 masks (CLASSES,
        IGNORE_INDEX, MASK_COLOURS).
Writes  TRAIN_FOLDS: img,kfold,group (img is the name without prefix and suffix).

GROUP_REGEX finds the group of an image. All images of a group are in the same fold: Carvana has 16
images of each car. Folds have similar sizes and similar numbers of images with each class. The
split depends only on the names, the decoded masks, SEED and N_FOLDS. If images change, rerun it:

    python folds.py
"""

import hashlib
import re
import warnings
from collections import Counter
from pathlib import Path

import pandas as pd
from tqdm import tqdm

import command_line
import config
import files
import images
from files import Runs, first_few, is_file, list_files, read_folds

MASKS_DECODED = 500  # at most this many masks are decoded here; the first epoch decodes all
BAR = {'disable': None, 'leave': False}  # of tqdm: on a terminal, until it is complete


def main() -> None:
    names = image_names()
    pairs = files.pairs_of(names)
    check_files(names, pairs)
    classes = decode_masks(names, pairs)
    table = assign_folds(names, classes)
    files.write_table(table, config.path(config.TRAIN_FOLDS))
    print_folds(table, classes)
    print(f'{config.TRAIN_FOLDS}: {config.N_FOLDS} folds, each group in one of them')


def image_names() -> list[str]:
    """Names (see files.fit) of the training images: from TRAIN_CSV or the folder."""
    if not files.is_table('TRAIN_CSV', 'train_masks.csv'):
        return list(list_files('TRAIN_PATH'))
    names, table = files.train_table().img, config.TRAIN_CSV
    twice = names[names.duplicated()].tolist()
    if twice:
        raise config.UserMistake(f'{table}: listed twice: {first_few(twice)}: {files.TABLE_HELP}')
    if names.empty or '' in names.tolist():
        raise config.UserMistake(f'{table}: img is empty: {files.TABLE_HELP}')
    return sorted(names)


# ------------------------------------------------------------ checks
def check_files(names: list[str], pairs: list[tuple]) -> None:
    """Raise config.UserMistake unless each image can be read and has a mask of its size."""
    used = {file for pair in pairs for file in pair}
    files.print_unused('TRAIN_PATH', used, 'used')
    if config.path(config.MASK_PATH) != config.path(config.TRAIN_PATH):
        files.print_unused('MASK_PATH', used, 'used')
    unpaired = sorted(set(list_files('MASK_PATH', required=False)) - set(list_files('TRAIN_PATH')))
    if unpaired and not is_file(config.TRAIN_CSV):
        problem = f'{len(unpaired)} masks have no image in TRAIN_PATH: {first_few(unpaired)}'
        raise config.UserMistake(f'{problem}: set IMAGE_SUFFIX, or move the masks away')
    sizes, mask_headers, rotated = [], {}, []
    for name, (image_file, mask_file) in zip(tqdm(names, 'headers', **BAR), pairs):
        image = images.check(image_file)
        sizes.append(image.size)
        if isinstance(mask_file, Runs):
            continue
        mask = mask_headers[mask_file] = images.check(mask_file, images.check_mask_kind)
        if image.orientation != mask.orientation:
            rotated.append(name)
        if image.size != mask.size:
            remedy = 'resize the mask with nearest-neighbour interpolation, or rotate it'
            if image.orientation != mask.orientation:
                remedy = 'EXIF turns only one of them: remove it from both (exiftool -Orientation=)'
            both = f'{image.size} and {mask.size} as (height, width)'
            raise config.UserMistake(f'image and mask of {name} have sizes {both}: {remedy}')
    images.print_large(sizes, config.crop_size(), config.SCALE)
    runs = sum(isinstance(mask, Runs) and mask.text != '' for _, mask in pairs)
    if runs:
        print(f'{runs} masks are run lengths, RLE_ORDER={config.RLE_ORDER}: see test_dataset.py')
    lossy = sum(mask.format == 'JPEG' for mask in mask_headers.values())
    if lossy:
        print(f'{lossy} masks are JPEG files, which is lossy: 128 and above is foreground')
    if rotated:
        shown = first_few(rotated)
        print(f'{len(rotated)} masks have another EXIF rotation: see test_dataset.py: {shown}')
    if config.CLASSES > 2 and config.MASK_COLOURS is None:
        check_palettes({file: mask.palette for file, mask in mask_headers.items()})


def check_palettes(palettes: dict[Path, list[tuple]]) -> None:
    """Raise config.UserMistake unless a class has the same colour in all palettes."""
    first = {}
    for file, colours in palettes.items():
        for index, colour in enumerate(colours[: config.CLASSES]):
            if index > 0 and colour == (0, 0, 0):
                continue  # the padding of a short palette
            same, other = first.setdefault(index, (colour, file))
            if same != colour:
                difference = f'index {index} is {same} in {other} and {colour} in {file}'
                raise config.UserMistake(f'palettes differ: {difference}: set MASK_COLOURS')


def decode_masks(names: list[str], pairs: list[tuple]) -> dict[str, tuple]:
    """Name -> the classes in its mask, of a sample. Refuse the masks if all have only one class."""
    step = -(-len(names) // MASKS_DECODED)
    values = {}
    for name, (_, file) in zip(tqdm(names[::step], 'masks', **BAR), pairs[::step]):
        values[name] = images.values_in(images.read_mask(file, *images.mask_settings()))
    ignored = images.ignored_value(config.IGNORE_INDEX)
    seen = set().union(*values.values())
    if len(seen - {ignored}) < 2 and (ignored in seen or len(values) == len(names)):
        problem = f'MASK_PATH={config.MASK_PATH}: all masks hold {first_few(sorted(seen))} alone'
        raise config.UserMistake(
            f'{problem}: check MASK_SUFFIX, IGNORE_INDEX={config.IGNORE_INDEX}'
        )
    return {name: tuple(v for v in present if v != ignored) for name, present in values.items()}


# ------------------------------------------------------------ folds
def assign_folds(names: list[str], classes: dict[str, tuple]) -> pd.DataFrame:
    """The table img,kfold,group: whole groups, shuffled with SEED, in N_FOLDS folds.

    scikit-learn balances the rarest class of each image, as far as it is known from `classes`, and
    with it the number of images. Groups of very unequal size leave folds of unequal size.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # its import takes 2 seconds

    groups = [group_of(name) for name in names]
    different = sorted(set(groups))
    if len(different) < config.N_FOLDS:
        found = f'GROUP_REGEX finds only {len(different)} different groups: {first_few(different)}'
        raise config.UserMistake(f'{found}: change it, or N_FOLDS={config.N_FOLDS}')
    images_with = Counter(value for present in classes.values() for value in present)
    rarest = [min(classes.get(name, ()), key=images_with.get, default=-1) for name in names]
    if max(Counter(rarest).values()) < config.N_FOLDS:
        rarest = [-1] * len(names)  # too few images to balance, which scikit-learn refuses
    table = pd.DataFrame({'img': names, 'kfold': -1, 'group': groups})
    splitter = StratifiedGroupKFold(config.N_FOLDS, shuffle=True, random_state=config.SEED)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # of a class with fewer images than folds
        for fold, (_, rows) in enumerate(splitter.split(names, rarest, groups)):
            table.loc[rows, 'kfold'] = fold
    return table


def group_of(name: str) -> str:
    """The first capture group of GROUP_REGEX in an image's name; without GROUP_REGEX, the name."""
    match = re.search(config.GROUP_REGEX or '(.*)', name)
    if match is None or match.group(1) is None:
        problem = f'GROUP_REGEX={config.GROUP_REGEX!r} does not fit the image name {name!r}'
        raise config.UserMistake(f'{problem}: correct it, or set None if there are no groups')
    return match.group(1)


def print_folds(table: pd.DataFrame, classes: dict[str, tuple]) -> None:
    """Print the images, groups and images with each class of every fold."""
    counts = table.groupby('kfold').agg(images=('img', 'size'), groups=('group', 'nunique'))
    for value in range(config.CLASSES) if config.CLASSES > 1 else [1]:
        has_class = [value in classes.get(name, ()) for name in table.img]
        counts[f'class {value}'] = pd.Series(has_class).groupby(table.kfold).sum()
    counts.loc['all'] = counts.sum()
    print(counts.rename_axis('fold').to_string())
    if len(classes) < len(table):
        print(f'only {len(classes)} masks were decoded: the classes are counted in these')
    if (counts == 0).any(axis=None):
        print('a 0 in this table: the score of that fold does not measure that class')
    single = Counter(present[0] for present in classes.values() if len(present) == 1)
    for value, count in sorted(single.items()):
        empty = ', no object' if value == 0 else ''
        print(f'{count} of {len(classes)} decoded masks have only class {value}{empty}')


# ------------------------------------------------------------ later steps
def digests(fold: int) -> dict[str, str]:
    """Digests of the images that a fold's model is trained and validated on, for its checkpoint."""
    table = read_folds()
    train, val = table.img[table.kfold != fold], table.img[table.kfold == fold]
    return {
        part: hashlib.sha256('/'.join(names).encode()).hexdigest()[:16]
        for part, names in {'train': train, 'val': val, 'all': table.img}.items()
    }


def check_up_to_date() -> None:
    """Raise config.UserMistake if TRAIN_FOLDS was made from other images or another N_FOLDS."""
    table, problem = read_folds(), ''
    changed, count = sorted(set(table.img) ^ set(image_names())), table.kfold.nunique()
    if changed:
        problem = f'does not match the training images ({first_few(changed)})'
    elif count != config.N_FOLDS:
        problem = f'has {count} folds, but N_FOLDS={config.N_FOLDS}'
    if problem:
        raise config.UserMistake(
            f'{config.TRAIN_FOLDS} {problem}: give the same constants, or run folds.py again'
        )


if __name__ == '__main__':
    command_line.run(main, __doc__)
