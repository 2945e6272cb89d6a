"""The pictures for people: one look for all of them, safe for the colour-blind (Okabe and Ito)."""

import os
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import tables

BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK = (
    '#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#F0E442', '#000000',
)  # fmt: skip
# From the seventh class on the muted colours of Paul Tol, safe as well, though with that many none is.
CLASS_COLOURS = [GREEN, ORANGE, PINK, SKY, YELLOW, '#999999', '#332288', '#88CCEE']
CLASS_COLOURS += ['#117733', '#999933', '#DDCC77', '#CC6677', '#882255', '#AA4499', '#661100']
CLASS_COLOURS += ['#6699CC']
MISSED, ADDED = BLUE, RED  # foreground not found; background taken for it


def rgb(colour: str) -> np.ndarray:
    """'#0072B2' -> uint8 (3,)."""
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)


def figure(rows: int, columns: int, width: float, height: float, title: str = ''):
    """A figure of `width` x `height` inches a panel, and its axes as an array (rows, columns)."""
    fig = Figure(figsize=(width * columns, height * rows), layout='constrained', dpi=110)
    axes = fig.subplots(rows, columns, squeeze=False)
    if title:
        fig.suptitle(title, fontsize=11)
    return fig, axes


def save(fig: Figure, file: Path) -> Path:
    """Write a picture whole or not at all."""
    with tables.whole(file) as temporary:
        fig.savefig(temporary, format='png')
    return file


def show_image(axis, image: np.ndarray, title: str = '') -> None:
    """An image (H, W, 3) or (H, W, 1), uint8, without ticks."""
    axis.imshow(image.squeeze(), cmap='gray', vmin=0, vmax=255)
    short = title if len(title) <= 32 else f'{title[:15]}...{title[-14:]}'
    axis.set_title(short, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def overlay(image: np.ndarray, mask: np.ndarray, classes: int = 1, strength=0.55) -> np.ndarray:
    """The image (H, W, 1 or 3) with its classes coloured; class 0 is left as it is."""
    result = np.broadcast_to(image, (*image.shape[:2], 3)).astype(np.float32)
    for index in range(1, max(2, classes)):
        colour = rgb(CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)])
        result[mask == index] = (1 - strength) * result[mask == index] + strength * colour
    return result.astype(np.uint8)


def errors(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, ignore=None) -> np.ndarray:
    """The greyed image with what was missed and what was added in colour."""
    grey = np.broadcast_to(image.mean(2, keepdims=True), (*image.shape[:2], 3))
    result = (0.5 * grey + 100).astype(np.uint8)
    wrong = (truth != prediction) & (truth != (-1 if ignore is None else ignore))
    result[wrong & (truth > 0)] = rgb(MISSED)
    result[wrong & (truth == 0)] = rgb(ADDED)
    return result


def legend(fig: Figure, entries: dict[str, str]) -> None:
    """Coloured squares with their names below the panels."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in entries.items()]
    fig.legend(handles=handles, loc='outside lower center', ncols=8, fontsize=8, frameon=False)


def error_legend(classes: int) -> dict[str, str]:
    """Entries of `legend` for the colours of `errors`."""
    return {'missed' if classes == 1 else 'missed, or another class': MISSED, 'added': ADDED}


def class_legend(classes: int) -> dict[str, str]:
    """Entries of `legend` for the colours of `overlay`."""
    if classes == 1:
        return {'foreground': CLASS_COLOURS[0]}
    colours = [CLASS_COLOURS[i % len(CLASS_COLOURS)] for i in range(classes - 1)]
    return {f'class {index + 1}': colour for index, colour in enumerate(colours)}


def small(image: np.ndarray, side: int = 480) -> np.ndarray:
    """The image, or mask, at most `side` pixels wide and high; masks by the nearest pixel."""
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    size = tuple(max(1, round(n * scale)) for n in image.shape[1::-1])
    method = cv2.INTER_AREA if image.ndim == 3 else cv2.INTER_NEAREST
    return cv2.resize(image, size, interpolation=method).reshape(size[1], size[0], *image.shape[2:])


def curves(table, title: str) -> Figure:
    """Loss, Dice and learning rate over the epochs, from the history of a run."""
    fig, axes = figure(1, 3, 3.6, 2.8, title)
    epochs = table.groupby('epoch').last()
    panels = [
        ('loss', {'train_loss': ORANGE, 'val_loss': BLUE}),
        ('mean over images', {'val_dice': BLUE, 'val_iou': GREEN}),
        ('learning rate', {'lr': BLACK}),
    ]
    for axis, (label, columns) in zip(axes[0], panels):
        for column, colour in columns.items():
            if column in epochs and epochs[column].notna().any():
                line = epochs[column].dropna()
                axis.plot(
                    line.index + 1, line, color=colour, marker='o', markersize=3, label=column
                )
        axis.set_xlabel('epoch')
        axis.set_ylabel(label)
        if label == 'learning rate':
            axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_xlim(0.5, len(epochs) + 0.5)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    return fig


def histogram(values, label: str, title: str) -> Figure:
    """How many images have which score; the median is marked."""
    fig, axes = figure(1, 1, 5.5, 3.2, title)
    axis = axes[0, 0]
    low = min(0.9, np.floor(np.min(values) * 20) / 20)
    axis.hist(values, bins=np.linspace(low, 1, 41), color=BLUE)
    axis.axvline(np.median(values), color=ORANGE, label=f'median {np.median(values):.4f}')
    axis.set_xlabel(label)
    axis.set_ylabel('images')
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.legend(fontsize=8, frameon=False)
    axis.grid(alpha=0.3)
    return fig


def precision(table, title: str) -> Figure:
    """Speed, memory and Dice of the rows of precision.csv, side by side."""
    fig, axes = figure(1, 3, 3.4, 2.4, title)
    panels = [
        ('images_per_second', 'images per second', GREEN, '.1f'),
        ('peak_memory_mb', 'peak memory, MB', ORANGE, '.0f'),
        ('val_dice', 'validation Dice', BLUE, '.4f'),
    ]
    rows = range(len(table))
    for axis, (column, label, colour, digits) in zip(axes[0], panels):
        values = table[column].astype(float)
        axis.barh(rows, values.fillna(0), color=colour, height=0.6)
        for row, value in zip(rows, values):
            text = 'not run' if np.isnan(value) else f'{value:{digits}}'
            axis.text(np.nan_to_num(value), row, f' {text}', va='center', fontsize=8)
        axis.margins(x=0.25)
        axis.set_yticks(rows, table.precision if column == panels[0][0] else [''] * len(table))
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.spines[['top', 'right']].set_visible(False)
    return fig


def show(file: Path) -> None:
    """Open a picture where there is a screen; elsewhere the file is all there is."""
    if os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY') or os.name == 'nt':
        from PIL import Image

        Image.open(file).show()
