"""`Trainer`: a training run in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from yoloxkd.api.keywords import known_keywords
from yoloxkd.assembly.arguments import device_name, references
from yoloxkd.assembly.autobatch import with_measured_batch
from yoloxkd.assembly.models import CheckpointFiles
from yoloxkd.assembly.recipes import resolve
from yoloxkd.assembly.run import (
    LastCheckpoint,
    check_out,
    fetch_weights,
    new_run_folder,
    prepare,
    read_resume,
    unfinished_before_restart,
)
from yoloxkd.assembly.run_callbacks import check_objects
from yoloxkd.assembly.run_lock import claimed
from yoloxkd.assembly.run_paths import check_run_paths, check_teachers
from yoloxkd.data.worker_death import refuse_while_starting
from yoloxkd.distributed import comm
from yoloxkd.distributed.ranks import rank
from yoloxkd.engine.device import choose_device
from yoloxkd.engine.events import Callback
from yoloxkd.errors import UserError
from yoloxkd.types import ImageSize


@dataclass(frozen=True)
class FitResult:
    """What a finished run leaves.

    Attributes:
        metrics: of its best student, under the keys of `metrics.json`.
        best: that student's checkpoint.
        out: the run's folder.
    """

    metrics: dict[str, Any]
    best: Path
    out: Path


class Trainer:
    """One training run: checked when constructed, trained by `fit()`. Keyword names are those of the command line.

    In a script that torchrun has started, construct it in every process.

    Args:
        student: architecture name, or checkpoint to start from.
        teacher: name (its published weights) or checkpoint; one or several.
        kd: distillation method, `METHOD@SET` for a set of defaults; one or several. None: `pgd` where there is a teacher.
        data: data YAML, the name of a shipped one, or `shapes`.
        epochs: epochs.
        batch: images a step over all devices, or `auto`: as many as fit.
        imgsz: input size in px: a square side, or (short side, long side).
        device: `cpu`, `cuda`, a CUDA index, a `torch.device`. None: CUDA if there is one.
        amp: `off`, `bf16`, `fp16` or `auto`. None: auto, which is bf16 or fp16 on CUDA, off on the CPU.
        seed: of initial weights, sample order and augmentation.
        deterministic: the same result every time on CUDA too.
        workers: loader processes. None: by the cores beside a GPU, at most 12; beside a CPU 2.
        quantize: `int8`: round the convolutions of a trained student as its int8 file will be rounded, in a short schedule
            (`cfg/quantize.yaml`) over the recipe beside its checkpoint. None: as the recipe says, which is off.
        out: run folder. None: a new one under `runs/`.
        recipe: recipe name or file. None: the student's own.
        resume: folder or `last.pt` of an interrupted run; beside it only `data`, where the data set has moved.
        set: further recipe keys, `{"kd.alpha": 0.1}` or `["kd.alpha=0.1"]`.
        callbacks: objects with the methods of `yoloxkd.Callback`.
        console: a rich console for what the screen shows.

    Attributes:
        recipe: the resolved recipe.
        out: the run's folder.

    Raises:
        UserError: an argument cannot be used; nothing has been written then.

    Example:
        >>> fit = Trainer(student="yolox-nano", teacher="teacher.pt", kd="pgd", data="my.yaml", epochs=2).fit()
        >>> ap, file = fit.metrics["AP"], fit.best
    """

    @known_keywords
    def __init__(
        self,
        student: str | None = None,
        teacher: str | Sequence[str] | None = None,
        kd: str | Sequence[str] | None = None,
        data: str | None = None,
        epochs: int | None = None,
        batch: int | str | None = None,
        imgsz: ImageSize | None = None,
        device: str | int | torch.device | None = None,
        amp: str | None = None,
        seed: int | None = None,
        deterministic: bool | None = None,
        workers: int | None = None,
        quantize: str | None = None,
        out: str | Path | None = None,
        recipe: str | None = None,
        resume: str | Path | None = None,
        set: Mapping[str, Any] | Sequence[str] = (),
        callbacks: Sequence[Callback] = (),
        console: Console | None = None,
    ) -> None:
        options = {
            "data": data, "epochs": epochs, "batch": batch, "imgsz": imgsz,
            "device": None if device is None else device_name(device), "amp": amp, "seed": seed,
            "deterministic": deterministic, "workers": workers, "quantize": quantize,
        }  # fmt: skip
        refuse_while_starting()
        self.callbacks, self.console = check_objects(callbacks), console
        references(student=student, teacher=teacher, kd=kd, data=data, out=out, recipe=recipe, resume=resume)
        comm.init_process_group()
        self._checkpoint: LastCheckpoint | None = None
        self._files = CheckpointFiles()
        self._notes: list[str] = []
        self._next_folder: Callable[[], Path] | None = None
        with comm.peer_errors(), comm.all_or_none():
            if resume is not None:
                alone = options | {"data": None, "student": student, "teacher": teacher, "kd": kd}
                _alone_with_resume(**alone, recipe=recipe, out=out, set=set or None)
                self.recipe, self.out, self._checkpoint = read_resume(str(resume), data)
            elif (unfinished := unfinished_before_restart(out)) is not None:
                self.recipe, self.out, self._checkpoint = read_resume(str(unfinished))
                self._notes.append(f"restarted by torchrun: the run in {unfinished} goes on from its last checkpoint")
            else:
                self.recipe = resolve(
                    student=student, teacher=_list(teacher) or (), kd=_list(kd), recipe=recipe, sets=set,
                    files=self._files, **options,
                )  # fmt: skip
                self._choose_folder(out, recipe)
            choose_device(self.recipe.engine.device)
        self.out = Path(comm.broadcast(str(self.out)))
        run = self._checkpoint.saved.run if self._checkpoint else None
        comm.check_alike(
            (run and run.epoch, run and run.step_in_epoch, repr(self.recipe)),
            f"the processes do not find the same run in {self.out}: that folder must be on storage that all machines share",
        )

    def _choose_folder(self, out: str | Path | None, recipe: str | None) -> None:
        """The folder of a new run. UserError: it, or what would be written there, stands in the way of something."""
        self.out = Path(out) if out is not None else new_run_folder(self.recipe)
        if out is None:  # another training may take the name before this one starts
            self._next_folder = partial(new_run_folder, self.recipe)
        check_out(self.out)
        check_run_paths(self.recipe, self.out, [recipe])
        self._notes += check_teachers(self.recipe)

    def fit(self) -> FitResult:
        """Train until the last epoch is done and `metrics.json` is written.

        Returns:
            Metrics, the best student's checkpoint, and the run's folder.

        Raises:
            GateError: the teacher, a loss or the weights failed a check; `last.pt` is kept.
            Interrupted: the run was asked to stop; it can be resumed.
            UserError: the machine or the data failed.

        Example:
            >>> folder = Trainer(student="yolox-nano", data="my.yaml", epochs=1).fit().out
        """
        with comm.peer_errors(), ExitStack() as stack:
            with comm.all_or_none():
                if rank() == 0:
                    self.out = stack.enter_context(claimed(self.out, self._next_folder))
            self.out = Path(comm.broadcast(str(self.out)))
            with comm.all_or_none(), comm.local_main_first():
                fetch_weights(self.recipe)
            if self.recipe.train.measure_batch:
                self.recipe, reason = with_measured_batch(self.recipe, self._files)
                self._notes.append(reason)
            with comm.all_or_none():
                loop = prepare(
                    self.recipe,
                    self.out,
                    resume=self._checkpoint,
                    callbacks=self.callbacks,
                    console=self.console,
                    notes=self._notes,
                    files=self._files,
                )
            best = loop.run().best
            assert best is not None  # of every finished run
            metrics = comm.broadcast(dict(best.metrics))  # not before rank zero has written it
        return FitResult(metrics, self.out / "best.pt", self.out)


def _alone_with_resume(**arguments: object) -> None:
    """UserError: something else is given beside `resume`."""
    if clash := [name for name, value in arguments.items() if value is not None]:
        raise UserError(f"--resume continues a run as it was started; leave out --{', --'.join(clash)}")


def _list(value: str | Sequence[str] | None) -> list[str] | None:
    return None if value is None else [value] if isinstance(value, str) else list(value)
