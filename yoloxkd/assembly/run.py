"""Build a training run from a resolved recipe."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from yoloxkd.assembly.batch import batch_per_process, check_batch_norm, with_real_batch
from yoloxkd.assembly.models import (
    CheckpointFiles,
    Opened,
    find_weights,
    load_student,
    naming,
    new_detector,
    parse_student,
)
from yoloxkd.assembly.older_checkpoints import current_layout
from yoloxkd.assembly.quantization import check_start, quantized
from yoloxkd.assembly.recipes import check
from yoloxkd.assembly.run_callbacks import ordered_callbacks
from yoloxkd.assembly.same_data import data_of_run, say_changes
from yoloxkd.assembly.teachers import open_teachers
from yoloxkd.config.recipe import Recipe, Student
from yoloxkd.data.data_spec import DataSpec, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.fingerprint import fingerprint
from yoloxkd.data.io.image_caches import with_cache
from yoloxkd.data.loader import eval_loader, train_loader
from yoloxkd.data.sufficiency import refuse_shortage, shortages
from yoloxkd.distributed.comm import local_ranks, rank, rank_and_world_size, world_size
from yoloxkd.engine.callback_list import CallbackList
from yoloxkd.engine.callbacks.first_weights import FirstWeights
from yoloxkd.engine.checkpoint import is_checkpoint, seed_random
from yoloxkd.engine.checkpoint_parts import Saved, read_saved
from yoloxkd.engine.device import choose_device, loader_workers
from yoloxkd.engine.evaluate import TorchPredictor, evaluate
from yoloxkd.engine.events import Callback, State
from yoloxkd.engine.log import RunLog
from yoloxkd.engine.loop import TrainLoader, TrainLoop
from yoloxkd.errors import UserError, nearest_file
from yoloxkd.kd.base import KDConfig, Teacher
from yoloxkd.kd.distillation import Distill
from yoloxkd.kd.rescaled_teacher import RescaledTeacher
from yoloxkd.metrics.measure import check_choice
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.weights.load import load_checkpoint_file
from yoloxkd.types import ImageSize
from yoloxkd.version import __version__

RUNS = Path("runs")
MOST_PIXELS = 1 << 14  # of a side of the input; an image of that size alone takes 3 GB as float32


def check_size(imgsz: ImageSize, stride: int) -> None:
    """Refuse a square input size that is not a multiple of the model's `size_multiple`; others are padded to one."""
    if isinstance(imgsz, tuple):
        if not stride <= imgsz[0] <= imgsz[1] <= MOST_PIXELS:
            raise UserError(
                f"imgsz {imgsz} should be a short side of at least {stride} px and a long side not below it and of at "
                f"most {MOST_PIXELS} px"
            )
        return
    if imgsz > MOST_PIXELS:
        raise UserError(f"--imgsz {imgsz} is more than {MOST_PIXELS} px, which no memory here is meant for")
    if imgsz < stride or imgsz % stride:
        near = max(stride, round(imgsz / stride) * stride)
        raise UserError(f"--imgsz {imgsz} is not a multiple of the model's stride {stride}; the nearest is {near}")


def new_run_folder(recipe: Recipe) -> Path:
    """runs/<student>[-<methods>][-N], the first that does not exist."""
    base = "-".join([recipe.student.name, *recipe.kd])
    number, folder = 1, RUNS / base
    while folder.exists():
        number += 1
        folder = RUNS / f"{base}-{number}"
    return folder


def check_out(out: Path) -> None:
    """Refuse an output folder that already holds a run."""
    if (out / "metrics.json").is_file():
        raise UserError(f"{out} already holds a finished run; give another --out")
    if (out / "last.pt").is_file():
        raise UserError(
            f"{out} already holds an unfinished run; continue it with --resume {out}, or give another --out"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, not a folder")
    nearest_there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(nearest_there, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"--out {out} cannot be written: {nearest_there} is read-only for you; give another --out")


def unfinished_before_restart(out: str | Path | None) -> Path | None:
    """The run that this launch had begun before torchrun restarted its processes; None: nothing to go on with.

    UserError: restarts are allowed, and without --out the restarted processes could not find their run.
    """
    ranks = local_ranks()
    if ranks.max_restarts and out is None:
        raise UserError(
            f"torchrun may restart this run up to {ranks.max_restarts} time(s), and it finds itself by its folder "
            "then: give --out DIR"
        )
    return Path(out) if ranks.restarts and out is not None and (Path(out) / "last.pt").is_file() else None


def newest_run(runs: Path = RUNS) -> Path:
    """best.pt of the newest run under `runs/`."""
    files = sorted(runs.glob("**/best.pt"), key=lambda p: p.stat().st_mtime)
    if not files:
        raise UserError(f"no MODEL given and no run with a best.pt under {runs}/; train one, or name a model")
    return files[-1]


@dataclass(frozen=True, slots=True)
class LastCheckpoint:
    """The last.pt of an unfinished run.

    student  as it was built: weights that it started from may have changed what the recipe says
    raw      what `saved` was parsed from, which the engine restores
    """

    saved: Saved
    student: Student
    raw: dict[str, Any]


def read_resume(path: str, data: str | None = None) -> tuple[Recipe, Path, LastCheckpoint]:
    """(recipe, run folder, checkpoint) of an unfinished run, from its folder or its last.pt.

    data  where the run's data set is now, if it has moved
    """
    file = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"nothing to resume at {path}{nearest_file(path) or f': no {file.name} there'}")
    raw = load_checkpoint_file(file)
    if not is_checkpoint(raw) or raw.get("kind") != "run":
        raise UserError(f"{file} is not the last.pt of a run, so it cannot be resumed")
    raw = current_layout(raw)
    saved = read_saved(raw, file)
    assert saved.run is not None
    assert saved.recipe is not None  # both are checked of a run
    with naming(file):
        recipe, student = check(saved.recipe), parse_student(saved.student)
    done = saved.run.epoch
    if done > recipe.train.epochs:
        raise UserError(
            f"{file} says that {done} of its {recipe.train.epochs} epochs are done; use another copy of the file"
        )
    if (file.parent / "metrics.json").is_file() and (done >= recipe.train.epochs or saved.run.stop):
        raise UserError(f"{file.parent} holds a finished run ({done} epochs); there is nothing to resume")
    recipe = recipe if data is None else recipe.model_copy(update={"data": data})
    return recipe, file.parent, LastCheckpoint(saved, student, raw)


def fetch_weights(recipe: Recipe) -> None:
    """Download what the recipe names and is not on disk yet."""
    for reference in [*recipe.teacher.models, *([recipe.student.weights] if recipe.student.weights else [])]:
        find_weights(reference)


def prepare(
    recipe: Recipe,
    out: Path,
    *,
    resume: LastCheckpoint | None = None,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
    notes: Sequence[str] = (),
    files: CheckpointFiles | None = None,
) -> TrainLoop:
    """Everything a run needs, checked before anything is written. `resume` is of the same recipe (`read_resume`).

    notes  lines for the screen and the log, said first
    files  the command's checkpoints; their memory is given back
    """
    files, console = files or CheckpointFiles(), console or Console()
    say = RunLog(console, out) if rank() == 0 else _say_nothing
    for note in notes:
        say(note)
    device = choose_device(recipe.engine.device)
    seed_random(recipe.train.seed)
    spec = data_of_run(recipe.data, resume.saved if resume else None, out)
    # the student comes first after seeding: its initial weights do not depend on who teaches it
    student = new_detector(resume.student if resume else recipe.student, spec.names)
    check_size(recipe.train.imgsz, student.size_multiple)
    train, val = load_split_for(student, spec, "train", say), load_split_for(student, spec, recipe.val.split, say)
    check_choice(recipe.val.metric, val, student.spec.masks)
    refuse_shortage([*shortages(train, imgsz=recipe.train.imgsz), *shortages(val, imgsz=None)], say)
    prints = {"train": fingerprint(train), recipe.val.split: fingerprint(val)}
    if resume is not None:
        say_changes(resume.saved, prints, say)
    recipe = with_real_batch(recipe, len(train), world_size(), say)
    check_batch_norm(student, recipe, world_size())
    train, val, note = with_cache(train, val, recipe.engine.cache, loader_workers(recipe.engine.workers, device))
    say(f"data {recipe.data}: {train.summary()}; {val.summary()}")
    if note:
        say(note)
    start = _first_weights(student, recipe, files, say) if resume is None else ""
    teachers = open_teachers(recipe.teacher, spec.names, say, files)
    to_int8 = quantized(student, recipe, teachers, None if resume else train, device, say)
    files.clear()
    loader = _loader(recipe, train, [student, *(o.detector for o in teachers)], device)
    state = State(
        recipe=recipe,
        detector=student,
        device=device,
        out=out,
        epochs=recipe.train.epochs,
        iters_per_epoch=len(loader),
        say=say,
        evaluate=_evaluator(recipe, val, device),
        val=val,
        rank=rank(),
        world=world_size(),
        parts=recipe.train.accumulate,
    )
    first = [FirstWeights(start), *distillation(recipe, teachers, say), *to_int8]
    header = _header(recipe, student, prints)
    state.callbacks = CallbackList(ordered_callbacks(recipe, header, first, callbacks, console))
    return TrainLoop(state, loader, resume.raw if resume else None)


def load_split_for(
    detector: Detector[Any, Any], spec: DataSpec, split: str, say: Callable[[str], None]
) -> DetectionData:
    """A split with what the detector trains on: instance masks where it gives some.

    UserError: it cannot be without masks, and the split has none; where it can, that is said.
    """
    data = load_split(spec, split, masks=detector.spec.masks)
    if detector.spec.masks and data.masks is None:
        problem = f"the split '{split}' of {spec.name} has no instance masks"
        if not detector.trains_without_masks:
            raise UserError(f"{problem}, and {detector.family} learns from nothing else; use data with masks")
        say(f"warning: {problem}: {detector.family} is trained and measured on its boxes alone")
    return data


def _loader(
    recipe: Recipe, train: DetectionData, detectors: Sequence[Detector[Any, Any]], device: torch.device
) -> TrainLoader:
    """This process' training batches, of sizes that all detectors take; the first of them is the student."""
    return train_loader(
        train,
        imgsz=recipe.train.imgsz,
        batch=batch_per_process(recipe.train.batch, world_size(), recipe.train.accumulate, len(train)),
        augment=recipe.augment,
        seed=recipe.train.seed,
        multiple=math.lcm(*(d.size_multiple for d in detectors)),
        workers=loader_workers(recipe.engine.workers, device),
        pad_value=detectors[0].spec.input.pad_value,
        pin_memory=device.type == "cuda",
        rank=rank(),
        world=world_size(),
        masks=detectors[0].spec.masks,
    )


def _first_weights(
    student: Detector[Any, Any], recipe: Recipe, files: CheckpointFiles, say: Callable[[str], None]
) -> str:
    """Give the student of a new run its weights; what is said of its backbone, where it starts without a checkpoint."""
    if recipe.student.weights:
        report = load_student(student, recipe.student.weights, files)
        say(f"student weights from {recipe.student.weights}: {report.describe()}")
        check_start(recipe, report, files, say)
        return ""
    if start := student.pretrain():
        say(start)
    return start or ""


def _say_nothing(line: str) -> None:
    """What processes other than rank zero say."""


def _header(recipe: Recipe, student: Detector[Any, Any], prints: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the student in its checkpoints, and by `prints` the data it was trained on."""
    return {
        "version": __version__,
        "student": {"name": recipe.student.name} | student.cfg.model_dump(by_alias=True) | {"family": student.family},
        "names": list(student.names),
        "imgsz": recipe.train.imgsz,
        "data": dict(prints),
        **({} if recipe.quantize.kind == "off" else {"quantize": recipe.quantize.model_dump()}),
        "recipe": recipe.model_dump(by_alias=True, mode="json"),
    }


def distillation(recipe: Recipe, teachers: Sequence[Opened], say: Callable[[str], None]) -> list[Callback]:
    """The callback that distils, where the recipe asks for it."""
    if not teachers:
        return []
    if not recipe.kd:
        say("note: a teacher is given but --kd none trains without it")
        return []
    for opened in teachers:
        if not opened.report.complete:
            say(f"warning: teacher {opened.weights.path}: {opened.report.describe()}")
    section = recipe.teacher

    def at_scale(detector: Detector[Any, Any]) -> Detector[Any, Any]:
        return detector if section.scale == 1 else RescaledTeacher(detector, section.scale)

    return [
        Distill(
            [
                Teacher(at_scale(o.detector), str(o.weights.path), o.weights.digest, o.report.share, weight)
                for o, weight in zip(teachers, section.weight or [1.0] * len(teachers), strict=True)
            ],
            cast("dict[str, KDConfig]", recipe.kd),  # parsed by the methods' own Configs
            min_ap=section.min_ap,
            gate_images=section.gate_images,
            nominal_size=recipe.train.imgsz if isinstance(recipe.train.imgsz, int) else None,
        )
    ]


def _evaluator(
    recipe: Recipe, val: DetectionData, device: torch.device
) -> Callable[[Detector[Any, Any], int | None], dict[str, Any]]:
    """evaluate(model, n): metrics of a model on the first n validation images, or on all, then with the error types."""

    def run(model: Detector[Any, Any], limit: int | None) -> dict[str, Any]:
        data = val if limit is None else val.head(limit)
        loader = eval_loader(
            data,
            imgsz=recipe.train.imgsz,
            batch=max(1, recipe.train.batch // recipe.train.accumulate // rank_and_world_size()[1]),
            rect=recipe.val.rect,
            multiple=model.size_multiple,
            workers=loader_workers(recipe.engine.workers, device),
            pad_value=model.spec.input.pad_value,
            pin_memory=device.type == "cuda",
            rank=rank_and_world_size()[0],
            world=rank_and_world_size()[1],
        )
        v = recipe.val
        predictor = TorchPredictor(model, conf=v.conf, iou=v.iou, max_det=v.max_det, device=device)
        errors = limit is None and v.backend == "hotcoco"
        return evaluate(predictor, loader, data, backend=v.backend, errors=errors).metrics

    return run
