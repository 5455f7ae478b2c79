"""Run lengths, polygons and the IoU of masks, beside COCO's own code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from yoloxkd.instance_masks import as_one_polygon, mask_polygons, one_outline, pack_counts, rle_extent, unpack_counts
from yoloxkd.ops.masks import decode_rle, encode_rle, mask_iou, rasterize_polygons


def test_a_small_mask_as_run_lengths() -> None:
    mask = np.array([[0, 1, 0], [0, 1, 1]], bool)
    assert np.array_equal(decode_rle([2, 2, 1, 1], 2, 3), mask)
    assert unpack_counts(encode_rle(mask)).tolist() == [2, 2, 1, 1]
    assert rle_extent(np.array([2, 2, 1, 1]), 2) == (1, 0, 3, 2)


@pytest.mark.parametrize("seed", range(4))
def test_masks_survive_both_forms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    h, w = (int(v) for v in rng.integers(1, 90, 2))
    mask = rng.random((h, w)) < (0.001, 0.02, 0.5, 0.98)[seed]
    packed = encode_rle(mask)
    runs = unpack_counts(packed)
    assert np.array_equal(decode_rle(packed, h, w), mask)
    assert np.array_equal(decode_rle(packed.decode(), h, w), mask)
    assert pack_counts(runs, h, w) == packed
    x, y, bw, bh = coco.toBbox({"size": [h, w], "counts": packed}).tolist()
    assert rle_extent(runs, h) == (x, y, x + bw, y + bh)


@pytest.mark.parametrize(
    ("counts", "said"),
    [("22", "cover 4"), ("é", "characters"), (b"\x10", "characters"), ([7, -1], "negative"), ([3], "cover 3")],
)
def test_what_is_no_mask_of_the_size(counts: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode_rle(counts, 2, 3)  # type: ignore[arg-type]


def test_polygons_are_painted_as_coco_paints_them() -> None:
    rng = np.random.default_rng(0)
    assert np.flatnonzero(rasterize_polygons([np.array([[1, 1], [3, 1], [3, 2], [1, 2.0]])], 4, 5)).tolist() == [6, 7]
    for _ in range(60):
        h, w = (int(v) for v in rng.integers(4, 120, 2))
        low, high = (0.0, 1.0) if rng.random() < 0.5 else (-0.7, 1.6)
        parts = [rng.uniform(low, high, (int(rng.integers(3, 9)), 2)) * (w, h) for _ in range(rng.integers(1, 4))]
        wanted = coco.decode(coco.merge(coco.frPyObjects([p.ravel().tolist() for p in parts], h, w))).astype(bool)
        assert np.array_equal(rasterize_polygons(parts, h, w), wanted)


def test_parts_and_holes_become_one_outline() -> None:
    """Apart, touching, overlapping (where one outline alone would leave a hole), and a random bitmap."""
    square = np.array([[2, 2], [9, 2], [9, 9], [2, 9.0]])
    for shift in ((12, 5), (7, 0), (4, 4)):
        parts = [square, square + shift, square + (20, 20)]
        outline = one_outline(parts, 40, 50)
        assert np.array_equal(rasterize_polygons([outline], 40, 50), rasterize_polygons(parts, 40, 50))
    mask = np.random.default_rng(0).random((30, 40)) < 0.4
    assert np.array_equal(rasterize_polygons([as_one_polygon(mask_polygons(mask))], 30, 40), mask)


def test_the_overlap_of_masks() -> None:
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, :2], masks[1, 1:3] = True, True
    assert mask_iou(masks, masks).tolist() == [[1, pytest.approx(1 / 3), 0], [pytest.approx(1 / 3), 1, 0], [0, 0, 0]]
