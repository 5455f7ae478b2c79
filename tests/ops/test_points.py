"""Locations of the levels, and masks over them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yoloxkd.ops.points import centres_inside, compact, locations

LEVELS = (8, 16, 32)


def test_locations_are_cell_centres_row_by_row() -> None:
    points, strides = locations(((2, 3), (1, 2)), (8, 16), torch.device("cpu"))
    assert points.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    assert strides.tolist() == [8] * 6 + [16] * 2


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
def test_centres_inside_is_the_plain_test(rows: list[tuple[float, float, float, float, bool]]) -> None:
    sizes = ((8, 12), (4, 6), (2, 3))
    boxes = torch.tensor([r[:4] for r in rows], dtype=torch.float32).reshape(1, -1, 4)
    valid = torch.tensor([r[4] for r in rows], dtype=torch.bool).reshape(1, -1)
    points, _ = locations(sizes, LEVELS, torch.device("cpu"))
    low, high = boxes[0, :, None, :2], boxes[0, :, None, 2:]
    plain = ((points >= low) & (points <= high)).all(-1) & valid[0, :, None]
    assert torch.equal(centres_inside(boxes, valid, sizes, LEVELS), plain.any(0).unsqueeze(0))
