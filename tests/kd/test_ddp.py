"""Under DistributedDataParallel every distilled gradient is the mean over processes, adapters included."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.kd.fakes import TinyDetector, make_batch, make_state, tiny_yolox
from tests.losses import means
from yoloxkd.engine.parallel import gradients as parallel_gradients
from yoloxkd.engine.parallel import wrapped
from yoloxkd.engine.step import TrainStep
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Teacher
from yoloxkd.kd.defaults import kd_defaults
from yoloxkd.kd.distillation import Distill
from yoloxkd.kd.methods.fgd import FGD, FGDConfig
from yoloxkd.kd.methods.pgd import PGD, PGDConfig
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.types import Batch, Draw, LossName


def build() -> TrainStep:
    torch.manual_seed(0)
    student, teacher = TinyDetector(4).eval(), TinyDetector(6)
    plan = Pairing.between(student, teacher)
    methods = {"fgd": FGD(FGDConfig(stop_epoch=1), plan), "pgd": PGD(PGDConfig(), plan)}
    return TrainStep(student, nn.ModuleDict({"kd": TeacherLosses(teacher, methods)}))


def gradients(step: nn.Module, plain: TrainStep, seed: int) -> dict[str, Tensor]:
    torch.stack([*means(step(make_batch(seed=seed))).values()]).sum().backward()
    return {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}


def work(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    plain = build()
    step = nn.parallel.DistributedDataParallel(plain)
    first = gradients(step, plain, rank)
    plain.aux["kd"].methods["fgd"].factor = 0.0  # off on every rank: its parameters must still report to the reducer
    plain.zero_grad()
    second = gradients(step, plain, rank)
    torch.save([first, second], f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_the_mean_over_processes(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    for i, off in enumerate((False, True)):
        alone = []
        for seed in range(2):
            step = build()
            step.aux["kd"].methods["fgd"].factor = 0.0 if off else 1.0
            alone.append(gradients(step, step, seed))
        assert any("adapters" in name for name in alone[0])
        for name, value in alone[0].items():
            torch.testing.assert_close(ranks[0][i][name], (value + alone[1][name]) / 2, rtol=1e-4, atol=1e-7)
            assert torch.equal(ranks[0][i][name], ranks[1][i][name])


WHOLE_BATCH = ("response", "pkd", "crosskd", "lad", "cwd")


def parts_of_a_batch(method: str, pieces: list[Batch]) -> dict[str, Tensor]:
    """The terms and gradients of a step over these parts, and, in a distributed run, those of the other processes."""
    torch.manual_seed(0)
    student, teacher = tiny_yolox(1).eval(), tiny_yolox(2, width=0.0625).double()
    kind = DISTILLERS[method]
    keys = kd_defaults("cwd@yolo" if method == "cwd" else method, "yolox") | (
        {"position": 2} if method == "crosskd" else {}
    )
    own = kind(kind.Config.model_validate(keys), Pairing.between(student, teacher))
    step = TrainStep(student, nn.ModuleDict({"kd": TeacherLosses(teacher, {method: own})})).double()
    losses = parallel_gradients(wrapped(step), pieces, Draw(), lambda loss: loss.backward(), lambda part, terms: terms)
    grads = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    return {str(name): value for name, value in losses.items()} | grads


def factor_by_gradients(pieces: list[Batch]) -> dict[str, Tensor]:
    """What PGD's factor is after one step over these parts, by its gradient beside the task's."""
    torch.manual_seed(0)
    student, teacher = tiny_yolox(1).eval().double(), tiny_yolox(2, width=0.0625).double()
    state, _ = make_state(student, parts=len(pieces))
    cfg = PGDConfig(weight="auto", auto="gradient")
    callback = Distill(Teacher(teacher, "teacher.pt", "a" * 64, 1.0), {"pgd": cfg}, min_ap=0)
    callback.on_setup(state)
    state.aux.double()

    def on_losses(part: int, losses: dict[LossName, Tensor]) -> dict[LossName, Tensor]:
        state.part, state.losses = part, losses
        callback.on_losses(state)
        return state.losses

    callback.on_batch_start(state)
    step = wrapped(TrainStep(student, state.aux))
    parallel_gradients(step, pieces, Draw(), lambda loss: loss.backward(), on_losses)
    return {"factor": torch.as_tensor(callback.weights["pgd"].at(0, 1, torch.device("cpu")))}


def work_on_parts(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    share = make_batch(images=4).part(rank, 2)
    found = {method: parts_of_a_batch(method, [share.part(i, 2) for i in range(2)]) for method in WHOLE_BATCH}
    found["auto"] = factor_by_gradients([share.part(i, 2) for i in range(2)])
    torch.save(found, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_two_parts_each_are_the_batch_at_once(tmp_path: Path) -> None:
    """Of methods whose terms belong to the whole batch: its positives, its channels' statistics, its labels."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work_on_parts, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    for method in WHOLE_BATCH:
        whole = parts_of_a_batch(method, [make_batch(images=4)])
        assert any(name.startswith("aux") for name in whole) == (method not in ("response", "lad"))
        for name, value in whole.items():
            torch.testing.assert_close(ranks[0][method][name], value, rtol=1e-6, atol=1e-9, msg=f"{method} {name}")
            assert torch.equal(ranks[0][method][name], ranks[1][method][name]), (method, name)
    whole = factor_by_gradients([make_batch(images=4)])["factor"]
    assert float(whole) > 0
    for rank in ranks:
        torch.testing.assert_close(rank["auto"]["factor"], whole, rtol=1e-5, atol=0.0)
