"""Step 3: score each model on the images that it was not trained on, then predict TEST_PATH.

Reads   OUTPUT/models.csv and its checkpoints; TRAIN_FOLDS with the images and masks (TRAIN_PATH,
        MASK_PATH, IMAGE_PREFIX, IMAGE_SUFFIX, MASK_PREFIX, MASK_SUFFIX, TRAIN_CSV) of FOLDS; the
        images of TEST_PATH (TEST_SUFFIX), in the order of TEST_CSV.
Writes  OUTPUT/oof.csv: img,kfold,dice,iou at each image's own size; oof_worst.png,
        oof_histogram.png; OUTPUT/submission.csv: img,rle_mask (RLE_ORDER); test_samples.png;
        with SAVE_MASKS, or several classes, OUTPUT/test_masks/<img>.png; OUTPUT/model_fold#/,
        each model for smp.from_pretrained.

Every model is rebuilt from the constants in its checkpoint. THRESHOLD=None chooses the threshold
that is best out of fold. TTA also predicts the mirrored image. RESUME continues the test images of
a killed run. With PATH, a checkpoint or a list of them, the script only predicts TEST_PATH, with
the mean of these models. Hardware and speed: ACCELERATOR, DEVICES, VAL_BATCH_SIZE, NUM_WORKERS,
PRECISION.

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
MASK_MEANING = ['CROP_SIZE', 'SCALE', 'CHANNELS', 'CLASSES', 'IGNORE_INDEX', 'MASK_COLOURS']
FROM_CHECKPOINT = [
    'MODEL_NAME',
    *MASK_MEANING,
    'MODEL_MEAN',
    'MODEL_STD',
]  # config.py's are not used


def main() -> None:
    runtime.cluster_plugins()  # sets the rank
    runtime.hide_warnings()
    if config.PATH is None:
        fold_models = load_models()
        models = list(fold_models.values())
    else:
        checkpoints = [config.PATH] if isinstance(config.PATH, str) else config.PATH
        models = load_checkpoints(checkpoints)
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
    first, differing = with_size_as_pair(models[0].hparams), {}
    for name, model in zip(names, models):
        other = with_size_as_pair(model.hparams)
        for constant in config.differing_constants(first, other):
            values = f'{first[constant]!r}, {other[constant]!r}'
            differing[constant] = f'{constant} ({values})'
            if constant in MASK_MEANING:
                raise config.UserMistake(
                    f'{names[0]} and {name} differ in {constant} ({values}): their masks cannot be '
                    'averaged: set FOLDS or PATH to models that agree in it, or train again'
                )
    if differing:
        shown = ', '.join(differing.values())
        runtime.print_once(f'the models differ in {shown}: averaged all the same')
    ours = with_size_as_pair(config.constants())
    wanted = [name for name in FROM_CHECKPOINT if first.get(name) != ours[name]]
    if wanted:
        shown = '; '.join(f'{name}={first.get(name)!r}, not {ours[name]!r}' for name in wanted)
        runtime.print_once(f"the checkpoint's values count, not config.py's: {shown}")
    return models


def with_size_as_pair(constants: dict) -> dict:
    """Constants whose CROP_SIZE can be compared: 96 and (96, 96) are the same."""
    return {**constants, 'CROP_SIZE': config.pair(constants['CROP_SIZE'])}


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


def export(model: CarvanaModel, folder: Path, threshold: float) -> None:
    """Write the network for segmentation_models_pytorch.from_pretrained.

    Its config.json also says how to use it; mean and std are of images scaled to 0..1.
    """
    # The underscore tells smp that a name is no argument of the model.
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
    """
    if not files.is_file(config.TRAIN_FOLDS):
        threshold = config.THRESHOLD or 0.5
        reason = f'{config.TRAIN_FOLDS} does not exist: no out-of-fold scores'
        runtime.print_once(f'{reason}; the threshold is {threshold}')
        return threshold
    check_unseen(models)
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
    means = dice.mean(0)
    chosen, half = choose_threshold(means, thresholds), thresholds.index(0.5)
    table['dice'], table['iou'] = dice[:, chosen].numpy(), iou[:, chosen].numpy()
    if rank_zero_only.rank == 0:
        output = config.path(config.OUTPUT)
        files.write_table(table[['img', 'kfold', 'dice', 'iou']], output / 'oof.csv')
        print_scores(table, runtime.trial_note(hparams.get('LIMIT_BATCHES')))
        if hparams.CLASSES > 1:
            print_classes(counts[:, 0])
        else:
            why = 'tuned on these images' if config.THRESHOLD is None else 'as set'
            scores = f'mean Dice {means[chosen]:.4f} ({means[half]:.4f} at 0.5)'
            print(f'threshold {thresholds[chosen]}: {scores}, {why}')
    draw_out_of_fold(table, pairs, models, thresholds[chosen])
    return thresholds[chosen]


def check_unseen(models: dict[int, CarvanaModel]) -> None:
    """Raise config.UserMistake if a fold of TRAIN_FOLDS no longer holds the images that its model was
    validated on: it could hold images that the model was trained on."""
    for fold, model in models.items():
        saved = model.image_digests
        if saved and saved['val'] != folds.digests(fold)['val']:
            raise config.UserMistake(
                f'fold {fold} of {config.TRAIN_FOLDS} has other images than when it was trained: run '
                'Lightning_trainer.py again, restore the old file, or set PATH to predict only'
            )


def choose_threshold(means: torch.Tensor, thresholds: list[float]) -> int:
    """The place of the threshold to use: THRESHOLD, or the one with the best mean Dice (T,)."""
    if config.THRESHOLD in thresholds:
        return thresholds.index(config.THRESHOLD)
    best, half = int(means.argmax()), thresholds.index(0.5)
    better = means[best] > means[half] + 1e-6  # and not only by rounding
    return best if better else half


def print_scores(table: pd.DataFrame, note: str) -> None:
    """Print mean Dice and IoU per fold and overall, and the ten worst images."""
    scores = table.groupby('kfold').agg(
        images=('img', 'size'), Dice=('dice', 'mean'), spread=('dice', 'std'), IoU=('iou', 'mean')
    )
    scores.loc['all'] = [len(table), table.dice.mean(), table.dice.std(), table.iou.mean()]
    scores['images'] = scores.images.astype(int)
    print(f"out of fold, at the images' own size{note}")
    scores = scores.rename_axis('fold').reset_index()
    print(scores.to_string(index=False, float_format='%.4f'))
    worst = table.nsmallest(10, 'dice')[['dice', 'img']]
    print('worst Dice:')
    print(worst.to_string(index=False, header=False, float_format='%.4f'))


def print_classes(counts: torch.Tensor) -> None:
    """Print Dice and IoU per class, and the data set's IoU, from counts (N, 3, K)."""
    dice, iou, data_set = metrics.class_means(counts)
    columns = {'Dice per image': dice, 'IoU per image': iou, 'IoU of the data set': data_set}
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    table.loc['mean'] = table.mean()
    table = table.rename_axis('class').reset_index()
    print(table.to_string(index=False, float_format='%.4f'))


def draw_out_of_fold(table: pd.DataFrame, pairs: dict, models: dict, threshold: float) -> None:
    """oof_worst.png: the worst and typical images with truth, prediction and errors;
    oof_histogram.png: the distribution of the Dice. `pairs`: name -> image file and mask."""
    ordered, panels = table.sort_values('dice'), []
    middle = max(4, len(ordered) // 2 - 2)
    rows = ordered[:4].assign(kind='worst'), ordered[middle : middle + 4].assign(kind='typical')
    first_model = next(iter(models.values()))
    for row in pd.concat(rows).itertuples():
        (image_file, mask_file), model = pairs[row.img], models[row.kfold]
        runner = predictor.Predictor([model], [threshold], config.TTA)
        (mask,) = predictor.predict(runner, predictor.ImageBatches([image_file], model))
        image, truth = images.read_image(image_file), images.read_mask(mask_file, *model.mask_rule)
        panels.append((row.kind, row.img, image, truth, mask, row.dice))
    if rank_zero_only.rank > 0:
        return
    output, title = config.path(config.OUTPUT), 'Out of fold: the worst, then typical images'
    plots.save(
        plots.comparison(panels, title, first_model.hparams.CLASSES, first_model.ignored),
        output / 'oof_worst.png',
    )
    title = f'{len(table)} images out of fold, mean {table.dice.mean():.4f}'
    plots.save(plots.histogram(table.dice, 'Dice', title), output / 'oof_histogram.png')
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
    if not predictor.write_submission(runner, batches, mask_folder):
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


if __name__ == '__main__':
    command_line.run(main, __doc__)
