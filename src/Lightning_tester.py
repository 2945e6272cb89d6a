"""Step 3: score every fold's model on the images that it never saw; predict TEST_PATH.

Reads   OUTPUT/models.csv and its checkpoints, or the one checkpoint PATH; TRAIN_FOLDS with the
        images and masks (TRAIN_PATH, MASK_PATH, IMAGE_SUFFIX, MASK_SUFFIX) of FOLDS; the images of
        TEST_PATH, in the order of TEST_CSV if it exists.
Writes  OUTPUT/oof.csv: img,kfold,dice,iou at each image's own size; oof_worst.png,
        oof_histogram.png; OUTPUT/submission.csv: img,rle_mask; test_samples.png; with SAVE_MASKS,
        or several classes, OUTPUT/test_masks/<img>.png; OUTPUT/model_fold#/, each model for
        smp.from_pretrained.

Every model is rebuilt from the constants in its own checkpoint. THRESHOLD=None is tuned on the
out-of-fold predictions. TTA adds the mirrored image. RESUME goes on with the test images after those
that a killed run has done. Runs on ACCELERATOR, DEVICES, with VAL_BATCH_SIZE, NUM_WORKERS, PRECISION.

    python Lightning_tester.py
    python Lightning_tester.py TEST_PATH=/my/images PATH=lightning_logs/version_0/checkpoints/last.ckpt
"""

import csv
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import Subset
from tqdm import tqdm

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

THRESHOLDS = [round(0.05 * step, 2) for step in range(1, 20)]  # tried out of fold


def main() -> None:
    runtime.hide_warnings()
    models = load_models()
    output = config.path(config.OUTPUT)
    files.check_writable(output)
    busy = f'another tester is running in {output}: wait, or set another OUTPUT'
    with files.file_lock(output / '.test.lock', busy) if not rank_zero_only.rank else nullcontext():
        test_files = list_test_files()
        threshold = score_out_of_fold(models)
        predict_test(models, threshold, test_files)
        if rank_zero_only.rank == 0:
            for fold, model in models.items():
                model.export(output / f'model_fold{fold}', threshold)
            print(f'{config.OUTPUT}/model_fold#: the models for smp.from_pretrained')


# ------------------------------------------------------------ models
def load_models() -> dict[int, CarvanaModel]:
    """Fold -> model: the checkpoint PATH alone, or the best one of each trained fold of FOLDS.

    Raises:
        config.UserMistake: if a checkpoint cannot be loaded, or if the models were trained with
            different constants.
    """
    if config.PATH is not None:
        model = load_model(config.PATH)
        return {model.hparams.val_folds[0]: model}
    table = files.read_models()
    table = table[table.fold.isin(config.FOLDS)]
    if table.empty:
        raise config.UserMistake(f'FOLDS={config.FOLDS}: none of them has been trained yet')
    untrained = sorted(set(config.FOLDS) - set(table.fold))
    if untrained:
        runtime.print_once(f'folds not trained yet, left out: {files.first_few(untrained)}')
    models = {row.fold: load_model(row.checkpoint) for row in table.itertuples()}
    first = next(iter(models.values())).hparams
    for row in table.itertuples():
        other = models[row.fold].hparams
        differ = config.differing_constants(first, other)
        if differ:
            name = differ[0]
            raise config.UserMistake(
                f'{table.checkpoint.iloc[0]} has {name}={first[name]!r}, {row.checkpoint} has '
                f'{name}={other[name]!r}: folds are scored and averaged together only if they were '
                'trained with the same constants: train them again, or set FOLDS or PATH'
            )
    return models


def load_model(file: str) -> CarvanaModel:
    """The model in a checkpoint, rebuilt from the constants saved in it; code in it is never run."""
    if not config.path(file).is_file():
        what = 'is a folder' if config.path(file).is_dir() else 'no such checkpoint'
        raise config.UserMistake(
            f'{file}: {what}: run Lightning_trainer.py, or set PATH to a .ckpt file'
        )
    try:
        model = CarvanaModel.load_from_checkpoint(
            config.path(file), map_location='cpu', weights_only=True
        )
    except config.UserMistake:
        raise
    except Exception as error:  # a damaged file raises whatever pickle, zipfile and torch raise
        raise config.UserMistake(
            f'{file}: not a checkpoint of this project ({config.shorten(error)})'
        ) from None
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
            f'{reason}: run Lightning_trainer.py again, or put the older file back'
        )
    if reason:
        threshold = config.THRESHOLD or 0.5
        runtime.print_once(f'{reason}: nothing to score out of fold, threshold {threshold}')
        return threshold
    constants = next(iter(models.values())).hparams
    thresholds = sorted({*THRESHOLDS, config.THRESHOLD or 0.5})
    table, counts = folds.read_folds(list(models)).sort_values(['kfold', 'img']), []
    for fold, rows in table.groupby('kfold'):
        image_files, mask_files = zip(*map(folds.files_of, rows.img))
        batches = predictor.ImageBatches(
            image_files,
            models[fold].input_size,
            mask_files,
            constants.CLASSES,
            constants.IGNORE_INDEX,
        )
        runner = predictor.Predictor([models[fold]], thresholds, config.TTA)
        counts += predictor.predict(runner, batches)
    counts = torch.from_numpy(np.stack(counts))  # (N, T, 3, K); T = 1 with several classes
    dice, iou = (x.reshape(counts.shape[:2]) for x in metrics.dice_and_iou(counts.flatten(0, 1)))
    chosen = choose_threshold(thresholds, dice.mean(0)) if constants.CLASSES == 1 else 0
    threshold = thresholds[chosen] if constants.CLASSES == 1 else 0.5
    table['dice'], table['iou'] = dice[:, chosen].numpy(), iou[:, chosen].numpy()
    if rank_zero_only.rank == 0:
        output = config.path(config.OUTPUT)
        files.write_table(table[['img', 'kfold', 'dice', 'iou']], output / 'oof.csv')
        print_scores(table)
        if constants.CLASSES == 1:
            why = 'as set' if config.THRESHOLD else 'tuned on these images'
            means = [dice[:, number].mean() for number in (chosen, thresholds.index(0.5))]
            print(f'threshold {threshold}: mean Dice {means[0]:.4f} ({means[1]:.4f} at 0.5), {why}')
        else:
            print_classes(counts[:, 0])
    draw_out_of_fold(table, models, threshold)
    return threshold


def why_not_scored(models: dict[int, CarvanaModel]) -> str:
    """Why the images that the models have not seen are unknown or missing; '' if they are not."""
    if not files.is_file(config.TRAIN_FOLDS):
        return f'{config.TRAIN_FOLDS} does not exist'
    if config.PATH is not None and not config.path(config.TRAIN_PATH).is_dir():
        return f'{config.TRAIN_PATH} does not exist'
    for fold, model in models.items():
        saved = model.image_digests
        if saved and saved['val'] != folds.digests(fold)['val']:
            return f'fold {fold} of {config.TRAIN_FOLDS} has other images than when it was trained'
    return ''


def choose_threshold(thresholds: list[float], dice: torch.Tensor) -> int:
    """Index of THRESHOLD, or of the best mean Dice; of 0.5 if none is better by more than rounding."""
    if config.THRESHOLD is not None:
        return thresholds.index(config.THRESHOLD)
    best, half = int(dice.argmax()), thresholds.index(0.5)
    return best if dice[best] > dice[half] + 1e-6 else half


def print_scores(table: pd.DataFrame) -> None:
    """Print mean Dice and IoU per fold and overall, and the ten worst images."""
    scores = table.groupby('kfold').agg(
        images=('img', 'size'), dice=('dice', 'mean'), spread=('dice', 'std'), iou=('iou', 'mean')
    )
    scores.loc['all'] = [len(table), table.dice.mean(), table.dice.std(), table.iou.mean()]
    scores['images'] = scores.images.astype(int)
    print("out of fold, at the images' own size")
    print(scores.to_string(float_format='%.4f'))
    worst = table.nsmallest(10, 'dice')
    print('worst\n' + '\n'.join(f'  {row.dice:.4f}  {row.img}' for row in worst.itertuples()))


def print_classes(counts: torch.Tensor) -> None:
    """Print Dice and IoU per class, and the data set's IoU, from counts (N, 3, K)."""
    dice, iou, whole = metrics.class_means(counts)
    columns = {'dice_per_image': dice, 'iou_per_image': iou, 'iou_dataset': whole}
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    table.index.name = 'class'
    table.loc['mean'] = table.mean()
    print(table.to_string(float_format='%.4f'))


def draw_out_of_fold(table: pd.DataFrame, models: dict, threshold: float, count: int = 4) -> None:
    """oof_worst.png: the worst and typical images with truth, prediction and errors;
    oof_histogram.png: the distribution of the Dice."""
    ordered = table.sort_values('dice')
    middle = max(0, len(ordered) // 2 - count // 2)
    kinds = {'worst': ordered[:count], 'typical': ordered[middle : middle + count]}
    rows = pd.concat([part.assign(kind=kind) for kind, part in kinds.items()])
    rows = rows.drop_duplicates('img')
    predicted = {}
    for fold in sorted(set(rows.kfold)):
        # Predict their whole batches again: the same batch gives the mask that was scored.
        names = table.img[table.kfold == fold].tolist()
        files_of_fold = [folds.files_of(name)[0] for name in names]
        batches = predictor.ImageBatches(files_of_fold, models[fold].input_size)
        indices = [names.index(name) for name in rows.img[rows.kfold == fold]]
        numbers = sorted({index // batches.batch_size for index in indices})
        runner = predictor.Predictor([models[fold]], [threshold], config.TTA)
        found = predictor.predict(runner, Subset(batches, numbers))
        starts = [number * batches.batch_size for number in numbers]
        order = [name for start in starts for name in names[start : start + batches.batch_size]]
        predicted |= zip(order, found)
    if rank_zero_only.rank:
        return
    constants = next(iter(models.values())).hparams
    fig, axes = plots.figure(len(rows), 4, 2.6, 2.0, 'Out of fold: the worst, then typical images')
    for axis_row, row in zip(axes, rows.itertuples()):
        image_file, mask_file = folds.files_of(row.img)
        image = plots.small(images.read_image(image_file))
        truth = masks.read_mask(mask_file, constants.CLASSES, constants.IGNORE_INDEX)
        truth, mask = plots.small(truth), plots.small(predicted[row.img])
        panels = {
            row.img: image,
            'truth': plots.overlay(image, truth, constants.CLASSES),
            f'prediction, Dice {row.dice:.4f}': plots.overlay(image, mask, constants.CLASSES),
            'errors': plots.errors(image, truth, mask, constants.IGNORE_INDEX),
        }
        for axis, (title, picture) in zip(axis_row, panels.items()):
            plots.show_image(axis, picture, title)
        axis_row[0].set_ylabel(row.kind, fontsize=8)
    plots.legend(fig, plots.class_legend(constants.CLASSES) | plots.error_legend(constants.CLASSES))
    output = config.path(config.OUTPUT)
    plots.save(fig, output / 'oof_worst.png')
    title = f'{len(table)} images out of fold, mean {table.dice.mean():.4f}'
    plots.save(plots.histogram(table.dice, 'Dice', title), output / 'oof_histogram.png')
    print(f'{config.OUTPUT}/oof.csv, oof_worst.png, oof_histogram.png')


# ------------------------------------------------------------ test images
def list_test_files() -> list[Path]:
    """The images to predict: those of TEST_CSV, in its order, if it exists; else all of TEST_PATH.

    Raises:
        config.UserMistake: for an image that cannot be read.
    """
    folder, suffix, listing = config.path(config.TEST_PATH), config.IMAGE_SUFFIX, config.TEST_CSV
    if not folder.is_dir():
        runtime.print_once(f'{files.relative(folder)}: no such folder: nothing to predict')
        return []
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    there = [name for name in names if name.endswith(suffix) and not name.startswith('.')]
    if not there:
        runtime.print_once(
            f'{files.relative(folder)}: no images *{suffix} (IMAGE_SUFFIX), but '
            f'{folds.endings(names)}: nothing to predict'
        )
    if there and files.is_file(listing):
        table = files.read_table(config.path(listing), ['img'], 'fix or remove it')
        asked = [name.removesuffix(suffix) + suffix for name in table.img.drop_duplicates()]
        missing, extra = sorted(set(asked) - set(there)), sorted(set(there) - set(asked))
        if len(missing) == len(asked):
            runtime.print_once(f'{listing} lists none of the images in {folder}: all are predicted')
        else:
            there = [name for name in asked if name not in missing]
            for left_out, what in (
                (missing, f'{listing} are not in {folder}'),
                (extra, f'{folder} are not in {listing}'),
            ):
                if left_out:
                    shown = files.first_few(left_out)
                    runtime.print_once(f'{len(left_out)} images of {what}: {shown}')
    for name in tqdm(there, 'checking headers', disable=None, leave=False):
        images.check_header(folder / name)
    return [folder / name for name in there]


def predict_test(models: dict[int, CarvanaModel], threshold: float, test_files: list[Path]) -> None:
    """Predict the test images with the mean of the models: submission.csv, masks, a picture."""
    if not test_files:
        return
    first = next(iter(models.values()))
    classes, mask_folder = first.hparams.CLASSES, config.path(config.OUTPUT) / 'test_masks'
    if not config.SAVE_MASKS and classes == 1:  # run lengths cannot tell one class from another
        mask_folder = None
    checkpoints = files.read_models().checkpoint if config.PATH is None else [config.PATH]
    stats = [(str(c), config.path(c).stat().st_mtime_ns) for c in checkpoints]
    runner = predictor.Predictor(list(models.values()), [threshold], config.TTA)
    batches = predictor.ImageBatches(test_files, first.input_size)
    if predictor.write_submission(runner, batches, [stats, config.FOLDS], mask_folder):
        draw_test(test_files[:8], classes, mask_folder)
        print(
            f'{len(test_files)} images of {config.TEST_PATH}: {config.OUTPUT}/submission.csv, '
            'test_samples.png'
        )


def draw_test(test_files: list[Path], classes: int, mask_folder: Path | None) -> None:
    """test_samples.png: the first test images with the predicted mask drawn over them."""
    columns = min(4, len(test_files))
    title = 'The first test images with their predicted masks'
    fig, axes = plots.figure(-(-len(test_files) // columns), columns, 2.8, 2.1, title)
    for axis in axes.flat[len(test_files) :]:
        axis.axis('off')
    with (config.path(config.OUTPUT) / 'submission.csv').open(newline='') as file:
        for axis, image_file, row in zip(axes.flat, test_files, csv.DictReader(file)):
            image = images.read_image(image_file)
            if classes == 1:
                mask = masks.rle_decode(row['rle_mask'], image.shape[:2])
            else:
                mask = masks.read_mask(mask_folder / f'{image_file.stem}.png', classes)
            image, mask = plots.small(image), plots.small(mask)
            plots.show_image(axis, plots.overlay(image, mask, classes), image_file.name)
    plots.legend(fig, plots.class_legend(classes))
    plots.save(fig, config.path(config.OUTPUT) / 'test_samples.png')


if __name__ == '__main__':
    command_line.run(main, __doc__)
