"""`engine.compile`: student and teacher become one graph each, the run's numbers stay, and so do its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY
from tests.engine.test_runs import rows
from tests.nn.fpn import BACKBONE
from yoloxkd import Trainer

STUDENTS = {
    "yolox-nano": {"student.width": 0.125},
    "gfl-mobilenetv2": {
        "student.backbone": BACKBONE, "student.channels": 16, "student.groups": 4, "student.stacked_convs": 1,
    },
}  # fmt: skip
COMMON = {key: value for key, value in TINY.items() if not key.startswith("student.")} | {"ema.enabled": False}


@pytest.mark.slow
@pytest.mark.parametrize("student", STUDENTS)
def test_a_compiled_run_gives_the_same_numbers(
    student: str, toy: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are taken whole; the kernels are those of eager mode, since generating others takes minutes."""
    compiled: list[str] = []
    real: Callable[..., Any] = torch.compile

    def into_one_graph(call: Any, **_: Any) -> Any:
        compiled.append(type(call.__self__).__name__)
        return real(call, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", into_one_graph)
    settings = COMMON | STUDENTS[student]
    runs = [
        Trainer(
            student=student, teacher=str(toy_run / "best.pt"), kd="pgd", data=str(toy), epochs=1, batch=4, imgsz=96,
            device="cpu", set=settings | {"engine.compile": on}, out=tmp_path / str(on),
        ).fit()
        for on in (False, True)
    ]  # fmt: skip
    torch._dynamo.reset()
    assert len(compiled) == 2
    assert "YOLOX" in compiled
    plain, fast = ({k: v for k, v in rows(run.out)[0].items() if k.startswith("loss/")} for run in runs)
    assert {k: pytest.approx(float(v), rel=1e-3) for k, v in plain.items()} == {k: float(v) for k, v in fast.items()}
    saved = torch.load(runs[1].best, weights_only=True)["model"]
    assert saved.keys() == torch.load(runs[0].best, weights_only=True)["model"].keys()
