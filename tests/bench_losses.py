"""Benchmark of the losses on the demo's cars: Dice after equal training, and time per call.

Reads   input/demo, which demo.py draws.
Writes  output/losses.md.

    python src/demo.py --only-draw
    python tests/bench_losses.py                  all losses, minutes each
    python tests/bench_losses.py CE IoULoss       some of them

Each loss trains a small model from the same weights on the same batches: 250 steps (--steps) of 8
images of 64 x 96 pixels. The last third of the images is held out for the Dice. The time is that of
a forward and a backward pass on one 1918x1280 image (--size) and one CPU core, relative to CE
(median of 3).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'src'))

import config
import demo
import dice_loss
import images
import metrics
import model_dispatcher

SIZE, BATCH = (64, 96), 8


def load(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) scaled to -1..1, and masks (N, H, W), ordered by name."""
    x, y = [], []
    for file in sorted((folder / 'train_hq').iterdir()):
        mask_file = folder / 'train_masks' / f'{file.stem}_mask.gif'
        image = torch.from_numpy(images.read_image(file, 3, SIZE))
        x.append(image.permute(2, 0, 1) / 127.5 - 1)
        y.append(torch.from_numpy(images.read_mask(mask_file, size=SIZE)))
    return torch.stack(x), torch.stack(y)


def train(loss, x, y, held_out: torch.Tensor, steps: int) -> float:
    """Train a model with a loss. Return the mean Dice of the held-out images."""
    torch.manual_seed(0)
    model = model_dispatcher.build_model('smp_linknet_tu-regnetx_002')
    optimizer = torch.optim.Adam(model.parameters(), 0.002)
    trained = torch.arange(len(x))[~held_out]
    for _ in range(steps):
        batch = trained[torch.randint(len(trained), (BATCH,))]
        optimizer.zero_grad()
        loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        prediction = torch.cat(
            [metrics.decide(metrics.activate(model(b))) for b in x[held_out].split(16)]
        )
    return metrics.dice_and_iou(metrics.count(prediction, y[held_out], 1))[0].mean().item()


def ratio(loss, base, size: tuple[int, int]) -> float:
    """Time of a forward and a backward pass at a size (width, height), relative to `base`."""
    logits = torch.randn(1, 1, *size[::-1], requires_grad=True)
    mask = (torch.rand(1, *size[::-1]) < 0.2).to(torch.uint8)
    times = {base: [], loss: []}
    for _ in range(4):  # in turn, as other load on the machine varies; the first is a warm-up
        for each in times:
            start = time.perf_counter()
            each(logits, mask).backward()
            times[each].append(time.perf_counter() - start)
    return statistics.median(times[loss][1:]) / statistics.median(times[base][1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('losses', nargs='*', default=list(dice_loss.LOSSES))
    parser.add_argument('--steps', type=int, default=250)
    parser.add_argument('--size', type=demo.size, default=(1918, 1280))
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = load(config.path(config.INPUT) / 'demo')
    held_out = torch.arange(len(x)) >= len(x) * 2 // 3
    base = dice_loss.build_loss('CE')
    rows = [f'| loss | Dice after {options.steps} steps | time per call against CE |']
    rows.append('|---|---|---|')
    for name in options.losses:
        loss = dice_loss.build_loss(name)
        dice = train(loss, x, y, held_out, options.steps)
        rows.append(f'| {name} | {dice:.4f} | {ratio(loss, base, options.size):.1f} |')
        print(rows[-1], flush=True)
    output = config.path(config.OUTPUT)
    output.mkdir(parents=True, exist_ok=True)
    (output / 'losses.md').write_text('\n'.join(rows) + '\n')


if __name__ == '__main__':
    main()
