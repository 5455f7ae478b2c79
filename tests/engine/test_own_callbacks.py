"""A user's own callback: what it remembers survives a resume, and what it tells is in environment.json and report.html."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY, TINY
from tests.engine.runs import StopAt
from yoloxkd import Trainer
from yoloxkd.engine.callback_list import CallbackList
from yoloxkd.engine.callbacks.run_folder import callback_entries
from yoloxkd.engine.events import BestEpoch, Callback, State
from yoloxkd.errors import Interrupted, UserError
from yoloxkd.viz.charts import line_chart
from yoloxkd.viz.html_report import Card, Chart, LossHistory, ReportPart, Section


class Looks(Callback):
    """Counts steps, and tells of them wherever a callback can."""

    def __init__(self, key: str = "looks") -> None:
        self.key, self.steps, self.loaded_before_setup = key, 0, False

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.steps = saved["steps"]

    def on_setup(self, state: State) -> None:
        self.loaded_before_setup = self.steps > 0

    def on_step(self, state: State) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def environment(self, state: State) -> dict[str, Any]:
        return {self.key: self.steps}

    def report(self, state: State, history: LossHistory) -> ReportPart:
        total = [sum(values) for values in zip(*history.losses.values(), strict=True)]
        card = Card("How often", facts=[("steps <seen>", str(self.steps))])
        section = Section("Looks", [card], [Chart("All losses", line_chart(history.epochs, {"all": total}))])
        return ReportPart("watched", ["somebody looked"], [section])


@pytest.mark.slow
def test_a_callback_remembers_and_tells(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options: dict[str, Any] = {"student": "yolox-nano", "epochs": 2, "batch": 8, "imgsz": 64, "device": "cpu"}
    options |= {"data": str(toy), "set": TINY | {"callbacks.report": True, "callbacks.plots": False}}
    with pytest.raises(Interrupted):
        Trainer(**options, out=out, callbacks=[Looks(), Looks("more"), StopAt(4)]).fit()
    saved = torch.load(out / "last.pt", weights_only=True)["run"]["callbacks"]
    assert saved == {"Looks": {"steps": 4}, "Looks-2": {"steps": 4}}
    again = Looks()
    Trainer(resume=out, callbacks=[again]).fit()
    assert again.loaded_before_setup
    assert again.steps == 6
    saved = torch.load(out / "last.pt", weights_only=True)["run"]["callbacks"]
    assert saved == {"Looks": {"steps": 6}, "Looks-2": {"steps": 4}}  # of the one that is not here this time
    about = json.loads((out / "environment.json").read_text())
    assert about["looks"] == 6
    page = (out / "report.html").read_text()
    for text in (
        "<h1>yolox-nano, watched</h1>", '<p class="note">somebody looked</p>', "<h2>Looks</h2>", "<h3>How often</h3>",
        "<dt>steps &lt;seen&gt;</dt><dd>6</dd>", "<h3>All losses</h3><svg",
        "<h3>Errors of the best student (TIDE)</h3>", "<td>on an object of another class</td>",
    ):  # fmt: skip
        assert text in page, text
    assert page.count("<svg") == 4 + 1
    assert "<dt>looks</dt>" not in page  # it has its own place


def test_the_example_of_the_documentation_does_what_it_says(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "runs.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "an example"}
    exec(code, names)
    said: list[str] = []
    state: Any = SimpleNamespace(metrics={"AP": 0.6}, say=said.append, stop=False)
    first, again = CallbackList([names["StopWhenGood"](0.5)]), CallbackList([names["StopWhenGood"](0.5)])
    first.call(lambda callback: callback.on_eval_end(state))
    assert state.stop
    assert first.state_dict() == {"StopWhenGood": {"looks": 1}}
    again.load_state_dict(first.state_dict())
    again.call(lambda callback: callback.on_eval_end(state))
    assert said == ["good enough after 1 evaluations", "good enough after 2 evaluations"]
    state.callbacks = again
    assert callback_entries(state) == {"good_enough": 0.5}
    (part,) = (callback.report(state, LossHistory([], {})) for callback in again)
    assert part is not None
    assert part.sections[0].cards[0].facts == [("seen", "2"), ("enough", "AP 0.5")]


def test_two_may_not_use_one_key_of_the_environment() -> None:
    state: Any = SimpleNamespace(callbacks=CallbackList([Looks(), Looks()]))
    with pytest.raises(UserError, match=r"environment\(\) of Looks gives 'looks'"):
        callback_entries(state)
    state.callbacks = CallbackList([Looks("packages")])
    with pytest.raises(UserError, match=r"environment\(\) of Looks gives 'packages'"):
        callback_entries(state, reserved=["packages"])


class Gives(Callback):
    """Remembers anything."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}


def test_what_a_checkpoint_cannot_hold_is_named(tmp_path: Path) -> None:
    good = {"a": [1, 2.5, "x", None, (True, torch.zeros(2))], "b": torch.nn.Linear(1, 1).state_dict(), 3: {}}
    torch.save(CallbackList([Gives(good)]).state_dict(), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=True)
    for value, place in (
        ([np.float64(1)], r"a float64 as Gives\['value'\]\[0\]"),
        ({"x": {1, 2}}, r"a set as Gives\['value'\]\['x'\]"),
        ({Path("x"): 1}, r"a PosixPath as Gives\['value'\]"),
    ):
        with pytest.raises(UserError, match=rf"state_dict\(\) of Gives gives {place}"):
            CallbackList([Gives(value)]).state_dict()


def test_an_error_reaches_every_callback_and_the_first_failure_is_raised() -> None:
    reached: list[str] = []

    class Fails(Callback):
        def on_exception(self, state: State, error: BaseException) -> None:
            reached.append(str(error))
            raise OSError(f"number {len(reached)}")

    callbacks = CallbackList([Fails(), Fails(), Callback()])
    with pytest.raises(OSError, match="number 1") as caught:
        callbacks.on_exception(SimpleNamespace(), UserError("the cause"))  # type: ignore[arg-type]
    assert reached == ["the cause", "the cause"]
    assert str(caught.value.__cause__) == "the cause"


@pytest.mark.parametrize(
    ("aps", "epoch"),
    [([0.1, 0.3, 0.2, 0.3], 1), ([-1.0, -1.0], 1), ([float("nan"), 0.0, 0.0], 1), ([0.0, float("nan")], 0)],
)
def test_the_best_epoch(aps: list[float], epoch: int) -> None:
    best: BestEpoch | None = None
    for number, ap in enumerate(aps):
        best = BestEpoch.after(best, number, {"AP": ap})
    assert best is not None
    assert best.epoch == epoch
    assert best.metrics["AP"] is aps[epoch]
    assert best.value == best.value  # never NaN: it is written into last.pt
