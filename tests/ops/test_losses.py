"""Loss terms against their plain definitions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from yoloxkd.ops.losses import full_precision, soft_class_loss, squared_iou_loss


def test_full_precision_keeps_float64_and_widens_the_rest() -> None:
    assert full_precision(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert full_precision(torch.ones(1, dtype=torch.float16)).dtype == torch.float32
    assert full_precision(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


def test_soft_class_loss_is_binary_cross_entropy_with_a_scaled_one_hot() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) * 20
    labels = torch.randint(0, 7, (3, 5), generator=generator)
    quality = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    target = F.one_hot(labels, 7) * quality.unsqueeze(-1)
    expected = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
    torch.testing.assert_close(soft_class_loss(logits, labels, quality), expected, rtol=1e-12, atol=1e-12)


def test_squared_iou_loss() -> None:
    a = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0]])
    b = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0], [9.0, 9.0, 12.0, 12.0]])
    assert squared_iou_loss(a, b).tolist() == [0.0, 0.75, 1.0]
