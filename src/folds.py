"""Step 1: assign every training image to a fold.

Reads   TRAIN_CSV (its column img) or, without it, the image files of TRAIN_PATH; the headers of
        all images and of their masks in MASK_PATH (IMAGE_SUFFIX, MASK_SUFFIX); the values of some
        masks (CLASSES, IGNORE_INDEX).
Writes  TRAIN_FOLDS: img,kfold,group (img without folder and suffix).

Images of one group, by GROUP_REGEX, are never in two folds: Carvana shows each car from 16 sides.
The split depends on the names, SEED and N_FOLDS alone. Run it again whenever the images change:

    python folds.py
"""

import config

if __name__ == '__main__':
    import command_line

    command_line.start(__doc__)

import hashlib
import os
import re
from collections import Counter
from pathlib import Path

import pandas as pd

import pairs
from tables import is_file, read_table, some, write_table


def main() -> None:
    names = image_names()
    pairs.check(names)
    table = assign_folds(names)
    file = config.path(config.TRAIN_FOLDS)
    write_table(table, file)
    # Images from a clock that goes ahead are not newer than the table that has just met them.
    newest = max(modified(f) for name in names for f in pairs.files_of(name))
    os.utime(file, (max(newest, modified(file)),) * 2)
    counts = table.groupby('kfold').agg(images=('img', 'size'), groups=('group', 'nunique'))
    counts.loc['all'] = counts.sum()
    print(counts.to_string())
    print(f'{config.N_FOLDS} folds that share no group: {config.TRAIN_FOLDS}')


def image_names() -> list[str]:
    """Names, without folder and suffix, of the training images: from TRAIN_CSV or the folder."""
    folder = config.path(config.TRAIN_PATH)
    if is_file(config.TRAIN_CSV):
        table = read_table(config.path(config.TRAIN_CSV), ['img'], 'fix or remove it')
        names = [name.removesuffix(config.IMAGE_SUFFIX) for name in table.img]
        outside = [name for name in names if not name or name != os.path.basename(name)]
        if outside:
            raise config.UserMistake(
                f"{config.TRAIN_CSV}: '{outside[0]}' is not the name of a file in TRAIN_PATH"
            )
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise config.UserMistake(
                f'{config.TRAIN_CSV}: {len(twice)} images are listed more than once: {some(twice)}'
            )
    else:
        names = pairs.files_in(folder, config.IMAGE_SUFFIX, 'TRAIN_PATH')
        if folder == config.path(config.MASK_PATH) and config.MASK_SUFFIX != config.IMAGE_SUFFIX:
            names = [n for n in names if not (n + config.IMAGE_SUFFIX).endswith(config.MASK_SUFFIX)]
    if not names:
        source = config.TRAIN_CSV if is_file(config.TRAIN_CSV) else folder
        raise config.UserMistake(f'{source}: no image *{config.IMAGE_SUFFIX} (IMAGE_SUFFIX) in it')
    return sorted(names)


def assign_folds(names: list[str]) -> pd.DataFrame:
    """Table img,kfold,group: whole groups, shuffled by SEED, in N_FOLDS folds of like size."""
    from sklearn.model_selection import GroupKFold  # slow to import, and needed by this step alone

    groups = [group_of(name) for name in names]
    if len(set(groups)) < config.N_FOLDS:
        raise config.UserMistake(
            f'N_FOLDS={config.N_FOLDS}, but only {len(set(groups))} different groups of images by '
            f'GROUP_REGEX={config.GROUP_REGEX!r}, such as {some(sorted(set(groups)))}: fewer folds'
            + (', or GROUP_REGEX=None to split by image' if config.GROUP_REGEX else '')
        )
    table = pd.DataFrame({'img': names, 'kfold': -1, 'group': groups})
    splitter = GroupKFold(config.N_FOLDS, shuffle=True, random_state=config.SEED)
    for fold, (_, held_out) in enumerate(splitter.split(names, groups=groups)):
        table.loc[held_out, 'kfold'] = fold
    check_table(table)
    return table


def group_of(name: str) -> str:
    """The first capture group of GROUP_REGEX in an image's name; without one, the name."""
    if config.GROUP_REGEX is None:
        return name
    match = re.search(config.GROUP_REGEX, name)
    if match is None or match.group(1) is None:
        raise config.UserMistake(
            f"GROUP_REGEX={config.GROUP_REGEX!r} does not fit the image name '{name}': set one that "
            'finds what must not be split (the patient, the car), or None to split by image'
        )
    return match.group(1)


def check_table(table: pd.DataFrame) -> None:
    """No group is in two folds and no image is there twice: or a UserMistake."""
    again = f'run folds.py again (it writes {config.TRAIN_FOLDS})'
    split = table.groupby('group').kfold.nunique()
    if (split > 1).any():
        raise config.UserMistake(f'group {split.idxmax()} is in {split.max()} folds: {again}')
    if table.img.duplicated().any():
        raise config.UserMistake(f'{table.img[table.img.duplicated()].iloc[0]} is twice: {again}')


def read_folds(folds: list[int] | None = None) -> pd.DataFrame:
    """The checked table img,kfold,group of TRAIN_FOLDS; of some folds alone where they are given."""
    again = 'run folds.py'
    table = read_table(config.path(config.TRAIN_FOLDS), ['img', 'kfold', 'group'], again)
    if not table.kfold.str.fullmatch(r'\d+').all():
        raise config.UserMistake(
            f'{config.TRAIN_FOLDS}: kfold is not a whole number: {again} again'
        )
    table['kfold'] = table.kfold.astype(int)
    check_table(table)
    empty = sorted(set(folds or []) - set(table.kfold))
    if empty:
        raise config.UserMistake(
            f'{config.TRAIN_FOLDS}: no image in fold {empty[0]}: {again} again'
        )
    return table if folds is None else table[table.kfold.isin(folds)].reset_index(drop=True)


def digests(fold: int) -> dict[str, str]:
    """What tells the images that a fold's model is trained and validated on from any others."""
    table = read_folds()
    parts = {'train': table[table.kfold != fold], 'val': table[table.kfold == fold]}
    return {
        name: hashlib.sha256('/'.join(part.img).encode()).hexdigest()[:16]
        for name, part in parts.items()
    }


def check_up_to_date() -> None:
    """TRAIN_FOLDS lists the images that there are, and is newer than they: or a UserMistake."""
    table, file = read_folds(), config.path(config.TRAIN_FOLDS)
    if table.kfold.max() >= config.N_FOLDS:
        raise config.UserMistake(
            f'{config.TRAIN_FOLDS} has {table.kfold.max() + 1} folds, N_FOLDS={config.N_FOLDS}: run '
            'folds.py again'
        )
    read_folds(list(range(config.N_FOLDS)))
    other = set(table.img) ^ set(image_names())
    if other:
        raise config.UserMistake(
            f'{config.TRAIN_FOLDS} lists other images than there are ({some(sorted(other))}): run '
            'folds.py'
        )
    written = file.stat().st_mtime
    changed = [f.name for n in table.img for f in pairs.files_of(n) if modified(f) > written]
    if changed:
        raise config.UserMistake(
            f'{config.TRAIN_FOLDS} is older than the images ({some(sorted(changed))}): run folds.py'
        )


def modified(file: Path) -> float:
    """When a file was last written, in seconds; one that is missing has changed by now."""
    return file.stat().st_mtime if file.exists() else float('inf')


if __name__ == '__main__':
    command_line.run(main)
