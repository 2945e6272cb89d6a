"""Run folders LOGS_PATH/version_#: one training at a time, whole checkpoints, what a run left."""

import io
import os
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import Timeout
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only

import config
import folds
import tables

# What a resumed run may change: where and how fast it goes on, and what the tester does.
MAY_CHANGE = {
    'INPUT', 'OUTPUT', 'LOGS_PATH', 'TRAIN_PATH', 'MASK_PATH', 'TEST_PATH', 'TRAIN_CSV', 'TEST_CSV',
    'TRAIN_FOLDS', 'PATH', 'ENCODER_WEIGHTS', 'FOLDS', 'EPOCHS', 'NUM_WORKERS', 'CACHE', 'RESUME',
    'ACCELERATOR', 'DEVICES', 'NUM_NODES', 'STRATEGY', 'COMPILE', 'VAL_BATCH_SIZE', 'TTA', 'THRESHOLD',
    'SAVE_MASKS',
}  # fmt: skip


@contextmanager
def alone(constant: str, seconds: float = 10):
    """Keep other runs out of LOGS_PATH or OUTPUT, however this one ends; rank 0 does so for all.

    Raises config.UserMistake where another one is there, or the folder cannot be written.
    """
    folder = getattr(config, constant)
    with ExitStack() as stack:
        with tables.writing(f'{constant}={folder}'):
            try:
                if rank_zero_only.rank == 0:
                    stack.enter_context(tables.locked(config.path(folder) / '.lock', seconds))
            except Timeout:  # an OSError as well
                what = 'training' if constant == 'LOGS_PATH' else 'test'
                raise config.UserMistake(
                    f'another {what} is running in {folder}: wait for its end, or give this one a '
                    'LOGS_PATH and an OUTPUT of its own'
                ) from None
        yield


class Whole(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, on whichever disk: written beside their place,
    then renamed. (Lightning's own are moved from the system's temporary folder.)"""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        content = io.BytesIO()  # as torch.save makes a RuntimeError of a full disk
        torch.save(checkpoint, content)
        with tables.whole(Path(path)) as temporary:
            temporary.write_bytes(content.getbuffer())


class BestCheckpoint(ModelCheckpoint):
    """The checkpoint with the best val_dice; also in a folder that was moved."""

    def __init__(self):
        super().__init__(
            filename='{epoch}-{val_dice:.4f}',
            monitor='val_dice',
            mode='max',
            save_on_train_epoch_end=True,
        )

    def load_state_dict(self, state: dict) -> None:
        def here(file: str) -> str:
            return os.path.join(self.dirpath, os.path.basename(file)) if file else file

        paths = {key: here(state[key]) for key in state if key.endswith('model_path')}
        best = {here(file): score for file, score in state['best_k_models'].items()}
        super().load_state_dict({**state, **paths, 'dirpath': self.dirpath, 'best_k_models': best})


def last_checkpoint() -> ModelCheckpoint:
    """Writes last.ckpt after each epoch. (`save_last` does so after those alone that were the best.)"""
    return ModelCheckpoint(
        filename='last', enable_version_counter=False, save_on_train_epoch_end=True
    )


def last_run(fold: int) -> dict | None:
    """What the newest run of a fold left: its folder, newest checkpoint `file`, `epoch` (from 0),
    the file of its `best` checkpoint, and the `history` of its epochs.

    Rank 0 removes starts that were killed before their first checkpoint, and checkpoints that the
    newest one does not know any more.

    Raises config.UserMistake where a checkpoint cannot be read, or where that run had other constants
    than those that may change, or other images in its folds.
    """
    tidies = rank_zero_only.rank == 0
    logs = config.path(config.LOGS_PATH)
    folders = [f for f in logs.glob('version_*') if f.name.removeprefix('version_').isdigit()]
    for folder in sorted(folders, key=lambda f: int(f.name.removeprefix('version_')), reverse=True):
        names = ('last.ckpt', 'epoch=*.ckpt')  # whatever else lies there is the user's
        files = [file for name in names for file in (folder / 'checkpoints').glob(name)]
        facts = {file: read_facts(file) for file in sorted(files)}
        facts = {file: run for file, run in facts.items() if run}
        if not facts:
            if tidies:
                remove_dead_start(folder)
            continue
        file = max(facts, key=lambda f: (facts[f]['epoch'], f.name == 'last.ckpt'))
        run = facts[file]
        if run['hyper_parameters']['val_folds'] != [fold]:
            continue
        check_constants(folder.name, run['hyper_parameters'])
        check_images(folder.name, fold, run['images'])
        (checkpoints,) = (v for k, v in run['callbacks'].items() if k.startswith('Best'))
        best = file.with_name(Path(checkpoints['best_model_path']).name)
        if tidies and file.name != 'last.ckpt':
            # Killed between the two: the best one is the last as well.
            with tables.whole(file.with_name('last.ckpt')) as temporary:
                shutil.copyfile(file, temporary)
            file = file.with_name('last.ckpt')
        for other in set(facts) - {file, best} if tidies else ():
            other.unlink(missing_ok=True)
        history = run['callbacks']['EpochLines']['history']
        return {
            'folder': folder,
            'file': file,
            'epoch': run['epoch'],
            'best': best,
            'history': history,
        }
    return None


def remove_dead_start(folder: Path) -> None:
    """Remove the folder of a run that was killed before its first checkpoint."""
    for file in folder.rglob('*'):
        known = file.name in ('checkpoints', 'hparams.yaml', 'metrics.csv')
        if not known and not file.name.startswith('events.') and file.suffix != '.tmp':
            return  # somebody keeps something else here
    shutil.rmtree(folder)


def read_facts(file: Path) -> dict | None:
    """What a checkpoint holds besides tensors; those are not read, and code in it is never run. None
    where rank 0 has removed it by now."""
    try:
        state = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        return {name: state[name] for name in ('epoch', 'hyper_parameters', 'callbacks', 'images')}
    except FileNotFoundError:
        return None
    except Exception as error:  # what a damaged file raises is up to pickle, zipfile and torch
        raise config.UserMistake(
            f'{tables.relative(file)}: cannot be read ({config.in_short(error, 120)}): remove it to go '
            f'on from an older checkpoint, or remove {file.parent.parent.name} to train that fold anew'
        ) from None


def check_constants(name: str, constants: dict) -> None:
    """Raise config.UserMistake where a run was begun with constants that decide another result."""
    now = config.constants()
    differ = [n for n in now if n not in MAY_CHANGE and constants.get(n, now[n]) != now[n]]
    if constants['EPOCHS'] > config.EPOCHS:
        differ.append('EPOCHS')
    if differ:
        was = ', '.join(f'{name}={constants[name]}' for name in differ)
        raise config.UserMistake(
            f'RESUME=True: {name} was begun with {was}: set the same (or more EPOCHS), or RESUME=False '
            'to start anew'
        )


def check_images(name: str, fold: int, digests: dict | None) -> None:
    """Raise config.UserMistake where TRAIN_FOLDS has other images in the folds than a run had."""
    if digests != folds.digests(fold):
        raise config.UserMistake(
            f'RESUME=True: {name} was begun with other images in its folds than {config.TRAIN_FOLDS} '
            'has now: put the older file back, or RESUME=False to start anew'
        )
