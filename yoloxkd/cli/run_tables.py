"""Tables the command line prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yoloxkd.assembly.models import architecture, build_detector, model_names, open_model
from yoloxkd.assembly.prediction import default_size
from yoloxkd.assembly.quantized_recipe import short_schedule
from yoloxkd.assembly.recipe_rows import recipe_rows
from yoloxkd.assembly.recipes import recipe_names, recipe_tree, resolve
from yoloxkd.cache_folders import cache_folder, find_cached
from yoloxkd.cli.tables import table, write_json
from yoloxkd.config.load import leaves, parse_set, write_yaml
from yoloxkd.config.quantization import Quantization
from yoloxkd.config.recipe import ValSection
from yoloxkd.data.augment.transforms import largest_input
from yoloxkd.engine.atomic import write_text
from yoloxkd.engine.evaluate import EvalResult
from yoloxkd.errors import UserError, nearest
from yoloxkd.metrics.measure import MASK, overall
from yoloxkd.nn.coco_names import COCO_NAMES
from yoloxkd.nn.complexity import complexity
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.fake_quantization import quantized_layers
from yoloxkd.nn.weights.load import PUBLISHED
from yoloxkd.output_paths import Output, check_outputs, is_own_json
from yoloxkd.types import ImageSize


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """The numbers over all classes (COCO's twelve, or CrowdHuman's three) and those of each class."""

    def shown(values: Mapping[str, float]) -> list[str]:
        return ["-" if value < 0 else f"{value:.4f}" for value in values.values()]

    if not metrics:
        return "not evaluated"
    whole = overall(metrics)
    rows = [[name, *shown(values)] for name, values in metrics["per_class"].items()]
    columns: Mapping[str, float] = next(iter(metrics["per_class"].values()), {})
    masks = {name.removeprefix(MASK): value for name, value in whole.items() if name.startswith(MASK)}
    boxes = {name: value for name, value in whole.items() if not name.startswith(MASK)}
    if masks:
        top = table(["", *boxes], [["boxes", *shown(boxes)], ["masks", *shown(masks)]])
    else:
        top = table(list(boxes), [shown(boxes)])
    return top + "\n" + table(["class", *columns], rows)


def check_val_outputs(out: Path | None, json_file: Path | None, inputs: Sequence[str]) -> None:
    """UserError: `yoloxkd val` would write over one of its inputs, over a file it has not written, or cannot write."""
    outputs = [] if json_file is None else [Output("--json", json_file)]
    if out is not None:
        outputs += [Output("--out", out / "metrics.json"), Output("--out", out / "detections.json")]
        outputs.append(Output("--out", out / "detections.odgt", lambda file: is_own_json(file.parent / "metrics.json")))
    check_outputs(outputs, inputs)


def write_detections(folder: Path, result: EvalResult) -> Path:
    """Detections in the result format of the data: detections.odgt for CrowdHuman, else COCO's detections.json."""
    if result.data.format != "crowdhuman":
        write_json(folder / "detections.json", result.coco_results())
        return folder / "detections.json"
    write_text(folder / "detections.odgt", "".join(json.dumps(row) + "\n" for row in result.odgt_results()))
    return folder / "detections.odgt"


def val_options(sets: Sequence[str]) -> dict[str, Any]:
    """`val.conf=0.1` texts -> keyword options of `Detector.val`."""
    return _section_options(
        sets, "val", [key for key in leaves(ValSection) if key not in ("split", "interval", "metric")]
    )


def export_options(sets: Sequence[str]) -> dict[str, Any]:
    """`export.sensitivity=true` texts -> keyword options of `Detector.export`."""
    return _section_options(sets, "export", list(leaves(Quantization)))


def _section_options(sets: Sequence[str], section: str, keys: Sequence[str]) -> dict[str, Any]:
    known_keys = [f"{section}.{key}" for key in keys]
    out = {}
    for text in sets:
        key, value = parse_set(text)
        if key not in known_keys:
            raise UserError(f"unknown key '{key}' for {section}; {nearest(key, known_keys)}")
        out[key.removeprefix(f"{section}.")] = value
    return out


def describe(what: str) -> str:
    """A model by name or file (architecture, parameters, FLOPs, strides, taps), and the recipe that belongs to it."""
    path = Path(what)
    if path.suffix in (".yaml", ".yml") or (what not in model_names() and what in recipe_names()):
        return _recipe(what, recipe_tree(what))
    if what in model_names():
        detector = build_detector({"name": what}, COCO_NAMES)
        return "\n".join([_model(what, detector, default_size(what)), "", _recipe(what, {"student": {"name": what}})])
    if not path.is_file():
        known_names = list(dict.fromkeys([*model_names(), *recipe_names()]))
        raise UserError(f"'{what}' is neither a model, a recipe nor a file; {nearest(what, known_names)}")
    opened = open_model(what)
    weights = opened.weights
    names_note = (
        "" if weights.named else " (the file has no names; as a teacher it gets them by --set teacher.names=[...])"
    )
    lines = [
        f"file        {weights.path} ({weights.kind} checkpoint)",
        f"sha256      {weights.digest}",
        f"classes     {len(weights.names)}: {', '.join(weights.names[:8])}{', ...' if len(weights.names) > 8 else ''}"
        f"{names_note}",
        *(
            []
            if weights.quantize is None
            else [f"quantized   int8, {len(quantized_layers(opened.detector))} convolutions with trained ranges"]
        ),
        _model(opened.name, opened.detector, weights.imgsz or default_size(opened.name)),
    ]
    return "\n".join(lines)


def _recipe(name: str, tree: Mapping[str, Any]) -> str:
    student = tree.get("student", {}).get("name")
    options = {} if name in recipe_names() or Path(name).is_file() else {"student": student}
    recipe = resolve(recipe=name if not options else None, **options)
    rows = recipe_rows()
    peak = recipe.optim.lr_per_image * recipe.train.batch
    lines = [
        f"# recipe {name}, resolved",
        *([f"# {rows[name].describe()}"] if name in rows else []),
        f"# learning rate: peak {peak:g} for {recipe.train.batch} images; {recipe.schedule.describe(recipe.train.epochs)}",
        *([f"# with --quantize int8: {_int8_schedule()}"] if recipe.quantize.kind == "off" else []),
        write_yaml(recipe.model_dump(by_alias=True, mode="json")).rstrip(),
    ]
    return "\n".join(lines)


def _int8_schedule() -> str:
    short = short_schedule()
    return f"{short['train']['epochs']} epochs of AdamW in batches of {short['train']['batch']}, without mosaic and multi-scale"


def _model(name: str, detector: Detector[Any, Any], size: ImageSize) -> str:
    height, width = largest_input(size, detector.size_multiple)
    cost = complexity(detector, (height, width))
    shown = height if height == width else f"{height}x{width}"
    return "\n".join(
        [
            f"model       {name} ({detector.family})",
            f"parameters  {cost.parameters / 1e6:.2f} M",
            f"FLOPs       {cost.flops / 1e9:.2f} G at {shown} px (two for each multiply-add)",
            f"strides     {', '.join(map(str, detector.spec.strides))}",
            f"input       {detector.spec.input.describe()}",
            f"taps        {', '.join(f'{tap} {tuple(maps.values())}' for tap, maps in detector.spec.channels.items())}",
            *(f"{stage:<11} {line}" for stage, line in detector.stage_lines().items()),
        ]
    )


def _reference(name: str) -> str:
    return name if "@" in name else f"{name}@coco"


def models_table() -> str:
    """Every architecture, its parameters, its published weights and whether they are on disk."""
    rows = []
    for name in model_names():
        family, keys = architecture(name)
        published = PUBLISHED.get(name)
        file = find_cached(published.filename) if published else None
        state = "-" if file is None else f"on disk: {file}" if file.is_file() else "not on disk"
        settings = ", ".join(f"{k} {v}" for k, v in keys.items())
        rows.append([name, family, _reference(name) if published else "-", state, settings])
    columns = ("model", "family", "weights", "state", "architecture")
    return table(columns, rows, left=columns) + f"\nweights are kept in {cache_folder()} (YOLOXKD_HOME changes it)"
