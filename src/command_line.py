"""NAME=value words, --help and the checks of config.py; standard library alone, so it is instant."""

import argparse
import ast
import errno
import re
import sys
from pathlib import Path

import config
from augmentation import AUGMENTATIONS

# What each constant may be: (test, description).
POSITIVE = (lambda v: is_int(v) and v > 0), 'a whole number from 1 up'
COUNT = (lambda v: is_int(v) and v >= 0), 'a whole number from 0 up'
FLAG = (lambda v: isinstance(v, bool)), 'True or False'
TEXT = (lambda v: isinstance(v, str) and v), 'text'
TEXT_OR_NONE = (lambda v: v is None or (isinstance(v, str) and v)), 'text or None'
COLOURS = (
    lambda v: isinstance(v, (list, tuple)) and len(v) == config.CHANNELS and all(map(is_number, v)),
    'one number per channel (CHANNELS)',
)
# What a disk answers that is full, read-only or not ours.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK = FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
# A constant that a user has added; checkpoints, which run no code, can hold nothing else.
PLAIN = (
    (lambda v: is_plain(v)),
    'text, a number, True, False, None, or lists or dictionaries of them',
)
FOLDERS = ('INPUT', 'OUTPUT', 'LOGS_PATH', 'TRAIN_PATH', 'MASK_PATH', 'TEST_PATH')
FILES = ('TRAIN_FOLDS', 'IMAGE_SUFFIX', 'MASK_SUFFIX')
LEGAL = {
    **dict.fromkeys((*FOLDERS, *FILES, 'MODEL_NAME', 'LOSS', 'ACCELERATOR', 'STRATEGY'), TEXT),
    **dict.fromkeys(('EPOCHS', 'TRAIN_BATCH_SIZE', 'VAL_BATCH_SIZE', 'NUM_NODES'), POSITIVE),
    **dict.fromkeys(('CACHE', 'RESUME', 'COMPILE', 'TTA', 'SAVE_MASKS'), FLAG),
    'ACCUMULATE_GRAD_BATCHES': POSITIVE,
    'CROP_SIZE': (
        lambda v: all(is_int(x) and x > 0 for x in config.pair(v)) and len(config.pair(v)) == 2,
        'a side in pixels, or (height, width)',
    ),
    'CHANNELS': (lambda v: is_int(v) and v in (1, 3), '1 or 3'),
    'CLASSES': (lambda v: is_int(v) and 1 <= v <= 255, 'a whole number from 1 to 255'),
    'INPUT_SHAPE': (
        lambda v: list(v) == [config.CHANNELS, *config.pair(config.CROP_SIZE)],
        '(CHANNELS, height, width): set CROP_SIZE instead',
    ),
    'MODEL_MEAN': COLOURS,
    'MODEL_STD': (lambda v: COLOURS[0](v) and min(v) > 0, COLOURS[1] + ', each above 0'),
    'IGNORE_INDEX': (
        lambda v: v is None or (is_int(v) and (0 if config.CLASSES > 2 else 2) <= v <= 255),
        'None or a mask value from 0 to 255; from 2 where CLASSES is 1 or 2, as 0 and 1 are the classes',
    ),
    'N_FOLDS': (lambda v: is_int(v) and v >= 2, 'a whole number from 2 up'),
    'GROUP_REGEX': (
        lambda v: v is None or (isinstance(v, str) and has_group(v)),
        'None or a regular expression with one (group)',
    ),
    'FOLDS': (
        lambda v: (
            isinstance(v, (list, tuple))
            and 0 < len(v) == len(set(v))
            and all(is_int(x) and 0 <= x < config.N_FOLDS for x in v)
        ),
        'a list of different folds from 0 to N_FOLDS - 1',
    ),
    **dict.fromkeys(('ENCODER_WEIGHTS', 'PATH', 'TRAIN_CSV', 'TEST_CSV'), TEXT_OR_NONE),
    'LOSS_ARGS': (
        lambda v: isinstance(v, dict),
        """a dictionary, such as "{'smooth': 1.0}" (in a shell with both quotes)""",
    ),
    'LR': (lambda v: is_number(v) and v > 0, 'a number above 0'),
    'PRECISION': (lambda v: not isinstance(v, bool) and v in (16, 32, 'bf16'), "16, 'bf16' or 32"),
    'AUGMENTATION': (
        lambda v: v in AUGMENTATIONS,
        f'one of {", ".join(map(repr, AUGMENTATIONS))}',
    ),
    'SEED': (lambda v: is_int(v) and 0 <= v < 2**32, 'a whole number from 0 to 2**32 - 1'),
    'NUM_WORKERS': COUNT,
    'DEVICES': (
        lambda v: v == 'auto' or (is_int(v) and (v > 0 or v == -1)),
        "a number of devices per machine, -1 or 'auto'",
    ),
    'THRESHOLD': (
        lambda v: v is None or (is_number(v) and 0 < v < 1),
        'None or a probability between 0 and 1',
    ),
}


def is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    return is_int(value) or isinstance(value, float)


def is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(is_plain(x) for x in (*value, *value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def positive(text: str) -> int:
    """An option's whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be {POSITIVE[1]}')
    return int(text)


def has_group(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups >= 1
    except re.error:
        return False


DEFAULTS = config.constants()


def override(words: list[str]) -> None:
    """Set constants in `config` from NAME=value words; derived constants are worked out again.

    Raises config.UserMistake for an unknown name or a value of the wrong kind.
    """
    given = {}
    for word in words:
        name, equals, text = word.partition('=')
        if not equals:
            raise config.UserMistake(f"'{word}' is not a NAME=value word, such as EPOCHS=1")
        if name not in DEFAULTS:
            meant = config.nearest(name, DEFAULTS) or f'legal names: {", ".join(DEFAULTS)}'
            raise config.UserMistake(f"'{name}' is not a constant in config.py: {meant.strip()}")
        try:
            given[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[name] = text
        if LEGAL.get(name) is TEXT and not isinstance(given[name], str):
            given[name] = text  # INPUT=2018 is a folder
    if not given:
        return
    # The form is run again from its top with the given values in place of the written ones.
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    for statement in ast.parse(Path(config.__file__).read_text(encoding='utf-8')).body:
        if not isinstance(statement, definitions):
            exec(compile(ast.Module([statement], []), config.__file__, 'exec'), vars(config))
            vars(config).update(given)


def check() -> None:
    """Check every constant by itself; raises config.UserMistake naming it and its legal values."""
    for name, value in config.constants().items():
        test, description = LEGAL.get(name, PLAIN)
        try:
            fits = test(value)
        except TypeError:
            fits = False
        if not fits:
            raise config.UserMistake(f'{name}={value!r}: must be {description}')


def start(doc: str, options: dict[str, dict] | None = None, words=()) -> argparse.Namespace:
    """First line of a script: NAME=value words and --help, before the imports that take seconds.

    Args:
        options: a script's own options: name -> the arguments of argparse's add_argument.
        words: NAME=value words that hold where the user's say nothing else.

    Returns: their values, and in `words` the NAME=value words.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f'{message}; --help tells what there is')
    for name, arguments in (options or {}).items():
        parser.add_argument(name, **arguments)
    parser.add_argument('words', nargs='*')
    override(words)
    sys.excepthook = told_interrupt
    if {'-h', '--help'} & set(sys.argv[1:]):
        names = [name for name in DEFAULTS if re.search(rf'\b{name}\b', doc)]
        lines = [f'  {name} = {getattr(config, name)!r}' for name in names]
        print(f'{doc.strip()}\n\nConstants (config.py), to be given as NAME=value for one run:')
        print('\n'.join(lines))
        sys.exit()
    values = parser.parse_intermixed_args()
    try:
        override([*words, *values.words])
        check()
    except config.UserMistake as mistake:
        sys.exit(str(mistake))
    if sys.stderr.isatty():  # it takes torch some seconds
        print('importing ...', end='\r', file=sys.stderr, flush=True)
    return values


def told_interrupt(kind, error, trace) -> None:
    """In place of sys.excepthook: Ctrl-C is no bug, wherever it comes."""
    if kind is KeyboardInterrupt:
        print('stopped', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def run(main) -> None:
    """Run a script's main(): a user's mistake ends with its message and status 1, a bug as it is."""
    try:
        main()
    except config.UserMistake as mistake:
        # An error from a DataLoader's worker arrives with the worker's traceback before it.
        sys.exit(str(mistake).rsplit('UserMistake: ', 1)[-1].strip())
    except OSError as error:
        if error.errno not in DISK:
            raise
        file = error.filename or f'{config.OUTPUT} or {config.LOGS_PATH}'
        sys.exit(
            f'{file}: {error.strerror}: {"make room, or " * (error.errno in FULL)}set OUTPUT and '
            'LOGS_PATH to folders on another disk, that you may write'
        )
