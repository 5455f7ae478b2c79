"""A result is of the method, the split, the data, the teacher and the starting weights that the study names, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_toy
from tests.study.conftest import SETTINGS, definition
from tests.study.fakes import Study, begin, checkpoint
from yoloxkd.assembly.models import read_weights
from yoloxkd.assembly.recipes import resolve
from yoloxkd.cli import run as command
from yoloxkd.errors import UserError
from yoloxkd.study.origins import AtHand
from yoloxkd.study.plan import Key

pytestmark = pytest.mark.slow
NONE, PGD, TEACHER = Key("nano", "none", 0), Key("nano", "pgd", 0), Key("teacher", "teacher", 0)
TRAINED = {"train": {"student": "yolox-nano", "epochs": 2, "seed": 0}}
NEW_KEYS = ("data_digests", "start_digest", "teacher_weights", "teacher_settings", "teacher_start")


def model(path: Path, *, seed: int, width: float = 0.125) -> str:
    checkpoint(path, resolve(student="yolox-nano", sets=SETTINGS | {"student.width": width}), seed=seed)
    return str(path)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Plain and PGD by a teacher from a file, on data of its own."""
    data = write_toy(tmp_path / "data")
    return Study(tmp_path, monkeypatch, definition(data, model(tmp_path / "teacher.pt", seed=11)))


def forget(study: Study, run: str) -> None:
    """Make a kept result one of a version that kept no digests."""
    study.change(run, lambda about: [about.pop(key, None) for key in NEW_KEYS])


@pytest.mark.parametrize(
    ("kd", "sentence"), [("fgd", "kd pgd instead of kd fgd"), (["pgd", "fgd"], r"kd pgd instead of kd fgd\+pgd")]
)
def test_a_result_of_another_method_is_refused(study: Study, kd: Any, sentence: str) -> None:
    study.run()
    study.definition["methods"]["pgd"]["kd"] = kd
    with pytest.raises(UserError, match=rf"nano/pgd-s0 .* other settings \({sentence}\)"):
        study.runner()
    with pytest.raises(UserError, match=rf"begun with other settings \({sentence}\)"):
        study.run(results=study.folder / "empty")


def test_a_plain_result_under_the_name_of_a_distilled_one_is_refused(study: Study) -> None:
    study.definition["methods"] = {"none": None, "pgd": {"note": "plain"}}
    study.run()
    study.definition["methods"]["pgd"] = {"kd": "pgd"}
    with pytest.raises(UserError, match="kd none instead of kd pgd"):
        study.runner()
    with pytest.raises(UserError, match="kd none instead of kd pgd"):
        study.run(results=study.folder / "empty")


def test_a_key_that_only_one_version_has_is_no_difference(study: Study) -> None:
    study.run()
    study.change("nano/pgd-s0", lambda about: about["settings"].pop("kd.pgd.alpha"))
    study.change("nano/none-s0", lambda about: about["settings"].update({"kept.no.more": 1}))
    assert study.runner().missing() == []


def screen(study: Study, on: bool) -> None:
    study.definition |= {"report": "val" if on else "test", "screening": on}


def test_a_run_kept_of_another_split_is_measured_again_and_not_trained(study: Study) -> None:
    screen(study, True)
    assert len(study.run().measured) == 3
    assert study.about("nano/pgd-s0")["split"] == "val"
    screen(study, False)
    commands = study.run()
    assert commands.trained == []
    assert sorted(commands.measured) == [("none-s0", "test"), ("pgd-s0", "test"), ("teacher", "test")]
    assert study.about("nano/pgd-s0")["split"] == "test"
    assert study.runner().records[PGD].metrics["AP"] == 0.55
    assert study.run().measured == []


def test_a_run_kept_of_another_split_is_refused_where_it_is_gone(study: Study) -> None:
    screen(study, True)
    study.run()
    screen(study, False)
    shutil.rmtree(study.out / "nano" / "pgd-s0")
    with pytest.raises(UserError, match=r"nano/pgd-s0 .* \(reported on 'val' instead of 'test'\); give another"):
        study.runner()
    for file in study.results.glob("tiny/**/run.json"):  # rows of summary.csv alone say no split
        file.unlink()
    (study.results / "summary.csv").write_text(
        "study,student,method,seed,epochs,AP,AP50,AP75,APs,APm,APl,seconds\ntiny,nano,pgd,0,1,.5,.5,.5,.5,.5,.5,1\n"
    )
    assert list(study.runner().records) == [PGD]


def test_collect_keeps_no_measurement_of_another_split(study: Study) -> None:
    screen(study, True)
    study.run()
    shutil.rmtree(study.results)
    screen(study, False)
    assert study.runner().collect() == {}
    screen(study, True)
    assert set(study.runner().collect()) == {NONE, PGD, TEACHER}


def change_annotation(study: Study, split: str) -> None:
    file = study.folder / "data" / "annotations" / f"{split}.json"
    value = json.loads(file.read_text())
    value["annotations"][0]["bbox"][2] += 1
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_result_of_other_data_is_refused(study: Study, split: str) -> None:
    study.run()
    assert set(study.about("nano/none-s0")["data_digests"]) == {"train", "val", "test"}
    change_annotation(study, split)
    with pytest.raises(UserError, match=rf"other settings \(other images or annotations in '{split}'\)"):
        study.runner()
    for run in ("teacher", "nano/none-s0", "nano/pgd-s0"):
        forget(study, run)
    assert study.runner().missing() == []


def test_data_that_moved_is_the_same_and_data_that_is_gone_is_not_compared(study: Study) -> None:
    study.run()
    shutil.move(study.folder / "data", study.folder / "moved")
    assert study.runner().missing() == []
    study.definition["data"] = str(study.folder / "moved" / "data.yaml")
    assert study.runner().missing() == []
    assert set(study.runner(results=study.folder / "empty").collect()) == {NONE, PGD, TEACHER}


def test_the_digest_of_a_run_that_read_masks_is_known_again(tmp_path: Path) -> None:
    data = str(write_toy(tmp_path / "data", masks=True))
    plain, masks = (AtHand().data(data, "val", masks=read) for read in (False, True))
    assert plain is not None
    assert masks is not None
    assert plain != masks
    assert all(AtHand().same_data(data, "val", digest) for digest in (plain, masks))
    assert not AtHand().same_data(data, "train", masks)


def test_a_run_begun_on_other_data_does_not_go_on(study: Study) -> None:
    study.run()
    change_annotation(study, "train")
    with pytest.raises(UserError, match=r"begun with other settings \(other images or annotations in 'train'\)"):
        study.run(results=study.folder / "empty")


def test_a_measurement_of_other_data_is_made_again(study: Study) -> None:
    study.run()
    change_annotation(study, "test")
    commands = study.run(results=study.folder / "empty")
    assert commands.trained == []
    assert len(commands.measured) == 3


def test_results_of_another_teachers_file_are_refused(study: Study) -> None:
    study.run()
    shutil.copy(study.folder / "teacher.pt", study.folder / "copy.pt")
    study.definition["teacher"] = {"file": str(study.folder / "copy.pt")}
    assert study.runner().missing() == []
    study.definition["teacher"] = {"file": model(study.folder / "other.pt", seed=12)}
    with pytest.raises(UserError, match=r"the result of teacher .* \(another teacher\)"):
        study.runner()
    shutil.rmtree(study.results / "tiny" / "teacher")
    with pytest.raises(UserError, match=r"the result of nano/pgd-s0 .* \(another teacher\)"):
        study.runner()
    forget(study, "nano/pgd-s0")  # the digest of the file alone is known, as of version 0.2.0
    with pytest.raises(UserError, match=r"the result of nano/pgd-s0 .* \(another teacher\)"):
        study.runner()
    with pytest.raises(UserError, match=r"pgd-s0 holds a run that was begun with other settings \(another teacher\)"):
        study.run(results=study.folder / "empty")
    study.definition["teacher"] = {"file": str(study.folder / "gone.pt")}
    assert study.runner().missing() == []


def test_the_measurement_of_another_teachers_file_is_not_its_own(study: Study) -> None:
    study.run()
    shutil.rmtree(study.out / "nano")
    study.definition["teacher"] = {"file": model(study.folder / "other.pt", seed=12)}
    assert ("teacher", "test") in study.run(results=study.folder / "empty").measured


def test_results_under_a_teacher_trained_otherwise_are_refused(study: Study) -> None:
    study.definition["teacher"] = json.loads(json.dumps(TRAINED))
    study.run()
    study.definition["teacher"]["train"]["epochs"] = 3
    with pytest.raises(UserError, match=r"the result of teacher .* \(epochs 2 instead of 3"):
        study.runner()
    shutil.rmtree(study.results / "tiny" / "teacher")
    with pytest.raises(UserError, match=r"nano/pgd-s0 .* \(the teacher's train.epochs 2 instead of 3\)"):
        study.runner()
    study.definition["teacher"] = {"file": str(study.folder / "teacher.pt")}
    with pytest.raises(UserError, match=r"nano/pgd-s0 .* \(another teacher\)"):
        study.runner()
    study.definition["teacher"] = {"file": str(study.out / "teacher" / "best.pt")}
    assert study.runner().missing() == []


def test_a_run_begun_under_one_teacher_does_not_go_on_under_another(study: Study) -> None:
    study.definition["teacher"] = TRAINED
    runner = study.runner()
    run = runner.runs[PGD]
    assert run.recipe is not None
    model(Path(runner.runs[TEACHER].best), seed=7)
    begin(run.folder, run.recipe)
    runner._check_begun(run)
    for teacher in ("self", "untrained"):
        study.definition["methods"]["pgd"]["teacher"] = teacher
        other = study.runner()
        with pytest.raises(UserError, match=r"pgd-s0 holds a run that was begun with other settings .*another teacher"):
            other._check_begun(other.runs[PGD])


def test_results_from_other_starting_weights_are_refused(study: Study) -> None:
    study.definition["students"] = {"nano": model(study.folder / "start.pt", seed=1)}
    study.run()
    model(study.folder / "start.pt", seed=2)
    with pytest.raises(UserError, match=r"nano/none-s0 .* \(other starting weights\)"):
        study.runner()
    model(study.folder / "start.pt", seed=1)
    assert study.runner().missing() == []
    study.definition["students"] = {"nano": model(study.folder / "second.pt", seed=2)}
    with pytest.raises(UserError, match=r"none-s0 holds a run that was begun .* \(other starting weights\)"):
        study.run(results=study.folder / "empty")


def test_the_untrained_teacher_is_made_anew_for_another_teacher(study: Study) -> None:
    study.definition["methods"] = {"none": None, "random": {"kd": "pgd", "teacher": "untrained"}}
    study.run()
    file, kept = study.out / "untrained-teacher.pt", (study.out / "untrained-teacher.pt").read_bytes()
    shutil.rmtree(study.out / "nano")
    shutil.rmtree(study.results)
    study.run()
    assert file.read_bytes() == kept
    assert study.said.count(f"{file} is of another teacher and is made anew") == 0
    shutil.rmtree(study.out / "nano")
    shutil.rmtree(study.results)
    study.definition["teacher"] = {"file": model(study.folder / "wide.pt", seed=3, width=0.25)}
    study.run()
    assert read_weights(str(file)).section["width"] == 0.25
    assert f"{file} is of another teacher and is made anew" in study.said
    study.definition["teacher"] = {"file": str(study.folder / "teacher.pt")}
    shutil.rmtree(study.results / "tiny" / "teacher")
    with pytest.raises(UserError, match=r"nano/random-s0 .* \(another teacher\)"):
        study.runner()


def test_a_teacher_whose_best_is_gone_is_trained_again_and_its_folder_kept(study: Study) -> None:
    study.definition |= {"teacher": TRAINED, "methods": {"none": None, "own": {"kd": "pgd", "teacher": "self"}}}
    study.run()
    for number in ("", "-2"):
        (study.out / "nano" / "none-s0" / "best.pt").unlink()
        assert study.runner().missing() == []  # nobody needs it
        shutil.rmtree(study.out / "nano" / "own-s0")
        shutil.rmtree(study.results / "tiny" / "nano" / "own-s0")
        commands = study.run()
        assert commands.trained == ["none-s0", "own-s0"]
        assert commands.measured == [("none-s0", "test"), ("own-s0", "test")]
        old = study.out / "nano" / f"none-s0.previous{number}"
        assert (old / "metrics.json").is_file()
        assert study.said[-3].endswith(f"has no best.pt any more and is trained again; what was left of it is in {old}")


def test_the_best_so_far_of_a_training_under_way_teaches_nobody(study: Study) -> None:
    study.definition["teacher"] = TRAINED
    study.run()
    (study.out / "teacher" / "metrics.json").unlink()
    (study.out / "teacher" / "last.pt").touch()
    shutil.rmtree(study.results / "tiny" / "nano" / "pgd-s0")
    shutil.rmtree(study.out / "nano" / "pgd-s0")
    assert [run.key for run in study.runner().missing()] == [TEACHER, PGD]


def test_a_run_goes_on_where_the_data_are_now(study: Study) -> None:
    runner = study.runner()
    run = runner.runs[NONE]
    run.folder.mkdir(parents=True)
    (run.folder / "last.pt").touch()
    words = runner._training(run)
    assert words[words.index("--data") + 1] == study.definition["data"]


LACKS: list[tuple[dict[str, Any], str]] = [
    ({}, r"has train, val and no 'test', which study tiny reports; give data .* 'report: val' with 'screening: true'"),
    ({"choose": "test", "report": "val"}, r"no 'test', which study tiny chooses the best epochs by"),
]


@pytest.mark.parametrize(("change", "sentence"), LACKS)
def test_a_split_that_is_not_there_is_said_before_the_first_run(
    study: Study, change: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml_file = study.folder / "data" / "data.yaml"
    yaml_file.write_text("".join(line for line in yaml_file.open() if not line.startswith("test:")))
    study.definition |= change
    with pytest.raises(UserError, match=sentence):
        study.run()
    assert not study.out.exists()
    assert command(["study", str(study.folder / "study.yaml"), "--out", str(study.out), "--dry-run"]) == 2
    assert "no 'test', which study tiny" in capsys.readouterr().err
    assert study.runner().collect() == {}
    study.definition |= {"choose": "val", "report": "val", "screening": True}
    assert len(study.run().trained) == 2


def test_data_that_is_not_there_is_said_before_the_first_run_and_not_by_a_dry_run(study: Study) -> None:
    study.definition["data"] = str(study.folder / "nowhere.yaml")
    with pytest.raises(UserError, match="there is no data YAML"):
        study.run()
    study.runner().check_data(if_here=True)
