"""PDF -> blocks: paragraphs put together again from printed lines.

A PDF holds places of glyphs, not text: headings, lists and tables can't be told from prose, and come as paragraphs.
"""

from __future__ import annotations

import io
import logging
import re
import statistics
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

from data.prepare.documents_blocks import Block, Document, UnreadableError, clean, one_line, prose

_EDGE = 3
"""Lines at the top and bottom of a page where running heads and page numbers stand."""
_PAGE_NUMBER = re.compile(
    r"(?:page\s+)?[-–—|\s]*(?:\d{1,4}|[ivxlc]{1,7})[-–—|\s]*(?:(?:/|of)\s*\d{1,4})?", re.IGNORECASE
)
_NUMBERED = re.compile(r"^\d+\s|\s\d+$")
_FEWEST_HEADS = 3
_LEADER = re.compile(r"(?:\s?\.){5,}\s*(?:\d+|[ivxlc]+)?$")
"""Dots in a table of contents."""
_DIGITS = re.compile(r"\d+")
_ENDS = re.compile(r"[.!?:。！？][\"'”’»)\]]*$")
_ITEM = re.compile(r"(?:[•◦▪‣·∙–—*-]|\(?\d{1,3}[.)]|\[\d{1,3}\])\s")
_BULLET = re.compile(r"^[•◦▪‣·∙]\s*")
_HYPHENATED = re.compile(r"[^\W\d_]-$")
_GARBLED = re.compile(r"[\ufffd\ue000-\uf8ff]|\(cid:\d+\)|/(?:g|G|gid|C)\d{1,5}(?=[/\s]|$)")
_MOST_GARBLED = 0.05
_SHORT = 0.75
"""A line that is shorter than this share of the usual one ends a paragraph."""


def read_pdf(content: bytes) -> Document:
    """The text layer of a PDF.

    Raises:
        UnreadableError: encrypted, damaged, without text, or with fonts that don't say which characters they show.
    """
    title, pages = _pages(content)
    text = "\n".join(line for page in pages for line in page)
    if sum(char.isalnum() for char in text) < 2 * len(pages) or not text.strip():
        raise UnreadableError("PDF files without text (scanned?)")
    if len(_GARBLED.findall(text)) > _MOST_GARBLED * len(text.split()):
        raise UnreadableError("PDF files whose fonts don't say which characters they show")
    blocks = paragraphs(without_running_heads(pages))
    return Document(title, tuple(blocks))


def _pages(content: bytes) -> tuple[str, list[list[str]]]:
    """The title, and the lines of each page."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, PyPdfError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it says much about files that it reads well
    damaged = (
        *(PyPdfError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError),
        *(NotImplementedError, AssertionError, OSError, EOFError, zlib.error),
    )
    try:
        reader = PdfReader(io.BytesIO(content))
        # no password: one that only forbids printing or the like is opened by every reader
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableError("encrypted PDF files")
        title = one_line((reader.metadata.title or "") if reader.metadata is not None else "")
        pages = [clean(page.extract_text()).split("\n") for page in reader.pages]
    except DependencyError:  # AES, which pypdf leaves to another library
        raise UnreadableError("encrypted PDF files") from None
    except UnreadableError:
        raise
    except damaged:  # what a damaged file sets off in the depths of pypdf
        raise UnreadableError("damaged PDF files") from None
    return "" if _is_file_name(title) else title, [[line.strip() for line in page] for page in pages]


def _is_file_name(title: str) -> bool:
    return bool(
        re.fullmatch(r"untitled|.*\.(docx?|dvi|tex|indd|pdf|odt|rtf|p65)|Microsoft Word - .*", title, re.IGNORECASE)
    )


def without_running_heads(pages: Sequence[Sequence[str]]) -> list[list[str]]:
    """Pages without page numbers, and without what stands at the edge of a third of all pages, digits aside."""
    edges = [_edge_lines(page) for page in pages]
    seen = Counter(key for page, edge in zip(pages, edges, strict=True) for key in {_key(page[at]) for at in edge})
    enough = max(_FEWEST_HEADS, len(pages) // 3)  # left and right pages often have heads of their own

    def is_running(line: str) -> bool:
        if len(pages) > 1 and _PAGE_NUMBER.fullmatch(line):
            return True
        # with the page's number it may be the head of a chapter only
        return seen[_key(line)] >= (_FEWEST_HEADS if _NUMBERED.search(line) else enough)

    return [
        [line for at, line in enumerate(page) if at not in edge or not is_running(line)]
        for page, edge in zip(pages, edges, strict=True)
    ]


def _edge_lines(page: Sequence[str]) -> set[int]:
    filled = [at for at, line in enumerate(page) if line]
    return {*filled[:_EDGE], *filled[-_EDGE:]}


def _key(line: str) -> str:
    return _DIGITS.sub("#", " ".join(line.split()))


def paragraphs(pages: Sequence[Sequence[str]]) -> list[Block]:
    """Lines -> paragraphs; a word that was hyphenated at the end of a line is whole again."""
    lengths = [len(line) for page in pages for line in page if len(line) > 20]
    usual = statistics.quantiles(lengths, n=4)[2] if len(lengths) > 1 else 80.0
    compounds = _compounds(line for page in pages for line in page)
    blocks: list[Block] = []
    waiting: list[str] = []

    def finish() -> None:
        text = _BULLET.sub("- ", _join(waiting, compounds))
        blocks.extend(prose(text, "item" if text.startswith("- ") else "prose"))
        waiting.clear()

    for page in pages:
        for line in _without_blank_edges([line for line in page if not _LEADER.search(line)]):
            if waiting and (not line or _ends_paragraph(waiting[-1], line, usual)):
                finish()
            if line:
                waiting.append(line)
        if waiting and _ENDS.search(waiting[-1]):  # else the sentence goes on over the page
            finish()
    finish()
    return blocks


def _without_blank_edges(lines: Sequence[str]) -> Sequence[str]:
    filled = [at for at, line in enumerate(lines) if line]
    return lines[filled[0] : filled[-1] + 1] if filled else []


def _compounds(lines: Iterable[str]) -> set[str]:
    """Words that the text writes with a hyphen inside a line."""
    return {word.lower() for line in lines for word in re.findall(r"[^\W\d_]+-[^\W\d_]+", line)}


def _ends_paragraph(line: str, following: str, usual: float) -> bool:
    if _ITEM.match(following):
        return not _HYPHENATED.search(line)
    return len(line) < _SHORT * usual and not following[0].islower() and not _HYPHENATED.search(line)


def _join(lines: Sequence[str], compounds: set[str]) -> str:
    text = ""
    for line in lines:
        if not _HYPHENATED.search(text) or not line[0].islower():
            text += f" {line}" if text else line
            continue
        first = re.findall(r"[^\W\d_]+-$", text)[-1]
        second = re.match(r"[^\W\d_]+", line)
        is_compound = second is not None and (first + second[0]).lower() in compounds
        text = (text if is_compound else text[:-1]) + line
    return text
