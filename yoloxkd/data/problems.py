"""Problems of a data set: counted, with file and line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from yoloxkd.errors import UserError

MISSING = "images that are missing"
UNREADABLE = "images that cannot be read"
NEARLY_ALL = 0.9
"""Where this part of a split's objects has a fault that could be mere oddity, it is the whole split's: it breaks training."""


def shown(text: str, most: int = 60) -> str:
    """A text of a file's for a sentence: on one line, what cannot be printed as its code, shortened in the middle."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most // 2]}...{line[-most // 3 :]}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a fault is: a file, its line (from 1) where it has lines, and what else helps to find it."""

    file: str
    line: int | None = None
    note: str = ""

    def __str__(self) -> str:
        at = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{at}, {self.note}" if self.note else at


@dataclass(slots=True)
class Faults:
    """What was wrong with a data set and mended or left out: counts and first places by kind.

    A kind is a phrase that follows a number: "dropped, of zero or negative size", "clipped to the image".
    max_places  places remembered of each kind; None: all of them
    gather      for `yoloxkd data check`: what would break training is recorded in `breaking` instead of raised, and
                readers leave the images' contents to the check
    images_without_file  images whose file of annotations is missing: background, which is a fault only of many
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[Place]] = field(default_factory=dict)
    breaking: set[str] = field(default_factory=set)
    max_places: int | None = 5
    gather: bool = False
    images_without_file: int = 0

    def add(self, kind: str, places: Iterable[Place], count: int | None = None) -> None:
        """Count `count` (default: the number of places) faults of a kind; the first few places are kept."""
        new_places = list(places)
        number = len(new_places) if count is None else count
        if number:
            self.counts[kind] = self.counts.get(kind, 0) + number
            examples = self.examples.setdefault(kind, [])
            examples.extend(
                new_places if self.max_places is None else new_places[: max(0, self.max_places - len(examples))]
            )

    def room(self, count: int) -> int:
        """How many places of a kind are worth giving, of `count`."""
        return count if self.max_places is None else min(count, self.max_places)

    def refuse(self, kind: str, place: Place, sentence: str) -> None:
        """Something that training cannot go on with: raises UserError(sentence), or records it when gathering."""
        if not self.gather:
            raise UserError(sentence)
        self.breaking.add(kind)
        self.add(kind, [place])

    def __len__(self) -> int:
        return sum(self.counts.values())

    def describe(self) -> str:
        """One line: every kind with its count and its first place; empty when there is no fault."""
        parts = [
            f"{count} {kind} (e.g. {self.examples[kind][0]})" if self.examples.get(kind) else f"{count} {kind}"
            for kind, count in self.counts.items()
        ]
        return "annotations: " + ", ".join(parts) if parts else ""
