"""A document as blocks of text, whatever file it came from, and how characters are cleaned.

All kinds of documents end in one layout, which is Markdown's: headings with `#`, items with `-` or a number, code
between fences, and a table's rows as lines with ` | ` between the cells. Chat models read and write it, and it shows
structure with the fewest tokens. Emphasis, link targets and images are left out.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["prose", "heading", "item", "lines"]


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, a heading, an item of a list, or lines that are kept as they are (code, tables, formulas)."""

    text: str
    kind: Kind = "prose"


@dataclass(frozen=True, slots=True)
class Document:
    """The text of one file."""

    title: str
    """Empty where the file has none."""
    blocks: tuple[Block, ...]


class UnreadableError(Exception):
    """Why a file can't be used, as a plural: `binary files`."""


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff\ufff9-\ufffb]")
"""Control characters, soft hyphens and marks of no width; not the joiners that Indic scripts and emoji need."""
_LIGATURES = str.maketrans(
    {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st", "\u00a0": " ", "\u202f": " "}
)
_CJK_BREAK = re.compile(
    r"(?<=[\u3000-\u30ff\u4e00-\u9fff\uff01-\uff60])[ \t]*\n\s*(?=[\u3000-\u30ff\u4e00-\u9fff\uff01-\uff60])"
)
_BLANK_LINES = re.compile(r"\n{3,}")


def words(text: str) -> frozenset[str]:
    """A set of words, written in one text."""
    return frozenset(text.split())


def decode(content: bytes) -> str:
    """A text file's characters: UTF-8 with or without a byte order mark, any line ends.

    Raises:
        UnreadableError: another encoding, or no text at all.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnreadableError("files in UTF-16, not UTF-8")
    if b"\x00" in content:
        raise UnreadableError("binary files")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnreadableError("files that are not UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def clean(text: str) -> str:
    """NFC, no control characters, no ligatures, plain spaces; line breaks and tabs stay.

    Not NFKC, which would make x² to x2 and ½ to 1⁄2.
    """
    return unicodedata.normalize("NFC", _CONTROL.sub("", text).translate(_LIGATURES))


def one_line(text: str) -> str:
    """White space of any kind and length as one space; none where a line of Chinese or Japanese goes on."""
    return " ".join(_CJK_BREAK.sub("", clean(text)).split())


def prose(text: str, kind: Kind = "prose") -> list[Block]:
    """A block of running text; none if it is blank."""
    line = one_line(text)
    return [Block(line, kind)] if line else []


def heading(text: str, level: int) -> list[Block]:
    """A heading; none if it is blank."""
    line = one_line(text)
    return [Block(f"{'#' * min(level, 6)} {line}", "heading")] if line else []


def code(text: str, language: str = "") -> list[Block]:
    """Lines as they are, between fences; none if all are blank."""
    lines = [line.rstrip() for line in clean(text).expandtabs(4).split("\n")]
    body = textwrap.dedent(_BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n"))
    if not body:
        return []
    fence = "````" if "```" in body else "```"
    return [Block(f"{fence}{language}\n{body}\n{fence}", "lines")]


def table(rows: Iterable[Iterable[str]]) -> list[Block]:
    """A line for each row; empty rows are left out."""
    lines = [" | ".join(one_line(cell) for cell in cells) for cells in rows]
    body = "\n".join(line for line in lines if line.strip(" |"))
    return [Block(body, "lines")] if body else []
