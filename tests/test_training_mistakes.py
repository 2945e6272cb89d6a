"""What a training refuses, in this process where that is enough: one line, earlier results stay."""

import math
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SRC, Evil, environment

import callbacks
import command_line
import config
import files
import folds
import Lightning_tester
import Lightning_trainer
import runtime


@pytest.fixture
def ready(carvana):
    """Folds made, and an earlier result in models.csv."""
    folds.main()
    scores = {'epoch': 0, 'val_dice': 0.5, 'val_iou': 0.4}
    files.enter_model(3, 'version_0', carvana / 'old.ckpt', scores)
    return carvana


def leave_checkpoint(folder, data: bytes) -> None:
    """What an earlier run of RESUME=True finds."""
    config.RESUME = True
    file = folder / 'logs/version_1/checkpoints/last.ckpt'
    file.parent.mkdir(parents=True)
    (file.parent.parent / 'hparams.yaml').write_text('val_folds: [0]\n')
    file.with_name('best.ckpt').write_bytes(b'')
    file.write_bytes(data)


def block_logs(folder) -> None:
    (folder / 'logs').write_text('a file in place of a folder')


def give(**constants):
    return lambda folder: vars(config).update(constants)


MISTAKES = {
    'batch': (give(TRAIN_BATCH_SIZE=9), 'TRAIN_BATCH_SIZE=9 is more than the 8 training .*most 8'),
    'loss': (give(LOSS='DiceLoss'), "no loss is called 'DiceLoss'; did you mean"),
    'loss and classes': (give(LOSS='BCE', CLASSES=3), 'BCE is not for CLASSES=3'),
    'loss arguments': (give(LOSS_ARGS={'alhpa': 1}), 'IoULoss has no argument alhpa; it takes'),
    'loss and constant': (give(LOSS_ARGS={'ignore_index': 255}), 'set IGNORE_INDEX instead'),
    'decoder': (give(MODEL_NAME='smp_unett_resnet18'), "no decoder 'unett'; did you mean unet"),
    'encoder': (give(MODEL_NAME='smp_unet_resnet19'), "no encoder 'resnet19'; did you mean"),
    'augmentation': (give(AUGMENTATION='originl'), "AUGMENTATION='originl': did you mean original"),
    'pair': (give(MODEL_NAME='smp_dpt_resnet18'), 'dpt cannot be built on resnet18'),
    'size': (give(MODEL_NAME='smp_fpn_resnet18', CROP_SIZE=50, INPUT_SHAPE=(3, 50, 50)),
             'CROP_SIZE=50, .*divisible by'),
    'fixed size': (give(MODEL_NAME='smp_dpt_tu-vit_tiny_patch16_224', CROP_SIZE=96), 'CROP_SIZE=96'),
    'one image': (give(MODEL_NAME='smp_deeplabv3_resnet18', TRAIN_BATCH_SIZE=1), 'TRAIN_BATCH_SIZE=1'),
    'weights': (give(ENCODER_WEIGHTS='imagenet22k'), "ENCODER_WEIGHTS='imagenet22k': neither a file"),
    'weights file': (give(ENCODER_WEIGHTS='gone.pth'), 'gone.pth: no such file'),
    'empty checkpoint': (lambda f: leave_checkpoint(f, b''), 'last.ckpt: cannot be read'),
    'cut checkpoint': (lambda f: leave_checkpoint(f, b'PK\3\4' + bytes(9)), 'last.ckpt: cannot be'),
    'accelerator': (give(ACCELERATOR='gpuu'), "ACCELERATOR='gpuu', DEVICES=1"),
    'strategy': (give(STRATEGY='dpp'), "STRATEGY='dpp'"),
    'pickle': (lambda f: leave_checkpoint(f, pickle.dumps(Evil())), 'last.ckpt: cannot be read'),
}  # fmt: skip


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_end_before_the_training(ready, mistake):
    earlier = files.models_file().read_bytes()
    make, message = MISTAKES[mistake]
    make(ready)
    with pytest.raises(config.UserMistake, match=message) as raised:
        Lightning_trainer.train_fold(0)
    assert '\n' not in str(raised.value)
    assert files.models_file().read_bytes() == earlier
    assert not list((ready / 'logs').rglob('events.*'))


def test_the_same_fold_or_a_second_tester_at_once_is_refused(ready, monkeypatch):
    logs, output = config.path(config.LOGS_PATH), config.path(config.OUTPUT)
    told = pytest.raises(
        config.UserMistake, match='fold 0 is being trained in .*logs already: wait'
    )
    with files.file_lock(logs / '.fold0.lock'), told:
        Lightning_trainer.train_fold(0)
    monkeypatch.setattr(Lightning_tester, 'load_models', dict)
    told = pytest.raises(config.UserMistake, match='another tester is running in .*output: wait')
    with files.file_lock(output / '.test.lock'), told:
        Lightning_tester.main()
    with files.file_lock(logs / '.fold0.lock', 'busy'):
        pass


def test_three_processes_that_enter_models_lose_none(ready):
    code = (
        f'import sys; sys.path.insert(0, {str(SRC)!r}); import config, files\n'
        f'config.OUTPUT, start = {config.OUTPUT!r}, int(sys.argv[1])\n'
        'from pathlib import Path\n'
        'for fold in range(start, start + 20):\n'
        '    epoch = {"epoch": 0, "val_dice": 0.5, "val_iou": 0.4}\n'
        '    files.enter_model(fold, "version_0", Path("x.ckpt"), epoch)\n'
    )
    processes = [
        subprocess.Popen([sys.executable, '-c', code, str(start)]) for start in (100, 200, 300)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    expected = [3, *(start + n for start in (100, 200, 300) for n in range(20))]
    assert files.read_models().fold.tolist() == expected


def test_an_unwritable_folder_is_told_in_one_line(ready, monkeypatch):
    block_logs(ready)
    monkeypatch.setattr(sys, 'argv', ['x.py', *command_line.as_arguments()])
    with pytest.raises(SystemExit) as ended:
        command_line.run(Lightning_trainer.main, '')
    remedy = r"/logs'?: make room, or set OUTPUT or LOGS_PATH$"
    assert re.search(remedy, str(ended.value.code)) and '\n' not in str(ended.value.code)


def test_an_unwritable_output_is_told_before_the_training(ready, monkeypatch):
    (ready / 'file').write_text('in place of a folder')
    config.OUTPUT, config.TRAIN_FOLDS = str(ready / 'file'), f'{ready}/output/train_folds.csv'
    monkeypatch.setattr(sys, 'argv', ['x.py', *command_line.as_arguments()])
    with pytest.raises(SystemExit, match=f"{ready}/file': make room, or set OUTPUT or LOGS_PATH$"):
        command_line.run(Lightning_trainer.main, '')


def test_a_full_disk_is_told_in_one_line(ready, tmp_path):
    """A limit on the size of files stands for the disk: checkpoints do not fit."""
    names = ('INPUT', 'OUTPUT', 'LOGS_PATH', 'CROP_SIZE', 'MODEL_NAME', 'NUM_WORKERS')
    words = [f'{name}={getattr(config, name)}' for name in names]
    words += ['FOLDS=[0]', 'ENCODER_WEIGHTS=None', 'EPOCHS=1']
    result = subprocess.run(
        [sys.executable, SRC / 'Lightning_trainer.py', *words],
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )
    assert result.returncode == 1
    assert 'make room' in result.stderr and result.stderr.count('\n') == 1, result.stderr
    assert not list(tmp_path.rglob('*.tmp')) and not list(tmp_path.rglob('*.ckpt'))
    assert files.read_models().fold.tolist() == [3]


def test_out_of_gpu_memory_says_what_to_try():
    config.TRAIN_BATCH_SIZE, config.ACCUMULATE_GRAD_BATCHES, config.CROP_SIZE = 4, 8, 1024
    told = pytest.raises(config.UserMistake, match=r'SIZE=2 and double ACCUM.*\(768, 768\)')
    with told, runtime.explain_errors():
        raise torch.OutOfMemoryError('CUDA out of memory')
    config.TRAIN_BATCH_SIZE = 1
    for error in (
        torch.OutOfMemoryError('CUDA out of memory'),
        RuntimeError('CUDA error: out of memory'),
        RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'),
        RuntimeError('cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED'),
        RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
    ):
        told = pytest.raises(config.UserMistake, match=r'try CROP_SIZE=\(768, 768\)')
        with told, runtime.explain_errors():
            raise error


def test_out_of_gpu_memory_in_the_tester_says_what_to_try():
    for size, remedy in ((4, 'try VAL_BATCH_SIZE=2'), (1, 'try fewer FOLDS')):
        config.VAL_BATCH_SIZE = size
        with (
            pytest.raises(config.UserMistake, match=remedy),
            runtime.explain_errors(training=False),
        ):
            raise torch.OutOfMemoryError('CUDA out of memory')


def test_a_container_without_shared_memory_is_told():
    told = pytest.raises(config.UserMistake, match='/dev/shm .*fewer NUM_WORKERS')
    with told, runtime.explain_errors():
        raise RuntimeError(
            'DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that '
            "dataloader's workers are out of shared memory."
        )


def test_a_damaged_table_of_models_is_told(ready):
    text = files.models_file().read_text()
    files.models_file().write_text(text.replace('0.5', ''))
    with pytest.raises(config.UserMistake, match=r'models.csv: .*RESUME=True'):
        files.read_models()


def test_memory_where_nobody_tells_how_much(monkeypatch):
    assert 100 < runtime.peak_memory_mb() < 1e5
    monkeypatch.setitem(sys.modules, 'resource', None)  # as on Windows
    assert math.isnan(runtime.peak_memory_mb())


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['x.py'])
    with pytest.raises(RuntimeError, match='a bug'), runtime.explain_errors():
        raise RuntimeError('a bug')
    with pytest.raises(FileNotFoundError):
        command_line.run(lambda: Path('/nowhere/at/all').read_text(), '')


@pytest.mark.parametrize(
    ('durations', 'share'),
    [
        ({}, 0.0),
        # The first batch's 5 seconds are the workers' start: 1.5 of 10 seconds remain.
        (
            {
                'run_training_epoch': [9.0, 6.0],
                '[_TrainingEpochLoop].train_dataloader_next': [5.0, 0.5, 0.5],
                '[_EvaluationLoop].val_next': [0.0, 0.5],
            },
            0.15,
        ),
    ],
)
def test_the_share_of_waiting_by_hand(durations, share):
    assert runtime.data_wait_share(durations) == pytest.approx(share)


def test_advice_if_the_device_waits(monkeypatch):
    monkeypatch.setattr(config, 'cpu_count', lambda: 4)
    config.NUM_WORKERS = 2
    assert runtime.faster_input(0.1) == ''
    assert 'NUM_WORKERS=4' in runtime.faster_input(0.11)
    config.NUM_WORKERS = 4
    assert 'CACHE=True' in runtime.faster_input(0.5)


def test_what_other_packages_say_is_told_in_one_line():
    assert config.shorten(ValueError('a\n  b.')) == 'a b'
    assert config.shorten(ValueError('Failed. ' + 'x' * 200)) == 'Failed'
    assert config.shorten(ValueError('x' * 200), 9) == 'xxxxxxxxx...'
    assert config.shorten(KeyError()) == 'KeyError'


def test_the_line_of_an_epoch_goes_above_the_bar(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    (bar,) = runtime.progress_bars()
    bar.print = lambda line: print(f'above {line}')
    trainer = SimpleNamespace(
        callback_metrics={'val_dice': torch.tensor(0.5)}, progress_bar_callback=bar,
        current_epoch=0, max_epochs=2, global_step=3, is_global_zero=True,
        logger=SimpleNamespace(log_dir=str(tmp_path)),
    )  # fmt: skip
    lines = callbacks.EpochLog(1)
    lines.on_train_epoch_start(trainer, None)
    lines.on_train_epoch_end(trainer, None)
    assert capsys.readouterr().out.startswith('above fold 1  epoch   1/2  val_dice 0.5000')
    assert (tmp_path / 'metrics.csv').read_text() == 'epoch,step,val_dice\n0,3,0.5\n'
    assert bar.get_metrics(trainer, None) == {}
