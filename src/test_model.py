"""Show the model: parameters and output sizes of its parts for one image (a script, not a unit test).

Reads   MODEL_NAME, INPUT_SHAPE (CHANNELS, CROP_SIZE), CLASSES, TRAIN_BATCH_SIZE; weights are random.
Writes  nothing.

    python test_model.py MODEL_NAME=smp_fpn_resnet18 CROP_SIZE=512
    python test_model.py --list               the names of all decoders and encoders
    python test_model.py --list convnext      the encoders with convnext in their names
"""

import signal
from functools import partial

import torch

import command_line
import config
import decoders
import encoders
import model_dispatcher

OPTIONS = {'--list': {'nargs': '?', 'const': '', 'metavar': 'TEXT'}}


def print_part(name: str, part: torch.nn.Module, _, output) -> None:
    """A forward hook: print a part's parameters and the size of its output."""
    maps = output if isinstance(output, (list, tuple)) else [output]
    sizes = ', '.join('x'.join(map(str, m.shape[1:])) for m in maps if torch.is_tensor(m))
    millions = sum(p.numel() for p in part.parameters()) / 1e6
    print(f'{name:8s}{millions:8.2f} M parameters   output {sizes}')


def main(options) -> None:
    if options.list is not None:
        if hasattr(signal, 'SIGPIPE'):  # not on Windows
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly in `--list | head`
        print('MODEL_NAME = smp_<decoder>_<encoder>\n\ndecoders:', *decoders.DECODERS)
        names = [name for name in encoders.names() if options.list in name]
        print('\nencoders (tu-: from timm):', *names, sep='\n  ')
        return
    name, shape = config.MODEL_NAME, config.INPUT_SHAPE
    model = model_dispatcher.build_model(name, None, config.CHANNELS, config.CLASSES)
    model_dispatcher.try_out(model, name, config.TRAIN_BATCH_SIZE, shape)
    print(f'{name} at {tuple(shape)}')
    parts = {
        'encoder': model.encoder,
        'decoder': model.decoder,
        'head': model.segmentation_head,
        'all': model,
    }
    for part_name, part in parts.items():
        part.register_forward_hook(partial(print_part, part_name))
    with torch.inference_mode():
        model.eval()(torch.zeros(1, *shape))


if __name__ == '__main__':
    command_line.run(main, __doc__, OPTIONS)
