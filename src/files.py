"""Files: atomic writes, locks, tables; images and masks found by their names, and paired."""

import hashlib
import os
import re
import tempfile
import unicodedata
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from filelock import FileLock, Timeout

import config

# Constant of a folder -> constants of the prefix and the suffix of its files.
NAMING = {
    'TRAIN_PATH': ('IMAGE_PREFIX', 'IMAGE_SUFFIX'),
    'MASK_PATH': ('MASK_PREFIX', 'MASK_SUFFIX'),
    'TEST_PATH': (None, 'TEST_SUFFIX'),
}
HIDDEN = ('.', '@', '__MACOSX')  # files and folders that systems add, such as ._a.png and @eaDir
# Line ends, and half characters, which stand for bytes that are not UTF-8.
CONTROL_CHARACTERS = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')
TABLE_HELP = 'make a table with one row per image, as README.md shows in "Other competitions"'
MODEL_COLUMNS = ['fold', 'version', 'checkpoint', 'val_dice', 'val_iou']  # of models.csv


@contextmanager
def atomic_write(file: Path, ending: str = '.tmp'):
    """Yield a path beside `file` to write to. It is renamed to `file` if the block succeeds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Fixed, so the next run overwrites it; and short, as file.name may be as long as a name can be.
    temporary = file.with_name(hashlib.sha256(file.name.encode()).hexdigest()[:16] + ending)
    try:
        yield temporary
        temporary.replace(file)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # write() to a full disk gives no name
            error.filename = str(file)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def file_lock(file: Path, busy: str = ''):
    """A lock for a with statement. If another process holds it, wait, or refuse with `busy`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(file).acquire(timeout=0 if busy else -1)
    except Timeout:
        raise config.UserMistake(busy) from None


def check_writable(folder: Path) -> None:
    """Raise OSError if a folder cannot be written to: now, and not after hours of training."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Write a CSV file atomically."""
    with atomic_write(file) as temporary:
        table.to_csv(temporary, index=False, lineterminator='\n')


def read_table(file: Path, columns: list[str], remedy: str) -> pd.DataFrame:
    """A CSV file's cells as text. Raises config.UserMistake if the file or a column is missing."""
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise config.UserMistake(f'{file}: no such file: {remedy}') from None
    except (ValueError, OSError) as error:
        reason = config.shorten(error)
        raise config.UserMistake(f'{file}: not a readable table ({reason}): {remedy}') from None
    missing, there = set(columns) - set(table), ', '.join(table)
    if missing:
        raise config.UserMistake(f'{file}: no column {min(missing)}, only {there}: {remedy}')
    return table


def models_file() -> Path:
    return config.path(config.OUTPUT) / 'models.csv'


def read_models(file: Path | None = None) -> pd.DataFrame:
    """A models.csv, by default that of OUTPUT: one row per trained fold."""
    file = file or models_file()
    table = read_table(file, MODEL_COLUMNS, 'run Lightning_trainer.py')
    try:
        return table.astype({'fold': int, 'val_dice': float, 'val_iou': float})
    except ValueError as error:
        remedy = 'remove it and run Lightning_trainer.py RESUME=True'
        raise config.UserMistake(f'{file}: {config.shorten(error)}: {remedy}') from None


def enter_model(fold: int, version: str, checkpoint: Path, scores: dict) -> None:
    """Replace the fold's row in models.csv. scores: those of the checkpoint's epoch."""
    row = [fold, version, relative(checkpoint), scores['val_dice'], scores['val_iou']]
    with file_lock(models_file().with_name('.models.lock')):  # folds may be trained side by side
        table = pd.DataFrame([row], columns=MODEL_COLUMNS)
        if models_file().exists():
            older = read_models()
            table = pd.concat([older[older.fold != fold], table])
        write_table(table.sort_values('fold'), models_file())


def relative(file: Path, root: Path | None = None) -> str:
    """The path relative to `root` (default: the project root) if inside it, else the full path."""
    root = root or config.path('.')
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def is_file(name: str | None) -> bool:
    """Whether a path of config.py, which may be None, is an existing file."""
    return name is not None and config.path(name).is_file()


def is_table(constant: str, default: str) -> bool:
    """Whether TRAIN_CSV or TEST_CSV is a file. Only the default one may be missing."""
    name = getattr(config, constant)
    if not is_file(name) and name not in (None, f'{config.INPUT}/{default}'):
        raise config.UserMistake(f'{constant}={name}: no such file: correct it, or set None')
    return is_file(name)


def first_few(names: list, count: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(map(str, names[:count])) + more


# ------------------------------------------------------------ images by their names
@cache
def walk(folder: Path) -> list[str]:
    """Relative paths of the files in a folder and its subfolders, sorted; listed once per process.

    Hidden files and the project's other folders are skipped.
    """
    others = (config.path(getattr(config, name)) for name in (*NAMING, 'OUTPUT', 'LOGS_PATH'))
    seen = {os.path.realpath(other) for other in others} - {os.path.realpath(folder)}
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:  # also where a link leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        names = [name for name in names if not name.startswith(HIDDEN)]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in names]
    return sorted(found)


def fit(file: str, constant: str) -> tuple[str | None, int]:
    """The image name in a path inside a folder, and the length of its prefix and suffix.

    (None, 0) if the folder's prefix and suffix do not fit. The suffix may be in upper or lower case.
    Names are Unicode NFC; macOS uses another form.
    """
    prefix, suffixes = (getattr(config, name) if name else '' for name in NAMING[constant])
    folder, slash, base = unicodedata.normalize('NFC', file).rpartition('/')
    for suffix in sorted(config.endings(suffixes), key=len, reverse=True):
        stem = base[: len(base) - len(suffix)]
        fits = base.lower().endswith(suffix.lower()) and stem.startswith(prefix)
        if fits and (stem != prefix or folder):  # x/image.png may be the image x
            name = (folder + slash + stem.removeprefix(prefix)).rstrip('/')
            return name, len(prefix) + len(suffix)
    return None, 0


def list_files(constant: str, required: bool = True) -> dict[str, Path]:
    """Image name -> file, sorted: the images in TRAIN_PATH or TEST_PATH, or the masks in MASK_PATH.

    If a file could be an image or a mask, the longer prefix and suffix decide: x_mask.png is the
    mask of x.png. If masks have their own folder, this applies only if x.png is there too.

    Raises config.UserMistake for a name that is not unique, plain or clear, and if `required` for no
    file.
    """
    folder = config.path(getattr(config, constant))
    other = 'TRAIN_PATH' if constant == 'MASK_PATH' else 'MASK_PATH'
    other_folder = config.path(getattr(config, other))
    shared = constant != 'TEST_PATH' and os.path.realpath(folder) == os.path.realpath(other_folder)
    fits = {file: fit(file, constant) for file in walk(folder)}
    names, found = {name for name, _ in fits.values()}, {}
    for file, (name, length) in fits.items():
        other_name, other_length = fit(file, other)
        if name is None or (other_length > length and (shared or other_name in names)):
            continue
        shown = repr(str(folder / file))
        if shared and other_length == length:
            raise config.UserMistake(
                f'{shown} may be an image or a mask: put the images in a folder of their own, and merge '
                'the masks of an image into one file; or set another MASK_SUFFIX'
            )
        if name in found:
            raise config.UserMistake(
                f'{shown} and {found[name].name} have the same name: rename one'
            )
        if CONTROL_CHARACTERS.search(file):
            raise config.UserMistake(f'{shown} has control characters or is not UTF-8: rename it')
        found[name] = folder / file
    if required and not found:
        raise nothing_found(constant)
    return dict(sorted(found.items()))


def nothing_found(constant: str) -> config.UserMistake:
    """The mistake to raise if a folder is missing, or has no file of the expected name."""
    folder, suffix = config.path(getattr(config, constant)), NAMING[constant][1]
    if not folder.is_dir():
        return config.UserMistake(f'{folder}: no such folder: set {constant} or INPUT')
    there, expected = count_endings(walk(folder)), f'{suffix}={getattr(config, suffix)!r}'
    return config.UserMistake(f'{folder}: no image file of {expected}, found {there}: set {suffix}')


def count_endings(names) -> str:
    """How many files have each ending: '.jpg 3, .png 6'."""
    counts = Counter(Path(name).suffix.lower() or 'without ending' for name in names)
    return first_few([f'{ending} {n}' for ending, n in sorted(counts.items())]) or 'nothing'


def print_unused(constant: str, used, what: str) -> None:
    """Print one line that counts the files in a folder of config.py that are not in `used`."""
    folder, suffix = config.path(getattr(config, constant)), NAMING[constant][1]
    unused = [file for file in walk(folder) if folder / file not in used]
    if unused:
        endings = f'({count_endings(unused)}; {suffix} is {getattr(config, suffix)!r})'
        print(f'{len(unused)} files in {constant} are not {what} {endings}')


# ------------------------------------------------------------ training images and their masks
class Runs(NamedTuple):
    """Run lengths from TRAIN_CSV that replace a mask file; '' means that there is no object."""

    image: Path
    text: str
    order: str  # RLE_ORDER


def name_in_table(cell: str, constant: str) -> str:
    """The image name in a table's cell, which holds a file name or already the image name."""
    cell = unicodedata.normalize('NFC', cell.strip().replace('\\', '/'))
    return fit(cell, constant)[0] or cell


def train_table() -> pd.DataFrame:
    """TRAIN_CSV, with image names in its column img."""
    table = read_table(config.path(config.TRAIN_CSV), ['img'], TABLE_HELP)
    return table.assign(img=[name_in_table(cell, 'TRAIN_PATH') for cell in table.img])


def pairs_of(names) -> list[tuple[Path, Path | Runs]]:
    """The image file and the mask (see images.read_mask) of each training image."""
    image_files, mask_files = list_files('TRAIN_PATH'), list_files('MASK_PATH', required=False)
    missing = [name for name in names if name not in image_files]
    if missing:
        problem = f'{len(missing)} images are not in TRAIN_PATH: {first_few(missing)}'
        raise config.UserMistake(
            f'{problem}: correct TRAIN_CSV (relative to TRAIN_PATH), run folds.py'
        )
    missing = [name for name in names if name not in mask_files]
    texts = {}  # run lengths; '' = no object
    if missing and config.EMPTY_IF_NO_MASK:
        refuse_numbered_masks(image_files)
        texts = dict.fromkeys(missing, '')
    if missing and is_file(config.TRAIN_CSV):
        table = train_table()
        texts |= dict(zip(table.img, table.get('rle_mask', [])))
    for name in missing:
        if name in texts:
            mask_files[name] = Runs(image_files[name], texts[name], config.RLE_ORDER)
    missing = [name for name in missing if name not in mask_files]
    if missing and not mask_files:
        raise nothing_found('MASK_PATH')
    if missing:
        problem = f'{len(missing)} images have no mask in MASK_PATH: {first_few(missing)}'
        if len(missing) == len(names):
            problem += f'; a mask has the name {next(iter(mask_files))}'
            raise config.UserMistake(f'{problem}: set prefixes and suffixes that give equal names')
        raise config.UserMistake(
            f'{problem}: list the images that have masks in a TRAIN_CSV; or set EMPTY_IF_NO_MASK=True '
            'if those without really hold no object'
        )
    return [(image_files[name], mask_files[name]) for name in names]


def refuse_numbered_masks(image_files: dict) -> None:
    """Raise config.UserMistake if EMPTY_IF_NO_MASK would hide x_mask_1.png, a mask of x.png."""
    for file in walk(config.path(config.MASK_PATH)):
        without_number = re.sub(r'[-_ ]?\(?\d+\)?(?=\.\w+$)', '', file)
        name = fit(without_number, 'MASK_PATH')[0]
        if name in image_files and fit(file, 'MASK_PATH')[0] not in image_files:
            raise config.UserMistake(f'{file}: {name} has more than one mask: merge them into one')


def read_folds(folds: list[int] | None = None) -> pd.DataFrame:
    """The table img,kfold,group of TRAIN_FOLDS, or its rows of some folds, none of them empty."""
    file = config.path(config.TRAIN_FOLDS)
    table = read_table(file, ['img', 'kfold', 'group'], 'run folds.py')
    split = table.groupby('group').kfold.nunique() > 1
    if split.any():
        raise config.UserMistake(f'{file}: group {split.idxmax()} is in 2 folds: run folds.py')
    table['kfold'] = table.kfold.astype(int)
    empty = sorted(set(folds or []) - set(table.kfold))
    if empty:
        raise config.UserMistake(f'{file}: no image in fold {first_few(empty)}: run folds.py again')
    return table if folds is None else table[table.kfold.isin(folds)].reset_index(drop=True)
