"""Where published weights come from: the files behind `NAME@coco`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """One published checkpoint.

    url, filename   where it is, and its name in the cache folder
    size, sha256    bytes and hex digest where they are known; a download is checked against them
    """

    url: str
    filename: str
    size: int | None = None
    sha256: str | None = None


_MEGVII = "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0"

PUBLISHED: dict[str, Published] = {
    "yolox-nano": Published(f"{_MEGVII}/yolox_nano.pth", "yolox_nano.pth"),
    "yolox-tiny": Published(f"{_MEGVII}/yolox_tiny.pth", "yolox_tiny.pth"),
    "yolox-s": Published(f"{_MEGVII}/yolox_s.pth", "yolox_s.pth"),
    "yolox-m": Published(f"{_MEGVII}/yolox_m.pth", "yolox_m.pth"),
    "yolox-l": Published(f"{_MEGVII}/yolox_l.pth", "yolox_l.pth"),
    "yolox-x": Published(f"{_MEGVII}/yolox_x.pth", "yolox_x.pth"),
}
"""Architecture name -> its weights trained on COCO (80 classes, in the order of `coco_names.COCO_NAMES`)."""
