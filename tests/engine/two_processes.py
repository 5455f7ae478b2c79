"""What `test_distributed.py` asks of two processes that work together, and of one by itself."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from tests.conftest import TINY
from tests.engine.test_step import batch as step_batch
from tests.engine.test_step import family as build
from yoloxkd import Detector, Trainer
from yoloxkd.assembly.recipes import resolve
from yoloxkd.assembly.run import prepare
from yoloxkd.distributed import comm
from yoloxkd.engine.events import Callback, State
from yoloxkd.engine.parallel import gradients, wrapped
from yoloxkd.engine.step import TrainStep
from yoloxkd.errors import Interrupted, UserError
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.types import Batch, Draw

FAMILIES = {
    "yolox": ("fgd", "pgd", "cwd", "mgd"),
    "fcos": ("fgd", "pgd"),
    "atss": ("pgd", "cwd"),
    "gfl": ("ld", "pgd", "mgd"),
    "retinanet": ("cwd",),
    "autoassign": ("pgd",),
    "ddod": ("cwd",),
    "reppoints": ("cwd",),
}
EPOCHS = 2
RUN: dict[str, Any] = {
    "student": "yolox-nano",
    "kd": ["pgd", "fgd", "mgd"],
    "epochs": EPOCHS,
    "batch": 4,
    "imgsz": 64,
    "device": "cpu",
    "console": Console(quiet=True),
}
SETTINGS = TINY | {"student.width": 0.25, "kd.pgd.weight": "auto", "kd.pgd.auto_iterations": 3, "optim.clip_norm": 35}


def freeze(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()


class Frozen(Callback):
    """Batch norms keep their statistics, so that an image does not depend on the others of its batch."""

    everywhere = True

    def on_epoch_start(self, state: State) -> None:
        freeze(state.detector)


class Fingerprint(Callback):
    """Everything that should be equal in all processes, after every epoch."""

    everywhere = True

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_epoch_end(self, state: State) -> None:
        found = hashlib.sha256()
        for module in (state.detector, state.aux, state.ema.module):
            for value in module.state_dict().values():
                found.update(value.contiguous().numpy().tobytes())
        found.update(repr((state.epoch_losses, state.metrics, state.lr)).encode())
        self.seen.append(found.hexdigest())


class Interrupt(Callback):
    """SIGTERM reaches one process only."""

    everywhere = True

    def __init__(self, process: int, iteration: int) -> None:
        self.process, self.iteration = process, iteration

    def on_step(self, state: State) -> None:
        if state.rank == self.process and state.iteration == self.iteration:
            signal.raise_signal(signal.SIGTERM)


def scenes() -> Batch:
    """Four images, one of them without a box, one with a single one."""
    whole = step_batch(4)
    whole.targets.boxes += torch.tensor([0.0, 3.0, 5.0, 0.0])[:, None, None] * whole.targets.mask[..., None]
    whole.targets.boxes = whole.targets.boxes.double()
    whole.targets.mask[1, 1] = False
    return whole


def family_gradients(family: str, parts: int) -> dict[str, Tensor]:
    """Losses and gradients of one step, of every trainable part of student and distillers, in float64."""
    student, teacher = build(family)
    plan = Pairing.between(student, teacher)
    keys: dict[str, Any] = {"ld": {"delta": 1.0}}
    methods = {n: DISTILLERS[n](DISTILLERS[n].Config(**keys.get(n, {})), plan) for n in FAMILIES[family]}
    student.final_phase(True)
    step = TrainStep(student, nn.ModuleDict({"kd": TeacherLosses(teacher.double(), methods)})).train().double()
    freeze(step)
    mine = scenes().part(*comm.rank_and_world_size())
    losses = gradients(
        wrapped(step),
        [mine.part(i, parts) for i in range(parts)],
        Draw(3),
        lambda loss: loss.backward(),
        lambda i, terms: terms,
    )
    found = {f"loss {name}": value for name, value in losses.items()}
    found |= {n: b.double() for n, b in step.named_buffers() if n.endswith("positives.counts")}
    return found | {f"grad {n}": p.grad.clone() for n, p in step.named_parameters() if p.grad is not None}


def run(out: Path, toy: str, teacher: str, *callbacks: Callback, **settings: Any) -> None:
    keys = RUN | {"set": SETTINGS | settings}
    Trainer(**keys, data=toy, teacher=teacher, out=out, callbacks=callbacks).fit()


def evaluations(toy: str, teacher: str, out: Path) -> list[dict[str, Any]]:
    """Metrics of one model on 5 images and on 3, in pieces that do not come out even."""
    recipe = resolve(student="yolox-nano", data=toy, batch=2, imgsz=64, device="cpu", sets=TINY)
    state = prepare(recipe, out, console=Console(quiet=True)).state
    model = Detector(teacher, "cpu").network
    found = [state.evaluate(model, None), state.evaluate(model, 3)]
    with comm.single_process():
        found.append(state.evaluate(model, None))
    return found


def agreement() -> list[str]:
    """What the processes say when one of them fails, and when all do."""
    said: list[str] = []
    for bad in (lambda: comm.rank() == 1, lambda: True):
        try:
            with comm.all_or_none(), comm.local_main_first():
                if bad():
                    raise UserError("no such file")
        except UserError as error:
            said.append(f"{error} agreed={error.agreed}")
    try:
        Trainer(**RUN | {"batch": 5, "kd": None}, data="shapes", set=TINY, out="unused").fit()
    except UserError as error:
        said.append(str(error))
    return said


def work(rank: int, port: int, folder: str, toy: str, teacher: str) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    comm.init_process_group()
    here = Path(folder)
    found: dict[str, Any] = {}
    for family in FAMILIES:
        for parts in (1, 2):
            found[f"{family}/{parts}"] = family_gradients(family, parts)
    found["agreement"] = agreement()
    found["evaluations"] = evaluations(toy, teacher, here / "unused")
    run(here / "two", toy, teacher, Frozen())
    run(here / "parts", toy, teacher, Frozen(), **{"train.accumulate": 2})
    same = Fingerprint()
    run(here / "norms", toy, teacher, same)
    found["fingerprints"] = same.seen
    try:
        run(here / "again", toy, teacher, Interrupt(1, 8))
    except Interrupted as error:
        found["interrupted"] = str(error)
    found["unfinished"] = (here / "again" / "last.pt").is_file()
    Trainer(resume=here / "again", console=Console(quiet=True)).fit()
    torch.save(found, here / f"{rank}.pt")
