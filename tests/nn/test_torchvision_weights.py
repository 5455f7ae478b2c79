"""torchvision's own FCOS and RetinaNet with random weights, and ours with their state dict: the same detections, one to one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou

from tests.losses import means
from tests.nn.fpn import narrow
from yoloxkd.assembly.models import build_detector, open_model
from yoloxkd.assembly.recipes import resolve
from yoloxkd.engine.checkpoint import file_digest
from yoloxkd.errors import UserError
from yoloxkd.nn.coco_names import COCO_NAMES
from yoloxkd.nn.dense.fcos import FCOS
from yoloxkd.nn.dense.retinanet import RetinaNet
from yoloxkd.nn.weights.published import PUBLISHED
from yoloxkd.nn.weights.torchvision_weights import UNUSED_ROWS, our_key, torchvision_state
from yoloxkd.ops.nms import postprocess
from yoloxkd.types import Targets

SIZE = (160, 224)
"""px, multiples of 32 alone: the points of the two coarsest levels are not a stride apart."""
MOST = 60
"""Pairs of a level; the finest has 20 x 28 x 4."""


def theirs(builder: str, classes: int) -> Any:
    """torchvision's detector with random weights, statistics and biases, so that no layer is left out."""
    from torchvision.models import detection

    torch.manual_seed(0)
    model = getattr(detection, builder)(
        weights=None, weights_backbone=None, num_classes=classes, score_thresh=0.3, nms_thresh=0.5,
        topk_candidates=MOST, min_size=SIZE[0], max_size=SIZE[1], detections_per_img=100,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    parts = [model.head.classification_head.cls_logits, getattr(model.head.regression_head, "bbox_ctrness", None)]
    for part in filter(None, parts):
        nn.init.normal_(part.weight, std=0.05)
        nn.init.normal_(part.bias, std=0.5)
    nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.05)
    nn.init.constant_(model.head.regression_head.bbox_reg.bias, 1.0 if builder.startswith("fcos") else 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return theirs("fcos_resnet50_fpn", 4)


@pytest.fixture(scope="module")
def file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchvision") / "fcos.pth"
    # torchvision's files have frozen batch norms, which do not count batches
    torch.save({k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    return path


def pictures(height: int, width: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 3, 5, 7, generator=g)
    return (nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255).round()


@torch.no_grad()
def assert_same_detections(model: Any, ours: Any) -> None:
    assert ours.spec.pairs_per_level == 1000
    images = pictures(*SIZE)
    wanted = model(list(images / 255))
    out = ours(images)
    boxes, scores = ours.candidates(out)
    # torchvision cuts boxes to the image before suppression; here that is left to whoever draws them
    limit = torch.tensor([SIZE[1], SIZE[0]] * 2)
    found = postprocess(
        torch.minimum(boxes.clamp(min=0), limit), scores, conf=0.3, iou=0.5, max_det=100,
        levels=ours.level_sizes(out), pairs_per_level=MOST,
    )  # fmt: skip
    for (b, s, k), want in zip(found, wanted, strict=True):
        assert len(s) > 60
        assert len(k.unique()) > 2
        torch.testing.assert_close(s, want["scores"], rtol=1e-4, atol=1e-5)
        assert torch.equal(k, want["labels"])
        torch.testing.assert_close(b, want["boxes"], rtol=1e-4, atol=1e-2)


def test_the_same_detections(model: Any, file: Path) -> None:
    opened = open_model(str(file))
    assert (opened.weights.kind, opened.name, opened.report.complete) == ("torchvision", "fcos-r50@torchvision", True)
    assert_same_detections(model, opened.detector)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("builder", "name"),
    [
        ("retinanet_resnet50_fpn", "retinanet-r50@torchvision"),
        ("retinanet_resnet50_fpn_v2", "retinanet-r50@torchvision-v2"),
    ],
)
def test_the_same_detections_of_a_retinanet(
    builder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = theirs(builder, 4), tmp_path / "x.pth"
    if published := name == "retinanet-r50@torchvision":  # whose eps of 0 is told by its digest
        for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.eps = 0.0
            norm.weight.data *= 1e-3
            norm.running_var *= 1e-6
    with torch.no_grad():
        said = model.head(list(model.backbone(model.transform(list(pictures(*SIZE) / 255))[0].tensors).values()))
        model.head.classification_head.cls_logits.weight *= 1.5 / said["cls_logits"].std()
        model.head.regression_head.bbox_reg.weight *= 0.3 / said["bbox_regression"].std()
    torch.save(model.state_dict(), file)
    if published:
        monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], sha256=file_digest(file)[:8]))
    opened = open_model(str(file))
    assert (opened.weights.kind, opened.name, opened.report.complete) == ("torchvision", name, True)
    assert opened.student.config.norm_eps == (0.0 if published else None)
    assert_same_detections(model, opened.detector)


@pytest.mark.parametrize("anchor_scale", [4.0, 2.0])
def test_whole_anchors_are_those_of_torchvision(anchor_scale: float) -> None:
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.retinanet import _default_anchorgen

    strides = (8, 16, 32, 64, 128)
    of_level = [[int(anchor_scale * s * 2 ** (k / 3)) for k in range(3)] for s in strides]
    generator = AnchorGenerator(of_level, ((0.5, 1.0, 2.0),) * 5)
    if anchor_scale == 4:
        assert [list(sizes) for sizes in _default_anchorgen().sizes] == of_level
    sizes = [(-(-SIZE[0] // s), -(-SIZE[1] // s)) for s in strides]
    images = ImageList(torch.zeros(1, 3, *SIZE), [SIZE])
    (wanted,) = generator(images, [torch.zeros(1, 1, h, w) for h, w in sizes])
    whole = narrow(RetinaNet, 1, anchors="whole", anchor_scale=anchor_scale)
    assert torch.equal(whole.anchors(whole.grid(sizes, SIZE, torch.device("cpu"))), wanted)
    exact = narrow(RetinaNet, 1, anchor_scale=anchor_scale)
    anchors = exact.anchors(exact.grid(sizes, SIZE, torch.device("cpu")))
    assert not torch.equal(anchors, wanted)
    roots = ((anchors[:, 2:] - anchors[:, :2]).prod(1)).sqrt()
    assert float(roots.min()) == pytest.approx(8 * anchor_scale)


def test_published_retinanets_are_those_of_torchvision() -> None:
    from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights, RetinaNet_ResNet50_FPN_Weights

    for name, weights in (
        ("retinanet-r50@torchvision", RetinaNet_ResNet50_FPN_Weights.COCO_V1),
        ("retinanet-r50@torchvision-v2", RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1),
    ):
        assert PUBLISHED[name].url == weights.url
        recipe, plain = resolve(student=name), resolve(student="retinanet-r50")
        assert (recipe.student.name, recipe.student.weights, recipe.train) == (name, name, plain.train)


def test_a_coco_file_of_a_retinanet_and_one_with_other_anchors() -> None:
    from torchvision.models.detection import retinanet_resnet50_fpn
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    state = {k: torch.empty(v.shape) for k, v in meta(retinanet_resnet50_fpn, num_classes=91).state_dict().items()}
    key = "head.classification_head.cls_logits.bias"
    state[key] = torch.arange(91.0).repeat(9)
    found = torchvision_state(state)
    assert found is not None
    used = [float(row) for row in range(91) if row not in UNUSED_ROWS]
    assert (found.classes, found.state["head.retina_cls.bias"].tolist()) == (80, used * 9)
    assert found.section["norm_eps"] is None  # a file of one's own, unlike the published one
    six = AnchorGenerator(((32, 64),) * 5, ((0.5, 1.0, 2.0),) * 5)
    other = meta(retinanet_resnet50_fpn, num_classes=3, anchor_generator=six).state_dict()
    with pytest.raises(UserError, match=r"24 box numbers and 18 class logits a cell, which are not those of 9 anchors"):
        torchvision_state({k: torch.empty(v.shape) for k, v in other.items()})


def test_a_retinanet_trains_on_with_giou() -> None:
    detector = narrow(RetinaNet, 2, anchors="whole", box_loss="giou")
    out = detector(torch.rand(1, 3, 64, 64) * 255)
    box = torch.tensor([[[8.0, 8, 50, 52]]])
    targets = Targets(box, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).bool(), torch.zeros(1, 1).bool())
    match = detector.assign(out, targets)
    loss = means(detector.losses(out, targets, match))["box"]
    wanted = 1 - generalized_box_iou(out.boxes[0][match.fg[0]], box[0])
    torch.testing.assert_close(loss, wanted.mean())


def test_a_coco_file_loses_the_ids_that_no_category_has(file: Path, tmp_path: Path) -> None:
    from torchvision.models.detection.fcos import FCOS_ResNet50_FPN_Weights

    coco = FCOS_ResNet50_FPN_Weights.COCO_V1
    names = coco.meta["categories"]
    assert tuple(i for i, name in enumerate(names) if name in ("__background__", "N/A")) == UNUSED_ROWS
    known = PUBLISHED["fcos-r50@torchvision"]
    assert (known.url, known.filename.endswith(f"-{known.sha256}.pth")) == (coco.url, True)
    state = torch.load(file, weights_only=True)
    state["head.classification_head.cls_logits.weight"] = torch.arange(91.0).reshape(91, 1, 1, 1).expand(91, 256, 3, 3)
    state["head.classification_head.cls_logits.bias"] = torch.arange(91.0)
    torch.save({"model": state, "epoch": 25}, tmp_path / "x.pth")  # as torchvision's training script writes
    opened = open_model(str(tmp_path / "x.pth"))
    assert opened.detector.names == list(COCO_NAMES)
    predictor = opened.detector.head.conv_cls
    assert [names[int(row)] for row in predictor.bias.tolist()] == list(COCO_NAMES)
    assert torch.equal(predictor.weight[:, 0, 0, 0], predictor.bias)


def test_the_name_starts_a_student_from_the_weights_by_the_recipe_of_its_kind() -> None:
    recipe, plain = resolve(student="fcos-r50@torchvision"), resolve(student="fcos-r50")
    assert (recipe.student.name, recipe.student.weights) == ("fcos-r50@torchvision",) * 2
    assert recipe.train == plain.train
    keys = recipe.student.config.model_dump(by_alias=True)
    assert (keys["points"], keys["scale_layers"], keys["score"]) == ("corner", False, "root")


def test_a_backbone_that_is_no_resnet_is_refused(file: Path, tmp_path: Path) -> None:
    state = torch.load(file, weights_only=True)
    torch.save({k: v for k, v in state.items() if not k.startswith("backbone.body.layer3")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth: the checkpoint of torchvision has a backbone other than ResNet"):
        open_model(str(tmp_path / "x.pth"))


def test_every_point_near_a_small_box_is_counted_where_steps_are_shorter_than_strides() -> None:
    torch.manual_seed(0)
    detector = narrow(FCOS, 1, points="corner")
    side = 544  # 17 x 32: nine rows of stride 64 are 60 px apart, five of stride 128 are 108 px apart
    out = detector(torch.rand(1, 3, side, side) * 255)
    grid = out.grid
    assert grid.steps == ((8, 8), (16, 16), (32, 32), (60, 60), (108, 108))
    assert grid.points[grid.slices()[3]][:2].tolist() == [[0, 0], [60, 0]]
    targets = Targets(
        boxes=torch.tensor([[[1.0, 1, 543, 543]]]), labels=torch.zeros(1, 1, dtype=torch.int64), mask=torch.ones(1, 1).bool(),
        ignore=torch.zeros(1, 1).bool(), content=torch.tensor([[0.0, 0, side, side]]),
    )  # fmt: skip
    match = detector.assign(out, targets)
    assert int(match.fg.sum()) <= detector._most_positives(grid)
    assert detector._most_positives(grid) == 9 + 9 + 9 + 16 + 16
    losses = detector.losses(out, targets, match)
    assert all(torch.isfinite(loss.mean()) for loss in losses.values())


def test_the_variance_s_small_number_is_that_of_the_key() -> None:
    norms = [m for m in narrow(FCOS, 1, norm_eps=0.0).backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.eps for m in norms} == {0.0}
    assert 0.0 not in {m.eps for m in narrow(FCOS, 1).backbone.modules() if isinstance(m, nn.BatchNorm2d)}


@pytest.mark.parametrize("version", ["", "_v2"])
def test_every_tensor_of_a_retinanet_has_a_name_of_ours(version: str) -> None:
    from torchvision.models import detection

    state = meta(getattr(detection, f"retinanet_resnet50_fpn{version}"), num_classes=3).state_dict()
    name = f"retinanet-r50@torchvision{version.replace('_', '-')}"
    with torch.device("meta"):
        ours = build_detector({"name": name}, ["a", "b", "c"]).state_dict()
    found = {our_key(key, "retinanet"): value.shape for key, value in state.items()}
    assert found == {key: value.shape for key, value in ours.items() if key in found}
    assert all(key.endswith("num_batches_tracked") for key in ours.keys() - found.keys())


def test_the_older_names_of_a_retinanet_are_known_too() -> None:
    assert our_key("head.regression_head.conv.6.bias", "retinanet") == "head.reg_convs.3.conv.bias"
    assert our_key("backbone.fpn.inner_blocks.1.weight", "retinanet") == "neck.lateral_convs.1.conv.weight"


def meta(builder: Any, **keys: Any) -> Any:
    """torchvision's detector without memory for its weights."""
    with torch.device("meta"):
        return builder(weights=None, weights_backbone=None, **keys)
