"""export/predict.py: alone, without torch, it finds what the package finds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from tests.engine.scenes import scene
from tests.exporters.tiny import TinyDetector
from yoloxkd.data.loader import eval_loader
from yoloxkd.engine.evaluate import TorchPredictor

SCRIPT = Path(__file__).resolve().parents[2] / "export" / "predict.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("predict", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("file", ["nms_file", "raw_file", "dynamic_file"])
@pytest.mark.parametrize("size", [(90, 120), (130, 40)])
def test_it_finds_what_the_model_finds(
    script: ModuleType,
    file: str,
    size: tuple[int, int],
    request: pytest.FixtureRequest,
    detector: TinyDetector,
    tmp_path: Path,
) -> None:
    data = scene(tmp_path, size=size)
    model = script.Model(str(request.getfixturevalue(file)), conf=0.5)
    predictor = TorchPredictor(detector, conf=0.5, iou=0.65, max_det=40)
    for index, batch in enumerate(eval_loader(data, imgsz=64, batch=1)):
        expected = predictor(batch.images)[0].to_image(batch.meta[0])
        boxes, scores, labels = model.predict(data.read(index))
        assert len(expected) > 0
        assert labels.tolist() == expected.labels.tolist()
        np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(boxes, expected.boxes, atol=5e-3)


def test_a_model_that_cannot_be_loaded_ends_in_a_sentence(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no file .*missing\.onnx"):
        script.Model(str(tmp_path / "missing.onnx"))
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(SystemExit, match=r"cannot load .*text\.onnx"):
        script.Model(str(tmp_path / "text.onnx"))


def test_as_a_program_it_needs_no_torch_and_writes_json_and_images(nms_file: Path, tmp_path: Path) -> None:
    scene(tmp_path, images=2)
    images = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    # a torch that cannot be imported stands in the way
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not needed here')\n")
    options = ["--out", str(tmp_path / "drawn"), "--json", str(tmp_path / "found.json"), "--conf", "0.5"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(nms_file), *images, *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [f["image"] for f in found] == images
    assert set(found[0]["detections"][0]) == {"box", "score", "label", "name"}
    assert all(d["score"] >= 0.5 for f in found for d in f["detections"])
    drawn = cv2.imread(str(tmp_path / "drawn" / "0.png"))
    assert drawn.shape == cv2.imread(images[0]).shape
    assert (drawn != cv2.imread(images[0])).any()


def test_a_threshold_below_the_file_s_own_is_refused(script: ModuleType, nms_file: Path) -> None:
    with pytest.raises(SystemExit, match=r"drops scores below 0\.3"):
        script.Model(str(nms_file), conf=0.2)


def test_as_a_program_it_replaces_no_image_and_goes_on_after_a_bad_one(nms_file: Path, tmp_path: Path) -> None:
    scene(tmp_path, images=2)
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    before = (tmp_path / "0.png").read_bytes()

    def started(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), str(nms_file), "--conf", "0.5", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    done = started("0.png", "--out", ".")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "0.png is one of the files given" in done.stderr
    assert (tmp_path / "0.png").read_bytes() == before
    done = started("bad.png", "0.png", "other/0.png", "--out", "drawn", "--json", "found.json")
    assert done.returncode == 1
    assert "1 of 3 images could not be read" in done.stderr
    assert [row["image"] for row in json.loads((tmp_path / "found.json").read_text())] == ["0.png", "other/0.png"]
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["0-2.png", "0.png"]


def test_as_a_program_it_replaces_its_own_files_only(nms_file: Path, tmp_path: Path) -> None:
    scene(tmp_path, images=2)
    (tmp_path / "0.jfif").write_bytes(cv2.imencode(".jpg", cv2.imread(str(tmp_path / "0.png")))[1].tobytes())
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    model = tmp_path / "model.onnx"
    model.write_bytes(nms_file.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}

    def started(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), str(model), "0.png", "0.jfif", "--conf", "0.5", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    for arguments, said in (
        (["--out", "album"], "album/0.png is there and was not written by this program"),
        (["--json", "notes.json"], "notes.json is there and was not written by this program"),
        (["--json", "model.onnx"], "model.onnx is one of the files given"),
    ):
        done = started(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert said in done.stderr
    assert {path: path.read_bytes() for path in before} == before
    for _ in range(2):  # what it wrote itself is replaced
        assert started("--out", "drawn", "--json", "found.json").returncode == 0
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["0.jfif.png", "0.png"]
    assert cv2.imread(str(tmp_path / "drawn" / "0.jfif.png")).shape == (90, 120, 3)
