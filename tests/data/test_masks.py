"""Instance masks of a data set: read, kept small, carried through augmentation, written."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from yoloxkd.config.augment import Augment
from yoloxkd.data.check import check_data
from yoloxkd.data.convert import convert_data
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.fingerprint import changed, fingerprint
from yoloxkd.data.loader import Collate, train_loader
from yoloxkd.data.mask_table import MaskBuilder
from yoloxkd.data.samples import TrainSamples
from yoloxkd.data.stats import split_stats
from yoloxkd.instance_masks import decode_rle, encode_rle, rasterize_polygons, rle_dict
from yoloxkd.viz.data_sheet import draw_samples

STAR = np.array([[20, 2], [26, 16], [38, 18], [28, 26], [32, 40], [20, 32], [8, 40], [12, 26], [2, 18], [14, 16.0]])
SIZES = [(120, 160), (160, 110), (96, 96), (140, 200)]


def ring(h: int, w: int) -> np.ndarray:
    mask = np.zeros((h, w), np.uint8)
    cv2.circle(mask, (w // 2, h // 2), 30, 1, -1)
    cv2.circle(mask, (w // 2, h // 2), 12, 0, -1)
    return mask.astype(bool)


def write_masks(folder: Path) -> Path:
    """Four black images on which exactly the annotated pixels are white: stars (polygons), rings (run lengths), a crowd."""
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, (h, w) in enumerate(SIZES, start=1):
        if number % 2:
            points = STAR * (w / 45, h / 45) + (3, 2)
            mask = rasterize_polygons([points], h, w)
            segmentation: Any = [points.ravel().tolist()]
        else:
            mask = ring(h, w)
            segmentation = rle_dict(mask)
            if number == 4:
                segmentation["counts"] = runs(mask)
        ys, xs = np.nonzero(mask)
        box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
        cv2.imwrite(str(folder / "images" / f"{number}.png"), np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255)
        images.append({"id": number, "file_name": f"{number}.png", "height": h, "width": w})
        row = {"id": number, "image_id": number, "category_id": 1, "bbox": box, "area": int(mask.sum())}
        rows.append(row | {"iscrowd": int(number == 2), "segmentation": segmentation})
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "set.yaml").write_text("names: [thing]\ntrain: {images: images, annotations: train.json}\n")
    return folder / "set.yaml"


def runs(mask: np.ndarray) -> list[int]:
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    return [int(v) for v in np.diff([0, *ends, flat.size])]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masks(tmp_path_factory.mktemp("masks"))


def read(masked: Path) -> DetectionData:
    return load_split(find_data(masked), "train", masks=True)


PLAIN = {"mosaic": 0.0, "mixup": 0.0, "flip": 0.0, "hsv_prob": 0.0}
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "letterbox": (128, PLAIN),
    "flip": (128, PLAIN | {"flip": 1.0}),
    "resize": ((100, 180), PLAIN | {"flip": 0.5, "multiscale": 0}),
    "mosaic": (160, PLAIN | {"mosaic": 1.0, "degrees": 25.0, "shear": 8.0, "scale": (0.6, 1.5), "flip": 0.5}),
    "mixup": (160, PLAIN | {"mosaic": 1.0, "mixup": 1.0, "degrees": 25.0, "flip": 0.5}),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_painted_masks_are_the_warped_pixels(masked: Path, way: str) -> None:
    """What is annotated is white on the images, so the augmented image shows where the masks should be."""
    imgsz, keys = WAYS[way]
    samples = TrainSamples(read(masked), imgsz, Augment(**keys), seed=1, pad_value=(0, 0, 0))
    shared = every = crowds = 0
    for epoch in range(1 if way in ("letterbox", "flip") else 6):
        taken = [samples[epoch, index, True] for index in range(4)]
        batch = Collate(32, (0, 0, 0), masks=True)(taken)
        targets = batch.targets  # type: ignore[union-attr]
        assert targets.masks is not None
        assert targets.masks.shape == (4, targets.boxes.shape[1], *batch.images.shape[2:])  # type: ignore[union-attr]
        assert not targets.masks[~(targets.mask | targets.ignore)].any()
        crowds += int(targets.masks[targets.ignore].flatten(1).any(1).sum())
        for image, masks, boxes in zip(batch.images, targets.masks, targets.boxes, strict=True):  # type: ignore[union-attr]
            white = image[0].numpy() > (60 if way == "mixup" else 127)
            painted, near = masks.any(0).numpy(), np.zeros_like(white)
            for x1, y1, x2, y2 in boxes.round().int().tolist():  # an object that cutting left too little of has no box
                near[max(y1, 0) : y2, max(x1, 0) : x2] = True
            shared += int((white & painted & near).sum())
            every += int(((white | painted) & near).sum())
            assert painted.sum() <= (painted & near).sum() + 60
    assert shared > 0.95 * every > 1000
    assert crowds


@pytest.mark.parametrize("image", ["1", "2"])
def test_a_resumed_run_notices_other_masks_in_the_same_boxes(masked: Path, image: str, tmp_path: Path) -> None:
    """Of image 1, polygons; of image 2, run lengths. Who reads no masks sees the same data."""
    copy = shutil.copytree(masked.parent, tmp_path / "copy") / masked.name
    file = copy.parent / "train.json"
    content = json.loads(file.read_text())
    row = content["annotations"][int(image) - 1]
    x, y, w, h = row["bbox"]
    if image == "1":
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
    else:
        mask = np.zeros(row["segmentation"]["size"], bool)
        mask[y : y + h, x : x + w] = True
        row["segmentation"] = rle_dict(mask)
    file.write_text(json.dumps(content))
    before, now = fingerprint(read(masked)), fingerprint(read(copy))
    assert changed(before, now) == "other annotations or image files, as many as before"
    before, now = (fingerprint(load_split(find_data(yaml), "train")) for yaml in (masked, copy))
    assert changed(before, now) == ""


def test_masks_are_there_when_asked_for_alone(masked: Path) -> None:
    assert load_split(find_data(masked), "train").masks is None
    loader = train_loader(read(masked), imgsz=64, batch=2, augment=Augment(**PLAIN), seed=0)
    assert next(iter(loader)).targets.masks is None
    asked = train_loader(read(masked), imgsz=64, batch=2, augment=Augment(**PLAIN), seed=0, masks=True)
    batch = next(iter(asked))
    assert batch.targets.masks is not None
    assert batch.targets.masks.flatten(2).any(2).sum() == 2


def test_a_mask_is_its_polygons_or_its_run_lengths(masked: Path) -> None:
    data = read(masked)
    assert data.masks is not None
    assert data.masks.there().all()
    assert np.array_equal(data.masks.polygons(0)[0], (STAR * (160 / 45, 120 / 45) + (3, 2)).round(3))
    assert np.array_equal(decode_rle(data.masks.counts(3), *SIZES[3]), ring(*SIZES[3]))
    assert np.abs(data.masks.extents() - data.boxes).max() < 1.2  # a star's tip covers no pixel's center
    some = data.take(np.array([False, True, False, True]))
    assert some.masks is not None
    assert some.masks.counts(1) == data.masks.counts(3)
    assert len(data.masks[np.array([2, 0])].polygons(0)) == 1
    assert len(data.faults) == 0
    assert split_stats(data).masks == 4
    report = check_data(find_data(masked))[0]
    assert (report.masks, report.faults.breaking) == (4, set())


def test_samples_show_masks(masked: Path, tmp_path: Path) -> None:
    """The images are black and white, so what has a color is drawn."""
    colored = []
    for number, masks in enumerate((False, True)):
        data = load_split(find_data(masked), "train", masks=masks)
        sheet = cv2.imread(str(draw_samples(data, tmp_path / f"{number}.png"))).astype(int)
        colored.append(int((np.ptp(sheet, axis=2) > 60).sum()))
    assert colored[1] > 3 * colored[0]


def test_what_is_wrong_with_masks_is_counted(masked: Path, tmp_path: Path) -> None:
    content = json.loads((masked.parent / "train.json").read_text())
    box = content["annotations"][0]["bbox"]
    odd: list[Any] = [
        [[1, 1, 5, 5], content["annotations"][0]["segmentation"][0]],
        {"size": [9, 9], "counts": encode_rle(np.ones((9, 9), bool)).decode()},
        {"size": [120, 160], "counts": [7]},
        "mask",
        [[1, 2, 3, 4, 5, "x"]],
        [[0, 0, 4, 0, 4, 4]],
        [],
    ]
    content["annotations"] = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [box[0] + i, *box[1:]], "segmentation": one}
        for i, one in enumerate(odd)
    ]
    (tmp_path / "train.json").write_text(json.dumps(content))
    images = masked.parent / "images"
    (tmp_path / "set.yaml").write_text(f"names: [thing]\ntrain: {{images: {images}, annotations: train.json}}\n")
    data = load_split(find_data(tmp_path / "set.yaml"), "train", masks=True)
    assert data.masks is not None
    assert data.masks.there().tolist() == [True, False, False, False, False, True, False]
    assert {kind.split(",")[0]: count for kind, count in data.faults.counts.items()} == {
        "polygons of fewer than three points": 1,
        "masks that are neither polygons nor run lengths": 3,
        "masks whose run lengths are of another size than the image": 1,
        "masks that do not agree with their box (kept)": 1,
        "objects without a mask": 5,
    }
    assert "annotation 3" in str(data.faults.examples["masks that are neither polygons nor run lengths, left out"][1])


def test_yolo_segments_give_the_same_pixels(masked: Path, tmp_path: Path) -> None:
    """COCO to YOLO and back: polygons, rings with their hole, all in one polygon a line; the crowd is lost and said so."""
    lines = convert_data(find_data(masked), "yolo", tmp_path / "yolo").lines
    assert "1 ignore regions" in lines[0]
    assert "masks" not in lines[0]
    convert_data(find_data(tmp_path / "yolo" / "data.yaml"), "coco", tmp_path / "coco")
    before, after = read(masked), load_split(find_data(tmp_path / "coco" / "data.yaml"), "train", masks=True)
    assert before.masks is not None
    assert after.masks is not None
    assert np.array_equal(after.masks.polygons(0)[0], before.masks.polygons(0)[0])
    for index in (0, 2, 3):
        row = int(after.offsets[index])
        found = rasterize_polygons(after.masks.polygons(row), *SIZES[index])
        parts = before.masks.polygons(index)
        wanted = rasterize_polygons(parts, *SIZES[index]) if parts else ring(*SIZES[index])
        assert np.array_equal(found, wanted)
        assert np.abs(after.boxes[row] - before.boxes[index]).max() < 1.2
    assert "4 instance masks" in convert_data(find_data(masked), "voc", tmp_path / "voc").lines[0]


def test_masks_of_a_large_set_are_small() -> None:
    """A part of 120,000 images with COCO's 7.3 objects an image and outlines as long as COCO's."""
    images, parts_of_all = 120_000, 200
    rng = np.random.default_rng(0)
    rows = [[rng.uniform(0, 640, 2 * int(n)).round(2).tolist()] for n in rng.integers(6, 66, 400)]
    tracemalloc.start()
    builder = MaskBuilder()
    for _ in range(0, int(7.3 * images / parts_of_all), 400):
        builder.add(rows)
    table = builder.table()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table) * parts_of_all > 7 * images
    assert table.nbytes * parts_of_all < 0.5e9
    assert peak * parts_of_all < 2e9
