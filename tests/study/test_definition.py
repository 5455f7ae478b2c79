"""What a study's YAML may say, what is refused and in which words, and the runs that come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.study.conftest import write
from yoloxkd.config.files import cfg_names
from yoloxkd.errors import UserError
from yoloxkd.study.definition import Definition, Grid, read_study
from yoloxkd.study.pages import check_report_paths, write_report
from yoloxkd.study.plan import Key, differences, plan
from yoloxkd.study.runner import Runner

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"epoch": 3}, "unknown key 'epoch' in the study study.yaml; did you mean 'epochs'"),
    ({"methods": {"none": None, "pgd": {"kd": "pgd", "seting": {}}}}, "unknown key 'methods.pgd.seting'"),
    ({"methods": {"none": None, "x": {"kd": "fgdd"}}}, "method 'x' .* unknown distiller 'fgdd'; did you mean 'fgd'"),
    ({"methods": {"pgd": {"kd": "pgd"}}}, "no plain baseline .* no method of the study trains without kd"),
    ({"baseline": "pgd"}, "no plain baseline .* 'baseline' is 'pgd', and it should be one of none"),
    ({"teacher": None}, "method 'pgd' .* needs a teacher, and the study gives none"),
    ({"teacher": {"file": "a.pt", "train": {"student": "yolox-nano"}}}, "either 'file' or 'train', and not both"),
    ({"choose": "test"}, "chooses and reports on the same split"),
    ({"seeds": []}, "key 'seeds'"),
    ({"students": {"a/b": "yolox-nano"}}, "names become folders"),
    ({"students": {"teacher": "yolox-nano"}}, "teacher's own row"),
    ({"students": {"nano": "yolox-nano", "Nano": "yolox-s"}}, "students 'nano' and 'Nano', whose folders are one"),
    ({"name": "summary"}, r"summary\.csv is the table of all studies"),
    ({"methods": {"none": {"teacher": "self"}}}, "method 'none' .* has a teacher and no kd"),
    ({"grids": {"g": {"methods": ["none", "pdg"]}}}, "grid 'g' .* the method 'pdg'; did you mean 'pgd'"),
    ({"grids": {"g": {"methods": ["pgd"]}}}, "grid 'g' .* has no baseline 'none' for student 'nano' and seed 0"),
    ({"grids": {"g": {"methods": ["none"], "baseline": "pgd"}}}, "grid 'g' .* baseline 'pgd', which is none of its"),
    ({"seeds": [0, 1, 1]}, r"'seeds' of the study study\.yaml names 1 twice, and its runs would be counted twice"),
    ({"grids": {"g": {"seeds": [2, 0, 2]}}}, "'seeds' of grid 'g' in the study .* names 2 twice"),
    ({"grids": {"g": {"methods": ["none", "pgd", "none"]}}}, "'methods' of grid 'g' in the study .* names none twice"),
    ({"grids": {"g": {"students": ["nano", "nano"]}}}, "'students' of grid 'g' in the study .* names nano twice"),
]


@pytest.mark.parametrize(("change", "sentence"), MISTAKES)
def test_mistakes_are_one_sentence(tiny: dict[str, Any], tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_study(write(tmp_path, tiny | change))


def test_a_grid_with_its_own_baseline_needs_no_other(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["methods"] = {
        "none": None,
        "longer": {"epochs": 2},
        "pgd": {"kd": "pgd"},
        "own": {"kd": "pgd", "teacher": "self"},
    }
    tiny["grids"] = {"g": {"methods": ["longer", "pgd"], "baseline": "longer"}}
    runs = plan(read_study(write(tmp_path, tiny)), tmp_path)
    assert {key.path for key in runs} == {"teacher", "nano/longer-s0", "nano/pgd-s0"}
    tiny["grids"]["g"]["methods"].append("own")  # its teacher is the plain student
    with pytest.raises(UserError, match=r"grid 'g' .* has no baseline 'none' for student 'nano' and seed 0"):
        read_study(write(tmp_path, tiny))


def test_a_mistake_in_any_recipe_is_found_before_the_first_run(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["methods"]["pgd"] = {"kd": "pgd", "settings": {"kd.alhpa": 1}}
    with pytest.raises(UserError, match=r"run nano/pgd-s0 of study tiny: unknown key 'kd\.alhpa'"):
        plan(read_study(write(tmp_path, tiny)), tmp_path)


def test_unknown_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no study 'bcd'.*did you mean 'bccd'"):
        read_study("bcd")


def test_order_and_contents_of_the_runs(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["methods"] = {
        "pgd": {"kd": "pgd", "settings": {"kd.alpha": 0.5}},
        "longer": {"epochs": 2},
        "none": None,
        "own": {"kd": ["pgd", "fgd"], "teacher": "self"},
        "random": {"kd": "fgd", "teacher": "untrained"},
    }
    tiny["grids"] = {
        "main": {"methods": ["pgd", "none"], "seeds": [3, 4]},
        "more": {"methods": ["none", "longer", "own", "random"], "seeds": [3]},
    }
    runs = plan(read_study(write(tmp_path, tiny)), tmp_path, {"workers": 1})
    order = [
        "teacher",
        *(f"nano/{r}" for r in ("none-s3", "pgd-s3", "none-s4", "pgd-s4", "longer-s3", "own-s3", "random-s3")),
    ]
    assert [key.path for key in runs] == order
    at = {key.path: run for key, run in runs.items()}
    pgd, own, random = (at[f"nano/{name}-s3"] for name in ("pgd", "own", "random"))
    assert at["teacher"].recipe is None
    assert pgd.recipe
    assert own.recipe
    assert random.recipe
    assert pgd.recipe.kd["pgd"].model_dump()["alpha"] == 0.5
    assert pgd.recipe.train.seed == 3
    assert pgd.recipe.engine.workers == 1
    assert pgd.recipe.teacher.models == [tiny["teacher"]["file"]]
    assert at["nano/none-s3"].recipe.kd == {}  # type: ignore[union-attr]
    assert at["nano/none-s3"].recipe.teacher.models == []  # type: ignore[union-attr]
    assert at["nano/longer-s3"].epochs == 2
    assert list(own.recipe.kd) == ["pgd", "fgd"]
    assert own.recipe.teacher.models == [str(tmp_path / "nano" / "none-s3" / "best.pt")]
    assert own.needs == [Key("nano", "none", 3)]
    assert random.recipe.teacher.min_ap == 0
    # plain and distilled differ in nothing but the distillation
    others = differences(pgd.settings, at["nano/none-s3"].settings)
    assert others[0] == "kd pgd instead of kd none"
    assert all(text.startswith("teacher") for text in others[1:])
    assert str(tmp_path) not in str(pgd.settings)
    assert pgd.settings["engine.amp"] == "off"
    assert "engine.workers" not in pgd.settings  # samples do not depend on it


def test_a_trained_teacher_is_a_run_of_its_own(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["teacher"] = {"train": {"student": "yolox-nano", "epochs": 2, "seed": 7, "settings": {"student.width": 0.25}}}
    runs = plan(read_study(write(tmp_path, tiny)), tmp_path)
    teacher = next(iter(runs.values()))
    assert teacher.recipe is not None
    assert (teacher.recipe.train.epochs, teacher.recipe.train.seed, teacher.folder) == (2, 7, tmp_path / "teacher")
    pgd = runs[Key("nano", "pgd", 0)]
    assert pgd.needs == [teacher.key]
    assert pgd.recipe is not None
    assert pgd.recipe.teacher.models == [str(tmp_path / "teacher" / "best.pt")]


@pytest.mark.parametrize("name", cfg_names("studies"))
def test_shipped_studies_resolve(name: str, tmp_path: Path) -> None:
    study = read_study(name)
    parts: list[Definition | Grid] = [study, *study.grids.values()]
    for grid in parts:  # a seed changes nothing of what is resolved
        grid.seeds = grid.seeds and grid.seeds[:1]
    runs = plan(study, tmp_path)
    assert {key.student for key in runs} >= set(study.students)
    assert {key.method for key in runs} >= set(study.methods)
    assert not study.screening or study.report == "val"  # the test split is left alone


def test_a_screening_reports_the_split_that_chooses(tiny: dict[str, Any], tmp_path: Path) -> None:
    alike = {"choose": "val", "report": "val"}
    with pytest.raises(UserError, match=r"a study that only chooses a setting says so: screening: true"):
        read_study(write(tmp_path, tiny | alike))
    with pytest.raises(UserError, match=r"reports on 'test'; set report to val, or leave screening out"):
        read_study(write(tmp_path, tiny | {"screening": True}))
    study = read_study(write(tmp_path, tiny | alike | {"screening": True}))
    page, *_ = write_report(study, {}, tmp_path / "results")
    assert "these numbers are too good" in page.read_text()


def test_the_tables_of_a_study_replace_only_their_own(tiny: dict[str, Any], tmp_path: Path) -> None:
    study = read_study(write(tmp_path, tiny))
    results = tmp_path / "results"
    results.mkdir()
    for name, own in (
        ("tiny.md", "# Study tiny\n"),
        ("tiny.csv", "grid,student,method,x\n"),
        ("summary.csv", "study,student,method,x\n"),
    ):
        (results / name).write_text("the user's\n")
        with pytest.raises(UserError, match=f"{name} is there already"):
            check_report_paths(study, tmp_path / "out", results, [])
        (results / name).write_text(own)
    check_report_paths(study, tmp_path / "out", results, [])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder"):
        check_report_paths(study, tmp_path / "file", results, [])
    assert not (tmp_path / "out").exists()


def test_runs_whose_names_join_to_the_same_words_keep_apart(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["students"] = {"a": "yolox-nano", "a-b": "yolox-nano"}
    tiny["methods"] = {"none": None, "b-c": {"kd": "pgd"}, "c": {"kd": "pgd"}}
    study = read_study(write(tmp_path, tiny))
    runs = plan(study, tmp_path)
    runner = Runner(study, runs, tmp_path, tmp_path / "results")
    begun = [runner._training(run) for run in runs.values() if run.recipe is not None]
    recipes = [command[command.index("--recipe") + 1] for command in begun]
    assert len(set(recipes)) == len(recipes)
    assert all(Path(recipe).is_file() for recipe in recipes)
