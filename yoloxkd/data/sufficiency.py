"""Check that enough of a split is left to train or to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from yoloxkd.data.augment.transforms import fit_size, worth_training
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.problems import NEARLY_ALL, Faults
from yoloxkd.errors import UserError
from yoloxkd.types import ImageSize

_MANY_DROPPED, _MANY_IGNORED, _MANY_BARE = 0.5, 0.5, 0.1
_NOT_IN_NAMES = "dropped, of a category that is not in names"  # dropped since the user wants the other classes


@dataclass(frozen=True, slots=True)
class Shortage:
    """What a split lacks.

    kind      a phrase that follows the number `count`, as of `data.faults`
    sentence  the whole of it: counts, shares and the remedy
    stops     training or evaluating would be pointless
    """

    kind: str
    count: int
    sentence: str
    stops: bool


def shortages(data: DetectionData, *, imgsz: ImageSize | None) -> list[Shortage]:
    """What a split lacks, the worst first.

    imgsz  input size in px of a training on it; None: it is to be evaluated on
    """
    purpose = "evaluate" if imgsz is None else "train"
    findings = [*_no_object(data, purpose), *_many_dropped(data), *_many_bare(data), *_many_ignored(data)]
    if imgsz is not None and not (findings and findings[0].stops):
        findings += [*_too_small(data, imgsz), *_absent_classes(data)]
    return sorted(findings, key=lambda shortage: not shortage.stops)


def refuse_shortage(findings: Sequence[Shortage], say: Callable[[str], None]) -> None:
    """UserError with the first that makes it pointless to go on; else every one as a warning."""
    for shortage in findings:
        if shortage.stops:
            raise UserError(shortage.sentence)
    for shortage in findings:
        say(f"warning: {shortage.sentence}")


def _no_object(data: DetectionData, purpose: str) -> Iterator[Shortage]:
    if not data.crowd.all():
        return
    ignored, dropped = len(data.crowd), _count_dropped(data.faults)
    if ignored:
        why = f"all {ignored} boxes that can be used are marked to be ignored (iscrowd, ignore or difficult)"
        remedy = "take the mark from those that are objects"
    else:
        why, remedy = (
            f"its {len(data)} images have no annotated object",
            "annotate some, or name another file or folder",
        )
        if unwanted := data.faults.counts.get(_NOT_IN_NAMES, 0):
            why, remedy = f"all {unwanted} boxes are of classes that are not in names", "make the names agree"
    if dropped:
        why += f", and {dropped} boxes were dropped" if ignored else ""
        why = why if ignored else f"all {dropped} boxes were dropped"
        remedy = "correct the annotations"
    if bare := data.faults.images_without_file:
        why += f", {_share(bare, len(data))} without a label file"
    sentence = f"no object is left to {purpose} on in '{data.split}': {why}; {remedy}{_details(data.faults)}"
    yield Shortage(f"images and no object to {purpose} on", len(data), sentence, True)


def _many_dropped(data: DetectionData) -> Iterator[Shortage]:
    dropped = _count_dropped(data.faults)
    share = dropped / max(dropped + len(data.crowd), 1)
    if data.crowd.all() or share < _MANY_DROPPED:
        return
    sentence = (
        f"{_share(dropped, dropped + len(data.crowd))} of the boxes of '{data.split}' were dropped: correct the annotations"
        f"{_details(data.faults)}"
    )
    yield Shortage("boxes dropped, most of the split", dropped, sentence, share >= NEARLY_ALL)


def _many_bare(data: DetectionData) -> Iterator[Shortage]:
    bare = data.faults.images_without_file
    share = bare / max(len(data), 1)
    if data.crowd.all() or share <= _MANY_BARE:
        return
    sentence = (
        f"{_share(bare, len(data))} of the images of '{data.split}' have no label file and count as images without an "
        "object, more than a set of backgrounds explains: are the labels in another place or under other names? Give an "
        "image that shows no object an empty label file"
    )
    yield Shortage("images without a label file, many for backgrounds", bare, sentence, share >= NEARLY_ALL)


def _many_ignored(data: DetectionData) -> Iterator[Shortage]:
    ignored = int(data.crowd.sum())
    if data.crowd.all() or ignored < _MANY_IGNORED * len(data.crowd):
        return
    sentence = (
        f"{_share(ignored, len(data.crowd))} of the boxes of '{data.split}' are marked to be ignored (iscrowd, ignore or "
        "difficult): they are neither objects nor background"
    )
    yield Shortage("boxes to be ignored, most of the split", ignored, sentence, False)


def _too_small(data: DetectionData, imgsz: ImageSize) -> Iterator[Shortage]:
    objects = int((~data.crowd).sum())
    scale = np.array([fit_size(h, w, imgsz)[0] for h, w in data.sizes.tolist()])[data.image_of_box()]
    boxes = data.boxes * scale[:, None]
    small = int((~worth_training(boxes, np.zeros(len(boxes)), data.crowd)).sum())
    if not small:
        return
    dots = bool((data.boxes[:, 2:] - data.boxes[:, :2] <= 1).all())
    remedy = "are they fractions of the image instead of px?" if dots else "raise --imgsz, or cut the images into tiles"
    sides = f"{imgsz}" if isinstance(imgsz, int) else f"{imgsz[0]} to {imgsz[1]}"
    sentence = (
        f"{_share(small, objects)} of the objects of '{data.split}' are at most 2 px wide or high at --imgsz {sides}, too "
        f"small to train on: {remedy}"
    )
    yield Shortage(
        f"objects of at most 2 px at --imgsz {sides}, too small to train on", small, sentence, small == objects
    )


def _absent_classes(data: DetectionData) -> Iterator[Shortage]:
    counts = np.bincount(data.labels[~data.crowd], minlength=len(data.names))
    absent = [name for name, n in zip(data.names, counts.tolist(), strict=True) if not n]
    if not absent:
        return
    some = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
    sentence = (
        f"{len(absent)} of the {len(data.names)} classes have no object in '{data.split}' and cannot be learnt: {some}"
    )
    yield Shortage("classes without an object", len(absent), sentence, False)


def _count_dropped(faults: Faults) -> int:
    return sum(n for kind, n in faults.counts.items() if kind.startswith("dropped, ") and kind != _NOT_IN_NAMES)


def _share(part: int, whole: int) -> str:
    """ "3 of 8 (38%)" """
    return f"{part} of {whole} ({part / max(whole, 1):.0%})"


def _details(faults: Faults) -> str:
    return "" if faults.gather or not len(faults) else f" ({faults.describe()})"  # a check lists them beside it
