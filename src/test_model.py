"""Look at the model: its parts at INPUT_SHAPE, their parameters and sizes (a script, not a unit test).

Reads   nothing but MODEL_NAME, CROP_SIZE, CHANNELS, CLASSES, INPUT_SHAPE; the weights are random.
Writes  nothing.

    python test_model.py
    python test_model.py MODEL_NAME=smp_fpn_resnet18 CROP_SIZE=512
    python test_model.py --list               every decoder and encoder with its parameters: minutes
    python test_model.py --list convnext      those with convnext in their names
"""

import contextlib

import config

if __name__ == '__main__':
    import command_line

    OPTIONS = command_line.start(__doc__, {'--list': {'nargs': '?', 'const': ''}})

import torch
from segmentation_models_pytorch.encoders import get_encoder

import decoders
import encoders
import model_dispatcher


def main() -> None:
    if OPTIONS.list is None:
        summarise()
    else:
        list_names(OPTIONS.list)


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


def list_names(text: str) -> None:
    """Print the decoders and the encoders with `text` in their names, with their parameters."""
    print('MODEL_NAME = smp_<decoder>_<encoder>\n\ndecoders, with parameters on an encoder')
    for name in decoders.DECODERS:
        encoder = 'tu-vit_tiny_patch16_224' if name == 'dpt' else 'resnet34'
        model = model_dispatcher.build(name, encoder)
        print(f'  {name:14s}{millions(model.decoder)}  ({encoder})')
    print('\nencoders, with parameters; tu- are those of timm', flush=True)
    for name in encoders.names():
        if text in name:
            encoder, note = sized_encoder(name)
            if encoder is not None:
                print(f'  {name:50s}{millions(encoder)}  {note}'.rstrip(), flush=True)


def sized_encoder(name: str) -> tuple[torch.nn.Module | None, str]:
    """An encoder without memory for its weights where it allows that, and what to know of it; None
    for one that no decoder takes."""
    with contextlib.suppress(Exception), torch.device('meta'):  # timm's are of too many kinds
        return get_encoder(name, weights=None), ''
    with contextlib.suppress(Exception), torch.device('meta'):
        return decoders.DECODERS['dpt'](name, encoder_weights=None).encoder, 'for dpt alone'
    if name in encoders.SMP_ENCODERS:  # one that looks at its values while it is built
        return get_encoder(name, weights=None), ''
    return None, ''


if __name__ == '__main__':
    command_line.run(main)
