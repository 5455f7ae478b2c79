"""FGD against the published code: masks, attentions, every term, the total and the gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.vectors import Case, cases, padded
from yoloxkd.kd.functional.attention import channel_attention, spatial_attention
from yoloxkd.kd.methods.fgd import GlobalContext, fgd_focal_terms, fgd_masks, fgd_relation

RTOL = 1e-9
GRADIENTS = {
    "grad_preds_S": "preds_S",
    "grad_align_w": "align_w",
    "grad_mask_s_w": "mask_s_w",
    "grad_mask_t_w": "mask_t_w",
    "grad_add_s_0_w": "add_s_0_w",
    "grad_add_t_3_w": "add_t_3_w",
}


class Run:
    """One case through the package's functions, in the vectors' dtype or another."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        p = case.params
        self.case = case
        self.x = {n: case.tensor(n) for n in case.arrays if not n.startswith("grad_")}
        self.x = {n: v.to(dtype) if v.is_floating_point() else v for n, v in self.x.items()}
        self.student = self.x["preds_S"].requires_grad_()
        self.blocks = {side: self._block(side) for side in "st"}
        aligned = self.student
        if case.has("align_w"):
            self.x["align_w"].requires_grad_()
            aligned = F.conv2d(aligned, self.x["align_w"], self.x["align_b"])
        self.aligned = aligned
        images, _, h, w = self.x["preds_T"].shape
        boxes, _, rows = padded(self.x["boxes"], self.x["box_image"], images)
        scale = torch.tensor([p.get("scale_y", 1.0), p.get("scale_x", 1.0)], dtype=dtype)
        self.masks = fgd_masks(boxes, rows, (h, w), self.x["img_shape"] * scale)
        self.terms = fgd_focal_terms(aligned, self.x["preds_T"], *self.masks, p["temp"])
        self.terms["relation"] = fgd_relation(aligned, self.x["preds_T"], self.blocks["s"], self.blocks["t"])
        weights = {"fg": p["alpha"], "bg": p["beta"], "attention": p["gamma"], "relation": p["lambda_"]}
        self.total = sum(self.terms[n] * w for n, w in weights.items()) / scale.prod()

    def _block(self, side: str) -> GlobalContext:
        block = GlobalContext(self.x["preds_T"].shape[1]).to(self.student.dtype)
        shapes = {k: v.shape for k, v in block.state_dict().items()}
        names = {"logit": "mask_{}", "squeeze": "add_{}_0", "norm": "add_{}_ln", "expand": "add_{}_3"}
        state = {
            f"{ours}.{long}": self.x[f"{theirs.format(side)}_{short}"]
            for ours, theirs in names.items()
            for long, short in (("weight", "w"), ("bias", "b"))
            if f"{ours}.{long}" in shapes  # the published bias of the logits does not reach past their softmax
        }
        block.load_state_dict({k: v.reshape(shapes[k]) for k, v in state.items()})
        return block

    def gradient(self, name: str) -> Tensor:
        leaf = {
            "preds_S": self.student,
            "align_w": self.x.get("align_w"),
            "mask_s_w": self.blocks["s"].logit.weight,
            "mask_t_w": self.blocks["t"].logit.weight,
            "add_s_0_w": self.blocks["s"].squeeze.weight,
            "add_t_3_w": self.blocks["t"].expand.weight,
        }[name]
        return torch.autograd.grad(self.total, leaf, retain_graph=True)[0]


def close(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Relative to the largest entry, so that entries that cancel to nothing are not asked for digits they lack."""
    atol = rtol * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.detach().double(), expected.reshape(actual.shape), rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", cases("fgd"))
def test_masks_and_attentions(case: Case) -> None:
    run = Run(case)
    close(run.masks[0], case.tensor("mask_fg"), RTOL)
    close(run.masks[1], case.tensor("mask_bg"), RTOL)
    tau = case.params["temp"]
    for side, x in (("S", run.aligned), ("T", run.x["preds_T"])):
        strong = x.abs().flatten(2)
        close(spatial_attention(strong.mean(1), tau).view(-1, *x.shape[2:]), case.tensor(f"spatial_att_{side}"), RTOL)
        close(channel_attention(strong.mean(2), tau), case.tensor(f"channel_att_{side}"), RTOL)
        block = run.blocks[side.lower()]
        close(block.context(x), case.tensor(f"context_{side}"), RTOL)
        close(block(x)[..., 0, 0], case.tensor(f"add_out_{side}"), RTOL)


@pytest.mark.parametrize("case", cases("fgd"))
def test_terms_total_and_gradients(case: Case) -> None:
    run = Run(case)
    for name in ("fg", "bg", "attention", "relation"):
        close(run.terms[name], case.tensor(name), RTOL)
    close(run.total, case.tensor("total"), RTOL)
    for stored, leaf in GRADIENTS.items():
        if case.has(stored):
            close(run.gradient(leaf), case.tensor(stored), RTOL)


@pytest.mark.parametrize("case", cases("fgd"))
def test_float32(case: Case) -> None:
    run = Run(case, torch.float32)
    for name in ("fg", "bg", "attention", "relation"):
        close(run.terms[name], case.tensor(name), 1e-4)
    close(run.total, case.tensor("total"), 1e-4)
    close(run.gradient("preds_S"), case.tensor("grad_preds_S"), 1e-3)
