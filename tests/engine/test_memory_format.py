"""`engine.channels_last`: what the maps of a training step look like in memory, and what auto chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY
from tests.nn.fpn import narrow
from yoloxkd import Trainer
from yoloxkd.engine.device import memory_format
from yoloxkd.engine.events import Callback, State
from yoloxkd.errors import UserError
from yoloxkd.nn import DETECTORS

NHWC, NCHW = torch.channels_last, torch.contiguous_format
SMALL = {
    "yolox-nano": {"student.width": 0.125},
    "fcos-mobilenetv2": {"student.backbone": "mobilenetv2_035", "student.channels": 32},
}


class Layouts(Callback):
    """Collects the memory format of each map that the student's neck gives in training, and of the images it gets."""

    def __init__(self) -> None:
        self.images: set[torch.memory_format] = set()
        self.maps: set[torch.memory_format] = set()

    def on_fit_start(self, state: State) -> None:
        state.detector.register_forward_pre_hook(lambda module, inputs: self._note(self.images, inputs[:1], module))
        state.detector.register_forward_hook(lambda module, _, out: self._note(self.maps, out.features, module))

    @staticmethod
    def _note(found: set[torch.memory_format], maps: Any, module: torch.nn.Module) -> None:
        if module.training:
            wide = [x for x in maps if min(x.shape[1:]) > 1]  # else both formats are the same
            found |= {NHWC if x.is_contiguous(memory_format=NHWC) else NCHW for x in wide}


@pytest.mark.parametrize(
    ("student", "setting", "expected"),
    [
        ("yolox-nano", "auto", NHWC),
        ("yolox-nano", False, NCHW),
        ("fcos-mobilenetv2", "auto", NCHW),
        ("fcos-mobilenetv2", True, NHWC),
    ],
)
def test_a_step_runs_in_it(
    student: str, setting: bool | str, expected: torch.memory_format, toy: Path, tmp_path: Path
) -> None:
    """The loader's images lie as NHWC, and convolutions follow their input even where the weights are NCHW."""
    general = {key: value for key, value in TINY.items() if not key.startswith("student.")}
    settings = general | SMALL[student] | {"engine.channels_last": setting}
    seen = Layouts()
    Trainer(
        student=student, data=str(toy), epochs=1, batch=8, imgsz=64, device="cpu", out=tmp_path / "run", set=settings,
        callbacks=[seen],
    ).fit()  # fmt: skip
    assert seen.images == seen.maps == {expected}


@pytest.mark.parametrize("family", list(DETECTORS))
def test_auto_is_channels_last_beside_a_cpu_for_yolox_alone_and_on_any_gpu(family: str) -> None:
    kind = DETECTORS[family]
    cpu = memory_format("auto", kind, torch.device("cpu"))  # type: ignore[arg-type]
    assert cpu is (NHWC if family == "yolox" else NCHW)
    assert memory_format("auto", kind, torch.device("cuda:0")) is NHWC  # type: ignore[arg-type]


def test_a_setting_holds_on_every_device() -> None:
    model = narrow(DETECTORS["fcos"])  # type: ignore[arg-type]
    for device in ("cpu", "cuda:0"):
        assert memory_format(True, model, torch.device(device)) is NHWC
        assert memory_format(False, model, torch.device(device)) is NCHW


def test_another_word_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.channels_last.*should be true, false or auto"):
        Trainer(student="yolox-nano", out=tmp_path / "run", set={"engine.channels_last": "sometimes"})
