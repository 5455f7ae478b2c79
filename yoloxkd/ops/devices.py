"""What depends on whether a device works while the host goes on."""

from __future__ import annotations

READ_DEVICES = ("cpu",)
"""Where a value is read to choose the shorter way: elsewhere the host would have to wait for it."""
