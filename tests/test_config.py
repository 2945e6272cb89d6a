"""config.py and its words: defaults, derived constants, checks, speed of a mistake."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import SRC, run_here, run_script

import command_line
import config
import demo

CONTRACT = {
    'INPUT': 'input',
    'OUTPUT': 'output',
    'LOGS_PATH': 'lightning_logs',
    'TRAIN_PATH': 'input/train_hq',
    'MASK_PATH': 'input/train_masks',
    'TEST_PATH': 'input/test_hq',
    'IMAGE_SUFFIX': '.jpg',
    'MASK_SUFFIX': '_mask.gif',
    'CROP_SIZE': 1024,
    'CHANNELS': 3,
    'CLASSES': 1,
    'INPUT_SHAPE': (3, 1024, 1024),
    'IGNORE_INDEX': None,
    'N_FOLDS': 5,
    'FOLDS': [0, 1, 2, 3, 4],
    'MODEL_NAME': 'smp_unet_resnet34',
    'ENCODER_WEIGHTS': 'imagenet',
    'LOSS': 'IoULoss',
    'LR': 0.001,
    'EPOCHS': 7,
    'TRAIN_BATCH_SIZE': 4,
    'VAL_BATCH_SIZE': 4,
    'ACCUMULATE_GRAD_BATCHES': 64,
    'PRECISION': 16,
    'SEED': 42,
    'RESUME': False,
    'ACCELERATOR': 'auto',
    'DEVICES': 1,
    'NUM_NODES': 1,
    'STRATEGY': 'auto',
    'COMPILE': False,
    'PATH': None,
    'TTA': False,
    'THRESHOLD': None,
    'SAVE_MASKS': False,
}


@pytest.mark.parametrize('name', CONTRACT)
def test_defaults_are_the_originals(name):
    assert getattr(config, name) == CONTRACT[name]


def test_defaults_pass_their_own_checks():
    command_line.check()


def test_derived_constants_follow():
    command_line.override(['INPUT=/data', 'CROP_SIZE=(320, 480)', 'CHANNELS=1', 'OUTPUT=out'])
    assert config.TRAIN_PATH == '/data/train_hq'
    assert config.TRAIN_FOLDS == 'out/train_folds.csv'
    assert config.INPUT_SHAPE == (1, 320, 480)
    assert config.crop_size() == (320, 480)


def test_words_are_literals_or_text():
    words = ['LR=1e-4', 'FOLDS=[0, 2]', 'PRECISION=bf16', 'GROUP_REGEX=None', 'INPUT=2018']
    command_line.override(words)
    values = config.LR, config.FOLDS, config.PRECISION, config.GROUP_REGEX, config.INPUT
    assert values == (1e-4, [0, 2], 'bf16', None, '2018')


def test_relative_paths_start_at_the_root():
    assert config.path('input') == SRC.parent / 'input'
    assert str(config.path('/data/x')) == '/data/x'


def test_constants_are_plain_types():
    plain = (str, int, float, bool, list, dict, type(None))
    assert all(type(value) in plain for value in config.constants().values())


@pytest.mark.parametrize(
    ('word', 'message'),
    [
        ('EPOCH=1', 'EPOCHS'),
        ('epochs=1', 'EPOCHS'),
        ('EPOCHS', 'NAME=value'),
        ('EPOCHS=0', 'whole number from 1'),
        ('EPOCHS=2.5', 'whole number from 1'),
        ('EPOCHS=True', 'whole number from 1'),
        ('PRECISION=8', "16, 'bf16' or 32"),
        ('PRECISION=16-mixed', "16, 'bf16' or 32"),
        ('CROP_SIZE=(1, 2, 3)', 'height, width'),
        ('CROP_SIZE=big', 'height, width'),
        ('CLASSES=0', '1 to 255'),
        ('FOLDS=[5]', 'N_FOLDS'),
        ('FOLDS=[0, 0]', 'different'),
        ('FOLDS=0', 'a list'),
        ('LR=-1', 'above 0'),
        ('TTA=1', 'True or False'),
        ('THRESHOLD=1.5', 'between 0 and 1'),
        ('GROUP_REGEX=abc', '(group)'),
        ('GROUP_REGEX=(abc', '(group)'),
        ('MODEL_MEAN=[0.5]', 'per channel'),
        ('MODEL_STD=(1, 0, 1)', 'above 0'),
        ('IGNORE_INDEX=0.5', 'whole number'),
        ('MASK_COLOURS=[(0, 0, 0)]', 'two if CLASSES=1'),
        ('IMAGE_SUFFIX=[.jpg, .png]', 'put the argument in double quotes'),
        ('LOSS_ARGS={smooth: 0.1}', 'put the argument in double quotes'),
        ('IMAGE_SUFFIX=png', "a suffix such as '.png'"),
        ('MASK_COLOURS=[(0, 0, 0), (0, 0, 256)]', '0 to 255'),
        ('MASK_SUFFIX=[]', 'a suffix'),
        ('IGNORE_INDEX=1', 'not 0 or 1'),
        ('SEED=-1', '0 to 2**32'),
        ('LOSS_ARGS=3', 'dictionary'),
        ('DEVICES=0', 'devices'),
        ('STRATEGY=ddp_spawn', 'not fork, spawn or notebook'),
        ('STRATEGY=ddp_fork_find_unused_parameters_true', 'not fork, spawn or notebook'),
        ('STRATEGY=ddp_notebook', 'not fork, spawn or notebook'),
    ],
)
def test_a_wrong_word_names_the_constant_and_what_is_legal(word, message):
    with pytest.raises(config.UserMistake) as mistake:
        command_line.override([word])
        command_line.check()
    assert message in str(mistake.value)
    assert word.partition('=')[0] in str(mistake.value)
    assert '\n' not in str(mistake.value)


def test_a_misspelt_constant_is_told_before_any_data_is_read(tmp_path, monkeypatch):
    told = "^'EPOCH' is not a constant in config.py: did you mean EPOCHS\\?$"
    with pytest.raises(SystemExit, match=told):
        run_here(monkeypatch, 'Lightning_trainer.py', 'EPOCH=1', f'OUTPUT={tmp_path}/new')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'script',
    ['folds.py', 'Lightning_trainer.py', 'Lightning_tester.py', 'test_dataset.py', 'test_model.py',
     'demo.py'],
)  # fmt: skip
def test_help_tells_what_is_read_written_and_used(script, monkeypatch, capsys):
    run_here(monkeypatch, script, '--help')
    told = capsys.readouterr().out
    for word in ('Reads', 'Writes', 'Constants'):
        assert word in told
    assert 'TRAIN_PATH = ' in told or 'CROP_SIZE = ' in told


def test_a_mistake_is_one_line_on_standard_error_with_status_1(tmp_path):
    result = run_script('folds.py', f'INPUT={tmp_path}', cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ''
    assert result.stderr.count('\n') == 1 and 'train_hq' in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_whatever_the_form_says_is_kept_beside_the_words(tmp_path, monkeypatch):
    edited = (SRC / 'config.py').read_text().replace(
        'EPOCHS: int = 7',
        "if True:\n    INPUT = '/data'\nEPOCHS: int = 7\nLR, LOSS = 0.5, 'CE'\nFOLDS += []",
    )  # fmt: skip
    (tmp_path / 'config.py').write_text(edited)
    monkeypatch.setattr(config, '__file__', str(tmp_path / 'config.py'))
    command_line.override(['EPOCHS=1', 'LR=0.1'])
    assert (config.INPUT, config.EPOCHS, config.LR, config.LOSS) == ('/data', 1, 0.1, 'CE')
    assert config.FOLDS == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('EPOCHS', '7'),
        ('TRAIN_BATCH_SIZE', 2.5),
        ('OUTPUT', SRC),
        ('ENCODER_WEIGHTS', 3),
        ('OWN', SRC),
    ],
)
def test_a_wrong_type_written_into_the_form_is_refused(name, value):
    setattr(config, name, value)
    try:
        with pytest.raises(config.UserMistake, match=f'{name}=.*must be'):
            command_line.check()
    finally:
        vars(config).pop('OWN', None)


def test_every_constant_has_its_legal_values():
    assert set(command_line.TYPES) == set(config.constants())
    assert set(command_line.RULES) < set(config.constants())


def test_a_side_or_a_pair_however_it_is_written():
    for value in ('96', '(96, 96)', '[96, 96]'):
        command_line.override([f'CROP_SIZE={value}'])
        command_line.check()
        assert config.crop_size() == (96, 96) and config.INPUT_SHAPE == (3, 96, 96)


def test_a_scripts_own_options_stand_anywhere_among_the_arguments(monkeypatch, capsys):
    options, seen = {'--cars': {'type': command_line.positive_int, 'default': 18}}, []
    monkeypatch.setattr(sys, 'argv', ['demo.py', 'FOLDS=[0]', '--cars', '3', 'EPOCHS=2'])
    command_line.run(seen.append, '', options)
    assert (seen[0].cars, config.FOLDS, config.EPOCHS) == (3, [0], 2)
    for arguments, message in ((['--cars', '0'], 'a whole number from 1 up'), (['-x'], '-x')):
        monkeypatch.setattr(sys, 'argv', ['demo.py', *arguments])
        with pytest.raises(SystemExit, match=f'{message}.*--help'):
            command_line.run(seen.append, '', options)


def test_a_second_run_in_the_same_interpreter_reads_config_anew(monkeypatch):
    """As %run does in a notebook."""
    for arguments, epochs in ((['EPOCHS=2'], 2), ([], 7)):
        monkeypatch.setattr(sys, 'argv', ['x.py', *arguments])
        command_line.run(lambda: None, '')
        assert epochs == config.EPOCHS


def test_all_constants_come_back_from_their_arguments():
    given = ['INPUT=a folder', 'LOSS_ARGS={"alpha": 0.5}', 'CROP_SIZE=(32, 64)', 'PRECISION=bf16']
    command_line.override([*given, 'THRESHOLD=0.4', 'GROUP_REGEX=^(a|b)=', 'TRAIN_CSV=None'])
    before, arguments = config.constants(), command_line.as_arguments()
    command_line.override([])
    assert config.constants() != before
    command_line.override(arguments)
    assert config.constants() == before


def test_the_demo_keeps_to_its_own_folders():
    given = demo.arguments(['INPUT=/x', 'EPOCHS=2', 'OUTPUT=/y'], INPUT='/x/demo', OUTPUT='/y/demo')
    command_line.override(given)
    assert (config.INPUT, config.OUTPUT, config.EPOCHS) == ('/x/demo', '/y/demo', 2)
    assert demo.SETTINGS['N_FOLDS'] == config.N_FOLDS


def test_grey_images_have_their_own_normalisation():
    command_line.override(['CHANNELS=1'])
    command_line.check()
    assert len(config.MODEL_MEAN) == len(config.MODEL_STD) == 1


def test_ctrl_c_is_one_word(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, 'argv', ['x.py'])
    with pytest.raises(SystemExit, match='^stopped$'):
        command_line.run(interrupted, '')


def run_code(code: str, **keywords) -> subprocess.CompletedProcess:
    """Run a script that has `code` as its main function, in a process."""
    lines = [
        'import os, signal, sys, time',
        f'sys.path.insert(0, {str(SRC)!r})',
        'import command_line',
    ]
    lines += ['def main():', *(f'    {line}' for line in code.splitlines())]
    lines += ["command_line.run(main, '')"]
    script = [sys.executable, '-c', '\n'.join(lines)]
    return subprocess.run(script, capture_output=True, **keywords)


# How a script may meet SIGTERM.
TERM = {
    'in python': 'os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)',
    'with cleaning up': (
        'try: os.kill(os.getpid(), signal.SIGTERM)\nfinally: print("tidy")\ntime.sleep(60)'
    ),
    # As the destructor of a DataLoader, which waits for its workers: Python drops what it raises.
    'in a destructor': (
        'class Loader:\n    def __del__(self): os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)\n'
        'Loader()\ntime.sleep(60)'
    ),
    # A worker that got the signal too makes torch raise an error after ours.
    'with a worker': (
        'try: os.kill(os.getpid(), signal.SIGTERM)\n'
        'finally: raise RuntimeError("DataLoader worker is killed by signal: Terminated.")'
    ),
    # torch's handler of SIGCHLD raises for such a worker, also while Python shuts down.
    'with a worker that ends later': (
        'import subprocess, weakref\n'
        'def fail(*_): raise RuntimeError("DataLoader worker is killed")\n'
        'signal.signal(signal.SIGCHLD, fail)\n'
        'worker = subprocess.Popen(["sleep", "60"])\n'
        'weakref.finalize(signal, lambda: (worker.kill(), time.sleep(1)))\n'
        'os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)'
    ),
}


@pytest.mark.parametrize('case', TERM)
def test_sigterm_ends_a_script_with_143(case):
    result = run_code(f'print("begun")\n{TERM[case]}', timeout=50)
    assert (result.returncode, result.stderr) == (143, b'')
    assert result.stdout.split() == [b'begun'] + [b'tidy'] * (case == 'with cleaning up')


def test_after_a_script_sigterm_means_what_it_did_before(monkeypatch):
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    monkeypatch.setattr(sys, 'argv', ['x.py'])
    command_line.run(lambda: None, '')
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def test_what_the_terminal_cannot_print_is_replaced():
    environment = {**os.environ, 'PYTHONIOENCODING': 'cp1252'}
    result = run_code("print('\u65e5\u672c.png \u00fc')", env=environment)
    assert (result.returncode, result.stderr) == (0, b'')
    assert result.stdout.split() == [rb'\u65e5\u672c.png', '\u00fc'.encode('cp1252')]
