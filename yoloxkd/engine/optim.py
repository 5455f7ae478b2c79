"""Optimizers (SGD with YOLOX's parameter groups, AdamW with relative rates) and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from yoloxkd.config.recipe import OptimSection, Recipe

LEAST_SIZE = 1e-3
"""Below it a tensor's values count as this large, or one that starts at zero could not move (Adafactor's epsilon 2)."""
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(modules: Iterable[nn.Module], optim: OptimSection) -> list[dict[str, Any]]:
    """Trainable parameters in the groups of the YOLOX release: norm weights, other weights, biases.

    Only the second group decays, unless `optim.decay` is "all". Parameters without a gradient are left out; each group has
    a `name`, and the `lr_factor` its rate is multiplied by, which is `optim.bias_lr` for biases. A one-number or one-dimensional
    parameter that is no bias (a learned scale) counts as a norm weight.
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
    others = optim.weight_decay if optim.decay == "all" else 0.0
    return [
        {"name": "norm_weights", "params": norms, "weight_decay": others, "lr_factor": 1.0},
        {"name": "weights", "params": weights, "weight_decay": optim.weight_decay, "lr_factor": 1.0},
        {"name": "biases", "params": biases, "weight_decay": others, "lr_factor": optim.bias_lr},
    ]


def sgd(modules: Iterable[nn.Module], lr: float, optim: OptimSection, fused: bool | None = None) -> torch.optim.SGD:
    """SGD over all trainable parameters of `modules`; with `OptimSection()` the optimizer of the YOLOX release.

    `fused` updates all in few kernels, and reads a float16 scaler's verdict on the device; None: as torch chooses.
    """
    groups, momentum = parameter_groups(modules, optim), optim.momentum
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=optim.nesterov and momentum > 0, fused=fused)


def adam(modules: Iterable[nn.Module], lr: float, optim: OptimSection, fused: bool | None = None) -> torch.optim.AdamW:
    """AdamW whose rate for each tensor is `lr` times the root mean square of its values now (Adafactor, section 8).

    So one rate serves a trained network, whose folded weights span six orders of magnitude.
    """
    groups = []
    for group in parameter_groups(modules, optim):
        for parameter in group["params"]:
            size = max(float(parameter.detach().square().mean().sqrt()), LEAST_SIZE)
            groups.append(group | {"params": [parameter], "lr_factor": group["lr_factor"] * size})
    return torch.optim.AdamW(groups, lr=lr, betas=(optim.momentum, 0.999), fused=fused)


def optimizer(
    modules: Iterable[nn.Module], lr: float, optim: OptimSection, fused: bool | None = None
) -> torch.optim.Optimizer:
    """What `optim.kind` names."""
    return (sgd if optim.kind == "sgd" else adam)(modules, lr, optim, fused)


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


def step_lr(
    iteration: int,
    *,
    base_lr: float,
    iters_per_epoch: int,
    warmup_iters: int,
    warmup_ratio: float,
    milestones: Sequence[int],
    gamma: float,
) -> float:
    """The rate for a step: linear warm-up from `base_lr * warmup_ratio`, then `base_lr`, times `gamma` at each milestone.

    iteration counts steps over all epochs from 0; the peak is reached at iteration `warmup_iters`. A milestone is a number
    of epochs done. Falls act during the warm-up as well, as they do in mmdetection.
    """
    rate = base_lr * gamma ** sum(iteration >= n * iters_per_epoch for n in milestones)
    if iteration < warmup_iters:
        rate *= warmup_ratio + (1 - warmup_ratio) * iteration / warmup_iters
    return rate


def warmup_steps(recipe: Recipe, iters_per_epoch: int) -> int:
    """Steps during which the rate rises to its peak."""
    schedule, epochs = recipe.schedule, recipe.train.epochs
    if schedule.kind == "step":
        return schedule.warmup_steps(epochs * iters_per_epoch)
    return schedule.warmup(epochs) * iters_per_epoch


def learning_rate(recipe: Recipe, iteration: int, iters_per_epoch: int) -> float:
    """The rate that a recipe's optim and schedule sections give for a step; iteration counts over all epochs from 0."""
    schedule, epochs = recipe.schedule, recipe.train.epochs
    peak = recipe.optim.lr_per_image * recipe.train.batch
    if schedule.kind == "step":
        return step_lr(
            iteration,
            base_lr=peak,
            iters_per_epoch=iters_per_epoch,
            warmup_iters=schedule.warmup_steps(epochs * iters_per_epoch),
            warmup_ratio=schedule.warmup_ratio,
            milestones=schedule.falls(epochs),
            gamma=schedule.gamma,
        )
    return yolox_lr(
        iteration,
        base_lr=peak,
        iters_per_epoch=iters_per_epoch,
        total_epochs=epochs,
        warmup_epochs=schedule.warmup(epochs),
        no_aug_epochs=schedule.final(epochs),
        min_lr_ratio=schedule.min_lr_ratio,
    )
