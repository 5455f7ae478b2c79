"""The streaming reader gives what `json` gives, whatever the layout and wherever its blocks end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from yoloxkd.data.io import json_stream
from yoloxkd.data.io.json_stream import json_lists

CONTENT: dict[str, Any] = {
    "info": {"year": 2017, "deep": [[1, {"x": "]}"}]]},
    "images": [{"id": i, "name": f'bild-ü-{i}\n"[{{', "size": [i, 1.5e3]} for i in range(40)],
    "none": [],
    "numbers": [1, 22, 333, -4.5, None, True, "x", [], {}],
    "other": "text",
}
WANTED = frozenset({"images", "none", "numbers", "other"})


def gathered(file: Path) -> tuple[dict[str, list[Any]], dict[str, list[int]]]:
    values: dict[str, list[Any]] = {}
    lines: dict[str, list[int]] = {}
    for rows in json_lists(file, WANTED):
        values.setdefault(rows.key, []).extend(rows.values)
        lines.setdefault(rows.key, []).extend(rows.lines)
    return values, lines


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("rows", [1, 5, 4096])
def test_every_layout_and_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, block: int, rows: int
) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    monkeypatch.setattr(json_stream, "_ROWS", rows)
    text = json.dumps(CONTENT, indent=indent, ensure_ascii=False)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    values, lines = gathered(tmp_path / "a.json")
    assert values == {key: CONTENT[key] if key != "other" else ["text"] for key in WANTED}
    if indent is None:
        assert set(lines["images"]) == {1}
    else:
        of_line = text.splitlines()
        starts = [number for number, line in enumerate(of_line, start=1) if '"id"' in line]
        assert lines["images"] == [number - 1 for number in starts]


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expecting value"),
        ('{"images": [{"id": 1}\n, {"id": }]}', "line 2"),
        ('{"images": [1, 2', "delimiter|expecting"),
        ('{"images": [1 2]}', "expecting"),
        ('{"images": [1,]}', "expecting value"),
        ('{"images": []', "expecting"),
        ('{"images": []} x', "extra data"),
        ("{images: []}", "double quotes"),
    ],
)
def test_what_is_not_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str, block: int) -> None:
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        gathered(tmp_path / "a.json")


def test_other_encodings_and_other_values(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.json").write_text(json.dumps(CONTENT, ensure_ascii=False), encoding=encoding)
        assert gathered(tmp_path / "a.json")[0]["numbers"] == CONTENT["numbers"]
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(TypeError, match="a list, not an object"):
        gathered(tmp_path / "a.json")
