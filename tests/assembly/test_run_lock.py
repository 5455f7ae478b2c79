"""One training at a time in a run's folder, and a folder of its own for each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from yoloxkd.assembly.run_lock import LOCK, claimed
from yoloxkd.errors import UserError

HOLDS = """
import sys
from pathlib import Path
from yoloxkd.assembly.run_lock import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_another_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as first:  # fmt: skip
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"another training is at work in .*run; wait for its end"), claimed(folder):
            pass
        assert (folder / LOCK).is_file()
        first.kill()  # it can clear nothing away
    with claimed(folder) as again:
        assert again == folder
    assert list(folder.iterdir()) == []


def test_a_name_that_another_run_has_taken_meanwhile_is_left_to_it(tmp_path: Path) -> None:
    names = iter([tmp_path / "runs" / "x-2", tmp_path / "runs" / "x-3"])
    for taken in ("x", "x-2"):
        (tmp_path / "runs" / taken).mkdir(parents=True)
    with claimed(tmp_path / "runs" / "x", lambda: next(names)) as folder:
        assert folder == tmp_path / "runs" / "x-3"
        (folder / "last.pt").write_bytes(b"x")
    assert [path.name for path in folder.iterdir()] == ["last.pt"]


def test_a_run_that_left_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed(tmp_path / "a" / "b"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with claimed(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file/run cannot be made: Not a directory"),
        claimed(tmp_path / "file" / "run"),
    ):
        pass
