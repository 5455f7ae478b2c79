"""Two processes do what one does with the whole batch: gradients, whole runs, evaluation, interruption, resuming."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests.engine import two_processes as work
from tests.engine.test_runs import rows, same, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(toy_run: Path) -> str:
    return str(toy_run / "best.pt")


@pytest.fixture(scope="module")
def folder(toy: Path, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left their runs and findings: all of them in one launch, which takes seconds."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work.work, (port, str(out), str(toy), teacher), nprocs=2)
    return out


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one(toy: Path, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process, batch norms frozen."""
    out = tmp_path_factory.mktemp("one") / "run"
    work.run(out, str(toy), teacher, work.Frozen())
    return out


@pytest.mark.parametrize("family", work.FAMILIES)
def test_losses_and_gradients_are_those_of_the_whole_batch(family: str, found: list[dict[str, Any]]) -> None:
    whole = work.family_gradients(family, 1)
    assert any("adapters" in name for name in whole)
    for rank, parts in ((0, 1), (1, 1), (0, 2)):
        mine = found[rank][f"{family}/{parts}"]
        assert mine.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-12, msg=name)
    in_parts = work.family_gradients(family, 4)
    for name, value in whole.items():
        torch.testing.assert_close(in_parts[name], value, rtol=1e-9, atol=1e-12, msg=name)
    for name, value in found[0][f"{family}/1"].items():
        assert torch.equal(value, found[1][f"{family}/1"][name])


@pytest.mark.parametrize("name", ["two", "parts"])
def test_a_run_is_the_same(name: str, folder: Path, one: Path) -> None:
    a, b = (torch.load(p / "last.pt", weights_only=True) for p in (folder / name, one))
    for mine, whole in (
        (a["model"], b["model"]),
        (a["run"]["ema"]["module"], b["run"]["ema"]["module"]),
        (a["run"]["aux"], b["run"]["aux"]),
    ):
        assert mine.keys() == whole.keys()
        for key, value in whole.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-5, msg=key)
    weights_of_pgd = [run["run"]["callbacks"]["kd"]["auto"]["pgd"]["fixed"] for run in (a, b)]
    assert weights_of_pgd[0] == pytest.approx(weights_of_pgd[1], rel=1e-5)
    for mine, whole in zip(rows(folder / name), rows(one), strict=True):
        for key in whole:
            if key.startswith(("loss", "lr")):
                assert float(mine[key]) == pytest.approx(float(whole[key]), rel=1e-4, abs=1e-7), key


def test_all_processes_have_the_same_weights_averages_and_losses(found: list[dict[str, Any]]) -> None:
    assert found[0]["fingerprints"] == found[1]["fingerprints"]
    assert len(set(found[0]["fingerprints"])) == work.EPOCHS


def test_one_interrupted_process_stops_both_and_resuming_changes_nothing(
    folder: Path, found: list[dict[str, Any]]
) -> None:
    for one_of in found:
        assert "stopped by SIGTERM in epoch 2" in one_of["interrupted"]
        assert one_of["unfinished"]
    assert same(weights(folder / "again" / "last.pt"), weights(folder / "norms" / "last.pt"))
    assert same(weights(folder / "again" / "best.pt"), weights(folder / "norms" / "best.pt"))
    assert rows(folder / "again") == rows(folder / "norms")


def test_a_sharded_evaluation_is_exact(found: list[dict[str, Any]], toy: Path, teacher: str, tmp_path: Path) -> None:
    whole = work.evaluations(str(toy), teacher, tmp_path / "unused")
    assert whole[0] != whole[1]
    for one_of in found:
        assert one_of["evaluations"] == whole


def test_only_one_process_writes(folder: Path) -> None:
    assert not list(folder.rglob("*.part"))
    log = (folder / "two" / "train.log").read_text()
    assert log.count("epoch 1/2") == 1
    assert len(rows(folder / "two")) == work.EPOCHS


def test_they_fail_together(found: list[dict[str, Any]]) -> None:
    assert found[0]["agreement"][0] == "process 1 of 2: no such file agreed=True"
    assert found[0]["agreement"] == found[1]["agreement"]
    assert found[0]["agreement"][1] == "no such file agreed=True"
    assert "train.batch 5" in found[0]["agreement"][2]
    assert "use 4 or 6" in found[0]["agreement"][2]
