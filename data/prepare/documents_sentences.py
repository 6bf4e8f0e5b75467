"""Running text -> sentences, by rules that look at a few characters around each full stop.

For borders of chunks only: a border that is missed makes a longer sentence, and one too many a shorter one. Where a
rule can't decide ("et al. We", "vitamin C. The"), it rather misses one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from data.prepare.documents_blocks import words

_CLOSERS = "\"'”’»›」』）】》〉)\\]}*_`"
_BORDER = re.compile(
    rf"(?:[.!?…؟।॥۔]+[{_CLOSERS}]*(?=\s)|[。！？｡．]+[{_CLOSERS}]*)\s*",  # the CJK marks need no space behind them
)
_LAST_WORD = re.compile(r"[^\s(\[{“„«\"']+$")
_NUMBERING = re.compile(r"\s*(?:[-*•]\s+)?(?:\d+|[A-Za-z]|[ivxlc]+)\.\s*")

_ABBREVIATIONS = words(
    """
    e.g i.e cf vs viz approx resp ca c fig figs eq eqs sec secs ch chap no nos vol vols pp p ed eds para art
    mr mrs ms dr prof st mt sr rev hon gen col capt lt sgt gov sen rep pres
    jan feb mar apr jun jul aug sep sept oct nov dec
    z.b d.h u.a s.o s.u bzw ggf evtl vgl nr abb tab bd hrsg str
    p.ex m mm mme mlle av n.b al incl excl min max std dept est ref refs def thm lem prop cor
    """
)
"""Without the last full stop, in lower case: what hardly ever ends a sentence."""


def sentences(text: str) -> Iterator[tuple[str, str]]:
    """Sentences of one paragraph, and the white space in front of each: joined, they are the text again.

    White space at the end of the text goes with the last sentence. A text without a border is one sentence.
    """
    start, gap = 0, ""
    for match in _BORDER.finditer(text):
        if match.end() == len(text) or not _ends_sentence(text, start, match):
            continue
        sentence = text[start : match.end()]
        stripped = sentence.rstrip()
        yield gap, stripped
        gap = sentence[len(stripped) :]
        start = match.end()
    if start < len(text):
        yield gap, text[start:]


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    behind = text[match.end()]
    if behind.islower():
        return False
    mark = match[0].strip()
    if not mark.startswith(".") or mark.startswith(".."):
        return True
    if _NUMBERING.fullmatch(text, start, match.end()):  # "2. Results"
        return False
    found = _LAST_WORD.search(text, start, match.start())
    word = found[0] if found else ""
    is_initial = len(word) == 1 and word.isupper()
    if is_initial or word.lower() in _ABBREVIATIONS:
        return False
    # "U.S. Army", "a.m. (local time)": letters with full stops between them
    return not re.fullmatch(r"(?:\w\.)+\w", word)
