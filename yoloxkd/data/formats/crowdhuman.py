"""CrowdHuman's .odgt (Shao et al. 2018): one JSON object a line and image; the full body is the box that is trained.

`fbox`, `vbox` and `hbox` are xywh px of the full body (guessed behind what hides it, and beyond the image), of the part
that shows, and of the head. A box with another tag than `person`, or with `extra.ignore`, is to be ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yoloxkd.data.box_table import BoxTable, ImageColumns, corners
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.format import Format, SplitSource
from yoloxkd.data.formats.values import flag, has_control, numbers
from yoloxkd.data.io.find_images import IMAGE_SUFFIXES, Stems
from yoloxkd.data.io.images import measure_images
from yoloxkd.data.io.packed_strings import Strings
from yoloxkd.data.problems import Faults, Place
from yoloxkd.errors import UserError

PERSON, MASK = "person", "mask"


def read_crowdhuman(
    images: Path, annotations: Path, names: list[str], split: str, faults: Faults | None = None
) -> DetectionData:
    """One split from an .odgt file and the folder of its images, `<ID>.jpg`.

    `names` holds the one class. A `person` with `extra.ignore` is difficult, every other tag a region. Sizes come from
    the images.
    UserError: more than one name, the file cannot be read, a line is not as described, two lines have one ID, an image
    is missing or broken, no box at all is of a full body.
    """
    if len(names) != 1:
        raise UserError(f"CrowdHuman has one class, and the data YAML names {len(names)}: write 'names: [person]'")
    faults = Faults() if faults is None else faults
    lines = list(_lines(annotations, faults))
    if not lines:
        raise UserError(f"the annotation file {annotations} lists no image")
    paths = _images(images, [row["ID"] for _, row in lines], faults)
    sizes, good = measure_images(paths, str(annotations), faults)
    lines = [line for line, g in zip(lines, good, strict=True) if g]
    image_columns = ImageColumns(
        np.arange(1, len(lines) + 1), Strings(p for p, g in zip(paths, good, strict=True) if g), sizes[good]
    )
    boxes = [(i, line, box) for i, (line, row) in enumerate(lines) for box in row["gtboxes"]]
    person = np.array([_is_person(box) for _, _, box in boxes], bool)
    if person.any() and not any("fbox" in box for _, _, box in boxes):
        raise UserError(
            f"no box of {annotations} has an 'fbox', the full body, which is what is trained and found; use CrowdHuman's own "
            "annotations, or write the boxes you have as 'fbox'"
        )
    ignored = np.array([is_ignored(box) for _, _, box in boxes], bool)
    table = BoxTable(
        image=np.array([i for i, _, _ in boxes], np.int64),
        label=np.zeros(len(boxes), np.int64),
        boxes=_corners(boxes, "fbox"),
        ignore=ignored,
        written=numbers([box.get("fbox") for _, _, box in boxes], (4,)),
        difficult=ignored & person,
        line=np.array([line for _, line, _ in boxes], np.int64),
        files=[str(annotations)],
        visible=_corners(boxes, "vbox"),
        head_boxes=_corners(boxes, "hbox"),
    )
    unnamed = np.array([not _is_person(box) and box.get("tag") != MASK for _, _, box in boxes], bool)
    table.count(unnamed, f"whose tag is neither {PERSON} nor {MASK}, taken as regions to ignore", faults)
    unclear = np.array([_ignore_flag(box) is None for _, _, box in boxes], bool)
    table.count(unclear, "whose extra.ignore is neither 0 nor 1, taken as 0", faults)
    return table.finish(names, split, image_columns, faults, "crowdhuman")


def _images(folder: Path, ids: Sequence[str], faults: Faults) -> list[str]:
    """The image of each ID; where there is none, the name of the JPEG that should be there."""
    if not folder.is_dir():
        raise UserError(f"cannot read the image folder {folder}: there is none")
    stems = Stems(IMAGE_SUFFIXES)
    out = []
    for one in ids:
        candidates = stems.of(str(folder), one) or [str(folder / f"{one}.jpg")]
        if len(candidates) > 1:
            sentence = f"{candidates[0]} and {candidates[1]} both are the image of the ID '{one}'; remove one of them"
            faults.refuse("images that share their ID", Place(candidates[1], note=f"with {candidates[0]}"), sentence)
        out.append(candidates[0])
    return out


def is_ignored(box: dict[str, Any]) -> bool:
    """Whether a box of `gtboxes` is none that a detector has to find."""
    return not _is_person(box) or _ignore_flag(box) is True


def _is_person(box: dict[str, Any]) -> bool:
    return str(box.get("tag")).strip().casefold() == PERSON


def _ignore_flag(box: dict[str, Any]) -> bool | None:
    """None: what `extra` says is neither yes nor no."""
    extra = box.get("extra")
    if isinstance(extra, dict):
        return flag(extra.get("ignore"))
    return False if extra is None else None


def _lines(file: Path, faults: Faults) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, its object) of an .odgt file."""
    line_of_id: dict[str, int] = {}
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number, text in enumerate(stream, start=1):
                if not text.strip():
                    continue
                row, fault = _row(text)
                if row is None:
                    sentence = f"line {number} of {file} {fault}; correct it"
                    faults.refuse(f"lines that cannot be read: {fault}", Place(str(file), number), sentence)
                elif row["ID"] in line_of_id:
                    sentence = f"line {number} of {file} has the ID of line {line_of_id[row['ID']]}; remove one of them"
                    faults.refuse("lines whose ID was there before", Place(str(file), number), sentence)
                else:
                    line_of_id[row["ID"]] = number
                    yield number, row
    except OSError as error:
        raise UserError(f"cannot read the annotation file {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the annotation file {file} is not text: {error}") from error


def _row(text: str) -> tuple[dict[str, Any] | None, str]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None, "is not JSON"
    if not isinstance(row, dict):
        return None, "has no usable 'ID'"
    if type(row.get("ID")) is int:
        row["ID"] = str(row["ID"])
    if not isinstance(row.get("ID"), str) or not row["ID"].strip() or "/" in row["ID"] or has_control(row["ID"]):
        return None, "has no usable 'ID'"
    boxes = row.get("gtboxes")
    if not isinstance(boxes, list) or not all(isinstance(box, dict) for box in boxes):
        return None, "has no list 'gtboxes'"
    return row, ""


def _corners(boxes: list[tuple[int, int, dict[str, Any]]], key: str) -> np.ndarray:
    return corners(numbers([box.get(key) for _, _, box in boxes], (4,)))


def _read(source: SplitSource, names: list[str], split: str, faults: Faults) -> DetectionData:
    return read_crowdhuman(source.images[0], source.annotations[0], names, split, faults)


def write_crowdhuman(data: DetectionData, files: Sequence[str], folder: Path) -> dict[str, str]:
    """annotation_<split>.odgt for images Images/<file>; the box is `fbox`, as annotated."""
    boxes = data.boxes if data.unclipped is None else data.unclipped
    columns = {"fbox": boxes, "vbox": data.visible, "hbox": data.head_boxes}
    hard = np.zeros(len(boxes), bool) if data.difficult is None else data.difficult
    lines = []
    for i, file in enumerate(files):
        gtboxes: list[dict[str, Any]] = []
        for row in range(int(data.offsets[i]), int(data.offsets[i + 1])):
            ignore = bool(data.crowd[row])
            box: dict[str, Any] = {"tag": MASK if ignore and not hard[row] else PERSON}
            for key, column in columns.items():
                if column is not None and np.isfinite(column[row]).all():
                    x1, y1, x2, y2 = column[row].tolist()
                    box[key] = [round(v, 9) for v in (x1, y1, x2 - x1, y2 - y1)]
            gtboxes.append(box | {"extra": {"box_id": len(gtboxes), "ignore": int(ignore)}})
        lines.append(json.dumps({"ID": Path(file).stem, "gtboxes": gtboxes}) + "\n")
    (folder / f"annotation_{data.split}.odgt").write_text("".join(lines), encoding="utf-8")
    return {"images": "Images", "annotations": f"annotation_{data.split}.odgt"}


CROWDHUMAN = Format(
    _read,
    write_crowdhuman,
    names=(PERSON,),
    image_folder="Images",
    one_folder=True,
    keeps=frozenset({"regions", "difficult", "unclipped", "visible", "heads"}),
    most_classes=1,
    says_sizes=False,
)
