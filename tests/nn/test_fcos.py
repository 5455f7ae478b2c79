"""FCOS' own start: every box side can learn, whatever the seed."""

from __future__ import annotations

import pytest
import torch

from tests.nn.fpn import narrow
from yoloxkd.nn.dense.fcos import FCOS


@pytest.mark.parametrize("seed", range(4))
def test_every_side_starts_where_the_relu_lets_gradients_through(seed: int) -> None:
    """From a bias of zero 7 to 87 percent of a side's distances start at zero with these four seeds, and get no gradient."""
    torch.manual_seed(seed)
    model = narrow(FCOS, channels=32, groups=8)
    out = model.network(torch.randn(2, 3, 128, 128))
    assert bool((out.box_raw > 0).all())


def test_distances_through_exp_keep_the_published_start() -> None:
    assert not narrow(FCOS, norm_on_bbox=False).head.conv_reg.bias.any()
