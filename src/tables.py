"""Files that are there whole or not at all; models.csv; how files and names are shown."""

import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd
from filelock import FileLock

import config

MODELS = ['fold', 'version', 'checkpoint', 'val_dice', 'val_iou']  # columns of models.csv


@contextmanager
def writing(what, remedy: str = ''):
    """Turn an OSError into a config.UserMistake that says what cannot be written, and the remedy."""
    try:
        yield
    except OSError as error:
        raise config.UserMistake(f'{what}: cannot be written ({error.strerror}){remedy}') from None


@contextmanager
def whole(file: Path):
    """A path beside `file` to write to: renamed to `file` after the block, removed if that failed."""
    temporary = file.with_name(f'{file.name}.tmp')  # one name: what a kill leaves is written over
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(file: Path, seconds: float = -1):
    """Hold a lock file, which is gone afterwards; raises filelock.Timeout after so many seconds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file).acquire(seconds):
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes it by itself, after this
                file.unlink()


@contextmanager
def whole_text(file: Path):
    """Open a text file that appears whole or not at all."""
    utf_8 = {'encoding': 'utf-8', 'newline': ''}
    with writing(file), whole(file) as temporary, temporary.open('w', **utf_8) as text:
        yield text


def check_writable(constant: str) -> None:
    """Raise config.UserMistake where nothing can be written into a folder of config.py."""
    folder = config.path(getattr(config, constant))
    with writing(f'{constant}={folder}', ': set another folder'):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Write a CSV file whole or not at all."""
    with whole_text(file) as text:
        table.to_csv(text, index=False)


def read_table(file: Path, columns: list[str], remedy: str) -> pd.DataFrame:
    """A CSV file with at least these columns, all cells as text.

    Raises config.UserMistake, with the remedy, where the file or a column is missing.
    """
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise config.UserMistake(f'{file}: no such file: {remedy}') from None
    except (ValueError, OSError) as error:
        raise config.UserMistake(f'{file}: not a readable table ({error}): {remedy}') from None
    missing = [column for column in columns if column not in table]
    if missing:
        raise config.UserMistake(
            f'{file}: no column {missing[0]}, only {", ".join(table.columns)}: {remedy}'
        )
    return table


def models_file() -> Path:
    return config.path(config.OUTPUT) / 'models.csv'


def read_models() -> pd.DataFrame:
    """Table fold,version,checkpoint,val_dice,val_iou of the trained folds."""
    table = read_table(models_file(), MODELS, 'run Lightning_trainer.py')
    try:
        return table.astype({'fold': int, 'val_dice': float, 'val_iou': float})
    except ValueError as error:
        raise config.UserMistake(
            f'{models_file()}: {config.in_short(error)}: remove it and run Lightning_trainer.py '
            'RESUME=True, which enters finished folds again'
        ) from None


def enter_model(fold: int, folder: Path, checkpoint: Path, history: list[dict]) -> dict:
    """Put a run's best checkpoint in models.csv, in place of an older run's; returns its epoch."""
    best = max(history, key=lambda epoch: epoch['val_dice'])  # the first of equals, as Lightning
    values = [fold, folder.name, relative(checkpoint), best['val_dice'], best['val_iou']]
    table = pd.DataFrame([values], columns=MODELS)
    if models_file().exists():
        older = read_models()
        table = pd.concat([older[older.fold != fold], table])
    write_table(table.sort_values('fold'), models_file())
    return best


def relative(file: Path) -> str:
    """A path as users write it: from the project's root, where it is in there."""
    root = config.path('.')
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def is_file(name: str | None) -> bool:
    """Whether a file that may be None, or need not be there, is."""
    return name is not None and config.path(name).is_file()


def some(names: list[str], count: int = 5) -> str:
    """The first of the names, and how many more there are."""
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(map(str, names[:count])) + more
