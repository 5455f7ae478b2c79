"""Class names: as typed in the data YAML, the same after every conversion, and not contradicted by a file nearby."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from yoloxkd.cli import run
from yoloxkd.data.convert import convert_data
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.formats.class_files import KIND
from yoloxkd.errors import UserError

TYPED = ["no", "on", "1.10", "010", "12:30", "null", "~", "1e3", "0x1F", "2024-01-01", "1_000", ".inf", "Yes", "=", "-"]


def write(folder: Path, names: str, extra: str = "", label: str = "0 0.5 0.5 0.5 0.5\n") -> Path:
    """A YOLO set of one image."""
    for name in ("images/train", "labels/train"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(folder / "images" / "train" / "a.jpg"), np.zeros((40, 80, 3), np.uint8))
    (folder / "labels" / "train" / "a.txt").write_text(label)
    file = folder / "set.yaml"
    file.write_text(f"names: {names}\ntrain: images/train\n{extra}", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "names",
    [
        f"[{', '.join(TYPED)}]".replace(" -]", ' "-"]'),
        "\n" + "".join(f"  - {name}\n" for name in TYPED).replace("- -\n", '- "-"\n'),
        "\n" + "".join(f"  {i}: '{name}'\n" for i, name in enumerate(TYPED)),
        "\n" + "".join(f"  {i}: {name}\n" for i, name in enumerate(TYPED)).replace(": -\n", ': "-"\n'),
        "\n" + "".join(f'  "{i}": {name}\n' for i, name in enumerate(TYPED)).replace(": -\n", ': "-"\n'),
    ],
)
def test_names_stay_as_typed(tmp_path: Path, names: str) -> None:
    assert find_data(write(tmp_path, names)).names == TYPED


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("[cat, '']", "name 1 is empty"),
        ("[cat, ' ']", "name 1 is empty"),
        ("[cat, 'cat ']", "'cat' twice"),
        ('["caf\u00e9", "cafe\u0301"]', "'caf\u00e9' twice"),
        ("{1: cat, 2: dog}", "indices 0 to 1"),
        ("{0: cat, 2: dog}", "indices 0 to 1"),
        ("{0: cat, '0': dog}", "'0' is there twice"),
        ("{0: cat, 0: dog}", "'0' is there twice"),
        ("{false: cat}", "indices 0 to 0"),
        ("[cat, [dog]]", "name 1 is none"),
        ("[cat, {dog: 1}]", "name 1 is none"),
        ('["a\\nb"]', "name 0 has one"),
        ("cat", "list of class names"),
        ("[cat, dog]\nnc: 3", "nc 3 and gives 2 names"),
        ("[cat, dog]\nnc: x", "key 'nc' .* a number of classes, got 'x'"),
        ("[cat, dog]\nnames: [dog, cat]", "'names' is there twice, in lines 1 and 2"),
        ("[cat]\nnc: !!int x", "not valid YAML"),
        ("[cat]\ndate: 2024-99-99", "not valid YAML"),
    ],
)
def test_names_that_make_no_labels_are_refused(tmp_path: Path, names: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        find_data(write(tmp_path, names))
    assert str(caught.value).isprintable()


def test_a_count_as_text_is_a_count(tmp_path: Path) -> None:
    assert find_data(write(tmp_path, "[cat, dog]", "nc: '2'")).names == ["cat", "dog"]
    with pytest.raises(UserError, match="key 'nc'"):
        find_data(write(tmp_path, "", "nc: 10000000000000000000000000"))


@pytest.mark.parametrize("to", ["coco", "voc", "yolo", "crowdhuman"])
def test_names_come_back_from_every_format(tmp_path: Path, to: str) -> None:
    names = [*TYPED, "a: b", "# c", "d, e", "'f'", "g & <h>", "\u732b"]
    lines = "".join(f"{k} 0.5 0.5 0.5 {0.1 + 0.02 * k}\n" for k in range(len(names)))
    spec = find_data(write(tmp_path, json.dumps(names), label=lines))
    chosen = ["no"] if to == "crowdhuman" else None
    made = find_data(convert_data(spec, to, tmp_path / to, chosen).yaml)
    back = find_data(convert_data(made, "yolo", tmp_path / "back").yaml)
    for one in (made, back):
        assert one.names == (chosen or names)
        data = load_split(one, "train")
        assert data.labels.tolist() == list(range(len(one.names)))
        assert len(data.faults) == 0


@pytest.mark.parametrize(
    ("key", "split"),
    [("valid", "val"), ("validation", "val"), ("eval", "val"), ("testing", "test"), ("training", "train")],
)
def test_other_words_for_a_split(tmp_path: Path, key: str, split: str) -> None:
    flat = "" if split == "train" else "train: images/train\n"
    file = write(tmp_path, "[cat]")
    file.write_text(f"names: [cat]\n{flat}{key}: images/train")
    assert split in find_data(file).splits
    file.write_text(f"names: [cat]\n{key}: {{images: images/train}}")
    assert len(load_split(find_data(file), split)) == 1


@pytest.mark.parametrize("folder", ["010", "2024-01-01", "1.10", "no"])
def test_folders_stay_as_typed(tmp_path: Path, folder: str) -> None:
    file = write(tmp_path / folder, "[cat]")
    (tmp_path / folder / "images" / "train").rename(tmp_path / folder / "images" / folder)
    (tmp_path / folder / "labels" / "train").rename(tmp_path / folder / "labels" / folder)
    file = tmp_path / "set.yaml"
    for split in (f"{{images: images/{folder}, labels: labels/{folder}}}", f"[images/{folder}]"):
        file.write_text(f"path: {folder}\nnames: [cat]\ntrain: {split}\nval: ~\ntest: null")
        spec = find_data(file)
        assert spec.splits == ["train"]
        assert len(load_split(spec, "train").boxes) == 1


def test_two_words_for_one_split_and_typing_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'val' and 'valid', which mean the same split; remove one of them"):
        find_data(write(tmp_path, "[cat]", "val: images/train\nvalid: images/train"))
    assert find_data(write(tmp_path, "[cat]", "val:\nvalid: images/train")).splits == ["train", "val"]
    for key, meant in (
        ("vall", "val"),
        ("tests", "test"),
        ("nmaes", "names"),
        ("validaton", "validation"),
        ("Val", "val"),
    ):
        with pytest.raises(UserError, match=f"unknown key '{key}' .* did you mean '{meant}'"):
            find_data(write(tmp_path, "[cat]", f"{key}: images/train"))
    assert find_data(write(tmp_path, "[cat]", "val: ''")).splits == ["train"]  # no name is not the whole folder
    others = (
        "roboflow: {version: 1}\nflip_idx: [0]\nnames_de: [Katze]\nlicense: x\nchannels: 3\nminival: x\ndescription: y"
    )
    assert find_data(write(tmp_path, "[cat]", others)).splits == ["train"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("labels/train/classes.txt", "dog\ncat\n"),
        ("labels/classes.txt", "cat\ndogg\n"),
        ("labels/Classes.TXT", "dog\ncat\n"),
        ("classes.txt", "cat\ndog\ncow\n"),
        ("obj.names", "dog\ncat\n"),
        ("images/train/_darknet.labels", "dog\ncat\n"),
        ("notes.json", '{"categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}]}'),
        ("data.yaml", "names: {0: dog, 1: cat}\ntrain: images/train"),
    ],
)
def test_a_class_file_that_contradicts_the_names_is_a_fault(
    tmp_path: Path, file: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    made = write(tmp_path, "[cat, dog]")
    data = load_split(find_data(made), "train")
    assert data.faults.counts == {KIND: 1}
    assert str(tmp_path / file) in data.summary()
    assert run(["data", "check", str(made)]) == 0
    assert str(tmp_path / file) in capsys.readouterr().out


def test_class_files_of_other_encodings_are_read(tmp_path: Path) -> None:
    made = write(tmp_path, "[cat, 'caf\u00e9']")
    file = tmp_path / "labels" / "classes.txt"
    for words, found in (("cat\ncaf\u00e9\n", {}), ("dog\ncaf\u00e9\n", {KIND: 1})):
        for encoding in ("latin-1", "utf-16"):
            file.write_bytes(words.encode(encoding))
            assert load_split(find_data(made), "train").faults.counts == found


def test_files_that_agree_or_are_no_class_files_are_no_fault(tmp_path: Path) -> None:
    file = write(tmp_path, "[cat, 'caf\u00e9']")
    (tmp_path / "labels" / "classes.txt").write_text("\ufeffcat \n\ncafe\u0301\n", encoding="utf-8")
    (tmp_path / "notes.json").write_text('{"info": "nothing"}')
    (tmp_path / "voc.names").write_bytes(b"\xff\xfe\xff")
    coco = {"names": ["caf\u00e9", "cat"], "train": {"images": "x", "annotations": "y.json"}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(coco))
    assert len(load_split(find_data(file), "train").faults) == 0


POSE2 = "0 0.5 0.5 0.4 0.4 0.4 0.4 0.5 0.5 0.6 0.6"
POSE3 = "1 0.5 0.5 0.4 0.4 0.4 0.4 2 0 0 0 0.6 0.6 1"
BOX = [[24, 12, 56, 28]]


@pytest.mark.parametrize(("line", "shape"), [(POSE2, "[3, 2]"), (POSE3, "[3, 3]"), ("0 0.5 0.5 0.4 0.4", "[3, 2]")])
def test_key_points_are_left_out_where_they_are_announced(tmp_path: Path, line: str, shape: str) -> None:
    spec = find_data(write(tmp_path, "[cat, dog]", f"kpt_shape: {shape}\nflip_idx: [0, 1, 2]", line))
    data = load_split(spec, "train")
    np.testing.assert_allclose(data.boxes, BOX)
    assert len(data.faults) == 0
    ours = spec.model_dump(exclude_none=True) | {"train": {"images": "images/train"}}
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(ours | {"kpt_shape": list(ours["kpt_shape"])}))
    np.testing.assert_allclose(load_split(find_data(tmp_path / "ours.yaml"), "train").boxes, BOX)


def test_lines_that_contradict_kpt_shape_are_told(tmp_path: Path) -> None:
    polygon = "0 0.1 0.1 0.5 0.1 0.5 0.5"
    spec = find_data(write(tmp_path, "[cat]", "kpt_shape: [3, 2]", f"{POSE2}\n{polygon}\n"))
    data = load_split(spec, "train")
    assert data.faults.counts == {"dropped, lines without the 5 + 3 * 2 columns of kpt_shape": 1}
    for shape in ("[3]", "[0, 2]", "[3, 4]", "3", "[true, 2]", "['3', 2]", "[3.0, 2]"):
        with pytest.raises(UserError, match=r"key 'kpt_shape' .* should be \[NUMBER OF KEY POINTS, 2 or 3\]"):
            find_data(write(tmp_path, "[cat]", f"kpt_shape: {shape}"))
    coco = "kpt_shape: [3, 2]\nformat: coco"
    (tmp_path / "c.yaml").write_text(f"names: [cat]\ntrain: {{images: images, annotations: a.json}}\n{coco}")
    with pytest.raises(UserError, match="format coco, which reads no 'kpt_shape'"):
        find_data(tmp_path / "c.yaml")


def test_key_points_that_nobody_announced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt:1 .* say 'kpt_shape: \[3, 3\]' in the data YAML"):
        load_split(find_data(write(tmp_path, "[cat, dog]", label=f"{POSE3}\n{POSE3}")), "train")
    data = load_split(find_data(write(tmp_path, "[cat, dog]", label="\n".join([POSE2] * 4))), "train")
    (kind,) = data.faults.counts
    assert "kpt_shape: [3, 2]" in kind


def test_polygons_are_not_taken_for_key_points(tmp_path: Path) -> None:
    angles = np.linspace(0, 2 * np.pi, 9)[:-1]
    random = np.random.default_rng(0)
    lines = []
    for _ in range(60):  # eight corners around a center, from any corner on
        center, radius, turn = random.uniform(0.3, 0.7, 2), random.uniform(0.05, 0.3), random.uniform(0, 6)
        points = center + radius * np.stack([np.cos(angles + turn), np.sin(angles + turn)], 1)
        lines.append(" ".join(["0", *(f"{v:.6f}" for v in points.ravel())]))
    lines.append("0 0 0 1 0 1 1 0 1 0 0 1 0 1 1 0 1")  # the whole image
    data = load_split(find_data(write(tmp_path, "[cat]", label="\n".join(lines))), "train")
    assert len(data.boxes) == 61
    assert not any("kpt_shape" in kind for kind in data.faults.counts)


def test_other_columns_are_read_for_their_boxes_or_named(tmp_path: Path) -> None:
    lines = [
        "0 0.5 0.5 0.4 0.4 0.91",  # a score
        "0 0.3 0.3 0.7 0.3 0.7 0.7 0.3 0.7",  # an oriented box
        "0.0 0.5 0.5 0.4 0.4",
        "10 20 30 20 30 40 10 40 cat 0",  # DOTA
        "imagesource:GoogleEarth",
        "0 0.5 0.5 0.4 0.4 45",  # an angle
    ]
    data = load_split(find_data(write(tmp_path, "[cat]", label="\n".join(lines))), "train")
    np.testing.assert_allclose(data.boxes, BOX * 3)
    assert data.faults.counts == {
        "lines with a sixth column, taken for a score and left out": 1,
        "dropped, lines of oriented boxes as DOTA has them (x1 y1 ... x4 y4 class): write 'class x y w h'": 1,
        "dropped, lines that are not 'class x y w h' or a polygon": 1,
        "dropped, lines with a sixth column that is no score (0 to 1)": 1,
    }
