"""HTML -> blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from data.prepare.documents_blocks import Block, Document, code, heading, one_line, prose, table, words

_DROPPED = words(
    "script style noscript template nav aside footer form button select textarea iframe object svg canvas audio video "
    "dialog menu"
)
_DROPPED_ROLES = ("navigation", "banner", "contentinfo", "search", "complementary", "menu")
_DROPPED_CLASSES = words(
    "headerlink sphinxsidebar related breadcrumb breadcrumbs navheader navfooter navigation navbar sidebar "
    "toctree-wrapper linenos lineno skip-link sr-only copybtn nav-panel mw-editsection toc"
)
"""Of documentation tools (Sphinx, DocBook, Texinfo, MkDocs) and wikis: ways to other pages, marks in the margin."""
_WAYS = frozenset(("next", "prev", "previous", "up"))
_LONGEST_WAY = 400
"""Characters of a line of links to other pages; more is text that such a link stands in."""
_BREAK = "\x00"
"""Stands for `<br>` in text that is being collected; no file that is read holds one."""
_FULL_LINE = 120
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCKS = words(
    "address article blockquote body caption center dd details div dl dt fieldset figcaption figure header hr html li "
    "main ol p section summary ul [document]"
)


def read_html(text: str) -> Document:
    """Headings, paragraphs, items, tables and code of a page's main part; what leads elsewhere is left out.

    Raises:
        RecursionError: elements are nested hundreds deep.
    """
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(text, "html.parser")
    title = one_line(soup.title.get_text()) if soup.title else ""
    _drop(soup)
    reader = _Reader()
    reader.walk(_main(soup))
    reader.flush()
    return Document(title or reader.title, tuple(reader.blocks))


def _drop(soup: Any) -> None:
    from bs4 import Comment, Declaration, Doctype, ProcessingInstruction

    for element in soup.find_all(sorted(_DROPPED)):
        element.decompose()
    for element in soup.find_all(_is_dropped):
        if not element.decomposed:
            element.decompose()
    for header in soup.find_all("header"):
        if not header.decomposed and header.find_parent(["main", "article"]) is None:
            header.decompose()
    for link in soup.find_all("a"):
        _drop_link(link)
    kinds = (Comment, Declaration, Doctype, ProcessingInstruction)
    for string in soup.find_all(string=lambda found: isinstance(found, kinds)):
        string.extract()


def _drop_link(link: Any) -> None:
    """The mark that links to a heading, and the line of links to the pages before and behind."""
    if link.decomposed:
        return
    if link.get_text(strip=True) in ("¶", "#", "🔗", "§"):
        link.decompose()
    elif not _WAYS.isdisjoint(link.get_attribute_list("rel")):
        line = link.find_parent(["p", "table", "ul", "div"])
        if line is not None and len(line.get_text()) < _LONGEST_WAY:
            line.decompose()


def _is_dropped(element: Any) -> bool:
    attributes = element.attrs
    if not attributes:
        return False
    if "hidden" in attributes or attributes.get("aria-hidden") == "true":
        return True
    if attributes.get("role") in _DROPPED_ROLES:
        return True
    names = attributes.get("class") or ()
    return not _DROPPED_CLASSES.isdisjoint([names] if isinstance(names, str) else names)


def _main(soup: Any) -> Any:
    """The page's main part, if it marks exactly one."""
    for found in (soup.find_all("main"), soup.find_all(attrs={"role": "main"}), soup.find_all("article")):
        if len(found) == 1 and found[0].get_text(strip=True):
            return found[0]
    return soup.body or soup


class _Reader:
    """Collects inline text until a block begins or ends."""

    def __init__(self) -> None:
        self.title = ""
        self.blocks: list[Block] = []
        self._text: list[str] = []
        self._lists: list[int | None] = []
        self._marker: str | None = None

    def walk(self, element: Any) -> None:
        from bs4.element import NavigableString

        for child in element.children:
            if isinstance(child, NavigableString):
                self._text.append(str(child))
            else:
                self._element(child)

    def _element(self, element: Any) -> None:
        name = element.name.lower()
        if name in _HEADINGS:
            self._flush_with(heading(element.get_text(), _HEADINGS[name]))
            if not self.title:
                self.title = one_line(element.get_text())
        elif name in ("pre", "listing", "xmp"):
            self._flush_with(code(element.get_text().removeprefix("\n")))
        elif name == "table" and not _is_layout(element):
            self._flush_with(table(_rows(element)))
        elif name in ("code", "tt", "kbd", "samp"):
            self._code(element)
        elif name in ("ul", "ol"):
            self._list(element, 1 if name == "ol" else None)
        elif name == "li" and self._lists:
            self._item(element)
        elif name in _BLOCKS or name in ("table", "tr", "td", "th", "tbody", "thead", "tfoot"):
            self.flush()
            self.walk(element)
            self.flush()
        elif name == "br":
            self._text.append(_BREAK)
        elif name not in ("title", "head", "img"):
            self.walk(element)

    def _flush_with(self, blocks: list[Block]) -> None:
        self.flush()
        self.blocks += blocks

    def _code(self, element: Any) -> None:
        text = one_line(element.get_text())
        if element.find("pre") is not None:
            self.walk(element)
        elif text:
            mark = "``" if "`" in text else "`"
            self._text.append(f"{mark}{text}{mark}")

    def _list(self, element: Any, first: int | None) -> None:
        self.flush()
        self._lists.append(first)
        self.walk(element)
        self.flush()
        self._lists.pop()

    def _item(self, element: Any) -> None:
        self.flush()
        number = self._lists[-1]
        indent = "  " * (len(self._lists) - 1)
        self._marker = f"{indent}- " if number is None else f"{indent}{number}. "
        self._lists[-1] = None if number is None else number + 1
        self.walk(element)
        self.flush()
        self._marker = None

    def flush(self) -> None:
        """Ends the paragraph that is being collected."""
        text = "".join(self._text)
        self._text.clear()
        if not self._lists:
            self.blocks += _with_breaks(text)
            return
        found = prose(text.replace(_BREAK, " "))
        for block in found:
            # a paragraph in an item that is not its first stands under it
            marker = "  " * len(self._lists) if self._marker is None else self._marker
            self._marker = None
            self.blocks.append(Block(marker + block.text, "item"))


def _with_breaks(text: str) -> list[Block]:
    """Paragraphs out of long lines between `<br>`s; short ones (verse, addresses, listings) stay lines of one block."""
    lines = [line for line in map(one_line, text.split(_BREAK)) if line]
    if len(lines) > 1 and sum(map(len, lines)) < _FULL_LINE * len(lines):
        return [Block("\n".join(lines), "lines")]
    return [Block(line) for line in lines]


def _is_layout(element: Any) -> bool:
    """Whether a table only places things on the page."""
    return element.find(["table", "pre", "ul", "ol", "dl", *_HEADINGS]) is not None


def _rows(element: Any) -> Iterable[list[str]]:
    caption = element.find("caption")
    if caption is not None:
        yield [caption.get_text()]
    for row in element.find_all("tr"):
        yield [cell.get_text(" ") for cell in row.find_all(["td", "th"], recursive=False)]
