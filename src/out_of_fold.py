"""Every training image scored by the model that never saw it, at the image's own size."""

import json

import pandas as pd
import torch

import config
import folds
import images
import masks
import metrics
import pairs
import plots
import predictor
import runtime
import tables
from image_files import ImageFiles
from Lightning_module import CarvanaModel

GRID = [round(0.05 * step, 2) for step in range(1, 20)]  # thresholds tried out of fold


def score(models: dict[int, CarvanaModel]) -> float:
    """Score each model on its own validation images; write oof.csv and pictures.

    Returns the threshold for the test images: THRESHOLD, or the best one found here.
    """
    there = tables.is_file(config.TRAIN_FOLDS)
    reason = no_score(models) if there else f'{config.TRAIN_FOLDS} is not there'
    if reason and there and config.PATH is None:
        raise config.UserMistake(
            f'{reason}: run Lightning_trainer.py again, or put the older file back'
        )
    if reason:
        runtime.tell(f'{reason}: nothing to score out of fold, threshold {config.THRESHOLD or 0.5}')
        return config.THRESHOLD or 0.5
    table = folds.read_folds(list(models)).sort_values(['kfold', 'img'], ignore_index=True)
    constants = next(iter(models.values())).hparams
    thresholds = sorted({*GRID, config.THRESHOLD or 0.5})
    runner = predictor.Predictor(models, thresholds, config.TTA)
    files = [pairs.files_of(name) for name in table.img]
    data = ImageFiles(
        [image for image, _ in files],
        runner.inputs,
        [mask for _, mask in files],
        table.kfold.tolist(),
        constants.CLASSES,
        constants.IGNORE_INDEX,
    )
    target = config.path(config.OUTPUT) / 'oof.csv'
    writer = predictor.predict(
        runner,
        data,
        target,
        lambda batch, n, counts: json.dumps(counts.tolist()),
        lambda w: [json.loads(line) for line in w.lines(f.name for f in data.files)],
    )
    counts = torch.tensor(writer.result)  # (N, T, 3, K); T = 1 with several classes
    dice, iou = (x.reshape(counts.shape[:2]) for x in metrics.dice_and_iou(counts.flatten(0, 1)))
    chosen = choose(thresholds, dice.mean(0)) if constants.CLASSES == 1 else 0
    threshold = thresholds[chosen] if constants.CLASSES == 1 else 0.5
    if writer.trainer.is_global_zero:
        table['dice'], table['iou'] = dice[:, chosen].numpy(), iou[:, chosen].numpy()
        tables.write_table(table[['img', 'kfold', 'dice', 'iou']], target)
        writer.remove_parts()
        print_scores(table)
        if constants.CLASSES == 1:
            why = 'as set' if config.THRESHOLD else 'tuned on these images'
            means = [dice[:, number].mean() for number in (chosen, thresholds.index(0.5))]
            print(f'threshold {threshold}: mean Dice {means[0]:.4f} ({means[1]:.4f} at 0.5), {why}')
        else:
            print_classes(counts[:, 0])
        draw(table, models, threshold)
    return threshold


def no_score(models: dict[int, CarvanaModel]) -> str:
    """Why the images that the models have not seen cannot be told, or read; '' where they can."""
    if config.PATH is not None and not config.path(config.TRAIN_PATH).is_dir():
        return f'{config.TRAIN_PATH} is not there'
    for fold, model in models.items():
        if model.images and model.images['val'] != folds.digests(fold)['val']:
            return f'fold {fold} of {config.TRAIN_FOLDS} has other images than when it was trained'
    return ''


def choose(thresholds: list[float], dice: torch.Tensor) -> int:
    """Place of THRESHOLD, or of the threshold with the best mean Dice; 0.5 where none is better by
    more than rounding."""
    if config.THRESHOLD is not None:
        return thresholds.index(config.THRESHOLD)
    best, half = int(dice.argmax()), thresholds.index(0.5)
    return best if dice[best] > dice[half] + 1e-6 else half


def print_scores(table: pd.DataFrame) -> None:
    """Mean Dice and IoU per fold and overall, and the ten worst images."""
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
    """Dice and IoU per class, and the mean IoU of the data set, from counts (N, 3, K)."""
    dice, iou, whole = metrics.class_means(counts)
    columns = {'dice_per_image': dice, 'iou_per_image': iou, 'iou_dataset': whole}
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    table.index.name = 'class'
    table.loc['mean'] = table.mean()
    print(table.to_string(float_format='%.4f'))


def draw(table: pd.DataFrame, models: dict, threshold: float, count: int = 4) -> None:
    """oof_worst.png: the worst and the typical images with truth, prediction and errors;
    oof_histogram.png: how the Dice is spread."""
    ordered = table.sort_values('dice', ignore_index=True)
    middle = max(0, len(ordered) // 2 - count // 2)
    kinds = {'worst': ordered[:count], 'typical': ordered[middle : middle + count]}
    rows = pd.concat([part.assign(kind=kind) for kind, part in kinds.items()])
    rows = rows.drop_duplicates('img')
    constants = next(iter(models.values())).hparams
    fig, axes = plots.figure(len(rows), 4, 2.6, 2.0, 'Out of fold: the worst, then typical images')
    for axis_row, row in zip(axes, rows.itertuples()):
        image_file, mask_file = pairs.files_of(row.img)
        image = images.read_image(image_file)[0]
        truth = masks.read_mask(mask_file, constants.CLASSES, constants.IGNORE_INDEX)
        mask = predictor.predict_one(models[row.kfold], image_file, threshold)
        image, truth, mask = (plots.small(array) for array in (image, truth, mask))
        for axis, picture, title in zip(
            axis_row,
            (
                image,
                plots.overlay(image, truth, constants.CLASSES),
                plots.overlay(image, mask, constants.CLASSES),
                plots.errors(image, truth, mask, constants.IGNORE_INDEX),
            ),
            (row.img, 'truth', f'prediction, Dice {row.dice:.4f}', 'errors'),
        ):
            plots.show_image(axis, picture, title)
        axis_row[0].set_ylabel(row.kind, fontsize=8)
    plots.legend(fig, plots.class_legend(constants.CLASSES) | plots.error_legend(constants.CLASSES))
    output = config.path(config.OUTPUT)
    plots.save(fig, output / 'oof_worst.png')
    title = f'{len(table)} images out of fold, mean {table.dice.mean():.4f}'
    plots.save(plots.histogram(table.dice, 'Dice', title), output / 'oof_histogram.png')
    print(f'{config.OUTPUT}/oof.csv, oof_worst.png, oof_histogram.png')
