"""The shipped callbacks: what they show and write, in which order, and that a resumed run continues them."""

from __future__ import annotations

import csv
import io
import math
import platform
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import pytest
import torch
from rich.console import Console

from tests.conftest import TINY
from tests.engine.runs import StopAt, rows, same_file
from yoloxkd import Trainer
from yoloxkd.assembly.recipes import resolve
from yoloxkd.assembly.run_callbacks import ordered_callbacks
from yoloxkd.engine.callbacks import CALLBACKS
from yoloxkd.engine.callbacks.early_stopping import EarlyStopping
from yoloxkd.engine.callbacks.plots import Plots
from yoloxkd.engine.callbacks.progress import ProgressReport, duration
from yoloxkd.engine.callbacks.tensorboard import TensorBoard
from yoloxkd.engine.callbacks.wandb import WeightsAndBiases
from yoloxkd.engine.events import Callback
from yoloxkd.errors import Interrupted, UserError
from yoloxkd.types import TASK, LossName

OPTIONS: dict[str, Any] = {"student": "yolox-nano", "batch": 8, "imgsz": 64, "device": "cpu"}
HOST = "the-training-machine-7"
STEPS = 3  # batches of 8 in the toy's 24 images


class FakeWandb(SimpleNamespace):
    """Takes the place of the wandb module and remembers."""

    Error = RuntimeError

    def __init__(self) -> None:
        super().__init__(started=[], logged=[], finished=[], summary={})

    def init(self, **keys: Any) -> Any:
        self.started.append(keys)
        finish = lambda exit_code=0: self.finished.append(exit_code)  # noqa: E731
        log = lambda values, step: self.logged.append((step, values))  # noqa: E731
        return SimpleNamespace(id=keys["id"] or "made-up", log=log, finish=finish, summary=self.summary)

    def Image(self, path: str) -> str:
        return path


class Recorder(Callback):
    """The name of every event."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            self.events.append(name)
        return super().__getattribute__(name)


@pytest.fixture(scope="module")
def wandb() -> FakeWandb:
    return FakeWandb()


@pytest.fixture(scope="module")
def logged(toy: Path, toy_run: Path, wandb: FakeWandb, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distillation with every callback, interrupted in its second epoch and resumed."""
    out = tmp_path_factory.mktemp("logged") / "a <b> & c"
    keys = TINY | {"callbacks.report": True, "callbacks.plots": {"interval": 1, "pictures": 2}}
    keys |= {"callbacks.tensorboard.every": 2, "callbacks.wandb": {"every": 2, "tags": ["x"]}}
    keys |= {"student.width": 0.25, "val.interval": 1, "callbacks.early_stopping": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "node", lambda: HOST)
        patch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
        run = {"data": str(toy), "epochs": 3, "teacher": str(toy_run / "best.pt"), "kd": "fgd", "set": keys, "out": out}
        with pytest.raises(Interrupted):
            Trainer(**OPTIONS | run, callbacks=[StopAt(STEPS + 1)]).fit()
        assert "did not finish: stopped by SIGINT" in (out / "report.html").read_text()
        Trainer(resume=out).fit()
    return out


def test_events_come_in_the_documented_order(toy: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    Trainer(**OPTIONS | {"set": TINY}, data=str(toy), epochs=1, out=tmp_path / "r", callbacks=[recorder]).fit()
    batch = ["on_batch_start", "on_losses", "on_step"]
    first = ["on_setup", "on_fit_start", "on_epoch_start"]
    assert recorder.events == first + STEPS * batch + ["on_eval_start", "on_eval_end", "on_epoch_end", "on_fit_end"]


def test_callbacks_are_called_in_the_documented_order_and_objects_stand_in() -> None:
    recipe = resolve(student="yolox-nano", sets={"callbacks.early_stopping.patience": 3, "callbacks.tensorboard": True})
    mine, recorder = EarlyStopping(patience=7), Recorder()
    order = ordered_callbacks(recipe, {}, [], [recorder, mine], Console())
    assert [type(c).__name__ for c in order] == [
        "RunFolder", "FiniteGuard", "EarlyStopping", "Recorder", "LearningRateLog", "CsvLog", "ProgressReport",
        "Checkpoints", "Plots", "TensorBoard", "HtmlReport", "FinalMetrics",
    ]  # fmt: skip
    assert order[2] is mine
    assert order[3] is recorder


def test_the_recipe_names_callbacks_and_their_keys() -> None:
    sets = {"callbacks.early_stopping.patience": 3, "callbacks.plots": False, "callbacks.tensorboard": None}
    recipe = resolve(student="yolox-nano", sets=sets)
    assert recipe.callbacks["early_stopping"] == EarlyStopping.Config(patience=3)
    assert recipe.callbacks["plots"] is False
    assert recipe.callbacks["tensorboard"] == CALLBACKS["tensorboard"].Config()
    assert "wandb" not in recipe.callbacks
    for key, nearest in {
        "callbacks.early_stoping.patience": "unknown callback 'early_stoping'.*did you mean 'early_stopping'",
        "callbacks.early_stopping.patiance": "callbacks.early_stopping.patiance.*did you mean 'callbacks.early_stopping.patience'",
    }.items():
        with pytest.raises(UserError, match=nearest):
            resolve(student="yolox-nano", sets={key: 3})
    with pytest.raises(UserError, match=r"callbacks\.early_stopping\.patience"):
        EarlyStopping(patience=0)


def watch(callback: EarlyStopping, values: list[float], first: int = 0) -> int | None:
    """The epoch (from 0) after which a run with these metrics stops."""
    for epoch, value in enumerate(values, first):
        state = SimpleNamespace(metrics={"AP": value, "APl": -1.0}, epoch=epoch, epochs=99, stop=False)
        state.say = lambda line: None
        callback.on_eval_end(state)  # type: ignore[arg-type]
        if state.stop:
            return epoch
    return None


def test_early_stopping_waits_for_its_patience_and_remembers() -> None:
    first, again = EarlyStopping(patience=3), EarlyStopping(patience=3)
    assert watch(first, [0.1, 0.3, 0.2, 0.3]) is None
    again.load_state_dict(first.state_dict())
    assert watch(again, [0.2], first=4) == 4
    assert watch(EarlyStopping(patience=2, min_delta=0.1), [0.1, 0.15, 0.19, 0.5]) == 2
    assert watch(EarlyStopping(patience=3), [0.1, 0.1, 0.2, 0.2, 0.2, 0.2]) == 5
    assert watch(EarlyStopping(patience=2), [math.nan, 0.2, math.nan, 0.1, 0.3]) == 3
    with pytest.raises(UserError, match="nothing to measure"):
        watch(EarlyStopping(metric="APl"), [0.1])
    with pytest.raises(UserError, match="did you mean 'AP'"):
        watch(EarlyStopping(metric="APP"), [0.1])


@pytest.mark.slow
def test_an_early_stopped_run_resumes_exactly_and_counts_as_finished(toy: Path, tmp_path: Path) -> None:
    sets = TINY | {"val.interval": 1, "callbacks.early_stopping.patience": 2, "optim.lr_per_image": 1e-6}
    options = OPTIONS | {"set": sets, "data": str(toy), "epochs": 9}
    whole = Trainer(**options, out=tmp_path / "whole").fit()
    assert len(rows(whole.out)) == 3
    with pytest.raises(Interrupted):
        Trainer(**options, out=tmp_path / "cut", callbacks=[StopAt(STEPS + 1)]).fit()
    cut = Trainer(resume=tmp_path / "cut").fit()
    assert rows(cut.out) == rows(whole.out)
    assert same_file(cut.out / "last.pt", whole.out / "last.pt")
    with pytest.raises(UserError, match=r"holds a finished run \(3 epochs\)"):
        Trainer(resume=cut.out)
    (cut.out / "metrics.json").unlink()  # as if it was killed just before the end: it finishes and does not train on
    again = Trainer(resume=cut.out).fit()
    assert len(rows(again.out)) == 3
    assert (again.out / "metrics.json").read_text() == (whole.out / "metrics.json").read_text()


NAMES = (LossName(TASK, "box"), LossName("fgd", "fg", 8), LossName("fgd", "fg", 16))


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_everything_promised(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yoloxkd.engine.callbacks.progress.PLAIN_SECONDS", -1)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=150)
    state: Any = SimpleNamespace(
        epoch=1, epochs=5, step_in_epoch=0, iters_per_epoch=4, iteration=4, lr=0.01, device=torch.device("cpu"), stop=False,
        recipe=SimpleNamespace(train=SimpleNamespace(batch=8)), images_per_second=12.5, evaluated=1,
        losses=dict(zip(NAMES, torch.tensor([1.5, 2.0, 0.5]), strict=True)),
        epoch_losses=dict(zip(NAMES, (1.5, 2.0, 0.25), strict=True)), metrics={"AP": 0.25, "AP50": 0.5},
        say=lambda line: console.print(line, highlight=False, soft_wrap=True),
    )  # fmt: skip
    report = ProgressReport(console)
    report.on_fit_start(state)
    report.on_epoch_start(state)
    for _ in range(2):
        state.step_in_epoch += 1
        state.iteration += 1
        report.on_step(state)
        if report.live is not None:
            report.live.refresh()
    during = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    batch = r"2/4" if terminal else r"batch 2/4"
    shown = [
        r"epoch 2/5",
        batch,
        r"[\d.]+ images/s",
        r"epoch \d+:\d\d left",
        r"run \d+:\d\d left",
        r"memory \d+\.\d\d GB",
    ]
    for pattern in [*shown, r"box 1\.5", r"fgd/fg 2\.5"]:
        assert re.search(pattern, during), (pattern, during)
    report.on_epoch_end(state)
    text = screen.getvalue()
    for word in ("12.5 images/s", "lr 1.00e-02", "fgd/fg 2.25", "AP 0.2500 AP50 0.5000"):
        assert word in text
    assert ("\x1b[" in text) is terminal
    assert (duration(59.6), duration(3723)) == ("1:00", "1:02:03")


def test_learning_rates_are_written_for_steps(logged: Path) -> None:
    with open(logged / "learning_rate.csv", newline="") as file:
        steps = list(csv.DictReader(file))
    assert [row["step"] for row in steps] == [str(i + 1) for i in range(3 * STEPS)]
    assert [row["epoch"] for row in steps] == [str(1 + i // STEPS) for i in range(3 * STEPS)]
    assert [row["lr"] for row in steps][STEPS - 1 :: STEPS] == [row["lr"] for row in rows(logged)]


def test_images_are_drawn_during_the_run(logged: Path) -> None:
    sheets = sorted(p.name for p in (logged / "plots").iterdir())
    assert sheets == ["curves.png", *(f"predictions-epoch-000{i}.png" for i in (1, 2, 3)), "predictions.png"]
    sheet = cv2.imread(str(logged / "plots" / "predictions.png"))
    assert sheet.shape[1] > 3 * 416  # two pairs side by side
    assert sheet.std() > 10


def test_tensorboard_has_every_term_and_continues(logged: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logged / "tensorboard")).Reload()
    table = rows(logged)
    scalars = events.Tags()["scalars"]
    terms = [name for name in table[0] if name.startswith("loss/")]
    assert len(terms) > 12
    assert {*terms, "loss", "val/AP", "images_per_s", "step/lr", "step/fgd/fg/s8"} <= set(scalars)
    for name in terms:
        values = {e.step: e.value for e in events.Scalars(name)}
        expected = {STEPS * int(r["epoch"]): float(r[name]) for r in table if r[name]}
        assert values == pytest.approx(expected, rel=1e-4)
    assert [e.step for e in events.Scalars("step/lr")] == [2, 4, 6, 8]
    assert events.Tags()["images"] == ["predictions"]
    assert "yolox-nano" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def test_wandb_is_told_everything_and_continues_its_run(logged: Path, wandb: FakeWandb) -> None:
    first, second = wandb.started
    assert (first["project"], first["name"], first["tags"], first["id"]) == ("yoloxkd", logged.name, ["x"], None)
    assert first["config"]["student"]["name"] == "yolox-nano"
    assert second["id"] == "made-up"
    assert wandb.finished == [130, 0]
    assert [step for step, _ in wandb.logged] == [2, 3, 4, 6, 8, 9]
    for row, (_, values) in zip(rows(logged), [entry for entry in wandb.logged if entry[0] % STEPS == 0], strict=True):
        assert values["loss/fgd/fg/s8"] == pytest.approx(float(row["loss/fgd/fg/s8"]), rel=1e-4)
        assert values["val/AP"] == pytest.approx(float(row["AP"]), abs=1e-6)
        assert values["predictions"].endswith(".png")
    assert "best/AP" in wandb.summary


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [(TensorBoard, "torch.utils.tensorboard", "tensorboard"), (WeightsAndBiases, "wandb", "wandb")],
)
def test_a_missing_extra_is_a_sentence(
    kind: type[TensorBoard], module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"callbacks.{package} needs the package {package}.*yoloxkd\[{package}\]"):
        kind()


class Page(HTMLParser):
    """Tags, and addresses that would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data") and v]


def test_the_report_is_one_file_with_everything(logged: Path) -> None:
    text = (logged / "report.html").read_text()
    page = Page(text)
    assert all(a.startswith(("data:image/jpeg;base64,", "#")) for a in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "a <b> & c" not in text
    assert "a &lt;b&gt; &amp; c" in text
    assert "did not finish" not in text
    assert page.tags.count("svg") == 4 + 1 + 4  # training, where the loss comes from, FGD's four terms
    assert page.tags.count("img") == 1
    assert "to watch there: results.csv, a row an epoch, report.html at " in (logged / "train.log").read_text()
    for words in ("distilled by FGD", "1x1 adapter", "stride 32", "fgd: fg", ">red<", ">blue<", "3 / 3", "augment:"):
        assert words in text, words


def test_what_is_for_others_tells_nothing_of_the_machine(logged: Path, toy: Path, toy_run: Path) -> None:
    told = [str(p) for p in (logged.parent, toy.parent, toy_run.parent, Path.cwd(), Path.home())] + [HOST]
    saved = torch.load(logged / "best.pt", weights_only=True)
    assert saved["recipe"]["data"] == "data.yaml"
    assert saved["recipe"]["teacher"]["models"] == ["best.pt"]
    for name in ("best.pt", "report.html"):
        data = (logged / name).read_bytes()
        assert [text for text in told if text.encode() in data] == [], name
    for name, text in (("last.pt", str(toy)), ("environment.json", HOST), ("recipe.yaml", str(toy))):
        assert text.encode() in (logged / name).read_bytes(), name  # a resume needs them


def test_a_report_and_plots_that_fail_are_warnings(logged: Path, tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file where the folder should be")
    (tmp_path / "results.csv").write_text((logged / "results.csv").read_text())
    said: list[str] = []
    state: Any = SimpleNamespace(out=tmp_path, say=said.append, epoch=0, epochs=1, ema=None, detector=None, val=[])
    Plots().on_fit_end(state)
    assert said
    assert said[0].startswith("warning: plots were not drawn")


def test_every_named_callback_has_its_name() -> None:
    assert [kind.name for kind in CALLBACKS.values()] == list(CALLBACKS)
