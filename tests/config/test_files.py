"""Where the shipped YAML files are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from yoloxkd.config import files
from yoloxkd.errors import UserError


def test_names_are_the_files_of_a_kind() -> None:
    assert "coco" in files.cfg_names("data")
    assert files.cfg_names("data") == sorted(files.cfg_names("data"))
    assert files.cfg_names("no such kind") == []


def pretend_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "yoloxkd" / "config").mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(root / "yoloxkd" / "config" / "files.py"))


def test_a_stranger_s_cfg_beside_the_package_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_package(tmp_path, monkeypatch)
    (tmp_path / "cfg").mkdir()
    with pytest.raises(UserError, match="install the package again"):
        files.cfg_folder()
    (tmp_path / "pyproject.toml").touch()
    assert files.cfg_folder() == tmp_path / "cfg"


def test_the_installed_package_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_package(tmp_path, monkeypatch)
    (tmp_path / "cfg").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "yoloxkd" / "cfg").mkdir()
    assert files.cfg_folder() == tmp_path / "yoloxkd" / "cfg"


@pytest.mark.parametrize("file", sorted((files.cfg_folder() / "data").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_data_sets_say_how_to_get_them(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    assert content["download"].strip()
    assert len(set(content["names"])) == len(content["names"])
