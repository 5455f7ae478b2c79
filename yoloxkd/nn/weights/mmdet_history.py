"""Stand-ins for the training log in a checkpoint of mmdetection 3, so that its weights can be read without mmengine.

The log is a dictionary of `mmengine.logging.history_buffer.HistoryBuffer`; each holds two numpy arrays and, in newer
versions, references to its own methods. All of it is dropped: nothing of mmengine or numpy is called.
"""

from __future__ import annotations

import pickle
from typing import Any

MARK = "mmengine.logging.history_buffer.HistoryBuffer"


class Dropped:
    """What an object of the file becomes, whatever was kept of it."""

    def __new__(cls, *_: Any) -> Dropped:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class HistoryBuffer(Dropped):
    """In the place of mmengine's."""


class Numbers(Dropped):
    """In the place of a numpy array."""


def _array(*_: Any) -> Numbers:
    """In the place of the function that makes a numpy array."""
    return Numbers()


def _method(owner: Any, name: Any) -> None:
    """In the place of `getattr`, which only names the methods of a HistoryBuffer."""
    if owner is not HistoryBuffer or not isinstance(name, str):
        raise pickle.UnpicklingError(
            "Unsupported global: GLOBAL getattr is there for the methods of a HistoryBuffer only"
        )


def _no_bytes() -> bytes:
    """In the place of `bytes`, by which the content of an array without values is written."""
    return b""


HISTORY_GLOBALS: list[Any] = [
    (HistoryBuffer, MARK),
    (Numbers, "numpy.ndarray"),
    (_array, "numpy.core.multiarray._reconstruct"),
    (_array, "numpy._core.multiarray._reconstruct"),
    (_method, "builtins.getattr"),
    (_no_bytes, "builtins.bytes"),
]
"""For `torch.serialization.safe_globals`: what stands for each name that the log of a file holds."""
