"""No command writes over what it reads, over a file it has not written, or starts work that it cannot write down."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import put_image
from tests.cli.test_mistakes import refused
from tests.conftest import write_toy
from yoloxkd import Trainer
from yoloxkd.cli import run
from yoloxkd.data.convert import convert_data
from yoloxkd.data.data_spec import find_data
from yoloxkd.engine.checkpoint import save_checkpoint
from yoloxkd.errors import UserError
from yoloxkd.exporters.target import export_target
from yoloxkd.nn.dense.yolox import YOLOX


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small data set in `ds/` and a checkpoint, best.pt."""
    monkeypatch.chdir(tmp_path)
    write_toy(tmp_path / "ds", images=2)
    section = {"name": "yolox-nano", "width": 0.125, "depth": 0.33, "depthwise": True, "family": "yolox"}
    names = ["red", "blue"]
    model = YOLOX(YOLOX.Config(depth=0.33, width=0.125, depthwise=True), names).state_dict()
    save_checkpoint(
        {"kind": "student", "student": section, "names": names, "imgsz": 64, "model": model}, Path("best.pt")
    )
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_command_looks_before_it_works(here: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(tiny_file, "tiny.onnx")
    Path("link.json").symlink_to("best.pt")
    Path("run").mkdir()
    for name in ("metrics.json", "recipe.yaml", "best.pt"):
        Path("run", name).write_text('{\n  "AP": 0.5\n}')
    Path("notes.json").write_text('{"mine": 1}')
    Path("rec").mkdir()
    Path("rec/recipe.yaml").write_text("student: {name: yolox-nano}\ndata: ds/data.yaml\n")
    Path("stats").mkdir()
    put_image(Path("stats/chart.png"))
    before = contents(here)
    train = ["train", "--student", "yolox-nano", "--data", "ds/data.yaml"]
    for arguments, words in (
        (
            ["val", "best.pt", "--data", "ds/data.yaml", "--json", "best.pt"],
            ["best.pt is a file that this command reads"],
        ),
        (["val", "best.pt", "--data", "ds/data.yaml", "--json", "link.json"], ["link.json", "(best.pt)"]),
        (["val", "best.pt", "--data", "ds/data.yaml", "--json", "ds/data.yaml"], ["ds/data.yaml is a file that this"]),
        (
            ["val", "best.pt", "--data", "ds/data.yaml", "--json", "ds/annotations/val.json"],
            ["val.json is there already"],
        ),
        (["val", "best.pt", "--data", "ds/data.yaml", "--out", "run"], ["metrics.json is a record of the run in"]),
        (["val", "best.pt", "--data", "ds/data.yaml", "--out", "best.pt"], ["could not write best.pt/metrics.json"]),
        (["bench", "tiny.onnx", "--json", "tiny.onnx"], ["tiny.onnx is a file that this command reads"]),
        (["bench", "tiny.onnx", "--json", "notes.json"], ["notes.json is there already"]),
        (["bench", "tiny.onnx", "./tiny.onnx"], ["tiny.onnx is given twice"]),
        (
            ["data", "check", "ds/data.yaml", "--json", "ds/data.yaml"],
            ["ds/data.yaml is a file that this command reads"],
        ),
        (["data", "check", "ds/data.yaml", "--json", "best.pt"], ["best.pt is there already"]),
        (["data", "stats", "ds/data.yaml", "--out", "stats"], ["stats/chart.png is there already"]),
        (["data", "stats", "ds/data.yaml", "--out", "x", "--json", "x/stats.json"], ["are the same file"]),
        (["data", "stats", "ds/data.yaml", "--out", "notes.json"], ["could not write notes.json/samples-train.png"]),
        (["data", "convert", "ds/data.yaml", "--to", "yolo", "--output", "ds"], ["ds is there already"]),
        (
            ["data", "convert", "ds/data.yaml", "--to", "yolo", "--output", "notes.json/x"],
            ["could not write notes.json/x"],
        ),
        ([*train, "--teacher", "best.pt", "--out", "."], ["--out best.pt is a file that this command reads"]),
        ([*train, "--out", "."], ["--out best.pt is there already"]),
        (["train", "--recipe", "rec/recipe.yaml", "--out", "rec"], ["--out rec/recipe.yaml is a file that this"]),
        (["export", "best.pt", "--output", "best.pt"], ["best.pt should be a file name that ends in .onnx"]),
        (["export", "best.pt", "--output", "notes.json/x.onnx"], ["could not write notes.json/x.onnx"]),
    ):
        refused(capsys, arguments, *words)
        assert contents(here) == before, arguments


def test_an_export_replaces_exports_only(here: Path, tiny_file: Path) -> None:
    weights = Path("best.pt")
    Path("link.onnx").symlink_to("best.pt")
    shutil.copy("best.pt", "copy.onnx")
    shutil.copy(tiny_file, "own.onnx")
    foreign = tiny_file.read_bytes().replace(b"size_multiple", b"other_key_13b")
    Path("foreign.onnx").write_bytes(foreign)
    for name, words in (
        ("link.onnx", "is a file that this command reads"),
        ("copy.onnx", "copy.onnx is there already"),
        ("best.pt", r"ends in \.onnx"),
        ("noted.onnx", "the parity report noted.parity.json is there already"),
    ):
        Path("noted.parity.json").write_text("the user's")
        with pytest.raises(UserError, match=words):
            export_target(name, "best.pt", weights)
    assert export_target("own.onnx", "best.pt", weights) == Path("own.onnx")
    assert export_target("NEW.ONNX", "best.pt", weights) == Path("NEW.ONNX")
    assert export_target("foreign.onnx", "best.pt", weights) == Path("foreign.onnx")
    assert export_target(None, "own.pt", weights) == Path("own.onnx")
    with pytest.raises(UserError, match=r"foreign\.onnx is there already"):
        export_target(None, "foreign.pt", weights)


@pytest.mark.parametrize("name", ["x.onnx", "x.ONNX", "exported"])
def test_an_exported_file_is_no_checkpoint(
    name: str, here: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tiny_file, name)
    words = [f"{name} is an exported ONNX file, and a checkpoint is needed here", "best.pt"]
    data = ["--data", "ds/data.yaml", "--out", "run"]
    refused(capsys, ["train", "--student", name, *data], *words)
    refused(capsys, ["train", "--resume", name], *words)
    refused(capsys, ["show", name], *words)
    taught = ["train", "--student", "yolox-nano", "--teacher", name, "--imgsz", "64", "--device", "cpu", *data]
    refused(capsys, taught, *words)
    refused(capsys, ["export", name], f"{name} is an exported file already")
    assert not Path("run").exists()


def test_what_is_given_twice_says_so(here: Path) -> None:
    Path("link.pt").symlink_to("best.pt")
    with pytest.raises(UserError, match="is given twice"):
        Trainer(student="yolox-nano", teacher=["best.pt", "link.pt"], data="ds/data.yaml", device="cpu", out="run")
    notes = Trainer(student="best.pt", teacher="link.pt", data="ds/data.yaml", device="cpu", out="run")._notes
    assert any("the student is compared with itself" in note for note in notes)
    assert Trainer(student="best.pt", data="ds/data.yaml", device="cpu", out="run")._notes == []


def test_a_folder_that_the_program_did_not_make_stays(here: Path) -> None:
    Path("new.part").mkdir()
    Path("new.part/mine.txt").write_text("mine")
    Path("new").mkdir()
    convert_data(find_data("ds/data.yaml"), "yolo", Path("new"))
    assert Path("new.part/mine.txt").read_text() == "mine"
    assert Path("new/data.yaml").is_file()
    with pytest.raises(UserError, match="is inside"):
        convert_data(find_data("new/data.yaml"), "coco", Path("new/images/train/sub/other"))
    with pytest.raises(UserError, match="unknown format"):
        convert_data(find_data("ds/data.yaml"), "yollo", Path("other"))
    assert not [path for path in here.iterdir() if path.name.endswith(".part") and path.name != "new.part"]
    assert run(["data", "stats", "new/data.yaml", "--out", "new/images/val"]) == 2


@pytest.mark.slow
def test_stats_replace_their_own(here: Path) -> None:
    for _ in range(2):
        assert run(["data", "stats", "ds/data.yaml", "--out", "stats", "--json", "s.json"]) == 0
    assert {path.name for path in Path("stats").iterdir()} >= {"chart.png", "stats.json", "samples-val.png"}
    assert run(["data", "stats", "ds/data.yaml"]) == 0  # most sets' files are called so
    assert Path("runs/data/ds/stats.json").is_file()


def test_a_run_ended_before_its_first_checkpoint_can_be_started_again(here: Path) -> None:
    options = {"student": "yolox-nano", "data": "ds/data.yaml", "device": "cpu", "out": "run"}
    Path("run").mkdir()
    for name in ("recipe.yaml", "environment.json", "train.log"):
        Path("run", name).write_text("left over\n")
    Trainer(**options)
    Path("run/environment.json").unlink()
    with pytest.raises(UserError, match=r"run/recipe\.yaml is there already"):
        Trainer(**options)


def test_a_run_replaces_no_image_of_the_user(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("curves.png", "predictions.png", "predictions-epoch-0001.png"):
        mine = Path(f"mine-{name}/plots/{name}")
        mine.parent.mkdir(parents=True)
        mine.write_bytes(b"an image of the user")
        arguments = ["train", "--student", "yolox-nano", "--data", "ds/data.yaml", "--out", mine.parent.parent]
        refused(capsys, arguments, f"--out {mine} is there already")
        assert mine.read_bytes() == b"an image of the user"
        for record in ("environment.json", "train.log"):  # what a run leaves that ended early
            (mine.parent.parent / record).write_text("{}")
        Trainer("yolox-nano", data="ds/data.yaml", out=mine.parent.parent)
