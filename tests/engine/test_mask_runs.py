"""A detector of masks through a whole run: trained, measured, its best epoch chosen by the number that the recipe names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.test_masks import write_masks
from tests.engine.runs import StopAt, rows, same
from tests.engine.two_processes import Frozen
from tests.nn.fpn import BACKBONE
from yoloxkd import Detector, Trainer
from yoloxkd.cli import run
from yoloxkd.errors import Interrupted, UserError

pytestmark = pytest.mark.slow

SMALL = {"student.backbone": BACKBONE, "student.channels": 16, "engine.workers": 0}
TINY = SMALL | {
    "student.hidden": 32,
    "student.mask_hidden": 16,
    "student.mask_convs": 1,
    "student.train_proposals": 60,
    "student.test_proposals": 40,
    "augment.mosaic": 0.5,
    "teacher.min_ap": 0,
    "val.conf": 0.0,
    "val.max_det": 10,
    "callbacks.report": False,
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set with masks, which is its own validation split."""
    yaml = write_masks(tmp_path_factory.mktemp("masks"))
    yaml.write_text(yaml.read_text() + "val: {images: images, annotations: train.json}\n")
    return yaml


def trainer(student: str, data: Path, out: Path, **keys: Any) -> Trainer:
    return Trainer(student=student, data=str(data), epochs=1, batch=2, imgsz=96, device="cpu", out=out, set=TINY | keys)


def test_masks_are_trained_measured_and_choose(
    both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    fit = trainer("mask-rcnn-mobilenetv2", both, out, **{"val.metric": "mask_AP50"}).fit()
    header, row = ((line.split(",")) for line in (out / "results.csv").read_text().splitlines())
    values = dict(zip(header, row, strict=True))
    assert float(values["loss/roi/mask"]) > 0.1
    assert float(values["mask_AP50"]) == pytest.approx(fit.metrics["mask_AP50"], abs=1e-6)
    assert {"AP", "mask_AP"} <= fit.metrics.keys()
    capsys.readouterr()
    options = ["--imgsz", "96", "--device", "cpu", "--out", str(tmp_path / "val"), "--set", "val.conf=0"]
    assert run(["val", str(fit.best), "--data", str(both), *options]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.startswith(("boxes", "masks"))] == ["boxes", "masks"]
    assert "segmentation" in json.loads((tmp_path / "val" / "detections.json").read_text())[0]
    found = Detector(fit.best, device="cpu").predict(both.parent / "images" / "1.png", conf=0.0)[0]
    assert found.masks is not None
    assert found.masks.shape[1:] == (120, 160)


def test_without_masks_boxes_are_trained_or_the_run_is_refused(both: Path, tmp_path: Path) -> None:
    shutil.copytree(both.parent, tmp_path / "set")
    file = tmp_path / "set" / "train.json"
    content = json.loads(file.read_text())
    for row in content["annotations"]:
        del row["segmentation"]
    file.write_text(json.dumps(content))
    data = tmp_path / "set" / both.name
    fit = trainer("mask-rcnn-mobilenetv2", data, tmp_path / "boxes").fit()
    assert (
        "no instance masks: mask-rcnn is trained and measured on its boxes alone"
        in (tmp_path / "boxes" / "train.log").read_text()
    )
    assert "mask_AP" not in fit.metrics
    with pytest.raises(UserError, match=r"'train' of .* has no instance masks, and solo learns from nothing else"):
        Trainer(student="solo-mobilenetv2", data=str(data), device="cpu", out=tmp_path / "solo", set=SMALL).fit()


def test_a_run_in_parts_stopped_and_resumed_is_the_same_run(both: Path, tmp_path: Path) -> None:
    """What is sampled follows from seed, step and image, so neither a stop nor dividing a batch changes it."""
    options: dict[str, Any] = {
        "student": "cascade-mask-rcnn-mobilenetv2", "data": str(both), "batch": 4, "imgsz": 96, "device": "cpu"
    }  # fmt: skip
    keys: dict[str, Any] = TINY | {"augment.multiscale": 0}
    in_parts = keys | {"train.accumulate": 2}
    whole = Trainer(**options, epochs=2, set=in_parts, out=tmp_path / "whole", callbacks=[Frozen()]).fit().out
    stopped = Trainer(**options, epochs=2, set=in_parts, out=tmp_path / "run", callbacks=[Frozen(), StopAt(2)])
    with pytest.raises(Interrupted, match="--resume"):
        stopped.fit()  # in the second epoch; each is one step
    Trainer(resume=tmp_path / "run", callbacks=[Frozen()]).fit()
    assert same(*(torch.load(out / "last.pt", weights_only=True)["model"] for out in (tmp_path / "run", whole)))
    assert rows(tmp_path / "run") == rows(whole)
    once = Trainer(**options, epochs=1, set=keys, out=tmp_path / "once", callbacks=[Frozen()]).fit().out
    first, at_once = rows(whole)[0], rows(once)[0]
    losses = [name for name in at_once if name.startswith("loss/")]
    assert {"loss/roi3/mask", "loss/rpn/cls"} <= {*losses}
    for name in losses:
        assert float(first[name]) == pytest.approx(float(at_once[name]), rel=1e-4), name
