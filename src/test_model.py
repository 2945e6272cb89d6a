"""Look at the model: its parts at INPUT_SHAPE, their parameters and sizes (a script, not a unit test).

Reads   nothing but MODEL_NAME, CROP_SIZE, CHANNELS, CLASSES, INPUT_SHAPE; the weights are random.
Writes  nothing.

    python test_model.py
    python test_model.py MODEL_NAME=smp_fpn_resnet18 CROP_SIZE=512
    python test_model.py --list          every decoder and encoder, with parameters where known
"""

import sys

import config

WORDS = [word for word in sys.argv[1:] if word != '--list']
if __name__ == '__main__':
    import command_line

    command_line.start(__doc__, WORDS)

import torch

import decoders
import encoders
import model_dispatcher


def main() -> None:
    if '--list' in sys.argv[1:]:
        list_names()
    else:
        summarise()


def summarise() -> None:
    """Print each part's parameters and the size of its output for one image of INPUT_SHAPE."""
    model = model_dispatcher.build_model(
        config.MODEL_NAME, channels=config.CHANNELS, classes=config.CLASSES
    )
    decoders.check_size(model, config.crop_size())
    shapes = {}
    parts = {'encoder': model.encoder, 'decoder': model.decoder, 'head': model.segmentation_head}
    for name, part in parts.items():
        part.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: out}))
    with torch.inference_mode():
        model.eval()(torch.zeros(1, *config.INPUT_SHAPE))
    print(f'{config.MODEL_NAME} at {tuple(config.INPUT_SHAPE)}')
    for name, part in parts.items():
        out = shapes[name]
        maps = out if isinstance(out, (list, tuple)) else [out]
        sizes = ', '.join('x'.join(map(str, m.shape[1:])) for m in maps if torch.is_tensor(m))
        print(f'{name:8s} {millions(part)} parameters   gives {sizes}')
    print(f'{"all":8s} {millions(model)} parameters')


def millions(module: torch.nn.Module) -> str:
    return f'{sum(p.numel() for p in module.parameters()) / 1e6:8.2f} M'


def list_names() -> None:
    """Print every decoder with its parameters on resnet34, and every encoder with its own."""
    print('MODEL_NAME = smp_<decoder>_<encoder>\n\ndecoders, with parameters on resnet34')
    for name in decoders.DECODERS:
        try:
            model = model_dispatcher.build_model(f'smp_{name}_resnet34')
            print(f'  {name:14s}{millions(model.decoder)}')
        except config.UserMistake as mistake:
            print(f'  {name:14s} {mistake}')
    print('\nencoders, with parameters')
    for name in encoders.SMP_ENCODERS:
        with torch.device('meta'):  # shapes alone
            print(f'  {name:30s}{millions(encoders.get_encoder(name))}')
    print('\nencoders of timm that give feature maps at strides that decoders understand')
    print('  ' + '\n  '.join(name for name in encoders.names() if name.startswith('tu-')))


if __name__ == '__main__':
    command_line.run(main)
