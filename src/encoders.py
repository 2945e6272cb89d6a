"""The encoder half of "Unetify": any encoder by name, with its weights.

An encoder is one of segmentation_models_pytorch's own (`resnet34`, `efficientnet-b4`, ...) or, as
`tu-<name>`, any of timm's that gives feature maps (`tu-convnext_tiny`).
"""

from pathlib import Path

import safetensors.torch
import timm
import torch
from segmentation_models_pytorch.encoders import encoders as SMP_ENCODERS

import config


def names() -> list[str]:
    """All legal encoder names."""
    return [*SMP_ENCODERS, *(f'tu-{name}' for name in timm.list_models())]


def check_name(name: str) -> None:
    """Raise config.UserMistake, with the nearest legal names, for an encoder that does not exist."""
    # timm also takes model.tag, where the tag chooses among its pretrained weights.
    if name in SMP_ENCODERS or (name.startswith('tu-') and timm.is_model(name[3:].split('.')[0])):
        return
    raise config.UserMistake(
        f"MODEL_NAME: no encoder '{name}'; {config.nearest(name, names())}all names: python "
        'test_model.py --list'
    )


def hub_weights(name: str, weights: str | None) -> str | bool | None:
    """What segmentation_models_pytorch is to be given as encoder_weights: a name, or nothing.

    Raises config.UserMistake for a name that the encoder has no weights of and that is no file.
    """
    if weights is None or is_file(weights):
        return None
    if name.startswith('tu-'):
        legal = ['imagenet']  # timm's default tag of the model, or the one in its name
    else:
        legal = list(SMP_ENCODERS[name]['pretrained_settings'])
    if weights not in legal:
        raise config.UserMistake(
            f"ENCODER_WEIGHTS='{weights}': neither a file nor weights of {name}, which has "
            f'{", ".join(legal) or "none"}; None starts from random weights'
        )
    return True if name.startswith('tu-') else weights


def is_file(weights: str | None) -> bool:
    """Whether ENCODER_WEIGHTS is meant as a path: by its suffix, or because it is there."""
    if weights is None:
        return False
    return Path(weights).suffix in ('.pth', '.pt', '.safetensors', '.ckpt', '.bin') or (
        config.path(weights).is_file()
    )


def no_download(name: str, weights: str, error: Exception) -> config.UserMistake:
    """The mistake to raise where pretrained weights could not be had."""
    return config.UserMistake(
        f"ENCODER_WEIGHTS='{weights}': the weights of {name} could not be downloaded "
        f'({config.in_short(error)}). '
        'Without a connection set ENCODER_WEIGHTS to a weights file (.pth, .pt, .safetensors), or to '
        'None for random weights'
    )


def load_file(encoder: torch.nn.Module, file: str) -> str:
    """Load an encoder's weights from a file of any common layout; returns one line on what matched.

    Understood are the state dicts of the encoder itself, of timm, of torchvision, of a whole
    segmentation_models_pytorch model and of this project's checkpoints, bare or under 'state_dict'
    or 'model'. A tensor is loaded where name and shape agree.

    Raises config.UserMistake where the file is missing, cannot be read, or matches nothing. Pickles
    are read as weights only: code in them is never run.
    """
    found = read_state(config.path(file))
    own = {flat(name): name for name, tensor in encoder.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    best = {}
    for prefix in sorted({name[:end] for name in found for end in ends(name)}):
        candidate = {}
        for name, tensor in found.items():
            target = own.get(flat(name.removeprefix(prefix))) if name.startswith(prefix) else None
            if target is not None and shapes[target] == tensor.shape:
                candidate[target] = tensor
        best = max(best, candidate, key=len)
    weights = [name for name in best if not name.endswith('num_batches_tracked')]
    if not weights:
        raise config.UserMistake(
            f'ENCODER_WEIGHTS={file}: none of its {len(found)} tensors fits the encoder (it begins '
            f'with {next(iter(found), "nothing")}): weights of another model?'
        )
    encoder.load_state_dict(best, strict=False)
    missing = [n for n in shapes if n not in best and not n.endswith('num_batches_tracked')]
    report = f'{len(weights)} of {len(weights) + len(missing)} encoder tensors loaded from {file}'
    if missing:
        report += f'; left random: {", ".join(missing[:3])}{", ..." if len(missing) > 3 else ""}'
    return report


def ends(name: str) -> list[int]:
    """Where a prefix of a dotted name may end: before its first part, and after each of three."""
    parts = name.split('.')
    return [0, *(len('.'.join(parts[: n + 1])) + 1 for n in range(min(3, len(parts) - 1)))]


def flat(name: str) -> str:
    """A tensor's name as compared: timm's feature extractors write stages_0 for stages.0, and
    segmentation_models_pytorch puts them under 'model'."""
    return name.removeprefix('model.').replace('.', '_')


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a .safetensors, .pth, .pt or .ckpt file, by name."""
    try:
        if file.suffix == '.safetensors':
            state = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise config.UserMistake(f'ENCODER_WEIGHTS: {file}: no such file') from None
    except Exception as error:  # what a damaged file raises is up to pickle, zipfile, safetensors
        raise config.UserMistake(
            f'ENCODER_WEIGHTS: {file}: not a weights file ({config.in_short(error)})'
        ) from None
    for inner in ('state_dict', 'model', 'state_dict_ema'):
        if isinstance(state, dict) and isinstance(state.get(inner), dict):
            state = state[inner]
    tensors = state.items() if isinstance(state, dict) else ()
    return {name: tensor for name, tensor in tensors if isinstance(tensor, torch.Tensor)}
