"""What can be seen of the CUDA path on a machine without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from yoloxkd.config.recipe import EngineSection
from yoloxkd.engine.callbacks.finite import FiniteGuard
from yoloxkd.engine.device import amp_dtype, choose_device, convert_norms, loader_workers, resolved_amp, settings
from yoloxkd.errors import GateError, UserError
from yoloxkd.kd.functional import importance
from yoloxkd.nn.backbones.timm_backbone import NORMS, TimmBackbone


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch says that there is one GPU; the list gets the devices that are set."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    return chosen


@pytest.mark.parametrize("name", ["auto", "cuda", "0", "cuda:0"])
def test_the_one_gpu_has_an_index_and_can_be_set(name: str, one_gpu: list[Any]) -> None:
    device = choose_device(name)
    assert device == torch.device("cuda", 0)
    with settings(EngineSection(), device):
        assert one_gpu == [0]


def test_a_gpu_that_is_not_there_is_a_sentence(one_gpu: list[Any]) -> None:
    with pytest.raises(UserError, match="there is no device cuda:1"):
        choose_device("1")


def test_bf16_on_an_old_gpu_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match="Ampere generation or newer"):
        amp_dtype("bf16", torch.device("cuda", 0))


def test_what_auto_stands_for(one_gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for has_bf16, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has_bf16: has)
        assert resolved_amp("auto", gpu) == expected
    assert resolved_amp("auto", cpu) == "off"
    assert amp_dtype("auto", cpu) is None
    assert resolved_amp("off", gpu) == "off"
    for cores, workers in ((1, 1), (8, 8), (64, 12)):
        monkeypatch.setattr("yoloxkd.engine.device.available_cores", lambda cores=cores: cores)
        assert loader_workers("auto", gpu) == workers
        assert loader_workers("auto", cpu) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert loader_workers("auto", gpu) == 8  # of 64 cores
    assert loader_workers(3, gpu) == 3


def test_cudnn_times_its_algorithms_where_sizes_are_few(one_gpu: list[Any]) -> None:
    gpu, cudnn = torch.device("cuda", 0), torch.backends.cudnn
    before = cudnn.benchmark
    with settings(EngineSection(), gpu, few_sizes=True):
        assert cudnn.benchmark
    with settings(EngineSection(), gpu):
        assert not cudnn.benchmark
    with settings(EngineSection(deterministic=True), gpu, few_sizes=True):
        assert not cudnn.benchmark
    assert cudnn.benchmark == before


@pytest.mark.parametrize("name", ["mobilenetv2_100", "resnet18"])
def test_synchronized_norms_keep_activations_and_what_is_frozen(name: str) -> None:
    backbone = TimmBackbone(name, frozen_stages=1, norm_eval=False).train()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    frozen = {n for n, m in backbone.body.named_modules() if isinstance(m, NORMS) and not m.training}
    keys = list(backbone.state_dict())
    before = backbone.eval()(images)
    convert_norms(holder := nn.Sequential(backbone))
    after = holder.eval()[0](images)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)
    assert list(backbone.state_dict()) == keys
    backbone.train()
    norms = {n: m for n, m in backbone.body.named_modules() if isinstance(m, NORMS)}
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms.values())
    assert frozen
    assert {n for n, m in norms.items() if not m.training} == frozen
    assert not any(p.requires_grad for n in frozen for p in norms[n].parameters())


def test_a_prediction_that_is_not_a_number_is_chosen_by_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    points = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)) * 8 + 4
    low = points - 12 * torch.rand(1, 64, 2, generator=g)
    predicted = torch.cat((low, low + 24), -1)
    predicted[0, 20] = torch.nan
    seen = importance.Predictions(points, torch.rand(1, 64, 2, generator=g), predicted)
    boxes, labels = torch.tensor([[[4.0, 4, 44, 52]]]), torch.zeros(1, 1, dtype=torch.int64)

    def weights() -> torch.Tensor:
        return importance.pgd_weights(seen, boxes, labels, labels == 0, xi=(0.8, 0.6), k=5)

    listed = weights()
    monkeypatch.setattr("yoloxkd.ops.devices.READ_DEVICES", ())
    torch.testing.assert_close(weights(), listed)
    assert (listed > 0).sum() == 10
    assert not listed[..., 20].any()


class Run:
    """A run of float16 steps whose gradients overflow or not, with torch's own scaler, on the CPU."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.01)
        self.said: list[str] = []
        self.guard = FiniteGuard(tolerated=10)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        self.state: Any = SimpleNamespace(
            device=torch.device("cpu"), scaler=scaler, losses={"box": torch.ones(())}, say=self.said.append
        )
        self.state.iteration = self.state.step_in_epoch = self.state.epoch = 0
        self.state.iters_per_epoch = 1000
        self.guard.on_fit_start(self.state)

    def steps(self, *gradients: float) -> None:
        for gradient in gradients:
            self.step(gradient)

    def step(self, gradient: float) -> None:
        scaler = self.state.scaler
        self.optimizer.zero_grad()
        scaler.scale((self.weight * gradient).sum()).backward()
        scaler.step(self.optimizer)
        scaler.update()
        self.state.iteration += 1
        self.state.step_in_epoch += 1
        self.guard.on_step(self.state)


def test_steps_that_fp16_skips_are_counted_and_said() -> None:
    run = Run()
    run.steps(1.0, float("inf"), 1.0, float("nan"), 1.0)
    run.guard.on_epoch_end(run.state)
    assert run.said == ["fp16: gradients overflowed in 2 step(s) of epoch 1, which were skipped; the loss scale is 64"]
    run.guard.on_epoch_end(run.state)
    assert len(run.said) == 1


def test_fp16_that_trains_nothing_stops_the_run() -> None:
    run = Run()
    with pytest.raises(GateError, match="overflow at every loss scale"):
        run.steps(*[float("inf")] * 40)
    assert run.state.iteration < 20
    assert run.weight.item() == 1.0
