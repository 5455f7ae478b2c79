"""Matrix NMS against the reference vectors `solo`: float64, the choice exactly."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from tests.parity.vectors import Case, cases
from yoloxkd.ops.matrix_nms import matrix_nms


@pytest.mark.parametrize("case", cases("solo", "matrix_nms"))
@pytest.mark.parametrize(("kernel", "name"), [("gaussian", "gauss"), ("linear", "linear")])
def test_solo_matrix_nms(case: Case, kernel: Literal["gaussian", "linear"], name: str) -> None:
    p = case.params
    rows, scores = matrix_nms(
        case.tensor("nms_masks"), case.tensor("nms_labels"), case.tensor("nms_scores"), candidates=p["nms_pre"],
        most=p["max_per_img"], threshold=p["filter_thr"], kernel=kernel, sigma=p["sigma"],
    )  # fmt: skip
    assert torch.equal(rows, case.tensor(f"nms_{name}_index").long())
    torch.testing.assert_close(scores, case.tensor(f"nms_{name}_score"), rtol=1e-9, atol=0)


def test_solo_no_masks() -> None:
    rows, scores = matrix_nms(torch.zeros(0, 4, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert len(rows) == len(scores) == 0
