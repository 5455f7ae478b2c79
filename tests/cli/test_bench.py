"""`yoloxkd bench`: a row a variant, with size, AP and the parts of the latency."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.exporters.tiny import TinyDetector
from yoloxkd import Detector
from yoloxkd.cli import benching, run
from yoloxkd.cli.benching import _FORMAT_NAMES, _variants
from yoloxkd.cli.latency import Latency, end_to_end, measure_latency
from yoloxkd.errors import UserError
from yoloxkd.exporters import EXPORTERS, missing
from yoloxkd.exporters.onnx import ExportOptions, export_onnx
from yoloxkd.exporters.runtime import OnnxPredictor


@pytest.mark.slow
def test_a_checkpoint_and_a_file(toy: Path, toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = export_onnx(TinyDetector(["red", "blue"]).eval(), tmp_path / "tiny.onnx", ExportOptions(64))
    checkpoint = str(toy_run / "best.pt")
    options = ["--data", str(toy), "--runs", "3", "--no-compiled", "--threads", "2", "--json", str(tmp_path / "b.json")]
    assert run(["bench", checkpoint, str(file), *options]) == 0
    shown = capsys.readouterr().out
    rows = {row["variant"]: row for row in json.loads((tmp_path / "b.json").read_text())["variants"]}
    others = {kind: f"best.pt {_FORMAT_NAMES[kind]} fp32" for kind in EXPORTERS if kind != "onnx"}
    assert {kind for kind, name in others.items() if name in rows} == {k for k in others if not missing(k)}
    plain = {name for name in rows if "OpenVINO" not in name} - set(others.values())
    half = "best.pt ONNX fp16"  # this student has learnt so little that its gate may refuse it; then that is said
    assert plain - {half} == {"best.pt PyTorch", "best.pt ONNX fp32", "tiny.onnx ONNX fp32"}
    assert (half in rows) != ("best.pt fp16 is left out" in shown)
    assert all(name in shown for name in rows)
    own = Detector(checkpoint, "cpu").val(str(toy), workers=0)["AP"]
    assert rows["best.pt PyTorch"]["AP"] == pytest.approx(own, abs=1e-6)
    assert rows["best.pt ONNX fp32"]["AP"] == pytest.approx(own, abs=1e-4)
    assert rows["best.pt ONNX fp32"]["size_mb"] == pytest.approx(Path(checkpoint).stat().st_size / 1e6, rel=0.5)
    for row in rows.values():
        for threads in ("threads_1", "threads_2"):
            t = row[threads]
            assert t["total_p10_ms"] <= t["total_ms"] <= t["total_p90_ms"]
            assert min(t["before_ms"], t["network_ms"], t["after_ms"]) > 0


def test_the_parts_of_a_latency() -> None:
    latency = Latency(np.array([0.001, 0.001, 0.003]), np.array([0.01, 0.02, 0.01]), np.array([0.001, 0.001, 0.001]))
    assert latency.summary()["network_ms"] == 10
    assert latency.summary()["total_ms"] == 14
    assert end_to_end(latency) == pytest.approx(1.4)


def test_variants_take_turns_and_are_timed_apart(tmp_path: Path) -> None:
    path = export_onnx(TinyDetector(["red", "blue"]).eval(), tmp_path / "tiny.onnx", ExportOptions(64))
    calls: list[str] = []

    class Told(OnnxPredictor):
        def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
            calls.append(self.label)  # type: ignore[attr-defined]
            return super().run(pixels)

    predictors = {}
    for name in ("a", "b"):
        predictors[name] = Told(path, conf=0.25, threads=1)
        predictors[name].label = name  # type: ignore[attr-defined]
    found = measure_latency(predictors, np.full((90, 120, 3), 99, np.uint8), 64, runs=4, threads=1)
    assert {name: len(latency.total) for name, latency in found.items()} == {"a": 4, "b": 4}
    assert "".join(calls).endswith("abababab")


def test_what_a_model_cannot_be_exported_as_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benching, "missing", lambda kind: kind == "openvino")
    asked: list[tuple[str, dict[str, object]]] = []

    class Model:
        onnx, precision, source, weights_file = False, "fp32", "solo.pt", str(tmp_path / "solo.pt")

        def export(self, target: Path, *, imgsz: int, verify: str, say: None, format: str, **options: object) -> None:
            asked.append((format, options))
            if options.get("half") or format != "onnx":
                raise UserError("a solo has its own NMS")

    def rows(model: Model, calib: str | None = None) -> list[str]:
        return [v.name for v in _variants(model, "", tmp_path, 64, "toy", calib, False)]  # type: ignore[arg-type]

    assert rows(Model()) == ["PyTorch", "ONNX fp32"]
    assert "fp16 is left out: a solo has its own NMS" in capsys.readouterr().out
    asked.clear()
    model = Model()
    model.precision = "int8"
    assert rows(model) == ["PyTorch", "ONNX int8"]
    assert len(asked) == len(EXPORTERS)
    assert all(options == {"int8": True} for _, options in asked)
    with pytest.raises(UserError, match=r"solo.pt is trained for int8.*leave --calib out"):
        rows(model, "photos")
