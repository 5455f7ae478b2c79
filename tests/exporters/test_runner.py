"""Programs around engines built elsewhere: compared with the model by what they print."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.engine.scenes import scene
from tests.exporters.conftest import CONF, MAX_DET, SIZE
from tests.exporters.test_predict_script import SCRIPT
from tests.exporters.tiny import TinyDetector
from yoloxkd.cli import run
from yoloxkd.data.dataset import DetectionData
from yoloxkd.errors import GateError, UserError
from yoloxkd.exporters.matching import Suppression
from yoloxkd.exporters.parity_report import ParityReport
from yoloxkd.exporters.runner import check_runner, refuse_difference

ONE = '{"image": FILE, "detections": [%s]}'
ROW = '{"box": [1, 2, 3, 4], "score": 0.5, "label": %s}'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionData:
    return scene(tmp_path_factory.mktemp("scene"), images=3, size=(90, 120))


def checked(
    detector: TinyDetector, command: str, data: DetectionData, precision: str = "fp32", conf: float = CONF
) -> ParityReport:
    settings = Suppression(conf, 0.65, MAX_DET)
    return check_runner(detector, command, data, imgsz=SIZE, precision=precision, settings=settings)


def predict_script(file: Path, conf: float = CONF) -> str:
    return f"{sys.executable} {SCRIPT} {file} --conf {conf}"


def printing(text: str, folder: Path) -> str:
    """A runner that prints the text for each image given, with its name for FILE."""
    program = folder / "runner.py"
    program.write_text(
        f"import json, sys\nprint('[' + ', '.join({text!r}.replace('FILE', json.dumps(f)) for f in sys.argv[1:]) + ']')\n"
    )
    return f"{sys.executable} {program}"


def test_the_one_file_predictor_passes(detector: TinyDetector, nms_file: Path, data: DetectionData) -> None:
    report = checked(detector, predict_script(nms_file), data)
    refuse_difference(report, "it")
    assert report.images == 3
    assert report.found.detections > 10
    assert report.found.max_score_difference < 1e-5


def test_a_runner_of_other_weights_or_another_threshold_fails(
    detector: TinyDetector, nms_file: Path, data: DetectionData
) -> None:
    other = TinyDetector(detector.names, seed=5).eval()
    with pytest.raises(GateError, match=r"does not detect what the model detects: .* no counterpart"):
        refuse_difference(checked(other, predict_script(nms_file), data), "it")
    with pytest.raises(GateError, match="no counterpart"):
        refuse_difference(checked(detector, predict_script(nms_file, 0.9), data), "it")


def test_the_tolerance_of_int8_is_that_of_int8_files(
    detector: TinyDetector, nms_file: Path, data: DetectionData
) -> None:
    report = checked(detector, predict_script(nms_file), data, "int8")
    assert report.tolerance.score == 0.3
    assert (report.model_ap is None) == (report.file_ap is None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no JSON", "should print JSON as export/predict.py does.* it begins '\\[no JSON"),
        ('{"image": FILE}', "0.detections: Field required"),
        (ONE % '{"box": [1, 2, 3], "score": 0.5, "label": 0}', "detections.0.box: List should have at least 4"),
        (ONE % '{"box": [1, 2, 3, NaN], "score": 0.5, "label": 0}', "detections.0.box.3: .*finite"),
        (ONE % (ROW % 7), "printed label 7, and the model has 3 classes"),
        (ONE % (ROW % '0, "name": "cat"'), "printed label 0 cat, and the model has label 0 red"),
        ('{"image": "x.png", "detections": []}', "printed 3 images that are not the 3 given"),
    ],
)
def test_what_is_printed_wrongly_is_named(
    text: str, words: str, detector: TinyDetector, data: DetectionData, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        checked(detector, printing(text, tmp_path), data)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "--runner is empty"),
        ("'unclosed", "No closing quotation"),
        ("no-such-program --conf 1", "no-such-program cannot be started: No such file"),
        (f"{sys.executable} -c 'raise SystemExit(\"no engine\")'", "ended with exit status 1: no engine"),
    ],
)
def test_a_command_that_does_not_run_is_named(
    command: str, words: str, detector: TinyDetector, data: DetectionData
) -> None:
    with pytest.raises(UserError, match=words):
        checked(detector, command, data)


def test_the_command_line(toy: Path, toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(toy_run / "best.pt"), "--data", str(toy), "--conf", "0.01", "--runner"]
    assert run([*arguments, printing(ONE % "", tmp_path)]) == 3
    assert "does not detect what the model detects" in capsys.readouterr().err
    assert run([*arguments, "x", "--precision", "fp64"]) == 2
    assert "unknown precision 'fp64'; known: fp32, fp16, int8" in capsys.readouterr().err


@pytest.mark.slow
def test_a_raw_file_in_the_one_file_predictor(
    toy: Path, toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, file = str(toy_run / "best.pt"), tmp_path / "raw.onnx"
    assert run(["export", best, "--outputs", "raw", "--output", str(file), "--verify", str(toy)]) == 0
    for command in (["val", str(file), "--data", str(toy)], ["val", best, "--data", str(toy)]):
        assert run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    measured = [line for line in lines if line.startswith("AP ")]
    assert len(measured) == 2
    assert measured[0] == measured[1]
    runner = predict_script(file, 0.25)
    assert run(["verify", best, "--data", str(toy), "--runner", runner]) == 0
    assert "without a counterpart" in capsys.readouterr().out
