"""Markdown -> blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from data.prepare.documents_blocks import Block, Document, code, heading, one_line, prose, table

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?\n)?(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


def read_markdown(text: str) -> Document:
    """Headings, paragraphs, items, tables and code; front matter, comments, images and link targets are left out."""
    from markdown_it import MarkdownIt

    front = _FRONT_MATTER.match(text)
    title = _title_in(front[1] or "") if front else ""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text[front.end() :] if front else text)
    reader = _Reader()
    reader.read(tokens)
    return Document(title or reader.title, tuple(reader.blocks))


def _title_in(front: str) -> str:
    found = _FRONT_TITLE.search(front)
    return one_line(found[1].strip("\"'")) if found else ""


class _Reader:
    """Goes through markdown-it's flat list of tokens."""

    def __init__(self) -> None:
        self.title = ""
        self.blocks: list[Block] = []
        self._lists: list[int | None] = []
        """Of each list that is open: the number of its next item, None where it has bullets."""
        self._marker: str | None = None
        self._heading = 0
        self._rows: list[list[str]] = []

    def read(self, tokens: Iterable[Any]) -> None:
        for token in tokens:
            self._read(token)

    def _read(self, token: Any) -> None:
        match token.type:
            case "heading_open":
                self._heading = int(token.tag[1])
            case "heading_close":
                self._heading = 0
            case "bullet_list_open":
                self._lists.append(None)
            case "ordered_list_open":
                self._lists.append(int(token.attrGet("start") or 1))
            case "bullet_list_close" | "ordered_list_close":
                self._lists.pop()
            case "list_item_open":
                self._open_item()
            case "fence" | "code_block":
                self.blocks += code(token.content, token.info.split()[0] if token.info.strip() else "")
            case "html_block":
                self._html(token.content)
            case "tr_open":
                self._rows.append([])
            case "table_close":
                self.blocks += table(self._rows)
                self._rows = []
            case "inline":
                self._inline(token)

    def _open_item(self) -> None:
        number = self._lists[-1]
        indent = "  " * (len(self._lists) - 1)
        if number is None:
            self._marker = f"{indent}- "
        else:
            self._marker = f"{indent}{number}. "
            self._lists[-1] = number + 1

    def _html(self, content: str) -> None:
        from data.prepare.documents_html import read_html

        without = _COMMENT.sub("", content)
        if without.strip():
            self.blocks += read_html(without).blocks

    def _inline(self, token: Any) -> None:
        text = _text(token.children or ())
        if self._rows:
            self._rows[-1].append(text)
        elif self._heading:
            self.blocks += heading(text, self._heading)
            if not self.title:
                self.title = one_line(text)
        elif self._lists:
            # a paragraph in an item that is not its first stands under it
            marker = "  " * len(self._lists) if self._marker is None else self._marker
            self._marker = None
            self.blocks += [Block(marker + block.text, "item") for block in prose(text)]
        else:
            self.blocks += prose(text)


def _text(children: Sequence[Any]) -> str:
    """What a reader sees of a line; code between its backticks."""
    parts = []
    for child in children:
        match child.type:
            case "text" | "text_special":
                parts.append(child.content)
            case "code_inline":
                mark = "``" if "`" in child.content else "`"
                parts.append(f"{mark}{child.content}{mark}")
            case "softbreak" | "hardbreak":
                parts.append(" ")
            case "html_inline" if child.content.lower().startswith("<br"):
                parts.append(" ")
    return "".join(parts)
