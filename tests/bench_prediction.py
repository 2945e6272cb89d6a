"""How fast the tester predicts and encodes, against decoding alone, on 1918x1280 JPEGs.

    python tests/bench_prediction.py [--images 200] [--size 1918x1280] [--repeats 5]

The model is one layer, so that what is measured is everything around it: decoding in the workers,
resizing, the probabilities at full size, the threshold, run lengths, writing. The baseline is a loop
over a DataLoader with as many workers that decodes each JPEG and does nothing with it. Both run in
turn, five times, start-up included; medians. Workers are one fewer than cores, as the main process
needs one, and torch has one thread, as one layer has no work for more. Then one mask is encoded, and
one JPEG decoded, in this process.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'src'))


import config
import demo
import images
import model_dispatcher
import predictor
import runtime
from Lightning_module import CarvanaModel


class OneLayer(torch.nn.Module):
    """A network of MODELS: logits that follow the green channel, at next to no cost."""

    def __init__(self, weights=None, channels=3, classes=1):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1)
        torch.nn.init.constant_(self.layer.weight, 20)
        torch.nn.init.constant_(self.layer.bias, -8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[:, 1:2])


class Decoding(Dataset):
    """The baseline: decode and forget."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> int:
        return images.read_image(self.files[index]).shape[0]


def predict(files: list[Path], folder: Path, size: int) -> None:
    config.OUTPUT = str(folder)
    constants = {'MODEL_NAME': 'one_layer', 'MODEL_MEAN': [0, 0, 0], 'MODEL_STD': [1, 1, 1]}
    model = CarvanaModel([0], [1], CROP_SIZE=size, **constants).eval()
    batches = predictor.ImageBatches(files, model)
    predictor.write_submission(predictor.Predictor([model], [0.5]), batches, None)


def decode(files: list[Path], *_) -> None:
    for _ in DataLoader(Decoding(files), config.VAL_BATCH_SIZE, num_workers=config.NUM_WORKERS):
        pass


def timed(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--images', type=int, default=200)
    parser.add_argument('--size', type=demo.size, default=(1918, 1280))
    parser.add_argument('--repeats', type=int, default=5)
    options = parser.parse_args()
    runtime.hide_warnings()
    model_dispatcher.MODELS['one_layer'] = OneLayer
    config.NUM_WORKERS = max(1, (os.cpu_count() or 1) - 1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, count = Path(temporary), options.images
        demo.make_dataset(folder, cars=0, test_cars=1, size=options.size)
        drawn = sorted((folder / 'test_hq').iterdir())
        files = [folder / f'{number:04d}.jpg' for number in range(count)]
        for number, file in enumerate(files):
            file.hardlink_to(drawn[number % len(drawn)])
        for size in (512, 1024):
            pairs = [
                (timed(predict, files, folder, size), timed(decode, files))
                for _ in range(options.repeats)
            ]
            ours, base = (statistics.median(times) for times in zip(*pairs))
            print(
                f'CROP_SIZE {size}: predicted {count / ours:.1f} images/s, only decoded '
                f'{count / base:.1f} images/s, ratio {base / ours:.2f}',
                flush=True,
            )
        truth = next((folder / 'test_masks_truth').iterdir())
        mask = images.read_mask(truth)
        encode = statistics.median(timed(images.rle_encode, mask) for _ in range(15))
        full = statistics.median(timed(images.read_image, files[0]) for _ in range(15))
        print(f'run lengths of a mask {1e3 * encode:.1f} ms, its JPEG {1e3 * full:.1f} ms')


if __name__ == '__main__':
    main()
