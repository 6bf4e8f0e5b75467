"""Rows as they are shown: token by token, in text and on the page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from core.config import DataConfig, RunConfig
from data.check.collect import check_rows, read_rows
from data.check.page import ShownRow, make_page
from data.check.pieces import Piece, pieces
from data.dataset import tokenize_data
from data.tokenize import Tokenizer
from tests.data.made_rows import clean_rows
from tests.data.test_check_findings import Write


def row_pieces(write: Write, tokenizer: Tokenizer, prompt: str, completion: str) -> list[Piece]:
    path = write([{"prompt": prompt, "completion": completion}])
    rows = tokenize_data(DataConfig(path=path), tokenizer).split("train").rows
    return pieces(tokenizer, rows.ids[0], rows.is_target[0])


@pytest.mark.parametrize("text", ["Yo", "Größe in µm", "東京 🙂", "caf\ufffd", "a\n\n b\t", "🙂"])
def test_pieces_are_the_text_and_nothing_else(write: Write, chatml: Tokenizer, text: str) -> None:
    found = row_pieces(write, chatml, text, text)
    whole = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>"
    assert "".join(piece.text for piece in found) == whole
    assert "".join(piece.text for piece in found if piece.is_target) == f"{text}<|im_end|>"
    assert [piece.text for piece in found if piece.is_special] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    ]


def test_a_character_of_several_tokens_is_one_piece(write: Write, chatml: Tokenizer) -> None:
    found = row_pieces(write, chatml, "Hi", "aé🙂")
    shown = [(piece.text, piece.num_tokens) for piece in found if piece.is_target]
    assert shown == [("a", 1), ("é", 2), ("🙂", 4), ("<|im_end|>", 1)]
    assert sum(piece.num_tokens for piece in found) == len(chatml(["<|im_start|>user\nHi"]).input_ids[0]) + len(
        chatml(["<|im_end|>\n<|im_start|>assistant\naé🙂<|im_end|>"]).input_ids[0]
    )


def test_a_character_that_is_cut_off_is_shown_as_lost(chatml: Tokenizer) -> None:
    ids = np.array(chatml(["é"]).input_ids[0][:1], np.int32)
    assert pieces(chatml, ids, np.array([False])) == [Piece("\ufffd", False)]


def test_secrets_are_not_shown(write: Write, chatml: Tokenizer) -> None:
    secret = "AKIA" + "Q3Z7M2K9P4X8W6TR"
    found = row_pieces(write, chatml, f"Use {secret}!", "Fine.")
    text = "".join(piece.text for piece in found)
    assert f"Use {'•' * 20}" in text
    assert secret not in text
    assert "".join(piece.text for piece in found if piece.is_target) == "Fine.<|im_end|>"


class _Page(HTMLParser):
    """What a page loads, which rows it has, and the targets of each."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: dict[str, str] = {}
        self._in_target = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if given.get("class") == "row":
            self.ids.append(str(given["id"]))
        self._in_target = tag == "u"

    def handle_endtag(self, tag: str) -> None:
        self._in_target = self._in_target and tag != "u"

    def handle_data(self, data: str) -> None:
        if self._in_target and self.ids:
            self.targets[self.ids[-1]] = self.targets.get(self.ids[-1], "") + data


def page_of(write: Write, tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[str, _Page]:
    rows = clean_rows(40)
    rows[5] = {"prompt": prompt, "completion": completion}
    config = RunConfig(data=DataConfig(path=write(rows, "<b>rows.jsonl")))
    there = read_rows(config, lambda some: tokenize_data(some, tokenizer))
    place = there.place_of("<b>rows.jsonl:6")
    assert place is not None
    split, number = place
    some = there.splits[split]
    ids, is_target = some.ids[number - 1], some.is_target[number - 1]
    shown = ShownRow(split, number, "<b>rows.jsonl:6", len(ids), 3, pieces(tokenizer, ids, is_target), "cut <here>")
    text = make_page(check_rows(there, config, num_parameters=1000), [shown], total_rows=40)
    page = _Page()
    page.feed(text)
    return text, page


def test_the_page_loads_nothing_and_escapes_rows(write: Write, chatml: Tokenizer) -> None:
    attack = "<script>alert(1)</script><img src=http://x.test/a.png onerror=alert(1)>&amp;"
    text, page = page_of(write, chatml, attack, f"Yes {attack}")
    assert not re.search(r"<(?!u|/u|span|/span)[^>]*alert\(1\)", text)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert all(target.startswith("#") for target in page.loads)
    assert "default-src 'none'" in text
    assert "<b>rows" not in text
    assert "cut &lt;here&gt;" in text


def test_the_page_marks_exactly_the_targets(write: Write, chatml: Tokenizer) -> None:
    _, page = page_of(write, chatml, "Which <one>?", "That & this.")
    assert list(page.targets.values()) == ["That & this.<|im_end|>"]


def test_the_page_is_for_light_and_dark_and_for_phones(write: Write, chatml: Tokenizer) -> None:
    text, _ = page_of(write, chatml, "Which?", "This.")
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport" content="width=device-width' in text
