"""What every detector has to do, as one test class: a new detector inherits it and says how to build a narrow one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from tests.losses import means, task
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.errors import UserError
from yoloxkd.exporters.onnx import ExportOptions
from yoloxkd.exporters.operators import NETWORK, SUPPRESSION, operators
from yoloxkd.exporters.parity import export_checked
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.ops.points import grid_of
from yoloxkd.types import DenseOutput, Tap, Targets

NAMES = ["red", "blue", "green"]
NMS_OF_FREE_SHAPES = ((True, True),)
"""With NMS and free shapes, what has more operators than any other form."""
FREE_SHAPES = ((False, True),)
"""What is a family's own: NMS is the same for all, and a graph of one shape is the same with less freedom."""


def boxes_of(images: int, count: int, size: int, seed: int = 0) -> Targets:
    """`count` random boxes in each image of `size` px."""
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(images, count, 2, generator=g) * size * 0.6
    high = low + size * (0.05 + 0.35 * torch.rand(images, count, 2, generator=g))
    mask = torch.ones(images, count, dtype=torch.bool)
    labels = torch.randint(0, len(NAMES), (images, count), generator=g)
    return Targets(torch.cat([low, high], -1), labels, mask, torch.zeros_like(mask))


def pictures(images: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth random images, uint8."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(images, 3, 9, 9, generator=g)
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 255).to(torch.uint8)


class DetectorContract:
    """Inherit, and give `build`."""

    size = 64
    exports: tuple[tuple[bool, bool], ...] = ((True, True), (False, False))
    """With NMS and with free shapes: what is exported of this family."""

    def build(self, names: list[str]) -> DenseDetector:
        """A narrow detector with random weights."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _model(self) -> None:
        torch.manual_seed(0)
        self.model = self.build(NAMES)

    def forward(self, images: Tensor) -> DenseOutput:
        with torch.no_grad():
            out: DenseOutput = self.model.eval()(images)
        return out

    def test_shapes_and_dtypes(self) -> None:
        out = self.forward(pictures(2, self.size, self.size + 32))
        a = sum(h * w for h, w in out.grid.sizes) * out.grid.per_cell
        assert out.image_size == (self.size, self.size + 32)
        assert out.grid.strides == self.model.spec.strides
        assert out.grid.sizes == tuple((-(-self.size // s), -(-(self.size + 32) // s)) for s in out.grid.strides)
        assert out.cls_logits.shape == (2, a, len(NAMES))
        assert out.boxes.shape == (2, a, 4)
        assert out.box_raw.shape[:2] == (2, a)
        assert out.grid.points.shape == (a, 2)
        assert out.grid.point_strides.shape == (a,)
        assert out.quality is None or out.quality.shape == (2, a)
        for tensor in (out.cls_logits, out.boxes, out.grid.points, out.grid.point_strides):
            assert tensor.dtype == torch.float32
        for tap, channels in self.model.spec.channels.items():
            maps = dict(zip(channels, getattr(out, tap), strict=True))
            assert {stride: m.shape[1] for stride, m in maps.items()} == channels
            rounded_up = {s: (-(-self.size // s), -(-(self.size + 32) // s)) for s in channels}
            assert {stride: tuple(m.shape[2:]) for stride, m in maps.items()} == rounded_up

    def test_locations_lie_in_their_cells(self) -> None:
        out = self.forward(pictures(1, self.size, self.size))
        corners = grid_of(out.grid.sizes, out.grid.strides, out.grid.points.device, 0.0, out.grid.per_cell)
        offset = (out.grid.points - corners.points) / out.grid.point_strides[:, None]
        assert torch.equal(out.grid.point_strides, corners.point_strides)
        assert ((offset >= 0) & (offset <= 0.5)).all()

    def test_scores_and_probabilities(self) -> None:
        out = self.forward(pictures(2, self.size, self.size))
        scores, probability = self.model.scores(out), self.model.class_probability(out)
        for values in (scores, probability):
            assert values.shape == out.cls_logits.shape
            assert values.dtype == torch.float32
            assert ((values >= 0) & (values <= 1)).all()
        assert (scores <= probability + 1e-6).all()

    def test_the_head_can_be_entered_in_the_middle(self) -> None:
        """A map taken behind a tower's first block gives what the whole way gives; another map gives something else."""
        out = self.forward(pictures(1, self.size, self.size))
        model = self.model
        with torch.no_grad():
            cls, reg = model.tower(Tap.CLS, out.features, stop=1), model.tower(Tap.REG, out.features, stop=1)
            rest = model.tower(Tap.CLS, cls, 1), model.tower(Tap.REG, reg, 1)
            again = model.assemble(model.predict(*rest), out.image_size)
            other = model.assemble(
                model.predict(model.tower(Tap.CLS, tuple(m + 1 for m in cls), 1), rest[1]), out.image_size
            )
        for ours, theirs in ((cls, out.cls_features), (reg, out.reg_features)):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert torch.equal(again.cls_logits, out.cls_logits)
        assert torch.equal(again.boxes, out.boxes)
        assert not torch.equal(other.cls_logits, out.cls_logits)
        assert torch.equal(other.boxes, out.boxes)

    def test_the_assignment_is_shared_and_follows_from_its_arguments(self) -> None:
        out, targets = self.forward(pictures(2, self.size, self.size)), boxes_of(2, 3, self.size)
        targets.ignore[:, 2], targets.mask[:, 2] = True, False
        match, again = self.model.assign(out, targets), self.model.assign(out, targets)
        assert torch.equal(match.fg, again.fg)
        assert torch.equal(match.gt, again.gt)
        assert torch.equal(match.fg, match.gt >= 0)
        assert match.ignored.any()
        assert not (match.fg & match.ignored).any()
        nobody = replace(match, ignored=torch.ones_like(match.fg) & ~match.fg)
        with torch.no_grad():
            some, none = (means(self.model.losses(out, targets, m)) for m in (match, nobody))
        assert any(none[name] < some[name] for name in some)  # ignored predictions cost nothing
        assert all(none[name] <= some[name] for name in some)

    def test_an_untrained_detector_is_sure_of_nothing(self) -> None:
        assert self.model.scores(self.forward(pictures(1, self.size, self.size))).max() < 0.1

    @pytest.mark.parametrize("rows", [0, 1, 300])
    def test_losses_with_any_number_of_boxes(self, rows: int) -> None:
        out = self.model.train()(pictures(2, self.size, self.size))
        losses = task(self.model, out, boxes_of(2, rows, self.size))
        assert all(v.ndim == 0 and v.isfinite() and v >= 0 for v in losses.values())
        assert {v.dtype for v in losses.values()} == {torch.float32}
        seen = [name for name, value in losses.items() if value > 0]  # without a box, those that see background
        assert 0 < len(seen) < len(losses) if rows == 0 else len(seen) == len(losses)
        torch.stack(list(losses.values())).sum().backward()
        wanting = [n for n, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        assert wanting == []
        assert all(p.grad.isfinite().all() for p in self.model.parameters() if p.grad is not None)

    def test_padding_rows_change_nothing(self) -> None:
        out = self.forward(pictures(2, self.size, self.size))
        few = boxes_of(2, 3, self.size)
        more = Targets(
            *(torch.cat([t, torch.zeros_like(t[:, :2])], 1) for t in (few.boxes, few.labels, few.mask, few.ignore))
        )
        with torch.no_grad():
            a, b = task(self.model, out, few), task(self.model, out, more)
        for name in a:
            torch.testing.assert_close(a[name], b[name])

    def test_an_image_without_boxes_has_no_box_to_learn(self) -> None:
        """It is background for the classes, or for the quality; its boxes get no gradient, and those of its neighbor do."""
        out = self.model.eval()(pictures(2, self.size, self.size))
        targets = boxes_of(2, 3, self.size)
        targets.mask[1] = False
        losses = task(self.model, out, targets)
        assert all(v.isfinite() for v in losses.values())
        total = torch.stack(list(losses.values())).sum()
        said = [out.cls_logits] if out.quality is None else [out.cls_logits, out.quality]
        boxes, *classes = torch.autograd.grad(total, (out.box_raw, *said), allow_unused=True)
        assert boxes[0].abs().sum() > 0
        assert boxes[1].abs().sum() == 0
        assert any(grad is not None and grad[1].abs().sum() > 0 for grad in classes)

    def test_an_ignore_region_is_no_background(self) -> None:
        out = self.forward(pictures(1, self.size, self.size))
        targets = boxes_of(1, 1, self.size)
        everywhere = Targets(
            torch.tensor([[targets.boxes[0, 0].tolist(), [0.0, 0.0, self.size, self.size]]]),
            torch.cat([targets.labels, torch.zeros(1, 1, dtype=torch.int64)], 1),
            torch.tensor([[True, False]]),
            torch.tensor([[False, True]]),
        )
        with torch.no_grad():
            plain, ignoring = task(self.model, out, targets), task(self.model, out, everywhere)
        smaller = [name for name in plain if ignoring[name] < plain[name]]
        assert smaller
        assert all(torch.equal(ignoring[name], plain[name]) for name in plain if name not in smaller)

    def test_what_is_said_in_an_ignore_region_changes_no_loss(self) -> None:
        """Whatever the outputs there become: no loss moves, so nothing there is pushed up or down."""
        out = self.forward(pictures(1, self.size, self.size))
        half = self.size / 2
        targets = Targets(
            torch.tensor([[[4.0, 4.0, half - 8, half], [half, 0.0, self.size, self.size]]]),
            torch.zeros(1, 2, dtype=torch.int64),
            torch.tensor([[True, False]]),
            torch.tensor([[False, True]]),
        )
        inside = (
            (out.grid.points[:, 0] >= half) & (out.grid.points[:, 0] < self.size) & (out.grid.points[:, 1] < self.size)
        )
        assert 0 < int(inside.sum()) < len(inside)

        def said(value: Tensor | None, change: float) -> Tensor | None:
            if value is None:
                return None
            changed = value.clone()
            changed[:, inside] += change
            return changed

        with torch.no_grad():
            before = task(self.model, out, targets)
            for change in (-6.0, 6.0):
                probe = {n: said(getattr(out, n), change) for n in ("cls_logits", "quality", "box_raw", "boxes")}
                after = task(self.model, replace(out, **probe), targets)
                for name, value in before.items():
                    assert torch.equal(value, after[name]), name
            targets.ignore[:] = False
            assert any(not torch.equal(v, after[n]) for n, v in task(self.model, out, targets).items())

    def test_padding_is_neither_positive_nor_background(self) -> None:
        """No gradient reaches a location outside the image, not even beside a box at the image's edge."""
        side = self.size + 32
        out = self.model.train()(pictures(2, side, side))
        targets = boxes_of(2, 6, self.size)
        targets.boxes[:, 0] = torch.tensor([self.size - 20.0, self.size - 20.0, self.size, self.size])
        targets.boxes[:, 1] = torch.tensor([self.size - 6.0, 5.0, self.size, 15.0])
        targets.content = torch.tensor([[0.0, 0.0, self.size, self.size]] * 2)
        read = [t for t in (out.cls_logits, out.box_raw, out.quality) if t is not None]
        outside = (out.grid.points >= self.size).any(-1)
        assert outside.any()

        def gradients() -> list[Tensor]:
            total = torch.stack(list(task(self.model, out, targets).values())).sum()
            return list(torch.autograd.grad(total, read, retain_graph=True))

        for grad in gradients():
            assert grad[:, ~outside].any()
            assert not grad[:, outside].any()
        assert not self.model.assign(out, targets).fg[:, outside].any()
        targets.content = None  # padding is background like any other then
        assert any(bool(grad[:, outside].any()) for grad in gradients())

    def test_an_image_does_not_depend_on_its_neighbors(self) -> None:
        images = pictures(3, self.size, self.size)
        together = self.forward(images)
        for i in range(3):
            alone = self.forward(images[i : i + 1])
            torch.testing.assert_close(alone.boxes[0], together.boxes[i], rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(alone.cls_logits[0], together.cls_logits[i], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                self.model.scores(alone)[0], self.model.scores(together)[i], rtol=1e-4, atol=1e-6
            )

    @pytest.mark.parametrize("extra", [(0, 1), (16, 0), (-1, -1)])
    def test_odd_sizes_are_the_users_mistake(self, extra: tuple[int, int]) -> None:
        height, width = self.size + extra[0], self.size + extra[1]
        with pytest.raises(UserError, match=f"{height}x{width}.*multiples of {self.model.size_multiple}"):
            self.model(torch.zeros(1, 3, height, width))

    @pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 96), (160, 64)])
    def test_every_multiple_is_a_size(self, height: int, width: int) -> None:
        out = self.forward(pictures(1, height, width))
        assert out.grid.sizes == tuple((-(-height // s), -(-width // s)) for s in out.grid.strides)
        assert out.boxes.isfinite().all()

    def test_bf16_autocast(self) -> None:
        targets = boxes_of(2, 3, self.size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.model.train()(pictures(2, self.size, self.size))
            losses = task(self.model, out, targets)
            scores = self.model.scores(out)
        assert out.cls_logits.dtype == torch.bfloat16
        assert out.boxes.dtype == scores.dtype == torch.float32
        assert {v.dtype for v in losses.values()} == {torch.float32}
        outside = task(self.model, out, targets)
        assert all(torch.equal(losses[name], outside[name]) for name in losses)
        torch.stack(list(losses.values())).sum().backward()

    def test_uint8_and_float_pixels_are_the_same(self) -> None:
        images = pictures(1, self.size, self.size)
        assert torch.equal(self.forward(images).boxes, self.forward(images.float()).boxes)

    def test_class_predictors_are_the_layers_that_depend_on_the_classes(self) -> None:
        other = self.build([*NAMES, "yellow"]).state_dict()
        own = self.model.state_dict()
        assert list(own) == list(other)
        differ = {key for key in own if own[key].shape != other[key].shape}
        assert differ == {key for key in own if key.startswith(self.model.class_predictors)}

    def test_a_copy_is_independent(self) -> None:
        images = pictures(1, self.size, self.size)
        before = self.forward(images).boxes
        twin = copy.deepcopy(self.model).train()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not self.model.training
        assert torch.equal(self.forward(images).boxes, before)

    @pytest.mark.slow
    def test_compiles_without_graph_breaks(self) -> None:
        images = pictures(2, self.size, self.size)
        expected = self.forward(images)
        torch._dynamo.reset()
        compiled = torch.compile(self.model, backend="eager", fullgraph=True)
        with torch.no_grad():
            out = compiled(images)
        torch.testing.assert_close(out.boxes, expected.boxes)
        torch.testing.assert_close(out.cls_logits, expected.cls_logits)
        torch._dynamo.reset()

    @pytest.mark.slow
    @pytest.mark.parametrize(("nms", "dynamic"), [(True, True), (True, False), (False, True), (False, False)])
    def test_export_parity(self, nms: bool, dynamic: bool, toy: Path, tmp_path: Path) -> None:
        """With and without suppression in the graph, of free and of fixed shape; simplified, of known operators."""
        if (nms, dynamic) not in self.exports:
            pytest.skip("exported in other forms")
        data = load_split(find_data(str(toy)), "val")
        options = ExportOptions(self.size, nms=nms, dynamic=dynamic, conf=1e-5)
        path = export_checked(self.model.eval(), tmp_path / "x.onnx", options, data=data)
        note = json.loads((tmp_path / "x.parity.json").read_text())
        assert note["passed"]
        assert note["found"]["detections"] > 0
        assert sorted(f.name for f in tmp_path.iterdir()) == ["x.onnx", "x.parity.json"]  # no external data
        file = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(file, full_check=True)
        own = {"AveragePool"}  # of the tests' shallow backbone
        assert operators(file) - own <= (NETWORK | SUPPRESSION if nms else NETWORK)
        read = {name for node in file.graph.node for name in node.input}
        assert {array.name for array in file.graph.initializer} <= read  # nothing is left over
