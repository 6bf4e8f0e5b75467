"""`data prepare chat`: exported conversations -> rows of messages.

Reads what `data/prepare/chat_exports.py` lists: JSON, JSONL, the `.zip` that is sent, or a folder of these. Rows have
the columns `messages`, `conversation`, by which they are to be grouped, and `source`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from core.errors import UserError
from data.prepare.chat_exports import NotAConversationError, Turn, identity, turns_of
from data.prepare.common import FoundFile, Record, Sample, Seen, walk_files

_ENDINGS = (".json", ".jsonl", ".ndjson", ".zip")


@dataclass(frozen=True, slots=True)
class Chat:
    """Conversations that start with a question and end with an answer."""

    system: Literal["keep", "drop"] = "keep"
    turns: int | None = None
    """Questions with their answers that a row has at most; None: whole conversations."""
    overlap: int = 1
    """How many of them a row shares with the one before of the same conversation."""
    name: Literal["chat"] = "chat"
    group: Literal["conversation"] = "conversation"

    def settings(self) -> Mapping[str, Any]:
        return {"system": self.system, "turns": self.turns, "overlap": self.overlap}

    def tools(self) -> Mapping[str, str]:
        return {}

    def samples(self, source: Path, record: Record) -> Iterator[Sample]:
        """Raises: UserError: no such file or folder, not readable, or a single file that is no JSON."""
        files = list(walk_files(source, record))
        record.expect(len(files))
        seen = Seen()
        for file in files:
            if not file.name.lower().endswith(_ENDINGS):
                if source.is_file():
                    raise UserError(f"{source}: no kind of export that can be read", hint="give .json, .jsonl or .zip")
                record.left_out.add("files that are no exports", file.name)
            else:
                yield from self._of_file(file, record, seen)
            record.advance()

    def _of_file(self, file: FoundFile, record: Record, seen: Seen) -> Iterator[Sample]:
        content = record.read(file.path, file.name)
        for number, found in enumerate(_records(file, content), start=1):
            where = f"{file.name}:{number}"
            if isinstance(found, NotAConversationError):
                record.left_out.add(str(found), where)
                continue
            try:
                turns = self._tidy(turns_of(found), where, record)
            except NotAConversationError as problem:
                record.left_out.add(str(problem), where)
                continue
            if not turns:
                record.left_out.add("conversations without an answer", where)
            elif not seen.is_new(json.dumps([[turn.role, turn.text] for turn in turns])):
                record.left_out.add("conversations that repeat another", where)
            else:
                for messages in self._windows(turns):
                    values = {"messages": messages, "conversation": identity(found) or where}
                    yield Sample(values, source=file.name)

    def _tidy(self, turns: Sequence[Turn], where: str, record: Record) -> list[Turn]:
        """System message or none, then question and answer in turn; empty if nothing is left."""
        filled = [replace(turn, text=turn.text.strip()) for turn in turns if turn.text.strip() or turn.has_more]
        system = _system(filled) if self.system == "keep" else []
        spoken = [turn for turn in filled if turn.role != "system"]
        cut = next((at for at, turn in enumerate(spoken) if turn.has_more), len(spoken))
        if cut < len(spoken):
            # what comes later speaks of what the model would not see
            record.noted.add("conversations cut before an image or a file", where)
            spoken = spoken[:cut]
        while spoken and spoken[0].role != "user":
            spoken.pop(0)
        while spoken and spoken[-1].role != "assistant":
            spoken.pop()
        return [*system, *_joined(spoken)] if spoken else []

    def _windows(self, turns: Sequence[Turn]) -> Iterator[list[dict[str, str]]]:
        head = list(turns[:1]) if turns[0].role == "system" else []
        pairs = [turns[at : at + 2] for at in range(len(head), len(turns), 2)]
        size = self.turns or len(pairs)
        start = 0
        while True:
            chosen = [*head, *(turn for pair in pairs[start : start + size] for turn in pair)]
            yield [{"role": turn.role, "content": turn.text} for turn in chosen]
            if start + size >= len(pairs):
                return
            start += size - self.overlap


def _system(turns: Sequence[Turn]) -> list[Turn]:
    """Those before the first question, as one."""
    texts = []
    for turn in turns:
        if turn.role != "system":
            break
        texts.append(turn.text)
    return [Turn("system", "\n\n".join(texts))] if texts else []


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role:
            joined[-1] = replace(turn, text=f"{joined[-1].text}\n\n{turn.text}")
        else:
            joined.append(turn)
    return joined


def make_kind(options: Mapping[str, Any]) -> Chat:
    """From the arguments `system`, `turns` and `overlap`. Raises `UserError` if rows would share all their turns."""
    turns, overlap = options.get("turns"), options.get("overlap", 1)
    if turns is not None and overlap >= turns:
        raise UserError(
            f"--overlap {overlap} leaves nothing new in rows of --turns {turns}",
            hint=f"give --overlap {turns - 1} or less",
        )
    return Chat(options.get("system", "keep"), turns, overlap)


# Files


def _records(file: FoundFile, content: bytes) -> Iterator[object]:
    """Objects of a file that may be conversations, and errors for lines that can't be read."""
    if file.name.lower().endswith(".zip"):
        yield from _of_archive(file, content)
    elif file.name.lower().endswith(".json"):
        yield from _of_json(content)
    else:
        yield from _of_lines(content)


def _of_archive(file: FoundFile, content: bytes) -> Iterator[object]:
    """Of the `conversations….json` files in an export as it was sent."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in sorted(archive.namelist()) if _is_export(name)]
            if not names:
                yield NotAConversationError("archives without conversations.json")
            for name in names:
                yield from _of_json(archive.read(name))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError):  # damaged, or with a password
        yield NotAConversationError("archives that can't be read")


def _is_export(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.startswith("conversations") and last.endswith(".json")


def _of_json(content: bytes) -> Iterator[object]:
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # many a .json file is JSONL
            yield from _of_lines(content)
        else:
            yield NotAConversationError("files that are not JSON")
    except (UnicodeDecodeError, RecursionError, ValueError):
        yield NotAConversationError("files that are not JSON")
    else:
        yield from _conversations_in(value)


def _conversations_in(value: object) -> Iterator[object]:
    if isinstance(value, list):
        is_one = bool(value) and all(isinstance(item, Mapping) and _is_message(item) for item in value)
        yield from [value] if is_one else value
    elif isinstance(value, Mapping) and isinstance(value.get("conversations"), list):
        inner = value["conversations"]
        is_one = bool(inner) and all(isinstance(item, Mapping) and _is_message(item) for item in inner)
        yield from [value] if is_one else inner
    else:
        yield value


def _is_message(item: Mapping[str, Any]) -> bool:
    return ("role" in item and "content" in item) or ("from" in item and "value" in item)


def _of_lines(content: bytes) -> Iterator[object]:
    # Only \n ends a line: JSON strings may hold U+2028, at which str.splitlines would cut.
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip():
            continue
        try:
            yield json.loads(line.decode())
        except (ValueError, RecursionError):
            yield NotAConversationError("lines that are not JSON")
