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

from yoloxkd.assembly.models import new_detector, open_model
from yoloxkd.config.load import write_yaml
from yoloxkd.engine.atomic import write_text
from yoloxkd.engine.checkpoint import save_checkpoint
from yoloxkd.errors import GateError, Interrupted, UserError
from yoloxkd.study.definition import UNTRAINED, Definition
from yoloxkd.study.files import CostFile, read_file
from yoloxkd.study.kept_runs import Record, check_record, keep, read_records
from yoloxkd.study.plan import UNTRAINED_FILE, Key, Run, differences, keys, read_settings
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
        self.records = valid_records(study, runs, results)
        self.failed: dict[Key, str] = {}
        self.processes = Processes(_environment(jobs))
        self._untrained = threading.Lock()

    def missing(self) -> list[Run]:
        """Runs to do, in their order: those without a record, and those whose best.pt another one learns from.

        A teacher is neither trained nor measured when no run needs it any more.
        """
        todo = self.keys_of_grids - self.records.keys()
        for key in list(todo):
            for need in self.runs[key].needs:
                if need not in self.records or not self._here(need):
                    todo.add(need)
        return [run for key, run in self.runs.items() if key in todo]

    def _here(self, key: Key) -> bool:
        """Whether others can learn from a run; a teacher that comes as a file is opened by those who do."""
        return self.runs[key].recipe is None or Path(self.runs[key].best).is_file()

    def collect(self) -> dict[Key, Record]:
        """Keep what is finished in the study's folder and not kept yet; run nothing."""
        for key, run in self.runs.items():
            whole = run.recipe is None or (run.folder / "metrics.json").is_file()
            if key not in self.records and whole and (run.folder / "test.json").is_file():
                _check_begun(run)
                self.records[key] = keep(run, self.study.name, self.results, self.study.report)
        return self.records

    def run(self) -> dict[Key, Record]:
        """Do what is missing. Interrupted: a signal came, everything is saved; GateError: some runs failed."""
        todo = {run.key: run for run in self.missing()}
        self.say(f"study {self.study.name}: {len(self.runs)} runs, {len(todo)} of them to do")
        if not todo:
            return self.records
        for run in todo.values():
            _check_begun(run)
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
        if run.teacher == UNTRAINED:
            self._make_untrained(run)
        if run.recipe is not None and not (run.folder / "metrics.json").is_file():
            cost = self.processes.run(self._training(run), log, [lock])
            _add_cost(run.folder, cost)
            self._require(cost, log, "training")
        if not (run.folder / "test.json").is_file():
            run.folder.mkdir(parents=True, exist_ok=True)
            self._require(self.processes.run(self._measuring(run), log, [lock]), log, "measuring")
        return keep(run, self.study.name, self.results, self.study.report)

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
            return [*_program(), "train", "--resume", str(run.folder)]
        recipe = self.out / "recipes" / f"{run.key.path}.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_text(recipe, write_yaml(run.recipe.model_dump(by_alias=True, mode="json")))
        return [*_program(), "train", "--recipe", str(recipe), "--out", str(run.folder)]

    def _measuring(self, run: Run) -> list[str]:
        like = run.recipe or next(other.recipe for other in self.runs.values() if other.recipe is not None)
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
        """A checkpoint of the teacher's architecture with the random weights of a seed that no run has."""
        path = self.out / UNTRAINED_FILE
        with self._untrained:
            if path.is_file():
                return
            opened = open_model(self.runs[run.needs[0]].best)
            torch.manual_seed(2**31 - 1)
            detector = new_detector(opened.student, opened.detector.names)
            header = {"kind": "student", "student": opened.weights.section, "names": opened.detector.names}
            save_checkpoint(header | {"imgsz": opened.weights.imgsz, "model": detector.state_dict()}, path)


def valid_records(study: Definition, runs: Mapping[Key, Run], results: Path) -> dict[Key, Record]:
    """The records that a results' folder has of the planned runs. UserError: one was made with other settings."""
    recorded = read_records(results, study.name)
    out = {key: recorded[key] for key in runs if key in recorded}
    for key, record in out.items():
        check_record(runs[key], record, study.name, results)
    return out


def describe(record: Record) -> str:
    """One line about a finished run."""
    cpu = "" if record.cpu_seconds is None else f", {record.cpu_seconds:.0f} s of processor time"
    return (
        f"{record.key.path}: AP {record.metrics['AP']:.4f} AP50 {record.metrics['AP50']:.4f} "
        f"in {record.seconds:.0f} s{cpu}"
    )


def _check_begun(run: Run) -> None:
    """Refuse to go on with a run that was begun with other settings."""
    if run.recipe is None or not (run.folder / "recipe.yaml").is_file():
        return
    mismatches = differences(read_settings(run.folder), run.settings)
    if mismatches:
        raise UserError(
            f"{run.folder} holds a run that was begun with other settings ({'; '.join(mismatches[:3])}); remove the "
            "folder to run it anew, or give another --out"
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
