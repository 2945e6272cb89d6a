"""Step 3: score each model on the images that it was not trained on, then predict TEST_PATH.

Reads   OUTPUT/models.csv and its checkpoints, or the one checkpoint PATH; TRAIN_FOLDS with the
        images and masks (TRAIN_PATH, MASK_PATH, IMAGE_PREFIX, IMAGE_SUFFIX, MASK_PREFIX, MASK_SUFFIX,
        TRAIN_CSV) of FOLDS; the images of TEST_PATH (TEST_SUFFIX), in the order of TEST_CSV.
Writes  OUTPUT/oof.csv: img,kfold,dice,iou at each image's own size; oof_worst.png,
        oof_histogram.png; OUTPUT/submission.csv: img,rle_mask (RLE_ORDER); test_samples.png;
        with SAVE_MASKS, or several classes, OUTPUT/test_masks/<img>.png; OUTPUT/model_fold#/,
        each model for smp.from_pretrained.

Every model is rebuilt from the constants in its checkpoint. THRESHOLD=None chooses the threshold
that is best out of fold. TTA also predicts the mirrored image. RESUME continues the test images of
a killed run. Hardware and speed: ACCELERATOR, DEVICES, VAL_BATCH_SIZE, NUM_WORKERS, PRECISION.

    python Lightning_tester.py
    python Lightning_tester.py TEST_PATH=/my/images PATH=lightning_logs/version_0/checkpoints/last.ckpt
"""

import os
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # as in Lightning_trainer.py

import numpy as np
import pandas as pd
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import Subset

import command_line
import config
import files
import folds
import images
import masks
import metrics
import plots
import predictor
import runtime
from Lightning_module import CarvanaModel

# Thresholds to try on the out-of-fold predictions; closer together near 0 and 1.
THRESHOLDS = [p / 100 for p in (*range(1, 5), *range(5, 96, 5), *range(96, 100))]


def main() -> None:
    runtime.hide_warnings()
    models = load_models()
    output = config.path(config.OUTPUT)
    files.check_writable(output)
    busy = f'another tester is running in {output}: wait, or set another OUTPUT'
    with files.file_lock(output / '.test.lock', busy) if not rank_zero_only.rank else nullcontext():
        test_files = predictor.list_test_files(next(iter(models.values())))
        threshold = score_out_of_fold(models)
        predict_test(models, threshold, test_files)
        if rank_zero_only.rank == 0:
            for fold, model in models.items():
                model.export(output / f'model_fold{fold}', threshold)
            print(f'{config.OUTPUT}/model_fold#: the models for smp.from_pretrained')


# ------------------------------------------------------------ models
def load_models() -> dict[int, CarvanaModel]:
    """Fold -> model: the checkpoint PATH alone, or the best one of each trained fold of FOLDS."""
    if config.PATH is not None:
        model = load_model(config.PATH)
        return {model.hparams.val_folds[0]: model}
    table = files.read_models()
    table = table[table.fold.isin(config.FOLDS)]
    if table.empty:
        raise config.UserMistake(f'FOLDS={config.FOLDS}: none is trained: run Lightning_trainer.py')
    untrained = sorted(set(config.FOLDS) - set(table.fold))
    if untrained:
        runtime.print_once(f'folds not trained yet, left out: {files.first_few(untrained)}')
    models = {row.fold: load_model(row.checkpoint) for row in table.itertuples()}
    first = next(iter(models.values())).hparams
    for row in table.itertuples():
        other = models[row.fold].hparams
        for name in config.differing_constants(first, other):
            raise config.UserMistake(
                f'{table.checkpoint.iloc[0]} has {name}={first[name]!r}, {row.checkpoint} has '
                f'{name}={other[name]!r}: models with different constants cannot be averaged: '
                'train them again, or set FOLDS or PATH'
            )
    return models


def load_model(file: str) -> CarvanaModel:
    """The model in a checkpoint, rebuilt from the constants saved in it; code in it is never run."""
    if not config.path(file).is_file():
        raise config.UserMistake(
            f'{file}: no such checkpoint: run Lightning_trainer.py, or set PATH to a .ckpt file'
        )
    try:
        model = CarvanaModel.load_from_checkpoint(
            config.path(file), map_location='cpu', weights_only=True
        )
    except Exception as error:  # a damaged file raises whatever pickle, zipfile and torch raise
        raise config.UserMistake(
            f'{file}: not a checkpoint that can be loaded ({config.shorten(error)})'
        ) from None
    if not all(weight.isfinite().all() for weight in model.state_dict().values()):
        raise config.UserMistake(f'{file}: its weights are not finite: train it again')
    size = 'x'.join(map(str, model.input_size[:2]))
    runtime.print_once(f'{file}: {model.hparams.MODEL_NAME}, {size} pixels')
    return model.eval()


# ------------------------------------------------------------ out of fold
def score_out_of_fold(models: dict[int, CarvanaModel]) -> float:
    """Score each model on its own validation images; write oof.csv and pictures.

    Returns: the threshold for the test images: THRESHOLD, or the best one found here.
    """
    reason = why_not_scored(models)
    if reason and config.PATH is None and files.is_file(config.TRAIN_FOLDS):
        raise config.UserMistake(
            f'{reason}: run Lightning_trainer.py again, or restore the old file'
        )
    if reason:
        threshold = config.THRESHOLD or 0.5
        runtime.print_once(f'{reason}: no out-of-fold scores; the threshold is {threshold}')
        return threshold
    hparams = next(iter(models.values())).hparams
    classes = hparams.CLASSES
    thresholds = sorted({*THRESHOLDS, config.THRESHOLD or 0.5}) if classes == 1 else [0.5]
    table, counts = folds.read_folds(list(models)).sort_values(['kfold', 'img']), []
    pairs = dict(zip(table.img, files.pairs_of(table.img)))
    for fold, rows in table.groupby('kfold'):
        runner = predictor.Predictor([models[fold]], thresholds, config.TTA)
        image_files, mask_files = zip(*(pairs[name] for name in rows.img))
        batches = predictor.ImageBatches(image_files, models[fold], mask_files)
        counts += predictor.predict(runner, batches)
    counts = torch.from_numpy(np.stack(counts))  # (N, T, 3, K)
    dice, iou = (x.reshape(counts.shape[:2]) for x in metrics.dice_and_iou(counts.flatten(0, 1)))
    means = dice.mean(0)
    chosen, half = int(means.argmax()), thresholds.index(0.5)
    if config.THRESHOLD in thresholds:
        chosen = thresholds.index(config.THRESHOLD)
    elif means[chosen] <= means[half] + 1e-6:  # not better than 0.5, except for rounding
        chosen = half
    threshold = thresholds[chosen]
    table['dice'], table['iou'] = dice[:, chosen].numpy(), iou[:, chosen].numpy()
    if rank_zero_only.rank == 0:
        output = config.path(config.OUTPUT)
        files.write_table(table[['img', 'kfold', 'dice', 'iou']], output / 'oof.csv')
        print_scores(table, runtime.trial_note(hparams.get('LIMIT_BATCHES')))
        if classes > 1:
            print_classes(counts[:, 0])
        else:
            why = 'as set' if config.THRESHOLD else 'tuned on these images'
            scores = f'mean Dice {means[chosen]:.4f} ({means[half]:.4f} at 0.5)'
            print(f'threshold {threshold}: {scores}, {why}')
    draw_out_of_fold(table, pairs, models, threshold)
    return threshold


def why_not_scored(models: dict[int, CarvanaModel]) -> str:
    """The reason why there can be no out-of-fold scores; '' if there can."""
    if not files.is_file(config.TRAIN_FOLDS):
        return f'{config.TRAIN_FOLDS} does not exist'
    if config.PATH is not None and not config.path(config.TRAIN_PATH).is_dir():
        return f'{config.TRAIN_PATH} does not exist'
    for fold, model in models.items():
        saved = model.image_digests
        if saved and saved['val'] != folds.digests(fold)['val']:
            return f'fold {fold} of {config.TRAIN_FOLDS} has other images than when it was trained'
    try:
        files.pairs_of(folds.read_folds(list(models)).img)
    except config.UserMistake as mistake:
        return str(mistake)
    return ''


def print_scores(table: pd.DataFrame, note: str) -> None:
    """Print mean Dice and IoU per fold and overall, and the ten worst images."""
    scores = table.groupby('kfold').agg(
        images=('img', 'size'), Dice=('dice', 'mean'), spread=('dice', 'std'), IoU=('iou', 'mean')
    )
    scores.index.name = 'fold'
    scores.loc['all'] = [len(table), table.dice.mean(), table.dice.std(), table.iou.mean()]
    scores['images'] = scores.images.astype(int)
    print(f"out of fold, at the images' own size{note}")
    print(scores.to_string(float_format='%.4f'))
    print('worst Dice:')
    worst = table.nsmallest(10, 'dice')[['dice', 'img']]
    print(worst.to_string(index=False, header=False, float_format='%.4f'))


def print_classes(counts: torch.Tensor) -> None:
    """Print Dice and IoU per class, and the data set's IoU, from counts (N, 3, K)."""
    dice, iou, whole = metrics.class_means(counts)
    columns = {'Dice per image': dice, 'IoU per image': iou, 'IoU of the data set': whole}
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    table.index.name = 'class'
    table.loc['mean'] = table.mean()
    print(table.to_string(float_format='%.4f'))


def draw_out_of_fold(table: pd.DataFrame, pairs: dict, models: dict, threshold: float) -> None:
    """oof_worst.png: the worst and typical images with truth, prediction and errors;
    oof_histogram.png: the distribution of the Dice. `pairs`: name -> image file and mask."""
    ordered, panels = table.sort_values('dice'), []
    middle = max(4, len(ordered) // 2 - 2)
    rows = ordered[:4].assign(kind='worst'), ordered[middle : middle + 4].assign(kind='typical')
    first = next(iter(models.values()))
    for row in pd.concat(rows).itertuples():
        # Predict the image's whole batch again, to get exactly the mask that was scored.
        names = table.img[table.kfold == row.kfold].tolist()
        image_files = [pairs[name][0] for name in names]
        batches = predictor.ImageBatches(image_files, models[row.kfold])
        number, place = divmod(names.index(row.img), batches.batch_size)
        batch = Subset(batches, [number])
        runner = predictor.Predictor([models[row.kfold]], [threshold], config.TTA)
        mask = predictor.predict(runner, batch)[place]
        image_file, mask_file = pairs[row.img]
        image, truth = images.read_image(image_file), masks.read_mask(mask_file, *first.mask_rule)
        panels.append((row.kind, row.img, image, truth, mask, row.dice))
    if rank_zero_only.rank:
        return
    output, title = config.path(config.OUTPUT), 'Out of fold: the worst, then typical images'
    plots.save(
        plots.comparison(panels, title, first.hparams.CLASSES, first.ignored),
        output / 'oof_worst.png',
    )
    title = f'{len(table)} images out of fold, mean {table.dice.mean():.4f}'
    plots.save(plots.histogram(table.dice, 'Dice', title), output / 'oof_histogram.png')
    print(f'{config.OUTPUT}/oof.csv, oof_worst.png, oof_histogram.png')


# ------------------------------------------------------------ test images
def predict_test(models: dict[int, CarvanaModel], threshold: float, test_files: list[Path]) -> None:
    """Predict the test images with the mean of the models: submission.csv, masks, a picture."""
    if not test_files:
        return
    first = next(iter(models.values()))
    classes, output = first.hparams.CLASSES, config.path(config.OUTPUT)
    # Run lengths cannot store several classes.
    mask_folder = output / 'test_masks' if config.SAVE_MASKS or classes > 1 else None
    checkpoints = files.read_models().checkpoint if config.PATH is None else [config.PATH]
    stats = [(str(c), config.path(c).stat().st_mtime_ns) for c in checkpoints]
    runner = predictor.Predictor(list(models.values()), [threshold], config.TTA)
    batches = predictor.ImageBatches(test_files, first)
    state = [stats, config.FOLDS, config.RLE_ORDER]
    if not predictor.write_submission(runner, batches, state, mask_folder):
        return
    samples, rows = {}, pd.read_csv(output / 'submission.csv', nrows=8)
    for image_file, row in zip(test_files, rows.itertuples()):
        image = images.read_image(image_file)
        if classes == 1:
            mask = masks.rle_decode(row.rle_mask, image.shape[:2], config.RLE_ORDER)
        else:
            mask = masks.read_mask(mask_folder / Path(row.img).with_suffix('.png'), classes)
        samples[row.img] = image, mask
    plots.save(plots.samples(samples, classes), output / 'test_samples.png')
    note = runtime.trial_note(first.hparams.get('LIMIT_BATCHES'))
    print(f'{len(test_files)} images of {config.TEST_PATH}: submission.csv, test_samples.png{note}')


if __name__ == '__main__':
    command_line.run(main, __doc__)
