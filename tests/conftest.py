"""Environment of every test: no network, no update check, quiet threads."""

from __future__ import annotations

import logging
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TYPER_USE_RICH", "0")  # as the command line has it, for tests that import typer before it

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """Keep pytest's log capture off torch's trace log.

    pytest adds its handler to every logger that does not propagate. As soon as this one has a handler, torch writes a
    stack summary for every guard and every fake tensor, which makes up much of the time of an export.
    """
    logging.getLogger("torch.__trace").propagate = True


def shared_folder() -> Path:
    """The folder with real data and weights: YOLOXKD_SHARED, else ../shared beside the repository."""
    return Path(os.environ.get("YOLOXKD_SHARED", REPOSITORY.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"real data and weights are not at {folder} (set YOLOXKD_SHARED)")
    return folder


@pytest.fixture(scope="session")
def bccd(shared: Path) -> Path:
    folder = shared / "data" / "bccd"
    if not folder.is_dir():
        pytest.skip(f"the BCCD images are not at {folder} (set YOLOXKD_SHARED)")
    return folder


@pytest.fixture(scope="session")
def coco_mini(shared: Path) -> Path:
    folder = shared / "data" / "coco_mini"
    if not folder.is_dir():
        pytest.skip(f"the COCO sample is not at {folder} (set YOLOXKD_SHARED)")
    return folder


@pytest.fixture(scope="session")
def nano_weights(shared: Path) -> Path:
    file = shared / "weights" / "yolox_nano_coco.pth"
    if not file.is_file():
        pytest.skip(f"the YOLOX-nano weights are not at {file} (set YOLOXKD_SHARED)")
    return file


def write_toy(folder: Path, *, images: int = 8, size: int = 96, seed: int = 0, masks: bool = False) -> Path:
    """A data set of colored rectangles on gray (classes "red" and "blue") in COCO format, with masks or without; its YAML."""
    import json

    import cv2
    import numpy as np

    random = np.random.default_rng(seed)
    for split, count in (("train", images), ("val", 5), ("test", 3)):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        pictures, annotations = [], []
        for i in range(count):
            picture = np.full((size, size, 3), 110, np.uint8)
            picture += random.integers(0, 30, picture.shape, dtype=np.uint8)
            for _ in range(random.integers(1, 4)):
                label = int(random.integers(0, 2))
                w, h = (int(v) for v in random.integers(16, 48, 2))
                x, y = int(random.integers(0, size - w)), int(random.integers(0, size - h))
                picture[y : y + h, x : x + w] = ((20, 20, 220), (220, 60, 20))[label]  # BGR
                row = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": (3, 7)[label]}
                outline = {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]} if masks else {}
                annotations.append(row | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0} | outline)
            cv2.imwrite(str(folder / "images" / split / f"{i}.png"), picture)
            pictures.append({"id": i + 1, "file_name": f"{i}.png", "width": size, "height": size})
        categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
        value = {"images": pictures, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(value))
    lines = ["path: .", "format: coco", "names: [red, blue]"]
    lines += [f"{s}: {{images: images/{s}, annotations: annotations/{s}.json}}" for s in ("train", "val", "test")]
    (folder / "data.yaml").write_text("\n".join(lines) + "\n")
    return folder / "data.yaml"


TINY = {
    "student.width": 0.125,
    "augment.multiscale": 0,
    "augment.mosaic": 0.5,
    "engine.workers": 0,
    "teacher.min_ap": 0,
    "callbacks.report": False,
    "callbacks.plots": False,
}
"""Recipe keys of a run that takes seconds."""


LEARNS = TINY | {
    "optim.lr_per_image": 1e-3,
    "ema.ramp": 200,
    "student.depthwise": False,
    "augment.mosaic": 0.0,
    "augment.hsv_prob": 0.0,
    "val.interval": 12,
    "callbacks.plots": {"interval": 1000},
}
"""What makes a narrow model see rectangles after 25 epochs of 24 images."""


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"), images=24)


@pytest.fixture(scope="session")
def toy_run(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a narrow YOLOX-nano on the toy data, long enough to detect something."""
    from yoloxkd import Trainer

    out = tmp_path_factory.mktemp("runs") / "toy"
    Trainer(student="yolox-nano", data=str(toy), epochs=25, batch=4, imgsz=64, device="cpu", set=LEARNS, out=out).fit()
    return out
