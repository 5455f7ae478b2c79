"""Fast paths of PGD that small inputs would not reach: maps in several pieces, pairs sorted as integers."""

from __future__ import annotations

import pytest
import torch

from yoloxkd.kd.functional import fused
from yoloxkd.kd.functional.importance import _sorted_pairs


@pytest.mark.parametrize("elements", [1, 50, 130])
def test_a_map_in_pieces_gives_what_it_gives_at_once(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 6, 7, generator=g, dtype=torch.float64) for _ in range(2))
    factors = torch.randn(3, 5, 6, generator=g, dtype=torch.float64)
    found = []
    for budget in (10**9, elements):
        monkeypatch.setattr(fused, "IN_CACHE", budget)
        leaf = student.clone().requires_grad_()
        values = torch.stack(fused.local_error_attention_and_strength(leaf, teacher, 0.8))
        (values * factors).sum().backward()
        found.append((values.detach(), leaf.grad))
    assert len(list(fused._in_cache(student))) > 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_pairs_sorted_as_integers_are_in_the_order_of_the_floats() -> None:
    g = torch.Generator().manual_seed(1)
    special = torch.tensor([0.0, -0.0, -torch.inf, torch.inf, -1e-40, 1e-40, -3.5, 2.0])
    q = special[torch.randint(0, len(special), (2, 400), generator=g)]
    q[:, ::3] = torch.randn(2, 134, generator=g)
    owner = torch.sort(torch.randint(0, 9, (400,), generator=g)).values
    assert torch.equal(_sorted_pairs(owner, q), _sorted_pairs(owner, q.double()))
