"""Round trips between the four formats, and what each says it cannot hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from yoloxkd.data import FORMATS
from yoloxkd.data.convert import convert_data
from yoloxkd.data.data_spec import DataSpec, find_data, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.errors import UserError

NAMES = ["person", "dog & cat"]


def rich_set(folder: Path, names: list[str] = NAMES) -> DataSpec:
    """COCO data with everything the record can hold: crowd, difficult, areas, boxes beyond the border, visible, heads."""
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        (folder / split).mkdir(parents=True)
        images, rows = [], []
        for i in range(count):
            size = (37 + i, 61)
            assert cv2.imwrite(str(folder / split / f"{i}.png"), random.integers(0, 255, (*size, 3), np.uint8))
            images.append({"id": 10 * i + 3, "file_name": f"{i}.png", "height": size[0], "width": size[1]})
            for _ in range(3 * (i % 3)):
                x, y, w, h = random.uniform((-3, 0, 5, 5), (40, 20, 30, 15)).round(2).tolist()
                row: dict[str, Any] = {"id": len(rows) + 5, "image_id": 10 * i + 3, "bbox": [x, y, w, h]}
                row |= {"category_id": 7 + 2 * int(random.integers(len(names))), "area": round(w * h * 0.7, 2)}
                rows.append(row | {"vbox": [x + 1, y + 1, 3.5, 3], "hbox": [x, y, 2, 2.25]})
        rows[0]["iscrowd"], rows[1]["ignore"] = 1, 1
        rows[2]["bbox"] = [-2.5, 3, 20, 10]
        del rows[2]["hbox"]
        categories = [{"id": 7 + 2 * k, "name": name} for k, name in enumerate(names)]
        content = {"images": images, "annotations": rows, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
    lines = [f"{s}: {{images: {s}, annotations: {s}.json}}" for s in ("train", "val")]
    (folder / "set.yaml").write_text("\n".join([f"names: {json.dumps(names)}", *lines]))
    return find_data(folder / "set.yaml")


def same(a: np.ndarray | None, b: np.ndarray | None, atol: float = 1e-9) -> None:
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def by_name(data: DetectionData) -> DetectionData:
    assert [Path(p).stem for p in data.paths] == sorted(Path(p).stem for p in data.paths)
    return data


@pytest.mark.parametrize("there", [name for name in sorted(FORMATS) if FORMATS[name].write])
def test_there_and_back(tmp_path: Path, there: str) -> None:
    spec = rich_set(tmp_path / "source", NAMES if there != "crowdhuman" else ["person"])
    one = convert_data(spec, there, tmp_path / "there")
    middle = find_data(one.yaml)
    assert middle.format == there
    back = find_data(convert_data(middle, "coco", tmp_path / "back").yaml)
    keeps = FORMATS[there].keeps
    for split in ("train", "val"):
        before, after = load_split(spec, split), by_name(load_split(back, split))
        kept = (
            ~before.crowd if "difficult" not in keeps and "regions" not in keeps else np.ones(len(before.boxes), bool)
        )
        before = before.take(kept)
        assert before.names == after.names
        same(before.sizes, after.sizes)
        same(before.boxes, after.boxes)
        same(before.labels, after.labels)
        same(before.offsets, after.offsets)
        same(before.crowd, after.crowd)
        if "regions" in keeps:
            same(before.difficult, after.difficult)
        for feature, name in (("unclipped", "unclipped"), ("visible", "visible"), ("heads", "head_boxes")):
            if feature in keeps:
                same(getattr(before, name), getattr(after, name))
        if "areas" in keeps:
            same(before.areas, after.areas)
            same(before.annotation_ids, after.annotation_ids)
            assert before.categories() == after.categories()
            assert before.image_ids.tolist() == after.image_ids.tolist()
        for i in range(len(before)):
            np.testing.assert_array_equal(before.read(i), after.read(i))


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    spec = rich_set(tmp_path / "source")
    said = {to: "\n".join(convert_data(spec, to, tmp_path / to).lines) for to in ("coco", "yolo", "voc")}
    assert "; lost:" not in said["coco"]
    for part in (
        "ignore regions (they become background)",
        "difficult objects",
        "areas",
        "visible",
        "head boxes",
        "cut",
    ):
        assert part in said["yolo"]
    assert "ignore regions (written as difficult objects)" in said["voc"]
    assert "difficult objects to ignore" not in said["voc"]


def test_a_yolo_set_is_laid_out_as_ultralytics_reads_it(tmp_path: Path) -> None:
    convert_data(rich_set(tmp_path / "source"), "yolo", tmp_path / "out")
    content = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())
    assert content == {"train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES))}
    labels = {p.stem for p in (tmp_path / "out" / "labels" / "train").iterdir()}
    assert labels == {p.stem for p in (tmp_path / "out" / "images" / "train").iterdir()}


def test_one_class_alone_and_links(tmp_path: Path) -> None:
    spec = rich_set(tmp_path / "source")
    with pytest.raises(UserError, match=r"holds one class, and .* has 2: choose one with --classes"):
        convert_data(spec, "crowdhuman", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    made = find_data(convert_data(spec, "crowdhuman", tmp_path / "out", ["dog & cat"], link=True).yaml)
    before, after = load_split(spec, "train"), load_split(made, "train")
    same(before.boxes[before.labels == 1], after.boxes)
    assert (tmp_path / "out" / "Images" / "0.png").is_symlink()
    # both splits have an image 0.png, and share one folder
    assert (tmp_path / "out" / "Images" / "0-2.png").is_symlink()


@pytest.mark.parametrize("to", ["yolo", "coco"])
def test_a_turned_image_keeps_its_boxes(tmp_path: Path, to: str) -> None:
    """Boxes of the image as stored, which EXIF would turn by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[4:12, 20:36] = 250
    Image.fromarray(pixels).save(tmp_path / "in" / "a.jpg", exif=exif, quality=95)
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [20, 4, 16, 8]}
    image = {"id": 1, "file_name": "a.jpg", "height": 24, "width": 40}
    content = {"images": [image], "annotations": [row], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "set.yaml").write_text("names: [x]\ntrain: {images: in, annotations: a.json}")
    made = find_data(convert_data(find_data(tmp_path / "set.yaml"), to, tmp_path / "out").yaml)
    data = load_split(made, "train")
    assert data.read(0)[6:10, 24:32].min() > 200
    np.testing.assert_allclose(data.boxes, [[20, 4, 36, 12]])


def test_mistakes(tmp_path: Path) -> None:
    spec = rich_set(tmp_path / "source")
    with pytest.raises(UserError, match="unknown format 'vok'; did you mean 'voc'"):
        convert_data(spec, "vok", tmp_path / "out")
    with pytest.raises(UserError, match="no class 'cow'"):
        convert_data(spec, "voc", tmp_path / "out", ["cow"])
    with pytest.raises(UserError, match="is there already"):
        convert_data(spec, "voc", tmp_path / "source")
    (tmp_path / "source" / "val.json").write_text("{}")
    with pytest.raises(UserError, match="COCO format"):
        convert_data(spec, "voc", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
