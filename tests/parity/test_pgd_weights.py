"""PGD's foreground weights against the published code fed upright, and against the printed equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parity.vectors import Case, cases, padded
from yoloxkd.kd.functional.importance import (
    Predictions,
    gaussian_importance,
    inside_any,
    pgd_weights,
    quality,
    topk_low,
)

XI = (0.8, 0.6)
RTOL = 1e-7
NAMES = ("xi08", "xi06")
BINS = 16  # GFL's distance distributions have 17 values
SINGULAR = 1e-3  # px²; a fit flatter than this is left open by the paper


class Scene:
    """A case as padded batch: locations, what the teacher says there, ground truth."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        self.case, self.params = case, case.params
        if case.has("logits"):
            where = case.tensor("points") if case.has("points") else self._centers(case.tensor("anchors"))
            logits, decoded = case.tensor("logits")[None], case.tensor("decoded")[None]
            image = torch.zeros(len(case.tensor("boxes")), dtype=torch.int64)
        else:
            where, logits, decoded = self._from_levels()
            image = case.tensor("box_image")
        self.points = where.to(dtype)
        self.seen = Predictions(self.points, logits.to(dtype).sigmoid(), decoded.to(dtype))
        self.image = image
        self.truth = padded(case.tensor("boxes").to(dtype), image, len(logits), case.tensor("labels"))

    @staticmethod
    def _centers(boxes: Tensor) -> Tensor:
        return (boxes[:, :2] + boxes[:, 2:]) / 2

    def _from_levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decode the head outputs of a batch file: FCOS distances in px, or GFL distributions in strides."""
        case, points, logits, boxes = self.case, [], [], []
        fcos = case.has("centre__0")
        for i, stride in enumerate(self.params["strides"]):
            cls, reg = case.tensor(f"cls__{i}"), case.tensor(f"reg__{i}")
            n, _, h, w = cls.shape
            shift = stride // 2 if fcos else 0
            y, x = torch.meshgrid(torch.arange(h) * stride + shift, torch.arange(w) * stride + shift, indexing="ij")
            at = torch.stack([x, y], -1).reshape(-1, 2).double()
            if fcos:
                far = reg.permute(0, 2, 3, 1).reshape(n, -1, 4)
            else:
                bins = reg.permute(0, 2, 3, 1).reshape(n, -1, 4, BINS + 1).softmax(-1)
                far = (bins @ torch.arange(BINS + 1).double()) * stride
            points.append(at)
            logits.append(cls.flatten(2).transpose(1, 2))
            boxes.append(torch.cat([at - far[..., :2], at + far[..., 2:]], -1))
        return torch.cat(points), torch.cat(logits, 1), torch.cat(boxes, 1)

    def expected(self, name: str) -> Tensor:
        """(B, A) of a stored result, whether flat or by level."""
        if self.case.has(name):
            return self.case.tensor(name).reshape(1, -1)
        return torch.cat([self.case.tensor(n).flatten(1) for n in self.case.family(name)], 1)

    def ours(self, order: str, eps: float = 0.0) -> Tensor:
        boxes, labels, rows = self.truth
        return pgd_weights(
            self.seen, boxes, labels, rows, xi=XI, k=self.params["K"], order=order, eps=eps, det_eps=1e-10
        )


def comparable(prefix: str) -> list:
    """Cases with one answer; the `limit_*` files are for study."""
    return cases("pgd_weights", prefix)


ALL = [*comparable("points"), *comparable("anchors"), *comparable("batch")]


@pytest.mark.parametrize("case", ALL)
def test_release_order(case: Case) -> None:
    scene = Scene(case)
    for found, name in zip(scene.ours("release"), NAMES, strict=True):
        torch.testing.assert_close(found, scene.expected(f"upright_{name}"), rtol=RTOL, atol=1e-9)


@pytest.mark.parametrize("case", ALL)
def test_paper_order(case: Case) -> None:
    """Everywhere but inside boxes whose fit is singular, where the paper names no value."""
    scene = Scene(case)
    open_ = torch.zeros(scene.expected("paper_xi08").shape, dtype=torch.bool)
    for found, name in zip(scene.ours("paper"), NAMES, strict=True):
        if case.has(f"paper_mineig_{name}"):
            flat = ~(case.tensor(f"paper_mineig_{name}") > SINGULAR)
            open_ = inside_any(scene.points, scene.truth[0], flat[None])
        elif not case.has("logits"):
            open_ = few_inside(scene)
        torch.testing.assert_close(found[~open_], scene.expected(f"paper_{name}")[~open_], rtol=RTOL, atol=1e-9)
        assert (~open_).any()


def few_inside(scene: Scene) -> Tensor:
    """Locations in boxes that hold too few or only collinear locations to fit; found from the boxes alone."""
    boxes, _, rows = scene.truth
    flat = torch.zeros_like(rows)
    for b, g in rows.nonzero().tolist():
        x1, y1, x2, y2 = boxes[b, g]
        x, y = scene.points.T
        held = scene.points[(x > x1) & (x < x2) & (y > y1) & (y < y2)]
        flat[b, g] = len(held) < 3 or bool(torch.linalg.eigvalsh(torch.cov(held.T, correction=0))[0] < SINGULAR)
    return inside_any(scene.points, boxes, flat)


@pytest.mark.parametrize("case", ALL)
def test_background(case: Case) -> None:
    scene = Scene(case)
    boxes, _, rows = scene.truth
    h, w = case.params["image"]
    x, y = scene.points.T
    background = ~inside_any(scene.points, boxes, rows)
    if case.has("anchors"):  # the anchor version leaves locations outside the padded image out
        background &= (x < w) & (y < h)
    assert torch.equal(background.double(), scene.expected("upright_bg"))


@pytest.mark.parametrize("case", [*comparable("points"), *comparable("anchors")])
def test_fit(case: Case) -> None:
    """Mean and covariance of each box, and the weights of runs with the stored noise."""
    scene = Scene(case)
    boxes, labels, _ = scene.truth
    if not case.has("upright_mu_xi08"):
        pytest.skip("a case without boxes has nothing to fit")
    log_q = quality(scene.seen, boxes, labels, XI)
    best, index = topk_low(log_q, case.params["K"])
    at = scene.points[index]
    _, mean, covariance = gaussian_importance(at, best > -torch.inf, 0.0, 1e-10)
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(mean[i, 0], case.tensor(f"upright_mu_{name}"), rtol=RTOL, atol=1e-9)
        torch.testing.assert_close(covariance[i, 0], case.tensor(f"upright_cov_{name}"), rtol=RTOL, atol=1e-7)


@pytest.mark.parametrize("case", [*comparable("points"), *comparable("anchors")])
def test_deterministic_eps_is_as_small_as_the_noise(case: Case) -> None:
    """The constant on the diagonal moves no weight of a regular case by more than the release's own noise may."""
    if not case.has("noise_maxdev_xi08"):
        pytest.skip("a case without boxes has no noise")
    scene = Scene(case)
    moved = (scene.ours("release", eps=0.1**2 / 12)[0] - scene.ours("release")[0]).abs().max()
    assert float(moved) <= float(case.tensor("noise_maxdev_xi08").max())


@pytest.mark.parametrize("case", ALL)
def test_float32(case: Case) -> None:
    scene = Scene(case, torch.float32)
    for found, name in zip(scene.ours("release"), NAMES, strict=True):
        torch.testing.assert_close(found.double(), scene.expected(f"upright_{name}"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", comparable("limit"))
def test_limits_stay_finite(case: Case) -> None:
    scene = Scene(case)
    for order in ("paper", "release"):
        for eps in (0.0, 0.1**2 / 12):
            found = scene.ours(order, eps)
            assert found.isfinite().all()
            assert float(found.max()) <= 1.0
            assert float(found.max()) > 0.0
