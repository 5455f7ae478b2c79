"""Absolute paths cut to the names of their files."""

from __future__ import annotations

import doctest
import shlex

import pytest

from yoloxkd.config import without_folders as module
from yoloxkd.config.without_folders import command_without_folders, distinct_names, without_folders


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/my birds/data.yaml", "data.yaml"),
        ("~/birds/data.yaml", "data.yaml"),
        (r"C:\Users\me\best.pt", "best.pt"),
        ("/data/run/", "run"),
        ("runs/teacher/best.pt", "runs/teacher/best.pt"),
        ("../birds.yaml", "../birds.yaml"),
        ("yolox-s@coco", "yolox-s@coco"),
        ("12 images/s, 3 / 4, IoU 0.50", "12 images/s, 3 / 4, IoU 0.50"),
        ("see https://example.com/a/b.html", "see https://example.com/a/b.html"),
        ("no file '/home/me/a.pt', and none at /b/c/d.pt: give one", "no file 'a.pt', and none at d.pt: give one"),
    ],
)
def test_an_absolute_path_becomes_its_name(text: str, expected: str) -> None:
    assert without_folders(text) == expected


def test_containers_and_known_paths() -> None:
    assert without_folders({"a": ["/x/y/z.pt", 3, None], "b": ("/x/y/z.pt",)}) == {
        "a": ["z.pt", 3, None],
        "b": ("z.pt",),
    }
    told = "stopped; continue with --resume /tmp/a <b> & c, its /tmp/a <b> & c/last.pt"
    assert without_folders(told, ["/tmp/a <b> & c", "/"]) == (
        "stopped; continue with --resume a <b> & c, its a <b> & c/last.pt"
    )


def test_a_file_inside_a_folder_is_named_from_there() -> None:
    told = {"file": "/my sets/a/images/1.jpg", "note": "the same as /my sets/a/images/2.jpg of val, not /other/3.jpg"}
    assert without_folders(told, inside="/my sets/a") == {
        "file": "images/1.jpg",
        "note": "the same as images/2.jpg of val, not 3.jpg",
    }


def test_files_side_by_side_have_names_of_their_own() -> None:
    files = ["/a/x/best.pt", "/a/y/best.pt", "/a/y/last.pt", "runs/x/best.pt", "yolox-s"]
    assert distinct_names(files) == ["a/x/best.pt", "y/best.pt", "last.pt", "runs/x/best.pt", "yolox-s"]
    assert distinct_names(["/a/x/best.pt"]) == ["best.pt"]


def test_a_command() -> None:
    command = shlex.join(["/opt/me/bin/yoloxkd", "train", "--data=/my sets/a.yaml", "--set", "student.weights=/x/b.pt"])
    assert shlex.split(command_without_folders(command)) == [
        "yoloxkd", "train", "--data=a.yaml", "--set", "student.weights=b.pt",
    ]  # fmt: skip
    assert command_without_folders("train '/a/b/c.pt") == "train 'c.pt"


def test_the_example() -> None:
    assert doctest.testmod(module).attempted
