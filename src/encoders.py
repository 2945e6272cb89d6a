"""Any encoder by name, with its weights.

Names: those of segmentation_models_pytorch (smp), such as resnet34, and tu-<name> for any of timm.
"""

from pathlib import Path

import safetensors.torch
import timm
import torch
from segmentation_models_pytorch.encoders import encoders as SMP_ENCODERS

import config
import files


def names() -> list[str]:
    """All legal encoder names."""
    return [*SMP_ENCODERS, *(f'tu-{name}' for name in timm.list_models())]


def check_name(name: str) -> None:
    """Raise config.UserMistake if there is no such encoder."""
    model = name.removeprefix('tu-').split('.')[0]  # timm also takes model.weights
    if name not in SMP_ENCODERS and not (name.startswith('tu-') and timm.is_model(model)):
        meant = config.did_you_mean(name, names())
        raise config.UserMistake(
            f"MODEL_NAME: no encoder '{name}'; {meant}test_model.py --list shows all names"
        )


def hub_weights(name: str, weights: str | None) -> str | bool | None:
    """The value for smp's encoder_weights; None if `weights` is None or a file.

    Raises config.UserMistake if they are neither a file nor known for this encoder.
    """
    if weights is None or Path(weights).suffix or files.is_file(weights):
        return None
    is_timm = name.startswith('tu-')
    legal = ['imagenet'] if is_timm else list(SMP_ENCODERS[name]['pretrained_settings'])
    if weights not in legal:
        raise config.UserMistake(
            f"ENCODER_WEIGHTS='{weights}': neither a file nor weights of {name}: set one of "
            f'{", ".join(legal)}, None (random weights), or a file'
        )
    return True if is_timm else weights


# What comes before the encoder's names in the files of timm, torchvision, smp, DDP and Lightning.
PREFIXES = (
    '',
    'module.',
    'model.',
    'encoder.',
    'backbone.',
    'model.encoder.',
    'model.model.encoder.',
)


def load_file(encoder: torch.nn.Module, file: str) -> str:
    """Load the tensors of a file whose name and shape match the encoder's.

    The file may hold the encoder, a timm or torchvision model, or a whole model or checkpoint. For
    one channel, the weights of a first layer for RGB are summed, as smp and timm do.

    Returns: one line on how many tensors were loaded.

    Raises config.UserMistake if the file is missing or damaged, or nothing matches.
    """
    found = read_state(config.path(file))
    wanted = {
        flatten(name): (name, tensor)
        for name, tensor in encoder.state_dict().items()
        if not name.endswith('num_batches_tracked')  # a counter of batch norm, no weight
    }
    best = {}
    for prefix in PREFIXES:
        matching = {}
        for name, tensor in found.items():
            if not name.startswith(prefix):
                continue
            own_name, own = wanted.get(flatten(name.removeprefix(prefix)), (None, None))
            if own is None:
                continue
            if own.ndim == 4 and own.shape[1] == 1 and tensor.shape[1:2] == (3,):
                tensor = tensor.sum(1, keepdim=True)
            if tensor.shape == own.shape:
                matching[own_name] = tensor
        if len(matching) > len(best):
            best = matching
    if not best:
        raise config.UserMistake(
            f'ENCODER_WEIGHTS={file}: none of its {len(found)} tensors fits the encoder: set a '
            'weights file for the encoder in MODEL_NAME'
        )
    encoder.load_state_dict(best, strict=False)
    missing = [name for name, _ in wanted.values() if name not in best]
    note = f'; left random: {files.first_few(missing, 3)}' if missing else ''
    return f'{len(best)} of {len(wanted)} encoder tensors loaded from {file}{note}'


def flatten(name: str) -> str:
    """A tensor's name, the same in timm and smp."""
    # timm's feature extractors write stages_0 for stages.0. smp puts them under 'model'.
    return name.removeprefix('model.').replace('.', '_')


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a .safetensors or torch file. Code in pickles is not run."""
    try:
        if file.suffix == '.safetensors':
            state = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise config.UserMistake(f'ENCODER_WEIGHTS: {file}: no such file') from None
    except Exception as error:  # pickle, zipfile and safetensors raise many types
        reason = f'not a weights file ({config.shorten(error)})'
        raise config.UserMistake(f'ENCODER_WEIGHTS: {file}: {reason}') from None
    state = state if isinstance(state, dict) else {}
    for key in ('state_dict', 'model', 'state_dict_ema'):
        state = state[key] if isinstance(state.get(key), dict) else state
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
