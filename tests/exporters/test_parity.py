"""The gate: good files pass and get their name, wrong ones get none."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from tests.engine.scenes import scene
from tests.engine.test_evaluate import coco_val, official_nano
from tests.exporters.tiny import TinyDetector
from yoloxkd.data.loader import eval_loader
from yoloxkd.engine.evaluate import evaluate
from yoloxkd.errors import GateError, UserError
from yoloxkd.exporters import parity
from yoloxkd.exporters.onnx import ExportOptions
from yoloxkd.exporters.parity import _correlation, check_parity, export_checked, sample_images
from yoloxkd.exporters.parity_report import FP16, FP32, TOLERANCES, ParityReport
from yoloxkd.exporters.runtime import OnnxPredictor


def changed(path: Path, output: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """A copy of a file with one of its weights changed."""
    model = onnx.load(str(path))
    weight = next(i for i in model.graph.initializer if i.name.endswith(name))
    weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight).copy()), weight.name))
    onnx.save(model, str(output))
    return output


@pytest.mark.parametrize("file", ["nms_file", pytest.param("dynamic_file", marks=pytest.mark.slow), "raw_file"])
def test_a_good_file_passes(file: str, request: pytest.FixtureRequest, detector: TinyDetector, pixels: Tensor) -> None:
    report = check_parity(detector, request.getfixturevalue(file), pixels.split(2))
    assert report.faults() == []
    assert report.images == 5
    assert report.found.detections > 20
    assert report.found.max_score_difference < 1e-5
    assert report.locations == (400 if file == "raw_file" else 0)


@pytest.mark.parametrize("file", ["nms_file", "raw_file"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("head.bias", lambda w: w + np.eye(1, len(w), 4, dtype=np.float32)[0] * 0.05),
        ("head.bias", lambda w: w + np.eye(1, len(w), 2, dtype=np.float32)[0] * 0.05),
        ("head.weight", lambda w: w[[0, 1, 2, 3, 5, 4, 6]]),
        ("stem.0.weight", lambda w: w[:, ::-1].copy()),
        ("head.weight", lambda w: w * np.float32(np.nan)),
    ],
    ids=["a score", "a width", "two classes swapped", "color order", "not a number"],
)
def test_a_wrong_file_fails(
    file: str,
    name: str,
    change: Callable[[np.ndarray], np.ndarray],
    request: pytest.FixtureRequest,
    detector: TinyDetector,
    pixels: Tensor,
    tmp_path: Path,
) -> None:
    wrong = changed(request.getfixturevalue(file), tmp_path / "wrong.onnx", name, change)
    assert check_parity(detector, wrong, [pixels]).faults() != []


def test_locations_without_a_fixed_place_are_not_compared_one_by_one(
    raw_file: Path, detector: TinyDetector, pixels: Tensor
) -> None:
    proposing = copy.deepcopy(detector)
    proposing.spec = replace(detector.spec, stable_locations=False)
    report = check_parity(proposing, raw_file, pixels.split(2))
    assert report.faults() == []
    assert report.locations == 0
    assert report.found.detections > 20


def test_no_images_prove_nothing(nms_file: Path, detector: TinyDetector) -> None:
    assert check_parity(detector, nms_file, []).faults() == ["no image was compared"]


def test_a_comparison_of_nothing_says_so(raw_file: Path, detector: TinyDetector, pixels: Tensor) -> None:
    proposing = copy.deepcopy(detector)
    proposing.spec = replace(detector.spec, stable_locations=False)
    blank = torch.zeros_like(pixels[:1])
    report = ParityReport(FP32, images=1)
    assert not report.compared
    assert report.table().splitlines()[-1].startswith("nothing was compared: neither the model nor the file")
    of_locations = check_parity(detector, raw_file, [blank])
    assert of_locations.compared
    assert "nothing was compared" not in of_locations.table()
    of_detections = check_parity(proposing, raw_file, [pixels[:1]])
    assert of_detections.compared
    assert "nothing was compared" not in of_detections.table()


def test_a_checked_export_leaves_the_file_and_its_note(tmp_path: Path, detector: TinyDetector) -> None:
    data = scene(tmp_path, images=6)
    printed: list[str] = []
    target = tmp_path / "out" / "model.onnx"
    written = export_checked(detector, target, ExportOptions(64), data=data, say=printed.append)
    assert written == target
    assert sorted(f.name for f in target.parent.iterdir()) == ["model.onnx", "model.parity.json"]
    note = json.loads((target.parent / "model.parity.json").read_text())
    assert note["passed"] is True
    assert note["compared"] is True
    assert (note["images"], note["locations"]) == (6, 480)
    assert [o.name for o in onnx.load(str(target)).graph.output] == ["boxes", "scores", "labels", "counts"]
    assert len(printed) == 1
    head, *rows = printed[0].splitlines()
    assert head.split() == ["parity", "on", "6", "images", "found", "allowed"]
    assert any(row.startswith("largest score difference") and row.endswith("0.001") for row in rows)


def test_a_model_that_finds_nothing_is_compared_all_the_same(tmp_path: Path) -> None:
    blind = TinyDetector(["a"], bias=-30.0)
    export_checked(blind, tmp_path / "x.onnx", ExportOptions(64, conf=0.5), data=scene(tmp_path))
    note = json.loads((tmp_path / "x.parity.json").read_text())
    assert note["found"]["detections"] == 0
    assert note["locations"] > 0


def test_a_failed_check_leaves_nothing_new(
    tmp_path: Path, detector: TinyDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = scene(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.onnx").write_bytes(b"an older file")
    honest = parity.save_checked

    def wrong(model: onnx.ModelProto, path: Path) -> Path:
        return changed(honest(model, path), path, "head.bias", lambda w: w + np.float32(0.2))

    monkeypatch.setattr(parity, "save_checked", wrong)
    for name in ("new.onnx", "old.onnx"):
        with pytest.raises(GateError, match=rf"{name} was not written: .* raw score differs by"):
            export_checked(detector, folder / name, ExportOptions(64), data=data)
    assert [f.name for f in folder.iterdir()] == ["old.previous.onnx"]
    assert (folder / "old.previous.onnx").read_bytes() == b"an older file"


def test_a_folder_that_cannot_be_is_said_so(tmp_path: Path, detector: TinyDetector) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not write"):
        export_checked(detector, tmp_path / "file" / "x.onnx", ExportOptions(64), data=scene(tmp_path))


@pytest.mark.slow
def test_fp16_is_judged_by_ap_too(tmp_path: Path, detector: TinyDetector) -> None:
    data = scene(tmp_path)
    export_checked(detector, tmp_path / "half.onnx", ExportOptions(64, half=True), data=data)
    note = json.loads((tmp_path / "half.parity.json").read_text())
    assert note["file_ap"] == pytest.approx(note["model_ap"], abs=0.002)
    foreign = scene(tmp_path, names=("green",))
    foreign.names = ["unknown"]
    export_checked(detector, tmp_path / "other.onnx", ExportOptions(64, half=True), data=foreign)
    assert json.loads((tmp_path / "other.parity.json").read_text())["file_ap"] is None


def test_a_fall_in_ap_is_a_fault() -> None:
    report = ParityReport(FP16, images=1, model_ap=0.30, file_ap=0.297)
    assert report.faults() == ["AP is 0.2970 instead of 0.3000 (allowed difference 0.002)"]


def test_files_of_free_shape_are_checked_on_several_shapes(tmp_path: Path) -> None:
    data = scene(tmp_path, images=7)
    shapes = [tuple(b.shape) for b in sample_images(data, 64, 16, (0, 0, 0), dynamic=True)]
    assert shapes == [(1, 3, 64, 64), (2, 3, 64, 80), (3, 3, 64, 64), (1, 3, 64, 80)]
    fixed = list(sample_images(data, 64, 16, (7, 8, 9), dynamic=False, count=4))
    assert [tuple(b.shape) for b in fixed] == [(1, 3, 64, 64)] * 4
    assert fixed[0].dtype == torch.uint8
    assert fixed[0][0, :, -1, 0].tolist() == [7, 8, 9]


@pytest.mark.slow
@pytest.mark.parametrize("options", [ExportOptions(416), ExportOptions(416, half=True)])
def test_the_official_nano_weights_keep_their_ap(
    nano_weights: Path, coco_mini: Path, tmp_path: Path, options: ExportOptions
) -> None:
    data = coco_val(coco_mini)
    path = export_checked(official_nano(nano_weights, data.names), tmp_path / "nano.onnx", options, data=data)
    result = evaluate(OnnxPredictor(path), eval_loader(data, imgsz=416, batch=1), data)
    allowed = 0.2 if options.half else 0.05
    assert 100 * result.metrics["AP"] == pytest.approx(31.96, abs=allowed)


@pytest.mark.parametrize(("half", "looked_at"), [(False, [4, 1]), (True, [4, 4])])
def test_shares_and_correlations_are_judged_on_all_images(
    half: bool, looked_at: list[int], tmp_path: Path, detector: TinyDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished file too: on one image a good fp16 or int8 file may miss them by chance."""
    images: list[int] = []

    def watched(*given: object) -> ParityReport:
        report = check_parity(*given)  # type: ignore[arg-type]
        images.append(report.images)
        return report

    monkeypatch.setattr(parity, "check_parity", watched)
    export_checked(detector, tmp_path / "x.onnx", ExportOptions(64, half=half), data=scene(tmp_path, images=4))
    assert images == looked_at


def test_equal_scores_of_the_file_alone_are_no_agreement() -> None:
    seen, flat = np.linspace(0.01, 0.2, 9), np.full(9, 0.05)
    assert _correlation([np.stack([seen, flat])]) == 0
    assert _correlation([np.stack([flat, flat])]) is None
    assert _correlation([np.stack([0.01 + seen / 1000, flat])]) is None  # less than a code of int8 tells apart
    assert _correlation([]) is None
    assert ParityReport(TOLERANCES["int8"], images=1, location_correlation=0.0).faults()


def test_a_runtime_whose_package_has_another_name_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "onnxruntime":
            raise PackageNotFoundError(package)
        return f"{package} 1.2"

    monkeypatch.setattr(parity, "version", version)
    monkeypatch.setattr(parity, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    assert parity._version("onnxruntime") == "onnxruntime-gpu 1.2"
    monkeypatch.setattr(parity, "packages_distributions", dict)
    assert parity._version("onnxruntime") == "unknown"
