"""Losses as named values: their texts, and what the engine divides them by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.engine.test_step import batch, family
from yoloxkd.engine.parallel import gradients
from yoloxkd.engine.step import AuxiliaryLoss, StudentPass, TrainStep
from yoloxkd.errors import UserError
from yoloxkd.types import TASK, Draw, Loss, Losses, LossName


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (LossName(TASK, "cls"), "cls"),
        (LossName(TASK, "rpn/cls", 8), "rpn/cls/s8"),
        (LossName("pgd", "cls_fg", 16), "pgd/cls_fg/s16"),
        (LossName("pgd@2", "cls_fg"), "pgd@2/cls_fg"),
    ],
)
def test_a_name_as_text(name: LossName, text: str) -> None:
    assert str(name) == f"{name}" == text


def test_a_sum_is_divided_by_its_count_and_at_least_by_something() -> None:
    six = torch.tensor(6.0)
    assert float(Loss(six).mean()) == 6.0
    assert float(Loss(six, torch.tensor(4)).mean()) == 1.5
    assert float(Loss(six, torch.tensor(0)).mean()) == 6.0
    assert float(Loss(six, torch.tensor(0.25), 0.5).mean()) == 12.0


class Bright(AuxiliaryLoss):
    """The square of a learned number for every bright image, over the number of bright images: parts have unequal numbers."""

    names = (LossName("bright", "square"),)
    counted = True

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(1.5))

    def forward(self, student: StudentPass) -> Losses:
        bright = (student.batch.images.flatten(1).float().mean(1) > 100).float()
        value = self.number * bright * student.batch.images.flatten(1).float().amax(1)
        return {self.names[0]: Loss(value.square().sum(), bright.sum())}


def test_counts_of_an_auxiliary_loss_are_those_of_the_whole_batch() -> None:
    found: list[tuple[dict[str, Tensor], Tensor]] = []
    for parts in (1, 2):
        student, _ = family("yolox")
        step = TrainStep(student.eval(), nn.ModuleDict({"bright": Bright()}))
        data = batch(4)
        data.images = torch.full_like(data.images, 40)
        data.images[:3] += torch.tensor([200, 150, 90], dtype=torch.uint8).view(3, 1, 1, 1)
        pieces = [data.part(i, parts) for i in range(parts)]
        losses = gradients(step, pieces, Draw(), lambda loss: loss.backward(), lambda part, terms: terms)
        grad = step.aux["bright"].number.grad
        assert isinstance(grad, Tensor)
        found.append(({str(name): value for name, value in losses.items()}, grad))
    (once, grad), (taken, grad_of_parts) = found
    assert float(once["bright/square"]) == pytest.approx(1.5**2 * (240**2 + 190**2 + 130**2) / 3)
    for name, value in once.items():
        torch.testing.assert_close(taken[name], value, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(grad_of_parts, grad)


def test_what_is_no_auxiliary_loss_is_named() -> None:
    student, _ = family("yolox")
    with pytest.raises(UserError, match=r"state\.aux\['mine'\] is a Linear"):
        TrainStep(student, nn.ModuleDict({"mine": nn.Linear(1, 1)}))(batch())
