"""Examples -> token ids, and which of them are targets.

Targets are found by position in the text, never by token id: the end token of an answer is a target even where the
tokenizer pads with the same token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from core.errors import UserError
from core.protocols import TokenArray
from data.batches import BoolArray
from data.formats import Example, Message
from data.lines import Line
from data.sources import count
from data.token_rows import TokenRows

if TYPE_CHECKING:
    from data.check.inspection import Inspection

_DATE = "26 Jul 2024"
"""Written for today's date by templates that ask for it (Llama's own default), so that rows are the same every day."""
_FIXED_DATE = f"{{%- macro strftime_now(format) -%}}{_DATE}{{%- endmacro -%}}"
_CHUNK = 512
"""Rows in one call of the tokenizer: enough to keep its threads busy, few enough to fit in memory."""
_CHUNK_CHARACTERS = 1 << 20
"""Characters in one, about: an encoding takes some 100 bytes a token."""


class Encoding(Protocol):
    """What is used of a `tokenizers.Encoding`: tokens and characters of one text."""

    ids: list[int]

    def char_to_token(self, char_pos: int) -> int | None: ...

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None: ...


class Tokenizer(Protocol):
    """What is used of a fast tokenizer of transformers."""

    chat_template: Any
    bos_token_id: int | None
    eos_token_id: int | None
    eos_token: str | None

    def __call__(self, text: list[str], **options: Any) -> Any: ...

    def apply_chat_template(self, conversation: list[list[dict[str, str]]], **options: Any) -> Any: ...


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """The fast tokenizer of a model folder.

    Raises:
        UserError: the folder has none, or only a slow one, which can't say which token covers which characters.
    """
    from transformers import AutoTokenizer

    if not any(folder.glob("tokenizer*")):
        raise UserError(
            f"{folder}: no tokenizer (tokenizer.json) in this folder",
            hint="copy the tokenizer files of the original model into it",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: the tokenizer can't be loaded ({reason})",
            hint="download the model again; it must have a tokenizer.json",
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: {type(tokenizer).__name__} is not a fast tokenizer",
            hint="use a model that has a tokenizer.json",
        )
    loaded: Tokenizer = tokenizer
    return loaded


Span = tuple[int, int]
"""Characters [start, end) of a text."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as text, with the place of each answer in it, its end-of-turn token included."""

    text: str
    spans: tuple[Span, ...]
    is_template: bool = False


@dataclass(slots=True)
class RenderCounts:
    """What was done to rows that a person should know of."""

    num_merged: int = 0
    """System messages that went before the user's first."""
    num_searched: int = 0
    """Rows whose answers were found by their content."""
    plain_layout: str = ""
    """How rows are written where there is no chat template."""

    def add(self, other: RenderCounts) -> None:
        self.num_merged += other.num_merged
        self.num_searched += other.num_searched
        self.plain_layout = other.plain_layout or self.plain_layout


class Renderer:
    """Examples -> text: with the tokenizer's chat template, or plainly where it has none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        template = tokenizer.chat_template
        dated = isinstance(template, str) and "strftime_now" in template
        self._options = {"chat_template": _FIXED_DATE + template} if dated else {}
        self.takes_system = self.has_template and self._takes_system()
        self.head, self.tail = self._around_answer() if self.has_template else ("", "")
        pieces = dict.fromkeys([self.tail, *self.tail.split()[:1]])
        self._tails = [re.compile(r"\s*" + re.escape(piece)) for piece in pieces if piece]
        self.counts = RenderCounts()

    def render(self, example: Example) -> Rendered | None:
        """None where an answer can't be found in the template's text. Raises `UserError` if the template refuses."""
        if example.text is not None:
            return Rendered(example.text, ((0, len(example.text)),))
        if self.has_template:
            return self._with_template(example)
        return self._plain_pair(example) if example.is_pair else self._plain_chat(example)

    def prompt(self, messages: Sequence[Message], *, is_pair: bool) -> str:
        """The text of a conversation up to where the answer begins, as a row that goes on with the answer has it.

        Args:
            messages: the last is of the user.
            is_pair: without a chat template, as rows of prompt and completion are written, not as chats are.

        Raises:
            UserError: the chat template refuses the conversation.
        """
        if not self.has_template:
            return self._plain_question(messages) if is_pair else f"{self._plain_turns(messages)[0]}\n\nAssistant:\n"
        try:
            return self._template([self._merged(messages)], prompt=True)[0]
        except _template_errors() as error:
            raise _refused("", error) from None

    def findings(self) -> list[Line]:
        counts, found = self.counts, []
        if counts.plain_layout:
            found.append(Line("no-template", f"the tokenizer has no chat template: {counts.plain_layout}"))
        if num := counts.num_merged:
            text = f"the chat template takes no system message: in {count(num, 'row')} it went before the user's first"
            found.append(Line("system-merged", text, num))
        if num := counts.num_searched:
            text = (
                f"{count(num, 'row')}: the chat template's prompt is not the beginning of the whole text; answers were "
                "found by their content"
            )
            found.append(Line("template-prompt", text, num))
        if self._options:
            found.append(Line("fixed-date", f"the chat template writes today's date: it is always {_DATE} here"))
        if self.tokenizer.eos_token_id is None:
            found.append(Line("no-end", "the tokenizer has no end token: the model does not learn to stop"))
        return found

    def _plain_pair(self, example: Example) -> Rendered:
        self.counts.plain_layout = "prompt and completion are joined as plain text"
        prompt, completion = (turn.content for turn in example.messages)
        if not prompt[-1].isspace() and not completion[0].isspace():
            prompt += "\n"
        text = prompt + completion
        return Rendered(text, ((len(prompt), len(text)),))

    def _plain_chat(self, example: Example) -> Rendered:
        """`<system>`, then `User:` and `Assistant:` lines with the text below; each answer has the end token."""
        text, spans = self._plain_turns(example.messages)
        return Rendered(text, tuple(spans))

    def _plain_turns(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        self.counts.plain_layout = "messages are written under `User:` and `Assistant:` lines"
        text = ""
        spans = []
        for turn in messages:
            text += "\n\n" if text else ""
            text += {"system": "", "user": "User:\n", "assistant": "Assistant:\n"}[turn.role]
            start = len(text)
            text += turn.content
            if turn.role == "assistant":
                text += self.tokenizer.eos_token or ""
                spans.append((start, len(text)))
        return text, spans

    def _plain_question(self, messages: Sequence[Message]) -> str:
        """A prompt that a completion follows. Rows have no system message here: it becomes the prompt's beginning."""
        self.counts.plain_layout = "prompt and completion are joined as plain text"
        prompt = "\n\n".join(turn.content for turn in messages)
        return prompt if prompt[-1].isspace() else prompt + "\n"

    def _with_template(self, example: Example) -> Rendered | None:
        messages = self._merged(example.messages)
        answers = [index for index, turn in enumerate(messages) if turn.role == "assistant"]
        try:
            whole = self._template([messages], prompt=False)[0]
            prompts = self._template([messages[:index] for index in answers], prompt=True)
        except _template_errors() as error:
            raise _refused(f"{example.place}: ", error) from None
        spans = self._spans(whole, messages, prompts)
        if spans is None:
            return None
        self.counts.num_searched += not all(whole.startswith(prompt) for prompt in prompts)
        return Rendered(whole, tuple(spans), is_template=True)

    def _merged(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Where the template takes no system message, it goes before the user's first."""
        if messages[0].role != "system" or self.takes_system:
            return messages
        self.counts.num_merged += 1
        first = Message("user", f"{messages[0].content}\n\n{messages[1].content}")
        return first, *messages[2:]

    def _template(self, conversations: Sequence[Sequence[Message]], *, prompt: bool) -> list[str]:
        texts: list[str] = self.tokenizer.apply_chat_template(
            [[{"role": turn.role, "content": turn.content} for turn in turns] for turns in conversations],
            tokenize=False,
            add_generation_prompt=prompt,
            **self._options,
        )
        return texts

    def _takes_system(self) -> bool:
        """Some templates raise on a system message, and some leave it out."""
        mark = "Systemwords"
        exchange = [Message("system", mark), Message("user", "Hi"), Message("assistant", "Ho")]
        try:
            return mark in self._template([exchange], prompt=False)[0]
        except _template_errors():
            return False

    def _around_answer(self) -> tuple[str, str]:
        """What the template writes between its prompt and an answer, and behind the last answer."""
        question, mark = Message("user", "Questionwords"), "Answerwords"
        try:
            whole = self._template([[question, Message("assistant", mark)]], prompt=False)[0]
            prompt = self._template([[question]], prompt=True)[0]
        except _template_errors():
            return "", ""  # a row meets the same error, and can be named
        before, found, behind = whole.rpartition(mark)
        if not found:
            return "", ""
        return before[len(prompt) :] if before.startswith(prompt) else "", behind.rstrip()

    def _spans(self, whole: str, messages: Sequence[Message], prompts: Sequence[str]) -> list[Span] | None:
        """The place of each answer; None if one can't be found."""
        spans: list[Span] = []
        cursor = 0
        for number, prompt in enumerate(prompts):
            later = prompts[number + 1 :]
            at = len(messages) - 2 * len(later) - 1  # turns alternate, and the last is an answer
            answer = messages[at].content
            if whole.startswith(prompt) and len(prompt) >= cursor:
                span = self._span_after(whole, answer, len(prompt), messages[at + 1 :])
            else:
                asked = _find(whole, messages[at - 1].content, cursor)
                span = self._searched(whole, answer, asked[1], not later) if asked else None
            if span is None or span[0] >= span[1]:
                return None
            spans.append(span)
            cursor = span[1]
        return spans

    def _span_after(self, whole: str, answer: str, start: int, later: Sequence[Message]) -> Span | None:
        """From the end of the prompt to the end of the turn."""
        if not later:
            return start, len(whole.rstrip())
        head = start + len(self.head) if whole.startswith(self.head, start) else start
        for text in (answer, answer.strip()):
            if whole.startswith(text, head):
                return start, self._behind(whole, head + len(text))
        found = _find(whole, answer, start)
        if found is None or _find(whole, later[0].content, found[1]) is None:  # found in the next question
            return None
        return start, self._behind(whole, found[1])

    def _searched(self, whole: str, answer: str, cursor: int, is_last: bool) -> Span | None:
        """The answer itself, for templates whose prompt is not the beginning of the whole text."""
        end = len(whole.rstrip())
        if is_last:
            for text in (answer, answer.strip()):
                if whole.endswith(text + self.tail, cursor, end):
                    return end - len(text + self.tail), end
        found = _find(whole, answer, cursor)
        if found is None:
            return None
        return found[0], end if is_last else self._behind(whole, found[1])

    def _behind(self, whole: str, end: int) -> int:
        """The end of the turn's end token, if the template writes here what it writes behind the last answer."""
        matches = (tail.match(whole, end) for tail in self._tails)
        return next((match.end() for match in matches if match), end)


def _refused(place: str, error: Exception) -> UserError:
    return UserError(
        f"{place}the model's chat template refuses this conversation ({error})",
        hint="see the model's card for the messages that it takes",
    )


def _find(whole: str, content: str, start: int, stop: int | None = None) -> Span | None:
    for text in (content, content.strip()):
        found = whole.find(text, start, stop)
        if found >= 0:
            return found, found + len(text)
    return None


def _template_errors() -> tuple[type[Exception], ...]:
    from jinja2 import TemplateError

    return TemplateError, TypeError, ValueError


@dataclass(frozen=True)
class Tokenized:
    """Some rows of a split, and what became of the others."""

    rows: TokenRows
    examples: list[Example]
    """What each of the rows was made of."""
    inspection: Inspection
    """Of all of them, those without a target included."""
    num_truncated: int
    without_targets: list[str]
    """Places of rows that were left out because truncation left no target."""
    unplaced: list[str]
    """Places of rows that were left out because an answer can't be found in the template's text."""


def tokenize_examples(
    examples: Sequence[Example], renderer: Renderer, *, max_tokens: int, train_on: Literal["completions", "all"]
) -> Tokenized:
    """Token rows with at least one target each.

    Every row's text is tokenised once, as a whole. With `train_on` completions a row ends with its last target (what
    stands behind it predicts nothing). A row longer than `max_tokens` keeps its start.

    Raises:
        UserError: the chat template refuses a row.
    """
    from data.check.inspection import Inspection

    ids, is_target = [], []
    kept: list[Example] = []
    inspection = Inspection()
    unplaced: list[str] = []
    without_targets = []
    num_truncated = 0
    eos = renderer.tokenizer.eos_token_id
    rendered = _render(examples, renderer, unplaced)
    for example, all_ids, marked in _encode(rendered, renderer.tokenizer):
        row, targets = _end(all_ids, marked, eos=eos, train_on=train_on)
        num_targets = int(np.count_nonzero(targets[:max_tokens]))
        inspection.add(
            example,
            num_tokens=len(row),
            num_targets=num_targets,
            lost_targets=int(np.count_nonzero(targets[max_tokens:])),
            has_end=eos is not None and eos in row[-2:],  # a template may write a line break behind it
        )
        if not num_targets:
            without_targets.append(example.place)
            continue
        num_truncated += len(row) > max_tokens
        ids.append(row[:max_tokens])
        is_target.append(targets[:max_tokens])
        kept.append(example)
    rows = TokenRows.of(ids, is_target, [example.origin for example in kept])
    return Tokenized(rows, kept, inspection, num_truncated, without_targets, unplaced)


def _render(examples: Iterable[Example], renderer: Renderer, unplaced: list[str]) -> Iterator[tuple[Example, Rendered]]:
    for example in examples:
        text = renderer.render(example)
        if text is None:
            unplaced.append(example.place)
        else:
            yield example, text


def _encode(
    rendered: Iterator[tuple[Example, Rendered]], tokenizer: Tokenizer
) -> Iterator[tuple[Example, TokenArray, BoolArray]]:
    """Ids int32 [n] of every text, tokenised in chunks, and which of them overlap its spans, bool [n]."""
    chunk: list[tuple[Example, Rendered]] = []
    num_characters = 0
    for example, text in rendered:
        chunk.append((example, text))
        num_characters += len(text.text)
        if len(chunk) == _CHUNK or num_characters >= _CHUNK_CHARACTERS:
            yield from _encode_chunk(chunk, tokenizer)
            chunk, num_characters = [], 0
    if chunk:
        yield from _encode_chunk(chunk, tokenizer)


def _encode_chunk(
    chunk: Sequence[tuple[Example, Rendered]], tokenizer: Tokenizer
) -> Iterator[tuple[Example, TokenArray, BoolArray]]:
    is_template = chunk[0][1].is_template
    assert all(text.is_template == is_template for _, text in chunk)
    encoded = tokenizer(
        [text.text for _, text in chunk],
        # A template writes its own <s>, as in transformers' apply_chat_template; plain text gets the tokenizer's.
        add_special_tokens=not is_template,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        padding=False,
        verbose=False,
    )
    for (example, text), encoding in zip(chunk, encoded.encodings, strict=True):
        ids = np.asarray(encoding.ids, np.int32)
        is_target = np.zeros(len(ids), np.bool_)
        for span in text.spans:
            first, stop = _tokens_of(encoding, span)
            is_target[first:stop] = True
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:  # in the text, and added again
            ids, is_target = ids[1:], is_target[1:]
        yield example, ids, is_target


def _tokens_of(encoding: Encoding, span: Span) -> tuple[int, int]:
    """The tokens [first, stop) that overlap a span of characters; (0, 0) if none does.

    Asks for single characters instead of reading all offsets, which as Python tuples cost more than the tokenising.
    """
    start, end = span
    found = (encoding.char_to_token(at) for at in range(start, end))
    first = next((token for token in found if token is not None), None)
    found = (encoding.char_to_token(at) for at in range(end - 1, start - 1, -1))
    last = next((token for token in found if token is not None), None)
    if first is None or last is None:
        return 0, 0
    # a character may be several tokens, of which the first was found
    while (chars := encoding.token_to_chars(last + 1)) is not None and chars[0] < end and chars[0] < chars[1]:
        last += 1
    return first, last + 1


def _end(
    ids: TokenArray, is_target: BoolArray, *, eos: int | None, train_on: Literal["completions", "all"]
) -> tuple[TokenArray, BoolArray]:
    """Ends a row with its last target, which is the end token."""
    stop = int(np.flatnonzero(is_target)[-1]) + 1 if is_target.any() else 0
    if stop and eos is not None and ids[stop - 1] != eos:
        ids = np.append(ids[:stop], np.int32(eos))
        is_target = np.append(is_target[:stop], True)
        stop += 1
    if train_on == "all":
        is_target[:] = True
    else:
        ids, is_target = ids[:stop], is_target[:stop]
    is_target[:1] = False  # nothing comes before it that could predict it
    return ids, is_target
