"""Instance masks of a whole split, packed into arrays: polygons as points, run lengths as their bytes.

No Python object stands for a mask, for the reason that `packed_strings` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from yoloxkd.instance_masks import check_counts, pack_counts, rle_extent, unpack_counts

FEW_POINTS = "polygons of fewer than three points, left out"
UNREADABLE = "masks that are neither polygons nor run lengths, left out"
_FARTHEST_PX = 1e6
_DECIMALS = 3
"""Of a polygon's px: what float32 holds of an image's coordinates, and no digit that it does not."""


@dataclass(slots=True)
class MaskTable:
    """M masks in px of their images; each is polygons, or run lengths, or not there.

    points       (P, 2) float32, of all polygons
    part_starts  (Q + 1,) int64, the points of each polygon; row_parts (M + 1,) int64, the polygons of each mask
    packed       uint8, compressed run lengths (COCO's); packed_starts (M + 1,) int64
    rle_sizes    (M, 2) int32, height and width of run lengths; 0 where there are none
    """

    points: np.ndarray
    part_starts: np.ndarray
    row_parts: np.ndarray
    packed: np.ndarray
    packed_starts: np.ndarray
    rle_sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.rle_sizes)

    def __getitem__(self, rows: slice | np.ndarray) -> MaskTable:
        """Some of the masks: a slice, positions, or (M,) bool."""
        index = np.arange(len(self))[rows]
        counts = np.diff(self.row_parts)[index]
        parts = _ranges(self.row_parts[index], counts)
        lengths = np.diff(self.part_starts)[parts]
        sizes = np.diff(self.packed_starts)[index]
        return MaskTable(
            self.points[_ranges(self.part_starts[parts], lengths)],
            _starts(lengths),
            _starts(counts),
            self.packed[_ranges(self.packed_starts[index], sizes)],
            _starts(sizes),
            self.rle_sizes[index],
        )

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.__slots__)

    def columns(self) -> tuple[np.ndarray, ...]:
        """All of its arrays, the same on every machine; points to 0.001 px."""
        points = (self.points.astype(np.float64).round(_DECIMALS) + 0.0).astype("<f8")  # + 0.0: no negative zero
        starts = (self.part_starts, self.row_parts, self.packed_starts)
        return points, self.packed, self.rle_sizes.astype("<i4"), *(column.astype("<i8") for column in starts)

    def there(self) -> np.ndarray:
        """(M,) bool: rows that have a mask."""
        return (np.diff(self.row_parts) > 0) | (np.diff(self.packed_starts) > 0)

    def without(self, rows: np.ndarray) -> MaskTable:
        """The same rows, where those of `rows` (M,) bool have no mask."""
        order = np.where(rows, len(self), np.arange(len(self)))
        return self._with_empty()[order]

    def _with_empty(self) -> MaskTable:
        """One row more, that has no mask."""
        return MaskTable(
            self.points,
            self.part_starts,
            np.append(self.row_parts, self.row_parts[-1]),
            self.packed,
            np.append(self.packed_starts, self.packed_starts[-1]),
            np.concatenate([self.rle_sizes, np.zeros((1, 2), np.int32)]),
        )

    def polygons(self, row: int) -> list[np.ndarray]:
        """The polygons (p, 2) float64 px of a mask."""
        first, last = self.row_parts[row], self.row_parts[row + 1]
        if first == last:
            return []
        starts = self.part_starts[first : last + 1]
        points = self.points[starts[0] : starts[-1]].astype(np.float64).round(_DECIMALS)
        return np.split(points, starts[1:-1] - starts[0])

    def counts(self, row: int) -> bytes:
        """The compressed run lengths of a mask; empty where it has none."""
        return self.packed[self.packed_starts[row] : self.packed_starts[row + 1]].tobytes()

    def extents(self) -> np.ndarray:
        """(M, 4) float64 xyxy px around each mask, NaN where there is none or nothing in it."""
        out = np.full((len(self), 4), np.nan)
        rows = np.flatnonzero(np.diff(self.row_parts))
        if len(rows):
            firsts = self.part_starts[self.row_parts[rows]]
            out[rows, :2] = np.minimum.reduceat(self.points, firsts)
            out[rows, 2:] = np.maximum.reduceat(self.points, firsts)
        for row in np.flatnonzero(np.diff(self.packed_starts)).tolist():
            box = rle_extent(unpack_counts(self.counts(row)), int(self.rle_sizes[row, 0]))
            if any(box):
                out[row] = box
        return out

    def segmentations(self) -> list[Any]:
        """Each mask as COCO writes it: a list of polygons, or run lengths with their size; an empty list for none."""
        out: list[Any] = []
        for row in range(len(self)):
            if packed := self.counts(row):
                out.append({"size": self.rle_sizes[row].tolist(), "counts": packed.decode()})
            else:
                out.append([part.ravel().tolist() for part in self.polygons(row)])
        return out


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each start on, as many as its length says, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


@dataclass(slots=True)
class MaskBuilder:
    """Gathers masks row by row, portion by portion, and the rows (by kind of fault) that something is left out of."""

    faults: dict[str, list[int]] = field(default_factory=lambda: {FEW_POINTS: [], UNREADABLE: []})
    _points: list[np.ndarray] = field(default_factory=list)
    _lengths: list[int] = field(default_factory=list)
    _parts: list[int] = field(default_factory=list)
    _packed: list[bytes] = field(default_factory=list)
    _sizes: list[tuple[int, int]] = field(default_factory=list)
    _waiting: list[np.ndarray] = field(default_factory=list)

    def add(self, values: Sequence[Any]) -> None:
        """A portion of rows, each a segmentation as COCO has it, or None."""
        for value in values:
            try:
                self._row(value)
            except (TypeError, ValueError, OverflowError, KeyError):
                self.faults[UNREADABLE].append(len(self._parts))
                self._end_row(0, b"", (0, 0))
        if self._waiting:
            self._points.append(np.concatenate(self._waiting))
            self._waiting = []

    def _row(self, value: Any) -> None:
        if isinstance(value, dict) and value:
            height, width = (int(v) for v in value["size"])
            counts = value["counts"]
            runs = np.array(counts, np.int64) if isinstance(counts, list) else unpack_counts(counts)
            check_counts(runs, height, width)
            self._end_row(0, pack_counts(runs, height, width), (height, width))
            return
        whole = []
        for part in _parts(value):
            points = np.asarray(part, np.float64)
            if points.ndim != 1 or len(points) % 2 or not (np.abs(points) < _FARTHEST_PX).all():
                raise ValueError("no polygon")
            if len(points) < 6:
                self.faults[FEW_POINTS].append(len(self._parts))
            else:
                whole.append(points.astype(np.float32).reshape(-1, 2))
        self._waiting += whole
        self._lengths += [len(points) for points in whole]
        self._end_row(len(whole), b"", (0, 0))

    def _end_row(self, parts: int, packed: bytes, size: tuple[int, int]) -> None:
        self._parts.append(parts)
        self._packed.append(packed)
        self._sizes.append(size)

    def table(self) -> MaskTable:
        """All rows so far."""
        return MaskTable(
            np.concatenate([np.zeros((0, 2), np.float32), *self._points]),
            _starts(np.array(self._lengths, np.int64)),
            _starts(np.array(self._parts, np.int64)),
            np.frombuffer(b"".join(self._packed), np.uint8),
            _starts(np.fromiter(map(len, self._packed), np.int64, len(self._packed))),
            np.array(self._sizes, np.int32).reshape(-1, 2),
        )


def _parts(value: Any) -> list[Any]:
    """The polygons of a segmentation; some tools write a single one bare."""
    if value is None or value == {} or value == []:
        return []
    if not isinstance(value, list):
        raise ValueError("no polygons")
    return value if isinstance(value[0], list) else [value]
