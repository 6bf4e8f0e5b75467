"""A row's tokens as text that can be shown: borders, prompt and target, special tokens, no secrets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.protocols import BoolArray, TokenArray
from data.check.secrets import masked

_LOST = "\ufffd"


@dataclass(frozen=True, slots=True)
class Piece:
    """A token's text; of a character that takes several tokens, all of them."""

    text: str
    is_target: bool
    is_special: bool = False
    num_tokens: int = 1


def pieces(tokenizer: Any, ids: TokenArray, is_target: BoolArray, *, is_cut: bool = False) -> list[Piece]:
    """The tokens of a row, each with the text that it adds to what stands before it.

    Texts of single tokens can't be had by decoding them one by one: a character may be several tokens, and some
    tokenizers drop the space in front of a text. So each is what decoding it behind its neighbour adds.

    Args:
        is_cut: whether the row was cut off at its end, where half a secret may stand.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    numbers = [int(token) for token in ids]
    found: list[Piece] = []
    before = start = 0  # ids[before:start] are the tokens of the last piece
    for stop in range(1, len(numbers) + 1):
        known = _decode(tokenizer, numbers[before:start])
        text = _decode(tokenizer, numbers[before:stop])[len(known) :]
        ends = stop == len(numbers) or numbers[stop] in special or is_target[stop] != is_target[start]
        if ends or not text.endswith(_LOST):
            is_special = stop == start + 1 and numbers[start] in special
            found.append(Piece(text, bool(is_target[start]), is_special, stop - start))
            before, start = start, stop
    return _without_secrets(found, is_cut)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _without_secrets(found: list[Piece], is_cut: bool) -> list[Piece]:
    whole = "".join(piece.text for piece in found)
    hidden = masked(whole, is_cut=is_cut)
    if hidden == whole:
        return found
    made, at = [], 0
    for piece in found:
        made.append(replace(piece, text=hidden[at : at + len(piece.text)]))
        at += len(piece.text)
    return made
