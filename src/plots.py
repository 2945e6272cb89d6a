"""The pictures that the scripts write, in colours that colour-blind people can tell apart."""

import warnings
from pathlib import Path

import cv2
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

import files

# Okabe and Ito's palette, then Paul Tol's muted one, which is less distinct.
BLUE, ORANGE, GREEN, RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'
CLASS_COLOURS = [
    GREEN, ORANGE, '#CC79A7', '#56B4E9', '#F0E442', '#999999', '#332288', '#88CCEE',
    '#117733', '#999933', '#DDCC77', '#CC6677', '#882255', '#AA4499', '#661100', '#6699CC',
] * 16  # fmt: skip
MISSED, ADDED = BLUE, RED  # foreground predicted as another class, background as foreground


def rgb(colour: str) -> np.ndarray:
    return np.array(to_rgb(colour)) * 255


def figure(rows: int, columns: int, width: float, height: float, title: str):
    """A figure and its axes (rows, columns), each `width` x `height` inches."""
    fig = Figure(figsize=(width * columns, height * rows), layout='constrained', dpi=110)
    fig.suptitle(title, fontsize=11)
    return fig, fig.subplots(rows, columns, squeeze=False)


def save(fig: Figure, file: Path) -> Path:
    """Write a picture atomically."""
    with files.atomic_write(file) as temporary, warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from font')  # drawn as a box
        fig.savefig(temporary, format='png')
    return file


def show_image(axis, image: np.ndarray, title: str) -> None:
    """Draw a uint8 image (H, W, 1 or 3) without ticks; a long title is shortened."""
    if len(title) > 32:
        title = f'{title[:15]}...{title[-14:]}'
    axis.imshow(image.squeeze(), cmap='gray', vmin=0, vmax=255)
    axis.set_title(title, fontsize=8, parse_math=False)  # a file may be named a$_$.png
    axis.set(xticks=[], yticks=[])


def overlay(image: np.ndarray, mask: np.ndarray, classes: int = 1, strength=0.55) -> np.ndarray:
    """The image (H, W, 1 or 3) with its classes coloured, except class 0."""
    result = np.broadcast_to(image, (*mask.shape, 3)).astype(np.float32)
    for index, colour in enumerate(CLASS_COLOURS[: max(1, classes - 1)], 1):
        result[mask == index] = (1 - strength) * result[mask == index] + strength * rgb(colour)
    return result.astype(np.uint8)


def errors(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, ignore) -> np.ndarray:
    """The image in grey, with missed and added pixels coloured, unless the mask is `ignore`."""
    grey = np.broadcast_to(image.mean(2, keepdims=True), (*truth.shape, 3))
    result = (0.5 * grey + 100).astype(np.uint8)
    wrong = (truth != prediction) & (truth != ignore)
    result[wrong & (truth > 0)] = rgb(MISSED)
    result[wrong & (truth == 0)] = rgb(ADDED)
    return result


def legend(fig: Figure, classes: int, **others: str) -> None:
    """Name the colours of `overlay`, and others (name=colour), below the axes."""
    names = [f'class {index}' for index in range(1, classes)] or ['foreground']
    colours = dict(zip(names, CLASS_COLOURS)) | others
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    fig.legend(handles=handles, loc='outside lower center', ncols=8, fontsize=8, frameon=False)


def small(image: np.ndarray, side: int = 480) -> np.ndarray:
    """The image or mask, at most `side` pixels wide and high."""
    scale = min(1, side / max(image.shape[:2]))
    method = cv2.INTER_AREA if image.ndim == 3 else cv2.INTER_NEAREST
    width, height = (max(1, round(n * scale)) for n in image.shape[1::-1])
    resized = cv2.resize(image, (width, height), interpolation=method)
    return resized.reshape(height, width, *image.shape[2:])  # cv2 drops a single channel


def comparison(rows: list[tuple], title: str, classes: int, ignore_index: int | None) -> Figure:
    """Image, truth, prediction and errors, a row for each
    (label, name, image (H, W, 1 or 3), truth (H, W), predicted mask (H, W), Dice)."""
    fig, axes = figure(len(rows), 4, 2.6, 2.0, title)
    for axis_row, (label, name, *arrays, dice) in zip(axes, rows):
        image, truth, mask = map(small, arrays)
        show_image(axis_row[0], image, name)
        show_image(axis_row[1], overlay(image, truth, classes), 'truth')
        show_image(axis_row[2], overlay(image, mask, classes), f'prediction, Dice {dice:.4f}')
        show_image(axis_row[3], errors(image, truth, mask, ignore_index), 'errors')
        axis_row[0].set_ylabel(label, fontsize=8)
    legend(fig, classes, missed=MISSED, added=ADDED)
    return fig


def samples(masks: dict[str, tuple], classes: int) -> Figure:
    """Test images with their predicted masks drawn over them: name -> (image, mask)."""
    title = 'The first test images with their predicted masks'
    fig, axes = figure(-(-len(masks) // 4), min(4, len(masks)), 2.8, 2.1, title)
    for axis in axes.flat[len(masks) :]:
        axis.axis('off')
    for axis, (name, arrays) in zip(axes.flat, masks.items()):
        show_image(axis, overlay(*map(small, arrays), classes), name)
    legend(fig, classes)
    return fig


def curves(history: list[dict], title: str) -> Figure:
    """Loss, scores and learning rate, from a dictionary of logged values per epoch."""
    fig, axes = figure(1, 3, 3.6, 2.8, title)
    panels = {
        'loss': {'train_loss': ORANGE, 'val_loss': BLUE},
        'mean over images': {'val_dice': BLUE, 'val_iou': GREEN},
        'learning rate': {'lr': 'black'},
    }
    epochs = [row['epoch'] + 1 for row in history]
    for axis, (label, columns) in zip(axes[0], panels.items()):
        for column, colour in columns.items():
            values = [row[column] for row in history]
            axis.plot(epochs, values, color=colour, marker='o', ms=3, label=column)
        axis.legend(fontsize=8, frameon=False)
        axis.set(xlabel='epochs', ylabel=label, xlim=(0, len(history) + 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    axes[0, 2].set_ylim(0, None)
    return fig


def histogram(dice, title: str) -> Figure:
    """A histogram of the Dice of all images, with the median."""
    fig, axes = figure(1, 1, 5.5, 3.2, title)
    axis, median = axes[0, 0], np.median(dice)
    axis.hist(dice, bins=40, range=(min(0.9, np.min(dice)), 1), color=BLUE)
    axis.axvline(median, color=ORANGE, label=f'median {median:.4f}')
    axis.set(xlabel='Dice', ylabel='images')
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    return fig


def precision(table, title: str) -> Figure:
    """Speed, memory and Dice of each row of precision.csv."""
    fig, axes = figure(1, 3, 3.4, 2.4, title)
    panels = {
        'images_per_second': ('images per second', GREEN, '.1f'),
        'peak_memory_mb': ('peak memory, MB', ORANGE, '.0f'),
        'val_dice': ('validation Dice', BLUE, '.4f'),
    }
    for axis, (column, (label, colour, digits)) in zip(axes[0], panels.items()):
        texts = ['-' if np.isnan(value) else f'{value:{digits}}' for value in table[column]]
        bars = axis.barh(table.precision, table[column].fillna(0), color=colour, height=0.6)
        axis.bar_label(bars, texts, padding=3, fontsize=8)
        axis.set(xlabel=label, xmargin=0.25)
        axis.invert_yaxis()
        axis.label_outer()
        axis.spines[['top', 'right']].set_visible(False)
    return fig


def precision_ranges(parts: dict, scale: float, title: str) -> Figure:
    """Histograms of each part's activations and gradients over the range of float16.

    Args:
        parts: name -> Part of precision_ranges.measure, whose values were taken in float32.
        scale: that of the gradient scaler.
    """
    # Powers of two: float16 rounds values below the first to 0, and those from the last to infinity.
    zero, normal, infinite = -25, -14, 16
    scaled_zero = zero - np.log2(scale)
    edges = np.arange(min(-46, int(scaled_zero) - 5), 25)
    fig, axes = figure(1, 1, 10.5, 2.3 + 0.4 * len(parts), title)
    axis, small = axes[0, 0], {'fontsize': 8, 'ha': 'center'}
    zones = [
        ('becomes 0', edges[0], zero, 'white'),
        ('subnormal', zero, normal, '0.93'),
        ('float16, up to 65504', normal, infinite, '0.86'),
        ('infinite', infinite, edges[-1], 'white'),
    ]
    for name, start, end, colour in zones:
        axis.axvspan(start, end, color=colour, zorder=0)
        axis.text((start + end) / 2, -2.3, name, **small)
    axis.text(-11, -3.2, 'bfloat16 and float32: from $2^{-126}$ to $2^{128}$', **small)
    axis.annotate('', (edges[0], -3), (edges[-1], -3), arrowprops={'arrowstyle': '<->'})
    axis.text((scaled_zero + zero) / 2, -1.4, f'scale {scale:g}', color=RED, **small)
    axis.annotate(
        '', (zero, -1.2), (scaled_zero, -1.2), arrowprops={'arrowstyle': '->', 'color': RED}
    )
    for limit, style in ((zero, '-'), (infinite, '-'), (scaled_zero, '--')):
        axis.axvline(limit, color=RED, lw=1, ls=style)

    lost = (edges[:-1] < zero) | (edges[:-1] >= infinite)
    # Three columns of numbers to the right of the axis, at 55, 105 and 155 points.
    beside = {'xycoords': axis.get_yaxis_transform(), 'textcoords': 'offset points'}
    beside |= {'ha': 'right', 'fontsize': 8}
    for row, part in enumerate(parts.values()):
        for values, colour in ((part.activations, BLUE), (part.activation_grad, ORANGE)):
            heights = bar_heights(values, edges)
            style = {'edges': edges, 'baseline': row, 'fill': True}
            axis.stairs(row - heights, color=colour, alpha=0.6, **style)
            axis.stairs(row - heights * lost, color=RED, **style)
        outline = row - bar_heights(part.weight_grad, edges)
        axis.stairs(outline, edges, baseline=None, color='black', lw=0.9)
        axis.annotate(f'{max(part.largest.values()):.3g}', (1, row), (55, 0), **beside)
        gradients = part.activation_grad
        axis.annotate(f'{gradients.share("lost"):.1%}', (1, row), (105, 0), **beside)
        axis.annotate(f'{gradients.share("lost_scaled"):.1%}', (1, row), (155, 0), **beside)
    axis.annotate('largest\nactivation', (1, -1.2), (55, 0), **beside)
    axis.annotate('gradients\nlost', (1, -1.2), (105, 0), **beside)
    axis.annotate('lost with\nthe scale', (1, -1.2), (155, 0), **beside)
    axis.set(xlim=edges[[0, -1]], ylim=(len(parts) - 0.6, -4.2), xlabel='magnitude in float32')
    axis.set_yticks(range(len(parts)), parts, fontsize=8)
    axis.xaxis.set_major_formatter(lambda x, _: f'$2^{{{x:.0f}}}$')
    handles = [
        Patch(color=BLUE, alpha=0.6, label='activations'),
        Patch(color=ORANGE, alpha=0.6, label='gradients of activations'),
        Patch(fill=False, label='gradients of weights'),
        Patch(color=RED, label='lost without the scale'),
    ]
    fig.legend(handles=handles, loc='outside lower center', ncols=4, fontsize=8, frameon=False)
    return fig


def bar_heights(values, edges: np.ndarray) -> np.ndarray:
    """Heights, up to 0.85, of Magnitudes between powers of two. The outer bars hold what is beyond."""
    counts = values.histogram.double().numpy()  # entry n begins at 2^(n - 127)
    inside = counts[127 + edges[0] : 127 + edges[-1]].copy()
    inside[0] += counts[: 127 + edges[0]].sum()
    inside[-1] += counts[127 + edges[-1] :].sum()
    return 0.85 * inside / max(1, inside.max())
