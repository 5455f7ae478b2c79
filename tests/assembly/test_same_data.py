"""A resumed run compares its data with those it was trained on."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, write_toy
from tests.engine.runs import StopAt
from yoloxkd import Trainer
from yoloxkd.cli import run
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.fingerprint import changed, fingerprint
from yoloxkd.errors import Interrupted, UserError


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and a `run` on it that was interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("begun")
    toy = write_toy(folder / "data", images=4)
    options: dict[str, Any] = {"epochs": 2, "batch": 2, "imgsz": 64, "device": "cpu", "set": TINY | {"val.interval": 1}}
    with pytest.raises(Interrupted):
        Trainer("yolox-nano", data=str(toy), out=folder / "run", callbacks=[StopAt(3)], **options).fit()
    return folder


@pytest.fixture
def copy(begun: Path, tmp_path: Path) -> Path:
    """The same, in another place: the checkpoint still names the old one."""
    shutil.copytree(begun, tmp_path / "copy")
    return tmp_path / "copy"


def resume(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and what was said."""
    data = folder / "data" / "data.yaml"
    status = run(["train", "--resume", str(folder / "run"), "--data", str(data)])
    output = capsys.readouterr()
    return status, output.out + output.err


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("[blue, red]", "class 0 was 'red' and is 'blue', which is another order"),
        ("[red, blue, green]", "2 classes then and 3 now (such as 'green')"),
        ("[red]", "2 classes then and 1 now (such as 'blue')"),
    ],
)
@pytest.mark.parametrize("digest", [True, False])
def test_other_classes_are_refused(
    names: str, words: str, digest: bool, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy / "data" / "data.yaml"
    file.write_text(re.sub("names: .*", f"names: {names}", file.read_text()))
    annotations = copy / "data" / "annotations" / "train.json"
    content = json.loads(annotations.read_text())
    content["categories"].append({"id": 9, "name": "green"})
    annotations.write_text(json.dumps(content))
    if not digest:
        without_digest(copy)
    before = (copy / "run" / "last.pt").read_bytes()
    status, output = resume(copy, capsys)
    assert status == 2
    assert words in output
    assert f"--student {copy / 'run' / 'last.pt'}" in output
    assert (copy / "run" / "last.pt").read_bytes() == before


def without_digest(folder: Path) -> None:
    """The checkpoint as version 0.1.0 wrote it."""
    value = torch.load(folder / "run" / "last.pt", weights_only=True)
    del value["data"]
    torch.save(value, folder / "run" / "last.pt")


def test_a_moved_data_set_is_the_same(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = resume(copy, capsys)
    assert status == 0
    assert "changed" not in output
    assert "digest" not in output


def test_what_changed_is_said(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "data" / "annotations" / "train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] += 2
    file.write_text(json.dumps(content))
    file = copy / "data" / "annotations" / "val.json"
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][1:]
    file.write_text(json.dumps(content))
    status, output = resume(copy, capsys)
    assert status == 0
    assert "'train' had other annotations or image files, as many as before" in output
    assert re.search(r"'val' had \d+ objects, now \d+; .*AP before and after", output)
    assert "the data changed since" in (copy / "run" / "train.log").read_text()


def test_a_checkpoint_without_a_digest_goes_on_and_says_so(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without_digest(copy)
    status, output = resume(copy, capsys)
    assert status == 0
    assert "only the class names were compared" in output


def test_data_that_are_gone_name_the_way_on(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun / "run", tmp_path / "run")
    value = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    value["recipe"]["data"] = str(tmp_path / "gone.yaml")
    torch.save(value, tmp_path / "run" / "last.pt")
    with pytest.raises(UserError, match=r"gone\.yaml.*--resume .*run --data FILE"):
        Trainer(resume=tmp_path / "run").fit()


def test_a_fingerprint_sees_content_and_not_places(begun: Path, copy: Path) -> None:
    data = load_split(find_data(begun / "data" / "data.yaml"), "train")
    first = fingerprint(data)
    assert changed(first, fingerprint(load_split(find_data(copy / "data" / "data.yaml"), "train"))) == ""
    assert changed(first, fingerprint(replace(data, image_ids=data.image_ids + 100))) == ""
    for other in (
        replace(data, labels=1 - data.labels),
        replace(data, crowd=~data.crowd),
        replace(data, boxes=data.boxes + 0.5),
        replace(data, paths=[path.replace(".png", ".jpg") for path in data.paths]),
    ):
        assert changed(first, fingerprint(other))
    assert changed(first, fingerprint(data.head(3))).startswith("4 images, now 3")


def test_a_best_student_that_is_gone_is_kept_anew(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "run" / "best.pt").unlink()
    status, output = resume(copy, capsys)
    assert status == 0
    assert "is not there any more" in output
    assert (copy / "run" / "best.pt").is_file()
    assert json.loads((copy / "run" / "metrics.json").read_text())["epoch"] == 2
