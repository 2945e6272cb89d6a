"""Step 3: score every fold on the images that its model never saw; predict TEST_PATH.

Reads   OUTPUT/models.csv and its checkpoints, or the one checkpoint PATH; TRAIN_FOLDS with the
        images and masks (TRAIN_PATH, MASK_PATH, IMAGE_SUFFIX, MASK_SUFFIX) of FOLDS; the images of
        TEST_PATH, in the order of TEST_CSV where it exists.
Writes  OUTPUT/oof.csv: img,kfold,dice,iou at each image's own size; oof_worst.png,
        oof_histogram.png; OUTPUT/submission.csv: img,rle_mask; test_samples.png; with SAVE_MASKS,
        or several classes, OUTPUT/test_masks/<img>.png; OUTPUT/model_fold#/, each model for
        smp.from_pretrained.

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

import csv
from pathlib import Path

import cv2
import numpy as np
from pytorch_lightning.utilities import rank_zero_only
from tqdm import tqdm

import image_files
import images
import masks
import out_of_fold
import pairs
import plots
import predictor
import runs
import runtime
import tables
from Lightning_module import CarvanaModel
from part_writer import PartWriter


def main() -> None:
    runtime.silence()
    models = load_models()
    with runs.alone('OUTPUT'):
        threshold = out_of_fold.score(models)
        predict_test(models, threshold)
        if rank_zero_only.rank == 0:
            for fold, model in models.items():
                model.hand_on(config.path(config.OUTPUT) / f'model_fold{fold}', threshold)
            print(f'{config.OUTPUT}/model_fold#: the models for smp.from_pretrained')


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
    untrained = sorted(set(config.FOLDS) - set(table.fold))
    if untrained:
        runtime.tell(f'folds that are not trained yet, and left out: {tables.some(untrained)}')
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
    except Exception as error:  # what a damaged file raises is up to pickle, zipfile and torch
        raise config.UserMistake(
            f'{file}: not a checkpoint of this project ({config.in_short(error)})'
        ) from None
    size = 'x'.join(map(str, model.input_form[:2]))
    runtime.tell(f'{file}: {model.hparams.MODEL_NAME}, {size} pixels')
    return model.eval()


def predict_test(models: dict[int, CarvanaModel], threshold: float) -> None:
    """Predict TEST_PATH with the mean of the models: submission.csv, a picture, SAVE_MASKS."""
    folder, output = config.path(config.TEST_PATH), config.path(config.OUTPUT)
    files = image_files.test_files(folder)
    if not files:
        there = 'no such folder'
        if folder.is_dir():
            names = [file.name for file in folder.iterdir()]
            there = f'no images *{config.IMAGE_SUFFIX} (IMAGE_SUFFIX), but {pairs.endings(names)}'
        runtime.tell(f'{tables.relative(folder)}: {there}: nothing to predict')
        return
    for file in tqdm(files, 'checking headers', disable=None, leave=False):
        images.check_header(file)
    runner = predictor.Predictor(models, [threshold], config.TTA)
    mask_folder = output / 'test_masks'
    classes = next(iter(models.values())).hparams.CLASSES
    save_masks = config.SAVE_MASKS or classes > 1  # run lengths tell one class from none
    if save_masks:
        mask_folder.mkdir(parents=True, exist_ok=True)

    def line(batch: dict, number: int, mask: np.ndarray) -> str:
        name = batch['img'][number]
        if save_masks:
            scale = 255 if classes == 1 else 1
            save_mask(mask_folder / (Path(name).stem + '.png'), mask * np.uint8(scale))
        return masks.rle_encode(mask)

    data, target = image_files.ImageFiles(files, runner.inputs), output / 'submission.csv'
    writer = predictor.predict(runner, data, target, line, form={'masks': save_masks})
    if not writer.trainer.is_global_zero:
        return
    with tables.whole_text(target) as file:
        rows = csv.writer(file, lineterminator='\n')
        rows.writerow(['img', 'rle_mask'])
        rows.writerows(zip((f.name for f in files), writer.lines(f.name for f in files)))
    draw_test(files, writer, classes)
    writer.remove_parts()
    print(
        f'{len(files)} images of {tables.relative(folder)}: {config.OUTPUT}/submission.csv, '
        'test_samples.png'
    )


def save_mask(file: Path, mask: np.ndarray) -> None:
    """Write a mask, uint8 (height, width), as PNG, whole or not at all."""
    with tables.whole(file) as temporary:
        temporary.write_bytes(cv2.imencode('.png', mask)[1])


def draw_test(files: list[Path], writer: PartWriter, classes: int) -> None:
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
            mask = masks.rle_decode(line, image.shape[:2])
        else:
            folder = config.path(config.OUTPUT) / 'test_masks'
            mask = masks.read_mask(folder / f'{file.stem}.png', classes)
        image, mask = plots.small(image), plots.small(mask)
        plots.show_image(axis, plots.overlay(image, mask, classes), file.name)
    plots.legend(fig, plots.class_legend(classes))
    plots.save(fig, config.path(config.OUTPUT) / 'test_samples.png')


if __name__ == '__main__':
    command_line.run(main)
