"""One try: a mutated file is used as a user would use it, and ends in success, in one sentence, or is a fault."""

from __future__ import annotations

import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tests.fuzz.mutate import mutated
from yoloxkd.errors import UserError

SECONDS = 30
"""Processor time that a try may take; what waits for a busy machine is no fault."""


class TooLongError(BaseException):
    """A try took too long. Code that takes an Exception for something else does not take this one."""


@dataclass(frozen=True)
class Target:
    """A kind of file.

    base  the right content, whose use must be a success
    use   write content into an empty folder and do what a user would do with it
    """

    base: Callable[[], Any]
    use: Callable[[Any, Path], object]


@dataclass(frozen=True)
class Outcome:
    """How a try ended; as text, everything that repeats it."""

    name: str
    seed: int | None
    said: str
    end: Literal["success", "sentence", "fault"]
    error: BaseException | None = None

    def __str__(self) -> str:
        repeat = "unchanged" if self.seed is None else f"--only '{self.name}' --seed {self.seed} --tries 1"
        return f"{self.name} ({repeat}), {self.said}: {self.end} {self.error!r}"


def attempt(name: str, target: Target, seed: int | None) -> Outcome:
    """Use the content as it is (None) or mutated, in a folder of its own."""
    said, value = "as it should be", target.base()
    if seed is not None:
        rng = random.Random(f"{name}/{seed}")
        value, said = mutated(value, rng, count=rng.choice((1, 1, 1, 2, 3)))
    with tempfile.TemporaryDirectory(prefix="yoloxkd-fuzz-") as folder:
        try:
            with _limited():
                target.use(value, Path(folder))
        except UserError as error:
            right = seed is not None and is_sentence(str(error))
            return Outcome(name, seed, said, "sentence" if right else "fault", error)
        except (Exception, TooLongError) as error:
            return Outcome(name, seed, said, "fault", error)
    return Outcome(name, seed, said, "success")


def is_sentence(text: str) -> bool:
    """One line that a terminal can show, of a length that somebody reads."""
    return bool(text.strip()) and text.isprintable() and "Traceback" not in text and len(text) < 1500


@contextmanager
def _limited() -> Iterator[None]:
    """TooLongError after `SECONDS` of processor time."""
    before = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLongError(f"it took over {SECONDS} s of processor time")
