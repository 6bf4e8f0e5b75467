"""What the split and the check know of each row: hashes instead of texts, so that a million rows fit in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from core.protocols import IntArray, TokenArray
from core.seeding import stable_hash

if TYPE_CHECKING:
    from data.formats import Example

HashArray = npt.NDArray[np.uint64]
SignatureArray = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class RowKeys:
    """Keys of the rows of one split, in their order."""

    position: HashArray
    """uint64 [N]: where the split puts a row, a function of (seed, content); `position / 2**64` is in [0, 1)."""
    equal: HashArray
    """uint64 [N]: hash of the token ids."""
    prompt: HashArray
    """uint64 [N]: hash of all messages but the last answer; 0 for a row of text."""
    answer: HashArray
    """uint64 [N]: hash of the last answer, of a row's text, or of the label of a premise and a hypothesis."""
    group: HashArray | None = None
    """uint64 [N]: hash of `Example.group`, where `data.group` is set; a row without a value is a group of its own."""
    stratum: HashArray | None = None
    """uint64 [N]: hash of `Example.stratum`, where `data.stratify` is set; rows without a value are one stratum."""
    signature: SignatureArray | None = None
    """uint32 [N, 128]: MinHash of the text; None where near copies do not matter."""

    def __len__(self) -> int:
        return len(self.position)

    def select(self, indices: Sequence[int] | IntArray) -> RowKeys:
        """The keys of some of the rows."""
        chosen = np.asarray(indices, np.int64)
        columns = ((field.name, getattr(self, field.name)) for field in fields(self))
        some: dict[str, Any] = {name: None if column is None else column[chosen] for name, column in columns}
        return RowKeys(**some)


def positions(content: HashArray, *, seed: int) -> HashArray:
    """uint64 [N]: `RowKeys.position` of rows with these content hashes.

    SplitMix64's output function (Steele, Lea and Flood 2014), a bijection of 64 bits, over the content's hash plus a
    hash of the seed: rows that differ keep different positions, and another seed gives an unrelated order.
    """
    mixed = content + np.uint64(stable_hash(seed, "split") >> 64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def hash_text(text: str) -> int:
    """64 bits of BLAKE2b."""
    return _hash(text.encode(errors="surrogatepass"))


def hash_tokens(ids: TokenArray, *more: npt.NDArray[np.bool_]) -> int:
    """64 bits of BLAKE2b over token ids, and over which of them are targets, if that is given."""
    return _hash(ids.astype("<i4", copy=False).tobytes() + b"".join(np.packbits(array).tobytes() for array in more))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def prompt_and_answer(example: Example) -> tuple[int, int]:
    """`RowKeys.prompt` and `RowKeys.answer` of an example."""
    if example.text is not None:
        return 0, hash_text(example.text)
    if example.own_text is not None and example.label is not None:
        # the last paragraph of our template says whether an explanation is asked for, which not every row has
        return hash_text(example.messages[0].content.rpartition("\n\n")[0]), hash_text(example.label)
    prompt = json.dumps([[turn.role, turn.content] for turn in example.messages[:-1]])
    return hash_text(prompt), hash_text(example.messages[-1].content)
