"""Studies that really train: skipped, resumed, interrupted, failed; and the results that are kept."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from tests.conftest import REPOSITORY
from tests.study.conftest import definition, write
from yoloxkd.cli import run
from yoloxkd.cli.studying import check_grids
from yoloxkd.errors import UserError
from yoloxkd.study.definition import read_study
from yoloxkd.study.kept_runs import SUMMARY, write_summary
from yoloxkd.study.plan import Key, plan
from yoloxkd.study.processes import lock_folder
from yoloxkd.study.runner import Runner, valid_records

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(toy: Path, toy_run: Path) -> dict[str, Any]:
    return definition(toy, toy_run / "best.pt")


@pytest.fixture(scope="module")
def done(toy: Path, toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study: plain, a weight of zero, PGD by the student itself, by an untrained teacher."""
    folder = tmp_path_factory.mktemp("study")
    methods = {
        "none": None,
        "zero": {"kd": "fgd", "settings": {"kd.weight": 0}},
        "own": {"kd": "pgd", "teacher": "self"},
        "random": {"kd": "fgd", "teacher": "untrained"},
    }
    file = write(folder, definition(toy, toy_run / "best.pt", methods=methods))
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    assert run(["study", file, "--out", str(folder / "out"), "--jobs", "2"]) == 0
    return folder


def test_what_a_study_leaves(done: Path) -> None:
    results = done / "out" / "results"
    with open(results / "summary.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(SUMMARY)
    assert {row["method"] for row in table} == {"teacher", "none", "zero", "own", "random"}
    for row in table:
        about = json.loads((results / "tiny" / folder_of(row) / "run.json").read_text())
        assert float(row["AP"]) == pytest.approx(about["metrics"]["AP"], abs=1e-4)
        if row["method"] != "teacher":
            assert float(row["seconds"]) > 0
            assert about["cpu_seconds"] > 0
            assert about["chosen"]["split"] == "val"
            assert about["split"] == "test"
            assert set(about["data_digests"]) == {"train", "val", "test"}
            assert (results / "tiny" / folder_of(row) / "results.csv").is_file()
    assert float(table[0]["AP"]) > 0  # the teacher's row, measured on the test split
    assert (results / "tiny.md").read_text().count("(tiny/nano/") == 4
    picture = cv2.imread(str(results / "tiny.png"))
    assert picture is not None
    assert picture.shape[0] > 200
    assert picture.std() > 10
    assert str(done) not in "".join(p.read_text() for p in results.glob("tiny/**/run.json"))


def folder_of(row: dict[str, str]) -> str:
    return "teacher" if row["method"] == "teacher" else f"{row['student']}/{row['method']}-s{row['seed']}"


def test_a_weight_of_zero_is_the_plain_run_bit_for_bit(done: Path) -> None:
    plain, zero = (
        torch.load(done / "out" / "nano" / f"{name}-s0" / "last.pt", weights_only=True) for name in ("none", "zero")
    )
    assert plain["model"].keys() == zero["model"].keys()
    assert all(torch.equal(plain["model"][k], zero["model"][k]) for k in plain["model"])
    kept = [
        json.loads((done / "out/results/tiny/nano" / f"{name}-s0/run.json").read_text())
        for name in ("none", "zero", "own")
    ]
    assert kept[0]["weights"] == kept[1]["weights"] != kept[2]["weights"]
    assert all(torch.equal(plain["run"]["ema"]["module"][k], v) for k, v in zero["run"]["ema"]["module"].items())


def test_the_teachers_of_the_sanity_runs(done: Path, toy_run: Path) -> None:
    out = done / "out"
    digests = {}
    for name in ("own", "random"):
        about = json.loads((out / "nano" / f"{name}-s0" / "environment.json").read_text())
        digests[name] = about["kd"]["teachers"][0]
    assert digests["own"]["source"] == str(out / "nano" / "none-s0" / "best.pt")
    assert digests["random"]["source"] == str(out / "untrained-teacher.pt")
    random, trained = (torch.load(p, weights_only=True) for p in (out / "untrained-teacher.pt", toy_run / "best.pt"))
    assert random["names"] == trained["names"]
    same = [torch.equal(v, random["model"][k]) for k, v in trained["model"].items() if v.ndim == 4]
    assert same
    assert not any(same)


def test_what_is_done_is_not_done_again(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in the same place, nor from kept results where the runs themselves are gone, nor from a bare summary."""
    study = read_study(str(done / "study.yaml"))
    results = done / "out" / "results"
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(results / "summary.csv", bare)
    for out, kept in ((done / "out", results), (tmp_path / "elsewhere", results), (tmp_path / "elsewhere", bare)):
        assert Runner(study, plan(study, out), out, kept).missing() == []
    assert run(["study", str(done / "study.yaml"), "--out", str(tmp_path / "elsewhere"), "--results", str(bare)]) == 0
    assert "0 of them to do" in capsys.readouterr().out
    assert "[0](summary.csv)" in (bare / "tiny.md").read_text()
    # a run that learns from another one needs it on disk
    shutil.rmtree(shutil.copytree(results, tmp_path / "some") / "tiny" / "nano" / "own-s0")
    (tmp_path / "some" / "summary.csv").unlink()
    missing = Runner(study, plan(study, tmp_path / "new"), tmp_path / "new", tmp_path / "some").missing()
    assert [r.key.path for r in missing] == ["nano/none-s0", "nano/own-s0"]


def test_what_is_finished_can_be_collected(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", str(done / "study.yaml"), "--out", str(done / "out"), "--results", str(tmp_path), "--collect"]
    assert run(words) == 0
    assert "own" in capsys.readouterr().out
    for name in ("tiny.md", "summary.csv", "tiny/nano/own-s0/run.json", "tiny/teacher/run.json"):
        assert (tmp_path / name).read_text() == (done / "out" / "results" / name).read_text()


def test_a_grid_alone_and_the_rows_of_others_stay(done: Path, tmp_path: Path, tiny: dict[str, Any]) -> None:
    tiny["grids"] = {"first": {"seeds": [0]}, "second": {"seeds": [0, 1]}}
    study = read_study(write(tmp_path, tiny))
    runs = plan(study, tmp_path)
    missing = Runner(study, runs, tmp_path, tmp_path, grids=["first"]).missing()
    assert [r.key.path for r in missing] == ["teacher", "nano/none-s0", "nano/pgd-s0"]
    with pytest.raises(UserError, match=r"no grid 'secnd'; did you mean 'second'"):
        check_grids(study, ["secnd"])
    before = shutil.copy(done / "out" / "results" / "summary.csv", tmp_path)
    records = valid_records(
        read_study(str(done / "study.yaml")), plan(read_study(str(done / "study.yaml")), done), tmp_path
    )
    text = Path(before).read_text()
    one = {key: record for key, record in records.items() if key.method == "own"}
    for name, count in (("tiny", 6), ("other", 7)):
        write_summary(tmp_path, name, one)
        assert len(Path(before).read_text().splitlines()) == count
    assert set(text.splitlines()) <= set(Path(before).read_text().splitlines())


def test_results_made_with_other_settings_are_refused(done: Path) -> None:
    study = read_study(str(done / "study.yaml"))
    study.settings["optim.lr_per_image"] = 0.5
    with pytest.raises(
        UserError, match=r"nano/none-s0 .* other settings \(optim.lr_per_image 0.00015625 instead of 0.5\)"
    ):
        Runner(study, plan(study, done / "out"), done / "out", done / "out" / "results")
    fresh = Runner(study, plan(study, done / "out"), done / "out", done / "nowhere")
    with pytest.raises(UserError, match="was begun with other settings"):
        fresh.run()


def test_two_studies_do_not_share_a_folder(done: Path) -> None:
    with (
        lock_folder(done / "out"),
        pytest.raises(UserError, match="another study is at work"),
        lock_folder(done / "out"),
    ):
        pass


def test_a_failed_run_is_named_and_the_others_go_on(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny["methods"]["bad"] = {"kd": "pgd", "teacher": "no-such.pt"}
    tiny["methods"] = {k: tiny["methods"][k] for k in ("bad", "none")}
    file = write(tmp_path, tiny)
    assert run(["study", file, "--out", str(tmp_path / "out")]) == 3
    output = capsys.readouterr()
    assert "1 of 2 runs failed: nano/bad-s0: training ended with status 2 (yoloxkd: no file" in output.err
    assert "nano/none-s0: AP" in output.out
    assert "0/1" in output.out


def test_an_interrupted_study_goes_on_within_the_run(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny |= {"epochs": 60, "methods": {"none": None}}
    file = write(tmp_path, tiny)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "yoloxkd", "study", file, "--out", str(out)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = out / "nano" / "none-s0"
    for _ in range(600):
        if (folder / "last.pt").is_file():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopped by SIGTERM; the same command goes on where it stopped" in said
    assert not (folder / "metrics.json").exists()
    at = torch.load(folder / "last.pt", weights_only=True)["run"]
    assert 0 < at["iteration"] < 60 * 6
    study = read_study(file)
    runner = Runner(study, plan(study, out), out, out / "results")
    [todo] = runner.missing()
    assert runner._training(todo)[-2:] == ["--resume", str(folder)]
    cost = json.loads((folder / "cost.json").read_text())
    assert cost["parts"] == 1
    assert cost["cpu"] > 0


def test_dry_run_says_what_is_to_do(tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", write(tmp_path, tiny), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert capsys.readouterr().out.split("\n")[:3] == ["to do teacher", "to do nano/none-s0", "to do nano/pgd-s0"]
    assert not (tmp_path / "out").exists()
    assert Key("nano", "none", 0).path == "nano/none-s0"
