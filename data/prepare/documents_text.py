"""Plain text -> blocks: paragraphs out of lines that were broken by hand, and what must keep its lines."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Iterator, Sequence

from data.prepare.documents_blocks import Block, Document, clean, heading, prose

_BLANK = re.compile(r"\n[ \t]*\n\s*?(?=[^\n]*\S)")
_UNDERLINE = re.compile(r"([=\-~^*#+.\"'])\1{2,}")
_LEVELS = {"=": 1, "#": 1, "*": 1, "-": 2}
_ITEM = re.compile(r"\s*(?:[-*•+]|\d{1,3}[.)])\s+(?=\S)")
_BULLET = re.compile(r"(\s*)[*•+](?=\s)")
_LAID_OUT = re.compile(r"\S(?: {3,}|\t)\s*\S|^\s*[|+][-=+|]")
_NARROW = 40
"""Lines whose mean length is below this were not broken because they were full."""
_WIDE = 120
"""Lines as long as this were not broken by hand: each is a paragraph."""


def read_text(text: str) -> Document:
    """Paragraphs of a text file.

    Hand-broken lines of prose become one line. Underlined lines are headings. Tables, verse and code, which are
    indented, laid out in columns or have short lines, stay as they are.
    """
    text = clean(text).expandtabs(8).strip("\n")
    blocks: list[Block] = []
    for paragraph in _BLANK.split(text):
        lines = textwrap.dedent(paragraph).strip("\n").split("\n")
        blocks += _paragraph([line.rstrip() for line in lines if line.strip()])
    title = next((block.text.lstrip("# ") for block in blocks if block.kind == "heading"), "")
    return Document(title, tuple(blocks))


def _paragraph(lines: Sequence[str]) -> Iterator[Block]:
    if not lines or (_UNDERLINE.fullmatch(lines[0]) and len(lines) == 1):  # a rule across the page
        return
    if _UNDERLINE.fullmatch(lines[0]) and len(lines) > 2 and lines[2] == lines[0]:  # a line above as well
        lines = lines[1:]
    mark = _UNDERLINE.fullmatch(lines[1]) if len(lines) > 1 else None
    if mark and abs(len(lines[0]) - len(lines[1])) <= 2:
        yield from heading(lines[0], _LEVELS.get(mark[1], 3))
        yield from _paragraph(lines[2:])
    elif _ITEM.match(lines[0]):
        yield from _items(lines)
    elif len(lines) > 1 and _keeps_lines(lines):
        yield Block("\n".join(lines), "lines")
    elif statistics.mean(len(line) for line in lines) > _WIDE:
        for line in lines:
            yield from prose(line)
    else:
        yield from prose("\n".join(lines))


def _items(lines: Sequence[str]) -> Iterator[Block]:
    item: list[str] = []
    for line in [*lines, ""]:
        if item and (not line or _ITEM.match(line)):
            indent = item[0][: len(item[0]) - len(item[0].lstrip())]
            marked = _BULLET.sub(r"\1-", "\n".join(item))
            yield from (Block(indent + block.text, "item") for block in prose(marked))
            item = []
        item.append(line)


def _keeps_lines(lines: Sequence[str]) -> bool:
    if any(_LAID_OUT.search(line) for line in lines) or any(line.startswith(" ") for line in lines[1:]):
        return True
    return statistics.mean(len(line) for line in lines[:-1]) < _NARROW
