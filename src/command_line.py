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
    dict: ("""a dictionary, such as "{'smooth': 1.0}" (in a shell with both quotes)""", {dict}),
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
    'MODEL_MEAN': ('one number per channel (CHANNELS)', lambda v: per_channel(v)),
    'MODEL_STD': ('one number above 0 per channel', lambda v: per_channel(v) and min(v) > 0),
    'IGNORE_INDEX': ('None or a mask value from 0 to 255; if CLASSES is 1 or 2, 0 and 1 are the classes',
                     lambda v: v is None or (0 if config.CLASSES > 2 else 2) <= v <= 255),
    'N_FOLDS': ('a whole number from 2 up', lambda v: v >= 2),
    'GROUP_REGEX': ('None or a regular expression with one (group)',
                    lambda v: v is None or re.compile(v).groups >= 1),
    'FOLDS': ('a list of different folds from 0 to N_FOLDS - 1',
              lambda v: 0 < len(v) == len(set(v)) and set(v) <= set(range(config.N_FOLDS))),
    'PRECISION': ("16, 'bf16' or 32", lambda v: v in (16, 32, 'bf16')),
    'SCHEDULE': ("None, 'cosine', 'onecycle', 'poly' or 'plateau'",
                 lambda v: v in (None, 'cosine', 'onecycle', 'poly', 'plateau')),
    'EMA': ('None or a decay between 0 and 1', lambda v: v is None or 0 < v < 1),
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


def per_channel(values) -> bool:
    return len(values) == config.CHANNELS and all(type(v) in NUMBERS for v in values)


def kinds(name: str) -> tuple:
    """The types in a constant's annotation; none for a constant that a user has added."""
    kind = ANNOTATIONS.get(name)
    return typing.get_args(kind) or (kind,) * (kind is not None)


def parse_value(name: str, text: str):
    """The Python literal that `text` is, else the text. INPUT=2018 is text, because INPUT is."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    is_text = str in kinds(name) and int not in kinds(name)
    return text if is_text and not isinstance(value, (str, type(None))) else value


def override(arguments: list[str]) -> None:
    """Read config.py again, with the values of NAME=value arguments in place of its own."""
    given = {}
    for argument in arguments:
        name, equals, text = argument.partition('=')
        if not equals:
            raise config.UserMistake(f"'{argument}' is not a NAME=value argument, such as EPOCHS=1")
        if name not in NAMES:
            legal = config.did_you_mean(name, NAMES) or f'legal names: {", ".join(NAMES)}'
            raise config.UserMistake(f"'{name}' is not a constant in config.py: {legal.strip()}")
        given[name] = parse_value(name, text)
    # A statement may use the constants above it, so the given values are set after each one.
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    for statement in ast.parse(Path(config.__file__).read_text(encoding='utf-8')).body:
        if not isinstance(statement, definitions):
            exec(compile(ast.Module([statement], []), config.__file__, 'exec'), vars(config))
            vars(config).update(given)


def check() -> None:
    """Raise config.UserMistake, naming the legal values, if a constant has another one."""
    for name, value in config.constants().items():
        described = ' or '.join(KINDS[kind][0] for kind in kinds(name)) or 'of a plain type'
        legal, test = RULES.get(
            name, (described, lambda v: v > 0 if type(v) in NUMBERS else v != '')
        )
        try:
            json.dumps(value)  # checkpoints hold plain types alone
            types = [type_ for kind in kinds(name) for type_ in KINDS[kind][1]] or [type(value)]
            right = type(value) in types and test(value)
        except (TypeError, re.error):
            right = False
        if not right:
            raise config.UserMistake(f'{name}={value!r}: must be {legal}')


def as_arguments(**changes) -> list[str]:
    """All constants, with some changes, as NAME=value arguments."""
    return [f'{name}={value!r}' for name, value in (config.constants() | changes).items()]


def positive_int(text: str) -> int:
    """The type of a script's own option that is a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError('must be a whole number from 1 up')
    return int(text)


def parse(doc: str, options: dict[str, dict], defaults: list[str]) -> argparse.Namespace:
    """Set the constants from the command line, or print --help and exit.

    Returns: the values of the script's own options, and in `arguments` the NAME=value arguments.
    """

    def error(message: str):
        raise config.UserMistake(f'{message}; --help shows what is possible')

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = error
    for name, keywords in options.items():
        parser.add_argument(name, **keywords)
    parser.add_argument('arguments', nargs='*')
    override(defaults)
    if {'-h', '--help'} & set(sys.argv[1:]):
        print(f'{doc.strip()}\n\nConstants (config.py), for one run as NAME=value arguments:')
        for name in NAMES:
            if re.search(rf'\b{name}\b', doc):
                print(f'  {name} = {getattr(config, name)!r}')
        sys.exit()
    values = parser.parse_intermixed_args()
    override([*defaults, *values.arguments])
    check()
    return values


def explain_disk_error(error: OSError) -> str:
    """What to do about a file that cannot be written, naming the constant of its folder."""
    file = Path(error.filename or '')
    names = [
        name
        for name in ('OUTPUT', 'LOGS_PATH', 'INPUT')
        if config.path(getattr(config, name)) in (file, *file.parents)
    ]
    name = (names or ['OUTPUT'])[0]
    room = 'make room, or ' * (error.errno in FULL)
    return f'{file}: {error.strerror}: {room}set {name} to a folder that you may write to'


def run(main, doc: str, options: dict[str, dict] | None = None, defaults: list[str] = ()) -> None:
    """Run a script. A user's mistake ends it with one line and status 1, a bug with its traceback.

    Args:
        main: called without arguments, or with the values of the script's options if it has any.
        doc: the script's docstring. --help prints it, and the constants that it names.
        options: the script's own options: name -> keywords of argparse's add_argument.
        defaults: NAME=value arguments that the user's own override.
    """
    try:
        values = parse(doc, options or {}, list(defaults))
        if not options:
            # Lightning starts further processes with this command. They get the values of now,
            # even if config.py has been edited by then.
            sys.argv[1:] = as_arguments()
        main(*[values] if options else [])
    except config.UserMistake as mistake:
        # An error in a DataLoader's worker arrives with the worker's traceback before it.
        sys.exit(str(mistake).rsplit('UserMistake: ', 1)[-1].strip())
    except KeyboardInterrupt:
        sys.exit('stopped')
    except OSError as error:
        if error.errno not in DISK:
            raise
        sys.exit(explain_disk_error(error))
