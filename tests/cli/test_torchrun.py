"""The command line under torchrun and as its own launcher: killed processes, restarts, signals, exit statuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.engine.test_runs import rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds worker processes by /proc"),
]
TRAIN = [
    "train", "--student", "yolox-nano", "--epochs", "500", "--batch", "2", "--imgsz", "64", "--workers", "0",
    "--set", "student.width=0.125", "--set", "augment.multiscale=0", "--set", "augment.mosaic=0",
    "--set", "val.interval=500", "--set", "schedule.final_epochs=0",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, env=environment)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Also what it has started: torchrun's processes are in sessions of their own."""
    for rank in range(2):
        try:
            os.kill(worker(process.pid, rank), signal.SIGKILL)
        except (AssertionError, ProcessLookupError):
            continue
    process.kill()


def until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            stop(process)
            raise AssertionError(f"it did not come that far:\n{log.read_text()}")
        time.sleep(0.1)


def worker(launcher: int, rank: int) -> int:
    """The process id of one rank under a launcher."""
    for folder in Path("/proc").iterdir():
        try:
            parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            environment = folder.joinpath("environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == str(launcher) and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def epochs(out: Path) -> int:
    return len(rows(out)) if (out / "results.csv").is_file() else 0


def test_a_killed_process_is_restarted_and_then_ends_all(toy: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    command = [*TORCHRUN, "--max-restarts", "1", "-m", "yoloxkd", *TRAIN, "--data", str(toy), "--device", "cpu"]
    process = start([*command, "--out", str(out)], log)
    until(lambda: epochs(out) > 1, process, log)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    until(lambda: "restarted by torchrun" in log.read_text(), process, log)
    before = torch.load(out / "last.pt", weights_only=True)["run"]["epoch"]
    assert before > 1  # it goes on, it does not begin again
    until(lambda: epochs(out) > before, process, log)
    assert [int(row["epoch"]) for row in rows(out)] == list(range(1, epochs(out) + 1))
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    assert process.wait(60) != 0
    assert log.read_text().count("process 0 lost another process of this run") == 2
    assert "Traceback" not in log.read_text().partition("process 0 lost")[0]
    assert torch.load(out / "last.pt", weights_only=True)["kind"] == "run"
    assert not (out / "metrics.json").exists()
    assert not list(out.glob(".*.part"))


def test_several_devices_are_launched_and_end_with_one_status(toy: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "yoloxkd", *TRAIN, "--data", str(toy), "--device", "cpu,cpu", "--out", str(out)]
    process = start([*command, "--batch", "5"], log)
    assert process.wait(240) == 2
    assert log.read_text().count("yoloxkd: ") == 1
    assert "train.batch 5" in log.read_text()
    assert not out.exists()
    process = start(command, log)
    until(lambda: (out / "last.pt").is_file(), process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    said = [line for line in log.read_text().splitlines() if line.startswith("yoloxkd: ")]
    assert len(said) == 1
    assert said[0].startswith("yoloxkd: stopped by SIGTERM")
    assert torch.load(out / "last.pt", weights_only=True)["kind"] == "run"


def test_restarts_need_a_folder_to_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from yoloxkd import Trainer
    from yoloxkd.errors import UserError

    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match=r"up to 3 time.*give --out DIR"):
        Trainer(student="yolox-nano", data="shapes")
