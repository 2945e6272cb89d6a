"""Step 3: score every fold on the images that its model never saw; predict TEST_PATH.

Reads   OUTPUT/models.csv and its checkpoints, or the one checkpoint PATH; TRAIN_FOLDS with the
        images and masks (TRAIN_PATH, MASK_PATH, IMAGE_SUFFIX, MASK_SUFFIX) of FOLDS; the images of
        TEST_PATH, in the order of TEST_CSV where it exists.
Writes  OUTPUT/oof.csv: img,kfold,dice,iou at each image's own size; oof_worst.png,
        oof_histogram.png; OUTPUT/submission.csv: img,rle_mask; test_samples.png; with SAVE_MASKS
        OUTPUT/test_masks/<img>.png.

Every model is rebuilt from the constants in its own checkpoint. THRESHOLD=None is tuned on the
out-of-fold predictions. TTA adds the mirrored image. RESUME goes on after the images that a killed
run has done. Runs on ACCELERATOR, DEVICES, with VAL_BATCH_SIZE, NUM_WORKERS, PRECISION.

    python Lightning_tester.py
    python Lightning_tester.py TEST_PATH=/my/images PATH=lightning_logs/version_0/checkpoints/last.ckpt
"""

import config

if __name__ == '__main__':
    import command_line

    command_line.start(__doc__)

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import folds
import images
import metrics
import plots
import predictor
import runtime
import tables
from dataset import ImageFiles, collate_files
from Lightning_module import CarvanaModel


def main() -> None:
    runtime.silence()
    models = load_models()
    threshold = score_out_of_fold(models)
    predict_test(models, threshold)


def load_models() -> dict[int, CarvanaModel]:
    """Fold -> model: the checkpoint PATH alone, or each trained fold's best of FOLDS.

    Raises config.UserMistake for a checkpoint that cannot be loaded, or models that disagree in
    CLASSES.
    """
    if config.PATH is not None:
        model = load_model(config.PATH)
        return {model.hparams.val_folds[0]: model}
    table = tables.read_models()
    table = table[table.fold.isin(config.FOLDS)]
    if table.empty:
        raise config.UserMistake(f'FOLDS={config.FOLDS}: none of them has been trained yet')
    models = {row.fold: load_model(row.checkpoint) for row in table.itertuples()}
    first = table.checkpoint.iloc[0]
    for row in table.itertuples():
        classes = [models[fold].hparams.CLASSES for fold in (table.fold.iloc[0], row.fold)]
        if classes[0] != classes[1]:
            raise config.UserMistake(
                f'{first} has CLASSES={classes[0]}, {row.checkpoint} has CLASSES={classes[1]}: '
                'models that are averaged must agree'
            )
    return models


def load_model(file: str) -> CarvanaModel:
    """The model in a checkpoint, rebuilt from the constants saved in it; code in it is never run."""
    if not config.path(file).is_file():
        raise config.UserMistake(
            f'{file}: no such checkpoint: run Lightning_trainer.py, or set PATH'
        )
    try:
        model = CarvanaModel.load_from_checkpoint(
            config.path(file), map_location='cpu', weights_only=True
        )
    except config.UserMistake:
        raise
    except Exception as error:  # what a damaged file raises is up to pickle, zipfile and torch
        reason = ' '.join(str(error).split())[:200]
        raise config.UserMistake(f'{file}: not a checkpoint of this project ({reason})') from None
    return model.eval()


def identity(models: dict[int, CarvanaModel]) -> list:
    """What tells these models from others, to recognise the job that a killed run was doing."""
    return [
        [fold, sum(p.detach().double().sum().item() for p in model.parameters())]
        for fold, model in models.items()
    ]


def score_out_of_fold(models: dict[int, CarvanaModel]) -> float:
    """Score each model on its own validation images; write oof.csv and pictures.

    Returns the threshold for the test images: THRESHOLD, or the best one found here.
    """
    fixed = config.THRESHOLD
    if not config.path(config.TRAIN_FOLDS).is_file():
        print(f'{config.TRAIN_FOLDS} is not there: nothing to score out of fold')
        return 0.5 if fixed is None else fixed
    table = folds.read_folds(list(models)).sort_values(['kfold', 'img'], ignore_index=True)
    some = next(iter(models.values())).hparams
    thresholds = sorted({*predictor.GRID, 0.5 if fixed is None else fixed})
    runner = predictor.Predictor(models, thresholds, config.TTA)
    files = [folds.files_of(name) for name in table.img]
    data = ImageFiles(
        [image for image, _ in files],
        runner.inputs,
        [mask for _, mask in files],
        table.kfold.tolist(),
        some.CLASSES,
        some.IGNORE_INDEX,
    )
    settings = {'models': identity(models), 'tta': config.TTA, 'thresholds': thresholds}
    target = config.path(config.OUTPUT) / 'oof.csv'
    writer = predictor.predict(
        runner,
        data,
        target,
        lambda batch, n, counts: f'{batch["img"][n]},{json.dumps(counts.tolist())}',
        settings,
        lambda w: [
            json.loads(line.partition(',')[2]) for line in w.lines(f.name for f in data.files)
        ],
    )
    counts = torch.tensor(writer.result)  # (N, T, 3, K); T = 1 with several classes
    dice, iou = (x.reshape(counts.shape[:2]) for x in metrics.dice_and_iou(counts.flatten(0, 1)))
    chosen = 0
    if some.CLASSES == 1:
        curve = dice.mean(0)
        wanted = thresholds.index(fixed) if fixed is not None else int(curve.argmax())
        # 0.5 stays where nothing is better by a hair.
        half = thresholds.index(0.5)
        chosen = half if fixed is None and curve[half] >= curve[wanted] - 1e-6 else wanted
    threshold = thresholds[chosen] if some.CLASSES == 1 else 0.5
    if writer.trainer.is_global_zero:
        table['dice'], table['iou'] = dice[:, chosen].numpy(), iou[:, chosen].numpy()
        tables.write_table(table[['img', 'kfold', 'dice', 'iou']], target)
        writer.remove_parts()
        print_scores(table)
        if some.CLASSES == 1:
            print(
                f'threshold {threshold}: mean Dice {curve[chosen]:.4f} '
                f'(0.5: {curve[half]:.4f}), {"as set" if fixed else "the best of these images"}'
            )
        else:
            print_classes(counts[:, 0])
        draw_out_of_fold(table, models, threshold)
    return threshold


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
    print('worst: ' + ', '.join(f'{row.img} {row.dice:.4f}' for row in worst.itertuples()))


def print_classes(counts: torch.Tensor) -> None:
    """Dice and IoU per class, and the mean IoU of the data set, from counts (N, 3, K)."""
    dice, iou, whole = metrics.class_means(counts)
    columns = {'dice_per_image': dice, 'iou_per_image': iou, 'iou_dataset': whole}
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    table.index.name = 'class'
    table.loc['mean'] = table.mean()
    print(table.to_string(float_format='%.4f'))


def draw_out_of_fold(table: pd.DataFrame, models: dict, threshold: float, count: int = 4) -> None:
    """oof_worst.png: the worst and the typical images with truth, prediction and errors;
    oof_histogram.png: how the Dice is spread."""
    ordered = table.sort_values('dice', ignore_index=True)
    middle = max(0, len(ordered) // 2 - count // 2)
    rows = pd.concat([ordered[:count], ordered[middle : middle + count]]).drop_duplicates('img')
    some = next(iter(models.values())).hparams
    fig, axes = plots.figure(len(rows), 4, 2.6, 2.0, 'Out of fold: the worst, then typical images')
    for axis_row, row in zip(axes, rows.itertuples()):
        image_file, mask_file = folds.files_of(row.img)
        image = images.read_image(image_file)[0]
        truth = images.read_mask(mask_file, some.CLASSES, some.IGNORE_INDEX)
        mask = predict_one(models[row.kfold], image_file, threshold)
        image, truth, mask = (plots.small(array) for array in (image, truth, mask))
        for axis, picture, title in zip(
            axis_row,
            (
                image,
                plots.overlay(image, truth, some.CLASSES),
                plots.overlay(image, mask, some.CLASSES),
                plots.errors(image, truth, mask, some.IGNORE_INDEX),
            ),
            (row.img, 'truth', f'prediction, Dice {row.dice:.4f}', 'errors'),
        ):
            plots.show_image(axis, picture, title)
    entries = plots.class_legend(some.CLASSES)
    plots.legend(fig, {**entries, 'missed': plots.MISSED, 'added': plots.ADDED})
    output = config.path(config.OUTPUT)
    plots.save(fig, output / 'oof_worst.png')
    title = f'{len(table)} images out of fold, mean {table.dice.mean():.4f}'
    plots.save(plots.histogram(table.dice, 'Dice', title), output / 'oof_histogram.png')
    print(f'{config.OUTPUT}/oof.csv, oof_worst.png, oof_histogram.png')


def predict_one(model: CarvanaModel, file: Path, threshold: float) -> np.ndarray:
    """The prediction for one image, uint8 (height, width), as in the run over many."""
    runner = predictor.Predictor({0: model}, [threshold], config.TTA)
    with torch.inference_mode():
        batch = collate_files([ImageFiles([file], runner.inputs)[0]])
        return runner.predict_step(batch, 0)[0].cpu().numpy()


def predict_test(models: dict[int, CarvanaModel], threshold: float) -> None:
    """Predict TEST_PATH with the mean of the models: submission.csv, a picture, SAVE_MASKS."""
    folder, output = config.path(config.TEST_PATH), config.path(config.OUTPUT)
    files = test_files(folder)
    if not files:
        print(f'no images *{config.IMAGE_SUFFIX} in {folder}: nothing to predict')
        return
    for file in tqdm(files, 'checking headers', disable=None, leave=False):
        images.check_header(file)
    runner = predictor.Predictor(models, [threshold], config.TTA)
    masks = output / 'test_masks'
    classes = next(iter(models.values())).hparams.CLASSES
    save_masks = config.SAVE_MASKS or classes > 1  # run lengths tell one class from none
    if save_masks:
        masks.mkdir(parents=True, exist_ok=True)

    def line(batch: dict, number: int, mask: np.ndarray) -> str:
        name = batch['img'][number]
        if save_masks:
            scale = 255 if classes == 1 else 1
            save_mask(masks / (Path(name).stem + '.png'), mask * np.uint8(scale))
        return f'{name},{images.rle_encode(mask)}'

    settings = {'models': identity(models), 'tta': config.TTA, 'thresholds': [threshold]}
    settings['masks'] = save_masks
    target = output / 'submission.csv'
    writer = predictor.predict(runner, ImageFiles(files, runner.inputs), target, line, settings)
    if not writer.trainer.is_global_zero:
        return
    with tables.whole_file(target) as file:
        file.write('img,rle_mask\n')
        file.writelines(f'{row}\n' for row in writer.lines(f.name for f in files))
    draw_test(files, writer, classes)
    writer.remove_parts()
    print(
        f'{len(files)} images of {config.TEST_PATH}: {config.OUTPUT}/submission.csv, test_samples.png'
    )


def test_files(folder: Path) -> list[Path]:
    """The images to predict: those of TEST_CSV, in its order, where it exists; else the folder's."""
    if not folder.is_dir():
        return []
    suffix = config.IMAGE_SUFFIX
    there = sorted(f.name for f in folder.iterdir() if f.name.endswith(suffix) and f.is_file())
    if not there or not config.path(config.TEST_CSV).is_file():
        return [folder / name for name in there]
    table = tables.read_table(config.path(config.TEST_CSV), ['img'], 'mend or remove it')
    asked = [name.removesuffix(suffix) + suffix for name in table.img.drop_duplicates()]
    missing, extra = sorted(set(asked) - set(there)), sorted(set(there) - set(asked))
    if missing:
        print(
            f'{len(missing)} images of {config.TEST_CSV} are not in {folder}: {tables.some(missing)}'
        )
    if extra:
        print(f'{len(extra)} images in {folder} are not in {config.TEST_CSV}: {tables.some(extra)}')
    return [folder / name for name in asked if name not in missing]


def save_mask(file: Path, mask: np.ndarray) -> None:
    """Write a mask, uint8 (height, width), as PNG, whole or not at all."""
    _, data = cv2.imencode('.png', mask)
    temporary = file.with_name(f'{file.name}.tmp')
    temporary.write_bytes(data)
    temporary.replace(file)


def draw_test(files: list[Path], writer: predictor.PartWriter, classes: int) -> None:
    """test_samples.png: the first test images with the predicted mask drawn over them."""
    files = files[:8]
    columns = min(4, len(files))
    rows = -(-len(files) // columns)
    fig, axes = plots.figure(
        rows, columns, 2.8, 2.1, 'The first test images with their predicted masks'
    )
    for axis in axes.flat[len(files) :]:
        axis.axis('off')
    for axis, file, line in zip(axes.flat, files, writer.lines(f.name for f in files)):
        image = images.read_image(file)[0]
        if classes == 1:
            mask = images.rle_decode(line.partition(',')[2], image.shape[:2])
        else:
            masks = config.path(config.OUTPUT) / 'test_masks'
            mask = images.read_mask(masks / f'{file.stem}.png', classes)
        image, mask = plots.small(image), plots.small(mask)
        plots.show_image(axis, plots.overlay(image, mask, classes), file.name)
    plots.legend(fig, plots.class_legend(classes))
    plots.save(fig, config.path(config.OUTPUT) / 'test_samples.png')


if __name__ == '__main__':
    command_line.run(main)
