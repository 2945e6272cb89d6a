"""Optimizer, learning rate and weight averaging: OPTIMIZER, SCHEDULE and EMA."""

import torch
from pytorch_lightning.callbacks.weight_averaging import WeightAveraging
from torch.optim import lr_scheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

import config

WARM_UP = 0.15  # share of the optimizer steps in which the learning rate rises
FUSED = ('Adam', 'AdamW', 'SGD')  # optimizers with a fused step on every device


def build_optimizer(model) -> torch.optim.Optimizer:
    """A CarvanaModel's OPTIMIZER at LR with OPTIMIZER_ARGS.

    Raises:
        config.UserMistake: if torch.optim has no such class, or it does not take the arguments.
    """
    name, arguments = model.hparams.OPTIMIZER, model.hparams.OPTIMIZER_ARGS
    optimizers = {k: v for k, v in vars(torch.optim).items() if isinstance(v, type)}
    del optimizers['Optimizer']  # the base class
    if name not in optimizers:
        raise config.UserMistake(
            f"OPTIMIZER: torch.optim has no '{name}'; {config.did_you_mean(name, optimizers)}"
            f'valid: {", ".join(optimizers)}'
        )
    # A fused step unscales the gradients of AMP itself, too late to clip them.
    if name in FUSED and model.hparams.GRADIENT_CLIP is None:
        arguments = {'fused': True} | arguments
    try:
        return optimizers[name](model.parameters(), lr=model.hparams.LR, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise config.UserMistake(
            f'OPTIMIZER={name} does not take OPTIMIZER_ARGS={model.hparams.OPTIMIZER_ARGS} '
            f'({config.shorten(error)})'
        ) from None


def build_schedule(name: str, optimizer: torch.optim.Optimizer, steps: int):
    """A schedule of torch.optim.lr_scheduler over a number of optimizer steps.

    'cosine' falls to a hundredth, as in SGDR (arXiv 1608.03983). 'poly' falls to 0 with the power
    0.9, as in DeepLab (arXiv 1606.00915). 'onecycle' is super-convergence (arXiv 1708.07120).
    These three rise first. 'plateau' halves the rate when val_dice has not risen for 2 epochs.
    """
    if name == 'plateau':
        return lr_scheduler.ReduceLROnPlateau(optimizer, 'max', factor=0.5, patience=1)
    rising = max(2, round(WARM_UP * steps))
    falling = max(2, steps - rising)
    if name == 'onecycle':
        return lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=optimizer.defaults['lr'],
            total_steps=rising + falling,
            pct_start=rising / (rising + falling),
            cycle_momentum='betas' in optimizer.defaults,
        )
    if name == 'cosine':
        fall = lr_scheduler.CosineAnnealingLR(optimizer, falling, optimizer.defaults['lr'] / 100)
    else:
        fall = lr_scheduler.PolynomialLR(optimizer, falling, power=0.9)
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / rising, total_iters=rising)
    return lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[rising])


def scale_rates(state: dict | list, factor: float) -> None:
    """Multiply every learning rate in the saved state of optimizers and schedules."""
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        is_rate = key == 'eta_min' or str(key).endswith(('lr', 'lrs'))
        if is_rate and isinstance(value, list):
            state[key] = [rate * factor for rate in value]
        elif is_rate and not isinstance(value, str):  # one-cycle saves the names of its rates
            state[key] = value * factor
        elif isinstance(value, (dict, list)):
            scale_rates(value, factor)


def weight_average(decay: float, device: torch.device) -> WeightAveraging:
    """A moving average of the weights, to validate and save. Its decay rises to `decay`."""

    def update(averaged, current, steps) -> None:
        steps = int(steps)
        now = min(decay, (1 + steps) / (10 + steps))  # low at first: the first weights are random
        get_ema_multi_avg_fn(now)(averaged, current, steps)

    return WeightAveraging(device=device, multi_avg_fn=update)
