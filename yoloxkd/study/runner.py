"""Run a study: one process a run, resumed where interrupted, skipped when done."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from yoloxkd.assembly.models import Weights, new_detector, open_model, read_weights
from yoloxkd.config.load import write_yaml
from yoloxkd.data.data_spec import DataSpec, find_data
from yoloxkd.engine.atomic import write_text
from yoloxkd.engine.checkpoint import save_checkpoint
from yoloxkd.errors import GateError, Interrupted, UserError
from yoloxkd.study.definition import UNTRAINED, Definition
from yoloxkd.study.files import CostFile, ReportedFile, RunFile, read_file
from yoloxkd.study.kept_runs import Record, check_record, folder_of, keep, read_records, refuse_record
from yoloxkd.study.origins import AtHand, begun_differences, local_data, measurable, read_settings, weights_digest
from yoloxkd.study.plan import UNTRAINED_FILE, Key, Run, differences, keys
from yoloxkd.study.processes import Cost, Processes, lock_folder

Say = Callable[[str], None]
INTERRUPTED = Interrupted.exit_code


class Runner:
    """Brings every run of a plan to its record.

    results    folder of kept results; what it already knows is not run again
    grids      titles of the grids whose runs are to be done; None: all
    jobs       runs side by side
    on_record  called after every finished run with all records so far
    """

    def __init__(
        self,
        study: Definition,
        runs: Mapping[Key, Run],
        out: Path,
        results: Path,
        *,
        grids: Collection[str] | None = None,
        jobs: int = 1,
        say: Say = print,
        on_record: Callable[[dict[Key, Record]], object] | None = None,
    ) -> None:
        self.study, self.runs, self.out, self.results, self.jobs = study, dict(runs), out, results, jobs
        self.say, self.on_record = say, on_record
        self.keys_of_grids = set(keys(study, grids))
        self.here = AtHand()
        self.records = valid_records(study, runs, results, self.here)
        self.failed: dict[Key, str] = {}
        self.processes = Processes(_environment(jobs))
        self._untrained = threading.Lock()

    def missing(self) -> list[Run]:
        """Runs to do, in their order: those without a record, and those whose best.pt another one learns from.

        A teacher is neither trained nor measured when no run needs it any more.
        """
        todo = self.keys_of_grids - self.records.keys()
        for run in [self.runs[key] for key in todo]:
            for need in run.taught_by:
                unmeasured, trains = need.key not in self.records, not measurable(run)
                if (unmeasured and (trains or measurable(need))) or (trains and not _can_teach(need)):
                    todo.add(need.key)
        return [run for key, run in self.runs.items() if key in todo]

    def check_data(self, *, if_here: bool = False) -> None:
        """Refuse a data set without a split that the study needs. UserError, also where it is not found.

        if_here  a data set that is not on this machine is not looked at
        """
        for data, choose in {(run.like.data, run.like.val.split): None for run in self.runs.values()}:
            spec = local_data(data) if if_here else find_data(data)
            if spec is not None:
                _check_splits(spec, choose, self.study)

    def collect(self) -> dict[Key, Record]:
        """Keep what is finished in the study's folder and not kept yet; run nothing."""
        for key, run in self.runs.items():
            if key not in self.records and measurable(run) and (run.folder / "test.json").is_file():
                self._check_begun(run)
                if self._measured(run):
                    self.records[key] = keep(run, self.study.name, self.results, self.study.report)
        return self.records

    def run(self) -> dict[Key, Record]:
        """Do what is missing. Interrupted: a signal came, everything is saved; GateError: some runs failed."""
        todo = {run.key: run for run in self.missing()}
        self.say(f"study {self.study.name}: {len(self.runs)} runs, {len(todo)} of them to do")
        if not todo:
            return self.records
        self.check_data()
        for run in todo.values():
            self._check_begun(run)
        with lock_folder(self.out) as lock, self.processes.forwarding(), ThreadPoolExecutor(self.jobs) as pool:
            self._dispatch(pool, todo, lock)
        if self.processes.stopped_by is not None:
            name = signal.Signals(self.processes.stopped_by).name
            raise Interrupted(f"stopped by {name}; the same command goes on where it stopped")
        if self.failed:
            listed = "; ".join(f"{key.path}: {why}" for key, why in self.failed.items())
            raise GateError(f"{len(self.failed)} of {len(todo)} runs failed: {listed}")
        return self.records

    def _dispatch(self, pool: ThreadPoolExecutor, todo: dict[Key, Run], lock: int) -> None:
        waiting, under_way, done = dict(todo), dict[Future[Record], Key](), 0
        while waiting or under_way:
            for key in list(waiting):
                run = waiting[key]
                broken = [need for need in run.needs if need in self.failed]
                if broken:
                    self.failed[key] = f"it needs {broken[0].path}, which failed"
                    del waiting[key]
                elif len(under_way) < self.jobs and not self._blocked(run, waiting, under_way):
                    under_way[pool.submit(self._one, run, lock)] = key
                    del waiting[key]
            finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in finished:
                key = under_way.pop(future)
                try:
                    record = future.result()
                except Interrupted:
                    waiting.clear()
                    self.processes.stop(self.processes.stopped_by or signal.SIGINT)
                    continue
                except UserError as error:
                    self.failed[key] = str(error)
                    self.say(f"{key.path} failed: {error}")
                    continue
                done += 1
                self.records[key] = record
                self.say(f"[{done}/{len(todo)}] {describe(record)}")
                if self.on_record is not None:
                    self.on_record(self.records)

    def _blocked(self, run: Run, waiting: Mapping[Key, Run], under_way: Mapping[Future[Record], Key]) -> bool:
        pending = {*waiting, *under_way.values()}
        return any(need in pending for need in run.needs)

    def _one(self, run: Run, lock: int) -> Record:
        """Train (or go on training) a run, measure its best student, and keep both."""
        log = self.out / "logs" / f"{run.key.path}.log"
        if not measurable(run) and run.recipe is not None:
            self._set_aside(run)
            if run.teacher == UNTRAINED:
                self._make_untrained(run)
            cost = self.processes.run(self._training(run), log, [lock])
            _add_cost(run.folder, cost)
            self._require(cost, log, "training")
        if not self._measured(run):
            run.folder.mkdir(parents=True, exist_ok=True)
            self._require(self.processes.run(self._measuring(run), log, [lock]), log, "measuring")
            self._note_measured(run)
        return keep(run, self.study.name, self.results, self.study.report)

    def _measured(self, run: Run) -> bool:
        """Whether test.json is of the reported split and data, and of the weights that are there."""
        file = run.folder / "test.json"
        if not file.is_file():
            return False
        test = read_file(ReportedFile, file)
        noted = [test.weights_digest] if run.recipe is None else [test.weights_digest or weights_digest(run.best)]
        same_data = test.split_digest is None or self.here.same_data(
            run.like.data, self.study.report, test.split_digest
        )
        return test.split == self.study.report and same_data and weights_digest(run.best) in noted

    def _note_measured(self, run: Run) -> None:
        """Add to test.json the digests of what was measured on what."""
        file = run.folder / "test.json"
        about = read_file(ReportedFile, file).model_dump(exclude_unset=True)
        digest = self.here.data(run.like.data, self.study.report)
        about |= {"weights_digest": weights_digest(run.best), "split_digest": digest}
        write_text(file, json.dumps(about, indent=2) + "\n")

    def _set_aside(self, run: Run) -> None:
        """Rename the folder of a training that is over and whose best.pt is gone: it is trained anew in its place."""
        if not (run.folder / "metrics.json").is_file():
            return
        number, old = 1, run.folder.with_name(f"{run.folder.name}.previous")
        while old.exists():
            number += 1
            old = run.folder.with_name(f"{run.folder.name}.previous-{number}")
        run.folder.rename(old)
        self.say(f"{run.key.path} has no best.pt any more and is trained again; what was left of it is in {old}")

    def _check_begun(self, run: Run) -> None:
        """Refuse to go on with a run that was begun with other settings, or from other data, weights or teachers."""
        if run.recipe is None or self._is_kept(run):
            return
        mismatches = differences(read_settings(run), run.settings) + begun_differences(run, self.here)
        if mismatches:
            raise UserError(
                f"{run.folder} holds a run that was begun with other settings ({'; '.join(mismatches[:3])}); remove the "
                "folder to run it anew, or give another --out"
            )

    def _is_kept(self, run: Run) -> bool:
        """Whether the run that is here is the one whose record is kept, which was compared with the study already."""
        file = folder_of(self.results, self.study.name, run.key) / "run.json"
        return measurable(run) and file.is_file() and read_file(RunFile, file).weights == weights_digest(run.best)

    def _require(self, cost: Cost, log: Path, what: str) -> None:
        if cost.status == 0:
            return
        if cost.status == INTERRUPTED or self.processes.stopped_by is not None:
            raise Interrupted(f"{what} was stopped")
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise GateError(f"{what} ended with status {cost.status} ({last[-1] if last else 'no output'}); see {log}")

    def _training(self, run: Run) -> list[str]:
        assert run.recipe is not None
        if (run.folder / "last.pt").is_file():
            return [*_program(), "train", "--data", run.recipe.data, "--resume", str(run.folder)]
        recipe = self.out / "recipes" / f"{run.key.path}.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_text(recipe, write_yaml(run.recipe.model_dump(by_alias=True, mode="json")))
        return [*_program(), "train", "--recipe", str(recipe), "--out", str(run.folder)]

    def _measuring(self, run: Run) -> list[str]:
        like = run.like
        options: list[Any] = ["--data", like.data, "--split", self.study.report]
        if isinstance(like.train.imgsz, int):  # else the checkpoint's own
            options += ["--imgsz", like.train.imgsz]
        options += ["--batch", like.train.batch, "--device", like.engine.device]
        if like.engine.workers != "auto":
            options += ["--workers", like.engine.workers]
        for key in ("conf", "iou", "max_det", "backend"):
            options += ["--set", f"val.{key}={getattr(like.val, key)}"]
        return [*_program(), "val", run.best, "--errors", *map(str, options), "--json", str(run.folder / "test.json")]

    def _make_untrained(self, run: Run) -> None:
        """A checkpoint of the teacher's architecture with the random weights of a seed that no run has.

        One that is there stays, unless it is of another architecture, of other classes or for another input size.
        """
        path = self.out / UNTRAINED_FILE
        with self._untrained:
            opened = open_model(run.taught_by[0].best)
            section, names, imgsz = opened.weights.section, list(opened.detector.names), opened.weights.imgsz
            if path.is_file():
                there = _weights_or_none(path)
                if there is not None and (there.section, there.names, there.imgsz) == (section, names, imgsz):
                    return
                self.say(f"{path} is of another teacher and is made anew")
            torch.manual_seed(2**31 - 1)
            detector = new_detector(opened.student, names)
            header = {"kind": "student", "student": section, "names": names, "imgsz": imgsz}
            save_checkpoint(header | {"model": detector.state_dict()}, path)


def _check_splits(spec: DataSpec, choose: str, study: Definition) -> None:
    instead = f"or report the split that chooses: 'report: {choose}' with 'screening: true'"
    needed = {
        "train": "trains on; give data that has it",
        choose: "chooses the best epochs by; give data that has it, or name another one under 'choose'",
        study.report: "reports; give data that has it" + ("" if study.screening else f", {instead}"),
    }
    for split, use in needed.items():
        if split not in spec.splits:
            raise UserError(
                f"the data set {spec.name} has {', '.join(spec.splits)} and no '{split}', which study {study.name} {use}"
            )


def _weights_or_none(path: Path) -> Weights | None:
    try:
        return read_weights(str(path))
    except UserError:
        return None


def _can_teach(run: Run) -> bool:
    """Whether others can learn from a run: its best.pt is there, and not of a training under way.

    A teacher that comes as a file is opened by those who learn from it.
    """
    under_way = (run.folder / "last.pt").is_file() and not (run.folder / "metrics.json").is_file()
    return run.recipe is None or (Path(run.best).is_file() and not under_way)


def valid_records(
    study: Definition, runs: Mapping[Key, Run], results: Path, here: AtHand | None = None
) -> dict[Key, Record]:
    """The records that a results' folder has of the planned runs, without those that can be measured on the reported split.

    UserError: one was made with other settings, or measured on another split and its run is not here to be measured again.
    """
    recorded = read_records(results, study.name)
    out = {key: recorded[key] for key in runs if key in recorded}
    here = here or AtHand()
    for key, record in list(out.items()):
        check_record(runs[key], record, results, here)
        if record.split not in (None, study.report):
            if not measurable(runs[key]):
                refuse_record(runs[key], [f"reported on '{record.split}' instead of '{study.report}'"], results)
            del out[key]
    return out


def describe(record: Record) -> str:
    """One line about a finished run."""
    cpu = "" if record.cpu_seconds is None else f", {record.cpu_seconds:.0f} s of processor time"
    return (
        f"{record.key.path}: AP {record.metrics['AP']:.4f} AP50 {record.metrics['AP50']:.4f} "
        f"in {record.seconds:.0f} s{cpu}"
    )


def _add_cost(folder: Path, cost: Cost) -> None:
    """Sum up over the interruptions of a run what its training cost."""
    path = folder / "cost.json"
    before = read_file(CostFile, path) if path.is_file() else CostFile()
    total = {"wall": before.wall + cost.wall, "cpu": before.cpu + cost.cpu, "parts": before.parts + 1}
    if folder.is_dir():
        write_text(path, json.dumps(total) + "\n")


def _program() -> list[str]:
    return [sys.executable, "-m", "yoloxkd"]


def _environment(jobs: int) -> dict[str, str]:
    """This program's own, with the processors shared out among the jobs unless the user has done so."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    return {"OMP_NUM_THREADS": threads} | dict(os.environ)
