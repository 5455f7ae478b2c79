"""Decode text files of annotations and lists, whatever editor wrote them."""

from __future__ import annotations

import codecs
import re

from yoloxkd.errors import UserError

_MARKS = (  # the longer ones first: UTF-32's begins as UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LINE_END = re.compile(r"\r\n|\n|\r")  # str.splitlines would also cut at characters that names may have


def decode_text(content: bytes, what: str) -> str:
    """Text of UTF-8, or of what its byte order mark says; bytes that are not UTF-8 are kept, as in file names.

    `what` names the file in the sentence. UserError: it is not text, or a Git LFS pointer.
    """
    refuse_pointer(content, what)
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            try:
                return content[len(mark) :].decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
            except UnicodeDecodeError as error:
                raise UserError(f"{what} is not text: {error}") from error
    if b"\0" in content:
        raise UserError(f"{what} is not text in UTF-8; save it as UTF-8")
    return content.decode("utf-8", "surrogateescape")


def refuse_pointer(content: bytes, what: str) -> None:
    """UserError: the content is what Git LFS leaves where it did not fetch the file."""
    if content.startswith(b"version https://git-lfs"):
        raise UserError(f"{what} is a Git LFS pointer, not the file itself; run 'git lfs pull'")


def lines_of(text: str) -> list[str]:
    """The lines, without the ends of lines and with the spaces around them."""
    lines = _LINE_END.split(text)
    return lines[:-1] if lines and not lines[-1] else lines
