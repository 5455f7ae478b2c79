"""What happens to runs: one sentence each, and the previous checkpoint is intact."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import TINY, write_toy
from yoloxkd import Trainer
from yoloxkd.cli import run
from yoloxkd.engine.atomic import clear_leftovers, write_text
from yoloxkd.engine.checkpoint import save_checkpoint
from yoloxkd.engine.events import Callback, State
from yoloxkd.engine.failures import explain, is_out_of_memory
from yoloxkd.errors import UserError
from yoloxkd.nn.weights.load import load_checkpoint_file

OPTIONS: dict[str, Any] = {"student": "yolox-nano", "epochs": 4, "batch": 8, "imgsz": 64, "device": "cpu"}
SETTINGS = TINY | {"callbacks.plots": False, "val.interval": 4}


class InEpoch(Callback):
    """Does something at an event of the third epoch."""

    def __init__(self, event: str, action: Any) -> None:
        self.action = action
        setattr(self, event, self._act)

    def _act(self, state: State) -> None:
        if state.epoch == 2:
            self.action()


def fails(toy: Path, out: Path, event: str, action: Any, **settings: Any) -> str:
    """The sentence of a run that goes wrong in its third epoch; its last.pt is that of the second, and whole."""
    options = OPTIONS | {"set": SETTINGS | settings, "data": str(toy), "out": out}
    with pytest.raises(UserError) as caught:
        Trainer(**options, callbacks=[InEpoch(event, action)]).fit()
    assert caught.value.exit_code == 2
    kept = load_checkpoint_file(out / "last.pt")
    assert kept["run"]["epoch"] == 2
    assert not list(out.rglob(".*.part"))
    assert f"--resume {out}" in (out / "train.log").read_text()
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_out_of_memory_names_the_size_and_what_to_lower(toy: Path, tmp_path: Path) -> None:
    sentence = fails(toy, tmp_path / "run", "on_losses", lambda: torch.empty(2**50, dtype=torch.uint8))
    assert "a training step of 8 images of 64x64 px" in sentence
    assert "when 1048576.00 GiB more were asked for" in sentence
    assert "lower --batch or --imgsz" in sentence


def test_a_loader_process_that_dies_is_a_sentence(toy: Path, tmp_path: Path) -> None:
    def kill() -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        time.sleep(0.5)  # torch hears of it by a signal

    sentence = fails(toy, tmp_path / "run", "on_batch_start", kill, **{"engine.workers": 1})
    assert "a loader process was killed (Killed)" in sentence
    assert "lower --workers" in sentence


def test_a_image_that_becomes_unreadable_is_named(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "data", images=8)
    picture = tmp_path / "data" / "images" / "train" / "3.png"
    cut = lambda: picture.write_bytes(picture.read_bytes()[:500])  # noqa: E731
    # mosaics keep images in memory, and would not notice at once
    sentence = fails(toy, tmp_path / "run", "on_epoch_start", cut, **{"augment.mosaic": 0})
    assert str(picture) in sentence
    assert "cut short" in sentence


def test_a_full_disk_is_a_sentence(toy: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: the write fails in the middle, as there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        fill = InEpoch("on_epoch_end", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1])))
        trainer = Trainer(**OPTIONS, set=SETTINGS, data=str(toy), out=tmp_path / "run", callbacks=[fill])
        with pytest.raises(UserError, match=r"last\.pt: .*disk full.*previous checkpoint is intact"):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint_file(tmp_path / "run" / "last.pt")["run"]["epoch"] == 2
    assert not list((tmp_path / "run").rglob(".*.part"))


@contextmanager
def no_rights() -> Iterator[None]:
    """What this process does as root it does as nobody: root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others than its owner may enter; pytest's own are closed to them."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for place in (folder, *folder.rglob("*")):
        if place.is_dir():
            place.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_folder_is_a_sentence(open_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed = open_folder / "closed"
    closed.mkdir()
    save_checkpoint({"x": torch.ones(3)}, closed / "last.pt")
    closed.chmod(0o555)
    with no_rights():
        with pytest.raises(UserError, match=r"could not write .*Permission denied.*previous checkpoint is intact"):
            save_checkpoint({"x": torch.zeros(3)}, closed / "last.pt")
        with pytest.raises(UserError, match=r"could not write .*results.csv"):
            write_text(closed / "results.csv", "x")
        arguments = ["train", "--student", "yolox-nano", "--data", "shapes", "--out", str(closed / "deeper" / "run")]
        assert run(arguments) == 2
    assert "is read-only for you; give another --out" in capsys.readouterr().err
    assert load_checkpoint_file(closed / "last.pt")["x"].sum() == 3
    assert [p.name for p in closed.iterdir()] == ["last.pt"]


def _save_for_ever(file: Path) -> None:
    number = 0
    while True:
        number += 1
        save_checkpoint({"kind": "run", "number": number, "model": {"w": torch.full((300_000,), float(number))}}, file)


@pytest.mark.slow
def test_twenty_kills_during_saves_leave_a_good_file_each(tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    chance, parts, seen = random.Random(1), 0, []
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(file,))
        process.start()
        time.sleep(chance.uniform(0.03, 0.2))
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        assert process.exitcode == -signal.SIGKILL
        parts += clear_leftovers(tmp_path)
        if file.exists():
            value = load_checkpoint_file(file)
            assert bool((value["model"]["w"] == value["number"]).all())
            seen.append(value["number"])
        assert {p.name for p in tmp_path.iterdir()} <= {"last.pt"}
    assert len(seen) > 10  # there was something to spoil
    assert parts  # and some of the kills came in the middle of a write


def test_leftovers_of_a_killed_run_are_cleared_at_the_next_start(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "plots").mkdir(parents=True)
    for name in (".last.pt.123.part", "plots/.curves.png.9.part", "mine.part"):
        (tmp_path / "run" / name).write_text("half")
    settings = {"set": SETTINGS, "data": str(toy), "epochs": 1}
    Trainer(**OPTIONS | settings, out=tmp_path / "run").fit()
    assert [p.name for p in (tmp_path / "run").rglob("*.part")] == ["mine.part"]


def test_errors_of_the_program_are_not_explained_away() -> None:
    out = Path("run")
    assert explain(RuntimeError("shape mismatch"), out) is None
    assert explain(UserError("said already"), out) is None
    assert explain(FileNotFoundError(2, "No such file", "x"), out) is None
    assert "disk full" in str(explain(OSError(28, "No space left on device", "run/x"), out))
    assert "run/x: No space left" in str(explain(OSError(28, "No space left on device", "run/x"), out))
    assert not is_out_of_memory(UserError("out of memory in a step"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert "when 2.00 GiB more" in str(
        explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), out)
    )
    with pytest.raises(MemoryError) as caught:
        np.empty(2**50)
    assert is_out_of_memory(caught.value)


def test_every_callback_hears_of_the_end_also_when_one_fails(toy: Path, tmp_path: Path) -> None:
    heard: list[str] = []

    class Failing(Callback):
        def on_step(self, state: State) -> None:
            raise ValueError("first")

        def on_exception(self, state: State, error: BaseException) -> None:
            heard.append(str(error))
            raise KeyError("second")

    options = OPTIONS | {"set": SETTINGS, "data": str(toy), "out": tmp_path / "run"}
    with pytest.raises(KeyError, match="second") as caught:
        Trainer(**options, callbacks=[Failing(), Failing()]).fit()
    assert heard == ["first", "first"]
    assert isinstance(caught.value.__cause__, ValueError)
