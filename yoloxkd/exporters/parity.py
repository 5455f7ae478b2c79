"""Compare an exported file with its model before it is published."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from yoloxkd.config.quantization import Quantization
from yoloxkd.data.augment.transforms import letterbox
from yoloxkd.data.dataset import DetectionData
from yoloxkd.errors import GateError, UserError
from yoloxkd.exporters import NEEDED, RUNTIMES_OF
from yoloxkd.exporters.accuracy import Detect, average_precisions
from yoloxkd.exporters.int8 import Int8Quantizer
from yoloxkd.exporters.int8_search import check_float_layers, search_int8
from yoloxkd.exporters.matching import Candidates, Suppression, Tolerance, compare, overlaps
from yoloxkd.exporters.nms_graph import CELLS
from yoloxkd.exporters.onnx import PROBES, ExportOptions, described_graph, save_checked, without_probes
from yoloxkd.exporters.parity_report import FP32, TOLERANCES, ParityReport
from yoloxkd.exporters.quantized_file import QuantizedFile
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.exporters.trained_int8 import layer_differences, layer_faults
from yoloxkd.file_kinds import exported_format, parity_note, parts_of
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.fake_quantization import quantized_layers
from yoloxkd.nn.solo.solo import SOLO
from yoloxkd.nn.two_stage.mask_rcnn import MaskDetector
from yoloxkd.ops.nms import NMS, postprocess
from yoloxkd.soft_masks import FrameMasks
from yoloxkd.types import Detections

if TYPE_CHECKING:
    import onnx

AP_IMAGES = 100
IMAGES = 16
NO_AP = (
    "int8 is judged by AP, and the images to verify it on hold no object of the model's classes; give {} DATA that does"
)
SEEN = 0.01
"""Difference of scores (0 to 1) that a code of int8 cannot swallow."""
BEST = 100
"""Locations of an image that are compared whatever their score, so that a model without detections is compared too."""


def check_parity(
    detector: Detector[Any, Any], path: Path, images: Iterable[Tensor], tolerance: Tolerance = FP32
) -> ParityReport:
    """Compare an exported file with the model it came from.

    images are batches (B, 3, H, W) uint8 RGB, letterboxed. Detections are compared after suppression with the file's
    own settings: see `matching.compare` for what counts as the same and what is excused as borderline (in short: a
    detection whose score is within the tolerance of the threshold may be absent on one side). Where the file shows what
    comes before suppression, the best 100 locations of every image are compared too, their scores of every class.
    """
    predictor, model = OnnxPredictor(path), Reference(detector)
    settings = Suppression(predictor.conf, predictor.iou, predictor.max_det, detector.spec.pairs_per_level)
    report = ParityReport(tolerance)
    scores_of_both: list[np.ndarray] = []
    for batch in images:
        size = (batch.shape[2], batch.shape[3])
        for chunk in batch.split(len(batch) if predictor.dynamic_batch else 1):
            boxes, scores, levels = model(chunk)
            outputs = predictor.run(chunk.numpy())
            report.images += len(chunk)
            raw = _raw(predictor, outputs)
            if raw is not None and detector.spec.stable_locations:
                scores_of_both += _compare_locations(report, boxes.numpy(), scores.numpy(), raw, size)
            of_model = model.detections(settings)
            pairs = zip(of_model, predictor.detections(outputs), strict=True)
            for i, (expected, detections) in enumerate(pairs):
                candidates = Candidates(boxes[i].numpy(), scores[i].numpy(), size, levels)
                compare(report.found, expected, detections, candidates, settings, tolerance)
    report.location_correlation = _correlation(scores_of_both)
    return report


class Reference:
    """The model as it is, batch norms not folded, float32 on the CPU."""

    def __init__(self, detector: Detector[Any, Any]) -> None:
        self.model = copy.deepcopy(detector).cpu().float().eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Boxes (B, A, 4), scores (B, A, K), and how many of the A locations each feature level has."""
        self.out = self.model(images)
        self.chosen_from = *self.model.candidates(self.out), self.model.level_sizes(self.out)
        return self.chosen_from

    def detections(self, settings: Suppression) -> list[Detections]:
        """What the model detects in the last images, with masks if it gives any, in the raster of their boxes."""
        if isinstance(self.model, SOLO):
            found = self.model.detect(self.out, NMS(settings.conf, settings.iou, settings.max_det))
            for one in found:
                assert isinstance(one.soft_masks, FrameMasks)
                one.soft_masks = one.soft_masks.in_boxes(one.boxes, CELLS)
            return found
        found = suppressed(*self.chosen_from, settings)
        return self.model.masked(self.out, found) if isinstance(self.model, MaskDetector) else found


def suppressed(boxes: Tensor, scores: Tensor, levels: tuple[int, ...], settings: Suppression) -> list[Detections]:
    of_images = postprocess(boxes, scores, levels=levels, **asdict(settings))
    return [Detections(b.numpy(), s.numpy(), k.numpy()) for b, s, k in of_images]


def _raw(predictor: OnnxPredictor, outputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """Boxes and scores before suppression, where the file shows them."""
    if not predictor.nms:
        return predictor.locations(outputs)
    return (outputs[PROBES[0]], outputs[PROBES[1]]) if all(n in outputs for n in PROBES) else None


def _compare_locations(
    report: ParityReport,
    boxes: np.ndarray,
    scores: np.ndarray,
    raw: tuple[np.ndarray, np.ndarray],
    size: tuple[int, int],
) -> list[np.ndarray]:
    """Boxes (B, A, 4) and scores (B, A, K) of both sides, at the model's best locations in images of size (H, W).

    Returns per image (2, n): the score of each such location's best class, of the model and of the file.
    """
    best = np.argsort(-scores.max(axis=2), axis=1, kind="stable")[:, :BEST]
    of_both = []
    for i, rows in enumerate(best):
        difference = np.abs(scores[i, rows] - raw[1][i, rows]).max()
        report.max_location_score_difference = _worse(report.max_location_score_difference, float(difference), max)
        iou = np.array([overlaps(boxes[i, r : r + 1], raw[0][i, r : r + 1], size)[0, 0] for r in rows]).min()
        report.min_location_iou = _worse(report.min_location_iou, float(iou), min)
        report.locations += len(rows)
        labels = scores[i, rows].argmax(axis=1)
        of_both.append(np.stack([scores[i, rows, labels], raw[1][i, rows, labels]]))
    return of_both


def _correlation(scores_of_both: list[np.ndarray]) -> float | None:
    """Of the scores of all images' best locations; None: not seen, or all alike.

    0 where the model's differ by `SEEN` and the file's are all equal: it does not see the images.
    """
    if not scores_of_both:
        return None
    model, file = np.concatenate(scores_of_both, axis=1).astype(np.float64)
    if np.ptp(model) < 1e-6 or np.ptp(file) < 1e-6:
        return 0.0 if np.ptp(model) >= SEEN else None
    return float(np.corrcoef(model, file)[0, 1])


def _worse(a: float, b: float, choose: Callable[[float, float], float]) -> float:
    """NaN is worse than anything."""
    return b if np.isnan(b) else a if np.isnan(a) else choose(a, b)


def sample_images(
    data: DetectionData, imgsz: int, stride: int, pad_value: tuple[int, int, int], *, dynamic: bool, count: int = IMAGES
) -> Iterator[Tensor]:
    """Letterboxed batches of at most `count` images, evenly spread over a data set.

    For a file of free shape: batches of 1, 2, 3, ... images, every other one wider than high.
    """
    indices = np.unique(np.linspace(0, max(len(data) - 1, 0), min(count, len(data))).round().astype(int)).tolist()
    size = 1
    while indices:
        batch, indices = indices[:size], indices[size:]
        width = imgsz + stride * (size % 2 == 0) if dynamic else imgsz
        inputs = [letterbox(data.read(i), (imgsz, width), pad_value)[0] for i in batch]
        yield torch.from_numpy(np.ascontiguousarray(np.stack(inputs).transpose(0, 3, 1, 2)))
        size += dynamic


@dataclass(frozen=True, slots=True)
class Int8Recipe:
    """What an int8 export needs besides the model: calibration images (1, 3, H, W) uint8, and how to quantize."""

    images: list[np.ndarray]
    settings: Quantization


def export_checked(
    detector: Detector[Any, Any],
    path: str | Path,
    options: ExportOptions,
    *,
    data: DetectionData,
    int8: Int8Recipe | None = None,
    source_digest: str = "",
    say: Callable[[str], None] | None = None,
    write: Callable[[Path], object] | None = None,
    quantized: QuantizedFile | None = None,
) -> Path:
    """Export to ONNX, or to what `write` writes, compare with the model on images of `data`, and only then give the file its name.

    int8  needed with `options.int8`, unless the detector is trained for int8: then every convolution is compared, too
    say   prints the table of the comparison, and the sensitivity report where it was asked for
    write puts another format's file, and what belongs beside it, under the path it is given
    quantized  instead of `write`, for int8

    In fp32 every detection must agree (score to 0.001, IoU above 0.99). In fp16 and int8 the AP must, to 0.002 and
    0.01, on at most 100 images of `data`, where it has classes of the model; single detections only roughly. Beside
    `x.onnx` lies `x.parity.json` afterwards, beside `x.tflite` `x.tflite.parity.json`. GateError: the file differs from the model; there is no file under the
    final name then, and an older one is set aside as `x.previous.onnx` (`x.previous-2.onnx`, ...). UserError: the folder cannot be written to, or
    int8 cannot be judged because `data` has no object of the model's classes.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    note = parity_note(path)
    note_part = part.with_suffix(".json")
    published = dict(zip([*parts_of(part), note_part], [*parts_of(path), note], strict=True))
    say = say or (lambda _: None)
    options.check(detector)
    if int8 is not None:
        check_float_layers(detector, int8.settings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        judge = _Judge(detector, part, options, data)
        if quantized is not None:
            report, faults = _file_report(judge, quantized, int8, say), list[str]()
        elif write is not None:
            report, faults = judge.of_file(write), list[str]()
        else:
            report, faults = _onnx_report(judge, detector, options, source_digest, int8, say)
        faults += report.faults() + judge.finished_file_faults()
        if faults:
            _set_aside(path)
            reason = "; ".join(faults)
            raise GateError(f"{path} was not written: the export does not detect what the model detects: {reason}")
        note_part.write_text(json.dumps(_note(path, report, options, int8), indent=2) + "\n", encoding="utf-8")
        for made, final in published.items():
            os.replace(made, final)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"could not write {path}: {reason} (is the disk full or the folder read-only?)") from error
    finally:
        for leftover in published:
            with contextlib.suppress(OSError):
                leftover.unlink()
    say(report.table())
    return path


def _onnx_report(
    judge: _Judge,
    detector: Detector[Any, Any],
    options: ExportOptions,
    source_digest: str,
    int8: Int8Recipe | None,
    say: Callable[[str], None],
) -> tuple[ParityReport, list[str]]:
    """Write the ONNX file of these options: its comparison with the model, and the layers at fault in one trained for int8."""
    graph = described_graph(detector, options, source_digest)
    if quantized_layers(detector):
        report = judge(graph)
        one = next(iter(judge.images), None)
        return report, [] if one is None else layer_faults(layer_differences(graph, detector, one[:1].numpy()))
    if not options.int8:
        return judge(graph), []
    assert int8 is not None
    maker = Int8Quantizer(graph, int8.images, int8.settings)
    return search_int8(maker, int8.images, int8.settings, lambda names: judge(maker.make(names)), say), []


def _file_report(
    judge: _Judge, quantized: QuantizedFile, int8: Int8Recipe | None, say: Callable[[str], None]
) -> ParityReport:
    """The comparison of an int8 file of another format with its model; int8 None: it is trained for it."""
    images, settings = (judge.arrays(), Quantization()) if int8 is None else (int8.images, int8.settings)
    report = search_int8(
        quantized, images, settings, lambda names: judge.of_file(partial(quantized.write, in_float=names)), say
    )
    report.float_layers = [
        name for name in quantized.layers if name in quantized.lost or name in (report.float_layers or ())
    ]
    return report


class _Judge:
    """Writes graphs to `part` and compares them with the model they came from."""

    def __init__(self, detector: Detector[Any, Any], part: Path, options: ExportOptions, data: DetectionData) -> None:
        self.detector, self.part, self.options, self.data = detector, part, options, data
        self.tolerance = TOLERANCES[options.precision]
        stride, pad_value = detector.size_multiple, detector.spec.input.pad_value
        self.images = list(sample_images(data, options.imgsz, stride, pad_value, dynamic=options.dynamic))
        self.model_ap: float | None = None

    def __call__(self, graph: onnx.ModelProto) -> ParityReport:
        """The report on a graph with probes; `part` holds the graph without them afterwards."""
        save_checked(graph, self.part)
        report = check_parity(self.detector, self.part, self.images, self.tolerance)
        save_checked(without_probes(graph), self.part)
        return self._measured(report)

    def of_file(self, write: Callable[[Path], object]) -> ParityReport:
        """The report on the file that `write` puts at `part`."""
        write(self.part)
        return self._measured(check_parity(self.detector, self.part, self.images, self.tolerance))

    def arrays(self) -> list[np.ndarray]:
        """The images, (1, 3, H, W) each."""
        return [batch[i : i + 1].numpy() for batch in self.images for i in range(len(batch))]

    def finished_file_faults(self) -> list[str]:
        """Of the file as it is given out: on all images where shares and a correlation judge, which one image may miss by chance."""
        images = self.images[:1] if self.tolerance.ap is None else self.images
        return check_parity(self.detector, self.part, images, self.tolerance).faults()

    def _measured(self, report: ParityReport) -> ParityReport:
        """With AP of the model (once) and of the file, where it judges."""
        if self.tolerance.ap is None:
            return report
        settings = Suppression(
            self.options.conf, self.options.iou, self.options.max_det, self.detector.spec.pairs_per_level
        )
        model = Reference(self.detector)

        def detect(images: Tensor) -> list[Detections]:
            model(images)
            return model.detections(settings)

        sides: list[Detect] = [OnnxPredictor(self.part)]
        if self.model_ap is None:
            sides.append(detect)
        pad_value, names = self.detector.spec.input.pad_value, self.detector.names
        precisions = average_precisions(sides, names, self.data, self.options.imgsz, pad_value, AP_IMAGES)
        if precisions is None and self.options.int8:
            raise UserError(NO_AP.format("--verify"))
        if precisions is not None:
            report.file_ap = precisions[0]
            report.model_ap = self.model_ap = precisions[1] if self.model_ap is None else self.model_ap
        return report


def _set_aside(path: Path) -> None:
    """Rename what an earlier export left: it must not be taken for what this one should have been."""
    endings = [file.name.removeprefix(path.stem) for file in (*parts_of(path), parity_note(path))]
    name, number = f"{path.stem}.previous", 1
    while any(path.with_name(name + ending).exists() for ending in endings):
        number += 1
        name = f"{path.stem}.previous-{number}"
    for ending in endings:
        file = path.with_name(path.stem + ending)
        if file.exists():
            os.replace(file, path.with_name(name + ending))


def _version(module: str) -> str:
    """Of the package that a module comes from, which need not bear its name (onnxruntime-gpu)."""
    try:
        return version(module)
    except PackageNotFoundError:
        return next((version(package) for package in packages_distributions().get(module, ())), "unknown")


def _note(path: Path, report: ParityReport, options: ExportOptions, int8: Int8Recipe | None) -> dict[str, Any]:
    runtime = RUNTIMES_OF[exported_format(path) or "onnx"][0]
    quantization = {} if int8 is None else {"quantization": int8.settings.model_dump()}
    return {
        "passed": not report.faults(),
        "compared": report.compared,
        **asdict(report),
        "options": asdict(options),
        **quantization,
        "torch": torch.__version__,
        runtime: _version(NEEDED[runtime][0][0]),
    }
