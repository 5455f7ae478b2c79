"""The papers' figures as arrays, against the losses and against what is counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.scenes import scene as small_data
from tests.exporters.tiny import TinyDetector as Towerless
from tests.kd.fakes import TinyDetector
from yoloxkd import explain
from yoloxkd.data.loader import eval_loader
from yoloxkd.errors import UserError
from yoloxkd.explain import Model, Scene
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.functional.importance import STRATEGIES
from yoloxkd.kd.methods.fgd import fgd_focal_terms
from yoloxkd.types import DenseOutput, Detections

NAMES = ("red", "blue")
SIZE = 128


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    return small_data(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def scene(data) -> Scene:
    return explain.load_scene(data, 1, SIZE, TinyDetector(names=NAMES))


def model(name: str, seed: int, channels: int = 6) -> Model:
    torch.manual_seed(seed)
    return Model(name, TinyDetector(channels, names=NAMES).eval())


def test_attention_distances_are_the_terms_of_the_loss(scene: Scene) -> None:
    student, teacher = model("student", 0), model("teacher", 1)
    outs = [explain.see(m, scene) for m in (student, teacher)]
    levels = [explain.attention_maps(m, out, 0.5) for m, out in zip((student, teacher), outs, strict=True)]
    assert all(level.spatial.mean() == pytest.approx(1, rel=1e-5) for own in levels for level in own)
    apart = explain.attention_distances(*levels)
    for distance, ours, theirs in zip(apart, outs[0].features, outs[1].features, strict=True):
        nothing = torch.zeros(1, *ours.shape[2:])
        loss = fgd_focal_terms(ours, theirs, nothing, nothing, 0.5)["attention"].item()
        assert distance.spatial_l1 + (distance.channel_l1 or 0) == pytest.approx(loss, rel=1e-4)
        assert -1 < distance.spatial_rank < 1
    same = explain.attention_distances(levels[1], levels[1])
    for d in same:
        assert (d.spatial_l1, d.spatial_rank, d.channel_l1, d.channel_rank) == pytest.approx((0, 1, 0, 1))


def test_other_numbers_of_channels_have_no_channel_distance(scene: Scene) -> None:
    models = model("student", 0, 4), model("teacher", 1, 6)
    levels = [explain.attention_maps(m, explain.see(m, scene), 0.5) for m in models]
    assert {(d.channel_l1, d.channel_rank) for d in explain.attention_distances(*levels)} == {(None, None)}


def test_quality_is_zero_outside_the_boxes_and_as_the_equation_says_inside(scene: Scene) -> None:
    teacher = model("teacher", 1)
    out = explain.see(teacher, scene)
    maps = explain.quality_maps(teacher, out, scene, xi=0.8)
    probability, boxes = out.cls_logits[0].sigmoid(), out.boxes[0]
    wanted = np.zeros(len(boxes))
    for box, label in zip(scene.boxes, scene.labels, strict=True):
        for cell, (x, y) in enumerate(out.grid.points.tolist()):
            if box[0] < x < box[2] and box[1] < y < box[3]:
                low, high = np.maximum(boxes[cell, :2], box[:2]), np.minimum(boxes[cell, 2:], box[2:])
                common = float((high - low).clip(0).prod())
                union = float((boxes[cell, 2:] - boxes[cell, :2]).prod()) + float((box[2:] - box[:2]).prod()) - common
                q = float(probability[cell, label]) ** 0.2 * (common / union) ** 0.8
                wanted[cell] = max(wanted[cell], q)
    assert np.concatenate([m.ravel() for m in maps.values()]) == pytest.approx(wanted, abs=1e-5)
    both = explain.over_levels(list(maps.values()))
    assert both.shape == maps[8].shape
    assert both.max() == pytest.approx(wanted.max(), abs=1e-5)


def test_foreground_weights_of_every_rule(scene: Scene) -> None:
    teacher = model("teacher", 1)
    found = {w.name: w for w in explain.foreground_weights(teacher, explain.see(teacher, scene), scene)}
    assert tuple(found) == (*STRATEGIES, "fgfi", "defeat", "tadf")
    assert found["box"].inside_share == 1
    inside = [
        sum(
            box[0] < (x + 0.5) * stride < box[2] and box[1] < (y + 0.5) * stride < box[3]
            for y in range(SIZE // stride)
            for x in range(SIZE // stride)
        )
        for box in scene.boxes
        for stride in (8, 16)
    ]
    assert sum(found["box"].cells_per_object.values()) == sum(inside) / len(scene.boxes)
    assert sum(found["gauss"].cells_per_object.values()) <= 30
    assert 0 < found["centre"].inside_share < found["box-gauss"].inside_share == 1
    assert {level.shape for level in found["fgfi"].levels.values()} == {(16, 16), (8, 8)}
    assert all(0 < max(level.max() for level in w.levels.values()) <= 1 for w in found.values())


def test_objects_that_overlap_are_counted_each_for_itself(scene: Scene) -> None:
    teacher = model("teacher", 1)
    boxes = scene.batch.targets.boxes.clone()
    boxes[0, 1] = boxes[0, 0]
    twice = replace(scene, batch=replace(scene.batch, targets=replace(scene.batch.targets, boxes=boxes)))
    (box,) = explain.foreground_weights(teacher, explain.see(teacher, twice), twice, ["box"])
    assert box.cells_per_object[8] == int((box.levels[8] > 0).sum())


@pytest.mark.parametrize("method", [m for m in DISTILLERS if m not in ("lad", "crosskd", "ld")])
def test_maps_of_every_distiller(scene: Scene, method: str) -> None:
    student, teacher = model("student", 0), model("teacher", 1)
    outs = explain.see(student, scene), explain.see(teacher, scene)
    maps = explain.distiller_maps(method, student, teacher, outs, scene)
    overridden = "maps" in vars(DISTILLERS[method])
    assert bool(maps) == overridden
    assert all(np.isfinite(values).all() and values.ndim == 2 for values in maps.values())


def test_cells_lie_on_the_image_without_its_padding(scene: Scene) -> None:
    assert scene.pixels.shape == (96, 128, 3)  # 90 x 120 px at 128
    cells = np.arange(256.0).reshape(16, 16)
    shown = scene.on_image(cells, 96, 128)
    assert shown[0, 0] == 0
    assert shown[95, 127] == cells[11, 15]


# PGD Figure 3, by hand

OVERLAPS = {5: 1.0, 6: 0.72, 9: 0.52, 10: 0.3}
"""Of the four cells inside the box (6, 6, 26, 26) at stride 8: how well each predicts it, best score first."""


class Painted(TinyDetector):
    """A detector of one level of 4x4 cells that predicts the same of every image."""

    def __init__(self) -> None:
        super().__init__(4, (8,), ("red", "blue"))

    def forward(self, images: Tensor) -> DenseOutput:
        out = super().forward(images)
        logits, boxes = torch.full_like(out.cls_logits, -20.0), torch.zeros_like(out.boxes)
        for rank, (cell, overlap) in enumerate(OVERLAPS.items()):
            logits[:, cell, 0] = 2.0 - rank / 2
            boxes[:, cell] = torch.tensor([6, 6, 26, 6 + 20 * overlap])
        return replace(out, cls_logits=logits, boxes=boxes)


def one_object(tmp_path: Path):
    data = small_data(tmp_path, images=1, size=(32, 32))
    rows = np.array([True, False])
    boxes = np.array([[6.0, 6, 26, 26], [0, 0, 1, 1]])
    return replace(
        data, boxes=boxes, labels=np.zeros(2, int), crowd=np.zeros(2, bool), areas=np.array([400.0, 1])
    ).take(rows)


def test_ap_without_the_best_predictions_by_hand(tmp_path: Path) -> None:
    data, painted = one_object(tmp_path), Model("painted", Painted().eval())
    batch = next(iter(eval_loader(data, imgsz=32, batch=1)))
    limit = explain.mask_out(painted, painted.detector(batch.images), batch.targets, batch.targets.labels)[0]
    wanted = torch.full((16,), torch.inf, dtype=torch.float64)
    for rank, cell in enumerate(OVERLAPS):
        wanted[cell] = 25.0 * rank
    assert torch.equal(limit, wanted)
    # an IoU of 0.72 is right at 5 of COCO's 10 thresholds, 0.52 at one, 0.3 at none
    wanted_ap = {0.0: 1.0, 0.1: 0.5, 25.0: 0.5, 25.1: 0.1, 100.0: 0.0}
    loader = eval_loader(data, imgsz=32, batch=1)
    found = explain.mask_out_ap(painted, loader, data, list(wanted_ap))
    assert [m["AP"] for m in found] == pytest.approx(list(wanted_ap.values()), abs=1e-6)


# PGD Figure 5


def test_detections_are_scored_by_object() -> None:
    boxes, labels = np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]]), np.array([0, 1])
    seen = Detections(
        np.array([[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]], np.float32),
        np.array([0.9, 0.8, 0.7, 0.6]),
        np.array([0, 0, 0, 1]),
    )
    score = explain.score_detections(seen, boxes, labels)
    assert score.right.tolist() == [True, False, False, False]  # a duplicate, a wrong class, nothing there
    assert score.iou.tolist() == [pytest.approx(0.9), 0]
    assert (score.false, score.missed) == (3, 1)
    nothing = explain.score_detections(seen[:0], boxes, labels)
    assert explain.most_different([[score, score], [score, nothing], [nothing, nothing]], 2) == [1, 0]


# what cannot be explained


def test_images_are_found_by_name_number_and_chance(data) -> None:
    assert explain.choose_images(data, ["2.png", "2", Path(data.paths[0]).stem], 1, 0) == [2, 0]
    drawn = explain.choose_images(data, (), 3, 5)
    assert len(set(drawn)) == 3
    assert drawn == explain.choose_images(data, (), 3, 5)
    with pytest.raises(UserError, match=r"no image 7\.png in the split"):
        explain.choose_images(data, ["7.png"], 1, 0)


def test_images_without_boxes(data) -> None:
    some = data.take(data.image_of_box() > 0)
    assert explain.choose_images(some, (), 9, 0) == [1, 2, 3]
    with pytest.raises(UserError, match=r"0\.png has no box"):
        explain.choose_images(some, ["0.png"], 1, 0)
    with pytest.raises(UserError, match="no image of the split 'val' has a box"):
        explain.choose_images(data.take(np.zeros(len(data.boxes), bool)), (), 1, 0)


def test_a_detector_without_a_head_tower(scene: Scene) -> None:
    flat = Model("flat", Towerless(list(NAMES)).eval())
    out = explain.see(flat, scene)
    assert len(explain.attention_maps(flat, out, 0.5)) == 2
    with pytest.raises(UserError, match="flat has no head tower"):
        explain.quality_maps(flat, out, scene)
    with pytest.raises(UserError, match="flat has no head tower"):
        explain.foreground_weights(flat, out, scene)


def test_a_teacher_of_no_common_class(scene: Scene, data) -> None:
    stranger = Model("stranger", TinyDetector(names=("cat", "dog")).eval())
    out = explain.see(stranger, scene)
    for draw in (
        lambda: explain.quality_maps(stranger, out, scene),
        lambda: explain.foreground_weights(stranger, out, scene),
        lambda: explain.mask_out_ap(stranger, eval_loader(data, imgsz=64, batch=2), data, [0]),
        lambda: explain.distiller_maps("fgd", model("student", 0), stranger, (out, out), scene),
    ):
        with pytest.raises(
            UserError, match="stranger and the data set have no class in common: the model knows cat, dog"
        ):
            draw()


@pytest.mark.parametrize("percents", [[0, 150], [-1], [float("nan")], []])
def test_shares_beyond_all(percents: list[float]) -> None:
    with pytest.raises(UserError, match="from 0 to 100"):
        explain.check_percents(percents)
