"""CWD on normalized maps against DAMO-YOLO's loss, run one image at a time: the term, its mean and the gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.parity.vectors import Case, cases, close
from yoloxkd.kd.methods.cwd import channel_divergence, normalized


@pytest.mark.parametrize("case", cases("kd_baselines/cwd_norm"))
def test_baselines_cwd_norm(case: Case) -> None:
    names = [case.family(name) for name in ("feat_S", "feat_T", "align_w", "align_b")]
    leaves = [case.tensor(name).requires_grad_() for name in names[0]]
    each = []
    for student, theirs, weight, bias in zip(leaves, *names[1:], strict=True):
        ours, teacher = F.conv2d(student, case.tensor(weight), case.tensor(bias)), case.tensor(theirs)
        pair = [normalized(x) for x in (ours, teacher)]
        alone = [channel_divergence(s[None], t[None], case.params["tau"]) for s, t in zip(*pair, strict=True)]
        each.append(torch.stack(alone))
        close(channel_divergence(*pair, case.params["tau"]), torch.stack(alone).mean())
    total = torch.stack(each).sum(0)
    close(total, case.tensor("loss_each"))
    close(total.mean(), case.tensor("loss_mean"))
    images = case.params["N"]
    expected = (
        case.family("grad_mean_feat_S") if images > 1 else case.family("grad_feat_S")
    )  # of one image they are equal
    for grad, name in zip(torch.autograd.grad(total.mean(), leaves), expected, strict=True):
        close(grad, case.tensor(name))


@pytest.mark.parametrize("case", cases("kd_baselines/cwd_norm", "n1"))
def test_baselines_cwd_norm_of_one_image_is_the_release(case: Case) -> None:
    for level, (name, weight, bias) in enumerate(
        zip(*(case.family(n) for n in ("feat_S", "align_w", "align_b")), strict=True)
    ):
        ours = normalized(F.conv2d(case.tensor(name), case.tensor(weight), case.tensor(bias)))
        teacher = normalized(case.tensor(case.family("feat_T")[level]))
        close(ours, case.tensor(case.family("norm_S")[level]))
        close(teacher, case.tensor(case.family("norm_T")[level]))
        close(channel_divergence(ours, teacher, case.params["tau"]), case.tensor("loss_level")[level])
