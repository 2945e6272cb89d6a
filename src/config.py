"""Every constant of the project, to be edited here or given for one run as NAME=value words:

    python Lightning_trainer.py EPOCHS=1 CROP_SIZE=256 MODEL_NAME=smp_fpn_resnet18

Values are Python literals, else text. Relative paths start at the project's root. What is derived
from a constant follows it: INPUT=/data moves TRAIN_PATH. command_line.py checks all of them.
"""

import difflib
import os
from pathlib import Path


def cores() -> int:
    """CPU cores that this process may use, which in a container or a job are not all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def pair(size) -> tuple:
    """(height, width) of CROP_SIZE's kind: a side, or the two."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


# ---------------------------------------------------------------- paths
INPUT = 'input'  # only ever read: Kaggle mounts it read-only
OUTPUT = 'output'  # tables, pictures and exported models
LOGS_PATH = 'lightning_logs'  # one folder version_# per trained fold

TRAIN_PATH = f'{INPUT}/train_hq'
MASK_PATH = f'{INPUT}/train_masks'
TEST_PATH = f'{INPUT}/test_hq'  # no such folder: nothing is predicted
TRAIN_CSV = f'{INPUT}/train_masks.csv'  # column img lists the images; absent or None: all there are
TEST_CSV = f'{INPUT}/sample_submission.csv'  # column img orders the submission; may be absent
TRAIN_FOLDS = f'{OUTPUT}/train_folds.csv'  # written by folds.py

IMAGE_SUFFIX = '.jpg'  # image file = name + IMAGE_SUFFIX
MASK_SUFFIX = '_mask.gif'  # mask file = name + MASK_SUFFIX

# ---------------------------------------------------------------- image
CROP_SIZE = 1024  # pixels every image is resized to: a side, or (height, width)
CHANNELS = 3  # 3 = RGB, 1 = grey
CLASSES = 1  # 1 = binary (sigmoid, masks 0/1), N = multi-class (softmax, masks 0..N-1)
INPUT_SHAPE = (CHANNELS, *pair(CROP_SIZE))
# Of ImageNet, per channel, for images scaled to 0..1.
MODEL_MEAN = (0.485, 0.456, 0.406) if CHANNELS == 3 else (0.449,)
MODEL_STD = (0.229, 0.224, 0.225) if CHANNELS == 3 else (0.226,)
IGNORE_INDEX = None  # mask value that is neither trained on nor scored, e.g. 255

# ---------------------------------------------------------------- folds
N_FOLDS = 5
GROUP_REGEX = r'^([0-9a-f]{12})_\d\d$'  # its (group) must stay together: the car; None = no groups
FOLDS = [0, 1, 2, 3, 4]  # which folds to train and to test

# ---------------------------------------------------------------- model
MODEL_NAME = 'smp_unet_resnet34'  # smp_<decoder>_<encoder>; test_model.py --list
ENCODER_WEIGHTS = 'imagenet'  # or None, or the path of a weights file

# ---------------------------------------------------------------- training
LOSS = 'IoULoss'  # any name in dice_loss.LOSSES
LOSS_ARGS = {}  # its parameters, e.g. {'alpha': 0.5, 'beta': 0.5} for TverskyLoss
LR = 0.001  # of Adam
EPOCHS = 7
TRAIN_BATCH_SIZE = 4  # images per device
VAL_BATCH_SIZE = 4
ACCUMULATE_GRAD_BATCHES = 64  # batches per optimizer step: 256 of a Carvana fold's 4,070 images
PRECISION = 16  # 16 (float16, CUDA only), 'bf16' or 32
AUGMENTATION = 'original'  # any name in augmentation.AUGMENTATIONS: 'flip', 'strong', 'none', ...
SEED = 42
# Processes that decode images, per device: as many as there are cores for this one, at most 8.
NUM_WORKERS = min(8, cores())
CACHE = False  # keep decoded, resized images under OUTPUT/cache: 4 MB each at 1024 pixels
RESUME = False  # go on where the last run stopped

# ---------------------------------------------------------------- hardware
ACCELERATOR = 'auto'  # 'auto', 'gpu', 'cpu', ... as Lightning's Trainer takes it
DEVICES = 1  # per machine
NUM_NODES = 1
STRATEGY = 'auto'  # 'auto', 'ddp', ... as Lightning's Trainer takes it
COMPILE = False  # torch.compile: minutes at the start, faster steps afterwards

# ---------------------------------------------------------------- testing
PATH = None  # a checkpoint; None = the best one of every trained fold (OUTPUT/models.csv)
TTA = False  # average with the prediction for the mirrored image
THRESHOLD = None  # probability above which a pixel is foreground; None = tuned out of fold
SAVE_MASKS = False  # also write OUTPUT/test_masks/<img>.png


# ---------------------------------------------------------------- not to be edited
class UserMistake(ValueError):
    """Wrong input or settings: its one-line message says what to do; scripts end with status 1."""


def path(name: str) -> Path:
    """The file or folder `name`; a relative one starts at the project's root."""
    return Path(__file__).resolve().parent.parent / Path(name).expanduser()


def crop_size() -> tuple[int, int]:
    """CROP_SIZE as (height, width) in pixels."""
    return pair(CROP_SIZE)


def constants() -> dict:
    """Name -> value of every constant, in plain types (lists for tuples), to be kept with a run."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in globals().items()
        if name.isupper()
    }


def in_short(error: Exception, length: int = 160) -> str:
    """What another package's error says, in one line."""
    text = ' '.join(str(error).split())
    if len(text) > length:
        return text[:length].rpartition('. ')[0] or f'{text[:length]}...'
    return text.rstrip('.') or type(error).__name__


def nearest(name: str, names) -> str:
    """'did you mean A or B? ' for a misspelt name; '' where no name is like it."""
    lower = {known.lower(): known for known in names}
    number = 1 if str(name).lower() in lower else 3  # the same but for capitals: no other is meant
    close = difflib.get_close_matches(str(name).lower(), lower, number, 0.6)
    close = [lower[key] for key in close]
    return f'did you mean {" or ".join(close)}? ' if close else ''
