"""Finding files by their names, atomic writes, locks, tables, and models.csv."""

import hashlib
import os
import re
import tempfile
import unicodedata
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

import config

# Constant of a folder -> constants of the prefix and the suffix of its files.
NAMING = {
    'TRAIN_PATH': ('IMAGE_PREFIX', 'IMAGE_SUFFIX'),
    'MASK_PATH': ('MASK_PREFIX', 'MASK_SUFFIX'),
    'TEST_PATH': (None, 'TEST_SUFFIX'),
}
ENDINGS = ('.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp', '.gif', '.webp')
MODELS = ['fold', 'version', 'checkpoint', 'val_dice', 'val_iou']  # columns of models.csv


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
    """A lock file for a with statement. Only one process on this disk can hold it.

    Args:
        busy: the message of the config.UserMistake if another process holds it; '': wait.
    """
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
    for column in columns:
        if column not in table:
            there = ', '.join(table.columns)
            raise config.UserMistake(f'{file}: no column {column}, only {there}: {remedy}')
    return table


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown. The index is the first column. Floats have 4 decimals."""
    table = table.reset_index()
    rows = [table.columns, ['---'] * len(table.columns), *table.itertuples(index=False)]
    cells = ([f'{c:.4f}' if isinstance(c, float) else str(c) for c in row] for row in rows)
    return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def models_file() -> Path:
    return config.path(config.OUTPUT) / 'models.csv'


def read_models() -> pd.DataFrame:
    """models.csv: one row per trained fold."""
    table = read_table(models_file(), MODELS, 'run Lightning_trainer.py')
    try:
        return table.astype({'fold': int, 'val_dice': float, 'val_iou': float})
    except ValueError as error:
        remedy = 'remove it and run Lightning_trainer.py RESUME=True'
        raise config.UserMistake(f'{models_file()}: {config.shorten(error)}: {remedy}') from None


def enter_model(fold: int, folder: Path, checkpoint: Path, history: list[dict]) -> dict:
    """Replace the fold's row in models.csv with this run. Return the log of its best epoch."""
    best = max(history, key=lambda epoch: epoch['val_dice'])  # the first of equals, as Lightning
    row = [fold, folder.name, relative(checkpoint), best['val_dice'], best['val_iou']]
    with file_lock(models_file().with_name('.models.lock')):  # folds may be trained side by side
        table = pd.DataFrame([row], columns=MODELS)
        if models_file().exists():
            older = read_models()
            table = pd.concat([older[older.fold != fold], table])
        write_table(table.sort_values('fold'), models_file())
    return best


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
class NothingFound(config.UserMistake):
    """A folder is missing, or holds no file of the expected name."""


def name_of(file: str, constant: str) -> str | None:
    """The image name in a path inside the folder: no prefix, no suffix. None if these do not fit.

    The suffix may be in upper or lower case. Names are Unicode NFC; macOS uses another form.
    """
    prefix, suffixes = (getattr(config, name or '', '') for name in NAMING[constant])
    folder, slash, base = unicodedata.normalize('NFC', file).rpartition('/')
    for suffix in sorted(config.endings(suffixes), key=len, reverse=True):
        stem = base[: len(base) - len(suffix)]
        fits = base.lower().endswith(suffix.lower()) and stem.startswith(prefix)
        if fits and (stem != prefix or folder):  # x/image.png may be the image x
            return (folder + slash + stem.removeprefix(prefix)).rstrip('/')
    return None


def name_in_table(cell: str, constant: str) -> str:
    """The image name in a table's cell, which holds a file name or already the image name."""
    cell = unicodedata.normalize('NFC', cell.strip().replace('\\', '/'))
    return name_of(cell, constant) or cell


def train_rows() -> list[tuple[str, str | None]]:
    """(name, run lengths or None) of the rows of TRAIN_CSV."""
    table = read_table(config.path(config.TRAIN_CSV), ['img'], 'fix or remove it')
    names = [name_in_table(cell, 'TRAIN_PATH') for cell in table.img]
    return list(zip(names, table.get('rle_mask', [None] * len(names))))


def walk(folder: Path) -> list[str]:
    """Relative paths of all files in a folder, except hidden ones and the project's folders."""
    found, seen, names = [], set(), (*NAMING, 'OUTPUT', 'LOGS_PATH')
    other = [config.path(getattr(config, name)) for name in names]
    for parent, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link led back here
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = [f for f in folders if f[0] != '.' and Path(parent, f) not in other]
        inside = Path(parent).relative_to(folder)
        found += [(inside / file).as_posix() for file in files if file[0] != '.']
    return sorted(found)


def list_files(constant: str) -> tuple[dict[str, Path], list[str]]:
    """List the images in TRAIN_PATH or TEST_PATH, or the masks in MASK_PATH, with subfolders.

    Returns: name -> file, sorted; and the other image files there, which are not masks either.

    Raises config.UserMistake if there is no file, if two files have the same name, if a name is not
    UTF-8 text in one line, or if an image has several masks.
    """
    folder, suffix = config.path(getattr(config, constant)), NAMING[constant][1]
    if not folder.is_dir():
        raise NothingFound(f'{folder}: no such folder: set {constant} or INPUT')
    relative, named = walk(folder), {}
    for file in relative:
        named.setdefault(name_of(file, constant), []).append(file)
    others = named.pop(None, [])
    if constant != 'MASK_PATH':
        shared = config.path(config.TRAIN_PATH) == config.path(config.MASK_PATH)
        for mask in [file for file in relative if is_mask(file, named, shared)]:
            named.pop(name_of(mask, constant), None)
    for name, files in named.items():
        for wrong, what in (
            (len(files) > 1, f'two files have the same name: {" and ".join(files)}'),
            (not name.isprintable(), f'the file name {files[0]!r} is not UTF-8 text in one line'),
        ):
            if wrong:
                raise config.UserMistake(f'{folder}: {what}: rename or remove one')
    further = [f for f in relative if constant != 'TEST_PATH' and further_mask_of(f) in named]
    if further:
        raise config.UserMistake(
            f'{folder}: {len(further)} images have more than one mask, such as {further[0]}: merge '
            'the masks of each image into one file'
        )
    if not named:
        endings = Counter(Path(file).suffix or 'without suffix' for file in relative).most_common(4)
        there = ', '.join(f'{count} {ending}' for ending, count in endings) or 'nothing'
        prefix = NAMING[constant][0]
        expected, given = getattr(config, suffix), getattr(config, prefix or '', '')
        remedy = f'{constant}, {prefix} or {suffix}' if given else f'{constant} or {suffix}'
        raise NothingFound(f'{folder}: no file {given}*{expected}, found {there}: set {remedy}')
    others = [f for f in others if not name_of(f, 'TRAIN_PATH') and not name_of(f, 'MASK_PATH')]
    others = [f for f in others if f.lower().endswith(ENDINGS)]
    return {name: folder / files[0] for name, files in sorted(named.items())}, others


def is_mask(file: str, names, shared: bool) -> bool:
    """Whether a file in a folder of images is a mask: x_mask.png or x_mask_1.png beside x.png. If
    images and masks share a folder, also any file named like a mask and not like an image."""
    if further_mask_of(file) in names:
        return True
    name, as_image = name_of(file, 'MASK_PATH'), name_of(file, 'TRAIN_PATH')
    return name is not None and name != as_image and (shared or name in names)


def further_mask_of(file: str) -> str | None:
    """'x' for x_mask_1.png or x_mask(2).png where masks are named x_mask.png; else None."""
    for stem in (suffix.rpartition('.')[0] for suffix in config.endings(config.MASK_SUFFIX)):
        name, found, rest = file.rpartition('.')[0].rpartition(stem or '/')
        if stem and found and re.fullmatch(r'[-_ ]?\(?\d+\)?', rest):
            return name
    return None


def tell_others(constant: str, others: list[str], fate: str) -> None:
    """Print one line about the images that list_files left out, if there are any."""
    endings = ', '.join(sorted({Path(file).suffix for file in others}))
    folder, suffix = getattr(config, constant), NAMING[constant][1]
    if others:
        print(f'{len(others)} other images in {folder} ({endings}) are {fate}: see {suffix}')
