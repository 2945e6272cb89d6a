"""Step 1: check the training images and masks, and assign every image to a fold.

Reads   TRAIN_CSV (its column img) or, without it, the image files of TRAIN_PATH; the headers of
        all images and of their masks in MASK_PATH (IMAGE_PREFIX, IMAGE_SUFFIX, MASK_PREFIX,
        MASK_SUFFIX, EMPTY_IF_NO_MASK); the pixels of up to 500 masks (CLASSES, IGNORE_INDEX,
        MASK_COLOURS).
Writes  TRAIN_FOLDS: img,kfold,group (img is the name without prefix and suffix).

GROUP_REGEX finds the group of an image. All images of a group are in the same fold: Carvana has 16
images of each car. Folds have similar sizes and similar numbers of images with each class. The
split depends only on the names, the decoded masks, SEED and N_FOLDS. If images change, rerun it:

    python folds.py
"""

import hashlib
import re
from collections import Counter

import numpy as np
import pandas as pd
from tqdm import tqdm

import command_line
import config
import files
import images
import masks
from files import first_few, is_file, list_files, markdown, read_table, write_table

MASKS_DECODED = 500  # at most this many masks are decoded here; the first epoch decodes all


def main() -> None:
    names = image_names()
    pairs = masks.files_of(names)
    check_pairs(names, pairs)
    held = decode_masks(names, pairs)
    table = assign_folds(names, held)
    write_table(table, config.path(config.TRAIN_FOLDS))
    print_folds(table, held)
    print(f'{config.TRAIN_FOLDS}: {config.N_FOLDS} folds, each group in one of them')


def image_names() -> list[str]:
    """Names (see files.name_of) of the training images: from TRAIN_CSV or the folder."""
    table = files.is_table('TRAIN_CSV', 'train_masks.csv')
    source = config.TRAIN_CSV if table else config.path(config.TRAIN_PATH)
    names = [name for name, _ in files.train_rows()] if table else [*list_files('TRAIN_PATH')[0]]
    twice = [name for name, count in Counter(names).items() if count > 1]
    for wrong, what in (
        (not names, 'no image in it'),
        (not all(names), 'a cell of img is empty: remove the row'),
        (
            twice,
            f'listed twice: {first_few(twice)}: keep one row for each, with all its run lengths',
        ),
    ):
        if wrong:
            raise config.UserMistake(f'{source}: {what}')
    return sorted(names)


def check_pairs(names: list[str], pairs: list[tuple]) -> None:
    """Raise config.UserMistake unless each image can be read and has a mask of its size."""
    differ, turned, headers, lossy = [], [], [], 0
    if not is_file(config.TRAIN_CSV):
        found = {constant: list_files(constant) for constant in ('TRAIN_PATH', 'MASK_PATH')}
        for constant, (_, others) in found.items():
            files.tell_others(constant, others, 'left out')
        unpaired = sorted(set(found['MASK_PATH'][0]) - set(found['TRAIN_PATH'][0]))
        if unpaired:
            raise config.UserMistake(
                f'{len(unpaired)} masks have no image in TRAIN_PATH: {first_few(unpaired)}: set '
                'IMAGE_SUFFIX or IMAGE_PREFIX to match the image names, or move the masks away'
            )
    for name, (image_file, mask) in zip(tqdm(names, 'headers', disable=None, leave=False), pairs):
        image = images.header(image_file, images.check_bits)
        headers.append(image)
        if isinstance(mask, masks.Runs):
            continue
        mask = images.header(mask)
        lossy += mask.format in masks.LOSSY
        if image.size == mask.size[::-1] != mask.size and image.turned != mask.turned:
            raise config.UserMistake(
                f'{name}: EXIF turns only one of image and mask (orientation {image.turned} and '
                f'{mask.turned}), so they do not fit: remove the EXIF orientation from both files '
                '(exiftool -Orientation= FILE), then check them with test_dataset.py'
            )
        if image.size != mask.size:
            sizes = (f'{width}x{height}' for height, width in (image.size, mask.size))
            differ.append(f'{name} ({" and ".join(sizes)})')
        # If EXIF swaps the sides and the sizes are equal, the mask was drawn on the turned image.
        if image.turned != mask.turned and (image.turned < 5 or image.size[0] == image.size[1]):
            turned.append(name)
    if differ:
        raise config.UserMistake(
            f'{len(differ)} images and their masks differ in size: {first_few(differ)}: resize the '
            'masks with nearest-neighbour interpolation'
        )
    images.tell_wide(headers, config.crop_size()[1], config.SCALE)
    if lossy:
        print(f'{lossy} masks are JPEG files, which is lossy: 128 and above is foreground')
    if turned:
        print(f'{len(turned)} images and their masks have different EXIF rotations: check '
              f'them with test_dataset.py: {first_few(turned)}')  # fmt: skip


def decode_masks(names: list[str], pairs: list[tuple]) -> dict[str, tuple]:
    """Decode a sample of masks. Refuse them if all have only one class, or if palettes differ.

    Returns: name -> the classes that its mask holds.
    """
    held, first, step = {}, {}, -(-len(names) // MASKS_DECODED)
    decoded = tqdm(names[::step], 'masks', disable=None, leave=False)
    for name, (_, file) in zip(decoded, pairs[::step]):
        mask, palette = masks.read_with_palette(file, *mask_rule())
        held[name] = tuple(images.values_in(mask))
        for value, colour in palette.items():
            same, other = first.setdefault(value, (colour, file))
            # With one class, objects may have many colours, but background only one.
            if same != colour and (value == 0 or config.CLASSES > 2):
                raise config.UserMistake(
                    f'palettes differ: index {value} is {same} in {other} and {colour} in {file}: set '
                    'MASK_COLOURS to read the classes from the colours'
                )
    ignored = masks.ignored_value(config.IGNORE_INDEX)
    seen = set().union(*held.values())
    if len(seen - {ignored}) < 2 and (step == 1 or ignored in seen):
        raise config.UserMistake(
            f'MASK_PATH={config.MASK_PATH}: all masks hold {first_few(sorted(seen))} alone, so there is '
            f'nothing to learn: check MASK_PATH and IGNORE_INDEX={config.IGNORE_INDEX}'
        )
    return {name: tuple(v for v in values if v != ignored) for name, values in held.items()}


def print_folds(table: pd.DataFrame, held: dict[str, tuple]) -> None:
    """Print the images, groups and images with each class of every fold, and what is missing."""
    counts = table.groupby('kfold').agg(images=('img', 'size'), groups=('group', 'nunique'))
    names = {value: f'class {value}' for value in range(config.CLASSES)}
    names = {1: 'foreground'} if config.CLASSES == 1 else names
    for value, name in names.items():
        has = table.img.map(lambda img, value=value: value in held.get(img, ()))
        counts[name] = has.groupby(table.kfold).sum()
    missing = [(fold, name) for name in counts for fold in counts.index[counts[name] == 0]]
    counts.loc['all'] = counts.sum()
    print(markdown(counts.rename_axis('fold')))
    if len(held) < len(table):
        print(f'only {len(held)} masks were decoded: the classes are counted in these')
    never = [name for name in counts if counts.loc['all', name] == 0]
    if never:
        print(f'no mask has {first_few(never)}')
    for fold, name in [pair for pair in missing if pair[1] not in never][:5]:
        print(f'fold {fold} has no image with {name}: its score does not measure {name}')
    only = Counter(values[0] for values in held.values() if len(values) == 1)
    for value, count in sorted(only.items()):
        print(f'{count} of {len(held)} decoded masks have only class {value}')


def mask_rule() -> tuple:
    """The constants that decide how masks are read: arguments of masks.read_mask."""
    return tuple(getattr(config, name) for name in masks.RULE)


def empty_share(names: list[str]) -> float:
    """The share of empty masks in a sample of about 50; 0 with several classes."""
    if config.CLASSES > 1:
        return 0
    pairs = masks.files_of(names[:: max(1, len(names) // 50)])
    found = [(masks.read_mask(mask, *mask_rule()) == 1).any() for _, mask in pairs]
    return 1 - sum(found) / len(found)


def assign_folds(names: list[str], held: dict[str, tuple]) -> pd.DataFrame:
    """The table img,kfold,group. Whole groups, shuffled with SEED, go into N_FOLDS folds of similar
    size and with similar numbers of images of each class (`held`: see decode_masks)."""
    groups = [group_of(name) for name in names]
    different = sorted(set(groups))
    if len(different) < config.N_FOLDS:
        raise config.UserMistake(
            f'N_FOLDS={config.N_FOLDS}, but GROUP_REGEX={config.GROUP_REGEX!r} finds only '
            f'{len(different)} different groups ({first_few(different)}): set a smaller '
            'N_FOLDS, or another GROUP_REGEX (None: each image is a group)'
        )
    table = pd.DataFrame({'img': names, 'kfold': -1, 'group': groups})
    # What a group adds to its fold: its share of all images, and of the images with each class.
    classes = sorted(set().union(*held.values()))
    holds = {value: [value in held.get(name, ()) for name in names] for value in classes}
    shares = pd.DataFrame({'images': True, **holds}, table.index).groupby(table.group).sum()
    shares = (shares / shares.sum()).sample(frac=1, random_state=config.SEED)
    loads, fold_of = np.zeros((config.N_FOLDS, shares.shape[1])), {}
    # Start with the largest group. Choose the fold where the sum of squared loads grows least.
    for group, share in shares.loc[
        shares.sum(axis=1).sort_values(kind='stable').index[::-1]
    ].iterrows():
        fold = np.lexsort((loads[:, 0], (loads @ share).round(9)))[0]
        loads[fold] += share
        fold_of[group] = fold
    table['kfold'] = table.group.map(fold_of)
    return table


def group_of(name: str) -> str:
    """The first capture group of GROUP_REGEX in an image's name; without GROUP_REGEX, the name."""
    match = re.search(config.GROUP_REGEX or '(.*)', name)
    if match is None or match.group(1) is None:
        raise config.UserMistake(
            f"GROUP_REGEX={config.GROUP_REGEX!r} does not fit the image name '{name}': set a "
            'pattern that finds the group (the patient, the car), or None if there are no groups'
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
        for name, rows in (
            ('train', table.kfold != fold),
            ('val', table.kfold == fold),
            ('all', table.kfold >= 0),
        )
    }


def check_up_to_date() -> None:
    """Raise config.UserMistake if TRAIN_FOLDS was made from other images or another N_FOLDS."""
    table = read_folds()
    count, other = table.kfold.nunique(), sorted(set(table.img) ^ set(image_names()))
    for wrong, what in (
        (other, f'does not match the training images ({first_few(other)})'),
        (count != config.N_FOLDS, f'has {count} folds, but N_FOLDS={config.N_FOLDS}'),
    ):
        if wrong:
            raise config.UserMistake(f'{config.TRAIN_FOLDS} {what}: run folds.py again')


if __name__ == '__main__':
    command_line.run(main, __doc__)
