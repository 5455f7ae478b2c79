"""Keys of earlier versions are read under their old spelling, with a note."""

from __future__ import annotations

import logging

import pytest

from yoloxkd.assembly.recipes import resolve
from yoloxkd.config import renamed
from yoloxkd.config.renamed import current_keys
from yoloxkd.errors import UserError
from yoloxkd.kd.methods.mgd import MGDConfig
from yoloxkd.kd.methods.pgd import PGDConfig
from yoloxkd.nn.dense.atss import ATSSConfig
from yoloxkd.nn.dense.fcos import FCOSConfig


@pytest.fixture(autouse=True)
def fresh_notes() -> None:
    renamed._note.cache_clear()


def test_options_of_the_command_line(caplog: pytest.LogCaptureFixture) -> None:
    sets = ["student.centre_sampling=false", "augment.grey=0.25"]
    with caplog.at_level(logging.WARNING):
        recipe = resolve(student="fcos-mobilenetv2", data="shapes", sets=sets)
    assert recipe.student.config.model_dump()["center_sampling"] is False
    assert recipe.augment.gray == 0.25
    assert [r.getMessage() for r in caplog.records] == [
        "key 'student.centre_sampling' is now called 'student.center_sampling'; the old name will go",
        "key 'augment.grey' is now called 'augment.gray'; the old name will go",
    ]


def test_a_method_s_key_with_and_without_its_section() -> None:
    for key in ("kd.hidden", "kd.mgd.hidden", "kd.mask_ratio"):
        recipe = resolve(student="yolox-nano", teacher=["yolox-s"], kd=["mgd"], data="shapes", sets=[f"{key}=0.5"])
        assert recipe.kd["mgd"].model_dump()["mask_ratio"] == 0.5


def test_a_recipe_file(tmp_path, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "old.yaml"
    path.write_text(
        "student: {name: fcos-mobilenetv2, centreness_on_reg: false}\naugment: {grey: 0.5}\nkd: {mgd: {hidden: 0.1}}\n"
        "teacher: {models: [yolox-s]}\n"
    )
    recipe = resolve(recipe=str(path), data="shapes")
    assert recipe.student.config.model_dump()["centerness_on_reg"] is False
    assert (recipe.augment.gray, recipe.kd["mgd"].model_dump()["mask_ratio"]) == (0.5, 0.1)
    assert len(caplog.records) == 3


def test_the_old_and_the_new_key_in_one_place_are_not_merged() -> None:
    recipe = resolve(student="fcos-mobilenetv2", data="shapes", sets={"augment.grey": 0.1, "augment.gray": 0.2})
    assert recipe.augment.gray == 0.2  # the later one wins, as for a key given twice


def test_sections_of_older_checkpoints() -> None:
    always = {"backbone": "resnet18", "frozen_stages": 0, "norm_eval": False}
    assert not FCOSConfig.model_validate(always | {"centre_sampling": False}).center_sampling
    assert ATSSConfig.model_validate(always | {"quality": "centreness"}).quality == "centerness"
    assert MGDConfig.model_validate({"hidden": 0.5}).mask_ratio == 0.5
    assert PGDConfig(foreground="center").foreground == "centre"  # type: ignore[arg-type]


def test_other_keys_stay_unknown() -> None:
    with pytest.raises(UserError, match=r"unknown key 'student\.centre_smapling'"):
        resolve(student="fcos-mobilenetv2", data="shapes", sets=["student.centre_smapling=false"])


def test_names_that_mean_something_else_elsewhere_are_left_alone() -> None:
    tree = {"train": {"grey": 1}, "student": {"hidden": 2}}
    assert current_keys(tree) == tree
