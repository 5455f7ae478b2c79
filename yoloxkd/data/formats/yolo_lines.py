"""YOLO label lines other than `class x y w h`: polygons, poses, scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from yoloxkd.data.problems import Faults, Place

_BOX = 5  # columns
_FEW = 3  # lines, too few to guess from
_MOST = 0.8
_OUT_OF_BOX = 0.1  # of its sides, that a key point may lie beyond the box


class OddLines:
    """Reads such lines, and notes whether they all look like key points that nobody has announced."""

    def __init__(self, faults: Faults, key_points: tuple[int, int] | None) -> None:
        self.faults, self.key_points = faults, key_points
        self._columns: Counter[int] = Counter()
        self._visibility_lines = 0  # lines whose points have a visibility
        self._flat_lines = 0  # lines whose points lie about the middle of their box
        self._first: Place | None = None
        self.polygon: np.ndarray | None = None
        """The points (p, 2) of the last line, fractions of the image; None: it had a box."""

    @np.errstate(over="ignore", invalid="ignore")
    def box(self, words: Sequence[str], place: Place) -> np.ndarray | None:
        """(5,) class and box of a line, None for one that cannot be used, which is counted."""
        self.polygon = None
        try:
            values = np.array(words, np.float64)
        except ValueError:
            return self._drop(_dota(words) or "lines that are not 'class x y w h' or a polygon", place)
        count = len(values)
        if count == _BOX:
            return values
        if self.key_points is not None:
            number, each = self.key_points
            if count == _BOX + number * each:
                return values[:_BOX]
            return self._drop(f"lines without the {_BOX} + {number} * {each} columns of kpt_shape", place)
        self._note(values, place)
        if count == _BOX + 1:
            if not 0 <= values[-1] <= 1:
                return self._drop("lines with a sixth column that is no score (0 to 1)", place)
            self.faults.add("lines with a sixth column, taken for a score and left out", [place])
            return values[:_BOX]
        if count > 7 and count % 2 == 0 and not self._visibility_lines and 0 <= values[-1] <= 1:
            self.faults.add("polygons with a last column of their own, taken for a score and left out", [place])
            values = values[:-1]
        if len(values) > 6 and len(values) % 2:
            self.polygon = values[1:].reshape(-1, 2)
            low, high = self.polygon.min(axis=0), self.polygon.max(axis=0)
            return np.array([values[0], *((low + high) / 2), *(high - low)])
        return self._drop("lines that are not 'class x y w h' or a polygon", place)

    def _drop(self, kind: str, place: Place) -> np.ndarray | None:
        self.faults.add(f"dropped, {kind}", [place])
        return None

    def _note(self, values: np.ndarray, place: Place) -> None:
        """Whether a line would make sense as a box and its key points."""
        self._first = self._first or place
        self._columns[len(values)] += 1
        rest = len(values) - _BOX
        if rest > 1 and rest % 3 == 0 and np.isin(values[_BOX + 2 :: 3], (0, 1, 2)).all():
            points = values[_BOX:].reshape(-1, 3)
            self._visibility_lines += bool(_inside(points[points[:, 2] > 0, :2], values).all())
        if rest > 3 and rest % 2 == 0:
            points = values[_BOX:].reshape(-1, 2)
            points = points[(points != 0).any(axis=1)]
            self._flat_lines += bool(len(points) > 1 and _inside(points, values).all() and _about(values[1:3], points))

    def finish(self, lines: int) -> None:
        """`lines`: how many lines the split has in all. UserError: they are key points without a doubt."""
        if len(self._columns) != 1 or self._first is None:
            return
        (columns, count), place = next(iter(self._columns.items())), self._first
        rest = columns - _BOX
        if count == lines and self._visibility_lines == count:
            kind = "label files whose lines are boxes and key points, without a kpt_shape in the data YAML"
            self.faults.refuse(
                kind,
                place,
                f"each line of the labels ({place} and the others) is a box and {rest // 3} key points with a visibility; "
                f"say 'kpt_shape: [{rest // 3}, 3]' in the data YAML, so that they are not taken for polygons",
            )
        elif count >= max(_FEW, _MOST * lines) and self._flat_lines >= _MOST * count:
            kind = (
                f"lines read as polygons that look like a box and key points: if so, say 'kpt_shape: [{rest // 2}, 2]'"
            )
            self.faults.add(kind, [place], self._flat_lines)


def _inside(points: np.ndarray, line: np.ndarray) -> np.ndarray:
    """(P,) bool: whether points lie in the box of columns 2 to 5, about."""
    return np.asarray((np.abs(points - line[1:3]) <= (0.5 + _OUT_OF_BOX) * line[3:5]).all(axis=1))


def _about(center: np.ndarray, points: np.ndarray) -> bool:
    """Whether `centre` is in the middle third of the points: never so for the first corner of most polygons."""
    low, high = points.min(axis=0), points.max(axis=0)
    return bool((np.abs(center - (low + high) / 2) <= (high - low) / 6).all())


def _dota(words: Sequence[str]) -> str:
    """`x1 y1 x2 y2 x3 y3 x4 y4 class difficult`"""
    if len(words) not in (9, 10):
        return ""
    try:
        np.array(words[:8], np.float64)
    except ValueError:
        return ""
    return "lines of oriented boxes as DOTA has them (x1 y1 ... x4 y4 class): write 'class x y w h'"
