"""What every detector in two stages has to do, as one test class: a new one inherits it and says its kind."""

from __future__ import annotations

import copy
import importlib.util
import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.losses import means, task
from tests.nn.contract import NAMES, boxes_of, pictures
from yoloxkd.data.augment.transforms import letterbox
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.engine.step import TrainStep
from yoloxkd.errors import UserError
from yoloxkd.exporters.onnx import ExportOptions
from yoloxkd.exporters.parity import export_checked
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.nn.two_stage.faster_rcnn import FasterRCNN
from yoloxkd.nn.two_stage.roi_detector import RoIMatch
from yoloxkd.ops.nms import NMS
from yoloxkd.types import Batch, Draw, ImageMeta, RoIOutput, Targets

SCRIPT = Path(__file__).resolve().parents[3] / "export" / "predict.py"
KEYS: dict[str, Any] = {
    "backbone": "mobilenetv2_035", "backbone_weights": "none", "frozen_stages": 0, "norm_eval": False,
    "channels": 16, "hidden": 24, "train_anchors": 60, "test_anchors": 40, "train_proposals": 50, "test_proposals": 30,
    "anchor_samples": 32, "region_samples": 24,
}  # fmt: skip
"""Of a detector small enough for tests."""
MASK_KEYS: dict[str, Any] = {"mask_hidden": 8, "mask_convs": 1}
"""Further ones, of detectors with masks."""


def narrow_two_stage(kind: type[FasterRCNN], names: list[str], **changes: Any) -> FasterRCNN:
    """A detector of the kind with random weights."""
    masks = MASK_KEYS if "mask_hidden" in kind.Config.model_fields else {}
    return kind(kind.Config(**(KEYS | masks | changes)), names)


def with_masks(targets: Targets, size: int) -> Targets:
    """The same with ellipses that fill the boxes as masks, in an input of `size` px."""
    at = torch.arange(size) + 0.5
    center, half = (
        (targets.boxes[..., :2] + targets.boxes[..., 2:]) / 2,
        (targets.boxes[..., 2:] - targets.boxes[..., :2]) / 2,
    )
    x = ((at - center[..., :1]) / half[..., :1]).square()
    y = ((at - center[..., 1:]) / half[..., 1:]).square()
    targets.masks = (y.unsqueeze(-1) + x.unsqueeze(-2) <= 1) & targets.mask[..., None, None]
    return targets


class TwoStageContract:
    """Inherit, and give `kind`."""

    kind: type[FasterRCNN]
    size = 96

    @pytest.fixture(autouse=True)
    def _model(self) -> None:
        torch.manual_seed(0)
        self.model = narrow_two_stage(self.kind, NAMES)

    def targets(self, images: int, rows: int) -> Targets:
        """Random boxes, with masks where the detector trains them."""
        found = boxes_of(images, rows, self.size)
        return with_masks(found, self.size) if self.model.spec.masks else found

    def forward(self, images: Tensor) -> RoIOutput:
        with torch.no_grad():
            out: RoIOutput = self.model.eval()(images)
        return out

    def in_training(self, images: Tensor) -> RoIOutput:
        """Output of training mode; its norms' statistics are those of evaluation, so that images are independent."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()
        out: RoIOutput = self.model(images)
        return out

    def test_shapes_and_dtypes(self) -> None:
        height, width, classes = self.size, self.size + 32, len(NAMES)
        out = self.forward(pictures(2, height, width))
        assert out.image_size == (height, width)
        assert out.rpn.grid.strides == (4, 8, 16, 32, 64)
        assert out.rpn.grid.sizes == tuple((-(-height // s), -(-width // s)) for s in out.rpn.grid.strides)
        anchors = 3 * sum(h * w for h, w in out.rpn.grid.sizes)
        assert out.rpn.cls_logits.shape == (2, anchors, 1)
        assert out.rpn.boxes.shape == (2, anchors, 4)
        assert out.proposals.shape == (2, self.model.cfg.test_proposals, 4)
        assert out.valid.shape == (2, self.model.cfg.test_proposals)
        assert ((out.proposals >= 0) & (out.proposals <= out.proposals.new_tensor([width, height] * 2))).all()
        assert len(out.stages) == len(self.model.stage_rules())
        for stage in out.stages:
            assert stage.roi_features.shape[1:] == (self.model.cfg.test_proposals, 16, 7, 7)
            assert stage.cls_logits.shape == (2, self.model.cfg.test_proposals, classes + 1)
            assert stage.boxes.shape == stage.regions.shape == out.proposals.shape
        for tap, channels in self.model.spec.channels.items():
            found = dict(zip(channels, getattr(out, tap), strict=True))
            assert {stride: m.shape[1] for stride, m in found.items()} == channels
            assert {s: tuple(m.shape[2:]) for s, m in found.items()} == {s: (height // s, width // s) for s in channels}

    def test_every_stage_has_a_line(self) -> None:
        stages = [self.model.roi_head.stage_name(i) for i in range(len(self.model.stage_rules()))]
        masks = [f"{stage}/mask" for stage in stages] if self.model.spec.masks else []
        assert list(self.model.stage_lines()) == ["proposals", *stages, *masks]

    def test_candidates_are_pairs_of_a_region_and_a_class(self) -> None:
        out = self.forward(pictures(2, self.size, self.size))
        out.valid[1, 5:] = False
        boxes, scores = self.model.candidates(out)
        assert boxes.shape[:2] == scores.shape[:2] == (2, self.model.cfg.test_proposals * len(NAMES))
        assert boxes.dtype == scores.dtype == torch.float32
        assert ((boxes >= 0) & (boxes <= self.size)).all()
        assert ((scores >= 0) & (scores <= 1)).all()
        assert ((scores > 0).sum(-1) <= 1).all()
        assert (scores[1] > 0).sum() == 5 * len(NAMES)
        by_region = scores.sum(1).sum(1)
        logits = torch.stack([stage.cls_logits for stage in out.stages]).mean(0)
        foreground = (logits.softmax(-1)[..., :-1].sum(-1) * out.valid).sum(1)
        torch.testing.assert_close(by_region, foreground)

    def test_training_computes_what_candidates_need_on_demand(self) -> None:
        images = pictures(1, self.size, self.size)
        out = self.in_training(images)
        assert out.stages == ()
        boxes, scores = self.model.candidates(out)
        assert boxes.shape[1] == scores.shape[1] == self.model.cfg.train_proposals * len(NAMES)

    def test_heads_are_asked_about_anybodys_regions(self) -> None:
        out = self.forward(pictures(2, self.size, self.size))
        with torch.no_grad():
            for number, stage in enumerate(out.stages):
                again = self.model.roi(out.features, stage.regions[:, :3], number)
                torch.testing.assert_close(again.cls_logits, stage.cls_logits[:, :3])
                torch.testing.assert_close(again.boxes, stage.boxes[:, :3])

    def test_the_assignment_follows_from_seed_step_and_image(self) -> None:
        """Whatever else is drawn meanwhile, and however the images are divided; another seed or step draws others."""
        targets = boxes_of(4, 5, self.size)
        out = self.in_training(pictures(4, self.size, self.size))
        whole = self.model.assign(out, targets, Draw(3, 7))
        torch.rand(3)
        same_rows(self.model.assign(out, targets, Draw(3, 7)), whole, slice(None))
        more = targets.map(lambda t: torch.cat([t, torch.zeros_like(t[:, :3])], 1))
        same_rows(self.model.assign(out, more, Draw(3, 7)), whole, slice(None))  # padding rows draw nothing
        for draw in (Draw(3, 8), Draw(4, 7)):
            other = self.model.assign(out, targets, draw)
            assert not torch.equal(other.rpn.ignored, whole.rpn.ignored)
        for first in range(2):
            part = slice(first, None, 2)
            own = self.model.assign(output_of(out, part), targets.map(itemgetter(part)), Draw(3, 7, (first, 2)))
            same_rows(own, whole, part)

    def test_samples_have_their_shares(self) -> None:
        out, targets = self.in_training(pictures(2, self.size, self.size)), boxes_of(2, 4, self.size)
        match, cfg = self.model.assign(out, targets), self.model.cfg
        assert ((~match.rpn.ignored).sum(1) == cfg.anchor_samples).all()
        assert (match.rpn.fg.sum(1) <= cfg.anchor_samples // 2).all()
        assert (match.rpn.fg.sum(1) > 0).all()
        for of_stage, boxes in zip(match.stages, match.boxes, strict=True):
            assert boxes.shape == (2, cfg.region_samples, 4)
            assert (of_stage.fg.sum(1) >= 4).all()  # the boxes themselves
            assert (of_stage.fg.sum(1) <= cfg.region_samples // 4).all()
            assert not (of_stage.fg & of_stage.ignored).any()
            assert not boxes[of_stage.ignored].any()

    @pytest.mark.parametrize("rows", [0, 1, 60])
    def test_losses_with_any_number_of_boxes(self, rows: int) -> None:
        out = self.in_training(pictures(2, self.size, self.size))
        losses = task(self.model, out, self.targets(2, rows))
        assert all(v.ndim == 0 and v.isfinite() and v >= 0 for v in losses.values())
        assert {v.dtype for v in losses.values()} == {torch.float32}
        seen = {name for name, value in losses.items() if value > 0}
        assert seen == (set(losses) if rows else {name for name in losses if name.endswith("/cls")})
        torch.stack(list(losses.values())).sum().backward()
        assert [n for n, p in self.model.named_parameters() if p.requires_grad and p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in self.model.parameters() if p.grad is not None)

    def test_an_image_without_proposals(self) -> None:
        """Every stage then trains on the boxes alone, and nothing is detected."""
        out, targets = self.in_training(pictures(1, self.size, self.size)), boxes_of(1, 2, self.size)
        out.valid[:] = False
        match = self.model.assign(out, targets)
        for of_stage in match.stages:
            assert int((~of_stage.ignored).sum()) == int(of_stage.fg.sum()) == 2
        losses = means(self.model.losses(out, targets, match))
        assert all(value.isfinite() for value in losses.values())
        assert not self.model.candidates(out)[1].any()

    def test_ignore_regions_are_no_background(self) -> None:
        """Nothing that lies in one is sampled, and no gradient reaches the proposal network there."""
        out = self.in_training(pictures(1, self.size, self.size))
        half = self.size / 2
        targets = Targets(
            torch.tensor([[[4.0, 4.0, half - 8, half], [half, 0.0, self.size, self.size]]]),
            torch.zeros(1, 2, dtype=torch.int64),
            torch.tensor([[True, False]]),
            torch.tensor([[False, True]]),
        )
        match = self.model.assign(out, targets)
        inside = out.rpn.grid.points[:, 0] >= half
        assert match.rpn.ignored[0, inside & ~match.rpn.fg[0]].all()
        for of_stage, boxes in zip(match.stages, match.boxes, strict=True):
            negative = boxes[~of_stage.ignored & ~of_stage.fg]
            share = (negative[:, 2] - negative[:, 0].clamp(min=half)) / (negative[:, 2] - negative[:, 0])
            assert (share < 0.5).all()
        targets.ignore[:] = False
        plain = self.model.assign(out, targets)
        assert not plain.rpn.ignored[0, inside].all()

    def test_padding_is_neither_positive_nor_background(self) -> None:
        side = self.size + 32
        out = self.in_training(pictures(2, side, side))
        targets = boxes_of(2, 4, self.size)
        targets.content = torch.tensor([[0.0, 0.0, self.size, self.size]] * 2)
        match = self.model.assign(out, targets)
        outside = (out.rpn.grid.points >= self.size).any(-1)
        assert match.rpn.ignored[:, outside].all()
        for of_stage, boxes in zip(match.stages, match.boxes, strict=True):
            taken = boxes[~of_stage.ignored]
            assert (taken <= self.size).all()
            assert ((taken[:, 2:] - taken[:, :2]) > 0).all()

    def test_an_image_does_not_depend_on_its_neighbors(self) -> None:
        images = pictures(3, self.size, self.size)
        together = self.forward(images)
        for i in range(3):
            alone = self.forward(images[i : i + 1])
            torch.testing.assert_close(alone.proposals[0], together.proposals[i], rtol=1e-4, atol=1e-3)
            for a, b in zip(self.model.candidates(alone), self.model.candidates(together), strict=True):
                torch.testing.assert_close(a[0], b[i], rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("extra", [(0, 1), (16, 0)])
    def test_odd_sizes_are_the_users_mistake(self, extra: tuple[int, int]) -> None:
        height, width = self.size + extra[0], self.size + extra[1]
        with pytest.raises(UserError, match=f"{height}x{width}.*multiples of 32"):
            self.model(torch.zeros(1, 3, height, width))

    @pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 96)])
    def test_every_multiple_is_a_size(self, height: int, width: int) -> None:
        out = self.forward(pictures(1, height, width))
        assert out.valid.any()
        assert self.model.candidates(out)[0].isfinite().all()

    def test_bf16_autocast(self) -> None:
        targets = self.targets(2, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.in_training(pictures(2, self.size, self.size))
            losses = task(self.model, out, targets)
            boxes, scores = self.model.candidates(out)
        assert out.rpn.cls_logits.dtype == torch.bfloat16
        assert out.proposals.dtype == boxes.dtype == scores.dtype == torch.float32
        assert {v.dtype for v in losses.values()} == {torch.float32}
        torch.stack(list(losses.values())).sum().backward()

    def test_class_predictors_are_the_layers_that_depend_on_the_classes(self) -> None:
        other, own = narrow_two_stage(self.kind, [*NAMES, "yellow"]).state_dict(), self.model.state_dict()
        assert list(own) == list(other)
        differ = {key for key in own if own[key].shape != other[key].shape}
        assert differ == {key for key in own if key.startswith(self.model.class_predictors)}

    def test_a_copy_is_independent(self) -> None:
        images = pictures(1, self.size, self.size)
        before = self.forward(images).proposals
        twin = copy.deepcopy(self.model).train()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(self.forward(images).proposals, before)

    def test_a_step_of_the_engine(self) -> None:
        """The step draws by the batch's place among all images."""
        targets = self.targets(2, 3)
        content = torch.tensor([[0.0, 0.0, self.size, self.size]] * 2)
        batch = Batch(pictures(2, self.size, self.size), targets, content)
        step = TrainStep(self.model.train(), nn.ModuleDict())
        first = means(step(batch, Draw(0, 1)))
        assert set(first) == {"rpn/cls", "rpn/box"} | {
            f"{name}/{term}" for name in self.stage_names() for term in self.stage_terms()
        }
        elsewhere = means(step(Batch(batch.images, targets, content, place=(5, 9)), Draw(0, 1)))
        assert any(not torch.equal(first[name], elsewhere[name]) for name in first)

    @pytest.mark.slow
    def test_export_parity(self, toy: Path, tmp_path: Path) -> None:
        """A file of fixed shape, with both stages, their NMS and the masks inside, passes the gate.

        The file without masks is part of it, and not made again.
        """
        if not self.model.spec.masks:
            pytest.skip("the file of the same detector with masks holds this one's")
        data = load_split(find_data(str(toy)), "val")
        path = export_checked(
            self.model.eval(), tmp_path / "x.onnx", ExportOptions(self.size, nms=True, conf=1e-5), data=data
        )
        note = json.loads(path.with_suffix(".parity.json").read_text())
        assert note["passed"]
        assert note["found"]["detections"] > 0
        assert note["found"]["min_mask_iou"] > 0.99
        check_file(path, self.model, data.read(0))

    def test_free_shapes_are_refused(self) -> None:
        with pytest.raises(UserError, match="cannot be exported with free shapes; leave --dynamic out"):
            ExportOptions(self.size, dynamic=True).check(self.model)

    def stage_terms(self) -> tuple[str, ...]:
        return ("cls", "box", "mask") if self.model.spec.masks else ("cls", "box")

    def stage_names(self) -> list[str]:
        count = len(self.model.stage_rules())
        return ["roi"] if count == 1 else [f"roi{i + 1}" for i in range(count)]


def check_file(path: Path, model: Any, image: np.ndarray) -> None:
    """The runtime and the script beside the package find the masks that the model finds."""
    square = letterbox(image, (96, 96), model.spec.input.pad_value)[0]
    meta = ImageMeta(0, "", 96, 96)
    pixels = torch.from_numpy(square.transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        (wanted,) = model.detect(model(pixels), NMS(conf=1e-5))
    (found,) = OnnxPredictor(path)(pixels)
    placed, reference = found.to_image(meta), wanted.to_image(meta)
    assert len(placed) == len(reference) > 0
    assert placed.masks is not None
    spec = importlib.util.spec_from_file_location("predict", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    boxes, scores, _, masks = script.Model(str(path), conf=1e-5).predict_with_masks(square)
    np.testing.assert_allclose(boxes, placed.boxes, atol=1e-3)
    np.testing.assert_allclose(scores, placed.scores, atol=1e-6)
    assert np.array_equal(masks, placed.masks)
    runs = script.run_lengths(masks[0])
    inside = np.arange(len(runs["counts"])) % 2 == 1
    assert np.array_equal(np.repeat(inside, runs["counts"]).reshape(96, 96).T, masks[0])


def output_of(out: RoIOutput, part: slice) -> RoIOutput:
    """The output for some of the images, as far as an assignment reads it."""
    twin = copy.copy(out)
    twin.rpn = copy.copy(out.rpn)
    for name in ("cls_logits", "box_raw", "boxes"):
        setattr(twin.rpn, name, getattr(out.rpn, name)[part])
    twin.rpn.features = tuple(m[part] for m in out.features)
    twin.proposals, twin.valid = out.proposals[part], out.valid[part]
    return twin


def same_rows(ours: RoIMatch, whole: RoIMatch, part: slice) -> None:
    """One assignment is the other's for some of its images."""
    for own, all_ in zip((ours.rpn, *ours.stages), (whole.rpn, *whole.stages), strict=True):
        assert torch.equal(own.gt, all_.gt[part])
        assert torch.equal(own.ignored, all_.ignored[part])
    for own_boxes, boxes in zip(ours.boxes, whole.boxes, strict=True):
        torch.testing.assert_close(own_boxes, boxes[part])
