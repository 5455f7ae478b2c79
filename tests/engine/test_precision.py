"""float16 maps go straight into every loss and every distiller, and what comes out is what float32 gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.conftest import TINY
from tests.engine.test_runs import same, weights
from tests.engine.test_step import batch as scenes
from tests.engine.test_step import family
from tests.losses import compared, task
from yoloxkd import Trainer
from yoloxkd.config.recipe import EngineSection
from yoloxkd.engine.device import amp_dtype, choose_device, grad_scaler, settings, synchronized_norms
from yoloxkd.errors import UserError
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.pairing import Pairing
from yoloxkd.ops import losses as ops
from yoloxkd.types import DenseOutput

SIDE = 640.0
FAMILIES = ("yolox", "fcos", "atss", "gfl", "retinanet", "autoassign", "ddod", "reppoints")


def boxes(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(20, 2, generator=g) * SIDE / 4
    return torch.cat([low, low + 8 + torch.rand(20, 2, generator=g) * SIDE / 2], -1)


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)) * 6


LABELS = torch.arange(20) % 5
POSITIVE = torch.arange(20) % 3 == 0
SCORE = torch.linspace(0, 1, 20)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "squared_iou_loss": (ops.squared_iou_loss, (boxes(0), boxes(1))),
    "giou_loss": (ops.giou_loss, (boxes(0), boxes(1))),
    "log_iou_loss": (ops.log_iou_loss, (boxes(0), boxes(1))),
    "soft_class_loss": (ops.soft_class_loss, (logits(20, 5), LABELS, SCORE)),
    "focal_loss": (ops.focal_loss, (logits(20, 5), LABELS, POSITIVE)),
    "quality_focal_loss": (ops.quality_focal_loss, (logits(20, 5), LABELS, POSITIVE, SCORE)),
    "distribution_focal_loss": (ops.distribution_focal_loss, (logits(20, 17), SCORE * 15)),
}


def test_every_loss_function_is_here() -> None:
    assert set(FUNCTIONS) == {n for n in vars(ops) if n.endswith("_loss")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_function_widens_what_it_gets(name: str) -> None:
    function, arguments = FUNCTIONS[name]
    narrow = [a.half() if a.is_floating_point() else a for a in arguments]
    found, exact = function(*narrow), function(*(a.float() if a.is_floating_point() else a for a in narrow))
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(found, function(*arguments), rtol=0.05, atol=0.05)


def cast(out: DenseOutput, dtype: torch.dtype, factor: float = 1.0) -> DenseOutput:
    """The maps and predictions in another dtype, as autocast gives them; maps times a factor."""
    changed: dict[str, Any] = {}
    for f in fields(out):
        value = getattr(out, f.name)
        if f.name.endswith("features"):
            changed[f.name] = tuple((v * factor).half().to(dtype) for v in value)
        elif f.name in ("cls_logits", "box_raw", "quality") and value is not None:
            changed[f.name] = value.half().to(dtype)
    return replace(out, **changed)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_detectors_losses_are_float32_on_float16_outputs(kind: str) -> None:
    student, _ = family(kind)
    out, targets = student.eval()(scenes().images), scenes().targets
    found, exact = task(student, cast(out, torch.float16), targets), task(student, cast(out, torch.float32), targets)
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], msg=name)
    for name, value in task(student, out, targets).items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=0.02, msg=name)


@pytest.mark.parametrize("method", [name for name, kind in DISTILLERS.items() if not kind.labels and name != "crosskd"])
def test_a_distiller_is_float32_on_float16_maps(method: str) -> None:
    """Of every method that reads outputs alone; CrossKD runs the networks' heads (tests/kd/test_contract.py)."""
    student, teacher = family("gfl" if method == "ld" else "yolox")
    data = scenes()
    distiller = DISTILLERS[method](DISTILLERS[method].Config(), Pairing.between(student, teacher))
    with torch.no_grad():
        seen = [student.eval()(data.images), teacher.eval()(data.images)]
    largest = max(float(m.abs().max()) for out in seen for m in out.features)
    factor = 1e3 / largest  # squares of it do not fit into float16
    found, exact = (
        compared(distiller, cast(seen[0], dtype, factor), cast(seen[1], dtype, factor), data, teacher)
        for dtype in (torch.float16, torch.float32)
    )
    assert len(found) == len(distiller.terms)
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.isfinite()
        torch.testing.assert_close(value, exact[name], msg=name)
    # untrained heads say the same, so what compares predictions alone has nothing to give here
    assert any(bool(value > 0) for value in found.values()) or not distiller.needs


def test_bf16_trains_on_the_cpu(toy: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"student": "yolox-nano", "data": str(toy), "batch": 4, "imgsz": 64, "device": "cpu"}
    out = tmp_path / "run"
    Trainer(**keys, epochs=2, set=TINY, amp="bf16", out=out, console=Console(quiet=True)).fit()
    held = weights(out / "last.pt")
    assert all(v.isfinite().all() for v in held.values())
    assert {v.dtype for v in held.values()} == {torch.float32, torch.int64}


def test_deterministic_runs_are_identical(toy: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"student": "yolox-nano", "data": str(toy), "batch": 4, "imgsz": 64, "device": "cpu"}
    for name in ("a", "b"):
        trainer = Trainer(
            **keys, epochs=1, set=TINY, deterministic=True, out=tmp_path / name, console=Console(quiet=True)
        )
        assert trainer.recipe.engine.deterministic
        trainer.fit()
    assert same(weights(tmp_path / "a" / "last.pt"), weights(tmp_path / "b" / "last.pt"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_switches_are_put_back() -> None:
    with settings(EngineSection(deterministic=True), torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_needs_cuda_says_so() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        amp_dtype("fp16", cpu)
    with pytest.raises(UserError, match="sync_bn needs CUDA"):
        synchronized_norms(torch.nn.Linear(1, 1), cpu)
    assert amp_dtype("bf16", cpu) is torch.bfloat16
    assert grad_scaler(torch.bfloat16, cpu) is None


def test_several_devices_need_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="torchrun --nproc-per-node 2"):
        choose_device("0,1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="one device for 2 processes"):
        choose_device("0")
    assert choose_device("cpu") == torch.device("cpu")
