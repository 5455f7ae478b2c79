"""Check a data set and list everything that is wrong with it (`yoloxkd data check`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yoloxkd.data.data_spec import DataSpec, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.io.decoder_messages import complaints
from yoloxkd.data.io.find_images import missing
from yoloxkd.data.io.images import WrongSize, decode_image
from yoloxkd.data.io.threads import in_threads
from yoloxkd.data.problems import MISSING, UNREADABLE, Faults, Place
from yoloxkd.data.sufficiency import shortages
from yoloxkd.errors import UserError
from yoloxkd.types import ImageSize

OTHER_SIZE = "images of another size than their annotations say"
TWICE = "images that are in the split before, byte for byte"
LISTED_TWICE = "images that are listed in the split before"
NO_SPLIT = "split that cannot be read"
COMPLAINTS = "images that are decoded with complaints"
LEAK = "images that are in another split too, byte for byte"

_CHUNK = 512  # images between two listenings to what decoders print


@dataclass(slots=True)
class SplitReport:
    """One split: how much is in it, and what is wrong with it."""

    split: str
    images: int = 0
    boxes: int = 0
    ignored: int = 0
    masks: int = 0
    faults: Faults = field(default_factory=lambda: Faults(gather=True, max_places=None))

    @property
    def breaking(self) -> int:
        """Faults that training on the split would stop at."""
        return sum(self.faults.counts[kind] for kind in self.faults.breaking)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: counts, and each kind of fault with its places."""
        return {
            "images": self.images,
            "boxes": self.boxes,
            "ignored": self.ignored,
            "masks": self.masks,
            "breaking": self.breaking,
            "faults": {
                kind: {
                    "count": count,
                    "breaking": kind in self.faults.breaking,
                    "where": [
                        {"file": p.file, "line": p.line, "note": p.note} for p in self.faults.examples.get(kind, [])
                    ],
                }
                for kind, count in self.faults.counts.items()
            },
        }


def check_data(
    spec: DataSpec, progress: Callable[[int, int], None] = lambda done, total: None, imgsz: ImageSize = 640
) -> list[SplitReport]:
    """Read every split and every image of a data set whole; nothing stops at the first fault.

    imgsz     input size (px) that objects may be too small for
    progress  called with images done and their number, split by split
    ImageColumns are compared across splits by their bytes: a leak is told at both places.
    """
    reports: list[SplitReport] = []
    places: dict[bytes, list[tuple[SplitReport, str]]] = {}
    for split in spec.splits:
        report = SplitReport(split)
        reports.append(report)
        try:
            data = load_split(spec, split, report.faults, masks=True)
        except UserError as error:
            report.faults.refuse(NO_SPLIT, Place(split, note=str(error)), "")
            continue
        report.images, report.ignored = len(data), int(data.crowd.sum())
        report.boxes = len(data.boxes) - report.ignored
        report.masks = 0 if data.masks is None else int(data.masks.there().sum())
        if len(data):  # else no image can be read, which is told already
            _add_shortages(report, data, imgsz)
        for path, digest in zip(data.paths, _decode_images(data, report.faults, progress), strict=True):
            if digest:
                places.setdefault(digest, []).append((report, path))
    for same in places.values():
        if len(same) > 1:
            _compare(same)
    return reports


def _add_shortages(report: SplitReport, data: DetectionData, imgsz: ImageSize) -> None:
    """What is too little; it would break training, but on a split that is neither trained nor validated on."""
    for shortage in shortages(data, imgsz=imgsz if report.split == "train" else None):
        if shortage.stops and report.split != "test":
            report.faults.breaking.add(shortage.kind)
        report.faults.add(shortage.kind, [Place(report.split, note=shortage.sentence)], shortage.count)


def _compare(same: list[tuple[SplitReport, str]]) -> None:
    """Tell of images with the same bytes, at each of their places."""
    first: dict[str, str] = {}
    for report, path in same:
        if path == first.get(report.split):
            report.faults.add(LISTED_TWICE, [Place(path)])
        elif report.split in first:
            report.faults.add(TWICE, [Place(path, note=f"the same as {first[report.split]}")])
        else:
            first[report.split] = path
    if len(first) > 1:
        for report, path in same:
            if first[report.split] == path:
                others = ", ".join(f"{there} of {split}" for split, there in first.items() if split != report.split)
                report.faults.add(LEAK, [Place(path, note=f"the same as {others}")])


def _decode_images(data: DetectionData, faults: Faults, progress: Callable[[int, int], None]) -> list[bytes]:
    """Decode every image; its digest, empty where it cannot be read."""
    sizes = dict(zip(data.paths, map(tuple, data.sizes.tolist()), strict=True))

    def one(path: str) -> tuple[bytes, str, str]:
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            return b"", MISSING, missing(path)
        except OSError as error:
            return b"", UNREADABLE, str(error.strerror or error)
        digest = hashlib.blake2b(content, digest_size=16).digest()
        try:
            decode_image(content, path, sizes[path])
        except UserError as error:
            return digest, OTHER_SIZE if isinstance(error, WrongSize) else UNREADABLE, str(error)
        return digest, "", ""

    digests: list[bytes] = []
    for start in range(0, len(data), _CHUNK):
        paths = list(data.paths[start : start + _CHUNK])
        with complaints() as messages:
            results = in_threads(one, paths)
        for path, (_, kind, note) in zip(paths, results, strict=True):
            if kind:
                faults.refuse(kind, Place(path, note=note), "")
        if messages:
            _add_complaints([path for path, (_, kind, _) in zip(paths, results, strict=True) if not kind], faults)
        digests += [digest for digest, _, _ in results]
        progress(len(digests), len(data))
    return digests


def _add_complaints(paths: Sequence[str], faults: Faults) -> None:
    """Decode images once more, one at a time, to name those that the decoders complain of without refusing them."""
    for path in paths:
        with complaints() as messages:
            try:
                cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
            except (OSError, ValueError, cv2.error):
                continue
        if messages:
            faults.add(COMPLAINTS, [Place(path, note="; ".join(messages))])
