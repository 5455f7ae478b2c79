"""Checkpoints of earlier versions in the layout of this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SINGLE = {"backbone": "note", "wandb": "run"}
"""What was a bare text -> its key in the callback's own state."""
_SECTIONS = ("early_stopping", "kd")
"""What was a section already."""


def current_layout(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A loaded checkpoint as this version writes it.

    Until version 0.1 the run's `extra` held the best epoch, the epoch of the last evaluation and what all callbacks
    remember, and `best` the number that the best epoch was chosen by.

    Args:
        raw: Any loaded file of ours; not changed, and not checked yet.
    """
    run = raw.get("run")
    extra = run.get("extra") if isinstance(run, Mapping) else None
    if not isinstance(run, Mapping) or not isinstance(extra, Mapping):
        return dict(raw)
    rest = dict(extra)
    best = {key: rest.pop(f"best_{key}") for key in ("epoch", "metrics") if f"best_{key}" in rest}
    evaluated = rest.pop("evaluated", None)
    callbacks = {name: {key: rest.pop(name)} for name, key in _SINGLE.items() if name in rest}
    callbacks |= {name: rest.pop(name) for name in _SECTIONS if name in rest}
    if rest:  # of the user's own callbacks; nobody reads it again, and nothing is lost
        callbacks["extra"] = rest
    current = {key: value for key, value in run.items() if key != "extra"}
    current |= {"evaluated": evaluated, "callbacks": callbacks}
    if "best" in run:
        current["best"] = {"value": run["best"]} | best if best else None
    return dict(raw) | {"run": current}
