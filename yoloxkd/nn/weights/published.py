"""Published weights: the files behind `NAME@coco`."""

from __future__ import annotations

from urllib.parse import quote

from yoloxkd.download import Published
from yoloxkd.nn.weights.mmdet_files import AT_COCO, ZOO
from yoloxkd.nn.weights.two_stage_files import TORCHVISION_TWO_STAGE, TWO_STAGE


def _zoo_file(name: str) -> Published:
    """One of mmdetection's files; its name carries the beginning of its digest."""
    entry = ZOO[name]
    family = entry.model.partition("-")[0]
    return Published(f"{_OPENMMLAB}/{family}/{quote(entry.folder)}/{quote(name)}", name, None, name[-12:-4])


def _torchvision_file(name: str) -> Published:
    """One of torchvision's files, named likewise."""
    return Published(f"{_TORCHVISION}/{name}", name, None, name[-12:-4])


_OPENMMLAB = "https://download.openmmlab.com/mmdetection/v2.0"
_TORCHVISION = "https://download.pytorch.org/models"
_MEGVII = "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0"

PUBLISHED: dict[str, Published] = {
    "yolox-nano": Published(f"{_MEGVII}/yolox_nano.pth", "yolox_nano.pth"),
    "yolox-tiny": Published(
        f"{_MEGVII}/yolox_tiny.pth",
        "yolox_tiny.pth",
        None,
        "9de513de589ac98bb92d3bca53b5af7b9acfa9b0bacb831f7999d0f7afaee8f0",
    ),
    "yolox-s": Published(
        f"{_MEGVII}/yolox_s.pth",
        "yolox_s.pth",
        72_089_125,
        "f55ded7181e1b0c13285c56e7790b8f0e8f8db590fe4edb37f0b7f345c913a30",
    ),
    "yolox-m": Published(
        f"{_MEGVII}/yolox_m.pth",
        "yolox_m.pth",
        None,
        "60076992b32da82951c90cfa7bd6ab70eba9eda243e08b940a396f60ac2d19b6",
    ),
    "yolox-l": Published(
        f"{_MEGVII}/yolox_l.pth",
        "yolox_l.pth",
        None,
        "1e6b7fa6240375370b2a8a8eab9066b3cdd43fd1d0bfa8d2027fd3a51def2917",
    ),
    "yolox-x": Published(
        f"{_MEGVII}/yolox_x.pth",
        "yolox_x.pth",
        None,
        "5652330b6ae860043f091b8f550a60c10e1129f416edfdb65c259be6caf355cf",
    ),
    "fcos-r50@torchvision": _torchvision_file("fcos_resnet50_fpn_coco-99b0c9b7.pth"),
    "retinanet-r50@torchvision": _torchvision_file("retinanet_resnet50_fpn_coco-eeacb38b.pth"),
    "retinanet-r50@torchvision-v2": _torchvision_file("retinanet_resnet50_fpn_v2_coco-5905b1c5.pth"),
    **{
        f"{model}@torchvision{version}": _torchvision_file(name)
        for (model, version), name in TORCHVISION_TWO_STAGE.items()
    },
    **{model: _zoo_file(name) for model, name in AT_COCO.items()},
    **{
        model: Published(f"{_OPENMMLAB}/{folder}/{quote(name)}", name, None, name[-12:-4])
        for model, (folder, name) in TWO_STAGE.items()
    },
}
"""Architecture name -> its weights trained on COCO (80 classes, in the order of `coco_names.COCO_NAMES`).

Digests of YOLOX are those that at least two independent public programs check the release's files against; for nano only one was
found, so none is given.
"""
