"""Blocks -> overlapping chunks of at most N tokens, at sentence borders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from data.prepare.documents_blocks import Block
from data.prepare.documents_sentences import sentences

CountTokens = Callable[[list[str]], list[int]]
"""How many tokens each text has, without special tokens."""

_SMALL = 8
"""A last chunk that adds less than an eighth of the limit goes to the one before, if it fits."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A sentence, a line of code, or a part of one that is too long: what is never cut."""

    text: str
    gap: str
    """White space between it and the piece before."""
    keeps_next: bool = False
    """A heading: no chunk ends with it if that can be helped."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Pieces [start, stop) of a document; the first `num_repeated` of them were in the chunk before as well."""

    text: str
    start: int
    stop: int
    num_repeated: int
    num_tokens: int


def pieces_of(blocks: Sequence[Block], *, max_tokens: int, count_tokens: CountTokens) -> tuple[list[Piece], list[int]]:
    """The pieces of a document, none of more than `max_tokens`, and the tokens of each, the gap before it included.

    Gaps and texts joined are the whole document.
    """
    whole = [piece for index in range(len(blocks)) for piece in _split(blocks, index)]
    pieces: list[Piece] = []
    numbers: list[int] = []
    for piece, number in zip(whole, count_tokens([piece.gap + piece.text for piece in whole]), strict=True):
        if number <= max_tokens:
            pieces.append(piece)
            numbers.append(number)
        else:
            parts = list(_cut(piece, max_tokens, count_tokens))
            pieces += parts
            numbers += count_tokens([part.gap + part.text for part in parts])
    return pieces, numbers


def _split(blocks: Sequence[Block], index: int) -> Iterator[Piece]:
    block = blocks[index]
    in_list = index > 0 and block.kind == blocks[index - 1].kind == "item"
    first_gap = "" if index == 0 else "\n" if in_list else "\n\n"
    if block.kind == "heading":
        yield Piece(block.text, first_gap, keeps_next=True)
        return
    parts = _lines(block.text) if block.kind == "lines" else sentences(block.text)
    for gap, text in parts:
        yield Piece(text, first_gap or gap)
        first_gap = ""


def _lines(text: str) -> Iterator[tuple[str, str]]:
    gap = ""
    for line in text.split("\n"):
        if line.strip():
            yield gap, line
            gap = "\n"
        else:
            gap += "\n"


def _cut(piece: Piece, max_tokens: int, count_tokens: CountTokens) -> Iterator[Piece]:
    """Halves it at the word border nearest to the middle, until every part fits: parts of like length."""
    text = piece.text
    if len(text) < 2 or count_tokens([text])[0] <= max_tokens:
        yield piece
        return
    middle = len(text) // 2
    before, behind = text.rfind(" ", 1, middle + 1), text.find(" ", middle, len(text) - 1)
    borders = [border for border in (before, behind) if border > 0]
    at = min(borders, key=lambda border: abs(border - middle)) if borders else middle
    first, rest = text[:at], text[at:]
    inner = rest.lstrip()
    if not first.strip() or not inner:  # only spaces on one side
        yield piece
        return
    gap = rest[: len(rest) - len(inner)]
    yield from _cut(Piece(first, piece.gap), max_tokens, count_tokens)
    yield from _cut(Piece(inner, gap, piece.keeps_next), max_tokens, count_tokens)


def join(pieces: Sequence[Piece]) -> str:
    """The text of pieces that follow each other, without the gap before the first."""
    return "".join(piece.gap + piece.text for piece in pieces)[len(pieces[0].gap) :] if pieces else ""


def make_chunks(
    blocks: Sequence[Block], *, max_tokens: int, overlap: int, count_tokens: CountTokens
) -> tuple[list[Piece], list[Chunk]]:
    """All pieces of a document, and the chunks that cover them.

    Every chunk has at most `max_tokens`, starts with the last whole pieces of the chunk before that have at most
    `overlap` tokens together, and adds at least one piece. A last chunk that adds less than an eighth of `max_tokens`
    goes to the one before, if that has room for it without what it repeats.
    """
    pieces, numbers = pieces_of(blocks, max_tokens=max_tokens, count_tokens=count_tokens)
    if not pieces:
        return [], []
    packer = _Packer(pieces, numbers, max_tokens=max_tokens, overlap=overlap, count_tokens=count_tokens)
    return pieces, list(packer.chunks())


class _Packer:
    def __init__(
        self,
        pieces: Sequence[Piece],
        numbers: Sequence[int],
        *,
        max_tokens: int,
        overlap: int,
        count_tokens: CountTokens,
    ) -> None:
        self.pieces = pieces
        # joined, pieces may have more tokens or fewer than alone, so whole chunks are counted again
        self.numbers = numbers
        self.max_tokens = max_tokens
        self.overlap = overlap
        self.count_tokens = count_tokens

    def chunks(self) -> Iterator[Chunk]:
        waiting: Chunk | None = None
        start, added = 0, 0
        while added < len(self.pieces):
            chunk = self._next(start, added)
            if waiting is not None:
                merged = self._merged(waiting, chunk)
                if merged is not None:
                    waiting = merged
                    break
                yield waiting
            waiting = chunk
            added = chunk.stop
            start = self._repeat_from(chunk)
        assert waiting is not None
        yield waiting

    def _next(self, start: int, added: int) -> Chunk:
        """As many pieces from `start` as fit, `added` and on being new; it begins later where else nothing new fits."""
        stop, number = start, 0
        while stop < len(self.pieces) and (number := number + self.numbers[stop]) <= self.max_tokens:
            stop += 1
        stop = max(stop, added + 1)
        while (number := self._count(start, stop)) > self.max_tokens:
            if stop > added + 1:
                stop -= 1
            elif start < added:
                start += 1
            else:
                break  # one piece, which `_cut` could not make smaller
        stop = self._without_last_heading(added, stop)
        if stop < len(self.pieces):
            number = self._count(start, stop)
        return Chunk(join(self.pieces[start:stop]), start, stop, added - start, number)

    def _without_last_heading(self, added: int, stop: int) -> int:
        """A heading goes with what is under it, unless the chunk has nothing else that is new."""
        if stop == len(self.pieces):
            return stop
        shorter = stop
        while shorter > added and self.pieces[shorter - 1].keeps_next:
            shorter -= 1
        return shorter if shorter > added else stop

    def _repeat_from(self, chunk: Chunk) -> int:
        """Where the next chunk begins: the overlap is shorter than the chunk that it is taken from."""
        start, number = chunk.stop, 0
        while start > chunk.start + 1 and (number := number + self.numbers[start - 1]) <= self.overlap:
            start -= 1
        while start < chunk.stop and self._count(start, chunk.stop) > self.overlap:
            start += 1
        return start

    def _merged(self, before: Chunk, last: Chunk) -> Chunk | None:
        """Both as one, without what `before` repeats, if the last adds little and it fits."""
        added = last.start + last.num_repeated
        if last.stop < len(self.pieces) or self._count(added, last.stop) >= self.max_tokens / _SMALL:
            return None
        for start in range(before.start, before.start + before.num_repeated + 1):
            number = self._count(start, last.stop)
            if number <= self.max_tokens:
                repeated = before.start + before.num_repeated - start
                return Chunk(join(self.pieces[start : last.stop]), start, last.stop, repeated, number)
        return None

    def _count(self, start: int, stop: int) -> int:
        return self.count_tokens([join(self.pieces[start:stop])])[0]
