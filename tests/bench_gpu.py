"""The parts of bench_gpu.sh: what needs an NVIDIA GPU, the most important first.

    python tests/bench_gpu.py gpu.txt

Each part is a process of its own, and is left out if less time is left than it needs. Everything that
is printed goes to gpu.txt, and each row also to gpu.txt.rows, as JSON. Environment variables:

LIMIT=420                 seconds for all parts
MODEL=smp_unet_resnet34 SIZE=1024 BATCH=8     pixels and images of a step
STEPS=60                  timed steps of a row
CARS=12 COPIES=4          drawn cars, and files of each of their images
DRAW=1918x1280 N_FOLDS=8
PARTS=                    names of parts to run, such as '16,host waits'; all by default
ANY_DEVICE=1              run the first parts on a CPU, to test this script
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'src'))

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

import command_line
import config
import demo
import runtime
import test_precision
from Lightning_module import CarvanaModel

SRC = Path(config.__file__).parent
START = time.monotonic()


def setting(name: str, default) -> int | str:
    return type(default)(os.environ.get(name, default))


LIMIT, SIZE, BATCH = setting('LIMIT', 420), setting('SIZE', 1024), setting('BATCH', 8)
STEPS, CARS, COPIES = setting('STEPS', 60), setting('CARS', 12), setting('COPIES', 4)
DRAW, N_FOLDS = setting('DRAW', '1918x1280'), setting('N_FOLDS', 8)
MODEL = setting('MODEL', 'smp_unet_resnet34')
PARTS = [part for part in setting('PARTS', '').split(',') if part]
ANY_DEVICE = 'ANY_DEVICE' in os.environ
WARM_UP = 20  # steps before the input is timed: the workers fill their queues


# ------------------------------------------------------------ parts, each in a process of its own
def draw(folder: str) -> None:
    """Draw cars. Hard links make more files of them: each is a file of its own for the cache."""
    demo.make_dataset(folder, cars=CARS, test_cars=0, size=demo.size(DRAW))
    for kind in ('train_hq', 'train_masks'):
        for file in sorted(Path(folder, kind).iterdir()):
            for copy in range(1, COPIES):
                file.with_name(f'{copy:02x}{file.name[2:]}').hardlink_to(file)


def row(file: str, label: str, name: str, layout: str) -> None:
    """A row of test_precision.py."""
    if layout == 'nchw':
        torch.channels_last = torch.contiguous_format
    result = test_precision.measure(name, STEPS)
    result.pop('model', None)
    write_row(file, {'label': label, **result})


class ResidentModel(CarvanaModel):
    """CarvanaModel whose batches lie on the device already."""

    def train_dataloader(self) -> DataLoader:
        batches = []
        for batch in super().train_dataloader():
            if len(batch['img']) == config.TRAIN_BATCH_SIZE:
                on_device = {key: batch[key].to(self.device) for key in ('image', 'mask')}
                batches.append({**batch, **on_device})
            if len(batches) == 8:
                break
        return DataLoader(batches * 12, batch_size=None)


def images_per_second(model: type) -> float:
    pl.seed_everything(1, verbose=False)
    clock = test_precision.Clock(WARM_UP)
    trainer = runtime.make_trainer(
        max_steps=WARM_UP + 3 * STEPS,
        limit_val_batches=0,
        callbacks=[clock],
        benchmark=True,
        num_sanity_val_steps=0,
    )
    trainer.fit(model(list(range(1, config.N_FOLDS)), [0]))
    return clock.images / clock.seconds


def compare_input(file: str) -> None:
    """The real input with CACHE against batches on the device, in turn, twice."""
    images_per_second(CarvanaModel)  # fills the cache
    for turn in (1, 2):
        real, resident = images_per_second(CarvanaModel), images_per_second(ResidentModel)
        rates = {'images_per_second': real, 'on_the_device': resident, 'ratio': real / resident}
        write_row(file, {'label': f'real input, turn {turn}', **rates})


def train(words: list[str], memory_fraction: float = 1.0, list_waits: bool = False) -> None:
    """Run Lightning_trainer.py in this process, with little memory or a list of host waits."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(memory_fraction)
        if list_waits:
            torch.cuda.set_sync_debug_mode('warn')
    import Lightning_trainer

    sys.argv = ['Lightning_trainer.py', *words]
    command_line.run(Lightning_trainer.main, Lightning_trainer.__doc__)


def write_row(file: str, values: dict) -> None:
    values = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps(values), flush=True)
    with open(f'{file}.rows', 'a', encoding='utf-8') as rows:
        print(json.dumps(values), file=rows)


# ------------------------------------------------------------ all parts
class Log:
    """Prints to standard output and to a file."""

    def __init__(self, file: Path):
        self.file = file.open('w', encoding='utf-8')

    def print(self, text: str) -> None:
        for target in (sys.stdout, self.file):
            print(text, file=target, flush=True)


def run_part(log: Log, label: str, seconds: int, *commands: list) -> None:
    """Run commands side by side, if so many seconds are left, and stop them at the limit."""
    if PARTS and label not in (*PARTS, 'draw', 'folds'):
        return
    left = LIMIT - (time.monotonic() - START)
    if left < seconds:
        log.print(f'--- {label}: left out, {left:.0f} s are left')
        return
    start = time.monotonic()
    log.print(f'--- {label} (at {start - START:.0f} s)')
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    processes = [
        subprocess.Popen(['timeout', '-k', '5', str(int(left)), sys.executable, *command], **pipes)
        for command in commands
    ]
    for process in processes:
        for line in process.stdout:
            log.print(line.rstrip())
    statuses = [process.wait() for process in processes]
    log.print(f'--- {label}: status {statuses}, {time.monotonic() - start:.0f} s')


def print_versions(log: Log) -> None:
    names = ('torch', 'pytorch-lightning', 'segmentation-models-pytorch', 'albumentations', 'numpy')
    log.print(time.strftime('%Y-%m-%d %H:%M UTC, ', time.gmtime()) + f'{config.cpu_count()} cores')
    log.print(', '.join(f'{name} {version(name)}' for name in names))
    if torch.cuda.is_available():
        query = [
            'nvidia-smi',
            '--query-gpu=name,driver_version,memory.total',
            '--format=csv,noheader',
        ]
        gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        log.print(f'{gpu}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}')
    elif not ANY_DEVICE:
        sys.exit('no GPU here that torch can use')


def print_goals(log: Log, file: Path) -> None:
    rows = [json.loads(line) for line in Path(f'{file}.rows').read_text().splitlines()]
    speed = {r['label']: r['images_per_second'] for r in rows if r.get('images_per_second')}
    memory = {r['label']: r['peak_memory_mb'] for r in rows if r.get('peak_memory_mb')}
    if '16' in speed and '32' in speed:
        fastest = max(speed['32'], speed.get('32 in NCHW', 0))
        log.print(f'16 over 32: {speed["16"] / speed["32"]:.2f} times as fast (goal 2.5), '
                  f'{speed["16"] / fastest:.2f} times the faster layout of 32')  # fmt: skip
    if '16' in memory and '32' in memory:
        log.print(f'memory of 16 over 32: {memory["16"] / memory["32"]:.2f} (goal 0.65)')
    ratios = [r['ratio'] for r in rows if 'ratio' in r]
    if ratios:
        log.print(f'real input over device: {statistics.mean(ratios):.3f} (goal 0.95)')


def main(file: Path) -> None:
    log, this = Log(file), __file__
    Path(f'{file}.rows').write_text('')
    print_versions(log)
    with tempfile.TemporaryDirectory() as folder:
        data, trainer = f'{folder}/data', [SRC / 'Lightning_trainer.py']
        words = [
            f'INPUT={data}', f'OUTPUT={folder}/output', f'LOGS_PATH={folder}/logs', 'TRAIN_CSV=None',
            'TEST_PATH=none', f'N_FOLDS={N_FOLDS}', 'FOLDS=[0]', f'CROP_SIZE={SIZE}',
            f'TRAIN_BATCH_SIZE={BATCH}', f'VAL_BATCH_SIZE={BATCH}', 'ACCUMULATE_GRAD_BATCHES=1',
            f'MODEL_NAME={MODEL}', 'ENCODER_WEIGHTS=None', 'CACHE=True', 'AUGMENTATION=flip',
        ]  # fmt: skip

        def measure(label: str, name: str, seconds: int, *more: str, layout: str = '') -> None:
            run_part(log, label, seconds, [this, 'row', file, label, name, layout, *words, *more])

        run_part(log, 'draw', 30, [this, 'draw', data])
        run_part(log, 'folds', 20, [SRC / 'folds.py', *words])
        for name in ('16', '32', 'bf16', '32 with TF32'):
            measure(name, name, 40)
        run_part(log, 'input', 60, [this, 'input', file, *words])
        measure('32 in NCHW', '32', 40, layout='nchw')
        waits = [this, 'waits', *words, f'CROP_SIZE={SIZE // 4}', 'EPOCHS=1', 'LIMIT_BATCHES=12']
        run_part(log, 'host waits', 25, waits)
        short = [*words, 'EPOCHS=1', 'LIMIT_BATCHES=20', 'NUM_WORKERS=4']
        run_part(
            log, 'three folds at once', 40, *([*trainer, *short, f'FOLDS=[{k}]'] for k in range(3))
        )
        run_part(log, 'out of memory', 25, [this, 'memory', *words, f'LOGS_PATH={folder}/oom'])
        small = [f'CROP_SIZE=({11 * SIZE // 32}, {SIZE // 2})', f'TRAIN_BATCH_SIZE={4 * BATCH}']
        for decoder in () if ANY_DEVICE else ('linknet', 'unet'):
            label = f'{decoder}_resnet34 at {11 * SIZE // 32} x {SIZE // 2}, batch {4 * BATCH}'
            measure(label, '16', 30, *small, f'MODEL_NAME=smp_{decoder}_resnet34')
        if not ANY_DEVICE:
            measure('16 with COMPILE', '16', 90, 'COMPILE=True')
    print_goals(log, file)
    log.print(f'{time.monotonic() - START:.0f} s')


if __name__ == '__main__':
    part, *arguments = sys.argv[1:] or ['gpu.txt']
    constants = [word for word in arguments if '=' in word]
    if constants:
        command_line.override(constants)
        command_line.check()
        runtime.hide_warnings()
    if part == 'draw':
        draw(arguments[0])
    elif part == 'row':
        row(*arguments[:4])
    elif part == 'input':
        compare_input(arguments[0])
    elif part == 'waits':
        train(constants, list_waits=True)
    elif part == 'memory':
        train([*constants, 'EPOCHS=1', 'LIMIT_BATCHES=2'], memory_fraction=0.05)
    else:
        main(Path(part).resolve())
