"""What a user's mistake is told with."""

from __future__ import annotations

import pickle

from yoloxkd.errors import GateError, UserError


def test_the_sentence_is_one_line_whatever_the_names_in_it_hold() -> None:
    assert str(UserError("'a\nb' and 'c\x1b[31m\x00'")) == "'a b' and 'c\\x1b[31m\\x00'"
    assert str(GateError("bytes \udcff, hidden \u202e")) == "bytes \\udcff, hidden \\u202e"


def test_what_can_be_read_stays_as_it_is() -> None:
    for text in ("a  b.jpg", "größe 画像 图片\u3000一.png", "", "C:\\x"):
        assert str(UserError(text)) == text


def test_an_error_comes_whole_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(UserError("two\nlines")))
    assert (type(error), error.args) == (UserError, ("two\nlines",))
