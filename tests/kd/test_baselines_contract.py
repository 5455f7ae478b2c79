"""The methods that FGD and PGD compare with keep the contract."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.kd.contract import DistillerContract
from tests.kd.plain_baselines import PLAIN
from tests.kd.test_methods import two_gfls
from yoloxkd.kd.base import Distiller, Pair, Step
from yoloxkd.kd.functional.relation import PooledNonLocal, related_difference
from yoloxkd.kd.methods.chen import Chen
from yoloxkd.kd.methods.defeat import DeFeat
from yoloxkd.kd.methods.fgfi import FGFI
from yoloxkd.kd.methods.fkd import FKD, FKDBlocks
from yoloxkd.kd.methods.frs import FRS
from yoloxkd.kd.methods.gid import GID
from yoloxkd.kd.methods.mimic import Mimic
from yoloxkd.kd.methods.tadf import TADF
from yoloxkd.types import DenseOutput


class Baseline(DistillerContract):
    """With a 1x1 adapter: one of 3x3 looks around each cell, so that cells to be ignored help others."""

    __test__: ClassVar[bool] = False

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        return PLAIN[method.name](method, step)


class TestFGFI(Baseline):
    __test__ = True
    kind = FGFI


class TestDeFeat(Baseline):
    __test__ = True
    kind = DeFeat
    keys: ClassVar[dict[str, Any]] = {"adapter": "1x1", "assign": "all"}


class TestTADF(Baseline):
    __test__ = True
    kind = TADF
    objects_alone = True
    keys: ClassVar[dict[str, Any]] = {"adapter": "1x1", "assign": "all"}


class TestFRS(Baseline):
    __test__ = True
    kind = FRS
    keys: ClassVar[dict[str, Any]] = {"adapter": "1x1"}
    reads = ("cls_logits",)


class TestGID(Baseline):
    __test__ = True
    kind = GID
    reads = ("cls_logits", "boxes")


class TestFKD(Baseline):
    __test__ = True
    kind = FKD
    statistics = ("channel/", "spatial/", "nonlocal/")

    def alike(self, method: Distiller) -> None:
        assert isinstance(method, FKD)
        for blocks in method.blocks.values():
            assert isinstance(blocks, FKDBlocks)
            parts = blocks.parts
            nn.init.dirac_(parts["cells"].weight)
            for name in ("map", "relation", "channels"):
                nn.init.eye_(parts[name].weight)
            for name in ("map", "relation", "channels", "cells"):
                nn.init.zeros_(parts[name].bias)
            nn.init.normal_(parts["student"].scale)
            parts["teacher"].load_state_dict(parts["student"].state_dict())


class TestChen(Baseline):
    __test__ = True
    kind = Chen
    reads = ("cls_logits", "boxes")

    def pair(self) -> Pair:
        return Pair(*two_gfls())

    twins = pair


class TestMimic(Baseline):
    __test__ = True
    kind = Mimic


class TestMimicOfWholeMaps(Baseline):
    __test__ = True
    kind = Mimic
    keys: ClassVar[dict[str, Any]] = {"regions": "whole"}

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        maps = zip((8, 16), step.student.features, step.teacher.features, strict=True)
        return {f"map/s{stride}": ((s - t) ** 2).mean() for stride, s, t in maps}


def test_statistics_of_a_batch_do_not_enter_the_nonlocal_block() -> None:
    """The release normalizes over the batch; here an image is the same whoever is beside it."""
    torch.manual_seed(0)
    block = PooledNonLocal(4, 2, 2)
    nn.init.ones_(block.scale)
    x = torch.randn(3, 36, 4)
    together, alone = block(x, (6, 6)), torch.cat([block(each, (6, 6)) for each in x.split(1)])
    torch.testing.assert_close(together, alone)
    assert not torch.equal(together, x)


def test_the_difference_of_two_nonlocal_blocks_is_that_of_their_outputs() -> None:
    torch.manual_seed(0)
    student, teacher = (PooledNonLocal(channels, 2, 2).double() for channels in (4, 6))
    relation = nn.Linear(4, 6).double()
    for block in (student, teacher):
        nn.init.normal_(block.scale)
        nn.init.normal_(block.shift)
    maps = [torch.randn(3, 30, channels, dtype=torch.float64) for channels in (4, 6)]
    expected = relation(student(maps[0], (5, 6))) - teacher(maps[1], (5, 6))
    found = related_difference(maps[0], maps[1], (student, teacher), relation, (5, 6))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
