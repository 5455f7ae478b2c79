"""What commands print survives any encoding, width, name and reader."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from yoloxkd.cli.run_tables import metrics_table
from yoloxkd.cli.tables import printable, table

PROGRAM = [sys.executable, "-c", "from yoloxkd.cli import main; main()"]


def started(arguments: list[str], folder: Path, **variables: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [*PROGRAM, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture
def oddly_named(tmp_path: Path) -> Path:
    """A YOLO data set whose classes have names that rich, an ASCII terminal and a narrow one would spoil."""
    from tests.cli.conftest import put_image

    put_image(tmp_path / "images" / "a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 .5 .5 .2 .2\n1 .5 .5 .1 .1\n2 .3 .3 .1 .1\n")
    names = ["[red]", "caf\u00e9 [/b]", "long " * 30 + "end"]
    (tmp_path / "data.yaml").write_text(f"names: {names!r}\nval: images\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "40"}]
)
def test_class_names_and_numbers_are_whole(variables: dict[str, str], oddly_named: Path) -> None:
    process = started(["data", "stats", "data.yaml", "--out", "stats"], oddly_named, **variables)
    out, err = (text.decode("utf-8") for text in process.communicate(timeout=120))
    assert process.returncode == 0, err
    assert "Traceback" not in err
    lines = out.splitlines()
    assert any(line.startswith("[red]") and line.split()[-2:] == ["0", "1"] for line in lines)
    assert any("[/b]" in line for line in lines)
    assert any(line.endswith("long end") for line in lines)


def test_a_reader_who_leaves_stops_no_work(oddly_named: Path) -> None:
    process = started(["data", "stats", "data.yaml", "--out", "stats"], oddly_named)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=120) == 0
    assert err == ""
    assert (oddly_named / "stats" / "chart.png").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_stdout_is_said_at_the_end(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*PROGRAM, "--version"], stdout=full, stderr=subprocess.PIPE, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.decode().startswith("yoloxkd: what the command says could not be written to stdout")
    assert len(done.stderr.decode().splitlines()) == 1


def test_numbers_of_a_long_class_name_are_not_cut() -> None:
    values = {"AP": 0.12345, "AP50": 0.54321, "AP75": 0.4, "APs": 0.1, "APm": -1.0, "APl": 0.9}
    names = ["x" * 200, "[bold]a[/bold]", ":smile:", "\u732b" * 10, "two\nlines\x1b[31m"]
    text = metrics_table({**values, "per_class": dict.fromkeys(names, values)})
    lines = text.splitlines()
    for name in ("x" * 200, "[bold]a[/bold]", ":smile:", "\u732b" * 10, "two\\nlines\\x1b[31m"):
        at = next(i for i, line in enumerate(lines) if line.startswith(name))
        assert "0.1234  0.5432" in " ".join(lines[at : at + 2]) or "0.1235  0.5432" in " ".join(lines[at : at + 2])
    assert "\u2026" not in text
    assert "\x1b" not in text


def test_a_table_lines_up() -> None:
    text = table(["class", "AP"], [["a", "0.5"], ["\u732b\u732b", "0.25"]])
    assert text.splitlines() == ["class    AP", "a       0.5", "\u732b\u732b   0.25"]
    assert printable("a\tb\u00e9\udce9") == "a\\tb\u00e9\udce9"
