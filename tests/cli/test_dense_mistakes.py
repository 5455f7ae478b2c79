"""Mistakes with dense detectors on an FPN: the families say the same, and files that do not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.cli.test_mistakes import QUICK, refused
from tests.nn.fpn import narrow
from yoloxkd.nn.dense.reppoints import RepPoints
from yoloxkd.nn.weights.torchvision_weights import BOXES, CLASSIFIER

FAMILIES = ("gfl", "retinanet", "autoassign", "ddod", "reppoints")
FAST = ["--set=engine.workers=0", "--set=student.backbone_weights=none"]
OF_KEYS = (
    (["--set=student.channels=100", "--set=student.groups=32"], ["channels 100 should be a multiple of groups 32"]),
    (["--set=student.stacked_convs=0"], ["student.stacked_convs", "1"]),
    (["--set=student.stakced_convs=2"], ["student.stakced_convs", "did you mean 'student.stacked_convs'"]),
    (["--set=student.std=[1,0,1]"], ["std", "0.001"]),
)
OF_NETWORKS = (
    (["--set=student.backbone=resnet_50"], ["unknown backbone 'resnet_50'", "resnet50"]),
    (["--imgsz", "100"], ["100", "multiple", "96"]),
    (["--set=student.backbone=resnet18", "--set=student.last_conv=true"], ["student.last_conv", "'resnet18'"]),
    (["--set=student.deformable_stages=1"], ["student.deformable_stages is for ResNets", "'mobilenetv2_100'"]),
)
CASES = (*OF_KEYS, *(pytest.param(*case, marks=pytest.mark.slow) for case in OF_NETWORKS))


@pytest.mark.parametrize(("options", "words"), CASES, ids=lambda value: value[-1])
def test_the_families_refuse_alike(
    options: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, toy: Path
) -> None:
    said = set()
    for family in ("fcos", *FAMILIES):
        name = f"{family}-mobilenetv2"
        quick = QUICK[: QUICK.index("--imgsz")] if "--imgsz" in options else QUICK
        arguments = ["train", "--student", name, "--data", toy, "--out", tmp_path / "run", *quick, *FAST, *options]
        text = refused(capsys, arguments, *words)
        said.add(text.replace(name, "NAME").replace(family.upper(), "FAMILY"))
    assert len(said) == 1
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_with_deformable_stages_for_a_backbone_without(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, toy: Path
) -> None:
    """Its plain weights would load, and look elsewhere than they have learned to."""
    state = narrow(RepPoints, 2, backbone="resnet18", deformable_stages=2).state_dict()
    theirs = {k.replace("backbone.body.", "backbone.").replace("head.", "bbox_head."): v for k, v in state.items()}
    torch.save({"state_dict": theirs}, tmp_path / "x.pth")
    keys = ["backbone=resnet18", "channels=16", "groups=4", "stacked_convs=2", f"weights={tmp_path / 'x.pth'}"]
    arguments = ["train", "--student", "reppoints-r50", "--data", toy, "--out", tmp_path / "run", *QUICK]
    refused(
        capsys,
        [*arguments, *(f"--set=student.{key}" for key in keys)],
        "x.pth: the checkpoint has a deformable convolution at backbone.body.layer3.0.conv2, where the model has a plain one",
        "set student.deformable_stages=2",
    )
    assert not (tmp_path / "run").exists()


def test_a_retinanet_with_other_anchors(capsys: pytest.CaptureFixture[str], tmp_path: Path, toy: Path) -> None:
    blocks = [f"backbone.body.layer3.{i}.conv3.weight" for i in range(6)]
    state = {key: torch.zeros(1) for key in blocks}
    state |= {
        "backbone.body.layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1),
        CLASSIFIER: torch.zeros(6 * 2, 8, 3, 3),
        BOXES: torch.zeros(6 * 4, 8, 3, 3),
    }
    torch.save(state, tmp_path / "x.pth")
    words = "x.pth: the checkpoint's RetinaNet predicts 24 box numbers and 12 class logits a cell", "those of 9 anchors"
    refused(capsys, ["val", tmp_path / "x.pth", "--data", toy], *words)


def test_a_crowdhuman_set_without_full_bodies(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    cv2.imwrite(str(tmp_path / "Images" / "a.jpg"), np.zeros((40, 80, 3), np.uint8))
    row = {"ID": "a", "gtboxes": [{"tag": "person", "vbox": [2, 2, 9, 9], "hbox": [2, 2, 4, 4]}]}
    (tmp_path / "boxes.odgt").write_text(json.dumps(row) + "\n")
    yaml = tmp_path / "data.yaml"
    split = "{images: Images, annotations: boxes.odgt}"
    yaml.write_text(f"path: .\nformat: crowdhuman\nnames: [person]\ntrain: {split}\nval: {split}\n")
    arguments = ["train", "--student", "ddod-mobilenetv2", "--data", yaml, "--out", tmp_path / "run", *QUICK, *FAST]
    refused(capsys, arguments, "boxes.odgt has an 'fbox', the full body", "write the boxes you have as 'fbox'")
    assert not (tmp_path / "run").exists()
