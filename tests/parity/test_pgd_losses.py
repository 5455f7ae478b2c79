"""PGD's losses against the published code run one image at a time: every term, the mean over images, the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parity.vectors import Case, cases
from yoloxkd.kd.functional.attention import local_channel_attention, spatial_attention
from yoloxkd.kd.methods.pgd import pgd_cls_terms, pgd_reg_terms


def close(actual: Tensor, expected: Tensor, rtol: float) -> None:
    atol = rtol * float(expected.abs().max())
    torch.testing.assert_close(actual.detach().double(), expected.reshape(actual.shape), rtol=rtol, atol=atol)


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    names = ("preds_S", "preds_T", "mask_cls", "mask_reg", "mask_bg")
    student, teacher, *masks = (case.tensor(n, dtype) for n in names)
    return student.requires_grad_(), teacher, *(m.squeeze(1) for m in masks)


def totals(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    p = case.params
    student, teacher, mask_cls, mask_reg, mask_bg = inputs(case, dtype)
    cls = pgd_cls_terms(student, teacher, mask_cls, mask_bg, p["temp"])
    reg = pgd_reg_terms(student, teacher, mask_reg, p["temp"])
    cls_total = p["level_weight"] * (p["alpha"] * cls["fg"] + p["beta"] * cls["bg"]) + p["delta"] * cls["attention"]
    return student, cls_total, p["gamma"] * reg["fea"] + p["delta"] * reg["attention"], cls, reg


@pytest.mark.parametrize("case", cases("pgd_losses"))
def test_attentions(case: Case) -> None:
    for side in "ST":
        magnitude = case.tensor(f"preds_{side}").abs()
        strong = magnitude.flatten(2).mean(1)
        close(spatial_attention(strong, case.params["temp"]), case.tensor(f"spatial_{side}").flatten(1), 1e-9)
        close(local_channel_attention(magnitude, case.params["temp"]), case.tensor(f"channel_{side}"), 1e-9)


@pytest.mark.parametrize("case", cases("pgd_losses"))
def test_batch_is_the_mean_of_its_images(case: Case) -> None:
    student, cls_total, reg_total, cls, reg = totals(case, torch.float64)
    for ours, theirs in (("fg", "cls_fg"), ("bg", "cls_bg"), ("attention", "cls_att")):
        close(cls[ours], case.tensor(f"{theirs}_each").mean(), 1e-9)
    for ours, theirs in (("fea", "reg_fea"), ("attention", "reg_att")):
        close(reg[ours], case.tensor(f"{theirs}_each").mean(), 1e-9)
    close(cls_total, case.tensor("cls_total_mean"), 1e-9)
    close(reg_total, case.tensor("reg_total_mean"), 1e-9)
    for total, name in ((cls_total, "grad_cls_mean"), (reg_total, "grad_reg_mean")):
        close(torch.autograd.grad(total, student, retain_graph=True)[0], case.tensor(name), 1e-9)


@pytest.mark.parametrize("case", cases("pgd_losses", "n1"))
def test_one_image_equals_the_release(case: Case) -> None:
    student, cls_total, reg_total, _, _ = totals(case, torch.float64)
    close(cls_total, case.tensor("cls_total_released"), 1e-9)
    close(reg_total, case.tensor("reg_total_released"), 1e-9)
    close(torch.autograd.grad(cls_total, student, retain_graph=True)[0], case.tensor("grad_cls_released"), 1e-9)
    close(torch.autograd.grad(reg_total, student)[0], case.tensor("grad_reg_released"), 1e-9)


@pytest.mark.parametrize("case", cases("pgd_losses"))
def test_float32(case: Case) -> None:
    student, cls_total, reg_total, _, _ = totals(case, torch.float32)
    close(cls_total, case.tensor("cls_total_mean"), 1e-4)
    close(reg_total, case.tensor("reg_total_mean"), 1e-4)
    close(torch.autograd.grad(cls_total, student)[0], case.tensor("grad_cls_mean"), 1e-3)
