"""Near copies: MinHash signatures of texts, and clusters of rows whose signatures are alike.

Two rows are near copies when the sets of 5-character pieces of their texts overlap enough: Jaccard similarity, the
share of the pieces of either that both have. A signature is the 128 minima of 128 hash functions over a text's pieces;
the share of minima on which two signatures agree estimates the similarity, with a standard error of at most 0.045
(Broder 1997). Candidates are pairs that agree on a whole band of minima (Leskovec, Rajaraman and Ullman, Mining of
Massive Datasets, section 3.4), so a million rows need no comparison of all pairs.

What a large part of the rows say alike, the instruction that every prompt begins with, makes no copies. It is left out
when signatures are compared, not when they are made, so that a signature depends on nothing but its own text. Hundreds
of near copies of a few rows say much alike too. What tells them from an instruction: its rows add to it and keep it
whole, copies also lack some of what the others have, each something else.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from core.protocols import IntArray
from data.groups import first_with_same, join
from data.keys import HashArray, SignatureArray

if TYPE_CHECKING:
    from data.formats import Example

PERMUTATIONS = 128
"""Minima of a signature."""
PIECE_LENGTH = 5
"""Characters of a piece."""
COMMON_SHARE = 0.1
"""What more than this share of the rows have does not count when two rows are compared."""
COMMON_ROWS = 5
"""What so few rows have, or fewer, always counts."""

_SEED = 0
_CHUNK_CHARACTERS = 1 << 20
_CHUNK_PAIRS = 8192
_MIN_AGREEING = 5
"""Minima that must agree: when nearly all of two rows is common, chance may let the one or two that are left agree."""
_WINDOW, _WINDOW_OF_LARGE, _LARGE_GROUP = 8, 2, 64
"""How many following rows of a band's group a row is compared with: all pairs of thousands would take hours."""
_MIN_RECALL = 0.999
_SAMPLED, _MIN_SHARED = 1024, 16
"""A cluster is judged by so many of its rows, and by no fewer minima that most of them share."""
_KEPT_SHARE = 0.25
"""A template's piece may be lacking in so many rows, as a share of those that would lack it if they were copies."""
_SEPARATORS = re.compile(r"[^\w+\-*/<>=%]+")
"""What becomes a space: white space and punctuation, but not the signs that tell 3 + 4 from 3 * 4."""

BoolArray = npt.NDArray[np.bool_]
BitArray = npt.NDArray[np.uint8]


# Texts and signatures


def compared_text(example: Example) -> str:
    """What near copies are judged by: all turns but the system's, answers included.

    Of a row that we put into a template ourselves (premise and hypothesis) it is what the row says, not the template.
    """
    if example.own_text is not None:
        return example.own_text
    if example.text is not None:
        return example.text
    return "\n".join(turn.content for turn in example.messages if turn.role != "system")


def normalised(text: str) -> str:
    """Lower case, in Unicode's compatibility form, with single spaces for punctuation and white space."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return _SEPARATORS.sub(" ", folded).strip() or " ".join(text.split())


def pieces(text: str) -> set[str]:
    """The overlapping 5-character pieces of a text as it is compared; a shorter text is one piece."""
    plain = normalised(text)
    return {plain[start : start + PIECE_LENGTH] for start in range(max(len(plain) - PIECE_LENGTH + 1, 1))}


def signatures(texts: Sequence[str]) -> SignatureArray:
    """uint32 [N, 128]: each text's MinHash, which depends on that text only: not on the others, nor on the machine."""
    parts = [_signatures(chunk) for chunk in _chunks([normalised(text) for text in texts])]
    return np.concatenate(parts) if parts else np.zeros((0, PERMUTATIONS), np.uint32)


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start, size = 0, 0
    for end, text in enumerate(texts, start=1):
        size += len(text)
        if size >= _CHUNK_CHARACTERS or end - start == _CHUNK_PAIRS:
            yield texts[start:end]
            start, size = end, 0
    if start < len(texts):
        yield texts[start:]


def _signatures(texts: Sequence[str]) -> SignatureArray:
    from rensa import RMinHash

    padded = [text.ljust(PIECE_LENGTH, "\0") for text in texts]
    lengths = np.fromiter((len(text) for text in padded), np.int64, len(padded))
    codes = np.frombuffer("".join(padded).encode("utf-32-le"), "<u4").astype(np.uint64)
    hashes = _piece_hashes(codes)
    ends = np.cumsum(lengths)
    is_piece = np.ones(len(codes), np.bool_)
    for back in range(1, PIECE_LENGTH):  # what begins there would reach into the next text
        is_piece[ends - back] = False
    offsets = np.concatenate(([0], np.cumsum(lengths - (PIECE_LENGTH - 1)))).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        hashes[is_piece[: len(hashes)]], offsets, PERMUTATIONS, _SEED
    )
    return np.array(matrix.to_rows(), np.uint32)


def _piece_hashes(codes: HashArray) -> HashArray:
    """uint64 [N - 4]: of each 5 code points in a row: a polynomial, then SplitMix64's output function."""
    hashes = np.zeros(len(codes) - PIECE_LENGTH + 1, np.uint64)
    for start in range(PIECE_LENGTH):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += codes[start : start + len(hashes)]
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


# Clusters


def clusters(signature: SignatureArray, *, threshold: float) -> IntArray:
    """Rows that are near copies, or are joined by others that are.

    What more than a tenth of the rows (and more than 5) have alike does not count, unless these rows are copies of one
    another and not of one template. Rows that are the same count once.

    Args:
        signature: uint32 [N, 128], in memory or mapped; it is read, not copied.
        threshold: Jaccard similarity from which two rows are near copies.

    Returns:
        int64 [N]: the smallest index of the cluster that each row belongs to.
    """
    same = first_with_same(_hash_columns(signature, range(PERMUTATIONS)))
    distinct = np.flatnonzero(same == np.arange(len(same)))
    limit = max(int(COMMON_SHARE * len(distinct)), COMMON_ROWS)
    common = _common(signature, distinct, limit)
    members = _joined(_Compared(signature, distinct, common, threshold))
    if common is not None:
        # half the limit: not all that have a piece need be alike enough to be one family
        for family in _families(signature, distinct, threshold, least=max(limit // 2, COMMON_ROWS) + 1):
            join(members, family[1:], family[:-1])
    return distinct[members][np.searchsorted(distinct, same)]


@dataclass(frozen=True, slots=True)
class _Compared:
    """Distinct rows, and what does not count when two of them are compared."""

    signature: SignatureArray
    rows: IntArray
    common: BitArray | None
    threshold: float

    def keys(self, band: range, some: IntArray) -> HashArray:
        return _hash_columns(self.signature, band, self.rows[some])

    def selective(self, band: range) -> IntArray:
        """The rows with something of their own in a band."""
        if self.common is None:
            return np.arange(len(self.rows))
        is_common = [self.common[:, column // 8] >> (7 - column % 8) & 1 for column in band]
        return np.flatnonzero(np.bitwise_and.reduce(is_common) == 0)

    def alike(self, some: IntArray, others: IntArray) -> BoolArray:
        """Whether rows are near copies: of the minima that are not common to both, enough agree."""
        found = np.zeros(len(some), np.bool_)
        for start in range(0, len(some), _CHUNK_PAIRS):
            chunk = slice(start, start + _CHUNK_PAIRS)
            agree = self.signature[self.rows[some[chunk]]] == self.signature[self.rows[others[chunk]]]
            counted = np.full(len(agree), PERMUTATIONS)
            if self.common is not None:
                is_common = agree & np.unpackbits(self.common[some[chunk]], axis=1).view(np.bool_)
                counted -= np.count_nonzero(is_common, axis=1)
                agree &= ~is_common
            num = np.count_nonzero(agree, axis=1)
            found[chunk] = (num >= _MIN_AGREEING) & (num >= self.threshold * counted)
        return found


def _joined(compared: _Compared) -> IntArray:
    """int64 [N]: for each of the rows, the smallest index of its cluster."""
    members = np.arange(len(compared.rows))
    width = _band_width(compared.threshold)
    bands = [range(start, start + width) for start in range(0, PERMUTATIONS, width)]
    for band, following in zip(bands, bands[1:] + bands[:1], strict=True):
        _join_band(compared, members, band, following)
    return members


def _common(signature: SignatureArray, rows: IntArray, limit: int) -> BitArray | None:
    """uint8 [N, 16]: bit j says that the row's minimum j is one that many rows have; None where no row has such.

    A minimum that many rows share is the hash of a piece that at least as many rows have.
    """
    common = np.zeros((len(rows), PERMUTATIONS // 8), np.uint8)
    for column in range(PERMUTATIONS):
        values = signature[rows, column]
        ordered = np.sort(values)
        at = np.unique(ordered[::limit])  # a run of more than `limit` equal values covers a multiple of `limit`
        often = at[np.searchsorted(ordered, at, "right") - np.searchsorted(ordered, at, "left") > limit]
        if len(often):
            common[:, column // 8] |= np.isin(values, often).astype(np.uint8) << np.uint8(7 - column % 8)
    return common if common.any() else None


# Families of copies, and templates


def _families(signature: SignatureArray, rows: IntArray, threshold: float, *, least: int) -> Iterator[IntArray]:
    """Clusters of at least `least` of the rows that share no template, or are alike without it too: indices, rising.

    Here everything counts at first. A cluster that shares a template is looked through again without that: copies of a
    few rows may all begin with one instruction.
    """
    todo = [(np.arange(len(rows)), np.zeros((len(rows), PERMUTATIONS // 8), np.uint8))]
    while todo:
        some, left_out = todo.pop()
        members = _joined(_Compared(signature, rows[some], left_out, threshold))
        first, sizes = np.unique(members, return_counts=True)
        for one in first[sizes >= least].tolist():
            own, own_left_out = some[members == one], left_out[members == one]
            template = _template(signature, rows[own], own_left_out)
            if template is None:
                continue
            if not template:
                yield own
                continue
            for column, value in template.items():
                is_template = signature[rows[own], column] == value
                own_left_out[:, column // 8] |= is_template.astype(np.uint8) << np.uint8(7 - column % 8)
            todo.append((own, own_left_out))


def _template(signature: SignatureArray, rows: IntArray, left_out: BitArray) -> dict[int, int] | None:
    """The minima of what all rows of a cluster say and add something of their own to, by column.

    Empty where the rows are copies of one another; None where what they share, besides what is left out, is too little
    to tell. A row lacks the piece that gives most rows their minimum if its own is larger, and has a piece of its own
    if that is smaller. Of copies about as many lack a piece as add one, and each lacks others: hardly a piece is in all
    rows of many. A template's pieces are in all.
    """
    if len(rows) > _SAMPLED:
        by_content = np.argsort(_hash_columns(signature, range(PERMUTATIONS), rows), kind="stable")[:_SAMPLED]
        rows, left_out = rows[by_content], left_out[by_content]
    values = signature[rows]
    usual = np.sort(values, axis=0)[(len(rows) - 1) // 2]  # what more than half of the rows have is in the middle
    has = values == usual
    num_has, num_lost = np.count_nonzero(has, axis=0), np.count_nonzero(values > usual, axis=0)
    counted = ~(has & np.unpackbits(left_out, axis=1).view(np.bool_)).any(axis=0)
    shared = counted & (2 * num_has > len(rows))
    if np.count_nonzero(shared) < _MIN_SHARED:
        return None
    lost_by_copies = float(np.mean(~has[:, counted])) / 2
    kept = shared & (num_lost <= _KEPT_SHARE * lost_by_copies * (num_lost + num_has))
    kept_by_copies = (1 - lost_by_copies) ** len(rows)
    if np.count_nonzero(kept) <= (1 + kept_by_copies) / 2 * np.count_nonzero(shared):
        return {}
    return {column: int(usual[column]) for column in np.flatnonzero(kept).tolist()}


# Bands


def _band_width(threshold: float) -> int:
    """The most minima to a band with which hardly a pair at the threshold is missed."""
    for width in (32, 16, 8, 4, 2):
        if 1 - (1 - threshold**width) ** (PERMUTATIONS // width) >= _MIN_RECALL:
            return width
    return 1


def _join_band(compared: _Compared, members: IntArray, band: range, following: range) -> None:
    """Joins rows that agree on a band and are alike. Of many that agree, those next to each other are compared."""
    rows = compared.selective(band)
    keys = compared.keys(band, rows)
    order = np.argsort(keys, kind="stable")
    rows, keys = rows[order], keys[order]
    equal = keys[1:] == keys[:-1]
    grouped = np.zeros(len(rows), np.bool_)
    grouped[1:] |= equal
    grouped[:-1] |= equal
    rows, keys = rows[grouped], keys[grouped]
    # near copies agree on most bands: ordered by the next one they stand side by side
    order = np.lexsort((rows, compared.keys(following, rows), keys))
    rows, keys = rows[order], keys[order]
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    window = np.where(sizes > _LARGE_GROUP, _WINDOW_OF_LARGE, _WINDOW)[group]
    for distance in range(1, _WINDOW + 1):
        candidate = (keys[distance:] == keys[:-distance]) & (distance <= window[distance:])
        if not candidate.any():
            return
        some, others = rows[:-distance][candidate], rows[distance:][candidate]
        apart = members[some] != members[others]
        some, others = some[apart], others[apart]
        alike = compared.alike(some, others)
        join(members, some[alike], others[alike])


def _hash_columns(signature: SignatureArray, columns: range, rows: IntArray | None = None) -> HashArray:
    """uint64 [N]: a hash of some of the minima of each row."""
    hashes = np.zeros(len(signature) if rows is None else len(rows), np.uint64)
    for column in columns:
        values = signature[:, column] if rows is None else signature[rows, column]
        hashes = (hashes ^ values) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(32)
    return hashes
