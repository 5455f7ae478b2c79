"""Instance masks as bitmaps, run lengths and polygons, by COCO's rules.

Run lengths go down the columns, first the pixels outside; pixel i covers i to i + 1. `pycocotools` paints and packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_MOST_PX = 1 << 30


def encode_rle(mask: np.ndarray) -> bytes:
    """(H, W) bool -> COCO's compressed run lengths."""
    from pycocotools import mask as coco

    counts: bytes = coco.encode(np.asfortranarray(mask, np.uint8))["counts"]
    return counts


def encode_rles(masks: np.ndarray) -> list[bytes]:
    """(n, H, W) bool -> n compressed run lengths."""
    return [encode_rle(mask) for mask in masks]


def rle_dict(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) bool -> COCO's segmentation for JSON: {"size": [H, W], "counts": text}."""
    return {"size": [int(v) for v in mask.shape], "counts": encode_rle(mask).decode()}


def crop_rle(part: np.ndarray, left: int, top: int, height: int, width: int) -> dict[str, Any]:
    """As `rle_dict`, of a mask (height, width) that is `part` (h, w) bool with its corner at (left, top), and empty else."""
    columns = np.zeros((part.shape[1], height), bool)
    columns[:, top : top + part.shape[0]] = part.T
    changes = np.flatnonzero(np.diff(columns.ravel(), prepend=False, append=False)) + left * height
    ends = np.unique(np.append(changes, height * width))
    counts = np.diff(np.concatenate([[0], ends]))
    return {"size": [height, width], "counts": pack_counts(counts, height, width).decode()}


def pack_counts(counts: Sequence[int] | np.ndarray, height: int, width: int) -> bytes:
    """Uncompressed run lengths, which sum to height * width -> compressed."""
    from pycocotools import mask as coco

    packed: bytes = coco.frPyObjects({"size": [height, width], "counts": np.asarray(counts).tolist()}, height, width)[
        "counts"
    ]
    return packed


def unpack_counts(packed: bytes | str) -> np.ndarray:
    """Compressed run lengths -> (r,) int64. ValueError: they are none.

    A number is little-endian in groups of 5 bits, offset by 48, with a sixth bit where more follow; from the fourth on it
    is the difference to the number two before.
    """
    try:
        raw = packed.encode("ascii") if isinstance(packed, str) else bytes(packed)
    except UnicodeEncodeError as error:
        raise ValueError("run lengths hold characters that COCO's do not") from error
    groups = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
    if ((groups < 0) | (groups > 63)).any() or (len(groups) and groups[-1] & 32):
        raise ValueError("run lengths hold characters that COCO's do not, or are cut short")
    last = (groups & 32) == 0
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1]) if len(groups) else np.zeros(0, np.int64)
    number = np.cumsum(last) - last
    shift = 5 * (np.arange(len(groups)) - starts[number]) if len(groups) else groups
    if (shift > 30).any():
        raise ValueError("run lengths are longer than any image")
    values = np.zeros(len(starts), np.int64)
    np.add.at(values, number, (groups & 31) << shift)
    ends = np.flatnonzero(last)
    values -= np.where(groups[ends] & 16, np.int64(1) << (shift[ends] + 5), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def decode_rle(counts: bytes | str | Sequence[int] | np.ndarray, height: int, width: int) -> np.ndarray:
    """Run lengths, compressed or not -> (H, W) bool. ValueError: they are none, or of another size."""
    runs = unpack_counts(counts) if isinstance(counts, bytes | str) else np.asarray(counts, np.int64)
    check_counts(runs, height, width)
    inside = np.arange(len(runs)) % 2 == 1
    columns: np.ndarray = np.repeat(inside, runs).reshape(width, height)
    return np.ascontiguousarray(columns.T)


def check_counts(runs: np.ndarray, height: int, width: int) -> None:
    """ValueError: run lengths (r,) are not those of an image of this size."""
    if len(runs) and (runs.min() < 0 or runs.max() > _MOST_PX):
        raise ValueError("run lengths are negative, or longer than any image")
    if runs.sum() != height * width:
        raise ValueError(f"run lengths cover {int(runs.sum())} pixels, where {height} x {width} are {height * width}")


def rle_extent(runs: np.ndarray, height: int) -> tuple[int, int, int, int]:
    """Run lengths (r,) of an image `height` px high -> x1, y1, x2, y2 px around its mask; zeros where it is empty."""
    ends = np.cumsum(runs)
    starts, ends = (ends - runs)[1::2], ends[1::2]
    nonempty = ends > starts
    if not nonempty.any():
        return 0, 0, 0, 0
    starts, last = starts[nonempty], ends[nonempty] - 1
    x1, x2 = int(starts[0] // height), int(last[-1] // height) + 1
    if (starts // height != last // height).any():  # a run that goes on in the next column touches both borders
        return x1, 0, x2, height
    return x1, int((starts % height).min()), x2, int((last % height).max()) + 1


def rasterize_polygons(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """The union of polygons (p, 2) x, y px, each of three points or more -> (H, W) bool, pixel for pixel as COCO paints it."""
    out = np.zeros((height, width), bool)
    paint_polygons(polygons, out)
    return out


def paint_polygons(polygons: Sequence[np.ndarray], out: np.ndarray) -> None:
    """`rasterize_polygons` into `out` (H, W) bool, of which only the part around the polygons is written."""
    from pycocotools import mask as coco

    height, width = out.shape
    if not len(polygons):
        return
    points = np.concatenate(list(polygons)).astype(np.float64)
    # whole pixels away from the corner nothing is painted otherwise; beyond the corner COCO rounds another way
    left, top = (max(0, int(v)) for v in np.floor(points.min(0)).tolist())
    right, bottom = (
        min(most, int(v) + 2) for v, most in zip(np.ceil(points.max(0)).tolist(), (width, height), strict=True)
    )
    if right <= left or bottom <= top:
        return
    parts = [(part.astype(np.float64) - (left, top)).ravel().tolist() for part in polygons]
    packed = coco.merge(coco.frPyObjects(parts, bottom - top, right - left))
    out[top:bottom, left:right] |= coco.decode(packed).view(bool)


def mask_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """(H, W) bool -> outlines (p, 2) px of its parts and its holes, which painted as one polygon give the same pixels."""
    # a quarter of a pixel inside the border: of a bitmap of twice the size the outermost pixels' centers
    import cv2  # costs a tenth of a second, and the package's own import should cost none

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8)
    outlines, _ = cv2.findContours(part.repeat(2, 0).repeat(2, 1), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [(outline[:, 0].astype(np.float64) + 0.5) / 2 + (columns[0], rows[0]) for outline in outlines]


def as_one_polygon(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Polygons (p, 2) joined by lines there and back between their nearest points, which enclose nothing -> (q, 2)."""
    whole = parts[0]
    for part in parts[1:]:
        distance = ((whole[:, None] - part[None]) ** 2).sum(-1)
        i, j = np.unravel_index(int(distance.argmin()), distance.shape)
        whole = np.concatenate([whole[: i + 1], part[j:], part[: j + 1], whole[i:]])
    return whole


def one_outline(parts: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Polygons of an image as one (q, 2) that paints the same pixels; where they overlap the outline is traced anew."""
    whole = as_one_polygon(parts)
    if len(parts) == 1:
        return whole
    parts_mask = rasterize_polygons(parts, height, width)
    if np.array_equal(rasterize_polygons([whole], height, width), parts_mask) or not parts_mask.any():
        return whole
    return as_one_polygon(mask_polygons(parts_mask))


def segment_line(label: int, polygon: np.ndarray, height: int, width: int) -> str:
    """A line of YOLO's segments: class and points as fractions of the image, within it, to 1e-7."""
    points = np.clip(polygon / (width, height), 0, 1)
    return " ".join([str(label), *(f"{v:.7f}".rstrip("0").rstrip(".") for v in points.ravel().tolist())]) + "\n"
