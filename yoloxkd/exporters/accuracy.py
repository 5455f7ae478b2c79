"""AP of an exported file and of its model on the same images, the test for fp16 and int8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from yoloxkd.data.augment.transforms import letterbox
from yoloxkd.data.dataset import DetectionData
from yoloxkd.metrics.coco import COCODetections, coco_metrics
from yoloxkd.types import Detections

Detect = Callable[[Tensor], list[Detections]]
"""images (1, 3, H, W) uint8 RGB -> Detections in px of the input."""


def average_precisions(
    detects: list[Detect],
    names: list[str],
    data: DetectionData,
    imgsz: int,
    pad_value: tuple[int, int, int],
    limit: int,
) -> list[float] | None:
    """AP (0 to 1) of each of `detects` on at most `limit` images of a data set; None when there is nothing to measure.

    names are the model's classes; only those that the data set has too count. Boxes are compared in px of the network
    input: the letterbox scales both sides of an image alike, which AP does not see.
    """
    truth = replace(data, image_ids=np.arange(len(data))).ground_truth()  # the ids are positions
    shared = [name for name in names if name in data.names]
    label_of = np.array([shared.index(name) if name in shared else -1 for name in names])
    indices = np.unique(np.linspace(0, max(len(data) - 1, 0), min(limit, len(data))).round().astype(int)).tolist()
    rows: list[list[tuple[int, Detections]]] = [[] for _ in detects]
    scale_of: dict[int, float] = {}
    for index in indices:
        image, scale, _, _ = letterbox(data.read(index), (imgsz, imgsz), pad_value)
        scale_of[index] = scale
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))[None])
        for detect, of_images in zip(detects, rows, strict=True):
            of_images.append((index, detect(pixels)[0]))
    ids = {c["id"] for c in truth["categories"] if c["name"] in shared}
    annotations = [
        {**a, "bbox": [v * scale_of[a["image_id"]] for v in a["bbox"]]}
        for a in truth["annotations"]
        if a["image_id"] in scale_of and a["category_id"] in ids
    ]
    if all(a["iscrowd"] for a in annotations):
        return None
    images = [image for image in truth["images"] if image["id"] in scale_of]
    scene = {"images": images, "categories": truth["categories"], "annotations": annotations}
    return [float(coco_metrics(scene, _joined(of_images, label_of), names=shared)["AP"]) for of_images in rows]


def _joined(of_images: list[tuple[int, Detections]], label_of: np.ndarray) -> COCODetections:
    image_id = np.concatenate([np.full(len(d), i, dtype=np.int64) for i, d in of_images])
    labels = label_of[np.concatenate([d.labels for _, d in of_images])]
    in_both = labels >= 0
    boxes, scores = np.concatenate([d.boxes for _, d in of_images]), np.concatenate([d.scores for _, d in of_images])
    return COCODetections(image_id[in_both], boxes[in_both], scores[in_both], labels[in_both])
