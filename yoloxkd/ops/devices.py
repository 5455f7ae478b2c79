"""What depends on whether a device works while the host goes on."""

from __future__ import annotations

import torch

READ_DEVICES = ("cpu",)
"""Where a value is read to choose the shorter way, or the few rows that are true are listed: elsewhere the host would wait."""


def may_read(device: torch.device) -> bool:
    """Whether a value may choose the way: on `READ_DEVICES`, and not while torch compiles, which it would cut in pieces."""
    return device.type in READ_DEVICES and not torch.compiler.is_compiling()
