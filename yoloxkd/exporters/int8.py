"""int8 export: a float32 graph and calibrated ranges become a QDQ graph."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from yoloxkd.config.quantization import Quantization
from yoloxkd.exporters.metadata import read_metadata

if TYPE_CHECKING:
    import onnx

QUANTIZED = ("Conv", "Relu", "Clip")
"""Operators in int8. An activation of the other kinds is computed in float32 between two convolutions: measured, the
graph is as fast and more exact than with int8 sums, products and concatenations."""
Locations = tuple[np.ndarray, np.ndarray]
"""boxes (A, 4) px and scores (A, K) of one image."""
Range = tuple[float, float]
"""Lowest and highest value of a tensor."""
_AT_ONCE = 5  # calibration images whose activations are held in memory at a time


class Int8Quantizer:
    """Calibrated once, then as many int8 variants of one graph as wanted.

    layers  names of the convolutions that may be int8, in the graph's order: all but the predictors, from which on
            (box decoding, scores, suppression) everything stays float32; of a raw graph, the predictors too

    model is a float32 graph of ours with input `images`; images are (1, 3, H, W) arrays, RGB 0..255, letterboxed.
    """

    def __init__(self, model: onnx.ModelProto, images: Sequence[np.ndarray], settings: Quantization) -> None:
        self.settings, self._given = settings, model
        with tempfile.TemporaryDirectory(prefix="yoloxkd-int8-") as folder, _quiet():
            self._model = _prepared(model, Path(folder))
            raw = any(entry.key == "head_maps" for entry in model.metadata_props)
            self._kinds = (*QUANTIZED, "Mul") if raw else QUANTIZED
            inside = _all_but_inner_products(self._model) if raw else _leading_to_last_convolutions(self._model)
            self._nodes: dict[str, list[str]] = defaultdict(list)  # several: levels that share a convolution
            for node in self._model.graph.node:
                if node.name in inside and node.op_type == "Conv":
                    self._nodes[_layer(node)].append(node.name)
            self._outside = [n.name for n in self._model.graph.node if n.name not in inside]
            self._ranges = _calibrated(Path(folder), images, settings, self._kinds)
        self.layers = list(self._nodes)
        if settings.silu_floor is not None:
            self._floor(settings.silu_floor)

    def make(self, in_float: Collection[str] = ()) -> onnx.ModelProto:
        """The int8 graph, with the layers of these names left in float32."""
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        copy = onnx.ModelProto()
        copy.CopyFrom(self._model)
        excluded = self._outside + [name for layer in in_float for name in self._nodes[layer]]
        with _quiet():
            quantizer = QDQQuantizer(
                copy,
                per_channel=True,
                reduce_range=self.settings.reduce_range,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=self._ranges,
                nodes_to_quantize=[],
                nodes_to_exclude=excluded,
                op_types_to_quantize=list(self._kinds),
                extra_options={},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        made: onnx.ModelProto = quantizer.model.model
        properties = [p for p in made.metadata_props if not p.key.startswith("onnx.")]  # the quantizer's own marks
        del made.metadata_props[:]
        made.metadata_props.extend(properties)
        return made

    def outputs(self, in_float: Collection[str] | None, images: Sequence[np.ndarray]) -> list[Locations]:
        """What a graph finds in each of these images, before suppression; in_float None: the float32 graph."""
        return graph_locations(self._given if in_float is None else self.make(in_float), images)

    def ranges(self) -> dict[str, tuple[Range, Range]]:
        """By layer, the ranges of its input and of its output, over all levels that share it."""
        nodes = {node.name: node for node in self._model.graph.node}
        return {
            layer: (
                self._range([nodes[name].input[0] for name in names]),
                self._range([nodes[name].output[0] for name in names]),
            )
            for layer, names in self._nodes.items()
        }

    def _range(self, tensors: Sequence[str]) -> Range:
        lows, highs = zip(*(self._ranges[name].range_value for name in tensors), strict=True)
        return float(np.min(lows)), float(np.max(highs))

    def _floor(self, lowest: float) -> None:
        """Cut the ranges of what only a SiLU reads: what is far below zero becomes zero there."""
        readers: dict[str, list[str]] = defaultdict(list)
        for node in self._model.graph.node:
            for name in node.input:
                readers[name].append(node.op_type)
        for name, measured in self._ranges.items():
            if sorted(readers[name]) == ["Mul", "Sigmoid"]:
                low, high = (np.float32(np.ravel(v)[0]) for v in measured.range_value)
                measured.lowest, measured.highest = np.array(max(low, np.float32(lowest))), np.array(high)


def graph_locations(model: onnx.ModelProto, images: Sequence[np.ndarray]) -> list[Locations]:
    """What a graph of ours finds in images (1, 3, H, W), before suppression."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    metadata = read_metadata({p.key: p.value for p in model.metadata_props}, Path("the graph"))
    names = [output.name for output in session.get_outputs()]
    predictions = []
    for image in images:
        outputs = dict(zip(names, session.run(names, {"images": image.astype(np.float32)}), strict=True))
        if metadata.head_maps is not None:
            size = (image.shape[2], image.shape[3])
            boxes, scores = metadata.head_maps.locations(outputs, size, len(metadata.names), Path("the graph"))
        else:
            prefix = "raw_" if "raw_boxes" in outputs else ""
            boxes, scores = outputs[f"{prefix}boxes"], outputs[f"{prefix}scores"]
        predictions.append((boxes[0], scores[0]))
    return predictions


def _prepared(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The graph optimized and its shapes inferred, which the quantizer wants; also kept as `folder/float.onnx`."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnx.save(model, str(folder / "given.onnx"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    # a factor behind a convolution stays there: levels that share the convolution have factors of their own
    onnxruntime.InferenceSession(
        str(folder / "given.onnx"), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConvMulFusion"]
    )
    # the symbolic inference knows no NonMaxSuppression; onnx's own, which also runs, does
    quant_pre_process(
        str(folder / "optimized.onnx"), str(folder / "float.onnx"), skip_symbolic_shape=True, skip_optimization=True
    )
    return onnx.load(str(folder / "float.onnx"))


def _layer(node: onnx.NodeProto) -> str:
    """The module that a convolution was: `backbone.stem.conv` of a weight `detector.backbone.stem.conv.weight`."""
    path = node.input[1].removesuffix(".weight").split(".")
    while path[0] in ("network", "detector") and len(path) > 1:
        path = path[1:]
    return ".".join(path)


def _leading_to_last_convolutions(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes from whose outputs another convolution is reached."""
    inside: set[str] = set()
    read: set[str] = set()
    for node in reversed(model.graph.node):
        if read.intersection(node.output):
            inside.add(node.name)
        if node.name in inside or node.op_type == "Conv":
            read.update(node.input)
    return inside


def _all_but_inner_products(model: onnx.ModelProto) -> set[str]:
    """Names of a raw graph's nodes, but for products that are no output: each output gets one scale."""
    outputs = {output.name for output in model.graph.output}
    return {n.name for n in model.graph.node if n.op_type != "Mul" or outputs.intersection(n.output)}


def _calibrated(folder: Path, images: Sequence[np.ndarray], settings: Quantization, kinds: Sequence[str]) -> Any:
    """The range of every tensor that quantization may touch."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class ImageColumns(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, images: Sequence[np.ndarray]) -> None:
            self.rest: Iterator[np.ndarray] = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.rest, None)
            return None if image is None else {"images": image.astype(np.float32)}

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    calibrator = create_calibrator(
        folder / "float.onnx",
        list(kinds),
        augmented_model_path=str(folder / "calibration.onnx"),
        calibrate_method=methods[settings.method],
        extra_options={"percentile": settings.percentile} if settings.method == "percentile" else {},
    )
    for at in range(0, len(images), _AT_ONCE):
        calibrator.collect_data(ImageColumns(images[at : at + _AT_ONCE]))
    return calibrator.compute_data()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer logs to the root logger and prints."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(before)
