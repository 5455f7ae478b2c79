"""Strings behaves as a list of str and holds no Python object for each."""

from __future__ import annotations

import gc
import pickle

import pytest

from yoloxkd.data.io.packed_strings import Strings

VALUES = ["a.jpg", "", "ü/ß.png", "z" * 300, "\udcff.jpg"]


def test_it_is_a_sequence_of_what_went_in() -> None:
    strings = Strings(VALUES)
    assert list(strings) == VALUES == [strings[i] for i in range(5)]
    assert strings[-1] == VALUES[-1]
    assert strings == VALUES != strings[1:]
    assert strings[1:4:2] == VALUES[1:4:2]
    assert len(Strings([])) == 0 == len(list(Strings([])))
    assert pickle.loads(pickle.dumps(strings)) == VALUES
    with pytest.raises(IndexError):
        strings[5]


def test_a_hundred_thousand_strings_are_few_objects() -> None:
    gc.collect()
    before = len(gc.get_objects())
    strings = Strings(f"images/{i:012d}.jpg" for i in range(100_000))
    gc.collect()
    assert len(gc.get_objects()) - before < 50
    assert strings[77_777] == "images/000000077777.jpg"
