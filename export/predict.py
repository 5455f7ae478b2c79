#!/usr/bin/env python3
"""Detect objects with an exported yoloxkd model. Needs numpy, onnxruntime and opencv-python-headless; no torch.

    python predict.py model.onnx photo.jpg another.png --conf 0.3 --out drawn/ --json detections.json

Prints JSON: for each image its path, size, and detections (box x1 y1 x2 y2 in px of the image, score, label, name),
best first. A file that gives masks adds to each `mask`, COCO's uncompressed run lengths: {size: [h, w], counts}. Works for
files with NMS inside (`yoloxkd export`), without (`--no-nms`) and of raw outputs (`--outputs raw`). Copy this file
wherever you need it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime

MARK = b"drawn by predict.py of yoloxkd"
"""At the end of every drawn image, where no reader of images looks."""


class Model:
    """An exported file: `Model("model.onnx").predict(rgb)`."""

    def __init__(self, path: str, conf: float = 0.25) -> None:
        if not Path(path).is_file():
            raise SystemExit(f"there is no file {path}")
        try:
            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common base but this
            raise SystemExit(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}") from None
        meta = self.session.get_modelmeta().custom_metadata_map
        try:
            self.names: list[str] = json.loads(meta["names"])
            self.height, self.width = json.loads(meta["input_size"])
            self.pad_value = json.loads(meta["pad_value"])
            self.nms, self.iou = json.loads(meta["nms"]), json.loads(meta["iou"])
            self.max_det, lowest = json.loads(meta["max_det"]), json.loads(meta["conf"])
            # in files of an older version these are not there, and of each location the best class counts
            self.pairs_per_level: int | None = json.loads(meta.get("pairs_per_level", "null"))
            self.per_cell = json.loads(meta.get("predictions_per_cell", "1"))
            self.strides: list[int] = json.loads(meta["strides"])
            self.head: dict[str, Any] | None = json.loads(meta.get("head_maps", "null"))
        except KeyError as error:
            raise SystemExit(f"{path} has no metadata {error}: it was not written by `yoloxkd export`") from None
        if self.nms and conf < lowest:
            raise SystemExit(
                f"{path} holds its own NMS, which drops scores below {lowest}; choose --conf {lowest} or more"
            )
        self.conf = conf

    def predict(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """image (h, w, 3) uint8 RGB -> boxes (n, 4) xyxy px of the image, scores (n,), labels (n,), best first."""
        return self.predict_with_masks(image)[:3]

    def predict_with_masks(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """As `predict`, and masks (n, h, w) bool of the image; None: the file gives none."""
        pixels, scale = self.letterbox(image)
        outputs = self.session.run(None, {"images": pixels})
        soft = None
        if self.nms:
            boxes, scores, labels, counts, *masks = outputs
            n = min(int(counts[0]), int((scores[0] >= self.conf).sum()))
            boxes, scores, labels = boxes[0, :n], scores[0, :n], labels[0, :n]
            soft = masks[0][0, :n] if masks else None
        elif self.head is not None:
            names = [output.name for output in self.session.get_outputs()]
            boxes, scores, labels = self.suppress(*self.decode(self.head, dict(zip(names, outputs, strict=True))))
        else:
            boxes, scores, labels = self.suppress(outputs[0][0], outputs[1][0])
        height, width = image.shape[:2]
        boxes = boxes / np.float32(scale)
        pasted = None if soft is None else paste_masks(soft, boxes, height, width)
        return np.clip(boxes, 0, [width, height, width, height]), scores, labels, pasted

    def letterbox(self, image: np.ndarray) -> tuple[np.ndarray, float]:
        """Fit the image into the input, at the top left -> (1, 3, H, W) float32 RGB 0..255, and scale."""
        h, w = image.shape[:2]
        scale = min(self.height / h, self.width / w)
        new_w, new_h = max(1, int(w * scale)), max(1, int(h * scale))
        canvas = np.empty((self.height, self.width, 3), np.uint8)
        canvas[:] = self.pad_value
        canvas[:new_h, :new_w] = cv2.resize(image, (new_w, new_h))
        return canvas.transpose(2, 0, 1)[None].astype(np.float32), scale

    def decode(self, head: dict[str, Any], outputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Raw tensors of the first image -> boxes (A, 4) xyxy px of the input, scores (A, K)."""
        boxes, scores = [], []
        for level in head["levels"]:
            n, stride, unit = max(len(level["anchors"]), 1), level["stride"], np.float32(level["unit"])
            h, w = -(-self.height // stride), -(-self.width // stride)

            def rows(name: str, channels: int, n: int = n, h: int = h, w: int = w) -> np.ndarray:
                """(1, n channels, h, w) -> (h w n, channels)"""
                if outputs[name].shape != (1, n * channels, h, w):
                    raise SystemExit(f"{name} has the shape {outputs[name].shape}, not {(1, n * channels, h, w)}")
                return outputs[name].reshape(n, channels, h, w).transpose(2, 3, 0, 1).reshape(-1, channels)

            score = sigmoid(rows(level["classes"], len(self.names)))
            if head["score"] != "class":
                score = score * sigmoid(rows(level["quality"], 1))
            scores.append(np.sqrt(score) if head["score"] == "root" else score)
            down, right = (stride, stride) if head["step"] == "stride" else (self.height // h, self.width // w)
            y, x = ((np.arange(cells) + head["offset"]) * step for cells, step in ((h, down), (w, right)))
            points = np.stack(np.broadcast_arrays(x, y[:, None]), -1).reshape(-1, 2).repeat(n, 0)
            code = rows(level["boxes"], 4 * (head["bins"] or 1))
            if head["box_code"] in ("distances", "distributions"):
                if head["bins"]:
                    bins = code.reshape(-1, 4, head["bins"])
                    share = np.exp(bins - bins.max(-1, keepdims=True))
                    code = share @ np.arange(head["bins"]) / share.sum(-1)
                low, high = points - code[:, :2] * unit, points + code[:, 2:] * unit
            else:
                if head["box_code"] == "cells":
                    center, side = points + (code[:, :2] - 0.5) * unit, np.exp(np.minimum(code[:, 2:], 80)) * unit
                else:
                    anchors = np.tile(np.array(level["anchors"]), (h * w, 1))
                    code, size = code * head["deviations"], anchors[:, 2:] - anchors[:, :2]
                    center = points + (anchors[:, :2] + anchors[:, 2:]) / 2 + code[:, :2] * size
                    side = np.exp(np.clip(code[:, 2:], -head["largest_log"], head["largest_log"])) * size
                low, high = center - side / 2, center + side / 2
            boxes.append(np.concatenate([low, high], -1).astype(np.float32))
        return np.concatenate(boxes), np.concatenate(scores)

    def suppress(self, boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each location its best class or every class, as the file says; of overlapping boxes of one class the best."""
        if self.pairs_per_level is None:
            labels, best = scores.argmax(1), scores.max(1)
        else:
            boxes, best, labels = self.best_pairs(boxes, scores, self.pairs_per_level)
        rows = np.flatnonzero(best >= self.conf)
        rows = rows[np.argsort(-best[rows], kind="stable")]
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        kept: list[int] = []
        while len(rows) and len(kept) < self.max_det:
            first, rows = rows[0], rows[1:]
            kept.append(int(first))
            sides = np.minimum(boxes[rows, 2:], boxes[first, 2:]) - np.maximum(boxes[rows, :2], boxes[first, :2])
            inter = np.clip(sides, 0, None).prod(1)
            overlap = inter / np.maximum(area[rows] + area[first] - inter, 1e-9)
            rows = rows[(overlap <= self.iou) | (labels[rows] != labels[first])]
        return boxes[kept], best[kept], labels[kept]

    def best_pairs(self, boxes: np.ndarray, scores: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best `most` pairs of a location and a class of each feature level: boxes, scores, labels."""
        locations, classes = scores.shape
        cells = [-(-self.height // stride) * -(-self.width // stride) for stride in self.strides]
        sizes = [number * self.per_cell for number in cells] if self.per_cell else [locations]
        if sum(sizes) != locations:
            raise SystemExit(f"the file has {locations} locations where its metadata promises {sum(sizes)}")
        chosen = []
        for end, size in zip(np.cumsum(sizes), sizes, strict=True):
            pairs = scores[end - size : end].ravel()
            best = np.sort(np.argsort(-pairs, kind="stable")[:most])
            chosen.append(best + (end - size) * classes)
        at = np.concatenate(chosen)
        return boxes[at // classes], scores.ravel()[at], at % classes


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x)"""
    y: np.ndarray = 1 / (1 + np.exp(-np.clip(x, -80, 80)))
    return y


def paste_masks(soft: np.ndarray, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Probabilities (n, s, s) of the cells of boxes (n, 4) px -> (n, height, width) bool, bilinearly at pixel centers."""

    def weights(low: float, high: float, pixels: int, cells: int) -> np.ndarray:
        at = (np.arange(pixels) + 0.5 - low) / max(high - low, 1e-9) * cells - 0.5
        return np.clip(1 - np.abs(at[:, None] - np.arange(cells)), 0, None)

    out = np.zeros((len(soft), height, width), bool)
    for mask, cells, (x1, y1, x2, y2) in zip(out, soft, boxes.astype(np.float64), strict=True):
        mask[:] = weights(y1, y2, height, len(cells)) @ cells @ weights(x1, x2, width, len(cells)).T >= 0.5
    return out


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths: down the columns, first the pixels outside."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], ends, [mask.size]])).tolist()
    return {"size": list(mask.shape), "counts": counts[:-1] if len(counts) > 1 and counts[-1] == 0 else counts}


def draw(image: np.ndarray, boxes: np.ndarray, captions: list[str]) -> np.ndarray:
    """A copy with boxes and captions."""
    canvas = np.ascontiguousarray(image).copy()
    size = max(0.4, min(canvas.shape[:2]) / 1100)
    line = max(1, round(min(canvas.shape[:2]) / 300))
    for box, caption in zip(boxes[::-1], captions[::-1], strict=True):
        x1, y1, x2, y2 = (round(float(v)) for v in box)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), (0, 200, 80), line)
        (w, h), _ = cv2.getTextSize(caption, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
        top = max(y1 - h - 6, 0)
        cv2.rectangle(canvas, (x1, top), (x1 + w + 4, top + h + 6), (0, 200, 80), -1)
        cv2.putText(canvas, caption, (x1 + 2, top + h + 2), cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 1, cv2.LINE_AA)
    return canvas


def read(name: str) -> np.ndarray | None:
    """(h, w, 3) BGR, or None; by Python's open, because OpenCV's own ends the process on a name that is no UTF-8."""
    try:
        content = np.frombuffer(Path(name).read_bytes(), np.uint8)
        return cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    except (OSError, cv2.error):
        return None


def drawn_to(images: list[str], out: Path | None) -> list[Path | None]:
    """The file that each image is drawn to: its own name, numbered where names recur; a PNG file where it is no JPEG."""
    used: set[str] = set()
    targets: list[Path | None] = []
    for name in images:
        path, number = Path(name), 1
        target = None if out is None else out / path.name
        if target and target.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            target = target.with_name(f"{path.name}.png")
        while target and str(target).casefold() in used:
            number += 1
            target = target.with_name(f"{path.stem}-{number}{target.suffix}")
        used.add(str(target).casefold())
        targets.append(target)
    return targets


def refuse_to_replace(targets: list[Path | None], json_file: Path | None, given: list[str]) -> None:
    """End where a file would be replaced that is given, or that this program did not write."""
    written = [(target, content_of(target).endswith(MARK)) for target in targets if target]
    if json_file:
        begins = content_of(json_file).split(maxsplit=3)[:3]
        written.append((json_file, begins in ([b"[", b"{", b'"image":'], [b"[]"])))
    for file, own in written:
        if file.exists() and any(Path(name).exists() and file.samefile(name) for name in given):
            sys.exit(f"{file} is one of the files given, and would be replaced; write somewhere else")
        if file.is_file() and not own:
            sys.exit(f"{file} is there and was not written by this program; write somewhere else, or remove it")


def content_of(file: Path) -> bytes:
    """The bytes of a file; none where it is not there."""
    return file.read_bytes() if file.is_file() else b""


def main() -> None:
    parser = argparse.ArgumentParser(description="Detect objects with an exported yoloxkd model.")
    parser.add_argument("model", help="the .onnx file")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--conf", type=float, default=0.25, help="lowest score (default 0.25)")
    parser.add_argument("--out", type=Path, help="folder for drawn images")
    parser.add_argument("--json", type=Path, help="write the JSON here instead of printing it")
    arguments = parser.parse_args()
    model = Model(arguments.model, arguments.conf)
    results: list[dict[str, Any]] = []
    unread = unwritten = 0
    targets = drawn_to(arguments.images, arguments.out)
    refuse_to_replace(targets, arguments.json, [arguments.model, *arguments.images])
    for name, target in zip(arguments.images, targets, strict=True):
        bgr = read(name)
        if bgr is None:
            print(f"{name} is not an image that can be read", file=sys.stderr)
            unread += 1
            continue
        image = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        boxes, scores, labels, masks = model.predict_with_masks(image)
        found: list[dict[str, Any]] = [
            {
                "box": [round(float(v), 3) for v in box],
                "score": round(float(score), 6),
                "label": int(label),
                "name": model.names[int(label)],
            }
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ]
        for row, mask in zip(found, [] if masks is None else masks, strict=masks is not None):
            row["mask"] = run_lengths(mask)
        results.append({"image": name, "height": image.shape[0], "width": image.shape[1], "detections": found})
        if target:
            for mask in [] if masks is None else masks[::-1]:
                image[mask] = image[mask] // 2 + np.array([0, 100, 40], np.uint8)
            drawn = draw(image, boxes, [f"{d['name']} {100 * d['score']:.0f}" for d in found])
            content = cv2.imencode(target.suffix, cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))[1].tobytes()
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content + MARK)
            except OSError as error:
                print(f"{target} cannot be written: {error.strerror}", file=sys.stderr)
                unwritten += 1
    text = json.dumps(results, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    if unread:
        sys.exit(f"{unread} of {len(arguments.images)} images could not be read")
    if unwritten:
        sys.exit(f"{unwritten} of {len(arguments.images)} images could not be drawn")


if __name__ == "__main__":
    main()
