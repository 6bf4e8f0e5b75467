"""`data prepare documents`: text, Markdown, HTML, PDF and LaTeX -> clean text in overlapping chunks.

Rows have the columns `text`, `chunk` (its number in the document, counted from 1), `title` and `source`, by which they
are to be grouped: chunks of one document share sentences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any, Literal

from core.errors import UserError
from data.prepare.common import FoundFile, Record, Sample, Seen, walk_files
from data.prepare.documents_blocks import Document, UnreadableError, decode, words
from data.prepare.documents_chunks import CountTokens, make_chunks
from data.prepare.documents_html import read_html
from data.prepare.documents_latex import read_latex
from data.prepare.documents_markdown import read_markdown
from data.prepare.documents_pdf import read_pdf
from data.prepare.documents_text import read_text

_READERS: Mapping[str, Callable[[str], Document]] = {
    **dict.fromkeys((".txt", ".text"), read_text),
    **dict.fromkeys((".md", ".markdown", ".mdown"), read_markdown),
    **dict.fromkeys((".html", ".htm", ".xhtml"), read_html),
    **dict.fromkeys((".tex", ".latex"), read_latex),
}
_NAMES = words("README INSTALL FAQ HOWTO MANUAL GUIDE")
"""Of text files without an ending."""
_NO_DOCUMENTS = words("CMakeLists.txt requirements.txt constraints.txt robots.txt")
_SKIPPED_FOLDERS = {
    **dict.fromkeys((".git", ".hg", ".svn"), "folders of version control"),
    **dict.fromkeys(("node_modules", "__pycache__", ".venv", "venv", "site-packages"), "folders of dependencies"),
}
_FEWEST_LETTERS = 0.3
"""Of the visible characters: prose has 0.8, code 0.6, and a table of measurements next to none."""
_FEWEST = 16
"""Tokens that a chunk must have room for."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


@dataclass(frozen=True, slots=True)
class Documents:
    """Chunks of at most `max_tokens`, special tokens of a row included, that repeat at most `overlap` of each other."""

    max_tokens: int
    overlap: int
    num_special: int
    """Tokens that training adds to a row: at its start, and the end token."""
    tokenizer: str
    """What tells the tokenizer from others."""
    count_tokens: CountTokens
    name: Literal["documents"] = "documents"
    group: Literal["source"] = "source"

    def settings(self) -> Mapping[str, Any]:
        return {"tokens": self.max_tokens, "overlap": self.overlap, "tokenizer": self.tokenizer}

    def tools(self) -> Mapping[str, str]:
        names = ("beautifulsoup4", "markdown-it-py", "pylatexenc", "pypdf", "tokenizers")
        return {name: version(name) for name in names}

    def samples(self, source: Path, record: Record) -> Iterator[Sample]:
        """Raises: UserError: no such file or folder, not readable, or a single file of no known kind."""
        if source.is_file() and not _is_known(source.name):
            raise UserError(
                f"{source}: {source.suffix or 'no ending'} is no kind of document that can be read",
                hint="give text (.txt), Markdown (.md), HTML (.html), PDF (.pdf) or LaTeX (.tex), or a folder of them",
            )
        files = list(walk_files(source, record, skipped_folders=_SKIPPED_FOLDERS))
        record.expect(len(files))
        seen = Seen()
        for file in files:
            yield from self._of_file(file, record, seen)
            record.advance()

    def _of_file(self, file: FoundFile, record: Record, seen: Seen) -> Iterator[Sample]:
        if not _is_known(file.name):
            record.left_out.add("files that are no documents", file.name)
            return
        try:
            document = read_document(file.name, record.read(file.path, file.name))
        except UnreadableError as problem:
            record.left_out.add(str(problem), file.name)
            return
        text = "\n\n".join(block.text for block in document.blocks)
        if not any(char.isalnum() for char in text):
            record.left_out.add("documents without text", file.name)
        elif _share_of_letters(text) < _FEWEST_LETTERS:
            record.left_out.add("documents of numbers rather than words", file.name)
        elif not seen.is_new(text):
            record.left_out.add("documents with the text of another", file.name)
        else:
            yield from self._of_document(file, document)

    def _of_document(self, file: FoundFile, document: Document) -> Iterator[Sample]:
        room = self.max_tokens - self.num_special
        _, chunks = make_chunks(document.blocks, max_tokens=room, overlap=self.overlap, count_tokens=self.count_tokens)
        title = document.title or PurePath(file.name).stem
        for number, chunk in enumerate(chunks, start=1):
            yield Sample({"text": chunk.text, "chunk": number, "title": title}, source=file.name)


def make_kind(options: Mapping[str, Any]) -> Documents:
    """From the arguments `tokens` and `overlap`, and `tokenizer`: the folder of the model whose tokens are counted.

    Raises:
        UserError: no such tokenizer, too few tokens, or an overlap of more than half of them.
    """
    from data.tokenize import load_tokenizer

    folder = Path(options["tokenizer"])
    tokenizer = load_tokenizer(folder)
    # as rows of text are tokenised: see data/tokenize.py
    start = tokenizer([""], verbose=False)["input_ids"][0]
    needs_end = tokenizer.eos_token_id is not None and start[-1:] != [tokenizer.eos_token_id]

    def count_tokens(texts: list[str]) -> list[int]:
        if not texts:
            return []
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, **options)["input_ids"]]

    kind = Documents(
        max_tokens=options["tokens"],
        overlap=options["overlap"],
        num_special=len(start) + needs_end,
        tokenizer=_fingerprint(folder),
        count_tokens=count_tokens,
    )
    check_lengths(kind)
    return kind


def check_lengths(kind: Documents) -> None:
    """Raises `UserError` if chunks would be too short, or hardly more than their overlap."""
    if kind.max_tokens - kind.num_special < _FEWEST:
        raise UserError(f"--tokens {kind.max_tokens} is too few", hint=f"give at least {_FEWEST + kind.num_special}")
    if 2 * kind.overlap > kind.max_tokens:
        raise UserError(
            f"--overlap {kind.overlap} is more than half of --tokens {kind.max_tokens}",
            hint=f"give at most {kind.max_tokens // 2}",
        )


def _fingerprint(folder: Path) -> str:
    """SHA-256 of the files that decide how text is cut into tokens."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _share_of_letters(text: str) -> float:
    visible = "".join(text.split())
    return sum(char.isalpha() for char in visible) / len(visible)


def _is_known(name: str) -> bool:
    path = PurePath(name)
    suffix = path.suffix.lower()
    return path.name not in _NO_DOCUMENTS and (suffix in _READERS or suffix == ".pdf" or path.name in _NAMES)


def read_document(name: str, content: bytes) -> Document:
    """A file's title and text; its name says of which kind it is.

    Raises:
        UnreadableError: it can't be used.
    """
    suffix = PurePath(name).suffix.lower()
    try:
        if suffix == ".pdf":
            return read_pdf(content)
        return _READERS.get(suffix, read_text)(decode(content))
    except RecursionError:
        raise UnreadableError("files that are nested too deeply") from None
