"""Step 2: train one model per fold of FOLDS, each in a process of its own.

Reads   TRAIN_FOLDS, TRAIN_PATH, MASK_PATH (IMAGE_SUFFIX, MASK_SUFFIX); ENCODER_WEIGHTS.
Writes  LOGS_PATH/version_#/ for each fold: checkpoints (best by val_dice, and last.ckpt),
        hparams.yaml, metrics.csv, TensorBoard events, curves.png, profile.txt;
        OUTPUT/models.csv: fold,version,checkpoint,val_dice,val_iou; OUTPUT/cache with CACHE.

The model is MODEL_NAME on images of CROP_SIZE (CHANNELS, CLASSES, IGNORE_INDEX, MODEL_MEAN,
MODEL_STD, AUGMENTATION), trained by Adam at LR on LOSS (LOSS_ARGS) for EPOCHS, with
TRAIN_BATCH_SIZE, VAL_BATCH_SIZE, ACCUMULATE_GRAD_BATCHES, PRECISION, SEED, NUM_WORKERS, COMPILE, on
ACCELERATOR, DEVICES, NUM_NODES, STRATEGY. RESUME goes on where the last run stopped.

    python Lightning_trainer.py
    python Lightning_trainer.py FOLDS=[0] EPOCHS=1 CROP_SIZE=256
"""

import config

if __name__ == '__main__':
    import command_line

    command_line.start(__doc__)

import os
import signal
import subprocess
import sys
import time


def main() -> None:
    if 'TRAINS_ONE_FOLD' in os.environ:
        import fold_trainer  # and with it torch, which this process needs not

        fold_trainer.train_fold(config.FOLDS[0])
    else:
        train_all()


def train_all() -> None:
    """Train each fold by this script in a new process, so that nothing of one reaches the next."""
    import folds
    import tables

    start = time.monotonic()
    folds.check_up_to_date()
    tables.check_writable('OUTPUT')
    for fold in config.FOLDS:
        words = [word for word in sys.argv[1:] if not word.startswith('FOLDS=')]
        command = [sys.executable, __file__, *words, f'FOLDS=[{fold}]']
        child = subprocess.Popen(command, env=environment(fold))
        # Ctrl-C reaches the child by itself; SIGTERM is sent to one process and passed on here.
        signal.signal(signal.SIGTERM, lambda *_, child=child: child.terminate())
        try:
            status = child.wait()
        except KeyboardInterrupt:
            status = child.wait()
        if status < 0 and status != -signal.SIGINT:
            hint = ' (often: no main memory left)' * (status == -signal.SIGKILL)
            print(
                f'fold {fold}: its process was ended by {signal.Signals(-status).name}{hint}; '
                'RESUME=True goes on after its last finished epoch',
                file=sys.stderr,
            )
        if status:
            sys.exit(status if status > 0 else 128 - status)
    if len(config.FOLDS) == 1 or int(os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0):
        return
    models = tables.read_models()
    models = models[models.fold.isin(config.FOLDS)]
    print(models.to_string(index=False))
    print(
        f'val_dice {models.val_dice.mean():.4f} +- {models.val_dice.std(ddof=0):.4f} over '
        f'{len(models)} folds at CROP_SIZE, {(time.monotonic() - start) / 60:.1f} minutes, '
        f'{tables.relative(tables.models_file())}'
    )


def environment(fold: int) -> dict:
    """Of a fold's process. Where torchrun or SLURM has started several of this script, each fold's
    processes meet at a port of their own: those of the last fold may not all have left theirs."""
    own = {**os.environ, 'TRAINS_ONE_FOLD': 'yes'}
    if 'MASTER_PORT' in own:
        own['MASTER_PORT'] = str(int(own['MASTER_PORT']) + 1 + fold)
        own['TORCHELASTIC_USE_AGENT_STORE'] = 'False'  # which is at the port that it was given
    elif int(own.get('SLURM_NTASKS') or 1) > 1:
        own['MASTER_PORT'] = str(15000 + 100 * (int(own['SLURM_JOB_ID']) % 100) + fold)
    return own


if __name__ == '__main__':
    command_line.run(main)
