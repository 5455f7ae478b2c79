"""SGD with YOLOX's parameter groups, and YOLOX's learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in the groups of the YOLOX release: norm weights, other weights, biases.

    Only the second group decays. Parameters without a gradient are left out; each group has a `name`. A one-number or
    one-dimensional parameter that is no bias (a learned scale) counts as a norm weight.
    """
    norms: list[nn.Parameter] = []
    weights: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    for root in modules:
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                if name == "bias":
                    biases.append(parameter)
                elif isinstance(module, NORMS) or parameter.ndim <= 1:
                    norms.append(parameter)
                else:
                    weights.append(parameter)
    return [
        {"name": "norm_weights", "params": norms, "weight_decay": 0.0},
        {"name": "weights", "params": weights, "weight_decay": weight_decay},
        {"name": "biases", "params": biases, "weight_decay": 0.0},
    ]


def sgd(
    modules: Iterable[nn.Module],
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 5e-4,
) -> torch.optim.SGD:
    """The optimizer of the YOLOX release over all trainable parameters of `modules`."""
    groups = parameter_groups(modules, weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0)


def yolox_lr(
    iteration: int,
    *,
    base_lr: float,
    iters_per_epoch: int,
    total_epochs: int,
    warmup_epochs: int,
    no_aug_epochs: int,
    min_lr_ratio: float,
    warmup_lr_start: float = 0.0,
) -> float:
    """The rate for a step: quadratic warm-up to `base_lr`, cosine, then the floor `base_lr * min_lr_ratio`.

    iteration counts steps over all epochs from 0. The warm-up lasts up to and including iteration
    `warmup_epochs * iters_per_epoch`; the floor starts at the first iteration of the last `no_aug_epochs` epochs.
    """
    warmup = warmup_epochs * iters_per_epoch
    floor_at = (total_epochs - no_aug_epochs) * iters_per_epoch
    floor = base_lr * min_lr_ratio
    if warmup > 0 and iteration <= warmup:
        return (base_lr - warmup_lr_start) * (iteration / warmup) ** 2 + warmup_lr_start
    if iteration >= floor_at:
        return floor
    return floor + (base_lr - floor) / 2 * (1 + math.cos(math.pi * (iteration - warmup) / (floor_at - warmup)))
