"""Exported conversations of several programs -> turns.

What is known of the formats, none of which is documented by those who write them:

- ChatGPT, `conversations.json`: a list of objects with `mapping` (id -> `message`, `parent`, `children`: a tree, for
  edited questions and regenerated answers) and `current_node`, the last message shown. A message has `author.role`,
  `recipient` (`all`, or the tool that a call is for), `content.content_type` and `content.parts` (texts; objects for
  images and sound), and `metadata.is_visually_hidden_from_conversation`. Custom instructions are a hidden message of
  the type `user_editable_context`.
- Claude, `conversations.json`: a list of objects with `uuid` and `chat_messages`, each with `sender` (`human`,
  `assistant`), `text`, `content` (blocks with `type`; newer), `attachments` (with `extracted_content`) and `files`;
  in what browser extensions save also `parent_message_uuid` and `current_leaf_message_uuid`.
- ShareGPT: `conversations`, a list of `from`, `value`.
- OpenAI's files for fine-tuning, and most else: `messages`, a list of `role`, `content`; or the list alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]

_ROLES: Mapping[str, Role] = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant"},
}
_CITATION = re.compile("\ue200[^\ue201]*\ue201|【\\d+[^】]*†[^】]*】|[\ue000-\uf8ff]")
"""Marks that ChatGPT's page shows as links: their numbers mean nothing outside it."""
_NOT_SHOWN = "This block is not supported on your current device yet."
"""Claude's export, in place of a tool's call."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A message with text."""

    role: Role
    text: str
    has_more: bool = False
    """It also had an image, a sound or a file, which the text does not hold."""


class NotAConversationError(Exception):
    """Why a record can't be used, as a plural: `records that are no conversations`."""


def turns_of(record: object) -> list[Turn]:
    """A conversation's messages in order, those of tools and those hidden from the reader left out.

    Raises:
        NotAConversationError: of no format that is known, or damaged.
    """
    try:
        return list(_turns_of(record))
    except (KeyError, TypeError, AttributeError, IndexError):  # an object where a list is due, and the like
        raise NotAConversationError("damaged conversations") from None


def _turns_of(record: object) -> Iterator[Turn]:
    if isinstance(record, Mapping):
        if isinstance(record.get("mapping"), Mapping):
            return _chatgpt(record)
        for key, read in (("chat_messages", _claude), ("conversations", _plain), ("conversation", _plain)):
            if isinstance(record.get(key), list):
                return read(record) if read is _claude else _plain(record[key])
        if isinstance(record.get("messages"), list):
            return _plain(record["messages"])
    if isinstance(record, list) and record:
        return _plain(record)
    raise NotAConversationError("records that are no conversations")


def identity(record: object) -> str | None:
    """The conversation's own id, where it has one."""
    if isinstance(record, Mapping):
        for key in ("conversation_id", "uuid", "id"):
            value = record.get(key)
            if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
                return str(value)
    return None


# ChatGPT


def _chatgpt(record: Mapping[str, Any]) -> Iterator[Turn]:
    mapping = record["mapping"]
    leaf = record.get("current_node")
    path = _path({name: node.get("parent") for name, node in mapping.items()}, leaf if leaf in mapping else None)
    for name in path:
        message = mapping[name].get("message")
        if message is not None:
            yield from _chatgpt_turn(message)


def _path(parents: Mapping[str, str | None], leaf: str | None) -> list[str]:
    """From the root of a tree to a leaf, if none is given the last that is nobody's parent."""
    if leaf is None:
        inner = set(parents.values())
        leaf = next((name for name in reversed(list(parents)) if name not in inner), None)
    path: dict[str, None] = {}
    while leaf is not None and leaf in parents and leaf not in path:  # a damaged file may have a circle
        path[leaf] = None
        leaf = parents[leaf]
    return list(reversed(path))


def _chatgpt_turn(message: Mapping[str, Any]) -> Iterator[Turn]:
    content = message.get("content") or {}
    kind = content.get("content_type", "text")
    if kind == "user_editable_context":
        texts = [content.get(key) or "" for key in ("user_profile", "user_instructions")]
        yield Turn("system", "\n\n".join(text.strip() for text in texts if text.strip()))
        return
    metadata = message.get("metadata") or {}
    role = _ROLES.get(message["author"]["role"])
    is_hidden = bool(metadata.get("is_visually_hidden_from_conversation"))
    is_for_reader = message.get("recipient") in (None, "all")
    if role is None or is_hidden or not is_for_reader or kind not in ("text", "multimodal_text"):
        return
    parts = content.get("parts") or []
    texts = [part if isinstance(part, str) else part.get("text") or "" for part in parts if part is not None]
    has_more = any(isinstance(part, Mapping) and not part.get("text") for part in parts)
    has_more = has_more or (role == "user" and bool(metadata.get("attachments")))
    yield Turn(role, _CITATION.sub("", "\n\n".join(text for text in texts if text)), has_more)


# Claude


def _claude(record: Mapping[str, Any]) -> Iterator[Turn]:
    messages = record["chat_messages"]
    by_id = {message.get("uuid"): message for message in messages}
    leaf = record.get("current_leaf_message_uuid")
    if len(by_id) == len(messages) and all(message.get("parent_message_uuid") for message in messages):
        parents = {name: message["parent_message_uuid"] for name, message in by_id.items()}
        messages = [by_id[name] for name in _path(parents, leaf if leaf in by_id else None)]
    for message in messages:
        role = _ROLES.get(message["sender"])
        if role is not None:
            yield Turn(role, _claude_text(message), bool(message.get("files") or message.get("files_v2")))


def _claude_text(message: Mapping[str, Any]) -> str:
    """The text blocks, without thoughts and tools; in front of them the text of attachments, as the model read it."""
    blocks = [block for block in message.get("content") or [] if block.get("type") == "text"]
    text = "\n\n".join(block.get("text") or "" for block in blocks) or message.get("text") or ""
    given = [attachment.get("extracted_content") or "" for attachment in message.get("attachments") or []]
    text = re.sub(rf"(?:```\s*)?{re.escape(_NOT_SHOWN)}(?:\s*```)?", "", text)
    return "\n\n".join(part for part in (*given, text.strip()) if part.strip())


# The others


def _plain(messages: Sequence[Any]) -> Iterator[Turn]:
    if not all(isinstance(message, Mapping) and ("from" in message or "role" in message) for message in messages):
        raise NotAConversationError("records that are no conversations")
    for message in messages:
        role = _ROLES.get(str(message.get("from", message.get("role"))).lower())
        content = message.get("value", message.get("content"))
        if role is None or content is None:
            continue
        if isinstance(content, str):
            yield Turn(role, content)
            continue
        texts = [part["text"] for part in content if part.get("type") in ("text", "input_text", "output_text")]
        has_more = any("image" in part["type"] or "audio" in part["type"] or "file" in part["type"] for part in content)
        yield Turn(role, "\n\n".join(texts), has_more)
