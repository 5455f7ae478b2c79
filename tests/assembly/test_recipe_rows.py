"""The rows of the papers' comparisons are recipes: the pair and schedule of a shipped one, with another method."""

from __future__ import annotations

import pytest

from yoloxkd.assembly.recipe_rows import Row, recipe_rows, written_rows
from yoloxkd.assembly.recipes import recipe_names, resolve
from yoloxkd.cli.run_tables import describe
from yoloxkd.config.files import cfg_names
from yoloxkd.errors import UserError
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.defaults import kd_defaults


@pytest.mark.parametrize("name", recipe_rows())
def test_a_row_is_its_recipe_with_another_method(name: str) -> None:
    row, recipe = recipe_rows()[name], resolve(recipe=name)
    like = resolve(recipe=row.like)
    assert recipe.kd.keys() == row.methods.keys() != like.kd.keys() or name.endswith("-fgd")
    assert recipe.model_dump(exclude={"kd"}) == like.model_dump(exclude={"kd"})
    assert recipe.teacher.models
    for method, keys in recipe.kd.items():
        family = recipe.student.name.rpartition("-")[0]
        wanted = DISTILLERS[method].Config.model_validate(kd_defaults(method, family) | row.methods[method])
        assert DISTILLERS[method].Config.model_validate(keys) == wanted


def test_every_written_row_names_methods_and_keys_that_there_are() -> None:
    for row in written_rows().values():
        for method, keys in row.methods.items():
            DISTILLERS[method].Config.model_validate(keys)
    assert all(row.like in cfg_names("recipes") for row in recipe_rows().values())
    assert {name for name in written_rows() if name.startswith("pgd-table1-fcos-")} <= set(recipe_names())


def test_show_prints_the_row_and_what_it_reproduces() -> None:
    shown = describe("pgd-table1-gfl-frs")
    assert "# PGD (ECCV 2022), Table 1, AP on COCO: student 40.2, with frs 42.2" in shown
    assert "alpha: 0.1" in shown
    assert "gfl-r101@coco" in shown


def test_two_methods_at_once() -> None:
    row = Row("pgd-gfl-r101-r50", {"ld": {}, "gid": {"k": 5}}, "a paper", "40.2", "44")
    assert row.describe() == "a paper: student 40.2, with ld and gid 44"
    assert row.tree()["kd"] == {"ld": {}, "gid": {"k": 5}}


def test_a_row_that_is_misspelt_is_answered() -> None:
    with pytest.raises(UserError, match="did you mean 'pgd-table1-gfl-frs'"):
        resolve(recipe="pgd-table1-gfl-fsr")
