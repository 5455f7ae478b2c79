"""The consumers of `export/` in other languages find in an image what the package finds with the same exported student."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.nn.two_stage.contract import narrow_two_stage
from yoloxkd import Detector
from yoloxkd.exporters.onnx import ExportOptions, export_onnx
from yoloxkd.nn.two_stage.mask_rcnn import MaskRCNN
from yoloxkd.types import Detections

EXPORT = Path(__file__).resolve().parents[2] / "export"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
CONF = 0.05
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["detections", "locations", "raw", "masks"])
def student(request: pytest.FixtureRequest, toy: Path, toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "student.onnx"
    if request.param == "masks":
        torch.manual_seed(0)
        model = narrow_two_stage(MaskRCNN, ["red", "blue"])
        head: Any = model.roi_head
        for predictor in (head.bbox_head[0].fc_cls, head.mask_head[0].conv_logits):
            torch.nn.init.normal_(predictor.weight, std=0.3)
        return export_onnx(model.eval(), path, ExportOptions(96, nms=True, conf=CONF))
    return Detector(toy_run / "best.pt", "cpu").export(
        path, nms=request.param == "detections", outputs=request.param, verify=str(toy), say=None
    )


@pytest.fixture
def image_file(student: Path, toy: Path, tmp_path: Path) -> Path:
    """The one with most detections, cut to be wider than high: it is resized and padded."""
    images = [cv2.imread(str(toy.parent / "images" / "val" / f"{i}.png"))[:80] for i in range(5)]
    found = Detector(student).predict([cv2.cvtColor(i, cv2.COLOR_BGR2RGB) for i in images], conf=CONF)
    cv2.imwrite(str(tmp_path / "wide.png"), images[int(np.argmax([len(one) for one in found]))])
    return tmp_path / "wide.png"


def assert_same(detections: list[dict[str, Any]], expected: Detections) -> None:
    """One to one, but for one in ten: their own bilinear resizing moves what lies at a threshold to the other side."""
    assert len(expected) >= 3
    unmatched = list(range(len(expected)))
    odd = 0
    for one in detections:
        errors = {
            i: np.abs(expected.boxes[i] - one["box"]).max()
            for i in unmatched
            if int(expected.labels[i]) == one["label"]
        }
        near = min(errors, key=lambda i: errors[i], default=None)
        if near is None or errors[near] > 1:
            odd += 1
            continue
        unmatched.remove(near)
        assert one["score"] == pytest.approx(expected.scores[near], abs=0.02)
        assert one["name"] == expected.names[one["label"]]
        assert ("mask" in one) == (expected.masks is not None)
        if expected.masks is not None:
            assert iou(one["mask"], expected.masks[near]) > 0.9
    assert odd + len(unmatched) <= len(expected) / 10
    scores = [one["score"] for one in detections]
    assert scores == sorted(scores, reverse=True)


def iou(runs: dict[str, list[int]], expected: np.ndarray) -> float:
    """Of run lengths and a mask (h, w) that has pixels."""
    inside = np.arange(len(runs["counts"])) % 2 == 1
    mask = np.repeat(inside, runs["counts"]).reshape(runs["size"][::-1]).T
    assert expected.any()
    return float((mask & expected).sum() / (mask | expected).sum())


def test_the_cpp_example(student: Path, image_file: Path, cpp_program: Path) -> None:
    done = subprocess.run(
        [cpp_program, str(student), str(image_file), str(CONF)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same(json.loads(done.stdout)["detections"], Detector(student).predict(image_file, conf=CONF)[0])
    whole = Image.open(image_file).convert("RGB")
    for turn in range(1, 9):  # as a camera that is held otherwise says it
        exif = Image.Exif()
        exif[274] = turn
        whole.save(turned := image_file.with_name(f"turned{turn}.jpg"), quality=98, exif=exif)
        size = cv2.imread(str(turned)).shape[:2]
        command = [cpp_program, str(student), str(turned), str(CONF)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert (found["height"], found["width"]) == size
        if turn in (1, 6):
            assert_same(found["detections"], Detector(student).predict(turned, conf=CONF)[0])
    wrong = subprocess.run([cpp_program, str(student), __file__], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "is not an image" in wrong.stderr


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The page with its packages, served on this machine: its address and folder."""
    if CHROMIUM is None or shutil.which("npm") is None:
        pytest.skip("there is no Chromium or no npm")
    folder = tmp_path_factory.mktemp("web") / "web"
    shutil.copytree(EXPORT / "web", folder, symlinks=True)
    if not (folder / "node_modules").exists():
        install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"]
        if subprocess.run(install, cwd=folder, capture_output=True, timeout=300, check=False).returncode:
            pytest.skip("npm could not install the page's packages")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", folder
    server.shutdown()


def test_the_page_in_a_browser(student: Path, image_file: Path, page: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = page
    command = ["node", "drop.mjs", f"{url}?conf={CONF}", str(student), str(image_file), str(tmp_path / "shot.png")]
    environment = os.environ | {"CHROMIUM": str(CHROMIUM)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same(json.loads(done.stdout), Detector(student).predict(image_file, conf=CONF)[0])
    assert cv2.imread(str(tmp_path / "shot.png")).std() > 1
