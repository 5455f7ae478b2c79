"""An output is never an input: by every way two names can mean one file, and before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from yoloxkd.engine.atomic import clear_leftovers, write_text
from yoloxkd.errors import UserError
from yoloxkd.output_paths import Output, check_outputs


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"the user's image")
    return Path("in/a.jpg")


def refused(outputs: list[Output], inputs: list[str | Path], *words: str) -> None:
    with pytest.raises(UserError) as raised:
        check_outputs(outputs, inputs)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    "way", ["same", "absolute", "dots", "dots through a folder to be made", "link", "hard link", "folder link"]
)
def test_one_file_by_two_names(way: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "soft.jpg").symlink_to(source)
    os.link(source, tmp_path / "hard.jpg")
    (tmp_path / "linked").symlink_to("in")
    path = {
        "same": source,
        "absolute": tmp_path / source,
        "dots": Path("in/../in/a.jpg"),
        "dots through a folder to be made": Path("new/../in/a.jpg"),
        "link": Path("soft.jpg"),
        "hard link": Path("hard.jpg"),
        "folder link": Path("linked/a.jpg"),
    }[way]
    refused([Output("--json", path, None)], ["other.jpg", source], f"--json {path} is a file that this command reads")
    refused([Output("--json", Path("x.json")), Output("--out", path, None)], [source], f"--out {path}")


@pytest.mark.parametrize(
    ("one", "other"),
    [("a.json", "./a.json"), ("a.json", "A.JSON"), ("new/a.json", "NEW/b/../a.json"), ("é.json", "e\u0301.json")],
)
def test_two_outputs_are_never_one_file(one: str, other: str, source: Path) -> None:
    refused([Output("--json", Path(one)), Output("--coco", Path(other))], [], "--json", "--coco", "are the same file")


def test_outputs_apart_from_each_other_are_let_through_and_nothing_is_made(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    check_outputs([Output("--json", Path("new/a.json")), Output("--out", Path("new/a.jpg"))], [source, "not there"])
    check_outputs([Output("--json", Path("/dev/null")), Output("--coco", Path("/dev/null"))], [source])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_of_the_user_stays_and_an_earlier_result_goes(source: Path) -> None:
    Path("gt.json").write_text('{"images": [], "annotations": []}')
    refused([Output("--json", Path("gt.json"))], [], "gt.json is there already")
    Path("empty.json").touch()
    for content in ("[]\n", '[\n  {\n    "image": "a.jpg"', '{\n  "model": "x.onnx"', '{\n  "data": "shapes"'):
        Path("own.json").write_text(content)
        check_outputs([Output("--json", Path("own.json")), Output("--coco", Path("empty.json"))], [])


def test_places_that_cannot_be_written_are_found_before_the_work(source: Path) -> None:
    refused([Output("--json", source / "x.json")], [], "could not write in/a.jpg/x.json", "is not a folder")
    refused([Output("--json", Path("in"))], [], "--json in is a folder")
    refused([Output("--json", Path("/proc/x/y.json"))], [], "could not write /proc/x/y.json")
    refused([Output("--json", Path("x" * 300))], [], "could not write xxx", "too long")


def test_the_records_of_a_run_belong_to_it(source: Path) -> None:
    Path("run").mkdir()
    Path("run/last.pt").touch()
    refused([Output("--out", Path("run/metrics.json"))], [], "is a record of the run")
    check_outputs([Output("--json", Path("run/test.json"))], [])


def test_a_device_is_written_to_and_a_link_stays(source: Path, tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "text")
    assert not Path("/dev/null").is_file()
    Path("kept.json").symlink_to("in/real.json")
    write_text(Path("kept.json"), "text")
    assert Path("kept.json").is_symlink()
    assert Path("in/real.json").read_text() == "text"
    name = "n" * 250 + ".json"
    write_text(Path(name), "caf\udce9")
    assert Path(name).read_text() == "caf\\udce9"


def test_only_what_a_run_left_itself_is_cleared(tmp_path: Path) -> None:
    others = ["other-run/.last.pt.123.part", ".download.part", ".notes.part", "plots/.x.part"]
    own = [".last.pt.123.part", "plots/.curves.png.9.part"]
    for name in others + own:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert clear_leftovers(tmp_path) == 2
    assert all((tmp_path / name).exists() for name in others)
