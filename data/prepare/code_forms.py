"""Items and files -> rows: completion, infilling, instructions, plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from core.seeding import stable_hash
from data.prepare.code_files import line_start
from data.prepare.code_items import Item, unindented
from data.prepare.code_languages import Language

if TYPE_CHECKING:
    from tree_sitter import Node

FORMS = ("completion", "infill", "instruction", "text")
_PROMPT_SHARE, _MAX_PROMPT = 1 / 3, 1500
"""Of a part of a file: how much of it, and at most how many bytes, are the prompt."""
_MIN_MIDDLE, _MAX_MIDDLE, _MIDDLE_SHARE = 20, 1500, 0.5
"""Bytes that are cut out for infilling, and the largest share."""
_MIN_WORDS = 3
_EMPTY = re.compile(r"(pass|\.\.\.|[\s{}()\[\];:,])*")
_WORD = re.compile(r"[^\W\d_]{2,}")
_NAMES = {"impl": "impl block", "type": "type alias"}


class UnfitError(Exception):
    """Why an item gives no row of a form."""


@dataclass(frozen=True, slots=True)
class Form:
    """How rows are made."""

    name: str
    """One of `FORMS`."""
    markers: tuple[str, str, str] = ("<PREFIX>", "<SUFFIX>", "<MIDDLE>")
    """Before what is in front, before what is behind, and at the end of an infill prompt."""

    def values(self, source: bytes, item: Item, language: Language) -> dict[str, str]:
        """The row's text columns.

        Raises:
            UnfitError: the item gives no such row.
        """
        match self.name:
            case "completion":
                return completion(source, item)
            case "infill":
                return infill(source, item, language, self.markers)
            case "instruction":
                return instruction(source, item, language)
        return {"text": whole(source, item)}


def whole(source: bytes, item: Item) -> str:
    """The item's text, under the first lines of the types that it stands in."""
    return around(item) + source[item.start : item.end].decode()


def around(item: Item) -> str:
    return "".join(f"{line}\n" for line in item.around)


def completion(source: bytes, item: Item) -> dict[str, str]:
    """Comments, attributes, signature (and docstring) -> the body; of a file, its beginning -> the rest.

    Prompt and completion joined are the text as it stands; the completion begins with white space.
    """
    body = source[item.split : item.end].decode()
    if _EMPTY.fullmatch(body):
        raise UnfitError("items with an empty body" if item.kind != "file" else "files with nothing to complete")
    prompt = around(item) + source[item.start : item.split].decode()
    if not prompt.strip():
        raise UnfitError("files with nothing to complete")
    return {"prompt": prompt, "completion": body}


def infill(source: bytes, item: Item, language: Language, markers: tuple[str, str, str]) -> dict[str, str]:
    """What is before and behind, after markers -> whole statements from the middle, chosen by a hash of the text."""
    text = whole(source, item)
    if any(marker in text for marker in markers):
        raise UnfitError("items that hold an infill marker")
    spans = sorted(set(_middles(source, item, language)))
    if not spans:
        raise UnfitError("items with nothing to cut out")
    start, end = spans[stable_hash("infill", text) % len(spans)]
    before = around(item) + source[item.start : start].decode()
    behind = source[end : item.end].decode()
    prefix, suffix, middle = markers
    return {
        "prompt": f"{prefix}{before}{suffix}{behind}{middle}",
        "completion": source[start:end].decode(),
    }


def _middles(source: bytes, item: Item, language: Language) -> Iterator[tuple[int, int]]:
    """Runs of up to four statements, or the like, that fill whole lines of a body."""
    longest = min(_MAX_MIDDLE, int((item.end - item.start) * _MIDDLE_SHARE))
    waiting = [item.node]
    while waiting:
        children = waiting.pop().named_children
        waiting += [child for child in children if child.end_byte > item.split and child.start_byte < item.end]
        for index, first in enumerate(children):
            if first.type in language.comments or not _begins_line(source, first) or first.start_byte < item.split:
                continue
            for last in children[index : index + 4]:
                end = _line_end(source, last.end_byte)
                if end is None or end > item.end or end - first.start_byte > longest:
                    continue
                if end - first.start_byte >= _MIN_MIDDLE:
                    yield first.start_byte, end


def _begins_line(source: bytes, node: Node) -> bool:
    return not source[source.rfind(b"\n", 0, node.start_byte) + 1 : node.start_byte].strip()


def _line_end(source: bytes, end: int) -> int | None:
    """Behind a node and its semicolon or comma, if the line ends there."""
    if source[end - 1 : end] == b"\n":
        return None
    if source[end : end + 1] in (b";", b","):
        end += 1
    return end if source[end : end + 1] in (b"\n", b"") else None


def instruction(source: bytes, item: Item, language: Language) -> dict[str, str]:
    """What the doc comment says, and the signature -> the code without that comment, at the margin."""
    if len(_WORD.findall(item.doc)) < _MIN_WORDS:
        raise UnfitError("items without a doc comment" if not item.doc else "items with a doc comment of a word or two")
    if not item.name:
        raise UnfitError("items without a name")
    pieces, at = [], item.head
    for start, end in item.docs:
        pieces.append(source[at:start])
        at = end
    code = unindented(b"".join([*pieces, source[at : item.end]]).decode())
    if _EMPTY.fullmatch(source[item.split : item.end].decode()):
        raise UnfitError("items with an empty body")
    kind = _NAMES.get(item.kind, item.kind)
    owner = " ".join(item.around[-1].rstrip("{: \n").split()) if item.around else ""
    what = "Signature" if item.kind in ("function", "method", "constructor") else "Declaration"
    # a typedef's name stands behind its body
    name = "" if item.name.split(language.joint)[-1] in item.signature or item.kind == "impl" else f" `{item.name}`"
    prompt = (
        f"Write a {language.title} {kind}{name}{f' of `{owner}`' if owner else ''}.\n\n{item.doc}\n\n"
        f"{what}:\n\n```{language.name}\n{item.signature}\n```"
    )
    return {"prompt": prompt, "completion": code}


# --- files as a whole -------------------------------------------------------------------------------------------------


def file_parts(source: bytes, root: Node, language: Language, *, name: str, max_size: int) -> Iterator[Item]:
    """A file as an item or, where it is longer than `max_size` bytes, as several, cut between its items.

    A single item that is longer is a part of its own, which the caller leaves out.
    """
    borders = [*sorted(set(_borders(source, root, language, max_size))), len(source)]
    wanted = len(source) / max(1, -(-len(source) // max_size))
    start = 0
    for border, following in pairwise(borders):
        fits = following - start <= max_size
        if fits and (border - start < wanted or following - border < wanted / 4):
            continue  # the next piece comes to this part
        yield from _part(source, start, border, borders, root, name)
        start = border
    yield from _part(source, start, len(source), borders, root, name)


def _part(source: bytes, start: int, end: int, borders: list[int], root: Node, name: str) -> Iterator[Item]:
    if not source[start:end].strip():
        return
    start += len(source[start:end]) - len(source[start:end].lstrip(b"\n"))
    end = start + len(source[start:end].rstrip())
    yield Item(
        kind="file",
        name=name.rsplit("/", 1)[-1],
        row=source.count(b"\n", 0, start),
        start=start,
        head=start,
        split=_part_split(source, start, end, borders),
        end=end,
        signature="",
        doc="",
        docs=(),
        around=(),
        has_error=False,
        node=root,
    )


def _part_split(source: bytes, start: int, end: int, borders: list[int]) -> int:
    """The border between items nearest to a third, else the line's end nearest to it."""
    wanted = start + min(int((end - start) * _PROMPT_SHARE), _MAX_PROMPT)
    low, high = start + (wanted - start) // 3, start + 2 * (wanted - start)
    places = [border for border in borders if low < border < min(high, end)]
    if not places:
        before, after = source.rfind(b"\n", start, wanted), source.find(b"\n", wanted, end)
        places = [place for place in (before, after) if place > start]
    if not places:
        return end
    nearest = min(places, key=lambda place: (abs(place - wanted), place))
    return start + len(source[start:nearest].rstrip())


_BLOCKS = ("block", "body", "declaration_list", "compound_statement", "statement_list")
"""How the types of nodes end that hold items or statements, in every grammar."""


def _borders(source: bytes, root: Node, language: Language, max_size: int) -> Iterator[int]:
    """Where lines begin that begin an item with its comments; inside of items only where they are too long."""
    holders = {*language.items, *language.scopes, *language.wrappers}
    waiting = [root]
    while waiting:
        belongs = False
        for node in waiting.pop().children:
            begin = line_start(source, node.start_byte)
            if node.is_named and begin > 0 and source[begin - 1 : begin] == b"\n" and not belongs:
                yield begin
            is_lead = node.type in language.comments or node.type in language.attributes
            belongs = is_lead and source[node.end_byte : node.end_byte + 2] != b"\n\n"
            if node.end_byte - node.start_byte > max_size and (node.type in holders or node.type.endswith(_BLOCKS)):
                waiting.append(node)


def settings_of(form: Form) -> Mapping[str, object]:
    """What decides the rows, for the manifest."""
    return {"as": form.name, **({"infill_markers": list(form.markers)} if form.name == "infill" else {})}
