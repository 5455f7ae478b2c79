"""`yoloxkd bench`: the variants of a model side by side: size, latency, AP."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yoloxkd.api import Detector
from yoloxkd.cli.latency import CompiledPredictor, Timed, measure_latency
from yoloxkd.cli.tables import table, write_json
from yoloxkd.config.without_folders import distinct_names, without_folders
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.loader import eval_loader
from yoloxkd.engine.evaluate import TorchPredictor, evaluate
from yoloxkd.errors import GateError, UserError
from yoloxkd.exporters import EXPORTERS, RUNTIMES_OF, missing
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.file_kinds import EXPORTED, exported_format, parts_of
from yoloxkd.metrics.measure import overall
from yoloxkd.nms_defaults import IOU, PREDICT_CONF
from yoloxkd.output_paths import Output, check_outputs

_FORMAT_NAMES = {"onnx": "ONNX", "ncnn": "ncnn", "tflite": "TFLite", "executorch": "ExecuTorch"}
_RUNTIME_NAMES = {"openvino": "OpenVINO"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table: `kind` is torch, compiled, or the runtime of an exported file."""

    name: str
    kind: str
    file: Path


def bench(
    models: Sequence[str],
    *,
    data: str,
    split: str,
    calib: str | None,
    imgsz: int | None,
    runs: int,
    threads: int | None,
    compiled: bool,
    json_file: Path | None,
) -> None:
    """Export what is not a file yet, measure all variants in turns, print the table."""
    check_outputs([] if json_file is None else [Output("--json", json_file)], [*models, data])
    images = load_split(find_data(data), split)
    many = threads or os.cpu_count() or 1
    detectors = [Detector(model, "cpu") for model in models]
    labels = _labels(detectors)
    size = _common_size(detectors, imgsz)
    with tempfile.TemporaryDirectory(prefix="yoloxkd-bench-") as folder:
        variants: dict[Variant, Detector] = {}
        for number, detector in enumerate(detectors):
            label = labels[number] if len(models) > 1 else ""
            variant_folder = Path(folder) / str(number)
            variants |= dict.fromkeys(_variants(detector, label, variant_folder, size, data, calib, compiled), detector)
        rows = _measure(variants, images, size, runs, many)
    print(f"{', '.join(map(str, models))} at {size} px on {data} {split}: {len(images)} images, {runs} runs a variant")
    print(_latency_tables(rows, many))
    if json_file is not None:
        head = {"data": without_folders(data), "split": split, "imgsz": size, "runs": runs}
        write_json(json_file, head | {"variants": rows})


def _labels(detectors: Sequence[Detector]) -> list[str]:
    """A name for each model's rows: its file name, with its folder where names repeat. UserError: a file comes twice."""
    files = [Path(detector.weights_file).resolve() for detector in detectors]
    for number, file in enumerate(files):
        if file in files[:number]:
            raise UserError(f"{detectors[number].source} is given twice; a model compared with itself says nothing")
    names = [Path(detector.source).name for detector in detectors]
    long = distinct_names([detector.source for detector in detectors])
    return [name if names.count(name) == 1 else file for name, file in zip(names, long, strict=True)]


def _common_size(detectors: Sequence[Detector], imgsz: int | None) -> int:
    sizes = {detector.size(imgsz) for detector in detectors}
    size = sizes.pop()
    if sizes or isinstance(size, tuple):
        raise UserError("the models are not all of one square input size; choose one by --imgsz")
    return size


def _variants(
    detector: Detector, label: str, folder: Path, size: int, data: str, calib: str | None, compiled: bool
) -> list[Variant]:
    """Rows of one model. A checkpoint is exported in every precision; one that fails its gate is left out, and said."""
    prefix = f"{label} " if label else ""
    source = Path(detector.weights_file)
    if detector.onnx:
        return _of_file(f"{prefix}{_FORMAT_NAMES[exported_format(source) or 'onnx']} {detector.precision}", source)
    variants = [Variant(f"{prefix}PyTorch", "torch", source)]
    if compiled:
        variants.append(Variant(f"{prefix}compiled", "compiled", source))
    options_of: dict[str, dict[str, Any]] = {"fp32": {}, "fp16": {"half": True}}
    trained = detector.precision == "int8"
    if trained:
        if calib is not None:
            raise UserError(f"{detector.source} is trained for int8 and has its own ranges; leave --calib out")
        options_of = {"int8": {"int8": True}}
    elif calib is not None:
        options_of["int8"] = {"int8": True, "calib": calib}
    exports = [("onnx", precision, options) for precision, options in options_of.items()]
    others = ("int8", {"int8": True}) if trained else ("fp32", {})
    exports += [(kind, *others) for kind in EXPORTERS if kind != "onnx" and not missing(kind)]
    for kind, precision, options in exports:
        name = f"{prefix}{_FORMAT_NAMES.get(kind, kind)} {precision}"
        target = folder / f"{precision}{EXPORTED[kind]}"
        try:
            detector.export(target, imgsz=size, verify=data, say=None, format=kind, **options)
        except GateError as error:
            print(f"{name.replace('ONNX ', '')} is left out: {error}")
        except UserError as error:
            if kind == "onnx" and precision != "fp16":
                raise
            print(f"{name.replace('ONNX ', '')} is left out: {error}")
        else:
            variants += _of_file(name, target)
    return variants


def _of_file(name: str, file: Path) -> list[Variant]:
    usual, *others = RUNTIMES_OF[exported_format(file) or "onnx"]
    others = [runtime for runtime in others if not missing(runtime)]
    return [Variant(name, usual, file), *(Variant(f"{name}, {_RUNTIME_NAMES.get(r, r)}", r, file) for r in others)]


def _predictor(variant: Variant, detector: Detector, conf: float, threads: int | None) -> Timed:
    if variant.kind == "torch":
        return TorchPredictor(detector.network, conf=conf, iou=IOU)
    if variant.kind == "compiled":
        return CompiledPredictor(detector.network, conf=conf, iou=IOU).compiled()
    return OnnxPredictor(variant.file, conf=conf, threads=threads, runtime=variant.kind)


def _size(file: Path) -> int:
    """Bytes of a model, in all its files."""
    return sum(part.stat().st_size for part in parts_of(file))


def _measure(
    variants: dict[Variant, Detector], images: DetectionData, size: int, runs: int, many: int
) -> list[dict[str, Any]]:
    image = images.read(len(images) // 2)
    rows = {v.name: {"variant": v.name, "size_mb": round(_size(v.file) / 1e6, 3)} for v in variants}
    for variant, detector in variants.items():
        predictor = _predictor(variant, detector, 0.01, None)
        loader = eval_loader(images, imgsz=size, batch=1, workers=0, pad_value=predictor.pad_value)
        result = evaluate(predictor, loader, images)
        rows[variant.name] |= {"AP": next(iter(overall(result.metrics).values()))}
    for threads in sorted({1, many}):
        predictors = {v.name: _predictor(v, detector, PREDICT_CONF, threads) for v, detector in variants.items()}
        for name, latency in measure_latency(predictors, image, size, runs, threads).items():
            rows[name] |= {f"threads_{threads}": latency.summary()}
    return list(rows.values())


def _latency_tables(rows: Sequence[dict[str, Any]], many: int) -> str:
    """The table: AP and size, then per number of threads the parts of a prediction in ms."""
    out = []
    for threads in sorted({1, many}):
        columns = ["variant", "MB", "AP", "before", "network", "after", "total", "p10 to p90", "total/network"]
        cells = []
        for row in rows:
            t = row[f"threads_{threads}"]
            times = [f"{t[f'{part}_ms']:.1f}" for part in ("before", "network", "after", "total")]
            spread = f"{t['total_p10_ms']:.1f} to {t['total_p90_ms']:.1f}"
            ap = "-" if row["AP"] < 0 or np.isnan(row["AP"]) else f"{row['AP']:.4f}"
            cells.append([row["variant"], f"{row['size_mb']:.2f}", ap, *times, spread, f"{t['end_to_end']:.2f}"])
        out.append(f"{threads} thread{'s' if threads > 1 else ''}, ms an image:\n" + table(columns, cells))
    return "\n".join(out)
