"""Convert a data set from one annotation format into another."""

from __future__ import annotations

import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from yoloxkd.config.load import write_yaml
from yoloxkd.data import FORMATS
from yoloxkd.data.data_spec import DataSpec, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.format import Format
from yoloxkd.data.io.find_images import folded
from yoloxkd.data.io.image_headers import image_size
from yoloxkd.errors import UserError, nearest
from yoloxkd.output_paths import check_folder
from yoloxkd.write_image import write_image

_UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")  # categories of characters that end lines or that XML has no place for


@dataclass(slots=True)
class Converted:
    """What a conversion wrote.

    yaml   the data YAML of the new set
    lines  a sentence for each split: how much was written, and what its format could not hold
    """

    yaml: Path
    lines: list[str] = field(default_factory=list)


def convert_data(
    spec: DataSpec, to: str, output: Path, classes: Sequence[str] | None = None, link: bool = False
) -> Converted:
    """Write every split of a data set into the new folder `output`: images, annotations, data.yaml.

    classes  class names to keep, in that order; None: all
    link     symbolic links to the images instead of copies
    The folder gets its name when it is complete. UserError: the format is unknown or cannot hold the classes, the
    folder is there already or cannot be written, a split cannot be read.
    """
    FORMATS.find(to)
    if FORMATS[to].write is None:
        writable = ", ".join(name for name in FORMATS if FORMATS[name].write)
        raise UserError(f"the format {to} is read and not written; choose one of {writable}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already; give a new --output")
    place = output.resolve()
    for folder in spec.image_folders():
        if folder.resolve() in place.parents:
            raise UserError(
                f"--output {output} is inside {folder}, where the data set {spec.name} has its images, so the new ones "
                "would be taken for its own; give a folder elsewhere"
            )
    check_folder(output)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name[:100]}.", suffix=".part", dir=place.parent) as temporary:
            part = Path(temporary) / "set"
            part.mkdir()
            result = _write(spec, FORMATS[to], to, part, classes, link)
            if place.exists():
                place.rmdir()
            part.rename(place)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    return Converted(output / "data.yaml", result)


def _write(
    spec: DataSpec, target: Format, to: str, folder: Path, classes: Sequence[str] | None, link: bool
) -> list[str]:
    names = list(spec.names if classes is None else classes)
    if unknown := [name for name in names if name not in spec.names]:
        raise UserError(f"the data set {spec.name} has no class '{unknown[0]}'; {nearest(unknown[0], spec.names)}")
    if len(names) > target.most_classes:
        raise UserError(
            f"the format {to} holds one class, and the data set {spec.name} has {len(names)}: choose one with --classes"
        )
    content: dict[str, Any] = {"format": to} if to != "yolo" else {}
    lines, used = [], Counter[str]()
    for split in spec.splits:
        data = select_classes(load_split(spec, split, masks=True), names)
        files = _new_names(data.paths, used if target.one_folder else Counter())
        renamed = sum(Path(path).name != name for path, name in zip(data.paths, files, strict=True))
        for i, name in enumerate(files):
            files[i] = _place(data, i, folder / target.image_folder.format(split=split) / name, target, link)
        assert target.write is not None
        content[split] = target.write(data, files, folder)
        loss = "; ".join(describe_loss(data, target))
        faults = f"; {data.faults.describe()}" if len(data.faults) else ""
        faults += f"; {renamed} images got new names" if renamed else ""
        lines.append(f"{split}: {len(data)} images, {len(data.boxes)} boxes{faults}{'; lost: ' + loss if loss else ''}")
    content["names"] = dict(enumerate(names)) if to == "yolo" else names
    (folder / "data.yaml").write_text(write_yaml(content), encoding="utf-8")
    return lines


def _new_names(paths: Sequence[str], used: Counter[str]) -> list[str]:
    """A file name for each image: its own, where every format and file system can hold it beside the others.

    Names that differ in their suffix, in case or in Unicode normal form alone are numbered, bytes that are not UTF-8 are
    read as Latin-1, and control characters become `_`.
    """
    out = []
    for path in paths:
        file = Path(_plain(Path(path).name))
        stem, number = file.stem, 1
        while used[folded(stem)]:
            number += 1
            stem = f"{file.stem}-{number}"
        used[folded(stem)] += 1
        out.append(stem + file.suffix)
    return out


def _plain(name: str) -> str:
    raw = os.fsencode(name)
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = raw.decode("latin-1")
    return "".join("_" if unicodedata.category(c) in _UNWRITABLE else c for c in name)


def select_classes(data: DetectionData, names: list[str]) -> DetectionData:
    """The boxes of some classes, numbered by their place in `names`; the images stay, all of them."""
    if names == data.names:
        return data
    label_of = np.array([names.index(name) if name in names else -1 for name in data.names])
    labels = label_of[data.labels]
    picked = data.take(labels >= 0)
    picked.labels, picked.names = labels[labels >= 0], list(names)
    rows = [data.names.index(name) for name in names]
    if data.category_ids is not None:
        picked.category_ids = data.category_ids[rows]
    if data.category_keys is not None:
        picked.category_keys = [data.category_keys[row] for row in rows]
    return picked


def describe_loss(data: DetectionData, target: Format) -> list[str]:
    """What `target` cannot hold of this split, in words; empty when everything is kept."""
    regions = data.crowd if data.difficult is None else data.crowd & ~data.difficult
    single = int(data.crowd.sum()) - int(regions.sum())
    beyond = 0 if data.unclipped is None else int((np.abs(data.unclipped - data.boxes).max(1) > 1e-6).sum())
    areas = np.abs((data.boxes[:, 2:] - data.boxes[:, :2]).prod(1) - data.areas) > 1e-6 * np.maximum(data.areas, 1)
    regions_note = " (written as difficult objects)" if "difficult" in target.keeps else " (they become background)"
    masked = np.zeros(0, bool) if data.masks is None else data.masks.there()
    unseen = 0 if data.unseen is None else len(data.unseen)
    losses = {
        "regions": (int(regions.sum()), f"ignore regions{regions_note}"),
        "difficult": (single, "difficult objects to ignore (they become background)"),
        "areas": (int(areas.sum()), "areas that are not those of their boxes"),
        "unclipped": (beyond, "boxes cut at the image's border"),
        "visible": (0 if data.visible is None else int(np.isfinite(data.visible).all(1).sum()), "visible boxes"),
        "masks": (int(masked.sum()), "instance masks"),
        "heads": (0 if data.head_boxes is None else int(np.isfinite(data.head_boxes).all(1).sum()), "head boxes"),
        "names": (len(data.names), "class names, which become 'person'") if data.names != ["person"] else (0, ""),
    }
    sentences = [f"{count} {words}" for key, (count, words) in losses.items() if count and key not in target.keeps]
    if data.format == "coco" and "numbers" not in target.keeps:
        sentences.append("the numbers of images, annotations and categories")
    elif data.format == "coco" and data.renumbered:
        sentences.append("the numbers of annotations, which are not all there or not unique (numbered anew)")
    if len(masked) and target is FORMATS["yolo"] and not masked[~data.crowd].all():
        sentences.append(f"{int((~masked & ~data.crowd).sum())} objects without a mask get the outline of their box")
    return sentences + ([f"{unseen} objects wholly outside their image"] if unseen else [])


def _place(data: DetectionData, index: int, place: Path, target: Format, link: bool) -> str:
    """Bring an image to its place; the name it got.

    An image that EXIF turns, and whose boxes are those of the image as stored, is written anew, upright as its boxes
    are, for a format that does not say sizes: there the image's own size counts.
    """
    source = data.paths[index]
    place.parent.mkdir(parents=True, exist_ok=True)
    if not target.says_sizes and image_size(source) != tuple(data.sizes[index].tolist()):
        place = place.with_suffix(".png")
        write_image(place, data.read(index))
    elif link:
        place.symlink_to(Path(source).resolve())
    else:
        shutil.copyfile(source, place)
    return place.name
