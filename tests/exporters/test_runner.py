"""Programs around engines built elsewhere: compared with the model by what they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.scenes import scene
from tests.exporters.conftest import CONF, MAX_DET, SIZE
from tests.exporters.test_predict_script import SCRIPT
from tests.exporters.tiny import TinyDetector
from tests.nn.contract import NAMES
from tests.nn.solo.test_solo import eager, narrow_solo
from tests.nn.two_stage.contract import narrow_two_stage
from yoloxkd.cli import run
from yoloxkd.data.augment.transforms import letterbox
from yoloxkd.data.dataset import DetectionData
from yoloxkd.errors import GateError, UserError
from yoloxkd.exporters.matching import Suppression
from yoloxkd.exporters.parity import Reference
from yoloxkd.exporters.parity_report import ParityReport
from yoloxkd.exporters.runner import check_runner, refuse_difference
from yoloxkd.instance_masks import rle_dict
from yoloxkd.nn.solo.solo import SOLO
from yoloxkd.nn.two_stage.mask_rcnn import MaskRCNN
from yoloxkd.types import ImageMeta

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
    detector: TinyDetector, nms_file: Path, data: DetectionData, tmp_path: Path
) -> None:
    report = checked(detector, predict_script(nms_file), data, "int8")
    assert report.tolerance.score == 0.3
    assert report.model_ap == pytest.approx(report.file_ap)
    others = replace(data, names=["cat", "dog"])
    with pytest.raises(UserError, match=r"hold no object of the model's classes; give --data DATA that does"):
        checked(detector, printing(ONE % "", tmp_path), others, "int8")


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


@pytest.mark.parametrize("kind", [SOLO, MaskRCNN])
def test_masks_are_compared(kind: type[Any], data: DetectionData, tmp_path: Path) -> None:
    """What the model itself detects passes, with its masks; other masks do not, and none are said to be none."""
    torch.manual_seed(0)
    model = eager(narrow_solo(SOLO, NAMES)) if kind is SOLO else narrow_two_stage(kind, NAMES).eval()
    if isinstance(model, MaskRCNN):
        torch.nn.init.normal_(model.get_parameter("roi_head.mask_head.0.conv_logits.weight"), std=50)
    settings = Suppression(1e-4, 0.65, MAX_DET, model.spec.pairs_per_level)
    of_images = []
    for i in range(len(data)):
        pixels, scale, _, _ = letterbox(data.read(i), (96, 96), model.spec.input.pad_value)
        reference = Reference(model)
        reference(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]))
        found = reference.detections(settings)[0].to_image(ImageMeta(i, "", 90, 120, scale))
        assert found.masks is not None
        of_images.append(
            [
                {"box": b.tolist(), "score": float(s), "label": int(k), "mask": rle_dict(m)}
                for b, s, k, m in zip(found.boxes, found.scores, found.labels, found.masks, strict=True)
            ]
        )
    assert sum(map(len, of_images)) > 10

    def report(change: Callable[[dict[str, Any]], dict[str, Any]]) -> ParityReport:
        rows = [[change(row) for row in rows] for rows in of_images]
        program = tmp_path / "rows.py"
        program.write_text(
            "import json, sys\n"
            f"rows = json.loads({json.dumps(rows)!r})\n"
            "print(json.dumps([{'image': f, 'detections': d} for f, d in zip(sys.argv[1:], rows)]))\n"
        )
        command = f"{sys.executable} {program}"
        return check_runner(model, command, data, imgsz=96, precision="fp32", settings=settings)

    same = report(lambda row: row)
    refuse_difference(same, "it")
    assert same.found.min_mask_iou is not None
    assert same.found.min_mask_iou > 0.999
    assert not same.masks_left_out
    empty = rle_dict(np.zeros((90, 120), bool))
    with pytest.raises(GateError, match="no counterpart"):
        refuse_difference(report(lambda row: row | {"mask": empty}), "it")
    without = report(lambda row: {k: v for k, v in row.items() if k != "mask"})
    refuse_difference(without, "it")
    assert "masks were not compared: none was printed" in without.table()
    with pytest.raises(UserError, match=r"a mask that is not one of the image's 90x120 px: it is of 9x9 px"):
        report(lambda row: row | {"mask": {"size": [9, 9], "counts": [81]}})
