"""Whole methods against the readings of `plain`: loss and gradient, over random scenes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scenes import batch_of, dense_output
from tests.kd.plain import fgd_by_object, pgd_by_object
from tests.losses import compared
from yoloxkd.kd.methods.fgd import FGD, FGDConfig
from yoloxkd.kd.methods.pgd import PGD, PGDConfig
from yoloxkd.kd.pairing import Pairing
from yoloxkd.nn.dense.yolox import YOLOX
from yoloxkd.types import Tap

CLASSES = 3
DETECTOR = YOLOX(YOLOX.Config(depth=0.33, width=0.0625, depthwise=False), [str(i) for i in range(CLASSES)])
CHANNELS = DETECTOR.spec.channels[Tap.NECK][8]


@given(
    images=st.integers(1, 3),
    boxes=st.integers(0, 6),
    size=st.sampled_from([64, 96, 160]),
    dead=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=25, deadline=None)
def test_methods_equal_their_plain_reading(images: int, boxes: int, size: int, dead: bool, seed: int) -> None:
    batch = batch_of(images, boxes, size, seed, CLASSES)
    batch.targets.mask &= torch.rand(batch.targets.mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
    student = dense_output(images, size, seed, CHANNELS, CLASSES)
    teacher = dense_output(images, size, seed + 1, CHANNELS, CLASSES)
    if dead:  # a teacher that sees nothing: no location has a quality
        teacher.boxes.zero_()
    torch.manual_seed(seed)
    fgd = FGD(FGDConfig(), Pairing.between(DETECTOR, DETECTOR))
    for block in fgd.student_blocks.values():
        torch.nn.init.normal_(block.expand.weight, std=0.1)
    pgd = PGD(PGDConfig(), Pairing.between(DETECTOR, DETECTOR))
    for method, plain in ((fgd, fgd_by_object), (pgd, pgd_by_object)):
        maps = [m.requires_grad_() for tap in Tap if tap in method.needs for m in getattr(student, tap)]
        ours, theirs = (
            compared(method, student, teacher, batch, DETECTOR),
            plain(method, student, teacher, batch, DETECTOR),
        )
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        found = [torch.autograd.grad(torch.stack(list(t.values())).sum(), maps) for t in (ours, theirs)]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
