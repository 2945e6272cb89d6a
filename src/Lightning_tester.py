"""Step 3: score each model on the images that it was not trained on, then predict TEST_PATH.

Reads   OUTPUT/models.csv and its checkpoints; TRAIN_FOLDS with the images and masks (TRAIN_PATH,
        MASK_PATH, IMAGE_PREFIX, IMAGE_SUFFIX, MASK_PREFIX, MASK_SUFFIX, TRAIN_CSV,
        EMPTY_IF_NO_MASK) of FOLDS; the images of TEST_PATH (TEST_SUFFIX), in the order of TEST_CSV.
Writes  in OUTPUT oof.csv: img,kfold,dice,iou at each image's own size; submission.csv:
        img,rle_mask (RLE_ORDER); oof_worst.png, oof_histogram.png, test_samples.png; model_fold#/
        for smp.from_pretrained; with SAVE_MASKS, or several classes, test_masks/<img>.png.

Every model is rebuilt from the constants in its checkpoint. THRESHOLD=None chooses the threshold
that is best out of fold. TTA also predicts the mirrored image. RESUME continues the test images of
a killed run. With PATH, a checkpoint or a list of them, the script only predicts TEST_PATH, with
their mean. Hardware and speed: ACCELERATOR, DEVICES, VAL_BATCH_SIZE, NUM_WORKERS, PRECISION.

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

import command_line
import config
import files
import folds
import images
import metrics
import plots
import predictor
import runtime
from Lightning_module import CarvanaModel

# Thresholds to try on the out-of-fold predictions; closer together near 0 and 1.
THRESHOLDS = [p / 100 for p in (*range(1, 5), *range(5, 96, 5), *range(96, 100))]
# Models that differ in these constants cannot be averaged: a pixel of their masks is not the same.
MASK_MEANING = {'CROP_SIZE', 'SCALE', 'CHANNELS', 'CLASSES', 'IGNORE_INDEX', 'MASK_COLOURS'}
FROM_CHECKPOINT = MASK_MEANING | {'MODEL_NAME', 'MODEL_MEAN', 'MODEL_STD'}  # not from config.py


def main() -> None:
    runtime.set_rank()
    runtime.hide_warnings()
    if config.PATH is None:
        fold_models = load_models()
        models = list(fold_models.values())
    else:
        models = load_checkpoints([config.PATH] if isinstance(config.PATH, str) else config.PATH)
    output, rank_zero = config.path(config.OUTPUT), rank_zero_only.rank == 0
    files.check_writable(output)
    busy = f'another tester is running in {output}: wait, or set another OUTPUT'
    with files.file_lock(output / '.test.lock', busy) if rank_zero else nullcontext():
        test_files = predictor.list_test_files(models[0])
        if config.PATH is None:
            threshold = score_out_of_fold(fold_models)
        else:
            threshold = config.THRESHOLD or 0.5
            runtime.print_once(f'PATH is set: no scores, no export; the threshold is {threshold}')
        predict_test(models, threshold, test_files)
        if config.PATH is None and rank_zero:
            for fold, model in fold_models.items():
                export(model, output / f'model_fold{fold}', threshold)
            print(f'{config.OUTPUT}/model_fold#: the models for smp.from_pretrained')


# ------------------------------------------------------------ models
def load_models() -> dict[int, CarvanaModel]:
    """Fold -> its best model, for each trained fold of FOLDS."""
    table = files.read_models()
    table = table[table.fold.isin(config.FOLDS)]
    if table.empty:
        raise config.UserMistake(f'FOLDS={config.FOLDS}: none is trained: run Lightning_trainer.py')
    untrained = sorted(set(config.FOLDS) - set(table.fold))
    if untrained:
        runtime.print_once(f'folds not trained yet, left out: {files.first_few(untrained)}')
    return dict(zip(table.fold, load_checkpoints(table.checkpoint.tolist())))


def load_checkpoints(names: list[str]) -> list[CarvanaModel]:
    """The models in some checkpoints. Prints how they differ from each other and from config.py.

    Raises:
        config.UserMistake: if their masks mean different things.
    """
    models = [load_model(name) for name in names]
    first, differing = models[0].hparams, set()
    for name, model in zip(names, models):
        differing |= differing_constants(first, model.hparams)
        if differing & MASK_MEANING:
            raise config.UserMistake(
                f'{names[0]} and {name} differ in {", ".join(sorted(differing & MASK_MEANING))}: '
                'their masks cannot be averaged: set FOLDS or PATH to other models, or train again'
            )
    if differing:
        shown = ', '.join(sorted(differing))
        runtime.print_once(f'the models differ in {shown}: averaged all the same')
    unused = FROM_CHECKPOINT & differing_constants(first, config.constants())
    if unused:
        shown = ', '.join(sorted(unused))
        runtime.print_once(f"the checkpoint's values count, not config.py's: {shown}")
    return models


def differing_constants(first: dict, other: dict) -> set[str]:
    """As config.differing_constants, but CROP_SIZE=96 and (96, 96) are the same."""
    names = set(config.differing_constants(first, other))
    if config.pair(first['CROP_SIZE']) == config.pair(other['CROP_SIZE']):
        names.discard('CROP_SIZE')
    return names


def load_model(name: str) -> CarvanaModel:
    """The model in a checkpoint, rebuilt from the constants saved in it; code in it is never run."""
    file = config.path(name)
    if not file.is_file():
        raise config.UserMistake(
            f'{name}: no such checkpoint: run Lightning_trainer.py, or set PATH to a .ckpt file'
        )
    try:
        model = CarvanaModel.load_from_checkpoint(file, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file raises whatever pickle, zipfile and torch raise
        raise config.UserMistake(f'{name}: not a checkpoint ({config.shorten(error)})') from None
    if not all(weight.isfinite().all() for weight in model.state_dict().values()):
        raise config.UserMistake(f'{name}: its weights are not finite: train it again')
    size = 'x'.join(map(str, model.input_size[:2]))
    runtime.print_once(f'{name}: {model.hparams.MODEL_NAME}, {size} pixels')
    return model.eval()


def export(model: CarvanaModel, folder: Path, threshold: float) -> None:
    """Write the network for smp.from_pretrained. Its config.json also says how to use it."""
    # The underscore tells smp that a name is no argument of the model. mean and std are of 0..1.
    model.model.config.update(
        _mean=model.hparams.MODEL_MEAN,
        _std=model.hparams.MODEL_STD,
        _input_size=model.input_size[:2],
        _scale=model.hparams.SCALE,
        _classes=model.hparams.CLASSES,
        _threshold=threshold,
    )
    model.model.save_pretrained(folder)


# ------------------------------------------------------------ out of fold
def score_out_of_fold(models: dict[int, CarvanaModel]) -> float:
    """Score each model on its own validation images; write oof.csv and pictures.

    Returns: the threshold for the test images: THRESHOLD, or the best one found here.

    Raises:
        config.UserMistake: if a fold of TRAIN_FOLDS has other images than its model was validated
            on: it could hold images that the model was trained on.
    """
    if not files.is_file(config.TRAIN_FOLDS):
        threshold = config.THRESHOLD or 0.5
        reason = f'{config.TRAIN_FOLDS} does not exist: no out-of-fold scores'
        runtime.print_once(f'{reason}; the threshold is {threshold}')
        return threshold
    for fold, model in models.items():
        saved = model.image_digests
        if saved and saved['val'] != folds.digests(fold)['val']:
            raise config.UserMistake(
                f'fold {fold} of {config.TRAIN_FOLDS} has other images than when it was trained: run '
                'Lightning_trainer.py again, restore the old file, or set PATH to predict only'
            )
    table = folds.read_folds(list(models)).sort_values(['kfold', 'img'])
    pairs = dict(zip(table.img, files.pairs_of(table.img)))
    hparams = next(iter(models.values())).hparams
    thresholds = [0.5]
    if hparams.CLASSES == 1:
        thresholds = sorted({*THRESHOLDS, config.THRESHOLD or 0.5})
    counts = []
    for fold, rows in table.groupby('kfold'):
        runner = predictor.Predictor([models[fold]], thresholds, config.TTA)
        image_files, mask_files = zip(*(pairs[name] for name in rows.img))
        batches = predictor.ImageBatches(image_files, models[fold], mask_files)
        counts += predictor.predict(runner, batches)
    counts = torch.from_numpy(np.stack(counts))  # (N, T, 3, K)
    dice, iou = (x.reshape(counts.shape[:2]) for x in metrics.dice_and_iou(counts.flatten(0, 1)))
    means, half = dice.mean(0), thresholds.index(0.5)
    chosen = half
    if config.THRESHOLD in thresholds:
        chosen = thresholds.index(config.THRESHOLD)
    elif means.max() > means[half] + 1e-6:  # not only by rounding
        chosen = int(means.argmax())
    table['dice'], table['iou'] = dice[:, chosen].numpy(), iou[:, chosen].numpy()
    if rank_zero_only.rank == 0:
        output = config.path(config.OUTPUT)
        files.write_table(table[['img', 'kfold', 'dice', 'iou']], output / 'oof.csv')
        print(f"out of fold, at the images' own size{runtime.trial_note(hparams.LIMIT_BATCHES)}")
        print_scores(table)
        if hparams.CLASSES > 1:
            print_classes(counts[:, 0])
        else:
            why = 'tuned on these images' if config.THRESHOLD is None else 'as set'
            scores = f'mean Dice {means[chosen]:.4f} ({means[half]:.4f} at 0.5)'
            print(f'threshold {thresholds[chosen]}: {scores}, {why}')
    draw_out_of_fold(table, pairs, models, thresholds[chosen])
    return thresholds[chosen]


def print_scores(table: pd.DataFrame) -> None:
    """Print mean Dice and IoU per fold and overall, and the ten worst images."""
    rows = pd.concat([table, table.assign(kfold='all')]).rename(columns={'kfold': 'fold'})
    scores = rows.groupby('fold', sort=False, as_index=False).agg(
        images=('img', 'size'), Dice=('dice', 'mean'), spread=('dice', 'std'), IoU=('iou', 'mean')
    )
    print(scores.to_string(index=False, float_format='%.4f'))
    worst = table.nsmallest(10, 'dice')[['dice', 'img']]
    print('worst Dice:')
    print(worst.to_string(index=False, header=False, float_format='%.4f'))


def print_classes(counts: torch.Tensor) -> None:
    """Print Dice and IoU per class, and the data set's IoU, from counts (N, 3, K)."""
    columns = ['Dice per image', 'IoU per image', 'IoU of the data set']
    table = pd.DataFrame(torch.stack(metrics.class_means(counts), 1).numpy(), columns=columns)
    table.loc['mean'] = table.mean()
    print(table.rename_axis('class').reset_index().to_string(index=False, float_format='%.4f'))


def draw_out_of_fold(table: pd.DataFrame, pairs: dict, models: dict, threshold: float) -> None:
    """Draw oof_worst.png, the worst and typical images, and oof_histogram.png.

    Args:
        pairs: image name -> image file and mask.
    """
    ordered, panels = table.sort_values('dice'), []
    middle = max(4, len(ordered) // 2 - 2)
    rows = ordered[:4].assign(kind='worst'), ordered[middle : middle + 4].assign(kind='typical')
    for row in pd.concat(rows).itertuples():
        (image_file, mask_file), model = pairs[row.img], models[row.kfold]
        runner = predictor.Predictor([model], [threshold], config.TTA)
        (mask,) = predictor.predict(runner, predictor.ImageBatches([image_file], model))
        image, truth = images.read_image(image_file), images.read_mask(mask_file, *model.mask_rule)
        panels.append((row.kind, row.img, image, truth, mask, row.dice))
    if rank_zero_only.rank > 0:
        return
    title = 'Out of fold: the worst, then typical images'
    worst = plots.comparison(panels, title, model.hparams.CLASSES, model.ignored)
    title = f'{len(table)} images out of fold, mean {table.dice.mean():.4f}'
    plots.save(worst, config.path(config.OUTPUT) / 'oof_worst.png')
    plots.save(plots.histogram(table.dice, title), config.path(config.OUTPUT) / 'oof_histogram.png')
    print(f'{config.OUTPUT}/oof.csv, oof_worst.png, oof_histogram.png')


# ------------------------------------------------------------ test images
def predict_test(models: list[CarvanaModel], threshold: float, test_files: list[Path]) -> None:
    """Predict the test images with the mean of the models: submission.csv, masks, a picture."""
    if not test_files:
        return
    classes, output = models[0].hparams.CLASSES, config.path(config.OUTPUT)
    # Run lengths cannot store several classes.
    mask_folder = output / 'test_masks' if config.SAVE_MASKS or classes > 1 else None
    runner = predictor.Predictor(models, [threshold], config.TTA)
    batches = predictor.ImageBatches(test_files, models[0])
    predictor.write_submission(runner, batches, mask_folder)
    if rank_zero_only.rank > 0:
        return
    samples, rows = {}, pd.read_csv(output / 'submission.csv', nrows=8)
    for image_file, row in zip(test_files, rows.itertuples()):
        image = images.read_image(image_file)
        if classes == 1:
            mask = images.rle_decode(row.rle_mask, image.shape[:2], config.RLE_ORDER)
        else:
            mask = images.read_mask(mask_folder / Path(row.img).with_suffix('.png'), classes)
        samples[row.img] = image, mask
    plots.save(plots.samples(samples, classes), output / 'test_samples.png')
    print(f'{len(test_files)} images of {config.TEST_PATH}: submission.csv, test_samples.png')
    if classes > 1:
        print('test_masks/ has the classes; rle_mask in submission.csv is all of them except 0')


if __name__ == '__main__':
    command_line.run(main, __doc__)
