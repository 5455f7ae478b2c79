"""The callbacks of a run: call them in order, save and restore what they remember."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from yoloxkd.distributed.comm import rank, single_process
from yoloxkd.errors import UserError

if TYPE_CHECKING:
    from yoloxkd.engine.events import Callback, State


class CallbackList:
    """Callbacks in the order in which every event calls them."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = tuple(callbacks)
        self._unclaimed: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Callback]:
        return iter(self.callbacks)

    def call(self, event: Callable[[Callback], None]) -> None:
        """Call an event of every callback of this process: `call(lambda callback: callback.on_step(state))`."""
        for callback in self:
            _call(callback, event)

    def on_exception(self, state: State, error: BaseException) -> None:
        """Tell every callback of the error, also after one of them has failed; the first such failure is raised."""
        failure: Exception | None = None
        for callback in self:
            try:
                _call(callback, lambda one: one.on_exception(state, error))
            except Exception as another:
                failure = failure or another
        if failure is not None:
            raise failure from error

    def state_dict(self) -> dict[str, Any]:
        """What each callback remembers, by its name; what a resumed run read of callbacks that it does not have, too.

        Raises:
            UserError: A callback gives what a checkpoint cannot hold.
        """
        states = dict(self._unclaimed)
        for key, callback in self._by_key():
            if value := callback.state_dict():
                if (wrong := _not_plain(value, key)) is not None:
                    raise UserError(
                        f"state_dict() of {type(callback).__name__} gives {wrong}; a checkpoint holds tensors, numbers, "
                        "texts, None, and lists, tuples and dicts of them"
                    )
                states[key] = value
        return states

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Give each callback what `state_dict` had of it."""
        self._unclaimed = dict(saved)
        for key, callback in self._by_key():
            if key in self._unclaimed:
                callback.load_state_dict(self._unclaimed.pop(key))

    def _by_key(self) -> Iterator[tuple[str, Callback]]:
        """(name, callback); several of one name are numbered: "Mine", "Mine-2"."""
        count: Counter[str] = Counter()
        for callback in self:
            name = callback.name or type(callback).__name__
            count[name] += 1
            yield name if count[name] == 1 else f"{name}-{count[name]}", callback


def _call(callback: Callback, event: Callable[[Callback], None]) -> None:
    """In this process, if it is one of the callback's; those of rank zero alone may not wait for the others."""
    if callback.everywhere or rank() == 0:
        with nullcontext() if callback.everywhere else single_process():
            event(callback)


def _not_plain(value: Any, place: str) -> str | None:
    """The first part of a value, with its place, that `torch.load(weights_only=True)` would refuse."""
    if isinstance(value, Tensor) or value is None or type(value) in (bool, int, float, str):
        return None
    if type(value) in (dict, OrderedDict):
        parts = [(part, f"{place}[{key!r}]") for key, part in value.items()] + [(key, place) for key in value]
    elif type(value) in (list, tuple):
        parts = [(part, f"{place}[{number}]") for number, part in enumerate(value)]
    else:
        return f"a {type(value).__name__} as {place}"
    return next((wrong for part, where in parts if (wrong := _not_plain(part, where))), None)
