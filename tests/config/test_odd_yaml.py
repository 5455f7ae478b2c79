"""YAML that is sound to the eye and not to a parser, and class names that YAML would take for something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from yoloxkd.assembly.recipes import resolve
from yoloxkd.config.load import parse_set, read_yaml
from yoloxkd.errors import UserError


@pytest.mark.parametrize(
    "text",
    [
        "2024-99-99",
        "!!int x",
        "!!int ''",
        "!!float ''",
        "!!bool x",
        "!!timestamp x",
        "!!int '-'",
        "[" * 3000,
        "9" * 9999,
    ],
)
def test_what_yaml_cannot_make_of_a_value_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"date: {text}\n")
    with pytest.raises(UserError, match=r"x\.yaml is not valid YAML: ."):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="not a value that YAML can read"):
        parse_set(f"train.epochs={text}")


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("[no, on]", ["no", "on"]),
        ("[1.10, 12:30, 010]", ["1.10", "12:30", "010"]),
        ("no", "no"),
        ("[null, [no, null]]", [None, ["no", "null"]]),
    ],
)
def test_names_of_a_teacher_stay_as_typed(typed: str, names: object, tmp_path: Path) -> None:
    assert parse_set(f"teacher.names={typed}") == ("teacher.names", names)
    for text in (f"teacher:\n  names: {typed}\n", f"teacher: {{names: {typed}}}"):
        (tmp_path / "x.yaml").write_text(text)
        assert read_yaml(tmp_path / "x.yaml") == {"teacher": {"names": names}}
    (tmp_path / "x.yaml").write_text(f"set:\n  teacher.names: {typed}\n  val.rect: no\n")
    assert read_yaml(tmp_path / "x.yaml")["set"] == {"teacher.names": names, "val.rect": False}


def test_a_recipe_has_the_names_as_typed() -> None:
    recipe = resolve(student="yolox-nano", teacher=["yolox-s"], sets=["teacher.names=[no, on]"])
    assert recipe.teacher.names == [["no", "on"]]
