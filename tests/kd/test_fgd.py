"""FGD: masks and losses against a plain reading of the equations, ablations, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kd.fakes import TinyDetector, make_batch
from tests.kd.plain import fgd_terms_by_image
from tests.losses import compared
from yoloxkd.kd.functional import masks
from yoloxkd.kd.methods.fgd import FGD, FGDConfig, GlobalContext, NonLocal, fgd_focal_terms, fgd_masks, fgd_relation
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import TASK

SCENES = {
    "images": st.integers(1, 3),
    "boxes": st.integers(0, 5),
    "h": st.integers(1, 9),
    "w": st.integers(1, 9),
    "seed": st.integers(0, 10_000),
}


def scene(images: int, boxes: int, h: int, w: int, seed: int) -> tuple[Tensor, Tensor, tuple[int, int], Tensor]:
    """Boxes that reach over the border and even lie outside; some rows do not count; some cells are excluded."""
    g = torch.Generator().manual_seed(seed)
    height, width = 8 * h, 8 * w
    at = torch.rand(images, boxes, 4, generator=g, dtype=torch.float64) * 1.4 - 0.2
    at = at * torch.tensor([width, height, width, height], dtype=torch.float64)
    xyxy = torch.cat([torch.minimum(at[..., :2], at[..., 2:]), torch.maximum(at[..., :2], at[..., 2:])], -1)
    rows = torch.rand(images, boxes, generator=g) < 0.8
    excluded = torch.rand(images, h, w, generator=g) < 0.2
    return xyxy, rows, (height, width), excluded


def plain_masks(boxes: Tensor, rows: Tensor, h: int, w: int, image: tuple[int, int], excluded: Tensor) -> list[Tensor]:
    """Cell by cell and box by box."""
    fg, bg = torch.zeros(len(boxes), h, w).double(), torch.zeros(len(boxes), h, w).double()
    for b in range(len(boxes)):
        for y in range(h):
            for x in range(w):
                best = 0.0
                for (x1, y1, x2, y2), real in zip(boxes[b].tolist(), rows[b].tolist(), strict=True):
                    left, right = math.floor(x1 * w / image[1]), math.ceil(x2 * w / image[1])
                    top, bottom = math.floor(y1 * h / image[0]), math.ceil(y2 * h / image[0])
                    if real and left <= x <= right and top <= y <= bottom:
                        best = max(best, 1 / ((right + 1 - left) * (bottom + 1 - top)))
                if not excluded[b, y, x]:
                    fg[b, y, x] = best
                    bg[b, y, x] = best == 0
        if bg[b].sum() > 0:
            bg[b] /= bg[b].sum()
    return [fg, bg]


@given(**SCENES)
@settings(max_examples=60, deadline=None)
def test_masks_equal_a_plain_reading(images: int, boxes: int, h: int, w: int, seed: int) -> None:
    xyxy, rows, image, excluded = scene(images, boxes, h, w, seed)
    found = fgd_masks(xyxy, rows, (h, w), image, excluded)
    for ours, plain in zip(found, plain_masks(xyxy, rows, h, w, image, excluded), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)


@given(**SCENES)
@settings(max_examples=40, deadline=None)
def test_terms_and_gradients_equal_a_plain_reading(images: int, boxes: int, h: int, w: int, seed: int) -> None:
    xyxy, rows, image, excluded = scene(images, boxes, h, w, seed)
    masks = fgd_masks(xyxy, rows, (h, w), image, excluded)
    torch.manual_seed(seed)
    s, t = torch.randn(2, images, 3, h, w, dtype=torch.float64)
    s.requires_grad_()
    ours, plain = fgd_focal_terms(s, t, *masks, 0.5), fgd_terms_by_image(s, t, *masks, 0.5)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12)
        if value.requires_grad:
            grads = [torch.autograd.grad(x, s, retain_graph=True)[0] for x in (ours[name], value)]
            torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", [GlobalContext, NonLocal])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradcheck(block: type, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    s = torch.randn(2, 4, 3, 2, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    t = torch.randn(2, 4, 3, 2, dtype=torch.float64).contiguous(memory_format=layout)
    blocks = [block(4).double() for _ in range(2)]
    for b in blocks:
        for p in b.parameters():
            torch.nn.init.normal_(p, std=0.5)
    fg, bg = torch.rand(2, 2, 3, 2, dtype=torch.float64)

    def total(x: Tensor, *parameters: Tensor) -> Tensor:
        terms = fgd_focal_terms(x, t, fg, bg, 0.7)
        return terms["fg"] + 2 * terms["bg"] + 3 * terms["attention"] + fgd_relation(x, t, *blocks)

    assert torch.autograd.gradcheck(total, (s, *blocks[0].parameters(), *blocks[1].parameters()))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    xyxy, rows, image, excluded = scene(3, 20, 8, 9, 1)
    whole = fgd_masks(xyxy, rows, (8, 9), image, excluded)
    monkeypatch.setattr(masks, "CELL_BUDGET", {"other": 3 * 8 * 9 * 6})
    for a, b in zip(whole, fgd_masks(xyxy, rows, (8, 9), image, excluded), strict=True):
        assert torch.equal(a, b)


def test_whole_pixels_do_not_spill_into_the_next_cell() -> None:
    """A box edge on a cell border stays there in float32, for every column of an odd-sized map."""
    width, w = 416, 52
    edges = torch.arange(0, width + 1, 8, dtype=torch.float32)
    boxes = torch.stack([torch.zeros_like(edges), torch.zeros_like(edges), edges, edges], -1)[None]
    for g in range(1, len(edges)):
        rows = torch.zeros(1, len(edges), dtype=torch.bool)
        rows[0, g] = True
        covered = fgd_masks(boxes, rows, (w, w), (width, width))[0][0, 0] > 0
        assert int(covered.sum()) == min(g + 1, w)


def distil(student: TinyDetector, teacher: TinyDetector, **keys: object) -> tuple[FGD, dict[str, Tensor]]:
    torch.manual_seed(0)
    batch = make_batch()
    method = FGD(FGDConfig(**keys), Pairing.between(student, teacher, nominal_size=32))
    with torch.no_grad():
        seen = teacher.eval()(batch.images)
    return method, compared(method, student.eval()(batch.images), seen, batch, teacher)


def pair(student: int = 6, teacher: int = 6) -> tuple[TinyDetector, TinyDetector]:
    torch.manual_seed(1)
    return TinyDetector(student), TinyDetector(teacher)


def test_terms_are_named_by_level_and_weighted() -> None:
    _, once = distil(*pair(), alpha=1e-3)
    _, twice = distil(*pair(), alpha=2e-3)
    assert set(once) == {f"{t}/s{s}" for t in ("fg", "bg", "attention", "global") for s in (8, 16)}
    torch.testing.assert_close(2 * once["fg/s8"], twice["fg/s8"])
    torch.testing.assert_close(once["bg/s8"], twice["bg/s8"])
    assert all(v.dtype == torch.float32 and v.ndim == 0 for v in once.values())


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    """The global blocks start as the identity, so that term too is zero at first."""
    teacher = pair()[1]
    _, found = distil(teacher, teacher)
    assert all(float(v.detach()) == 0.0 for v in found.values())


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ({"global": False}, {"fg", "bg", "attention"}),
        ({"focal": False}, {"global"}),
        ({"spatial_attention": False, "channel_attention": False}, {"fg", "bg", "global"}),
        ({"gamma": 0, "lambda": 0}, {"fg", "bg"}),
        ({"relation": "nonlocal"}, {"fg", "bg", "attention", "global"}),
    ],
)
def test_ablations(keys: dict[str, object], left: set[str]) -> None:
    method, found = distil(*pair(), **keys)
    assert {k.partition("/")[0] for k in found} == left
    assert [str(n._replace(source=TASK)) for n in method.terms] == list(found)
    assert any(True for _ in method.parameters()) == ("global" in left)


def test_each_attention_matters() -> None:
    values = [
        float(distil(*pair(), spatial_attention=s, channel_attention=c)[1]["fg/s8"].detach())
        for s in (True, False)
        for c in (True, False)
    ]
    assert len(set(values)) == 4


def test_area_ratio_divides_every_term() -> None:
    _, plain = distil(*pair())
    _, scaled = distil(*pair(), scale_by_area=True)
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value / 4)  # 64 px input, 32 px nominal


def test_adapters_only_where_channels_differ() -> None:
    method, _ = distil(*pair())
    assert not method.adapters.convs
    method, found = distil(*pair(4, 6))
    assert sorted(method.adapters.convs) == ["features_s16", "features_s8"]
    torch.stack(list(found.values())).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.adapters.parameters())


def test_ignored_and_padded_cells_teach_nothing() -> None:
    """Changing the student there changes neither foreground nor background."""
    student, teacher = pair()
    batch = make_batch(1)
    batch.content[:] = torch.tensor([0.0, 0.0, 64.0, 40.0])
    batch.targets.boxes[0, 0] = torch.tensor([16.0, 0.0, 30.0, 16.0])
    batch.targets.mask[0], batch.targets.ignore[0] = torch.tensor([False, True, True, True]), False
    batch.targets.ignore[0, 0] = True
    method = FGD(FGDConfig(), Pairing.between(student, teacher))
    with torch.no_grad():
        ours, theirs = student(batch.images), teacher(batch.images)
        before = compared(method, ours, theirs, batch, teacher)
        masks = fgd_masks(batch.targets.boxes, batch.targets.mask, (8, 8), (64, 64))
        assert float(masks[0][:, 5:].sum() + masks[1][:, 5:].sum()) > 0  # without the exclusion they would count
        ours.features[0][:, :, 5:] += 1.0  # below the image
        ours.features[0][:, :, 0:3, 2:5] += 1.0  # floor(16/8) .. ceil(30/8), floor(0/8) .. ceil(16/8)
        after = compared(method, ours, theirs, batch, teacher)
    for term in ("fg/s8", "bg/s8"):
        torch.testing.assert_close(before[term], after[term])
    assert not torch.equal(before["global/s8"], after["global/s8"])


def test_float16_maps_with_large_values_stay_finite() -> None:
    s = (torch.rand(1, 256, 160, 160) * 2000 - 1000).half().requires_grad_()
    t = (torch.rand(1, 256, 160, 160) * 2000 - 1000).half()
    boxes, rows = torch.tensor([[[100.0, 100, 900, 700]]]), torch.ones(1, 1, dtype=torch.bool)
    masks = fgd_masks(boxes, rows, (160, 160), (1280, 1280))
    blocks = [GlobalContext(256) for _ in range(2)]
    terms = fgd_focal_terms(s, t, *masks, 0.5) | {"global": fgd_relation(s, t, *blocks)}
    assert all(v.isfinite() and v.dtype == torch.float32 for v in terms.values())
    weights = {"fg": 2e-3, "bg": 1e-3, "attention": 1e-3, "global": 1e-5}
    sum(terms[k] * w for k, w in weights.items()).backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(amp: torch.dtype) -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 2, 8, 6, 6)
    masks = torch.rand(2, 2, 6, 6)
    blocks = [GlobalContext(8) for _ in range(2)]
    for b in blocks:
        torch.nn.init.normal_(b.expand.weight)
    plain = fgd_focal_terms(s, t, *masks, 0.5) | {"global": fgd_relation(s, t, *blocks)}
    with torch.autocast("cpu", dtype=amp):
        cast = fgd_focal_terms(s, t, *masks, 0.5) | {"global": fgd_relation(s, t, *blocks)}
    for name, value in plain.items():
        assert torch.equal(value, cast[name])
