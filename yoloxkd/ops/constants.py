"""Numbers of the program as tensors of a device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Numbers = float | tuple[Any, ...]
"""A number, or tuples of such in each other."""


def constant(numbers: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.tensor(numbers)`, to be read only. Elsewhere than on the CPU it is made once and kept.

    Making it there copies from memory that is not pinned, for which the host waits until the device has done all before.
    """
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=dtype)
    return _cached_constant(numbers, dtype, device)


@lru_cache(maxsize=1024)
def _cached_constant(numbers: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # one made in inference mode could not be used in training
        return torch.tensor(numbers, dtype=dtype, device=device)
