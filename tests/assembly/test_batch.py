"""The batch that is really made: its learning rate and speed, and one image too small for batch norm."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, write_toy
from yoloxkd import Trainer
from yoloxkd.assembly.batch import batch_per_process, check_batch_norm, takes_one_image, with_real_batch
from yoloxkd.assembly.models import build_detector
from yoloxkd.assembly.recipes import resolve
from yoloxkd.config.recipe import Recipe
from yoloxkd.data.sampler import EpochSampler
from yoloxkd.errors import UserError
from yoloxkd.nn.dense.dense_detector import DenseDetector


def recipe(student: str = "yolox-nano", **sets: Any) -> Recipe:
    return resolve(student=student, sets={key.replace("__", "."): value for key, value in sets.items()})


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 2, 5, 6, 11, 40])
def test_the_batch_is_that_of_the_sampler(images: int, world: int) -> None:
    asked = recipe(train__batch=12)
    real = with_real_batch(asked, images, world, lambda line: None).train.batch
    made = sum(len(next(iter(EpochSampler(images, 12 // world, 0, rank, world)))) for rank in range(world))
    assert real == made


def test_it_is_said_and_nothing_is_said_where_there_are_enough() -> None:
    said: list[str] = []
    assert with_real_batch(recipe(train__batch=64), 6, 1, said.append).train.batch == 6
    assert "6 images a step" in said[0]
    enough = recipe(train__batch=8)
    assert with_real_batch(enough, 9, 1, said.append) is enough
    assert len(said) == 1


def test_one_image_cannot_be_taken_in_parts_by_more_processes() -> None:
    with pytest.raises(UserError, match=r"lower train\.accumulate"):
        batch_per_process(4, 2, 2, 1)


def test_rate_and_recipe_of_a_run_follow_the_images_there_are(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "data", images=6)
    keys = TINY | {"schedule.warmup_epochs": 0, "schedule.final_epochs": 0, "callbacks.plots": False}
    out = tmp_path / "run"
    options: dict[str, Any] = {"student": "yolox-nano", "data": str(toy), "epochs": 1, "imgsz": 64, "device": "cpu"}
    Trainer(**options, batch=64, set=keys, out=out).fit()
    with open(out / "results.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["lr"]) == pytest.approx(6 * recipe().optim.lr_per_image)
    assert "6 images a step" in (out / "train.log").read_text()
    assert torch.load(out / "last.pt", weights_only=True)["recipe"]["train"]["batch"] == 6


@pytest.fixture(scope="module")
def nano() -> DenseDetector:
    return build_detector({"name": "yolox-nano"}, ["a"])


@pytest.mark.parametrize(
    ("sets", "processes"),
    [
        ({"train__batch": 1}, 1),
        ({"train__batch": 4, "train__accumulate": 4}, 1),
        ({"train__batch": 2}, 2),
    ],
)
def test_one_cell_of_one_image_is_refused(nano: DenseDetector, sets: dict[str, Any], processes: int) -> None:
    small = recipe(train__imgsz=32, augment__multiscale=0, **sets)
    with pytest.raises(UserError, match=r"one image of 32 px.*--imgsz 64 or more, or two images"):
        check_batch_norm(nano, small, processes)


@pytest.mark.parametrize(
    "sets",
    [
        {"train__batch": 2, "train__imgsz": 32, "augment__multiscale": 0},
        {"train__batch": 1, "train__imgsz": 64, "augment__multiscale": 0},
        {"train__batch": 1, "train__imgsz": 32, "augment__multiscale": 1},  # sizes drawn are of two strides or more
    ],
)
def test_two_cells_are_enough(nano: DenseDetector, sets: dict[str, Any]) -> None:
    check_batch_norm(nano, recipe(**sets), 1)


def test_looking_changes_nothing(nano: DenseDetector) -> None:
    before = {name: value.clone() for name, value in nano.state_dict().items()}
    state = torch.get_rng_state()
    assert not takes_one_image(nano, 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in nano.state_dict().items())
    with torch.no_grad(), pytest.raises(ValueError, match="more than 1 value"):
        nano.train()(torch.zeros(1, 3, 32, 32))  # what it is about
