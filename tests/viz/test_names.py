"""ImageColumns, charts and the report show class names as they are, whatever characters they have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import matplotlib.axes
import numpy as np
import pytest

from yoloxkd import drawing as draw
from yoloxkd.data.stats import SplitStats
from yoloxkd.types import Detections
from yoloxkd.viz.charts import line_chart
from yoloxkd.viz.comparison import Comparison, draw_comparison
from yoloxkd.viz.data_sheet import draw_counts
from yoloxkd.viz.html_report import ClassRow, Report, inline_image, render_report

NAMES = ["$x$", "$\\frac{", "_hidden", "<b>&", "[/red]", "n" * 200]


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """A folder whose name is no UTF-8."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    return folder


def test_charts_of_a_data_set(odd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[Any] = []
    plain = matplotlib.axes.Axes.set_xticks

    def kept(axes: Any, places: Any, labels: Any = None, **options: Any) -> Any:
        made = plain(axes, places, labels, **options)
        ticks.extend(axes.get_xticklabels())
        return made

    monkeypatch.setattr(matplotlib.axes.Axes, "set_xticks", kept)
    count = len(NAMES)
    stats = SplitStats(
        "val", NAMES, 2, 0, 0, np.ones((count, 3), np.int64), np.ones(count, np.int64), np.array([3, 3]),
        np.array([[90, 120]] * 2), np.full(6, 0.1),
    )  # fmt: skip
    assert draw_counts([stats], odd_folder / "chart.png").is_file()
    assert [tick.get_text() for tick in ticks][:5] == NAMES[:5]
    assert not any(tick.get_parse_math() for tick in ticks)


def test_charts_of_a_study_and_of_a_run(odd_folder: Path) -> None:
    shown = Comparison("costs $5 and \\frac{$", ["a$b$", "c"], [[1.0], [2.0]], [(1.0, 0.1)] * 2, [None, (1.0, 0.2)])
    assert draw_comparison([shown], odd_folder / "study.png", "AP of $val$").is_file()
    svg = line_chart([1, 2], {"_private": [1, 2], "$a$": [2, 3], "<b>": [1, 1]})
    assert "_private" in svg
    assert "$a$" in svg
    assert "&lt;b&gt;" in svg


def test_the_score_of_a_long_name_is_on_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    plain = cv2.putText

    def kept(canvas: Any, text: str, *rest: Any) -> Any:
        texts.append(text)
        return plain(canvas, text, *rest)

    monkeypatch.setattr(draw.cv2, "putText", kept)
    boxes = np.array([[10, 30, 60, 80]], np.float32)
    found = Detections(boxes, np.array([0.87], np.float32), np.array([5]), NAMES)
    canvas = np.zeros((90, 120, 3), np.uint8)
    assert found.plot(canvas).any()
    assert texts[0].startswith("nnn")
    assert texts[0].endswith("87")
    assert cv2.getTextSize(texts[0], cv2.FONT_HERSHEY_SIMPLEX, 0.36, 1)[0][0] <= 120


def test_the_report_escapes_names_and_reads_images_anywhere(odd_folder: Path) -> None:
    file = odd_folder / "p.png"
    file.write_bytes(cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes())
    rows = [ClassRow(name, [0.5]) for name in NAMES]
    report = Report("t", "s", [], classes=rows, class_names=["AP"], metrics=[("AP", "0.5", "")])
    report.images.append(inline_image(file, "<i>caption"))
    page = render_report(report)
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert "&lt;i&gt;caption" in page
    assert "n" * 200 in page
