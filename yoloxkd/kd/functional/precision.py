"""Run distillation losses in float32 under autocast: sums of squares over C*H*W overflow float16."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from yoloxkd.ops.losses import full_precision

__all__ = ["full_precision", "without_autocast"]

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with autocast off on the device of its first tensor argument; it widens its inputs itself."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        device = next((t.device.type for t in tensors), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
