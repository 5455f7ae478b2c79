"""Evaluation: back to the original image, classes by name, and the published numbers on real images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.data.test_masks import write_masks
from tests.engine.scenes import scene
from tests.exporters.tiny import TinyDetector
from yoloxkd.cli.run_tables import metrics_table, write_detections
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.coco import read_coco
from yoloxkd.data.formats.crowdhuman import read_crowdhuman
from yoloxkd.data.loader import eval_loader
from yoloxkd.data.samples import letterboxed
from yoloxkd.engine.evaluate import TorchPredictor, evaluate
from yoloxkd.engine.events import BestEpoch
from yoloxkd.errors import UserError
from yoloxkd.metrics.measure import check_choice
from yoloxkd.nn.dense.yolox import YOLOX
from yoloxkd.types import Detections, ImageMeta


class Oracle:
    """Knows the ground truth: finds every object of a data set, in px of the input it is shown."""

    stride, pad_value = 32, (114, 114, 114)

    def __init__(self, data: DetectionData, imgsz: int, names: list[str]) -> None:
        self.data, self.imgsz, self.names, self.at = data, imgsz, names, 0

    def __call__(self, images: torch.Tensor) -> list[Detections]:
        found = []
        for _ in images:
            boxes, labels, _ = self.data.annotations(self.at)
            height, width = self.data.sizes[self.at]
            scale = min(self.imgsz / height, self.imgsz / width)
            known = [i for i, k in enumerate(labels) if self.data.names[k] in self.names]
            mine = np.array([self.names.index(self.data.names[k]) for k in labels[known]], dtype=np.int64)
            found.append(Detections(boxes[known] * scale, np.ones(len(known), np.float32), mine, self.names))
            self.at += 1
        return found


@pytest.mark.parametrize("size", [(90, 120), (130, 70), (64, 64)])
def test_the_truth_scores_one_on_any_shape_of_image(tmp_path: Path, size: tuple[int, int]) -> None:
    data = scene(tmp_path, size=size)
    result = evaluate(Oracle(data, 96, data.names), eval_loader(data, imgsz=96, batch=3), data)
    assert result.metrics["AP"] == pytest.approx(1.0)
    assert result.images == 4


def test_classes_are_matched_by_name_whatever_their_order(tmp_path: Path) -> None:
    data = scene(tmp_path, images=6, names=("red", "blue", "green"))
    model = ["green", "person", "blue", "red"]
    result = evaluate(Oracle(data, 96, model), eval_loader(data, imgsz=96, batch=2), data)
    assert result.metrics["AP"] == pytest.approx(1.0)


def test_a_class_the_model_lacks_is_never_found_and_a_foreign_one_is_dropped(tmp_path: Path) -> None:
    data = scene(tmp_path, images=8, names=("red", "blue"))

    class Foreign(Oracle):
        """Finds as well, everywhere, a thing the data set does not know."""

        def __call__(self, images: torch.Tensor) -> list[Detections]:
            return [
                Detections(
                    np.concatenate([d.boxes, [[0, 0, 50, 50]]]),
                    np.concatenate([d.scores, [1.0]]),
                    np.concatenate([d.labels, [1]]),
                    d.names,
                )
                for d in super().__call__(images)
            ]

    result = evaluate(Foreign(data, 96, ["red", "person"]), eval_loader(data, imgsz=96, batch=2), data)
    assert result.metrics["per_class"]["red"]["AP"] == pytest.approx(1.0)
    assert result.metrics["per_class"]["blue"]["AP"] == 0.0
    assert set(result.detections.labels.tolist()) == {0}


def test_no_class_in_common_shows_both_lists(tmp_path: Path) -> None:
    data = scene(tmp_path)
    with pytest.raises(UserError, match="knows RBC, WBC, the data set has red, blue"):
        evaluate(Oracle(data, 96, ["RBC", "WBC"]), eval_loader(data, imgsz=96, batch=2), data)


def test_only_the_images_of_the_loader_count(tmp_path: Path) -> None:
    data = scene(tmp_path)
    result = evaluate(Oracle(data, 96, data.names), list(eval_loader(data, imgsz=96, batch=2))[:1], data)
    assert result.images == 2
    assert result.metrics["AR100"] == pytest.approx(1.0)


def test_no_detections_score_zero(tmp_path: Path) -> None:
    data = scene(tmp_path)
    blind = TorchPredictor(TinyDetector(data.names, bias=-50.0), conf=0.5)
    result = evaluate(blind, eval_loader(data, imgsz=96, batch=2), data, backend="pycocotools")
    assert len(result.detections) == 0
    assert result.metrics["AP"] == 0.0
    assert result.coco_results() == []


def test_boxes_go_back_to_the_original_and_stay_inside() -> None:
    meta = ImageMeta(1, "", height=50, width=100, scale=0.5, left=4.0, top=8.0)
    found = Detections(np.array([[4, 8, 54, 33], [-90, 0, 900, 900]], np.float32), np.ones(2), np.zeros(2, int))
    assert found.to_image(meta).boxes.tolist() == [[0, 0, 100, 50], [0, 0, 100, 50]]


def test_results_are_in_the_format_of_coco(tmp_path: Path) -> None:
    data = scene(tmp_path, images=1)
    result = evaluate(Oracle(data, 120, data.names), eval_loader(data, imgsz=120, batch=1), data)
    x1, y1, x2, y2 = data.boxes[0].tolist()
    first = json.loads(json.dumps(result.coco_results()))[0]
    assert first == {
        "image_id": 7,
        "category_id": int(data.labels[0]) + 1,
        "bbox": pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3),
        "score": 1.0,
    }


def test_results_carry_the_file_s_own_category_ids(coco_mini: Path) -> None:
    data = coco_val(coco_mini).head(6)
    result = evaluate(Oracle(data, 96, data.names), eval_loader(data, imgsz=96, batch=3), data)
    said = json.loads((coco_mini / "annotations" / "val.json").read_text())
    name_of = {c["id"]: c["name"] for c in said["categories"]}
    found = [name_of[row["category_id"]] for row in result.coco_results()]
    assert found == [data.names[k] for k in result.detections.labels]
    assert max(row["category_id"] for row in result.coco_results()) > 80


def test_crowdhuman_data_are_measured_by_its_own_metrics(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    data = scene(tmp_path, names=("red",))
    lines = []
    for i, path in enumerate(data.paths):
        Path(path).rename(tmp_path / "Images" / f"{i}.png")
        corners, _, crowd = data.annotations(i)
        xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
        tags = ["mask" if c else "person" for c in crowd]
        boxes = [{"tag": t, "fbox": b} for t, b in zip(tags, xywh.tolist(), strict=True)]
        boxes.append({"tag": "person", "fbox": [500, 0, 9, 9]})  # nobody can find it
        lines.append(json.dumps({"ID": str(i), "gtboxes": boxes}))
    (tmp_path / "a.odgt").write_text("\n".join(lines))
    data = read_crowdhuman(tmp_path / "Images", tmp_path / "a.odgt", ["person"], "val")
    result = evaluate(Oracle(data, 120, data.names), eval_loader(data, imgsz=120, batch=2), data)
    real = int((~data.crowd).sum())
    recall = real / (real + 4)
    assert set(result.metrics) == {"AP", "MR", "JI", "per_class"}
    assert result.metrics["AP"] == pytest.approx(recall - 1 / (real + 4))  # from the first point on
    assert result.metrics["MR"] == pytest.approx(1 - recall)
    assert result.metrics["per_class"]["person"]["JI"] == result.metrics["JI"]
    assert "MR" in metrics_table(result.metrics)
    rows = [json.loads(line) for line in write_detections(tmp_path / "out", result).read_text().splitlines()]
    assert [(row["ID"], row["width"], row["height"]) for row in rows] == [(str(i), 120, 90) for i in range(4)]
    assert sum(len(row["dtboxes"]) for row in rows) == len(result.detections)


def test_every_module_is_back_in_its_own_mode() -> None:
    detector = TinyDetector(["a"]).train()
    frozen = next(m for m in detector.modules() if isinstance(m, nn.BatchNorm2d))
    frozen.eval()
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    TorchPredictor(detector)(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert detector.training
    assert detector.head.training
    assert not frozen.training
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())


def test_training_goes_on_after_a_prediction() -> None:
    detector = TinyDetector(["a"]).train()
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    TorchPredictor(detector)(images)
    detector(images).boxes.sum().backward()
    assert detector.head.weight.grad is not None


def official_nano(weights: Path, names: list[str]) -> YOLOX:
    detector = YOLOX(YOLOX.Config(depth=0.33, width=0.25, depthwise=True), names)
    detector.load_state_dict(torch.load(weights, weights_only=True)["model"])
    return detector


def coco_val(folder: Path) -> DetectionData:
    file = folder / "annotations" / "val.json"
    categories = sorted(json.loads(file.read_text())["categories"], key=lambda c: c["id"])
    return read_coco(folder / "images" / "val", file, [c["name"] for c in categories], "val")


def test_the_official_nano_weights_give_the_published_numbers(nano_weights: Path, coco_mini: Path) -> None:
    data = coco_val(coco_mini)
    predictor = TorchPredictor(official_nano(nano_weights, data.names), conf=0.01, iou=0.65)
    metrics = evaluate(predictor, eval_loader(data, imgsz=416, batch=8), data).metrics
    known = {"AP": 31.96, "AP50": 47.55, "AP75": 33.46, "APs": 10.72, "APm": 41.17, "APl": 55.01, "AR100": 41.58}
    assert {k: 100 * metrics[k] for k in known} == pytest.approx(known, abs=0.01)


@pytest.mark.parametrize("ids", [[2**62, -4, 2**53 + 1, 0], [7, 7, 7, 7]])
def test_any_ids_give_the_same_numbers_and_come_back(tmp_path: Path, ids: list[int]) -> None:
    data = scene(tmp_path)
    plain = evaluate(Oracle(data, 96, data.names), eval_loader(data, imgsz=96, batch=3), data)
    other = replace(data, image_ids=np.array(ids, np.int64), category_ids=np.array([2**60, -1]))
    result = evaluate(Oracle(other, 96, data.names), eval_loader(other, imgsz=96, batch=3), other)
    assert result.metrics == plain.metrics
    assert len(result.detections) == len(plain.detections)
    per_image = np.bincount(data.image_of_box(), minlength=4).tolist()
    assert [row["image_id"] for row in result.coco_results()] == [
        i for i, n in zip(ids, per_image, strict=True) for _ in range(n)
    ]
    assert {row["category_id"] for row in result.coco_results()} <= {2**60, -1}
    assert len(result.odgt_results()) == 4


class MaskOracle(Oracle):
    """Gives the masks of the ground truth as well, each moved by `shift` px to the right in the original image."""

    def __init__(self, data: DetectionData, imgsz: int, names: list[str], shift: int = 0) -> None:
        super().__init__(data, imgsz, names)
        self.shift = shift

    def __call__(self, images: torch.Tensor) -> list[Detections]:
        first = self.at
        found = super().__call__(images)
        for number, one in enumerate(found, start=first):
            sample = letterboxed(self.data, number, max(self.data.sizes[number].tolist()), (0, 0, 0))
            height, width = self.data.sizes[number].tolist()
            one.masks = np.zeros((len(one), height, width), bool)
            for mask, source in zip(one.masks, sample.masks or (), strict=True):
                source.paint(mask)
                mask[:] = np.roll(mask, self.shift, 1)
        return found


def test_masks_are_measured_beside_boxes(tmp_path: Path) -> None:
    data = load_split(find_data(write_masks(tmp_path)), "train", masks=True)
    result = evaluate(MaskOracle(data, 96, data.names), eval_loader(data, imgsz=96, batch=3), data)
    assert result.metrics["AP"] == pytest.approx(1.0)
    assert result.metrics["mask_AP"] == pytest.approx(1.0)
    assert result.metrics["per_class"]["thing"]["mask_AP50"] == pytest.approx(1.0)
    rows = result.coco_results()
    assert rows[0]["segmentation"]["size"] == [120, 160]
    assert "boxes" in metrics_table(result.metrics)
    assert "masks" in metrics_table(result.metrics)
    moved = evaluate(MaskOracle(data, 96, data.names, shift=12), eval_loader(data, imgsz=96, batch=3), data)
    assert moved.metrics["AP"] == pytest.approx(1.0)
    assert moved.metrics["mask_AP"] < 0.6
    best = BestEpoch.after(None, 0, result.metrics, "mask_AP")
    assert BestEpoch.after(best, 1, moved.metrics, "mask_AP").epoch == 0
    check_choice("mask_AP50", data, masks=True)
    for name, masks in (("mask_AP", False), ("MR", True), ("maskAP", True)):
        with pytest.raises(UserError, match=f"val.metric '{name}' cannot choose the best epoch here; "):
            check_choice(name, data, masks)
    boxes = evaluate(Oracle(data, 96, data.names), eval_loader(data, imgsz=96, batch=2), data)
    assert "mask_AP" not in boxes.metrics
