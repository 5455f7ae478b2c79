"""Whole runs on a GPU: precision, resuming, evaluation, memory, compiling, several GPUs, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.conftest import LEARNS, TINY
from tests.cuda.gpu import DEVICE, cuda_only, on_gpu, two_gpus
from tests.engine.runs import StopAt, rows, same
from yoloxkd import Detector, Trainer
from yoloxkd.engine.events import Callback, State
from yoloxkd.errors import GateError, Interrupted, UserError

pytestmark = on_gpu
QUIET = Console(quiet=True)
STEPS = 20


class Watch(Callback):
    """What a run's steps had: the total loss, the loss scale, the dtypes of the losses."""

    def __init__(self) -> None:
        self.totals: list[float] = []
        self.scales: list[float] = []
        self.dtypes: set[torch.dtype] = set()

    def on_step(self, state: State) -> None:
        values = list(state.losses.values())
        self.totals.append(float(torch.stack(values).sum()))
        self.dtypes |= {value.dtype for value in values}
        if state.scaler is not None:
            self.scales.append(float(state.scaler.get_scale()))


def train(toy: Path, out: Path, *callbacks: Callback, set: dict[str, Any] | None = None, **keys: Any) -> Any:
    options: dict[str, Any] = {"student": "yolox-nano", "data": str(toy), "batch": 8, "imgsz": 64, "seed": 1}
    options |= {"epochs": 2, "device": DEVICE, "console": QUIET} | keys
    return Trainer(**options, set=TINY | (set or {}), out=out, callbacks=list(callbacks)).fit()


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=cuda_only)])
def test_twenty_steps_in_half_precision_are_finite(amp: str, toy: Path, toy_run: Path, tmp_path: Path) -> None:
    watch = Watch()
    teacher = {"teacher": str(toy_run / "best.pt"), "kd": ["fgd", "pgd"]}
    train(toy, tmp_path / "run", watch, epochs=7, amp=amp, **teacher)
    assert len(watch.totals) >= STEPS
    assert all(torch.tensor(watch.totals).isfinite())
    assert watch.dtypes == {torch.float32}
    held = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    assert all(value.isfinite().all() and value.dtype != torch.float16 for value in held.values())
    assert bool(watch.scales) == (amp == "fp16")
    assert all(scale >= 1 for scale in watch.scales)


@cuda_only
def test_fp16_that_overflows_every_step_stops_with_a_sentence(toy: Path, tmp_path: Path) -> None:
    class Huge(Callback):
        def on_losses(self, state: State) -> None:
            name = next(iter(state.losses))
            state.losses[name] = state.losses[name] * 1e30  # finite in float32, its gradients are not in float16

    with pytest.raises(GateError, match=r"fp16 gradients overflow|not finite"):
        train(toy, tmp_path / "run", Huge(), epochs=40, amp="fp16")


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "auto"])
def test_the_loss_falls_as_on_the_cpu(amp: str, toy: Path, tmp_path: Path) -> None:
    here, cpu = Watch(), Watch()
    train(toy, tmp_path / "gpu", here, set=LEARNS, epochs=8, amp=amp)
    train(toy, tmp_path / "cpu", cpu, set=LEARNS, epochs=8, amp="off", device="cpu")
    last = [sum(watch.totals[-6:]) / 6 for watch in (here, cpu)]
    assert last[1] < cpu.totals[0] * 0.9
    assert last[0] == pytest.approx(last[1], rel=0.15)
    assert here.totals[0] == pytest.approx(cpu.totals[0], rel=1e-3 if amp == "off" else 0.03)


def test_a_deterministic_run_resumes_bit_for_bit(toy: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"epochs": 3, "deterministic": True, "amp": "off", "set": {"augment.multiscale": 1}}
    train(toy, tmp_path / "whole", **keys)
    with pytest.raises(Interrupted):
        train(toy, tmp_path / "parts", StopAt(4), **keys)
    Trainer(resume=tmp_path / "parts", console=QUIET).fit()
    one, other = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    assert same(one["model"], other["model"])
    assert same(one["run"]["ema"], other["run"]["ema"])
    assert same(one["run"]["optimizer"]["state"], other["run"]["optimizer"]["state"])
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_ap_is_that_of_the_cpu(toy: Path, toy_run: Path) -> None:
    found = [Detector(toy_run / "best.pt", device=name).val(str(toy), workers=0) for name in (DEVICE, "cpu")]
    for key in ("AP", "AP50", "AP75"):
        assert found[0][key] == pytest.approx(found[1][key], abs=1e-4), key


def test_a_checkpoint_crosses_devices(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(toy, tmp_path / "run", StopAt(4), epochs=3)
    held = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(value.device.type == "cpu" for value in held["model"].values())
    with torch.no_grad():
        found = [Detector(tmp_path / "run" / "last.pt", device=name).network for name in (DEVICE, "cpu")]
    for (name, a), b in zip(found[0].state_dict().items(), found[1].state_dict().values(), strict=True):
        assert torch.equal(a.cpu(), b), name
    Trainer(resume=tmp_path / "run", console=QUIET).fit()


def test_an_exported_gpu_run_agrees_with_its_checkpoint(toy: Path, tmp_path: Path) -> None:
    train(toy, tmp_path / "run", set=LEARNS, epochs=10)
    detector = Detector(tmp_path / "run" / "best.pt", device=DEVICE)
    file = detector.export(tmp_path / "best.onnx", verify=str(toy))
    assert Path(file).is_file()


@cuda_only
def test_batch_auto_fills_no_more_than_it_says(toy: Path, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    train(toy, tmp_path / "run", batch="auto", epochs=1)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "batch auto: " in log
    free, whole = torch.cuda.mem_get_info()
    assert torch.cuda.max_memory_reserved() < 0.85 * whole
    assert free > 0


@cuda_only
def test_memory_that_does_not_suffice_is_a_sentence_before_the_first_step(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.cuda.empty_cache()
    whole = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(2**27 / whole)
    try:
        with pytest.raises(UserError, match=r"out of memory in a trial step of 8 images of 1280x1280 px"):
            train(toy, tmp_path / "run", imgsz=640, set={"augment.multiscale": [0, 20]}, epochs=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@cuda_only
@pytest.mark.slow
def test_a_compiled_run_trains(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    watch = Watch()
    train(toy, tmp_path / "run", watch, epochs=2, teacher=str(toy_run / "best.pt"), set={"engine.compile": True})
    assert all(torch.tensor(watch.totals).isfinite())


@cuda_only
def test_the_choice_of_auto_is_said(toy: Path, tmp_path: Path) -> None:
    train(toy, tmp_path / "run", epochs=1)
    expected = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    assert f"amp auto: {expected} on cuda:0" in (tmp_path / "run" / "train.log").read_text()


@two_gpus
@pytest.mark.slow
def test_two_gpus_train_together(toy: Path, tmp_path: Path) -> None:
    """NCCL and synchronized batch norms: the command starts a process for each GPU."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "yoloxkd", "train", "--student", "yolox-nano", "--data", str(toy), "--epochs", "2"]
    command += ["--batch", "8", "--imgsz", "64", "--device", "0,1", "--out", str(tmp_path / "run")]
    for key, value in (TINY | {"engine.sync_bn": True}).items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())
