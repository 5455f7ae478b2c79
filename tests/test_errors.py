"""What a user's mistake is told with."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from yoloxkd.errors import GateError, UserError, nearest_file


def test_the_sentence_is_one_line_whatever_the_names_in_it_hold() -> None:
    assert str(UserError("'a\nb' and 'c\x1b[31m\x00'")) == "'a b' and 'c\\x1b[31m\\x00'"
    assert str(GateError("bytes \udcff, hidden \u202e")) == "bytes \\udcff, hidden \\u202e"


def test_what_can_be_read_stays_as_it_is() -> None:
    for text in ("a  b.jpg", "größe 画像 图片\u3000一.png", "", "C:\\x"):
        assert str(UserError(text)) == text


def test_an_error_comes_whole_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(UserError("two\nlines")))
    assert (type(error), error.args) == (UserError, ("two\nlines",))


def test_a_misspelt_file_is_answered_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "yolox-nano").mkdir(parents=True)
    (tmp_path / "runs" / "yolox-nano" / "best.pt").touch()
    assert nearest_file("runs/yolox-nan/bset.pt") == "; did you mean 'runs/yolox-nano/best.pt'?"
    assert nearest_file(tmp_path / "rusn") == f"; did you mean '{tmp_path / 'runs'}'?"
    for name in ("elsewhere/x.pt", "runs/yolox-nano", "runs/yolox-nano/best.pt/x", "a\0b", "x" * 300):
        assert nearest_file(name) == ""
