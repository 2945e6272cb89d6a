"""Files that are written whole or not at all; locks; tables; models.csv."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

import config

MODELS = ['fold', 'version', 'checkpoint', 'val_dice', 'val_iou']  # columns of models.csv


@contextmanager
def atomic_write(file: Path):
    """Yield a path beside `file` to write to. It is renamed to `file` if the block succeeds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f'{file.name}.tmp')  # a fixed name: a killed run's is overwritten
    try:
        yield temporary
        temporary.replace(file)
    except OSError as error:
        error.filename = error.filename or str(file)  # write() on a full disk does not name it
        raise
    finally:
        temporary.unlink(missing_ok=True)


def file_lock(file: Path, busy: str = ''):
    """Hold a lock file in a with statement, as one process of all that share the disk.

    Args:
        busy: the config.UserMistake if another process holds it. Without one, wait.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(file).acquire(timeout=0 if busy else -1)
    except Timeout:
        raise config.UserMistake(busy) from None


def check_writable(folder: Path) -> None:
    """Raise OSError now, rather than after hours, if nothing can be written into a folder."""
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
    """Put a run's checkpoint into models.csv, in place of the fold's older one. Return its epoch."""
    best = max(history, key=lambda epoch: epoch['val_dice'])  # the first of equals, as Lightning
    row = [fold, folder.name, relative(checkpoint), best['val_dice'], best['val_iou']]
    with file_lock(models_file().with_name('.models.lock')):  # folds may be trained side by side
        table = pd.DataFrame([row], columns=MODELS)
        if models_file().exists():
            older = read_models()
            table = pd.concat([older[older.fold != fold], table])
        write_table(table.sort_values('fold'), models_file())
    return best


def relative(file: Path) -> str:
    """A path from the project root, if it is inside."""
    root = config.path('.')
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def is_file(name: str | None) -> bool:
    """Whether a path of config.py, which may be None, is an existing file."""
    return name is not None and config.path(name).is_file()


def first_few(names: list, count: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(map(str, names[:count])) + more
