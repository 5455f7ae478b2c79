"""`--kd response` against BCKD's head: both terms of every level and the gradients, of the batch and image by image.

The release adds 2^-23 to the number that it divides by, and counts a level without positives as 0. Neither is in its
paper or here; both are put in before the numbers are compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.vectors import Case, cases, close
from yoloxkd.kd.base import Pair, Step
from yoloxkd.kd.functional.predictions import score_divergence
from yoloxkd.kd.methods.response import Response, ResponseConfig
from yoloxkd.kd.pairing import LevelPair, Pairing
from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.dense.dense_detector import flat
from yoloxkd.nn.dense.gfl import expected_distances
from yoloxkd.nn.detector import BoxCode, DetectorSpec, InputConvention
from yoloxkd.ops.boxes import from_distances
from yoloxkd.ops.points import grid_of
from yoloxkd.types import Batch, DenseOutput, Targets

SLACK = 2.0**-23


def output(case: Case, side: str) -> tuple[DenseOutput, list[Tensor], list[Tensor]]:
    """What GFL says, and the leaves that it is made of."""
    logits, sides = (
        [case.tensor(n).requires_grad_() for n in case.family(f"{what}_{side}")] for what in ("cls", "reg")
    )
    grid = grid_of([(x.shape[2], x.shape[3]) for x in logits], case.params["strides"], torch.device("cpu"), offset=0.0)
    raw = flat(sides)
    boxes = from_distances(grid.points.double(), expected_distances(raw) * grid.point_strides.double().unsqueeze(-1))
    image = tuple(case.params["image"])
    return DenseOutput((), (), (), (), flat(logits), raw, boxes, None, grid, image), logits, sides


def terms(case: Case, image: int | None = None) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor], Tensor, float]:
    """{term: (levels,)} before the weights, of the batch or one image; leaves; where levels have positives; the divisor."""
    student, logits, sides = output(case, "S")
    teacher, _, _ = output(case, "T")
    rows = slice(None) if image is None else slice(image, image + 1)
    positive = (case.tensor("target_label") < case.params["K"])[rows]

    def cut(out: DenseOutput) -> DenseOutput:
        return DenseOutput(
            (), (), (), (), out.cls_logits[rows], out.box_raw[rows], out.boxes[rows], None, out.grid, out.image_size
        )

    strides = tuple(case.params["strides"])
    spec = DetectorSpec(
        tuple(map(str, range(case.params["K"]))), strides, {}, BoxCode("distributions", 17), InputConvention()
    )
    known = torch.arange(case.params["K"])
    levels = tuple(LevelPair(s, i, i) for i, s in enumerate(strides))
    method = Response(ResponseConfig(alpha=1.0, beta=1.0), Pairing(levels, spec, spec, known, known >= 0))
    images, (height, width) = len(positive), case.params["image"]
    empty = Targets(*(torch.zeros(images, 0, *shape, dtype=kind) for shape, kind in (((4,), torch.float32), ((), torch.int64), ((), torch.bool), ((), torch.bool))))  # fmt: skip
    batch = Batch(torch.zeros(images, 3, 1, 1), empty, torch.tensor([[0.0, 0, width, height]]).expand(images, -1))
    models: Any = Pair(None, None)  # type: ignore[arg-type]
    match = Match.of(positive, torch.where(positive, 0, -1))
    losses = method.compare(Step(cut(student), cut(teacher), batch, match, models))
    divisor = max(1.0, float(positive.sum(1).clamp(min=1).sum()))
    found: dict[str, Tensor] = {}
    for term in ("classes", "boxes"):
        values = [loss.mean() for name, loss in losses.items() if name.term == term]
        found[term] = torch.stack(values) * (divisor / (divisor + SLACK))
    level_has = torch.stack([positive[:, part].any() for part in student.grid.slices()])
    return found, logits, sides, level_has, divisor


@pytest.mark.parametrize("case", [c for c in cases("kd_baselines/bckd") if c.id != "pieces"])
def test_baselines_bckd(case: Case) -> None:
    found, logits, sides, level_has, divisor = terms(case)
    assert divisor == case.params["avg"]
    close(found["classes"], case.tensor("cls_no_rule"))
    close(found["boxes"], case.tensor("box_no_rule"))
    ruled = {term: value * level_has for term, value in found.items()}
    close(ruled["classes"], case.tensor("cls"))
    close(ruled["boxes"], case.tensor("box"))
    for term, leaves, named in (("classes", logits, "grad_cls_S"), ("boxes", sides, "grad_reg_S")):
        if case.has(f"{named}__0"):
            grads = torch.autograd.grad(ruled[term].sum(), leaves, retain_graph=True)
            for grad, name in zip(grads, case.family(named), strict=True):
                close(grad, case.tensor(name))


@pytest.mark.parametrize("case", [c for c in cases("kd_baselines/bckd") if c.id != "pieces"])
def test_baselines_bckd_image_by_image(case: Case) -> None:
    for image in range(case.params["N"]):
        found, _, _, level_has, divisor = terms(case, image)
        assert divisor == case.params["avg_each"][image]
        close(found["classes"] * level_has, case.tensor("cls_each")[image])
        close(found["boxes"] * level_has, case.tensor("box_each")[image])


@pytest.mark.parametrize("case", cases("kd_baselines/bckd", "pieces"))
def test_baselines_bckd_pieces(case: Case) -> None:
    logits, wanted = case.tensor("rows_S").requires_grad_(), case.tensor("rows_T").sigmoid()
    rows, _ = score_divergence(logits, wanted)
    close(rows, case.tensor("rows_value"))
    close(score_divergence(logits, wanted, 2.0)[0], case.tensor("rows_value2"))
    total = (rows * case.tensor("rows_weight")).sum() / (case.params["avg"] + SLACK)
    close(total, case.tensor("rows_total"))
    close(torch.autograd.grad(total, logits)[0], case.tensor("grad_rows"))
