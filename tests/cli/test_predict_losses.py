"""`yoloxkd predict` loses nothing: no source, no label, no result of a good image beside a bad one."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.cli.conftest import put_image, put_video
from tests.cli.test_mistakes import refused
from yoloxkd import Detector, Trainer
from yoloxkd.cli import run
from yoloxkd.cli.prediction_paths import free_targets, split_model
from yoloxkd.cli.sources import Source
from yoloxkd.data.data_spec import find_data, load_split


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict(model: Path, *arguments: object) -> int:
    return run(["predict", str(model), *map(str, arguments)])


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_sources_labels_and_images_of_the_user_keep_their_bytes(
    tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_image(Path("photos/a.jpg"))
    put_image(Path("others/a.jpg"), 1)
    put_video(Path("photos/clip.mp4"))
    Path("ds/labels").mkdir(parents=True)
    Path("ds/labels/a.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    Path("background/labels").mkdir(parents=True)
    Path("background/labels/a.txt").touch()
    before = contents()
    for arguments, words in (
        (["photos", "--out", "photos"], ["--out photos is the folder of the images"]),
        (["photos/a.jpg", "--out", "new/../photos"], ["photos/a.jpg is a file that this command reads"]),
        (["photos/clip.mp4", "--out", "photos"], ["photos/clip.mp4 is a file that this command reads"]),
        (["photos/a.jpg", "--out", "others"], ["others/a.jpg is there already"]),
        (["photos/a.jpg", "--out", "ds", "--save-txt"], ["ds/labels/a.txt is there already"]),
        (["photos/a.jpg", "--out", "background", "--save-txt"], ["background/labels/a.txt is there already"]),
        (["photos/a.jpg", "--out", "out", "--json", "photos/a.jpg"], ["--json photos/a.jpg"]),
        (["photos/a.jpg", "--out", "out", "--coco", tiny_file], ["tiny.onnx is a file that this command reads"]),
        (["photos/a.jpg", "--out", "out", "--coco", "x.json", "--json", "X.json"], ["are the same file"]),
        (["photos/a.jpg", "--out", "photos/a.jpg"], ["--out photos/a.jpg is a file, not a folder"]),
    ):
        refused(capsys, ["predict", tiny_file, *arguments], *words)
        assert contents() == before


def test_what_predict_wrote_itself_is_replaced(tiny_file: Path) -> None:
    put_image(Path("photos/a.jpg"))
    put_image(Path("photos/b.png"))
    put_video(Path("photos/clip.mp4"), 3)
    for _ in range(2):
        assert predict(tiny_file, "photos", "--out", "out", "--save-txt", "--json", "r.json", "--coco", "c.json") == 0
    assert {cv2.imread(f"out/{name}").shape for name in ("a.jpg", "b.png")} == {(90, 120, 3)}
    assert cv2.VideoCapture("out/clip.mp4").get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert sorted(os.listdir("out")) == ["a.jpg", "b.png", "clip.mp4", "labels"]


def test_no_two_sources_have_one_name() -> None:
    names = ["a/x.jpg", "b/x.jpg", "b/x.png", "b/X.webp", "b/x-2.jpg", "b/clip_000007.jpg", "b/clip_7.jpg"]
    sources = [Source(Path(name), "image") for name in names] + [Source(Path("b/clip.avi"), "video")]
    targets = free_targets(sources, Path("out"))
    texts = [str(t.text(7 if t.source.kind == "video" else None)).casefold() for t in targets]
    files = [str(t.file).casefold() for t in targets]
    assert len(set(texts)) == len(set(files)) == len(names) + 1
    assert files[0] == "out/x.jpg"
    assert files[-2:] == ["out/clip_7.jpg", "out/clip.mp4"]


def test_one_bad_file_does_not_end_it(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "c", "d"):
        put_image(Path(f"p/{name}.png"))
    Path("p/b.png").write_text("no image")
    whole = put_video(Path("p/cut.avi")).read_bytes()
    Path("p/cut.avi").write_bytes(whole[: len(whole) * 2 // 3])
    Path("p/e.mp4").write_bytes(b"no video")
    Path("p/f.png").touch()
    options = ["p", "--out", "out", "--json", "r.json", "--coco", "c.json", "--save-txt"]
    assert predict(tiny_file, *options) == 1
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert last.startswith("yoloxkd: 4 of 7 sources could not be read as a whole: p/b.png, p/cut.avi, p/e.mp4, p/f.png")
    assert "of its 20 frames can be read" in err
    rows = json.loads(Path("r.json").read_text())
    frames = [row["frame"] for row in rows if row["image"] == "p/cut.avi"]
    assert frames == list(range(len(frames)))
    assert 5 < len(frames) < 20
    assert [row["image"] for row in rows if "frame" not in row] == ["p/a.png", "p/c.png", "p/d.png"]
    assert {row["file_name"] for row in json.loads(Path("c.json").read_text())} >= {"p/a.png", "p/d.png"}
    assert cv2.VideoCapture("out/cut.mp4").get(cv2.CAP_PROP_FRAME_COUNT) == len(frames)

    assert predict(tiny_file, "p", "--out", "strict", "--json", "s.json", "--strict") == 2
    assert not Path("s.json").exists()
    assert predict(tiny_file, "p/b.png", "p/f.png", "--out", "none", "--json", "n.json") == 2
    assert "none of the 2 sources could be read" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_was_found(
    number: signal.Signals, tiny_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcd":
        put_image(Path(f"p/{name}.png"))
    calls = []
    whole = Detector.predict

    def counted(self: Detector, *given: object, **options: object) -> object:
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(number)
        return whole(self, *given, **options)

    monkeypatch.setattr(Detector, "predict", counted)
    assert threading.current_thread() is threading.main_thread()
    assert predict(tiny_file, "p", "--out", "out", "--json", "r.json") == 130
    assert "interrupted after 2 of 4 sources" in capsys.readouterr().err
    assert [row["image"] for row in json.loads(Path("r.json").read_text())] == ["p/a.png", "p/b.png"]


def test_saved_text_is_a_data_set_of_ours(tiny_file: Path) -> None:
    put_image(Path("images/a.jpg"))
    put_image(Path("images/b c.png"), 1)
    assert predict(tiny_file, "images", "--out", "out", "--save-txt") == 0
    Path("data.yaml").write_text("names: ['[red]', b]\nval: {images: images, labels: out/labels}\n")
    data = load_split(find_data("data.yaml"), "val")
    assert not len(data.faults)
    found = Detector(tiny_file).predict(["images/a.jpg", "images/b c.png"])
    for index, mine in enumerate(found):
        boxes, labels, _ = data.annotations(index)
        assert len(mine) > 5
        assert boxes == pytest.approx(mine.boxes, abs=1e-3)
        assert labels.tolist() == mine.labels.tolist()
    assert predict(tiny_file, "images", "--out", "out", "--save-txt", "--save-conf") == 0
    rows = [[float(v) for v in line.split()] for line in Path("out/labels/a.txt").read_text().splitlines()]
    assert {len(row) for row in rows} == {6}
    assert [row[5] for row in rows] == pytest.approx(found[0].scores.tolist(), abs=1e-5)


def test_scores_without_text_are_refused(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["predict", tiny_file, put_image(Path("a.jpg")), "--save-conf"], "give --save-txt too")


def test_names_that_are_not_utf8(tiny_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture, clip, out = (os.fsdecode(name) for name in (b"p/caf\xe9 [1].jpg", b"p/v\xe9.avi", b"out\xe9"))
    put_image(Path("plain.jpg"))
    Path("p").mkdir()
    os.rename("plain.jpg", picture)
    os.rename(put_video(Path("plain2.avi"), 4), clip)
    assert (
        predict(tiny_file, "p", "--out", out, "--json", f"{out}/r.json", "--coco", f"{out}/c.json", "--save-txt") == 0
    )
    rows = json.loads(Path(out, "r.json").read_text("utf-8"))
    assert [rows[0]["image"], rows[1]["image"]] == [picture, clip]
    assert sorted(os.listdir(os.fsencode(out))) == sorted(
        [b"caf\xe9 [1].jpg", b"v\xe9.mp4", b"r.json", b"c.json", b"labels"]
    )
    assert b"caf\xe9 [1].txt" in os.listdir(os.fsencode(f"{out}/labels"))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["TINY.ONNX", "model", "model.bin"])
def test_a_model_is_known_by_its_content(name: str, tiny_file: Path) -> None:
    Path(name).write_bytes(tiny_file.read_bytes())
    put_image(Path("a.jpg"))
    assert split_model([name, "a.jpg"]) == (name, ["a.jpg"])
    assert predict(Path(name), "a.jpg", "--out", "out") == 0


def test_python_says_what_cannot_be(tiny_file: Path) -> None:
    detector = Detector(tiny_file)
    picture = np.zeros((9, 9, 3), np.uint8)
    from yoloxkd.errors import UserError

    for options, word in (
        ({"conf": float("nan")}, "conf"),
        ({"conf": "0.5"}, "conf"),
        ({"conf": True}, "conf"),
        ({"iou": 1.5}, "iou"),
        ({"imgsz": "64"}, "imgsz"),
        ({"imgsz": 64.0}, "imgsz"),
        ({"imgsz": 0}, "imgsz 0"),
        ({"imgsz": 10**12}, "imgsz"),
    ):
        with pytest.raises(UserError, match=word):
            detector.predict(picture, **options)
    assert detector.predict([]) == []
    for model in (7, b"x", ["a.pt"], "", "x" * 300, "a\0b"):
        with pytest.raises(UserError, match="the model"):
            Detector(model)
    for name in ("student", "teacher", "data", "out", "recipe", "resume"):
        with pytest.raises(UserError, match=name):
            Trainer(**{name: 7})
        with pytest.raises(UserError, match=name):
            Trainer(**{name: "y" * 300})


def test_labels_that_were_corrected_by_hand_stay(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_image(Path("photos/a.jpg"))
    put_image(Path("photos/b.jpg"), 1)
    command = ["photos", "--out", "out", "--save-txt", "--conf", "0.02"]
    for _ in range(2):
        assert predict(tiny_file, *command) == 0
    assert predict(tiny_file, "photos/b.jpg", *command[1:]) == 0  # what is known of a.txt stays known
    corrected = Path("out/labels/a.txt")
    for correction in ("", "0 0.5 0.5 0.25 0.25\n"):
        corrected.write_text(correction)
        before = contents()
        refused(capsys, ["predict", tiny_file, *command], "--save-txt out/labels/a.txt is there already")
        assert contents() == before
    assert predict(tiny_file, "photos/b.jpg", *command[1:]) == 0
    assert predict(tiny_file, "photos", "--out", "out") == 0  # the labels are not written
    assert corrected.read_text() == "0 0.5 0.5 0.25 0.25\n"
