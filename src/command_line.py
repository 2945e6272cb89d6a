"""NAME=value arguments, --help, the checks of config.py, and how a script ends."""

import argparse
import ast
import errno
import json
import re
import sys
import typing
from pathlib import Path

import config

# Annotation in config.py -> description, and the types of its values.
KINDS = {
    int: ('a whole number from 1 up', {int}),
    float: ('a number above 0', {int, float}),
    bool: ('True or False', {bool}),
    str: ('text', {str}),
    dict: ("""a dictionary, such as "{'smooth': 1.0}" (in a shell, with all quotes)""", {dict}),
    list: ('a list', {list, tuple}),
    tuple: ('a list', {list, tuple}),
    type(None): ('None', {type(None)}),
}
# Name -> legal values and a test, where a constant's annotation does not say enough.
RULES = {
    'CROP_SIZE': ('a side in pixels, or (height, width)',
                  lambda v: [type(x) is int and x > 0 for x in config.pair(v)] == [True, True]),
    'CHANNELS': ('1 or 3', lambda v: v in (1, 3)),
    'CLASSES': ('a whole number from 1 to 255', lambda v: 1 <= v <= 255),
    'INPUT_SHAPE': ('(CHANNELS, height, width): set CROP_SIZE instead',
                    lambda v: list(v) == [config.CHANNELS, *config.crop_size()]),
    'MODEL_MEAN': ('one number per channel (CHANNELS)',
                   lambda v: [type(x) in NUMBERS for x in v] == [True] * config.CHANNELS),
    'MODEL_STD': ('one number above 0 per channel',
                  lambda v: [type(x) in NUMBERS and x > 0 for x in v] == [True] * config.CHANNELS),
    'IGNORE_INDEX': ('None or a whole number, but not 0 or 1 if CLASSES is 1 or 2',
                     lambda v: config.CLASSES > 2 or v not in (0, 1)),
    'MASK_COLOURS': ('None or [(r, g, b), ...] from 0 to 255: one per class, or two if CLASSES=1',
                     lambda v: v is None or len(v) == len({*map(tuple, v)}) == max(2, config.CLASSES)
                     == sum(len(c) == 3 and set(c) <= set(range(256)) for c in v)),
    'IMAGE_PREFIX': ('text', lambda v: True),
    'MASK_PREFIX': ('text', lambda v: True),
    'RLE_ORDER': ("'rows' or 'columns'", lambda v: v in ('rows', 'columns')),
    'N_FOLDS': ('a whole number from 2 up', lambda v: v >= 2),
    'GROUP_REGEX': ('None or a regular expression with one (group)',
                    lambda v: v is None or re.compile(v).groups >= 1),
    **dict.fromkeys(
        ('IMAGE_SUFFIX', 'MASK_SUFFIX', 'TEST_SUFFIX'),
        ("a suffix such as '.png' or '_mask.png', or a list of suffixes",
         lambda v: v and all(type(x) is str and '.' in x for x in config.endings(v)))),
    'FOLDS': ('a list of different folds from 0 to N_FOLDS - 1, such as [0]',
              lambda v: 0 < len(v) == len(set(v)) and set(v) <= set(range(config.N_FOLDS))),
    'PRECISION': ("16, 'bf16' or 32", lambda v: v in (16, 32, 'bf16')),
    'SCHEDULE': ("None, 'cosine' or 'poly'", lambda v: v in (None, 'cosine', 'poly')),
    'SEED': ('a whole number from 0 to 2**32 - 1', lambda v: 0 <= v < 2**32),
    'NUM_WORKERS': ('a whole number from 0 up', lambda v: v >= 0),
    'DEVICES': ("a number of devices per machine, -1 or 'auto'", lambda v: v in ('auto', -1) or v > 0),
    'THRESHOLD': ('None or a probability between 0 and 1', lambda v: v is None or 0 < v < 1),
}  # fmt: skip
NUMBERS = (int, float)
NAMES = list(config.constants())
ANNOTATIONS = dict(config.__annotations__)  # read once: override() runs config.py again
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK = FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


def kinds(name: str) -> tuple[str, set]:
    """Description and types of the values that a constant's annotation allows; without one, all."""
    annotation = ANNOTATIONS.get(name)
    allowed = typing.get_args(annotation) or ([annotation] if annotation else KINDS)
    described, types = zip(*(KINDS[kind] for kind in allowed))
    return ' or '.join(described), set().union(*types)


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
        if type(value) is str and value[:1] in ('[', '{') and {list, dict} & kinds(name)[1]:
            raise config.UserMistake(
                f'{argument}: not a Python literal. The shell may have removed its quotes: put the '
                f"""argument in double quotes, such as "IMAGE_SUFFIX=['.jpg', '.png']" """
            )
        given[name] = value if type(value) in kinds(name)[1] else text  # INPUT=2018 is text
    # A statement may use the constants above it, so the given values are set after each one.
    for statement in ast.parse(Path(config.__file__).read_text(encoding='utf-8')).body:
        if not isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
            exec(compile(ast.Module([statement], []), config.__file__, 'exec'), vars(config))
            vars(config).update(given)


def check() -> None:
    """Raise config.UserMistake if a constant has a wrong value. It names the valid values."""
    for name, value in config.constants().items():
        described, types = kinds(name)
        default = described, lambda v: v > 0 if type(v) in NUMBERS else v != ''
        legal, test = RULES.get(name, default)
        try:
            json.dumps(value)  # checkpoints can save only plain types
            right = type(value) in types and test(value)
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


def explain_disk_error(error: OSError) -> str:
    """A message about a file that cannot be written. It names the constant of the folder."""
    file = Path(error.filename or '')
    folders = {n: config.path(getattr(config, n)) for n in ('OUTPUT', 'LOGS_PATH', 'INPUT')}
    name = next((n for n, folder in folders.items() if file.is_relative_to(folder)), 'OUTPUT')
    room = 'make room on the disk, or ' * (error.errno in FULL)
    return f'{file}: {error.strerror}: {room}set {name} to a folder that you can write to'


def run(main, doc: str, options: dict[str, dict] | None = None, defaults: list[str] = ()) -> None:
    """Run a script. On a UserMistake it prints one line (exit status 1), on a bug the traceback.

    Args:
        main: called with the values of the script's options, or without arguments if it has none.
        doc: the script's docstring. --help prints it, and the constants that it names.
        options: name -> keywords of argparse's add_argument.
        defaults: NAME=value arguments; those of the user override them.
    """

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
        if not options:
            # Lightning starts more processes with this command line. It gives them all constants as
            # they are now, even if config.py is edited in the meantime.
            sys.argv[1:] = as_arguments()
        main(*[values] if options else [])
    except config.UserMistake as mistake:
        # PyTorch puts the traceback of a DataLoader worker before the message.
        sys.exit(str(mistake).rsplit('UserMistake: ', 1)[-1].strip())
    except KeyboardInterrupt:
        sys.exit('stopped')
    except OSError as error:
        if error.errno not in DISK:
            raise
        sys.exit(explain_disk_error(error))
