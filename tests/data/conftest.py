"""Tokenizers and files for the tests of `data`."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from data.tokenize import Tokenizer, load_tokenizer
from tests.tiny import CHAT_TEMPLATE, SPECIAL, START_ID, make_tokenizer

MakeTokenizer = Callable[..., Tokenizer]


@pytest.fixture
def make(tmp_path: Path) -> MakeTokenizer:
    """The byte-level tokenizer with a chat template and settings of one's own."""

    def build(template: str | None = CHAT_TEMPLATE, *, adds_bos: bool = False, **settings: Any) -> Tokenizer:
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        make_tokenizer(folder, chat_template=template)
        if adds_bos:  # as Llama's tokenizers do
            file = str(folder / "tokenizer.json")
            tokenizer = tokenizers.Tokenizer.from_file(file)
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], START_ID)]
            )
            tokenizer.save(file)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return load_tokenizer(folder)

    return build


@pytest.fixture(scope="session")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chatml")
    make_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSONL and returns the path."""

    def to_file(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return to_file
