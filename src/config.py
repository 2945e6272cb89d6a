"""All constants of the project. Edit them here, or set some for one run on the command line:

    python Lightning_trainer.py EPOCHS=1 CROP_SIZE=256 MODEL_NAME=smp_fpn_resnet18

A value is a Python literal, else text. command_line.py checks it against the annotation. Relative
paths start at the project root. INPUT=/data also changes TRAIN_PATH, which is derived from INPUT.
"""

import difflib
import os
from pathlib import Path


def cpu_count() -> int:
    """Number of CPU cores that this process may use: in a container perhaps not all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def pair(size) -> tuple:
    """CROP_SIZE as (height, width). A single number is the side of a square."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def endings(suffix) -> list:
    """IMAGE_SUFFIX, MASK_SUFFIX or TEST_SUFFIX as a list. Each may also be a single string."""
    return [suffix] if isinstance(suffix, str) else suffix


# ---------------------------------------------------------------- paths
INPUT: str = 'input'  # never written to: Kaggle mounts it read-only
OUTPUT: str = 'output'  # tables, pictures and exported models
LOGS_PATH: str = 'lightning_logs'  # one folder version_# per trained fold

TRAIN_PATH: str = f'{INPUT}/train_hq'
MASK_PATH: str = f'{INPUT}/train_masks'
TEST_PATH: str = f'{INPUT}/test_hq'  # if it does not exist, nothing is predicted
# The column img lists the images. A column rle_mask can replace missing mask files.
TRAIN_CSV: str | None = f'{INPUT}/train_masks.csv'  # None, or no such file: all images
TEST_CSV: str | None = f'{INPUT}/sample_submission.csv'  # column img: order of the submission
TRAIN_FOLDS: str = f'{OUTPUT}/train_folds.csv'  # written by folds.py

# An image file is IMAGE_PREFIX + name + IMAGE_SUFFIX, a mask file likewise. A suffix may be a list.
# The name includes subfolders of TRAIN_PATH, such as patient00/.
IMAGE_SUFFIX: str | list = '.jpg'
MASK_SUFFIX: str | list = '_mask.gif'
IMAGE_PREFIX: str = ''
MASK_PREFIX: str = ''
TEST_SUFFIX: str | list = IMAGE_SUFFIX  # of the images to predict
EMPTY_IF_NO_MASK: bool = False  # treat an image without a mask file as one without an object
RLE_ORDER: str = 'rows'  # run lengths count pixels along rows; or 'columns'

# ---------------------------------------------------------------- image
CROP_SIZE: int | tuple = 1024  # size of the model's input: one side, or (height, width)
# None resizes whole images to CROP_SIZE. A number scales images by it (1.0: original size), trains
# on random crops of CROP_SIZE, and predicts in overlapping windows of CROP_SIZE.
SCALE: float | None = None
CHANNELS: int = 3  # 3 = RGB, 1 = grey
CLASSES: int = 1  # 1 = binary (sigmoid, masks 0/1), N = multi-class (softmax, masks 0..N-1)
INPUT_SHAPE: tuple = (CHANNELS, *pair(CROP_SIZE))  # derived: set CHANNELS and CROP_SIZE instead
# Per channel, for images scaled to 0..1; the defaults are ImageNet's.
MODEL_MEAN: tuple = (0.485, 0.456, 0.406) if CHANNELS == 3 else (0.449,)
MODEL_STD: tuple = (0.229, 0.224, 0.225) if CHANNELS == 3 else (0.226,)
IGNORE_INDEX: int | None = None  # mask value that is neither trained on nor scored, e.g. 255
# For coloured masks: [(r, g, b), ...], one per class. With CLASSES=1: background and object.
MASK_COLOURS: list | None = None

# ---------------------------------------------------------------- folds
N_FOLDS: int = 5
GROUP_REGEX: str | None = r'^([0-9a-f]{12})_\d\d$'  # a (group), here a car, stays in one fold
FOLDS: list = [*range(N_FOLDS)]  # folds to train and to test

# ---------------------------------------------------------------- model
MODEL_NAME: str = 'smp_unet_resnet34'  # smp_<decoder>_<encoder>; test_model.py --list
ENCODER_WEIGHTS: str | None = 'imagenet'  # or None, or the path of a weights file
# A checkpoint whose whole model a new training starts from, or a models.csv: each fold its own.
START_FROM: str | None = None

# ---------------------------------------------------------------- training
LOSS: str = 'IoULoss'  # any name in dice_loss.LOSSES
LOSS_ARGS: dict = {}  # its arguments, e.g. {'alpha': 0.5, 'beta': 0.5} for TverskyLoss
LR: float = 0.001  # highest learning rate of SCHEDULE
SCHEDULE: str | None = 'cosine'  # of LR: 'cosine' or 'poly'; None = constant
OPTIMIZER: str = 'Adam'  # any class of torch.optim
OPTIMIZER_ARGS: dict = {}  # its arguments, e.g. {'weight_decay': 0.01} for AdamW
GRADIENT_CLIP: float | None = None  # gradients are clipped to this norm
EPOCHS: int = 7
PATIENCE: int | None = None  # stop after this many epochs without a better val_dice
LIMIT_BATCHES: int | None = None  # use only this many batches per epoch, for a quick trial
TRAIN_BATCH_SIZE: int = 4  # images per device
VAL_BATCH_SIZE: int = 4  # images per device, also in the tester
ACCUMULATE_GRAD_BATCHES: int = 64  # batches per optimizer step; 64 is for thousands of images
PRECISION: int | str = 16  # 16 (float16, needs CUDA), 'bf16' or 32
AUGMENTATION: str = 'original'  # any name in dataset.AUGMENTATIONS
SEED: int = 42
NUM_WORKERS: int = min(16, cpu_count())  # processes per device that decode images
CACHE: bool = False  # keep decoded, resized images under OUTPUT/cache: 4 MB each at 1024 pixels
RESUME: bool = False  # continue where the last run stopped

# ---------------------------------------------------------------- hardware
ACCELERATOR: str = 'auto'  # 'auto', 'gpu', 'cpu', ... as in Lightning's Trainer
DEVICES: int | str = 1  # per machine
NUM_NODES: int = 1
STRATEGY: str = 'auto'  # 'auto', 'ddp', ... as in Lightning's Trainer
COMPILE: bool = False  # torch.compile: takes minutes at the start, then steps are faster

# ---------------------------------------------------------------- testing
PATH: str | list | None = None  # predict with these checkpoints; None = all folds (models.csv)
TTA: bool = False  # also predict the mirrored image, and average
THRESHOLD: float | None = None  # probability above it is foreground; None = the best out of fold
SAVE_MASKS: bool = False  # also write OUTPUT/test_masks/<img>.png


# ---------------------------------------------------------------- do not edit below
class UserMistake(ValueError):
    """Wrong input or settings. A script prints the message in one line and exits with status 1."""


def path(name: str) -> Path:
    """The file or folder `name`; a relative one starts at the project root."""
    return Path(__file__).resolve().parent.parent / Path(name).expanduser()


def crop_size() -> tuple[int, int]:
    """CROP_SIZE as (height, width) in pixels."""
    return pair(CROP_SIZE)


def constants() -> dict:
    """Name -> value of every constant. Tuples become lists, so that checkpoints can save them."""
    return {name: plain(value) for name, value in globals().items() if name.isupper()}


def plain(value):
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def differing_constants(saved: dict, other: dict) -> list[str]:
    """Names of differing constants that affect a training: not paths, hardware or the tester's."""
    neutral = (
        'INPUT OUTPUT LOGS_PATH TRAIN_PATH MASK_PATH TEST_PATH TRAIN_CSV TEST_CSV TRAIN_FOLDS '
        'TEST_SUFFIX ENCODER_WEIGHTS START_FROM FOLDS NUM_WORKERS CACHE RESUME '
        'ACCELERATOR DEVICES NUM_NODES STRATEGY COMPILE VAL_BATCH_SIZE PATH TTA THRESHOLD SAVE_MASKS'
    )
    names = (set(constants()) & set(saved) & set(other)) - set(neutral.split())
    return sorted(name for name in names if saved[name] != other[name])


def shorten(error: Exception, length: int = 160) -> str:
    """The error message of another package, in one line of about `length` characters."""
    text = ' '.join(str(error).split())
    if text.startswith('Weights only load failed'):  # torch's long advice is for pickled code
        return 'torch.save has not written it'
    if len(text) > length:
        return text[:length].rpartition('. ')[0] or f'{text[:length]}...'
    return text.rstrip('.') or type(error).__name__


def did_you_mean(name: str, names) -> str:
    """'did you mean A or B? ' for a misspelt name; '' if no legal name is similar."""
    lower = {known.lower(): known for known in names}
    number = 1 if str(name).lower() in lower else 3  # only the letter case differs: one answer
    close = difflib.get_close_matches(str(name).lower(), lower, number, 0.6)
    return f'did you mean {" or ".join(lower[key] for key in close)}? ' if close else ''
