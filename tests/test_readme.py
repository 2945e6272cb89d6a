"""README.md says what is so: its commands are run or checked, its tables compared with the code."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import SRC, environment

import command_line
import config
import dice_loss

ROOT = SRC.parent
TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```bash\n(.*?)```', TEXT, re.DOTALL)


def commands() -> list[str]:
    """Every `python script.py ...` in the README, with $WORDS put in."""
    found = re.findall(r'`(?:\.venv/bin/)?python (\S+\.py[^`\n]*)`', TEXT)
    for block in BLOCKS:
        words = re.search(r'WORDS="(.*?)"', block, re.DOTALL)
        block = block.replace('$WORDS', words[1].replace('\n', ' ') if words else '')
        found += re.findall(r'\b((?:src|tests)/\w+\.py[^&\n#]*)', block)
    return found


def test_the_scripts_and_words_of_every_command_exist():
    assert len(commands()) > 20
    for command in commands():
        script, *words = shlex.split(command)
        assert (ROOT / script).is_file(), command
        words = [word for word in words if re.match(r'[A-Z_]+=', word)]
        command_line.override(words)
        command_line.check()


def test_every_constant_that_is_named_exists_and_has_the_default_that_is_shown():
    names = set(re.findall(r'`([A-Z][A-Z_]+)(?: = [^`]*)?`', TEXT))
    assert names - {'MODELS', 'AUGMENTATIONS', 'RULES', 'RANK', 'FIRST'} <= set(config.constants())
    table = TEXT[TEXT.index('| constant |') :].split('\n\n')[0].splitlines()[2:]
    assert len(table) == 10
    for row in table:
        named, shown = (re.findall(r'`(.*?)`', cell) for cell in row.split('|')[1:3])
        assert [ast.literal_eval(value) for value in shown] == [getattr(config, n) for n in named]


def test_every_file_is_in_the_tree_and_every_loss_in_the_table():
    tree = re.findall(r'^  (\w+\.py) ', TEXT, re.MULTILINE)
    assert sorted(tree) == sorted(file.name for file in SRC.glob('*.py'))
    benchmarks = (ROOT / 'tests/BENCHMARKS.md').read_text(encoding='utf-8')
    table = benchmarks[benchmarks.index('| loss |') :].split('\n\n')[0]
    names = {name for row in table.splitlines()[2:] for name in row.split('|')[1].split(', ')}
    assert {name.strip() for name in names} == set(dice_loss.LOSSES)


def test_the_environment_is_activated_before_the_first_bare_python():
    blocks = '\n'.join(BLOCKS)
    activation = blocks.index('\nsource .venv/bin/activate\n')
    assert blocks.index('\npython ') > activation


def test_the_example_of_ones_own_images_runs_as_it_stands(tmp_path):
    """The two lines that make the images, and the three steps, from a copy of the project in a folder
    with a space in its name, in an activated shell: its PATH begins with this interpreter's folder."""
    project = tmp_path / 'my project'
    shutil.copytree(SRC, project / 'src', ignore=shutil.ignore_patterns('__pycache__'))
    make, run = (block for block in BLOCKS if 'own/' in block)
    short = run.replace('FOLDS=[0]', 'FOLDS=[0] EPOCHS=1 MODEL_NAME=smp_linknet_tu-test_resnet')
    activated = os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']])
    result = subprocess.run(
        ['bash', '-ec', make + short],
        capture_output=True,
        text=True,
        cwd=project,
        env={**environment(), 'PATH': activated},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert len((project / 'output/train_folds.csv').read_text().split()) == 25
    assert (project / 'output/oof_worst.png').is_file()
    assert (project / 'output/model_fold0/config.json').is_file()


@pytest.mark.parametrize('link', re.findall(r'!\[.*?\]\((.*?)\)', TEXT))
def test_the_pictures_are_there(link):
    assert (ROOT / link).stat().st_size > 10_000
