"""YOLOX as a detector: initialization, taps, input sizes, losses outside the reference vectors, export."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.losses import task
from yoloxkd.errors import UserError
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.dense.yolox import YOLOX, decode, encode
from yoloxkd.types import DenseOutput, Tap, Targets


@pytest.fixture
def model() -> YOLOX:
    torch.manual_seed(0)
    return YOLOX(YOLOX.Config(depth=0.33, width=0.125, depthwise=True), ["a", "b", "c"])


def targets(images: int = 2, dtype: torch.dtype = torch.float32) -> Targets:
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 8.0, 60.0, 30.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    mask = torch.tensor([True, True, False]).repeat(images, 1)
    return Targets(boxes.repeat(images, 1, 1), torch.tensor([2, 0, 0]).repeat(images, 1), mask, torch.zeros_like(mask))


def test_the_table_knows_the_family() -> None:
    assert DETECTORS["yolox"] is YOLOX
    assert YOLOX.family == "yolox"


def test_untrained_head_gives_every_class_the_prior_probability(model: YOLOX) -> None:
    assert model.head.cls_preds[0].bias is not None
    for predictor in [*model.head.cls_preds, *model.head.obj_preds]:
        bias = predictor.get_parameter("bias")
        assert torch.allclose(bias.sigmoid(), torch.full_like(bias, 0.01))


def test_batch_norms_are_those_of_the_release(model: YOLOX) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}


def test_output_shapes_and_taps(model: YOLOX) -> None:
    out = model.eval()(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8))
    a = 8 * 12 + 4 * 6 + 2 * 3
    assert out.cls_logits.shape == (2, a, 3)
    assert out.quality is not None
    assert out.quality.shape == (2, a)
    assert out.boxes.shape == out.box_raw.shape == (2, a, 4)
    assert out.grid.points.shape == (a, 2)
    assert out.grid.point_strides.unique().tolist() == list(out.grid.strides) == [8, 16, 32]
    assert out.grid.sizes == ((8, 12), (4, 6), (2, 3))
    assert out.image_size == (64, 96)
    for name in ("features", "cls_features", "reg_features"):
        maps = getattr(out, name)
        assert tuple(m.shape[1] for m in maps) == tuple(model.spec.channels[Tap(name)].values()) == (32, 32, 32)
        assert tuple(tuple(m.shape[2:]) for m in maps) == out.grid.sizes


def test_taps_are_the_inputs_of_what_follows(model: YOLOX) -> None:
    out = model.eval().network(torch.rand(1, 3, 64, 64) * 255)
    for level in range(3):
        head = model.head
        assert torch.equal(head.cls_convs[level][0](out.features[level]), out.cls_features[level])
        assert torch.equal(head.reg_convs[level][0](out.features[level]), out.reg_features[level])
        logits = head.cls_preds[level](head.cls_convs[level][1](out.cls_features[level])).flatten(2).transpose(1, 2)
        first = sum(h * w for h, w in out.grid.sizes[:level])
        assert torch.equal(out.cls_logits[:, first : first + logits.shape[1]], logits)


def test_the_input_is_rgb_and_the_network_reads_bgr(model: YOLOX) -> None:
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    model.eval()
    assert torch.equal(model(image).boxes, model.network(image.flip(1).float()).boxes)


@pytest.mark.parametrize("size", [(64, 80), (33, 64)])
def test_a_size_that_32_does_not_divide_is_the_users_mistake(model: YOLOX, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"{size[0]}x{size[1]}.*multiples of 32"):
        model(torch.zeros(1, 3, *size))


def test_scores_and_class_probability_are_class_times_objectness(model: YOLOX) -> None:
    out = model.eval()(torch.zeros(1, 3, 32, 32))
    assert out.quality is not None
    expected = out.cls_logits.sigmoid() * out.quality.sigmoid()[..., None]
    assert torch.equal(model.scores(out), expected)
    assert torch.equal(model.class_probability(out), expected)


def test_encode_inverts_decode() -> None:
    raw = torch.randn(5, 4, dtype=torch.float64)
    points = torch.tensor([[4.0, 12.0], [8.0, 8.0], [16.0, 48.0], [80.0, 16.0], [4.0, 4.0]])
    strides = torch.tensor([8.0, 16.0, 32.0, 32.0, 8.0])
    torch.testing.assert_close(encode(decode(raw, points, strides), points, strides), raw, rtol=1e-6, atol=1e-6)


def test_final_phase_switches_the_l1_term(model: YOLOX) -> None:
    out = model(torch.rand(2, 3, 64, 64) * 255)
    assert list(task(model, out, targets())) == ["box", "obj", "cls"]
    model.final_phase(True)
    assert list(task(model, out, targets())) == ["box", "obj", "cls", "l1"]
    model.final_phase(False)
    assert list(task(model, out, targets())) == ["box", "obj", "cls"]


def test_every_parameter_learns(model: YOLOX) -> None:
    # An untrained network predicts boxes as large as a cell, around its corner: each of these three suits another level.
    boxes = torch.tensor([[[4.0, 5.0, 13.0, 12.0], [25.0, 40.0, 40.0, 57.0], [48.0, 17.0, 81.0, 48.0]]]).repeat(2, 1, 1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    truth = Targets(boxes, torch.tensor([[0, 1, 2]] * 2), mask, ~mask)
    out = model(torch.rand(2, 3, 64, 96) * 255)
    torch.stack(list(task(model, out, truth).values())).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("rows", [0, 2])
def test_without_boxes_only_objectness_is_left(model: YOLOX, rows: int) -> None:
    none = torch.zeros(2, rows, dtype=torch.bool)
    empty = Targets(torch.zeros(2, rows, 4), torch.zeros(2, rows, dtype=torch.int64), none, none)
    model.final_phase(True)
    losses = task(model, model(torch.rand(2, 3, 64, 64) * 255), empty)
    assert losses["obj"] > 0
    assert {name: float(v.detach()) for name, v in losses.items() if name != "obj"} == {"box": 0, "cls": 0, "l1": 0}
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def objectness_by_cell(out: DenseOutput) -> Tensor:
    assert out.quality is not None
    return torch.nn.functional.softplus(out.quality.double())


def test_an_ignore_region_takes_its_cells_out_of_the_objectness_loss(model: YOLOX) -> None:
    out = model.eval()(torch.rand(1, 3, 64, 64) * 255)
    none = torch.zeros(1, 1, dtype=torch.bool)
    region = torch.tensor([[[0.0, 0.0, 30.0, 20.0]]])
    ignored = Targets(region, torch.zeros(1, 1, dtype=torch.int64), none, ~none)
    inside = ((out.grid.points >= region[0, :, :2]) & (out.grid.points <= region[0, :, 2:])).all(-1)
    assert 0 < int(inside.sum()) < len(inside)
    expected = objectness_by_cell(out)[:, ~inside].sum()
    assert float(task(model, out, ignored)["obj"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_positive_cells_count_inside_an_ignore_region(model: YOLOX) -> None:
    out = model.eval()(torch.rand(1, 3, 64, 64) * 255)
    one = targets(1)
    plain = task(model, out, one)
    everywhere = Targets(
        torch.tensor([[*one.boxes[0, :2].tolist(), [0, 0, 64, 64]]]),
        one.labels,
        one.mask,
        torch.tensor([[False, False, True]]),
    )
    ignoring = task(model, out, everywhere)
    assert torch.equal(plain["box"], ignoring["box"])
    assert torch.equal(plain["cls"], ignoring["cls"])
    assert 0 < ignoring["obj"] < plain["obj"]


def test_autocast_keeps_decoding_and_losses_in_float32(model: YOLOX) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.rand(2, 3, 64, 64) * 255)
        assert out.box_raw.dtype == torch.bfloat16
        assert out.boxes.dtype == torch.float32
        losses = task(model, out, targets())
    assert {v.dtype for v in losses.values()} == {torch.float32}
    outside = task(model, out, targets())
    assert all(torch.equal(losses[name], outside[name]) for name in losses)


def test_float16_codes_do_not_overflow() -> None:
    raw = torch.tensor([[0.0, 0.0, 12.0, 12.0]], dtype=torch.float16)  # e^12 is beyond float16
    boxes = decode(raw, torch.tensor([[4.0, 4.0]]), torch.tensor([8.0]))
    assert boxes.dtype == torch.float32
    assert boxes.isfinite().all()
    assert float(boxes[0, 2] - boxes[0, 0]) == pytest.approx(8 * math.exp(12), rel=1e-4)


class Exported(nn.Module):
    def __init__(self, model: YOLOX) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(images)
        return out.boxes, self.model.scores(out)


@pytest.mark.slow
def test_the_network_can_be_exported_with_any_batch_and_size(model: YOLOX) -> None:
    wrapped = Exported(model.eval()).eval()
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    shapes = ({0: torch.export.Dim("batch", max=64), 2: 32 * height, 3: 32 * width},)
    program = torch.export.export(wrapped, (torch.rand(2, 3, 64, 96),), dynamic_shapes=shapes)
    images = torch.rand(3, 3, 128, 64) * 255
    for got, expected in zip(program.module()(images), wrapped(images), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
