"""SimOTA: our batched assignment against the official loop over images and boxes, on the same predictions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.peers import use_peers
from benchmarks.report import Row, run_script
from benchmarks.scenes import CLASSES, dense_output, targets_of
from benchmarks.timing import alternate, ratio
from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.assigners.simota import simota
from yoloxkd.ops.boxes import to_center
from yoloxkd.types import DenseOutput, Targets


def official(head: torch.nn.Module, out: DenseOutput, targets: Targets) -> list[tuple[Tensor, ...]]:
    """What the release's `get_losses` does before its losses: one image at a time."""
    shifts = out.grid.points / out.grid.point_strides[:, None] - 0.5
    x, y, strides = shifts[None, :, 0], shifts[None, :, 1], out.grid.point_strides[None]
    predicted = to_center(out.boxes)
    found = []
    for i in range(len(out.boxes)):
        count = int(targets.mask[i].sum())
        boxes = to_center(targets.boxes[i, :count])
        labels = targets.labels[i, :count].float()
        args = (i, count, boxes, labels, predicted[i], strides, x, y, out.cls_logits, out.quality[..., None])
        found.append(head.get_assignments(*args))
    return found


def measure(quick: bool) -> Iterator[Row]:
    use_peers()
    from yolox.models import YoloxHead

    head = YoloxHead(CLASSES, width=0.25)
    size = 64 if quick else 640
    for images, boxes in [(2, 3)] if quick else [(8, 30), (8, 100), (64, 30)]:
        out, targets = dense_output(images, size), targets_of(images, boxes, size)
        check_equal(simota(out, targets), official(head, out, targets))
        samples = alternate(
            {"ours": partial(simota, out, targets), "theirs": partial(official, head, out, targets)},
            rounds=1 if quick else 6,
        )
        yield Row(
            f"official loop / ours, {len(out.grid.points)} points, {images} images × {boxes} boxes",
            *ratio(samples["theirs"], samples["ours"]),
            at_least=20 if boxes == 100 else 10,
            note=f"{samples['theirs'].milliseconds} / {samples['ours'].milliseconds}; same cells, boxes and overlaps",
        )


def check_equal(ours: Match, theirs: list[tuple[Tensor, ...]]) -> None:
    for i, (_, fg, iou, rows, _) in enumerate(theirs):
        assert torch.equal(ours.fg[i], fg)
        assert torch.equal(ours.gt[i][fg], rows)
        torch.testing.assert_close(ours.score[i][fg], iou, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    run_script("simota", "SimOTA against pixeltable-yolox's", measure)
