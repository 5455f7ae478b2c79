"""Where files are kept, with a home folder and without one that can be used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from yoloxkd import cache_folders
from yoloxkd.data.data_spec import find_data
from yoloxkd.data.io.image_caches import image_folder
from yoloxkd.errors import UserError

VARIABLES = ("HOME", "YOLOXKD_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", *cache_folders.LIBRARIES)


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without a home folder, as `docker run --user 54321` makes; returns the folder for temporary files."""

    def unknown(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(unknown))
    monkeypatch.setattr(cache_folders.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cache_folders, "_announced", set())
    return tmp_path / f"yoloxkd-{os.getuid()}"


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folders.cache_folder() == tmp_path / ".cache" / "yoloxkd"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folders.cache_folder() == tmp_path / "xdg" / "yoloxkd"
    monkeypatch.setenv("YOLOXKD_HOME", "~/mine")
    assert cache_folders.cache_folder() == tmp_path / "mine"


@pytest.mark.usefixtures("nobody")
def test_without_a_home_nothing_is_made_by_looking(nobody: Path) -> None:
    assert cache_folders.cache_folder() == nobody
    assert cache_folders.find_cached("x.pth") == nobody / "x.pth"
    assert not nobody.exists()


def test_without_a_home_files_go_to_the_temporary_folder_and_it_is_said_once(
    nobody: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert image_folder() == nobody / "pictures"
    assert nobody.stat().st_mode & 0o777 == 0o700
    assert image_folder().is_dir()
    said = capsys.readouterr().err
    assert said.count(str(nobody)) == 1
    assert "YOLOXKD_HOME" in said


def test_a_folder_of_somebody_else_is_not_used(nobody: Path) -> None:
    nobody.symlink_to("/")
    with pytest.raises(UserError, match="belongs to another user"):
        image_folder()


@pytest.mark.parametrize("home", ["missing", "a file", ""])
def test_a_home_that_is_no_folder_counts_as_none(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / home) if home else "")
    monkeypatch.setattr(cache_folders.tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache_folders.cache_folder() == tmp_path / f"yoloxkd-{os.getuid()}"
    assert not (tmp_path / "missing").exists()


def test_what_is_kept_in_a_read_only_home_is_found(
    nobody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / ".cache" / "yoloxkd").mkdir(parents=True)
    (home / ".cache" / "yoloxkd" / "x.pth").write_text("")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: home))
    monkeypatch.setattr(cache_folders.os, "access", lambda path, mode: not str(path).startswith(str(home)))
    assert cache_folders.find_cached("x.pth") == home / ".cache" / "yoloxkd" / "x.pth"
    assert cache_folders.find_cached("y.pth") == nobody / "y.pth"
    assert image_folder() == nobody / "pictures"


@pytest.mark.usefixtures("nobody")
def test_a_folder_that_the_user_named_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("YOLOXKD_HOME", str(folder))
        with pytest.raises(UserError, match="YOLOXKD_HOME"):
            image_folder()
        with pytest.raises(UserError, match="YOLOXKD_HOME"):
            find_data("shapes")


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("path", ["~/data.yaml", "~nobody-of-this-name/data.yaml"])
def test_a_tilde_without_a_home_is_a_sentence(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="set HOME"):
        find_data(path)


def test_libraries_are_led_away_from_a_home_that_cannot_be_used(nobody: Path) -> None:
    cache_folders.settle_libraries()
    assert {os.environ[name] for name in cache_folders.LIBRARIES} == {
        str(nobody / v[2]) for v in cache_folders.LIBRARIES.values()
    }
    assert (nobody / "matplotlib").is_dir()


def test_libraries_are_left_alone_with_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cache_folders.settle_libraries()
    assert not set(cache_folders.LIBRARIES) & os.environ.keys()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs user namespaces")
def test_a_user_without_a_name_can_list_models_and_draw(tmp_path: Path) -> None:
    nameless = ["unshare", "-U", "--map-user=54321", "--map-group=54321"]
    if subprocess.run([*nameless, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs user namespaces")
    env = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "USER", "LOGNAME", "USERNAME", "LNAME")}
    env |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    code = (
        "from yoloxkd.cli import run; import matplotlib.pyplot, os; "
        "assert run(['models']) == 0 and os.environ['MPLCONFIGDIR']"
    )
    done = subprocess.run(
        [*nameless, sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    slow_machine = "Matplotlib is building the font cache"  # said after five seconds
    assert (done.returncode, [x for x in done.stderr.splitlines() if not x.startswith(slow_machine)]) == (0, [])
    assert str(tmp_path / "yoloxkd-54321") in done.stdout.replace("\n", "")
