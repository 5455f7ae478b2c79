"""Tables of names: lazy, complete, and the source of the command line's help."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys

import pytest

import yoloxkd.table
from yoloxkd.config.files import cfg_names
from yoloxkd.data import FORMATS
from yoloxkd.data.formats.format import Format
from yoloxkd.engine.callbacks import CALLBACKS
from yoloxkd.engine.callbacks.named import NamedCallback
from yoloxkd.errors import UserError
from yoloxkd.exporters import EXPORTERS, RUNTIMES
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Distiller
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.detector import Detector
from yoloxkd.table import Table

LISTING = """
import sys
from yoloxkd.data import FORMATS
from yoloxkd.exporters import EXPORTERS, RUNTIMES
from yoloxkd.kd import DISTILLERS
from yoloxkd.nn import DETECTORS
print(*FORMATS, *EXPORTERS, *RUNTIMES, *DISTILLERS, *DETECTORS)
assert not {"torch", "numpy", "pydantic"} & sys.modules.keys()
"""


def test_every_entry_is_what_its_table_says() -> None:
    assert all(issubclass(kind, Detector) and kind.family == name for name, kind in DETECTORS.items())
    assert all(issubclass(kind, Distiller) and kind.name == name for name, kind in DISTILLERS.items())
    assert all(issubclass(kind, NamedCallback) and kind.name == name for name, kind in CALLBACKS.items())
    assert all(isinstance(format, Format) for format in FORMATS.values())
    assert all(callable(entry) for table in (EXPORTERS, RUNTIMES) for entry in table.values())


def test_names_are_listed_without_importing_anything() -> None:
    done = subprocess.run([sys.executable, "-c", LISTING], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*FORMATS, *EXPORTERS, *RUNTIMES, *DISTILLERS, *DETECTORS]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown distiller 'pgdd' in the recipe; did you mean 'pgd'"):
        DISTILLERS.find("pgdd", " in the recipe")
    assert DISTILLERS.find("pgd") is DISTILLERS["pgd"]


def test_an_entry_of_one_s_own() -> None:
    table: Table[type] = Table("thing", {"deque": "collections:deque"})
    table["mine"] = int
    assert [*table] == ["deque", "mine"]
    assert table["mine"] is int
    del table["mine"]
    assert len(table) == 1


def test_the_help_lists_what_the_tables_hold(capsys: pytest.CaptureFixture[str]) -> None:
    from yoloxkd.cli import app

    def shown(*command: str) -> str:
        app([*command, "--help"], standalone_mode=False)
        return "".join(capsys.readouterr().out.split())

    train = shown("train")
    assert "none," + ",".join(DISTILLERS) in train
    for name in cfg_names("models"):
        family = max((family for family in DETECTORS if name.startswith(f"{family}-")), key=len)
        size = name.removeprefix(f"{family}-")
        sizes = re.search(rf"(?<![\w-]){family}-{{(.*?)}}", train)
        assert sizes is not None
        assert size in sizes[1].split(",")
    assert ",".join(EXPORTERS) in shown("export")
    assert ",".join(FORMATS) in shown("data", "convert")
    assert all(name in shown("predict") for name in RUNTIMES)


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(yoloxkd.table).failed == 0
