"""`yoloxkd kd-check`: what it prints and writes, its exit status, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.test_mistakes import FAST, refused
from tests.conftest import write_toy
from yoloxkd.api.kd_check import kd_check
from yoloxkd.cli import run
from yoloxkd.cli.launch import devices_of
from yoloxkd.engine.device import SeveralDevices
from yoloxkd.errors import GateError, UserError


@pytest.fixture
def arguments(toy: Path, toy_run: Path) -> list[str]:
    pair = ["--student", "yolox-nano", "--teacher", str(toy_run / "best.pt"), "--kd", "pgd", "--data", str(toy)]
    keys = [*FAST, "--set=student.depthwise=false", "--set=teacher.min_ap=0.001"]  # the student is the teacher's twin
    return ["kd-check", *pair, *keys, "--imgsz", "64", "--batch", "8", "--device", "cpu"]


def test_it_measures_says_and_writes(
    arguments: list[str],
    toy_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--batches", "1", "--checkpoint", str(toy_run / "best.pt"), "--json", "check.json"]
    assert run([*arguments, *more]) == 3  # the checkpoint is the teacher itself, so it is no better
    captured = capsys.readouterr()
    assert "the best teacher has" in captured.err
    assert captured.err.startswith("yoloxkd: Distilling as set would do harm")
    for text in ("cls stride 8", "pgd/all/s8", "pgd/cls_fg", "gradient / task's", "objects by size", "on 1%"):
        assert text in captured.out, text
    assert list(tmp_path.iterdir()) == [tmp_path / "check.json"]
    saved = json.loads((tmp_path / "check.json").read_text())
    assert str(toy_run) not in (tmp_path / "check.json").read_text()
    assert saved["harm"] is True
    assert saved["student_ap"] == pytest.approx(next(iter(saved["teachers"].values())))
    start, trained = saved["students"]
    losses = start["losses"]
    assert losses["pgd/all"]["gradient_share"] > 0
    assert losses["task"]["loss_share"] + losses["pgd/all"]["loss_share"] == pytest.approx(1.0)
    assert trained["losses"]["task"]["loss"] < losses["task"]["loss"]
    # with the teacher's weights nothing is left to pay but the floor, before the factors
    floor, paid = sum(saved["floor"].values()), trained["losses"]["pgd/all"]["loss"]
    assert paid / trained["factors"]["pgd"] == pytest.approx(floor, rel=1e-3)


@pytest.mark.slow
def test_python_gets_the_numbers_and_a_weight_that_drowns_the_labels_is_harm(toy: Path, toy_run: Path) -> None:
    keys: dict[str, Any] = dict(pair.removeprefix("--set=").split("=", 1) for pair in FAST) | {"kd.weight": 100}
    settings = [f"{key}={value}" for key, value in keys.items()]
    teacher = str(toy_run / "best.pt")
    check = kd_check("yolox-nano", teacher, "fgd", str(toy), batches=1, batch=4, imgsz=64, device="cpu", set=settings)
    assert check.harm
    assert "drowns the labels" in check.verdict
    assert "--set kd.weight=" in check.verdict
    assert check.teachers == {teacher: None}  # teacher.min_ap is 0
    factor = float(check.findings[0].setting.partition("=")[2])
    better = [f"kd.weight={factor}" if text.startswith("kd.weight") else text for text in settings]
    again = kd_check("yolox-nano", teacher, "fgd", str(toy), batches=1, batch=4, imgsz=64, device="cpu", set=better)
    assert not again.harm
    assert not any("drowns" in finding.what for finding in again.findings)


def foreign(toy_run: Path, folder: Path, names: list[str]) -> str:
    raw = torch.load(toy_run / "best.pt", weights_only=True)
    torch.save(raw | {"names": names}, folder / "foreign.pt")
    return str(folder / "foreign.pt")


def test_what_cannot_be_checked_is_refused_in_a_sentence(
    arguments: list[str], toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ship = foreign(toy_run, tmp_path, ["ship", "sail"])
    refused(capsys, [*arguments, "--batches", "0"], "--batches")
    refused(capsys, [*arguments, "--device", "0,1"], "--device 0,1: kd-check runs on one device")
    refused(capsys, [*arguments, "--set", "kd.tau=-1"], "kd.tau")
    other = [*arguments, "--set", "student.depthwise=true", "--batches", "1", "--checkpoint", str(toy_run / "best.pt")]
    refused(capsys, other, "is not of this student")
    refused(
        capsys, ["kd-check", "--student", "yolox-nano", "--data", "shapes"], "no distillation to check", "--teacher"
    )
    known = [a if a != str(toy_run / "best.pt") else ship for a in arguments]
    refused(capsys, known, "knows none of the classes red, blue", "teacher.min_ap=0")
    changed = [a if a != "pgd" else "ld" for a in arguments]
    refused(capsys, changed, "--kd ld distils distributions of box sides")
    refused(capsys, [a if a != "pgd" else "lad" for a in arguments], "lad gives labels and has no loss")
    refused(capsys, [*arguments, "--set", "teacher.min_ap=0.999"], "below teacher.min_ap 0.999", status=3)
    with pytest.raises(UserError, match="batches should be an integer"):
        kd_check("yolox-nano", ship, batches=1.5)  # type: ignore[arg-type]


def test_images_without_boxes_are_refused(toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_toy(tmp_path / "toy", images=4)
    file = tmp_path / "toy" / "annotations" / "train.json"
    truth = json.loads(file.read_text())
    file.write_text(json.dumps(truth | {"annotations": []}))
    pair = ["--student", "yolox-nano", "--teacher", str(toy_run / "best.pt"), "--data", str(data), "--imgsz", "64"]
    refused(capsys, ["kd-check", *pair, *FAST, "--device", "cpu"], "no object is left to train on")


def test_a_teacher_that_needs_another_size_is_told(toy: Path, toy_run: Path) -> None:
    """At an eighth of the size it sees nothing; the sentence names the scale that helps, if one does."""
    keys = [text.removeprefix("--set=") for text in FAST if "min_ap" not in text]
    with pytest.raises(GateError, match=r"below teacher\.min_ap.*--set teacher\.scale=1"):
        kd_check(
            "yolox-nano", str(toy_run / "best.pt"), "pgd", str(toy), batch=4, imgsz=64, device="cpu",
            set=[*keys, "teacher.scale=0.25", "teacher.min_ap=0.05"],
        )  # fmt: skip


def test_a_launched_process_launches_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    several = SeveralDevices(["0", "1"])
    for rank, world in ((None, None), ("0", "1")):  # of a scheduler that says so of a single process, too
        for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert devices_of(several) == ["0", "1"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert devices_of(several) == []
    assert devices_of(UserError("another")) == []
