"""Locations of the levels, and masks over them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yoloxkd.ops.points import centers_inside, compact, grid_of

LEVELS = (8, 16, 32)


def test_locations_are_cell_centers_row_by_row() -> None:
    grid = grid_of(((2, 3), (1, 2)), (8, 16), torch.device("cpu"))
    assert grid.points.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    assert grid.point_strides.tolist() == [8] * 6 + [16] * 2


def test_predictions_of_a_cell_lie_side_by_side() -> None:
    grid = grid_of(((2, 3), (1, 2)), (8, 16), torch.device("cpu"), per_cell=2)
    assert grid.points[:4].tolist() == [[4, 4], [4, 4], [12, 4], [12, 4]]
    assert grid.slices() == (slice(0, 12), slice(12, 16))
    fine, coarse = grid.by_level(torch.arange(16)[None])
    assert fine.shape == (1, 2, 3, 2)
    assert fine[0, 1, 0].tolist() == [6, 7]
    assert coarse.shape == (1, 1, 2, 2)
    last = grid.of_levels([1])
    assert (last.sizes, last.strides, last.point_strides.tolist()) == (((1, 2),), (16,), [16] * 4)
    assert torch.equal(last.points, grid.points[12:])
    box = torch.tensor([[[10.0, 0.0, 14.0, 6.0]]])
    inside = centers_inside(box, torch.ones(1, 1, dtype=torch.bool), grid)
    assert inside[0].nonzero().flatten().tolist() == [2, 3]


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(0, 9))
def test_compact_is_nonzero_in_fixed_slots(rows: list[list[bool]], slots: int) -> None:
    mask = torch.tensor(rows)
    cells, used = compact(mask, slots)
    assert cells.shape == used.shape == (len(rows), slots)
    for i, row in enumerate(rows):
        expected = [j for j, value in enumerate(row) if value][:slots]
        assert cells[i][used[i]].tolist() == expected
        assert cells[i][~used[i]].tolist() == [0] * (slots - len(expected))


COORDINATE = st.integers(-40, 140).map(lambda v: v / 2)


@settings(deadline=None)
@given(st.lists(st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE, st.booleans()), min_size=0, max_size=5))
def test_centers_inside_is_the_plain_test(rows: list[tuple[float, float, float, float, bool]]) -> None:
    sizes = ((8, 12), (4, 6), (2, 3))
    boxes = torch.tensor([r[:4] for r in rows], dtype=torch.float32).reshape(1, -1, 4)
    valid = torch.tensor([r[4] for r in rows], dtype=torch.bool).reshape(1, -1)
    grid = grid_of(sizes, LEVELS, torch.device("cpu"))
    low, high = boxes[0, :, None, :2], boxes[0, :, None, 2:]
    plain = ((grid.points >= low) & (grid.points <= high)).all(-1) & valid[0, :, None]
    assert torch.equal(centers_inside(boxes, valid, grid), plain.any(0).unsqueeze(0))
