"""`yoloxkd explain`: one page, its numbers, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import write_toy
from yoloxkd.api import Detector
from yoloxkd.cli import run
from yoloxkd.data.data_spec import find_data, load_split


@pytest.fixture
def here(tmp_path: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a student and its teacher, who are the same."""
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "teacher"):
        (tmp_path / name).mkdir()
        shutil.copy(toy_run / "best.pt", tmp_path / name / "best.pt")
    return tmp_path


def call(*arguments: object) -> int:
    return run(["explain", *map(str, arguments), "--device", "cpu"])


@pytest.mark.slow
def test_a_page_with_every_figure(here: Path, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares = ["--mask-out", "--percent", "0,10,100"]
    assert (
        call("plain/best.pt", "--teacher", "teacher/best.pt", "--data", toy, "--out", "x", "--count", 1, *shares) == 0
    )
    page, found = Path("x/explain.html").read_text(), json.loads(Path("x/explain.json").read_text())
    for figure in (
        "FGD Figures 1 and 5",
        "PGD Figure 1",
        "PGD Figure 2",
        "PGD Figure 3",
        "PGD Figure 5",
        "distiller looks at",
    ):
        assert figure in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)  # nothing from elsewhere
    assert str(toy.parent) not in page + Path("x/explain.json").read_text()
    assert page.count("<img") == page.count("<figcaption><b>") > 20
    assert {row["spatial_l1"] for row in found["attention"]} == {0}
    assert min(row["spatial_rank"] for row in found["attention"]) == pytest.approx(1)
    ap = {(row["model"], row["percent"]): row["AP"] for row in found["mask-out"]}
    assert ap["plain", 0] == pytest.approx(Detector("plain/best.pt", "cpu").val(str(toy), workers=0)["AP"])
    assert ap["plain", 0] >= ap["plain", 10] >= ap["plain", 100]
    assert ap["plain", 0] > ap["plain", 100]
    assert "written: x/explain.html, x/explain.json" in capsys.readouterr().out
    assert (
        call("plain/best.pt", "--data", toy, "--out", "x", "--figure", "attention") == 0
    )  # its own files are replaced
    assert "FGD Figures" in Path("x/explain.html").read_text()
    assert "PGD Figure 1" not in Path("x/explain.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "images"), [(2, 3), (4, 4)])
def test_a_limit_holds_beside_chosen_images(limit: int, images: int, here: Path, toy: Path) -> None:
    """The images up to the last chosen one are looked at, or as many as the limit says."""
    name = Path(load_split(find_data(str(toy)), "val").paths[2]).name
    assert (
        call("plain/best.pt", "--data", toy, "--out", "x", "--figure", "detections", "--image", name, "--limit", limit)
        == 0
    )
    (row,) = json.loads(Path("x/explain.json").read_text())["detections"]
    assert row["images"] == images


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert call(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_drawn_is_said_in_one_sentence(
    here: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["plain/best.pt", "--data", toy, "--out", "y"]
    assert "150 % of an object's predictions" in refused(capsys, *plain, "--mask-out", "--percent", "0,150")
    assert "no list of numbers" in refused(capsys, *plain, "--mask-out", "--percent", "x")
    assert "--percent belongs to --mask-out" in refused(capsys, *plain, "--percent", "1")
    assert "unknown figure 'attenton'; did you mean 'attention'?" in refused(capsys, *plain, "--figure", "attenton")
    assert "give --teacher" in refused(capsys, *plain, "--figure", "weights")
    assert "needs a --teacher" in refused(capsys, *plain, "--kd", "fgd")
    assert "is given twice" in refused(capsys, "plain/best.pt", *plain)
    other = write_toy(tmp_path / "other")
    other.write_text(other.read_text().replace("[red, blue]", "[cat, dog]"))
    for file in (tmp_path / "other" / "annotations").iterdir():
        file.write_text(file.read_text().replace('"red"', '"cat"').replace('"blue"', '"dog"'))
    assert "have no class in common" in refused(capsys, "plain/best.pt", "--data", other, "--out", "y")
    assert not Path("y").exists()


def test_a_page_of_the_user_stays(here: Path, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/explain.html").write_text("<p>mine")
    assert "is not replaced" in refused(capsys, "plain/best.pt", "--data", toy, "--out", "mine")
    assert Path("mine/explain.html").read_text() == "<p>mine"
