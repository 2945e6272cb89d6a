"""Several classes from end to end, and the models that are handed on, in this process."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import draw_ellipse, own_config, settings
from PIL import Image

import command_line
import files
import folds
import images
import Lightning_tester
import Lightning_trainer
from Lightning_module import CarvanaModel

IGNORED = 11


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Three classes: ground, ellipse, a blue band; a frame that nobody drew has index 11."""
    folder, rng = tmp_path_factory.mktemp('classes'), np.random.default_rng(0)
    for name in ('train_hq', 'train_masks', 'test_hq'):
        (folder / 'input' / name).mkdir(parents=True)
    for number in range(12):
        image, mask = draw_ellipse(rng)
        image[4:14], mask[4:14] = (20, 20, 230), 2
        mask[:2], mask[:, -2:] = IGNORED, IGNORED
        place = 'train_hq' if number < 9 else 'test_hq'
        Image.fromarray(image).save(folder / f'input/{place}/{number}.png')
        if number < 9:
            palette = Image.fromarray(mask, mode='P')
            palette.putpalette([0, 0, 0, 200, 30, 30, 30, 30, 200, *[99] * 27])
            palette.save(folder / f'input/train_masks/{number}.png')
    words = [*settings(folder), 'CLASSES=3', f'IGNORE_INDEX={IGNORED}', 'N_FOLDS=3', 'FOLDS=[0]']
    words += [
        'IMAGE_SUFFIX=.png',
        'MASK_SUFFIX=.png',
        'GROUP_REGEX=None',
        'EPOCHS=8',
        'LOSS=CE_Dice',
    ]
    words += ['LR=0.003', 'MODEL_NAME=smp_fpn_resnet18', 'CROP_SIZE=(32, 64)']
    with own_config(*words):
        folds.main()
        Lightning_trainer.train_fold(0)
        Lightning_tester.main()
    return folder, words


def test_each_class_is_scored_at_the_images_own_size(trained, capsys):
    folder, words = trained
    command_line.override(words)
    table = pd.read_csv(folder / 'output/oof.csv', dtype={'img': str})
    assert len(table) == 3 and table.dice.min() > 0.5
    history = pd.read_csv(folder / 'logs/version_0/metrics.csv')
    for column in ('val_iou_dataset', 'val_dice_class0', 'val_iou_class2'):
        assert history[column].notna().any()
    (checkpoint,) = (folder / 'logs').rglob('best.ckpt')
    model = Lightning_tester.load_model(str(checkpoint))
    for row in table.itertuples():  # by other code: intersection over each class in turn
        image_file, mask_file = files.pairs_of([row.img])[0]
        truth = np.array(Image.open(mask_file))
        x = images.read_image(image_file, 3, (32, 64))
        with torch.inference_mode():
            p = model(torch.from_numpy(x).permute(2, 0, 1)[None]).softmax(1)
            p = torch.nn.functional.interpolate(p, truth.shape, mode='bilinear')
        mask = p[0].argmax(0).numpy()
        scores = []
        for index in range(3):
            a, b = ((m == index) & (truth != IGNORED) for m in (mask, truth))
            if (a | b).any():
                scores.append(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert row.dice == pytest.approx(np.mean(scores), abs=1e-4)


def test_masks_are_written_as_class_indices_and_pictures_have_all_classes(trained):
    folder, _ = trained
    masks = sorted((folder / 'output/test_masks').iterdir())
    assert [mask.name for mask in masks] == ['10.png', '11.png', '9.png']
    values = np.unique([np.array(Image.open(mask)) for mask in masks])
    assert values.tolist() == [0, 1, 2] and Image.open(masks[0]).size == (64, 48)
    assert (folder / 'output/oof_worst.png').is_file()


def test_a_model_handed_on_needs_nothing_of_this_project(trained, tmp_path):
    """The same logits as the checkpoint's, in a process that knows segmentation_models_pytorch only."""
    folder, words = trained
    command_line.override(words)
    facts = json.loads((folder / 'output/model_fold0/config.json').read_text())
    assert (
        facts['_classes'] == 3 and facts['_threshold'] == 0.5 and facts['_input_size'] == [32, 64]
    )
    x = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    torch.save(x, tmp_path / 'x.pt')
    code = (
        'import json, sys, torch, segmentation_models_pytorch as smp\n'
        'model = smp.from_pretrained(sys.argv[1]).eval()\n'
        'facts = json.load(open(sys.argv[1] + "/config.json"))\n'
        'mean, std = (torch.tensor(facts[k]).reshape(1, 3, 1, 1) for k in ("_mean", "_std"))\n'
        'x = torch.load("x.pt") / 255\n'
        'with torch.inference_mode(): torch.save(model((x - mean) / std), "logits.pt")'
    )
    command = [sys.executable, '-c', code, str(folder / 'output/model_fold0')]
    subprocess.run(command, cwd=tmp_path, check=True)
    checkpoint = files.read_models().checkpoint[0]
    model = CarvanaModel.load_from_checkpoint(checkpoint, weights_only=True).eval()
    network = model.model.to(memory_format=torch.contiguous_format)
    with torch.inference_mode():
        expected = network((x / 255 - model.MODEL_MEAN / 255) / (model.MODEL_STD / 255))
    assert torch.allclose(torch.load(tmp_path / 'logits.pt'), expected, atol=1e-6, rtol=0)


def test_nothing_is_left_half_written(trained):
    folder, _ = trained
    assert not list(folder.rglob('*.tmp')) and not list(folder.rglob('*.part*'))
