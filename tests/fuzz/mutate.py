"""Seeded structural mutations of nested containers: what hand-editing, other programs and other versions do to files.

`mutated(value, rng)` gives a changed deep copy and a few words about the change. It works on anything made of mappings,
lists, tuples, plain values and tensors, so on the content of checkpoints, YAML, JSON and metadata alike.
"""

from __future__ import annotations

import copy
import random
import reprlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e300, -1e300, float("nan"), float("inf"), 10**25, -(10**25), 2**63, "",
    " ", "x", "1", "true", "none", "null", "a,b", "../x", "é\u0000", "[bold]", [], {}, [[]], [None], {"x": 1}, {"name": "x"},
    ["a", "a"], [1, 2], [float("nan")], "9" * 40, 3.0, -0.0, 1e-300, 2**53 + 1, -(2**63), "0", "1e300", "nan", "\n", "\x00",
    "a" * 300, "~x", [1, 2, 3, 4], ["1", "2", "3", "4"], [[1, 2, 3, 4]], [1e300] * 4, [10**25] * 4, [True] * 4,
    [float("nan")] * 4, [-0.0] * 4, [0.1, 0.1, 0.2, 0.2], {"0": "a"}, {0: "a"}, [["a"]], [[[]]],
)  # fmt: skip
"""Values of every type, and numbers beyond anything that makes sense."""

Path = tuple[Any, ...]


def mutated(value: Any, rng: random.Random, count: int = 1, odd: tuple[Any, ...] = ODD) -> tuple[Any, str]:
    """A deep copy of `value` with `count` changes, and what they are."""
    value = copy.deepcopy(value)
    said = []
    for _ in range(count):
        places = list(_places(value))
        if not places:
            return rng.choice(odd), "the whole replaced"
        # few places are near the top and many deep inside: draw the depth first, so that both are met
        depth = rng.choice(sorted({len(path) for path in places}))
        path = rng.choice([path for path in places if len(path) == depth])
        change = rng.choice(CHANGES)
        value = _changed(value, path, lambda holder, key, change=change: change(holder, key, rng, odd))
        said.append(f"{change.__name__.strip('_')} at {'.'.join(map(str, path))}{_now(value, path)}")
    return value, "; ".join(said)


def _places(value: Any, path: Path = ()) -> list[Path]:
    """The path of everything inside a container."""
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list | tuple):
        inner = list(enumerate(value))[:50]
    else:
        return []
    return [p for key, item in inner for p in ((*path, key), *_places(item, (*path, key)))]


def _now(value: Any, path: Path) -> str:
    """What is at a path after a change, for the words about it."""
    try:
        for key in path:
            value = value[key]
    except (LookupError, TypeError):
        return ""
    if isinstance(value, Tensor):
        return f" = a {value.dtype} tensor of shape {list(value.shape)}"
    return f" = {reprlib.repr(value)}" if not isinstance(value, dict | list | tuple) or len(value) < 5 else ""


def _changed(value: Any, path: Path, change: Callable[[Any, Any], None]) -> Any:
    """The container with a change made to what is at a path; tuples on the way are rebuilt."""
    key, *rest = path
    holder = list(value) if isinstance(value, tuple) else value
    if rest:
        holder[key] = _changed(holder[key], tuple(rest), change)
    else:
        change(holder, key)
    return tuple(holder) if isinstance(value, tuple) else holder


def _drop(holder: Any, key: Any, rng: random.Random, odd: tuple[Any, ...]) -> None:
    del holder[key]


def _replace(holder: Any, key: Any, rng: random.Random, odd: tuple[Any, ...]) -> None:
    holder[key] = copy.deepcopy(rng.choice(odd))


def _another_type(holder: Any, key: Any, rng: random.Random, odd: tuple[Any, ...]) -> None:
    others = [value for value in odd if type(value) is not type(holder[key])]
    holder[key] = copy.deepcopy(rng.choice(others))


def _swap(holder: Any, key: Any, rng: random.Random, odd: tuple[Any, ...]) -> None:
    """Exchange with a neighbor."""
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    other = rng.choice(keys)
    holder[key], holder[other] = holder[other], holder[key]


def _nest(holder: Any, key: Any, rng: random.Random, odd: tuple[Any, ...]) -> None:
    """One container too many, or one too few."""
    inner = holder[key]
    if isinstance(inner, dict | list | tuple) and inner and rng.random() < 0.5:
        holder[key] = next(iter(inner.values())) if isinstance(inner, dict) else inner[0]
    else:
        holder[key] = rng.choice(([inner], {"x": inner}, [inner, inner]))


def _duplicate(holder: Any, key: Any, rng: random.Random, odd: tuple[Any, ...]) -> None:
    if isinstance(holder, dict):
        holder[rng.choice((f"{key}2", str(key).upper(), 7, ""))] = copy.deepcopy(holder[key])
    else:
        holder.insert(key, copy.deepcopy(holder[key]))


def _tensor(holder: Any, key: Any, rng: random.Random, odd: tuple[Any, ...]) -> None:
    """Another shape, dtype or content of a tensor; anything else is replaced by a tensor where there are some."""
    found = holder[key]
    if not isinstance(found, Tensor):
        _replace(holder, key, rng, odd)
        return
    holder[key] = rng.choice(TENSORS)(found)


TENSORS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t[..., None],
    lambda t: t.flatten()[:0],
    lambda t: t.flatten(),
    lambda t: torch.tensor(1.0),
    lambda t: torch.cat([t, t]) if t.ndim else t[None],
    lambda t: t.to(torch.float64),
    lambda t: t.to(torch.int64),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.bfloat16),
    lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else -t.long(),
    lambda t: t.reshape(-1)[:1].expand(10**9) if t.numel() else t,
    lambda t: t.to_sparse() if t.ndim and t.layout == torch.strided else t,
    lambda t: t.to("meta"),
)

CHANGES = (_drop, _replace, _another_type, _swap, _nest, _duplicate, _tensor)
