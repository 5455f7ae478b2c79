"""What is mutated, and what is done with the result: one target a kind of file."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console

from tests.conftest import write_toy
from tests.fuzz.data_kinds import DATA
from tests.fuzz.harness import Target
from tests.study.conftest import definition
from yoloxkd.api import Trainer
from yoloxkd.assembly.models import build_detector, load_student, new_detector, open_model
from yoloxkd.assembly.recipes import check, resolve
from yoloxkd.assembly.run import prepare, read_resume
from yoloxkd.cli.run_tables import describe
from yoloxkd.cli.studying import tables
from yoloxkd.config.load import parse_set
from yoloxkd.config.recipe import Recipe
from yoloxkd.engine.callbacks.html_report import HtmlReport
from yoloxkd.engine.checkpoint import FORMAT
from yoloxkd.engine.optim import learning_rate
from yoloxkd.exporters import RUNTIMES
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.study.definition import read_study
from yoloxkd.study.kept_runs import keep, read_records
from yoloxkd.study.pages import write_report
from yoloxkd.study.plan import plan

NAMES = ["red", "blue"]
STUDENT = {"name": "yolox-nano", "width": 0.0625}
WIDE = {"width": 0.0625, "depth": 0.33, "depthwise": True}


# checkpoints


@functools.cache
def student_file() -> dict[str, Any]:
    torch.manual_seed(0)
    state = build_detector(STUDENT, NAMES).state_dict()
    about = {"format": FORMAT, "version": "0", "kind": "student", "student": {**WIDE, **STUDENT, "family": "yolox"}}
    return about | {"names": NAMES, "imgsz": 64, "recipe": {}, "model": state, "epoch": 1, "metrics": {"AP": 0.5}}


@functools.cache
def megvii_file() -> dict[str, Any]:
    torch.manual_seed(0)
    state = build_detector({"name": "yolox-nano"}, ["x"] * 3).state_dict()
    few = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    return {"start_epoch": 3, "model": few, "best_ap": 0.3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}


@functools.cache
def mmdetection_file() -> dict[str, Any]:
    from tests.nn.test_mmdet_weights import CONFIG_3, checkpoint

    torch.manual_seed(0)
    state = checkpoint("fcos", "mobilenetv2_100", norm_eval=False)
    return {"meta": {"cfg": CONFIG_3, "dataset_meta": {"CLASSES": ("a", "b")}, "epoch": 1}, "state_dict": state}


def use_checkpoint(value: Any, folder: Path, start: bool = False) -> None:
    """Open it as a model; start: and begin a student of the same architecture with it."""
    file = folder / "x.pt"
    torch.save(value, file)
    detector = open_model(str(file)).detector
    describe(str(file))
    with torch.no_grad():
        detector(torch.zeros(1, 3, 64, 64))
    if start:
        load_student(build_detector(STUDENT, NAMES), str(file))


# runs


@functools.cache
def runs_folder() -> Path:
    """A folder with a data set and an interrupted distillation."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="yoloxkd-fuzz-"))
    data = write_toy(folder / "data", images=4, size=64)
    torch.save(student_file(), folder / "teacher.pt")
    sets = {"train.batch": 2, "train.imgsz": 64, "engine.device": "cpu", "engine.workers": 0, "student.width": 0.0625}
    sets |= {"augment.multiscale": 0, "augment.mosaic": 0, "teacher.min_ap": 0, "callbacks.plots": False}
    sets |= {"callbacks.early_stopping": {}, "callbacks.report": False, "kd.weight": "auto", "val.interval": 1}
    Trainer(
        "yolox-nano", str(folder / "teacher.pt"), "cwd", str(data), 2, out=folder / "run", set=sets, console=_quiet()
    ).fit()
    return folder


@functools.cache
def last_file() -> dict[str, Any]:
    """last.pt after the first of two epochs, by the end of the second turned back."""
    raw: dict[str, Any] = torch.load(runs_folder() / "run" / "last.pt", weights_only=True)
    steps = raw["run"]["iteration"] // 2
    raw["run"] |= {"epoch": 1, "iteration": steps}
    return raw


def use_last(value: Any, folder: Path, whole: bool = False) -> None:
    """Resume: as far as the first step, or to the end."""
    file = folder / "last.pt"
    torch.save(value, file)
    recipe, _, raw = read_resume(str(file))
    loop = prepare(recipe, folder / "out", resume=raw, console=_quiet())
    if whole:
        loop.run()
    else:
        loop.set_up()


@functools.cache
def resumed_files() -> dict[str, Any]:
    """What else a resume reads of the run's folder, by file name."""
    run = runs_folder() / "run"
    tables = ("results.csv", "learning_rate.csv")
    texts = {name: [line.split(",") for line in (run / name).read_text().splitlines()] for name in tables}
    return texts | {"environment.json": json.loads((run / "environment.json").read_text())}


def use_resumed_files(value: Any, folder: Path) -> None:
    """Go on with a run whose folder was changed; read a table as the report and the curves do."""
    for file in resumed_files():
        if not isinstance(value, dict) or file in value:
            _write_file(folder / file, value[file] if isinstance(value, dict) else value)
    torch.save(last_file(), folder / "last.pt")
    recipe, out, raw = read_resume(str(folder))
    recipe = recipe.model_copy(update={"callbacks": recipe.callbacks | {"report": HtmlReport.Config()}})
    said = io.StringIO()
    prepare(recipe, out, resume=raw, console=Console(file=said, width=500)).run()
    assert "was not written" not in said.getvalue(), said.getvalue()


# recipes and studies


@functools.cache
def recipe_tree() -> dict[str, Any]:
    recipe = resolve(student="yolox-nano", teacher=["yolox-s"], kd=["fgd"], sets=["student.width=0.0625"])
    tree: dict[str, Any] = recipe.model_dump(by_alias=True, mode="json")
    tree["callbacks"] |= {"early_stopping": {"patience": 3}}
    return tree


def use_recipe(value: Any, folder: Path) -> None:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(value), encoding="utf-8")
    used(resolve(recipe=str(file)))


def use_set(value: Any, folder: Path) -> None:
    """Every key as `--set`, or as the mapping that Python users give."""
    flat = dict(_flat(value)) if isinstance(value, dict) else {}
    odd = [(k, v) for k, v in flat.items() if k not in dict(_flat(recipe_tree())) or v != dict(_flat(recipe_tree()))[k]]
    for key, item in odd[:4]:
        parse_set(f"{key}={item}")
        used(resolve(student="yolox-nano", teacher=["yolox-s"], kd=["fgd"], sets={key: item}))


def used(recipe: Recipe) -> None:
    """What a run would make of a recipe before its first step, without data."""
    student = new_detector(recipe.student, NAMES)
    assert sum(p.numel() for p in student.parameters()) < 2e8
    for iteration in (0, 1, 1000):
        assert 0 <= learning_rate(recipe, iteration, 10) < 1e9
    assert check(recipe.model_dump(by_alias=True, mode="json")) == recipe


def _flat(tree: dict[Any, Any], prefix: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def study_tree() -> dict[str, Any]:
    grids = {"one": {"students": ["nano"], "methods": ["none", "pgd"], "seeds": [0], "title": "One"}}
    changes: dict[str, Any] = {"seeds": [0, 1], "baseline": "none", "choose": "val", "report": "test", "grids": grids}
    return definition("no-such-data.yaml", "no-such-teacher.pt", **changes)


def use_study(value: Any, folder: Path) -> None:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(value), encoding="utf-8")
    plan(read_study(str(file)), folder)


@functools.cache
def run_files() -> dict[str, Any]:
    """What a finished run of a study leaves, by file name."""
    run = runs_folder() / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    return {
        "environment.json": json.loads((run / "environment.json").read_text()),
        "metrics.json": metrics,
        "test.json": metrics | {"model": "x", "data": "y", "split": "test"},
        "cost.json": {"wall": 3.5, "cpu": 4.5, "parts": 1},
        "results.csv": [line.split(",") for line in (run / "results.csv").read_text().splitlines()],
    }


def use_run_files(value: Any, folder: Path) -> None:
    """Keep a finished run's numbers, and make the tables of the study."""
    (folder / "study.yaml").write_text(yaml.safe_dump(study_tree()))
    study = read_study(str(folder / "study.yaml"))
    run = next(run for run in plan(study, folder).values() if run.recipe is not None)
    run.folder.mkdir(parents=True, exist_ok=True)
    torch.save(student_file(), run.best)
    for file in run_files():
        if not isinstance(value, dict) or file in value:
            _write_file(run.folder / file, value[file] if isinstance(value, dict) else value)
    record = keep(run, study.name, folder / "results", "test")
    write_report(study, {run.key: record}, folder / "results")


def run_json() -> dict[str, Any]:
    numbers = {"AP": 0.5, "AP50": 0.6, "AP75": 0.4, "APs": -1.0, "APm": 0.3, "APl": 0.2}
    about = {"study": "tiny", "student": "nano", "method": "none", "seed": 0, "epochs": 1, "split": "test"}
    about |= {"metrics": numbers | {"per_class": {"red": {"AP": 0.5}}}, "seconds": 3.5, "cpu_seconds": 4.0}
    return about | {
        "step_seconds": 0.1,
        "chosen": numbers | {"epoch": 1, "split": "val"},
        "settings": {"train.batch": 4},
    }


def use_run_json(value: Any, folder: Path) -> None:
    """Read a results' folder that is there, and make the tables of the study."""
    (folder / "study.yaml").write_text(yaml.safe_dump(study_tree()))
    study = read_study(str(folder / "study.yaml"))
    results = folder / "results"
    (results / "tiny" / "nano" / "none-s0").mkdir(parents=True, exist_ok=True)
    (results / "summary.csv").unlink(missing_ok=True)
    _write_file(results / "tiny" / "nano" / "none-s0" / "run.json", value)
    records = read_records(results, "tiny")
    tables(study, records)
    write_report(study, records, results)
    read_records(results, "tiny")


def _write_file(path: Path, value: Any) -> None:
    if path.suffix == ".csv":
        rows = value if isinstance(value, list) else [value]
        path.write_text("\n".join(",".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows))
    else:
        path.write_text(json.dumps(value, default=str))


# exported files


def onnx_metadata() -> dict[str, Any]:
    about = {
        "names": NAMES,
        "strides": [8, 16, 32],
        "size_multiple": 32,
        "input_size": [64, 64],
        "pad_value": [1, 2, 3],
    }
    return about | {"dynamic": False, "nms": True, "conf": 0.05, "iou": 0.65, "max_det": 10, "precision": "fp32"}


def use_metadata(value: Any, folder: Path) -> None:
    """Open a file with such metadata and detect; the graph is that of the right file."""

    class Session:
        def __init__(self, path: Path, threads: int | None) -> None:
            items = value.items() if isinstance(value, dict) else ()
            self.metadata = {str(k): v if isinstance(v, str) else json.dumps(v, default=str) for k, v in items}
            self.outputs = ["boxes", "scores", "labels", "counts"]

        def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
            n = len(images)
            return [np.zeros((n, 10, 4)), np.zeros((n, 10)), np.zeros((n, 10), np.int64), np.full((n,), 10)]

    RUNTIMES["fuzz"] = Session
    try:
        (folder / "x.onnx").write_bytes(b"onnx")
        predictor = OnnxPredictor(folder / "x.onnx", runtime="fuzz")
        side = predictor.imgsz
        for found in predictor(torch.zeros(1, 3, side, side, dtype=torch.uint8)) if side <= 2048 else ():
            found.as_dicts()
        predictor.tuned(conf=0.5)
    finally:
        del RUNTIMES["fuzz"]


def _quiet() -> Console:
    return Console(file=io.StringIO())


TARGETS: dict[str, Target] = {
    "best.pt": Target(student_file, functools.partial(use_checkpoint, start=True)),
    "megvii.pth": Target(megvii_file, use_checkpoint),
    "mmdetection.pth": Target(mmdetection_file, use_checkpoint),
    "last.pt": Target(last_file, use_last),
    "last.pt to the end": Target(last_file, functools.partial(use_last, whole=True)),
    "files of a resumed run": Target(resumed_files, use_resumed_files),
    "recipe.yaml": Target(recipe_tree, use_recipe),
    "--set": Target(recipe_tree, use_set),
    "study.yaml": Target(study_tree, use_study),
    "files of a run": Target(run_files, use_run_files),
    "run.json": Target(run_json, use_run_json),
    "onnx metadata": Target(onnx_metadata, use_metadata),
} | DATA
