"""YOLO text labels, as Ultralytics lays them out: read into arrays, and written.

A line is `class x y w h`: the class as an index, center and size as fractions of the image. Of a polygon
(`class x1 y1 x2 y2 x3 y3 ...`, an oriented box too) the box around it counts, and its points are the mask where masks are
asked for; a score behind it is left out, and so
are key points where the data YAML announces them. An image without a label file has no object.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yoloxkd.data.box_table import UNKNOWN, BoxTable, ImageColumns, check_corner_order
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.format import Format, SplitSource
from yoloxkd.data.formats.yolo_lines import OddLines
from yoloxkd.data.io.find_images import beside, images_of, labels_folder
from yoloxkd.data.io.images import measure_images
from yoloxkd.data.io.packed_strings import Strings
from yoloxkd.data.io.text_files import decode_text
from yoloxkd.data.io.threads import in_threads
from yoloxkd.data.mask_table import MaskBuilder, MaskTable
from yoloxkd.data.problems import Faults, Place
from yoloxkd.errors import UserError
from yoloxkd.instance_masks import as_one_polygon, decode_rle, mask_polygons, one_outline, segment_line

_TOO_LARGE = 2.0
"""A coordinate beyond this is no fraction of an image that a box may stick out of: it is in pixels."""


def read_yolo(
    images: Sequence[Path],
    labels: Path | None,
    names: list[str],
    split: str,
    root: Path,
    faults: Faults | None = None,
    key_points: tuple[int, int] | None = None,
    masks: bool = False,
) -> DetectionData:
    """One split from image folders or list files and the label files that belong to the images.

    labels  folder of the label files, laid out as the image folder; None: beside the images, where the last folder
            `images` of a path becomes `labels`, as Ultralytics has it
    key_points  [how many, 2 or 3 numbers each] that follow the box on a line; they are not read
    masks  keep the polygons as instance masks
    Sizes come from the images. Lines that cannot be used are dropped and counted with file and line.
    UserError: a place is missing, no image has a label file, the lines have key points that nobody announced, an image is
    missing or broken.
    """
    faults = Faults() if faults is None else faults
    paths = images_of(images, root, faults)
    sizes, good = measure_images(paths, str(images[0]), faults)
    files = beside([_label_place(path, images, labels) for path in paths], ".txt")
    _refuse_shared_files(paths, files, faults)
    if faults.gather:
        _count_orphans(files, faults)
    usable = np.flatnonzero(good).tolist()
    paths, files, sizes = [paths[i] for i in usable], [files[i] for i in usable], sizes[good]
    texts = in_threads(_text, files)
    if paths and all(text is None for text in texts):
        raise UserError(
            f"none of the {len(paths)} images of '{split}' has a label file; looked for {files[0]} and the like: "
            "put the labels there, or name their folder as 'labels' in the data YAML"
        )
    faults.images_without_file += sum(text is None for text in texts)
    rows = _Rows(faults, key_points, sizes if masks else None)
    for image, (file, text) in enumerate(zip(files, texts, strict=True)):
        if text:
            rows.add(image, file, text)
    image_columns = ImageColumns(np.arange(1, len(paths) + 1), Strings(paths), sizes)
    return rows.table(sizes, len(names), files).finish(names, split, image_columns, faults, "yolo")


def _label_place(image: str, places: Sequence[Path], labels: Path | None) -> tuple[str, str]:
    """Folder and stem of the label file of an image."""
    file = Path(image)
    if labels is None:
        return str(labels_folder(file.parent)), file.stem
    folder = next((place for place in places if place in file.parents), file.parent)
    return str(labels / file.relative_to(folder).parent), file.stem


def _refuse_shared_files(paths: Sequence[str], files: Sequence[str], faults: Faults) -> None:
    """Refuse two images with one label file: it is not said whose boxes those are."""
    first: dict[str, str] = {}
    for path, file in zip(paths, files, strict=True):
        other = first.setdefault(file, path)
        if other != path and Path(file).exists():
            sentence = f"{other} and {path} have one label file, {file}; rename one image and give it labels of its own"
            faults.refuse("images that share their label file", Place(path, note=f"with {other}"), sentence)


def _text(file: str) -> str | None:
    try:
        return decode_text(Path(file).read_bytes(), f"the label file {file}")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read the label file {file}: {error.strerror or error}") from error


def _count_orphans(files: Sequence[str], faults: Faults) -> None:
    """Count the label files that belong to no image, beside those of the images."""
    expected = set(files)
    for folder in sorted({Path(file).parent for file in files}):
        there = sorted(str(p) for p in folder.glob("*") if p.suffix.lower() == ".txt" and not p.name.startswith("."))
        orphans = [Place(file) for file in there if file not in expected and Path(file).name.lower() != "classes.txt"]
        faults.add("label files without an image", orphans)


class _Rows:
    """The lines of the label files, gathered file by file."""

    def __init__(self, faults: Faults, key_points: tuple[int, int] | None, mask_sizes: np.ndarray | None) -> None:
        """mask_sizes (N, 2) height and width px of the images, where masks are wanted."""
        self.faults, self.mask_sizes, self.masks = faults, mask_sizes, MaskBuilder()
        self.odd, self.total = OddLines(faults, key_points), 0
        self.values: list[np.ndarray] = []
        self.images: list[np.ndarray] = []
        self.lines: list[np.ndarray] = []

    def add(self, image: int, file: str, text: str) -> None:
        rows = text.splitlines()
        parts = text.split()
        values: np.ndarray
        try:
            values = np.array(parts, np.float64).reshape(-1, 5)
            lines = np.arange(1, len(values) + 1)
            plain = len(values) == len(rows) and all(len(row.split()) == 5 for row in rows)
        except ValueError:
            plain = False
        polygons: list[np.ndarray | None] = [None] * len(values) if plain else []
        if not plain:
            values, lines = self._line_by_line(file, rows, polygons)
        if self.mask_sizes is not None:
            scale = self.mask_sizes[image][::-1]
            self.masks.add([None if points is None else (points * scale).ravel().tolist() for points in polygons])
        self.total += sum(bool(row.strip()) for row in rows)
        self.values.append(values)
        self.lines.append(lines)
        self.images.append(np.full(len(values), image))

    def _line_by_line(
        self, file: str, rows: Sequence[str], polygons: list[np.ndarray | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values and lines of a file that holds anything else than five numbers a line; `polygons` gets theirs."""
        values, lines = [], []
        for number, row in enumerate(rows, start=1):
            if not row.strip():
                continue
            box = self.odd.box(row.split(), Place(file, number))
            if box is None:
                continue
            values.append(box)
            polygons.append(self.odd.polygon)
            lines.append(number)
        return np.array(values).reshape(-1, 5), np.array(lines, np.int64)

    def table(self, sizes: np.ndarray, classes: int, files: Sequence[str]) -> BoxTable:
        self.odd.finish(self.total)
        values = np.concatenate([np.zeros((0, 5)), *self.values])
        image = np.concatenate([np.zeros(0, np.int64), *self.images]).astype(np.int64)
        center, half = values[:, 1:3], values[:, 3:5] / 2
        scale = sizes[image][:, [1, 0, 1, 0]].astype(np.float64) if len(image) else np.zeros((0, 4))
        in_names = np.isin(values[:, 0], np.arange(classes))
        none = np.zeros(len(values), bool)
        with np.errstate(over="ignore", invalid="ignore"):
            boxes = np.concatenate([center - half, center + half], axis=1) * scale
        table = BoxTable(
            image=image,
            label=np.where(in_names, values[:, 0], UNKNOWN).astype(np.int64),
            boxes=boxes,
            ignore=none,
            difficult=none,
            line=np.concatenate([np.zeros(0, np.int64), *self.lines]).astype(np.int64),
            files=files,
            file=image,
        )
        if self.mask_sizes is not None:
            table.take_masks(self.masks, self.faults)
        in_pixels = np.nan_to_num(np.abs(values[:, 1:]).max(1, initial=0)) > _TOO_LARGE
        table.drop(in_pixels, "whose values are not fractions of the image (0 to 1)", self.faults)
        check_corner_order(table, values[:, 1:] * scale, sizes, "[x center, y center, width, height]", self.faults)
        return table


def _read(source: SplitSource, names: list[str], split: str, faults: Faults) -> DetectionData:
    labels = source.annotations[0] if source.annotations else None
    return read_yolo(source.images, labels, names, split, source.root, faults, source.key_points, source.masks)


def write_yolo(data: DetectionData, files: Sequence[str], folder: Path) -> str:
    """A label file under labels/<split> for each image images/<split>/<file>; what is to be ignored is left out.

    With masks a line is the object's one polygon (`one_outline`), that of its box where it has none.
    """
    labels = folder / "labels" / data.split
    labels.mkdir(parents=True, exist_ok=True)
    scale = data.sizes[:, [1, 0]].astype(np.float64)
    for i, file in enumerate(files):
        boxes, classes, crowd = data.annotations(i)
        if data.masks is not None:
            text = _segments(data, i, data.masks)
            (labels / file).with_suffix(".txt").write_text(text, encoding="utf-8")
            continue
        low, high = boxes[:, :2] / scale[i], boxes[:, 2:] / scale[i]
        values = np.concatenate([(low + high) / 2, high - low], axis=1)[~crowd].tolist()
        rows = zip(classes[~crowd].tolist(), values, strict=True)
        text = "".join(f"{label} {' '.join(repr(v) for v in row)}\n" for label, row in rows)
        (labels / file).with_suffix(".txt").write_text(text, encoding="utf-8")
    return f"images/{data.split}"


def _segments(data: DetectionData, index: int, masks: MaskTable) -> str:
    """The lines of an image whose objects have masks."""
    height, width = data.sizes[index].tolist()
    lines = []
    for row in range(int(data.offsets[index]), int(data.offsets[index + 1])):
        if data.crowd[row]:
            continue
        x1, y1, x2, y2 = data.boxes[row].tolist()
        outline = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
        if counts := masks.counts(row):
            if parts := mask_polygons(decode_rle(counts, height, width)):
                outline = as_one_polygon(parts)
        elif parts := masks.polygons(row):
            outline = one_outline(parts, height, width)
        lines.append(segment_line(int(data.labels[row]), outline, height, width))
    return "".join(lines)


YOLO = Format(
    _read,
    write_yolo,
    required=("images",),
    optional=("labels",),
    several=("images",),
    keeps=frozenset({"masks", "names"}),
    says_sizes=False,
)
