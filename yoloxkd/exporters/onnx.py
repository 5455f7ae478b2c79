"""ONNX export: pixels in, detections out, input convention in the metadata."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from yoloxkd.errors import UserError, nearest
from yoloxkd.exporters.base import Exportable
from yoloxkd.exporters.edge_form import edge_form, scaled_input
from yoloxkd.exporters.half import to_half
from yoloxkd.exporters.layer_steps import rounded_form
from yoloxkd.exporters.raw_graph import RawHead, describe_head
from yoloxkd.exporters.trained_int8 import with_scales
from yoloxkd.nms_defaults import CONF, IOU, MAX_DET
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.fake_quantization import activation_quantizers, quantized_layers
from yoloxkd.nn.solo.solo import SOLO
from yoloxkd.version import __version__

if TYPE_CHECKING:
    import onnx

OPSET = 18
OPSETS = range(17, 24)
"""Versions of ONNX' operators that a file may be of, where the graph can be converted to them."""
NMS_OUTPUTS = ("boxes", "scores", "labels", "counts")
RAW_OUTPUTS = ("boxes", "scores")
MASKS = "masks"
"""After the other outputs of a file with NMS, where the detector gives masks."""
PROBES = ("raw_boxes", "raw_scores")
"""What suppression chooses from: outputs while the file is being checked, removed before it is given out."""


OUTPUTS = ("detections", "locations", "raw")
"""What a file may give: detections after NMS, boxes and scores of every location, or the head's own tensors."""


def resolved_outputs(name: str | None, nms: bool | None, kind: str = "onnx") -> str:
    """One of `OUTPUTS`, of what a user gave; with neither, NMS in an ONNX file and raw tensors in one of another `kind`.

    UserError: there is none of that name, it contradicts `nms`, or the kind has no NMS.
    """
    if name is None:
        name = ("detections" if kind == "onnx" else "raw") if nms is None else "detections" if nms else "locations"
    if name not in OUTPUTS:
        raise UserError(f"unknown outputs '{name}'; {nearest(name, OUTPUTS)}")
    if name == "detections" and kind != "onnx":
        raise UserError(
            f"a file of format {kind} has no NMS inside; give --outputs raw or locations, or leave both out"
        )
    if name == "detections" and nms is False:
        raise UserError("--outputs detections come of NMS, and --no-nms leaves it out: give one of the two")
    if name != "detections" and nms is True:
        raise UserError(f"--outputs {name} are what comes before NMS, and --nms puts it in: give one of the two")
    return name


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export.

    imgsz    px, height and width of the input (with `dynamic`, what it is meant for)
    nms      suppression in the graph; else boxes and scores of every location
    raw      without nms: the head's own tensors instead, level by level, see `exporters.head_maps`
    dynamic  any batch size, height and width (multiples of the size the model needs); else one image of imgsz x imgsz
    half     fp16 weights and arithmetic in the network; inputs, outputs, box decoding and suppression stay float32
    int8     int8 convolutions by static quantization, the predictors in float32: see `exporters.int8`; of a model that is
             trained for int8, all of them with its own scales: `exporters.trained_int8`
    opset    version of ONNX' operators, of an ONNX file
    conf, iou, max_det   settings of the suppression. A user of the file can filter by a higher score, not by a lower
    """

    imgsz: int
    nms: bool = True
    raw: bool = False
    dynamic: bool = False
    half: bool = False
    int8: bool = False
    opset: int = OPSET
    conf: float = CONF
    iou: float = IOU
    max_det: int = MAX_DET

    @property
    def precision(self) -> str:
        return "int8" if self.int8 else "fp16" if self.half else "fp32"

    def check(self, detector: Detector[Any, Any]) -> None:
        """UserError where the numbers make no file."""
        if self.half and self.int8:
            raise UserError("half and int8 exclude each other: choose one of them")
        if quantized_layers(detector) and not self.int8:
            raise UserError(
                "this model is trained for int8, and its float32 weights alone are another model: give --int8"
            )
        if self.raw and self.nms:
            raise UserError("raw outputs come before NMS: a file cannot have both")
        if self.opset not in OPSETS:
            raise UserError(f"opset {self.opset} is none of {OPSETS.start} to {OPSETS.stop - 1}")
        stride = detector.size_multiple
        if self.imgsz < stride or self.imgsz % stride:
            raise UserError(f"imgsz {self.imgsz} is not a multiple of {stride}, as the model needs")
        if isinstance(detector, SOLO) and (self.half or (self.int8 and not quantized_layers(detector))):
            raise UserError(
                f"a {detector.family} is exported in float32, or in int8 if it is trained for it (train --quantize int8); "
                "leave --half and --calib out"
            )
        if self.raw:
            describe_head(detector)
        if detector.spec.masks and not self.nms:
            raise UserError(
                f"a {detector.family} gives masks to what its NMS leaves, and cannot be exported without; leave --no-nms out"
            )
        if self.dynamic and not detector.spec.stable_locations:
            raise UserError(
                f"a {detector.family} has NMS between its two stages, image by image, and cannot be exported with free shapes; "
                "leave --dynamic out"
            )
        if not 0 <= self.conf < 1:
            raise UserError(f"conf {self.conf} must be at least 0 and below 1")
        if not 0 < self.iou <= 1:
            raise UserError(f"iou {self.iou} must be above 0 and at most 1")
        if self.max_det < 1:
            raise UserError(f"max_det {self.max_det} must be at least 1")


def requested_options(
    kind: str, imgsz: int, nms: bool | None, outputs: str | None, opset: int | None, **flags: bool
) -> ExportOptions:
    """The options of a file of a format, of what a user gave. UserError: as of `resolved_outputs`, or an opset for no ONNX file.

    flags  dynamic, half, int8 of `ExportOptions`
    """
    if opset is not None and kind != "onnx":
        raise UserError(f"opset is of ONNX files, and a file of format {kind} has none; leave it out")
    outputs = resolved_outputs(outputs, nms, kind)
    opset = OPSET if opset is None else opset
    return ExportOptions(imgsz, nms=outputs == "detections", raw=outputs == "raw", opset=opset, **flags)


def export_onnx(
    detector: Detector[Any, Any], path: Path, options: ExportOptions, *, source_digest: str = "", probes: bool = False
) -> Path:
    """Write `detector` as an ONNX file, weights inside; returns the path.

    Input `images` (N, 3, imgsz, imgsz) float32 RGB 0..255. Outputs with nms: boxes (N, D, 4) xyxy px of the input,
    scores (N, D), labels (N, D) int64, counts (N,) int64, rows past the count zero and -1, and of a detector of masks
    masks (N, D, s, s), 0 to 1, in the raster of their boxes; without: boxes (N, A, 4),
    scores (N, A, K); with raw: the tensors of the metadata `head_maps`. source_digest is the SHA-256 of the checkpoint. `probes` adds the outputs raw_boxes and raw_scores
    to a file with nms. The file is not compared with the model here: `exporters.parity.export_checked` does that, and
    it alone makes int8 files.
    """
    model = described_graph(detector, options, source_digest)
    return save_checked(model if probes else without_probes(model), path)


def described_graph(
    detector: Detector[Any, Any],
    options: ExportOptions,
    source_digest: str = "",
    *,
    scaled: bool = False,
    plain: bool = False,
) -> onnx.ModelProto:
    """The graph with its metadata and with probes, in float32 or fp16; that of an int8 file is still in float32.

    That of a model trained for int8 is finished.

    scaled: with the input made 0 to 1, see `edge_form.scaled_input`
    plain: of a model trained for int8, the float32 graph of its rounded weights, see `layer_steps.rounded_form`
    """
    options.check(detector)
    model = _graph(detector, options, scaled, plain)
    if options.half:
        model = to_half(model)
    _describe(model, detector, options, source_digest)
    return model


def save_checked(model: onnx.ModelProto, path: Path) -> Path:
    """Write one file with the weights inside, after onnx's own check of it."""
    import onnx

    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


def without_probes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without the outputs that only the check reads."""
    outputs = [output for output in model.graph.output if output.name not in PROBES]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return model


def _graph(detector: Detector[Any, Any], options: ExportOptions, scaled: bool, plain: bool) -> onnx.ModelProto:
    """The traced and optimized graph.

    Where shapes are free, a batch of two is traced, with two cells or more on the coarsest level: one would be taken as
    fixed.
    """
    from yoloxkd.exporters.nms_graph import WithMatrixNMS, WithSuppression, onnx_translations

    raw = Exportable(detector)
    if plain:
        rounded_form(raw.detector)
    trained_int8 = bool(quantized_layers(raw.detector))
    for quantizer in activation_quantizers(raw):  # their nodes are put in afterwards
        quantizer.rounding = False
    if not trained_int8:  # its scales are those of the layers it was trained with
        edge_form(raw.detector)
    if scaled:
        scaled_input(raw.detector)
    network: torch.nn.Module = raw
    outputs: tuple[str, ...] = RAW_OUTPUTS
    if options.raw:
        network, outputs = RawHead(raw), tuple(describe_head(detector).tensors())
    elif isinstance(detector, SOLO):
        network, outputs = WithMatrixNMS(raw, conf=options.conf, max_det=options.max_det), (*NMS_OUTPUTS, MASKS)
    elif options.nms:
        network = WithSuppression(raw, conf=options.conf, iou=options.iou, max_det=options.max_det)
        outputs = NMS_OUTPUTS + ((MASKS,) if detector.spec.masks else ()) + PROBES
    side = max(options.imgsz, 2 * max(detector.spec.strides)) if options.dynamic else options.imgsz
    sample = torch.full((2 if options.dynamic else 1, 3, side, side), 114.0)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            network.eval(),
            (sample,),
            dynamo=True,
            opset_version=max(options.opset, OPSET),
            external_data=False,
            input_names=["images"],
            output_names=list(outputs),
            dynamic_shapes=_free(detector.size_multiple) if options.dynamic else None,
            custom_translation_table=onnx_translations(),
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return _of_opset(with_scales(model, raw) if trained_int8 else model, options.opset)


def _of_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The graph in a version that torch's exporter does not write: it begins at 18, and keeps that where it cannot convert."""
    from onnx import version_converter

    if next(entry.version for entry in model.opset_import if entry.domain == "") == opset:
        return model
    try:
        converted: onnx.ModelProto = version_converter.convert_version(model, opset)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("failed: ")[2]
        raise UserError(
            f"this model cannot be written in opset {opset}: {reason}; leave --opset out for {OPSET}"
        ) from error
    return converted


def _free(stride: int) -> tuple[dict[int, Any], ...]:
    from torch.export import Dim

    return ({0: Dim("batch", min=1), 2: stride * Dim("rows", min=1), 3: stride * Dim("columns", min=1)},)


def _describe(model: onnx.ModelProto, detector: Detector[Any, Any], options: ExportOptions, source_digest: str) -> None:
    """Metadata of the file, and away with what the exporter notes about the source code of every node."""
    import onnx

    for part in [*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output]:
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    del model.graph.metadata_props[:]
    model.producer_name, model.producer_version = "yoloxkd", __version__
    onnx.helper.set_model_props(model, metadata(detector, options, source_digest))


def metadata(detector: Detector[Any, Any], options: ExportOptions, source_digest: str) -> dict[str, str]:
    """What a user of the file has to know, as texts; lists and objects are JSON."""
    free = ["N", "H", "W"] if options.dynamic else [1, options.imgsz, options.imgsz]
    return {
        "yoloxkd_version": __version__,
        "family": detector.family,
        "names": json.dumps(detector.names),
        "strides": json.dumps(list(detector.spec.strides)),
        "pairs_per_level": json.dumps(detector.spec.pairs_per_level),
        "predictions_per_cell": json.dumps(detector.per_cell if isinstance(detector, DenseDetector) else 0),
        "size_multiple": json.dumps(detector.size_multiple),
        "input_size": json.dumps([options.imgsz, options.imgsz]),
        "input": f"images float32 ({free[0]}, 3, {free[1]}, {free[2]}) RGB 0..255; normalization is inside",
        "letterbox": json.dumps(LETTERBOX),
        "pad_value": json.dumps(list(detector.spec.input.pad_value)),
        "dynamic": json.dumps(options.dynamic),
        "precision": options.precision,
        "nms": json.dumps(options.nms),
        "masks": json.dumps(detector.spec.masks),
        **({"head_maps": describe_head(detector).model_dump_json()} if options.raw else {}),
        "conf": json.dumps(options.conf),
        "iou": json.dumps(options.iou),
        "max_det": json.dumps(options.max_det),
        "source_sha256": source_digest,
    }


LETTERBOX = {
    "scale": "min(H / height, W / width)",
    "size": "int(width * scale), int(height * scale), bilinear",
    "place": "top left",
    "back": "x / scale, y / scale",
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' progress lines, warnings about themselves and log records are not the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "onnxruntime")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
