"""Training curves."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest

from yoloxkd.viz.curves import draw_curves

ROWS = [
    {
        "epoch": str(e),
        "lr": "0.01",
        "images_per_s": "20",
        "loss": str(9 / e),
        "loss/box": str(4 / e),
        "loss/pgd": str(0.001 / e),
        "AP": "" if e % 2 else "0.2",
        "APs": "-1" if e == 2 else "",
    }
    for e in range(1, 6)
]


def test_a_image_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    path = draw_curves(ROWS, tmp_path / "plots" / "curves.png")
    picture = cv2.imread(str(path))
    assert path == tmp_path / "plots" / "curves.png"
    assert picture.shape[:2] == (840, 1320)
    assert picture.std() > 5


def test_every_curve_is_drawn(tmp_path: Path) -> None:
    less = [{k: v for k, v in row.items() if k != "loss/pgd"} for row in ROWS]
    full = cv2.imread(str(draw_curves(ROWS, tmp_path / "a.png")))
    fewer = cv2.imread(str(draw_curves(less, tmp_path / "b.png")))
    assert (full != fewer).any()


def test_a_run_without_an_evaluation_or_with_one_epoch_can_be_drawn(tmp_path: Path) -> None:
    bare = [{"epoch": "1", "lr": "0.01", "images_per_s": "", "loss": "0", "AP": ""}]
    assert draw_curves(bare, tmp_path / "c.png").is_file()


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        draw_curves([], tmp_path / "c.png")
