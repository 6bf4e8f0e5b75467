"""Text that is not what its author wrote: wrong encodings, control characters, answers that say nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator

GARBLED = {
    "undecodable": "characters that were lost in a wrong encoding (U+FFFD)",
    "mojibake": "UTF-8 text that was read in another encoding",
    "control-characters": "control characters",
    "private-use": "private-use characters, which have no meaning without their font",
}
"""Kind -> what it is, for people."""

# Windows-1252 as Python has it leaves five bytes out, which WHATWG's decoder reads as C1 control characters.
_TABLE = {byte: bytes([byte]).decode("cp1252", errors="ignore") or chr(byte) for byte in range(0x80, 0x100)}
_BYTE_OF = {character: byte for byte, character in _TABLE.items()} | {chr(byte): byte for byte in range(0x80, 0x100)}


def _any(low: int, high: int) -> str:
    """A class of the characters that bytes low..high look like, in Windows-1252 and in Latin-1."""
    characters = {_TABLE[byte] for byte in range(low, high + 1)} | {chr(byte) for byte in range(low, high + 1)}
    return "[" + "".join(re.escape(character) for character in sorted(characters)) + "]"


_NEXT = _any(0x80, 0xBF)
# What single sequences could be by chance in real text (a French word with « … » around it) must come twice in a row.
_MOJIBAKE = re.compile(
    f"[ÂÃ]{_NEXT}|â{_NEXT}{{2}}|ð[Ÿ\x9f]{_NEXT}{{2}}"
    f"|(?:{_any(0xC4, 0xDF)}{_NEXT}){{2,}}|(?:{_any(0xE0, 0xEF)}{_NEXT}{{2}}){{2,}}"
)
_AFTER_A_WORD = re.compile("[A-ZÀ-Þ]Ã[”’»…–—]")  # MANHÃ” is Portuguese in quotation marks, not MANHÔ
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ufffe\uffff]")
_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010fffd]")
_VISIBLE = re.compile(r"[^\s\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_NOTHING = frozenset({"nan", "null", "undefined", "#n/a", "[deleted]", "[removed]", "<na>"})


def find_garbled(text: str) -> Iterator[tuple[str, str]]:
    """The kinds of garbling in a text, each once, with the first place in a few words."""
    if not text.isascii():
        if "\ufffd" in text:
            yield "undecodable", f"{text.count(chr(0xFFFD))} of U+FFFD"
        if (seen := _mojibake(text)) is not None:
            yield "mojibake", f"{seen!r}"
        if found := _PRIVATE.search(text):
            yield "private-use", f"U+{ord(found[0]):04X}"
    if (found := _CONTROL.search(text)) and not (0x80 <= ord(found[0]) < 0xA0 and _mojibake(text)):
        yield "control-characters", f"U+{ord(found[0]):04X}"


def _mojibake(text: str) -> str | None:
    """The first characters that are UTF-8 when taken for bytes again."""
    for found in _MOJIBAKE.finditer(text):
        if _AFTER_A_WORD.fullmatch(text[max(found.start() - 1, 0) : found.end()]):
            continue
        try:
            bytes(_BYTE_OF[character] for character in found[0]).decode()
        except UnicodeDecodeError:
            continue
        return found[0]
    return None


def says_nothing(answer: str) -> str:
    """Why an answer is as good as empty, in a few words; empty if it is not."""
    if not _VISIBLE.search(answer):
        return "no visible character"
    word = answer.strip().lower()
    return f"only {word!r}" if word in _NOTHING else ""
