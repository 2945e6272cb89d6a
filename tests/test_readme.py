"""README.md says what is so: its commands are run or checked, its tables compared with the code."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import SRC, environment, make_carvana

import command_line
import config
import dice_loss
import model_dispatcher

ROOT = SRC.parent
TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
BENCHMARKS = (ROOT / 'tests/BENCHMARKS.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```bash\n(.*?)```', TEXT, re.DOTALL)


def commands() -> list[str]:
    """Every `python script.py ...` in README.md and BENCHMARKS.md, with $WORDS put in."""
    found = re.findall(r'`(?:\.venv/bin/)?python (\S+\.py[^`]*)`', TEXT + BENCHMARKS)
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
    assert names - {
        'MODELS',
        'AUGMENTATIONS',
        'SCHEDULES',
        'RULES',
        'RANK',
        'FIRST',
        'PROJECT',
    } <= set(config.constants())
    table = TEXT[TEXT.index('| constant |') :].split('\n\n')[0].splitlines()[2:]
    assert len(table) == 10
    for row in table:
        named, shown = (re.findall(r'`(.*?)`', cell) for cell in row.split('|')[1:3])
        assert [ast.literal_eval(value) for value in shown] == [getattr(config, n) for n in named]


def test_every_file_is_in_the_tree_and_every_loss_in_the_table():
    tree = re.findall(r'^  (\w+\.py) ', TEXT, re.MULTILINE)
    assert sorted(tree) == sorted(file.name for file in SRC.glob('*.py'))
    table = BENCHMARKS[BENCHMARKS.index('| loss |') :].split('\n\n')[0]
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
    assert len(list((project / 'output/test_masks').iterdir())) == 24
    assert (project / 'output/model_fold0/config.json').is_file()


def start_cell(cell: str, folder, internet: bool) -> subprocess.Popen:
    """Start the cell for Kaggle in a folder that stands in for Kaggle's."""
    make_carvana(folder / 'made', cars=5)
    given = folder / 'kaggle/input'
    competition = given / 'carvana-image-masking-challenge'
    for new in (competition, given / 'wheels', given / 'weights', folder / 'kaggle/working'):
        new.mkdir(parents=True)
    for name in ('train_hq', 'train_masks', 'test_hq'):
        shutil.make_archive(competition / name, 'zip', folder / 'made', name)
    cars = '\n'.join(file.name for file in (folder / 'made/train_hq').iterdir())
    texts = {
        'train_masks': f'img\n{cars}',
        'sample_submission': 'img,rle_mask\n000000000064_01.jpg,1 1',
    }
    for name, text in texts.items():
        with zipfile.ZipFile(competition / f'{name}.csv.zip', 'w') as archive:
            archive.writestr(f'{name}.csv', text)
    project = given / 'project'
    shutil.copytree(SRC, project / 'src', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'requirements.txt', project)
    for command in ('init -q', 'add -A', '-c user.name=x -c user.email=x commit -qm x'):
        subprocess.run(['git', '-C', project, *command.split()], check=True)
    weights = model_dispatcher.build_model('smp_linknet_tu-test_resnet').encoder.state_dict()
    torch.save(weights, given / 'weights/resnet34.pth')
    small = 'MODEL_NAME=smp_linknet_tu-test_resnet CROP_SIZE=32 FOLDS=[0] EPOCHS=1 NUM_WORKERS=0'
    small += ' ACCUMULATE_GRAD_BATCHES=1'
    cell = cell.replace('%%bash\n', '').replace('WORDS="', f'WORDS="{small} ')
    with_internet, without = cell.split('# Without internet, take these three lines instead:\n')
    if internet:
        cell = cell.replace('WEIGHTS=imagenet', 'WEIGHTS=None')  # no hub here
    else:
        lines = with_internet.splitlines()
        assert [line.split()[0] for line in lines[-3:]] == ['[', 'pip', 'WEIGHTS=imagenet']
        cell = '\n'.join(lines[:-3]) + '\n' + without.replace('\n# ', '\n').removeprefix('# ')
    cell = cell.replace('https://github.com/YOU/YOUR-COPY.git', f'file://{project}')
    cell = cell.replace(' /kaggle', f' {folder}/kaggle').replace('=/kaggle', f'={folder}/kaggle')
    activated = os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']])
    environ = {**environment(), 'PATH': activated, 'PIP_NO_INDEX': '1'}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    return subprocess.Popen(['bash', '-c', cell], env=environ, **pipes)


def test_the_cell_for_kaggle_runs_in_folders_that_stand_in_for_its_own(tmp_path):
    """Zip files in an input that nothing is written to; the project by git or as a data set."""
    (cell,) = [block for block in BLOCKS if block.startswith('%%bash\n')]
    runs = [start_cell(cell, tmp_path / str(n), internet=n == 0) for n in range(2)]
    for number, run in enumerate(runs):
        text = run.communicate(timeout=300)[0]
        assert run.returncode == 0, text
        kaggle = tmp_path / f'{number}/kaggle'
        assert len((kaggle / 'working/output/oof.csv').read_text().split()) == 1 + 2
        assert len((kaggle / 'working/output/submission.csv').read_text().split('\n')) == 1 + 1 + 1
        weights = f'encoder tensors loaded from {kaggle}/input/weights/resnet34.pth'
        assert (weights in text) == (number == 1)
        assert {folder.name for folder in (kaggle / 'input').iterdir()} == {
            'carvana-image-masking-challenge', 'project', 'weights', 'wheels'}  # fmt: skip


@pytest.mark.parametrize('link', re.findall(r'!\[.*?\]\((.*?)\)', TEXT))
def test_the_pictures_are_there(link):
    assert (ROOT / link).stat().st_size > 10_000
