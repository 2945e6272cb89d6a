"""NAME=value arguments, --help, the checks of config.py, and how a script ends."""

import argparse
import ast
import errno
import json
import os
import re
import signal
import sys
import typing
from contextlib import contextmanager
from pathlib import Path

import config

# Type in an annotation of config.py -> description of its values.
KINDS = {
    int: 'a whole number from 1 up',
    float: 'a number above 0',
    bool: 'True or False',
    str: 'text',
    dict: """a dictionary, such as "{'smooth': 1.0}" (in a shell, with all quotes)""",
    list: 'a list',
    type(None): 'None',
}
NAMES = list(config.constants())
# Constant -> the types that its annotation allows, tuples as lists.
TYPES = {
    name: [list if kind is tuple else kind for kind in typing.get_args(annotation) or [annotation]]
    for name, annotation in config.__annotations__.items()
}


# ------------------------------------------------------------ legal values
def is_positive(value) -> bool:
    """The rule where no other is given: numbers are above 0, text is not empty."""
    return value > 0 if type(value) in (int, float) else value != ''


def is_size(value) -> bool:
    sides = config.pair(value)
    return len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)


def has_channels(values) -> bool:
    return len(values) == config.CHANNELS and all(type(v) in (int, float) for v in values)


def are_colours(values) -> bool:
    different = set(map(tuple, values))
    bytes_of_rgb = all(len(v) == 3 and set(v) <= set(range(256)) for v in values)
    return bytes_of_rgb and len(values) == len(different) == max(2, config.CLASSES)


def are_texts(value, part: str = '') -> bool:
    """Whether a value is a text, or a list of texts, that are not empty and contain a part."""
    texts = config.endings(value)
    return len(texts) > 0 and all(type(text) is str and text and part in text for text in texts)


SUFFIX = ("a suffix such as '.png', or a list of suffixes", lambda v: are_texts(v, '.'))
# Name -> legal values and a test, where a constant's annotation does not say enough.
# None is legal if the annotation allows it. The test does not see it.
RULES = {
    'IMAGE_PREFIX': ('text', lambda v: True),
    'MASK_PREFIX': ('text', lambda v: True),
    'RLE_ORDER': ("'rows' or 'columns'", lambda v: v in ('rows', 'columns')),
    'IMAGE_SUFFIX': SUFFIX,
    'MASK_SUFFIX': SUFFIX,
    'TEST_SUFFIX': SUFFIX,
    'CROP_SIZE': ('a side in pixels, or (height, width)', is_size),
    'CHANNELS': ('1 or 3', lambda v: v in (1, 3)),
    'CLASSES': ('a whole number from 1 to 255', lambda v: 1 <= v <= 255),
    'INPUT_SHAPE': (
        '(CHANNELS, height, width): set CROP_SIZE instead',
        lambda v: v == [config.CHANNELS, *config.crop_size()],
    ),
    'MODEL_MEAN': ('one number per channel (CHANNELS)', has_channels),
    'MODEL_STD': ('one number above 0 per channel', lambda v: has_channels(v) and min(v) > 0),
    'IGNORE_INDEX': (
        'None or a whole number, but not 0 or 1 if CLASSES is 1 or 2',
        lambda v: config.CLASSES > 2 or v not in (0, 1),
    ),
    'MASK_COLOURS': (
        'None or [(r, g, b), ...] from 0 to 255: as many as CLASSES, or two if CLASSES=1',
        are_colours,
    ),
    'N_FOLDS': ('a whole number from 2 up', lambda v: v >= 2),
    'GROUP_REGEX': ('None or a regex with one (group)', lambda v: re.compile(v).groups >= 1),
    'FOLDS': (
        'a list of different folds from 0 to N_FOLDS - 1, such as [0]',
        lambda v: 0 < len(v) == len(set(v)) and set(v) <= set(range(config.N_FOLDS)),
    ),
    'PRECISION': ("16, 'bf16' or 32", lambda v: v in (16, 'bf16', 32)),
    'SCHEDULE': ("None, 'cosine' or 'poly'", lambda v: v in ('cosine', 'poly')),
    'SEED': ('a whole number from 0 to 2**32 - 1', lambda v: 0 <= v < 2**32),
    'NUM_WORKERS': ('a whole number from 0 up', lambda v: v >= 0),
    'DEVICES': ("devices per machine, -1 or 'auto'", lambda v: v in ('auto', -1) or v > 0),
    # A forked or spawned process does not run the script, so it would not know the arguments.
    'STRATEGY': (
        "'auto', 'ddp' or another one that starts the script again, not fork, spawn or notebook",
        lambda v: not re.search('fork|spawn|notebook', v),
    ),
    'PATH': ('None, a checkpoint or a list of checkpoints', are_texts),
    'THRESHOLD': ('None or a probability between 0 and 1', lambda v: 0 < v < 1),
}
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
DISK |= {errno.ENOTDIR, errno.EEXIST}


def has_legal_type(name: str, value) -> bool:
    allowed, kind = TYPES.get(name, KINDS), type(config.plain(value))
    return kind in allowed or (kind is int and float in allowed)


def override(arguments: list[str]) -> None:
    """Read config.py again, with the values of NAME=value arguments in place of its own."""
    given = {}
    for argument in arguments:
        name, equals, text = argument.partition('=')
        if not equals:
            raise config.UserMistake(f"'{argument}': write NAME=value, such as EPOCHS=1")
        if name not in NAMES:
            meant = config.did_you_mean(name, NAMES).strip() or f'valid: {", ".join(NAMES)}'
            raise config.UserMistake(f"'{name}' is not a constant in config.py: {meant}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError):
            value = text
        if value == text and text[:1] in ('[', '{') and {list, dict} & set(TYPES[name]):
            remedy = 'put the argument in double quotes and each text in it in single quotes'
            raise config.UserMistake(f'{argument}: not a Python literal: {remedy}')
        given[name] = value if has_legal_type(name, value) else text  # INPUT=2018 is text
    # A statement may use the constants above it, so the given values are set after each one.
    for statement in ast.parse(Path(config.__file__).read_text(encoding='utf-8')).body:
        if not isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
            exec(compile(ast.Module([statement], []), config.__file__, 'exec'), vars(config))
            vars(config).update(given)


def check() -> None:
    """Raise config.UserMistake if a constant has a wrong value. It names the valid values."""
    for name, value in config.constants().items():
        described = ' or '.join(KINDS[kind] for kind in TYPES.get(name, KINDS))
        legal, test = RULES.get(name, (described, is_positive))
        try:
            json.dumps(value)  # checkpoints can save only plain types
            right = has_legal_type(name, value) and (value is None or test(value))
        except (TypeError, re.error):
            right = False
        if not right:
            raise config.UserMistake(f'{name}={value!r}: must be {legal}')


def as_arguments(**changes) -> list[str]:
    """All constants, with some changes, as NAME=value arguments."""
    return [f'{name}={value!r}' for name, value in (config.constants() | changes).items()]


def positive_int(text: str) -> int:
    """The argparse type of a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError('must be a whole number from 1 up')
    return int(text)


# ------------------------------------------------------------ a script
def ignore_workers() -> None:
    """Replace torch's handler of SIGCHLD, which raises for a worker that ends by a signal."""
    if hasattr(signal, 'SIGCHLD'):  # not on Windows
        signal.signal(signal.SIGCHLD, lambda *_: None)  # SIG_DFL: an error for one that has come


@contextmanager
def exit_on_sigterm():
    """Raise SystemExit(143) on SIGTERM, which docker stop, scancel and timeout send, as Ctrl-C raises
    KeyboardInterrupt. Lightning's own handler only sets a flag that prediction never reads."""
    stopped = False

    def stop(*_) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may come again, from a parent process
        ignore_workers()
        # Python drops what is raised in a destructor, such as the one that waits for the workers.
        sys.unraisablehook = end_at_once
        sys.exit(143)

    def end_at_once(_) -> None:
        sys.stdout.flush()
        os._exit(143)

    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        if stopped:  # workers that were stopped as well raise errors of their own
            ignore_workers()  # again: a loader that was just starting has set the handler since
            sys.exit(143)
        raise
    finally:
        if not stopped:
            signal.signal(signal.SIGTERM, earlier)


def run(main, doc: str, options: dict[str, dict] | None = None, defaults: list[str] = ()) -> None:
    """Run a script. On a UserMistake it prints one line (exit status 1), on a bug the traceback.

    Args:
        main: called with the values of the script's options, or without arguments if it has none.
        doc: the script's docstring. --help prints it, and the constants that it names.
        options: name -> keywords of argparse's add_argument.
        defaults: NAME=value arguments; those of the user override them.
    """
    if hasattr(sys.stdout, 'reconfigure'):  # not in a notebook
        # Print file names that the terminal's encoding lacks as \u65e5, as standard error does.
        sys.stdout.reconfigure(errors='backslashreplace')

    def refuse(message: str):
        raise config.UserMistake(f'{message}; see --help')

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument('arguments', nargs='*')
    for name, keywords in (options or {}).items():
        parser.add_argument(name, **keywords)
    try:
        if {'-h', '--help'} & set(sys.argv[1:]):
            override(defaults)
            used = [f'  {n} = {getattr(config, n)!r}' for n in NAMES if re.search(rf'\b{n}\b', doc)]
            print(doc.strip(), '\nConstants (set one with NAME=value):', *used, sep='\n')
            return
        values = parser.parse_intermixed_args()
        override([*defaults, *values.arguments])
        check()
        with exit_on_sigterm():
            if options:
                main(values)
                return
            # Lightning starts more processes with this command line. They get all constants as they
            # are now, even if config.py is edited in the meantime.
            sys.argv[1:] = as_arguments()
            main()
    except config.UserMistake as mistake:
        # PyTorch puts the traceback of a DataLoader worker before the message.
        sys.exit(str(mistake).rsplit('UserMistake: ', 1)[-1].strip())
    except KeyboardInterrupt:
        sys.exit('stopped')
    except OSError as error:
        if error.errno not in DISK:
            raise
        sys.exit(f'{error}: make room, or set OUTPUT or LOGS_PATH')
