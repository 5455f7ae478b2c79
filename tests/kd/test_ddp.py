"""Under DistributedDataParallel every distilled gradient is the mean over processes, adapters included."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.kd.fakes import TinyDetector, make_batch
from tests.losses import means
from yoloxkd.engine.step import TrainStep
from yoloxkd.kd.base import TeacherLosses
from yoloxkd.kd.methods.fgd import FGD, FGDConfig
from yoloxkd.kd.methods.pgd import PGD, PGDConfig
from yoloxkd.kd.pairing import Pairing


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
    plain.aux["kd"].scales["fgd"] = 0.0  # off on every rank: its parameters must still report to the reducer
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
            step.aux["kd"].scales["fgd"] = 0.0 if off else 1.0
            alone.append(gradients(step, step, seed))
        assert any("adapters" in name for name in alone[0])
        for name, value in alone[0].items():
            torch.testing.assert_close(ranks[0][i][name], (value + alone[1][name]) / 2, rtol=1e-4, atol=1e-7)
            assert torch.equal(ranks[0][i][name], ranks[1][i][name])
