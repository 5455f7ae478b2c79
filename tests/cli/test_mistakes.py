"""What a user can do wrong: one sentence that names the fault and the remedy, its exit status, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, write_toy
from yoloxkd.cli import run

FAST = [f"--set={key}={value}" for key, value in TINY.items()]
QUICK = ["--epochs", "1", "--batch", "4", "--imgsz", "64", "--device", "cpu"]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str, status: int = 2) -> str:
    """Run, expect the status and one sentence with all the words on stderr, and return it."""
    assert run([str(a) for a in arguments]) == status
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1, text
    assert "Traceback" not in text
    for word in words:
        assert word in text, text
    return text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--student", "yolox-nanno"], ["yolox-nanno", "did you mean 'yolox-nano'"]),
        (["train"], ["--student"]),
        (["train", "--student", "yolox-nano", "--kd", "pgdd"], ["unknown distiller 'pgdd'", "did you mean 'pgd'"]),
        (["train", "--student", "yolox-nano", "--kd", "pgd"], ["--kd pgd needs a teacher"]),
        (["train", "--student", "yolox-nano", "--kd", "none", "--kd", "pgd"], ["cannot be combined"]),
        (
            ["train", "--student", "yolox-nano", "--set", "train.epocs=3"],
            ["train.epocs", "did you mean 'train.epochs'"],
        ),
        (["train", "--student", "yolox-nano", "--set", "student.widht=1"], ["student.widht", "student.width"]),
        (["train", "--student", "yolox-nano", "--set", "agument.mosaic=1"], ["'agument'", "did you mean 'augment'?"]),
        (["train", "--student", "yolox-nano", "--set", "kd.alpha=1"], ["kd.alpha", "no distiller is chosen"]),
        (["train", "--student", "yolox-nano", "--set", "kd"], ["--set takes key=value"]),
        (["train", "--student", "yolox-nano", "--epochs", "none"], ["--epochs", "integer"]),
        (["train", "--student", "yolox-nano", "--epcohs", "3"], ["--epcohs", "--epochs"]),
        (["train", "--student", "yolox-nano", "--data", "shaeps"], ["shaeps", "shapes"]),
        (["train", "--student", "yolox-nano", "--data", "absent.yaml"], ["absent.yaml"]),
        (["train", "--student", "yolox-nano", "--recipe", "yolox-q"], ["no recipe 'yolox-q'"]),
        (["train", "--student", "yolox-nano", "--data", "shapes", "--imgsz", "100"], ["100", "multiple", "96"]),
        (["train", "--resume", "nowhere"], ["nothing to resume at nowhere"]),
        (["train", "--resume", "nowhere", "--epochs", "3"], ["leave out --epochs"]),
        (["val", "yolox-nanno", "--data", "shapes"], ["yolox-nanno", "did you mean 'yolox-nano'"]),
        (["val", "absent.pt", "--data", "shapes"], ["no file absent.pt"]),
        (["predict", "yolox-nano"], ["nothing to predict on"]),
        (["export", "x.pt", "--format", "onxx"], ["onxx", "onnx"]),
        (["show", "yolox-nanoo"], ["yolox-nanoo", "yolox-nano"]),
        (["tarin"], ["tarin", "'train'"]),
        (["train", "--student", "yolox-nano", "--amp", "bf61"], ["'bf61'", "did you mean 'bf16'?"]),
        (["train", "--student", "yolox-nano", "--set", "optim.kind=adma"], ["'adma'", "did you mean 'adam'?"]),
        (["train", "--student", "yolox-nano", "--device", "cdua"], ["'cdua'", "did you mean 'cuda'?"]),
        (["train", "--student", "yolox-nano", "--device", "mps"], ["'mps'", "known: 0, auto, cpu, cuda"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_names_and_options(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, arguments, *words)
    assert list(tmp_path.iterdir()) == []


def test_without_a_run_the_newest_one_is_missed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["export", "--format", "onnx"], "no MODEL given", "runs/")


def test_an_unknown_split_and_a_missing_key(capsys: pytest.CaptureFixture[str], tmp_path: Path, toy_run: Path) -> None:
    yaml = write_toy(tmp_path / "d")
    refused(capsys, ["val", toy_run / "best.pt", "--data", yaml, "--split", "tset"], "tset", "did you mean 'test'?")
    yaml.write_text(yaml.read_text().replace("names: [red, blue]\n", ""))
    refused(capsys, ["train", "--student", "yolox-nano", "--data", yaml], "names", str(yaml))


def _train(yaml: Path, out: Path) -> list[str | Path]:
    return ["train", "--student", "yolox-nano", "--data", yaml, "--out", out, *QUICK, *FAST]


@pytest.mark.parametrize("fault", ["missing", "empty", "cut"])
def test_broken_images(fault: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    yaml = write_toy(tmp_path / "d")
    image = tmp_path / "d" / "images" / "train" / "3.png"
    content = image.read_bytes()
    image.unlink()
    if fault != "missing":
        image.write_bytes(b"" if fault == "empty" else content[: len(content) // 2])
    refused(capsys, _train(yaml, tmp_path / "run"), "3.png")
    assert not (tmp_path / "run").exists()


def test_annotations_that_are_not_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    yaml = write_toy(tmp_path / "d")
    (tmp_path / "d" / "annotations" / "train.json").write_text("{not json")
    refused(capsys, _train(yaml, tmp_path / "run"), "train.json", "JSON")
    assert not (tmp_path / "run").exists()


def test_bad_boxes_are_counted_and_dropped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    yaml = write_toy(tmp_path / "d")
    file = tmp_path / "d" / "annotations" / "train.json"
    value = json.loads(file.read_text())
    good = len(value["annotations"])
    for i, box in enumerate([[1, 1, 0, 5], [1, 1, -3, 5], [500, 500, 9, 9], [1, float("nan"), 5, 5]]):
        value["annotations"].append(
            {"id": 900 + i, "image_id": 1, "category_id": 3, "bbox": box, "area": 1, "iscrowd": 0}
        )
    value["annotations"].append(
        {"id": 990, "image_id": 1, "category_id": 44, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    )
    file.write_text(json.dumps(value))
    assert run([str(a) for a in _train(yaml, tmp_path / "run")]) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"{good} boxes" in log
    for fault in ("1 dropped, of an unknown category", "1 dropped, whose box is not four finite numbers"):
        assert fault in log
    for fault in ("2 dropped, of zero or negative size", "1 dropped, outside the image"):
        assert fault in log


def test_out_that_holds_a_run(capsys: pytest.CaptureFixture[str], toy: Path, toy_run: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in toy_run.iterdir()}
    refused(capsys, _train(toy, toy_run), str(toy_run), "finished run", "--out")
    refused(capsys, ["train", "--resume", toy_run], "finished run", "nothing to resume")
    assert {p.name: p.stat().st_mtime_ns for p in toy_run.iterdir()} == before


def test_checkpoints_that_are_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, toy: Path, toy_run: Path
) -> None:
    for name, content in (("empty.pt", b""), ("text.pt", b"hello, I am a text file"), ("half.pt", None)):
        file = tmp_path / name
        whole = (toy_run / "best.pt").read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content is None else content)
        refused(capsys, ["val", file, "--data", toy], name)
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(3)}, other)
    refused(capsys, ["val", other, "--data", toy], "other.pt", "not a checkpoint")


def test_weights_of_another_architecture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, toy: Path, toy_run: Path
) -> None:
    arguments = ["train", "--student", "yolox-nano", "--data", toy, "--out", tmp_path / "run", *QUICK, *FAST]
    arguments += ["--set=student.width=0.25", f"--set=student.weights={toy_run / 'best.pt'}"]
    text = refused(capsys, arguments, "best.pt")
    assert "backbone" in text  # the first keys that disagree
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLOXKD_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there: the machine is offline
    out = tmp_path / "run"
    text = refused(capsys, [*_train(toy, out), "--teacher", "yolox-s", "--kd", "pgd"], "yolox_s.pth")
    assert str(tmp_path / "cache") in text
    assert not out.exists()


def test_a_teacher_that_knows_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, toy: Path, toy_run: Path
) -> None:
    raw = torch.load(toy_run / "best.pt", weights_only=True)
    raw["model"] = {k: torch.zeros_like(v) for k, v in raw["model"].items()}
    torch.save(raw, tmp_path / "random.pt")
    arguments = [*_train(toy, tmp_path / "run"), "--teacher", tmp_path / "random.pt", "--kd", "pgd"]
    refused(capsys, [*arguments, "--set=teacher.min_ap=0.05"], "teacher.min_ap", status=3)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, toy: Path, toy_run: Path) -> None:
    """A file size limit stands in for the full disk: the write fails in the middle, as there."""
    out = tmp_path / "run"
    script = f"""
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from yoloxkd.engine.checkpoint import save_checkpoint
from yoloxkd.errors import UserError
import torch
path = Path({str(out)!r}) / "last.pt"
save_checkpoint({{"x": torch.ones(10)}}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save_checkpoint({{"x": torch.ones(1_000_000)}}, path)
except UserError as error:
    print(error)
    sys.exit(2)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "previous checkpoint is intact" in done.stdout
    assert [p.name for p in out.iterdir()] == ["last.pt"]
    assert torch.load(out / "last.pt", weights_only=True)["x"].shape == (10,)


def test_help_and_mistakes_answer_at_once() -> None:
    """No import of torch for them: far below the two seconds it takes (generous bound for a loaded machine)."""
    for arguments, status in ((["--help"], 0), (["train", "--help"], 0), (["train", "--epcohs", "3"], 2)):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "yoloxkd", *arguments], capture_output=True, text=True
        )
        assert done.returncode == status
        assert time.perf_counter() - started < 5
        modules = {
            line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")
        }
        assert not modules & {"torch", "cv2", "numpy"}, arguments


def test_predict_needs_a_image(capsys: pytest.CaptureFixture[str], tmp_path: Path, toy_run: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(
        capsys, ["predict", toy_run / "best.pt", tmp_path / "empty", "--out", tmp_path / "o"], "no image or video at"
    )
    shutil.rmtree(tmp_path / "empty")
    refused(
        capsys,
        ["predict", toy_run / "best.pt", tmp_path / "nothing-*.jpg", "--out", tmp_path / "o"],
        "no image or video at",
    )
    assert not (tmp_path / "o").exists()


def test_predict_says_what_is_wrong_with_a_source(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("deep/er").mkdir(parents=True)
    for source, words in (
        ("photos\\a.jpg", "write '/'"),
        ("my%20photo.jpg", "write the characters themselves"),
        ("https://example.org/a.jpg", "which is a URL: download it first"),
        ("deep", "folders in it are not looked into"),
        ("a.jpg", "a.jpg: it is missing"),
    ):
        refused(capsys, ["predict", tiny_file, source], "no image or video at", words)
    refused(
        capsys, ["predict", "yolox-nanno", "deep"], "'yolox-nanno' is neither a model", "did you mean 'yolox-nano'?"
    )
