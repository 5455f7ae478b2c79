"""The COCO metrics of 500,000 detections: from tensors to the twelve numbers, against pycocotools and faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.peers import use_peers
from benchmarks.report import Row, run_script
from benchmarks.timing import alternate, ratio
from yoloxkd.engine.evaluate import _joined
from yoloxkd.metrics.coco import METRIC_NAMES, COCODetections, coco_metrics
from yoloxkd.nn.coco_names import COCO_NAMES
from yoloxkd.types import Detections, ImageMeta

SIDE = 640
GOALS = {"pycocotools": 50.0, "faster-coco-eval": None}


def scene(
    images: int, boxes: int, detections: int, seed: int = 0
) -> tuple[dict[str, Any], list[tuple[torch.Tensor, ...]]]:
    """Ground truth, and (boxes, scores, labels) of each image as a network gives them: about half near an object."""
    rng = np.random.default_rng(seed)
    owner = np.sort(rng.integers(0, images, boxes))
    wh = SIDE * (0.01 + 0.5 * rng.random((boxes, 2)) ** 3)
    xy = rng.random((boxes, 2)) * (SIDE - wh)
    labels = np.minimum(rng.exponential(12, boxes).astype(int), len(COCO_NAMES) - 1)
    annotations = [
        {"id": i + 1, "image_id": int(owner[i]) + 1, "category_id": int(labels[i]) + 1, "iscrowd": int(i % 100 == 99)}
        | {"bbox": [*xy[i].tolist(), *wh[i].tolist()], "area": float(wh[i].prod())}
        for i in range(boxes)
    ]
    truth = {
        "images": [{"id": i + 1, "width": SIDE, "height": SIDE, "file_name": f"{i}.jpg"} for i in range(images)],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(COCO_NAMES)],
        "annotations": annotations,
    }
    first = np.searchsorted(owner, np.arange(images + 1))
    per_image, found = detections // images, []
    for i in range(images):
        near = rng.random(per_image) < 0.5
        own = rng.integers(first[i], max(first[i + 1], first[i] + 1), per_image) % boxes
        at = np.where(near[:, None], xy[own], rng.random((per_image, 2)) * SIDE * 0.7)
        size = np.where(near[:, None], wh[own], SIDE * (0.02 + 0.3 * rng.random((per_image, 2))))
        at = at + rng.normal(0, 0.1, at.shape) * size
        label = np.where(near & (rng.random(per_image) < 0.8), labels[own], rng.integers(0, len(COCO_NAMES), per_image))
        corners = np.concatenate([at, at + size], 1).astype(np.float32)
        scores = rng.random(per_image, dtype=np.float32)
        found.append(tuple(torch.from_numpy(a) for a in (corners, scores, label.astype(np.int64))))
    return truth, found


def ours(truth: dict[str, Any], found: list[tuple[torch.Tensor, ...]]) -> list[float]:
    """As `engine.evaluate` does it: tensors of each image, mapped back to the original image, joined, measured."""
    parts = []
    for i, (boxes, scores, labels) in enumerate(found):
        meta = ImageMeta(i + 1, f"{i}.jpg", SIDE, SIDE)
        one = Detections(boxes.numpy(), scores.numpy(), labels.numpy(), list(COCO_NAMES)).to_image(meta)
        parts.append(COCODetections(np.full(len(one.scores), i + 1), one.boxes, one.scores, one.labels))
    numbers = coco_metrics(truth, _joined(parts), names=list(COCO_NAMES))
    return [numbers[name] for name in METRIC_NAMES]


def theirs(package: str, truth: dict[str, Any], found: list[tuple[torch.Tensor, ...]]) -> list[float]:
    """As their guides say: a list of result dictionaries, `loadRes`, evaluate, accumulate, summarize."""
    if package == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as Evaluator
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as Evaluator
    results = []
    for i, (boxes, scores, labels) in enumerate(found):
        clipped = boxes.clamp(0, SIDE).double()
        wh = clipped[:, 2:] - clipped[:, :2]
        for box, score, label in zip(
            torch.cat([clipped[:, :2], wh], 1).tolist(), scores.double().tolist(), labels.tolist(), strict=True
        ):
            results.append({"image_id": i + 1, "category_id": label + 1, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        data.dataset = truth
        data.createIndex()
        evaluator = Evaluator(data, data.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(v) for v in evaluator.stats[:12]]


def measure(quick: bool) -> Iterator[Row]:
    use_peers()
    scale = (40, 300, 2000) if quick else (5000, 36_000, 500_000)
    truth, found = scene(*scale)
    expected = ours(truth, found)
    for package in GOALS:
        np.testing.assert_allclose(theirs(package, truth, found), expected, rtol=0, atol=1e-9)
    turns = {"ours": partial(ours, truth, found)} | {p: partial(theirs, p, truth, found) for p in GOALS}
    fast = {name: turn for name, turn in turns.items() if name != "pycocotools"}
    for package, goal in GOALS.items():
        slow = package == "pycocotools"
        samples = alternate(turns if slow else fast, rounds=1 if quick else 2 if slow else 5, warmup=0)
        yield Row(
            f"{package} / ours, {scale[0]} images, {scale[1]} boxes, {scale[2]} detections",
            *ratio(samples[package], samples["ours"]),
            at_least=goal,
            note=f"{samples[package].seconds:.2f} s / {samples['ours'].seconds:.2f} s, conversion from tensors counted "
            "on both sides; the twelve numbers agree within 1e-9",
        )


if __name__ == "__main__":
    run_script("coco_eval", "COCO evaluation", measure)
