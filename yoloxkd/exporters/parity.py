"""The gate every exported file passes before it gets its name: it detects what its model detects."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yoloxkd.data.records import DetectionData
from yoloxkd.data.transforms import letterbox
from yoloxkd.errors import GateError, UserError
from yoloxkd.exporters.accuracy import Detect, average_precisions
from yoloxkd.exporters.matching import Candidates, Comparison, Suppression, Tolerance, compare, overlaps
from yoloxkd.exporters.onnx import PROBES, ExportOptions, export_onnx, without_probes
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.nn.detector import DenseDetector
from yoloxkd.ops.nms import postprocess
from yoloxkd.types import Detections

FP32 = Tolerance(score=1e-3, iou=0.99)
FP16 = Tolerance(score=0.1, iou=0.9, unmatched=0.02)
"""Rounding of fp16 moves single scores by some hundredths; this finds overflow and mistakes, AP judges the rest."""
FP16_AP = 0.002
AP_IMAGES = 100
IMAGES = 16
BEST = 100
"""Locations of an image that are compared whatever their score, so that a model without detections is compared too."""


@dataclass(slots=True)
class ParityReport:
    """What the comparison of a file with its model found.

    images       compared
    locations    compared before suppression (the best of each image); 0 for a finished file with NMS, which hides them
    max_location_score_difference, min_location_iou   over them
    found        the detections, see `matching.Comparison`
    model_ap, file_ap   measured for fp16, where the data set has the model's classes; they may differ by 0.002
    """

    tolerance: Tolerance
    images: int = 0
    locations: int = 0
    max_location_score_difference: float = 0.0
    min_location_iou: float = 1.0
    found: Comparison = field(default_factory=Comparison)
    model_ap: float | None = None
    file_ap: float | None = None

    def faults(self) -> list[str]:
        """What lies outside the tolerance; empty when the file passes."""
        t, f = self.tolerance, self.found
        faults = []
        if not self.images:
            faults.append("no image was compared")
        if f.unmatched > t.unmatched * f.detections:
            faults.append(
                f"{f.unmatched} detections (of {f.detections}) have no counterpart with a score within {t.score} and "
                f"an overlap above {t.iou}; the worst pair differs by {f.max_score_difference:.2g} and overlaps by "
                f"{f.min_iou:.4f}"
            )
        if not self.max_location_score_difference <= t.score:
            faults.append(f"a raw score differs by {self.max_location_score_difference:.2g} (allowed {t.score})")
        if not self.min_location_iou > t.iou:
            faults.append(f"a raw box overlaps its counterpart by {self.min_location_iou:.4f} (needed {t.iou})")
        if self.model_ap is not None and self.file_ap is not None:
            difference = abs(self.model_ap - self.file_ap)
            if not difference <= FP16_AP:
                faults.append(f"AP is {self.file_ap:.4f} instead of {self.model_ap:.4f} (allowed difference {FP16_AP})")
        return faults

    def describe(self) -> str:
        """One line."""
        f = self.found
        return (
            f"{self.images} images, {f.detections} detections: largest score difference "
            f"{max(f.max_score_difference, self.max_location_score_difference):.2g}, smallest overlap "
            f"{min(f.min_iou, self.min_location_iou):.5f}, {f.borderline} borderline, {f.unmatched} unmatched"
        ) + (f", AP {self.file_ap:.4f} (model {self.model_ap:.4f})" if self.file_ap is not None else "")


def check_parity(
    detector: DenseDetector, path: Path, images: Iterable[Tensor], tolerance: Tolerance = FP32
) -> ParityReport:
    """Compare an exported file with the model it came from.

    images are batches (B, 3, H, W) uint8 RGB, letterboxed. Detections are compared after suppression with the file's
    own settings: see `matching.compare` for what counts as the same and what is excused as borderline (in short: a
    detection whose score is within the tolerance of the threshold may be absent on one side). Where the file shows what
    comes before suppression, the best 100 locations of every image are compared too, their scores of every class.
    """
    predictor, model = OnnxPredictor(path), _reference(detector)
    settings = Suppression(predictor.conf, predictor.iou, predictor.max_det)
    report = ParityReport(tolerance)
    for batch in images:
        size = (batch.shape[2], batch.shape[3])
        for chunk in batch.split(len(batch) if predictor.dynamic_batch else 1):
            boxes, scores = model(chunk)
            outputs = predictor.run(chunk.numpy())
            report.images += len(chunk)
            _compare_locations(report, boxes.numpy(), scores.numpy(), _raw(outputs, predictor.nms), size)
            pairs = zip(_suppressed(boxes, scores, settings), predictor.detections(outputs), strict=True)
            for i, (expected, found) in enumerate(pairs):
                candidates = Candidates(boxes[i].numpy(), scores[i].numpy(), size)
                compare(report.found, expected, found, candidates, settings, tolerance)
    return report


def _reference(detector: DenseDetector) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The model as it is, batch norms not folded: images -> boxes (B, A, 4), scores (B, A, K), float32 on the CPU."""
    model = copy.deepcopy(detector).cpu().float().eval()

    @torch.no_grad()
    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        out = model(images)
        return out.boxes, model.scores(out)

    return run


def _suppressed(boxes: Tensor, scores: Tensor, settings: Suppression) -> list[Detections]:
    found = postprocess(boxes, scores, conf=settings.conf, iou=settings.iou, max_det=settings.max_det)
    return [Detections(b.numpy(), s.numpy(), k.numpy()) for b, s, k in found]


def _raw(outputs: dict[str, np.ndarray], nms: bool) -> tuple[np.ndarray, np.ndarray] | None:
    names = PROBES if nms else ("boxes", "scores")
    return (outputs[names[0]], outputs[names[1]]) if all(n in outputs for n in names) else None


def _compare_locations(
    report: ParityReport,
    boxes: np.ndarray,
    scores: np.ndarray,
    raw: tuple[np.ndarray, np.ndarray] | None,
    size: tuple[int, int],
) -> None:
    """Boxes (B, A, 4) and scores (B, A, K) of both sides, at the model's best locations in images of size (H, W)."""
    if raw is None:
        return
    best = np.argsort(-scores.max(axis=2), axis=1, kind="stable")[:, :BEST]
    for i, rows in enumerate(best):
        difference = np.abs(scores[i, rows] - raw[1][i, rows]).max()
        report.max_location_score_difference = _worse(report.max_location_score_difference, float(difference), max)
        iou = np.array([overlaps(boxes[i, r : r + 1], raw[0][i, r : r + 1], size)[0, 0] for r in rows]).min()
        report.min_location_iou = _worse(report.min_location_iou, float(iou), min)
        report.locations += len(rows)


def _worse(a: float, b: float, choose: Callable[[float, float], float]) -> float:
    """NaN is worse than anything."""
    return b if np.isnan(b) else a if np.isnan(a) else choose(a, b)


def sample_images(
    data: DetectionData, imgsz: int, stride: int, pad_value: tuple[int, int, int], *, dynamic: bool, count: int = IMAGES
) -> Iterator[Tensor]:
    """Letterboxed batches of at most `count` images, evenly spread over a data set.

    For a file of free shape: batches of 1, 2, 3, ... images, every other one wider than high.
    """
    chosen = np.unique(np.linspace(0, max(len(data) - 1, 0), min(count, len(data))).round().astype(int)).tolist()
    size = 1
    while chosen:
        now, chosen = chosen[:size], chosen[size:]
        width = imgsz + stride * (size % 2 == 0) if dynamic else imgsz
        pictures = [letterbox(data.read(i), (imgsz, width), pad_value)[0] for i in now]
        yield torch.from_numpy(np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2)))
        size += dynamic


def export_checked(
    detector: DenseDetector,
    path: str | Path,
    options: ExportOptions,
    *,
    data: DetectionData,
    source_digest: str = "",
    say: Callable[[str], None] | None = None,
) -> Path:
    """Export to ONNX, compare with the model on images of `data`, and only then give the file its name.

    say   prints the result in one line

    In fp32 every detection must agree (score to 0.001, overlap above 0.99). In fp16 the AP must, to 0.002, on at most
    100 images of `data`, where it has classes of the model; single detections only roughly (`FP16`). Beside `x.onnx`
    lies `x.parity.json` afterwards. GateError: the file differs from the model; there is no file under the final
    name then, and an older one is set aside as `x.previous.onnx`. UserError: the folder cannot be written to.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    note = path.with_suffix(".parity.json")
    note_part = part.with_suffix(".json")
    images = list(
        sample_images(data, options.imgsz, detector.size_multiple, detector.input.pad_value, dynamic=options.dynamic)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        export_onnx(detector, part, options, source_digest=source_digest, probes=True)
        report = check_parity(detector, part, images, FP16 if options.half else FP32)
        _finish(part)
        if options.half:
            _measure(report, detector, part, data, options)
        faults = report.faults() + check_parity(detector, part, images[:1], report.tolerance).faults()
        if faults:
            reason = "; ".join(faults)
            _set_aside(path, note)
            raise GateError(f"{path} was not written: the export does not detect what the model detects: {reason}")
        note_part.write_text(json.dumps(_note(report, options), indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
        os.replace(note_part, note)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"could not write {path}: {reason} (is the disk full or the folder read-only?)") from error
    finally:
        for leftover in (part, note_part):
            with contextlib.suppress(OSError):
                leftover.unlink()
    if say:
        say(f"parity: {report.describe()}")
    return path


def _measure(
    report: ParityReport, detector: DenseDetector, part: Path, data: DetectionData, options: ExportOptions
) -> None:
    """AP of the model and of the file, into the report."""
    model, settings = _reference(detector), Suppression(options.conf, options.iou, options.max_det)

    def detect(images: Tensor) -> list[Detections]:
        return _suppressed(*model(images), settings)

    pad_value = detector.input.pad_value
    sides: list[Detect] = [detect, OnnxPredictor(part)]
    found = average_precisions(sides, detector.names, data, options.imgsz, pad_value, AP_IMAGES)
    if found is not None:
        report.model_ap, report.file_ap = found


def _set_aside(path: Path, note: Path) -> None:
    """Rename what an earlier export left: it must not be taken for what this one should have been."""
    for file, ending in ((path, path.suffix), (note, ".parity.json")):
        if file.exists():
            os.replace(file, path.with_name(f"{path.stem}.previous{ending}"))


def _finish(part: Path) -> None:
    """Take the outputs that only the check read out of the file."""
    import onnx

    model = without_probes(onnx.load(str(part)))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(part))


def _note(report: ParityReport, options: ExportOptions) -> dict[str, Any]:
    import onnxruntime

    return {
        "passed": not report.faults(),
        **asdict(report),
        "options": asdict(options),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
