"""Sizes are a pure function of the iteration."""

from __future__ import annotations

from yoloxkd.engine.multiscale import INTERVAL, size_at


def test_sizes_hold_for_an_interval_and_cover_the_range() -> None:
    sizes = [size_at(i, imgsz=320, steps=(-3, 7), stride=32, seed=1) for i in range(3000)]
    assert all(len(set(sizes[i : i + INTERVAL])) == 1 for i in range(0, 3000, INTERVAL))
    assert set(sizes) == set(range(224, 545, 32))
    assert sizes == [size_at(i, imgsz=320, steps=(-3, 7), stride=32, seed=1) for i in range(3000)]
    assert sizes != [size_at(i, imgsz=320, steps=(-3, 7), stride=32, seed=2) for i in range(3000)]
    assert {size_at(i, imgsz=320, steps=(0, 0), stride=32, seed=1) for i in range(100)} == {320}
    assert min(size_at(i, imgsz=64, steps=(-5, 5), stride=32, seed=1) for i in range(1000)) == 64
