"""Every loss on the demo's cars: Dice after the same number of steps, and time per call.

    python src/demo.py --only-draw
    python tests/bench_losses.py                  writes output/losses.md

One process, one small model per loss from the same weights, the same batches in the same order:
250 steps of 8 images at 64 x 96 on the first cars, scored on the others at that size. Times are per
forward and backward at 1280 x 1918, one image, one CPU core, against plain CE in turn, median of 3.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'src'))

import config
import dice_loss
import metrics
import model_dispatcher

SIZE, STEPS, BATCH = (64, 96), 250, 8


def load(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, float (N, 3, H, W) of about -1..1, and masks (N, H, W), in the order of the cars."""
    pairs = []
    for file in sorted((folder / 'train_hq').iterdir()):
        mask = folder / 'train_masks' / f'{file.stem}_mask.gif'
        pairs.append(pairs.read_pair(file, mask, SIZE, 3, 1, None))
    x = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in pairs])
    return x / 127.5 - 1, torch.stack([torch.from_numpy(mask) for _, mask in pairs])


def train(loss, x, y, held_out: torch.Tensor) -> float:
    """Mean Dice over the held-out images after STEPS steps of Adam."""
    torch.manual_seed(0)
    model = model_dispatcher.build_model('smp_linknet_tu-regnetx_002')
    optimizer = torch.optim.Adam(model.parameters(), 0.002)
    own = torch.arange(len(x))[~held_out]
    for _ in range(STEPS):
        batch = own[torch.randint(len(own), (BATCH,))]
        optimizer.zero_grad()
        loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        prediction = torch.cat(
            [metrics.decide(metrics.activate(model(b))) for b in x[held_out].split(16)]
        )
    return metrics.dice_and_iou(metrics.count(prediction, y[held_out], 1))[0].mean().item()


def ratio(loss, base) -> float:
    """Time of a forward and a backward pass at Carvana's size against another loss's, in turn."""
    logits = torch.randn(1, 1, 1280, 1918, requires_grad=True)
    mask = (torch.rand(1, 1280, 1918) < 0.2).to(torch.uint8)
    times = {base: [], loss: []}
    for _ in range(4):  # the first is a warm-up
        for each in times:
            start = time.perf_counter()
            each(logits, mask).backward()
            times[each].append(time.perf_counter() - start)
    return statistics.median(times[loss][1:]) / statistics.median(times[base][1:])


def main() -> None:
    """All losses, or those named on the command line."""
    torch.set_num_threads(1)
    x, y = load(config.path('input/demo'))
    held_out = torch.arange(len(x)) >= len(x) * 2 // 3
    base = dice_loss.build_loss('CE')
    rows = [f'| loss | Dice after {STEPS} steps | time per call against CE |', '|---|---|---|']
    for name in sys.argv[1:] or dice_loss.LOSSES:
        loss = dice_loss.build_loss(name)
        rows.append(f'| {name} | {train(loss, x, y, held_out):.4f} | {ratio(loss, base):.1f} |')
        print(rows[-1], flush=True)
    config.path('output/losses.md').write_text('\n'.join(rows) + '\n')


if __name__ == '__main__':
    main()
