"""Overrides, merging, and the one sentence for each kind of fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from yoloxkd.config.load import leaves, merge, parse_set, put, read_yaml, validate
from yoloxkd.config.recipe import Recipe, ScheduleSection, ValSection
from yoloxkd.config.strict import Strict
from yoloxkd.errors import UserError

MINIMAL = {"student": {"name": "x", "config": Strict()}}


def test_set_values_are_read_as_yaml() -> None:
    assert parse_set("a.b=3") == ("a.b", 3)
    assert parse_set("a=[1, 2]") == ("a", [1, 2])
    assert parse_set("a=null") == ("a", None)
    assert parse_set("a=x=y") == ("a", "x=y")


@pytest.mark.parametrize("text", ["novalue", "=3", "a=[1"])
def test_malformed_set_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--set"):
        parse_set(text)


def test_yaml_off_and_exponents_become_what_was_meant() -> None:
    tree = merge(MINIMAL, {"engine": {"amp": parse_set("a=off")[1]}, "optim": {"lr_per_image": parse_set("a=1e-3")[1]}})
    recipe = validate(Recipe, tree, "recipe")
    assert recipe.engine.amp == "off"
    assert recipe.optim.lr_per_image == 1e-3


def test_a_rule_about_several_keys_names_them_and_no_section() -> None:
    with pytest.raises(UserError, match=r"^the recipe: augment\.mixup .*needs augment\.mosaic above 0$"):
        validate(Recipe, merge(MINIMAL, {"augment": {"mixup": 1.0, "mosaic": 0.0}}), "recipe")


def test_put_makes_sections_and_refuses_to_go_through_a_value() -> None:
    tree: dict = {}
    put(tree, "a.b.c", 1)
    assert tree == {"a": {"b": {"c": 1}}}
    with pytest.raises(UserError, match="is a value"):
        put(tree, "a.b.c.d", 1)


def test_merge_leaves_its_arguments_alone() -> None:
    base = {"a": {"x": 1}, "b": [1]}
    assert merge(base, {"a": {"y": 2}, "b": [2]}) == {"a": {"x": 1, "y": 2}, "b": [2]}
    assert base == {"a": {"x": 1}, "b": [1]}


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"train": {"epocs": 3}}, "unknown key 'train.epocs' .* did you mean 'train.epochs'"),
        ({"train": {"epochs": 0}}, "'train.epochs' .* greater than or equal to 1, got 0"),
        ({"engine": {"amp": "fp15"}}, "'engine.amp' .* 'off', 'bf16' or 'fp16'"),
        ({"trian": {}}, "unknown key 'trian'"),
    ],
)
def test_faults_name_the_key_and_the_remedy(tree: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validate(Recipe, MINIMAL | tree, "recipe")


def test_leaves_are_dotted_and_complete() -> None:
    names = set(leaves(Recipe))
    assert {"train.epochs", "val.backend", "teacher.min_ap", "engine.compile", "data"} <= names
    assert "train" not in names


def test_reading_yaml_refuses_what_is_not_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("- 1\n- 2\n")
    with pytest.raises(UserError, match="mapping"):
        read_yaml(file)
    file.write_text("a: [1\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(file)
    with pytest.raises(UserError, match="cannot read"):
        read_yaml(tmp_path / "absent.yaml")


def test_automatic_lengths_follow_the_run() -> None:
    schedule, val = ScheduleSection(), ValSection()
    assert [schedule.warmup(n) for n in (1, 30, 300)] == [1, 3, 5]
    assert [schedule.final(n) for n in (1, 30, 300)] == [0, 3, 15]
    assert [val.every(n) for n in (1, 30, 300)] == [1, 1, 10]


def test_steps_follow_the_run_unless_they_are_given() -> None:
    schedule = ScheduleSection(kind="step")
    assert [schedule.falls(n) for n in (1, 12, 24, 30, 36)] == [[], [8, 11], [16, 22], [20, 27], [24, 33]]
    assert [schedule.warmup_steps(n) for n in (9, 750, 90_000)] == [0, 75, 500]
    assert schedule.final(12) == 0
    given = ScheduleSection(kind="step", milestones=[2], warmup_iters=7)
    assert (given.falls(12), given.warmup_steps(10), given.falls(1)) == ([2], 7, [2])
    assert "after epoch 8, 11" in schedule.describe(12)
    assert "no falls" in given.describe(2)
    assert "cosine" in ScheduleSection().describe(300)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"kind": "step", "min_lr_ratio": 0.1}, "min_lr_ratio belongs to schedule.kind yolox"),
        ({"gamma": 0.5}, "gamma belongs to schedule.kind step"),
        ({"kind": "step", "milestones": [8, 8]}, "each larger than the one before"),
        ({"kind": "step", "milestones": [0, 8]}, "from 1 to"),
    ],
)
def test_a_key_of_the_other_schedule_is_not_swallowed(keys: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(Recipe, MINIMAL | {"schedule": keys}, "recipe")
