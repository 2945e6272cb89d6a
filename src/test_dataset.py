"""Look at the data: a picture of the model's input (a script, not a unit test).

Reads   TRAIN_FOLDS, TRAIN_PATH, MASK_PATH (IMAGE_PREFIX, IMAGE_SUFFIX, MASK_PREFIX, MASK_SUFFIX,
        MASK_COLOURS), at CROP_SIZE and SCALE (CHANNELS).
Writes  OUTPUT/test_dataset.png: images of the first fold in FOLDS, only resized, without and with
        the mask (CLASSES, IGNORE_INDEX) drawn over them. Below: the same images with AUGMENTATION,
        in four epochs.

    python test_dataset.py
    python test_dataset.py AUGMENTATION=strong CROP_SIZE=512
"""

import command_line
import config
import plots
from dataset import CarvanaDataset

IMAGES, EPOCHS = 4, 4


def main() -> None:
    folds = config.FOLDS[:1]
    plain, augmented = CarvanaDataset(folds, train=False), CarvanaDataset(folds, train=True)
    step = max(1, len(plain) // IMAGES)
    indices = range(0, len(plain), step)[:IMAGES]
    title = (
        f'fold {folds[0]} at {config.CROP_SIZE}: resized images, without and with masks; '
        f'below, with AUGMENTATION={config.AUGMENTATION}'
    )
    fig, axes = plots.figure(2 + EPOCHS, len(indices), 2.4, 2.0, title)
    for column, index in zip(axes.T, indices):
        items = [plain[index]] * 2 + [
            augmented[epoch, augmented.crops.index((index, 0))] for epoch in range(EPOCHS)
        ]
        for row, (axis, item) in enumerate(zip(column, items)):
            image = item['image'].permute(1, 2, 0).numpy()
            strength = 0.35 if row else 0
            picture = plots.overlay(image, item['mask'].numpy(), config.CLASSES, strength)
            plots.show_image(axis, picture, f'epoch {row - 1}' if row > 1 else item['img'])
    plots.legend(fig, config.CLASSES)
    file = plots.save(fig, config.path(config.OUTPUT) / 'test_dataset.png')
    image, mask = plain[0]['image'], plain[0]['mask']
    print(f'{len(plain)} images; image {tuple(image.shape)}, mask {tuple(mask.shape)}')
    print(f'classes in the first mask: {mask.unique().tolist()}; {file}')


if __name__ == '__main__':
    command_line.run(main, __doc__)
