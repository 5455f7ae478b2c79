"""A resume reads the run's own tables and environment.json; what was changed in them is told before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from yoloxkd.engine.callbacks.csv_log import read_rows
from yoloxkd.engine.callbacks.learning_rate import read_learning_rates
from yoloxkd.engine.provenance import read_environment
from yoloxkd.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch,lr\nx,0.1\n", "line 2 has 'x' as 'epoch'"),
        ("epoch,lr\n1,0.1\n1.5,0.1\n", "line 3 has '1.5' as 'epoch'"),
        ("lr\n0.1\n", "line 2 has '' as 'epoch'"),
        (f"epoch,lr\n{'9' * 5000},0.1\n", "line 2 has .* as 'epoch'"),
        ("epoch,lr\n1,fast\n", "line 2 has 'fast' as 'lr', which should be a number"),
        ("epoch,lr\n1,0.1,7\n", "line 2 has more values than there are columns"),
    ],
)
def test_a_changed_results_csv_is_told_by_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(UserError, match=f"results.csv was changed or is damaged: {message}.*move it away"):
        read_rows(tmp_path / "results.csv")


def test_tables_of_numbers_are_read(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("epoch,lr,AP\n1,1e-3,\n2,nan\n")
    assert read_rows(tmp_path / "results.csv") == [
        {"epoch": "1", "lr": "1e-3", "AP": ""},
        {"epoch": "2", "lr": "nan", "AP": ""},
    ]
    (tmp_path / "results.csv").write_bytes(b"epoch\n\xff\n")
    with pytest.raises(UserError, match="is not a CSV file"):
        read_rows(tmp_path / "results.csv")


@pytest.mark.parametrize("text", ["epoch,lr\n1,0.1\n", "step,epoch,lr\n1,1,\n", "step,epoch,lr\n-1,1,0.1\n"])
def test_a_changed_learning_rate_csv_too(text: str, tmp_path: Path) -> None:
    (tmp_path / "learning_rate.csv").write_text(text)
    with pytest.raises(UserError, match=r"learning_rate.csv was changed or is damaged: line 2"):
        read_learning_rates(tmp_path / "learning_rate.csv")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "it is no JSON object"),
        ({"packages": ["torch"]}, "its 'packages'"),
        ({"git": {"commit": 5}}, "its 'git.commit' holds 5"),
        ({"resumed": "yesterday"}, "its 'resumed'"),
        ({"resumed": [{"started": "now", "epoch": "2"}]}, "its 'resumed.0.epoch' holds '2'"),
    ],
)
def test_a_changed_environment_is_told_by_its_key(value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "environment.json"
    file.write_text(json.dumps(value))
    with pytest.raises(UserError, match=f"environment.json was changed or is damaged: {message}"):
        read_environment(file)
    file.write_text("{")
    with pytest.raises(UserError, match=r"environment.json is not valid JSON"):
        read_environment(file)


def test_keys_that_only_people_read_stay(tmp_path: Path) -> None:
    about = {
        "host": "x",
        "note": [1],
        "packages": {"torch": "2"},
        "git": None,
        "resumed": [{"started": "t", "epoch": 2}],
    }
    (tmp_path / "environment.json").write_text(json.dumps(about))
    assert read_environment(tmp_path / "environment.json").model_dump() == about
