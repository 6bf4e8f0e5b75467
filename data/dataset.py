"""A data set, ready to train on: `load_data`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from core.config import DataConfig
from core.errors import UserError
from data.batches import TokenRows
from data.formats import parse_rows
from data.sources import SKIP_HINT, BadRows, and_more, count, read_source
from data.split import cut_rows, num_copies, rows_not_in
from data.tokenize import Renderer, Tokenized, Tokenizer, tokenize_examples

_FORMAT = 2
"""Raise it when the same rows give other batches: a run from before is then refused, not continued on other ones."""


@dataclass(frozen=True)
class Prepared:
    """Token rows by split; row ids are indices into the split."""

    train: TokenRows
    validation: TokenRows
    test: TokenRows
    """Empty unless the data brings a test split or `data.test` asks for one."""
    findings: tuple[str, ...]
    """For people, a line each: what was left out, cut off or written in another way."""
    fingerprint: str
    """SHA-256, in hex, of the token rows, their targets, their order and their split."""
    name: str
    """For the screen: `expert.jsonl`."""


def load_data(config: DataConfig, tokenizer: Tokenizer, *, seed: int) -> Prepared:
    """Reads, converts, tokenises and splits a data set. A split that the data brings goes before the ratios.

    Raises:
        UserError: anything in the data or in `config` that a person has to mend; see the other modules.
    """
    bad = BadRows(skip=config.skip_bad)
    source = read_source(config.path, bad)
    examples, findings = parse_rows(source.splits, name=source.name, fields=config.fields, bad=bad)
    renderer = Renderer(tokenizer)
    tokenized = {
        split: tokenize_examples(some, renderer, max_tokens=config.max_tokens, train_on=config.train_on)
        for split, some in examples.items()
    }
    findings = [*bad.findings(), *findings, *_left_out(tokenized, config.max_tokens), *renderer.findings()]
    for split, part in tokenized.items():
        if not len(part.rows):
            raise UserError(f"{config.path}: no usable {split} row: {findings[0]}", hint=_hint(bad))
    splits = _split(tokenized, config, seed, findings)
    return Prepared(
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        findings=tuple(findings),
        fingerprint=_fingerprint(splits, config),
        name=source.name,
    )


def _hint(bad: BadRows) -> str:
    return SKIP_HINT.partition(",")[0] if bad.num_rows else "raise data.max_tokens, or shorten the prompts"


def _left_out(tokenized: Mapping[str, Tokenized], max_tokens: int) -> list[str]:
    found = []
    if num_truncated := sum(part.num_truncated for part in tokenized.values()):
        found.append(f"{count(num_truncated, 'row')} cut off at data.max_tokens {max_tokens}")
    empty = [place for part in tokenized.values() for place in part.without_targets]
    if empty:
        why = f"no target within the first {max_tokens} tokens (data.max_tokens)"
        found.append(f"{count(len(empty), 'row')} left out, {why}: {and_more(empty, len(empty))}")
    unplaced = [place for part in tokenized.values() for place in part.unplaced]
    if unplaced:
        why = "the chat template changes an answer, which then can't be found in its text"
        found.append(f"{count(len(unplaced), 'row')} left out, {why}: {and_more(unplaced, len(unplaced))}")
    return found


def _split(
    tokenized: Mapping[str, Tokenized], config: DataConfig, seed: int, findings: list[str]
) -> dict[str, TokenRows]:
    """Train, validation and test rows: what the data brings, and the rest cut from its training rows."""
    if "validation" not in tokenized and config.validation == 0:
        raise UserError(
            f"data.validation is 0 and {config.path} brings no validation rows: overfitting could not be seen",
            hint="set data.validation, such as 0.2, or give a folder with a valid file",
        )
    given = {split: part.rows for split, part in tokenized.items() if split != "train"}
    if "validation" in given and "test" in given:
        kept = _without_copies("validation", given["validation"], [given["test"]], findings)
        given["validation"] = given["validation"].select(kept).renumbered()
    train = tokenized["train"]
    kept = _without_copies("training", train.rows, given.values(), findings)
    rows = train.rows.select(kept).renumbered()
    if extra := num_copies(rows):
        findings.append(f"{count(extra, 'training row')} the same as another; copies stay on one side of the split")
    cut = cut_rows(
        rows,
        [train.contents[index] for index in kept],
        validation=0.0 if "validation" in given else config.validation,
        test=0.0 if "test" in given else config.test,
        seed=seed,
    )
    sides = {"train": cut.train, "validation": cut.validation, "test": cut.test}
    return {side: given[side] if side in given else rows.select(sides[side]).renumbered() for side in sides}


def _without_copies(side: str, rows: TokenRows, held_out: Iterable[TokenRows], findings: list[str]) -> list[int]:
    """Indices of the rows that are not held out as well: files that overlap would make the gap look small."""
    kept = rows_not_in(rows, held_out)
    if not kept:
        raise UserError(f"every {side} row is also in another file of the data", hint="give the files different rows")
    if len(kept) < len(rows):
        num = len(rows) - len(kept)
        findings.append(f"{count(num, f'{side} row')} left out: the same rows are held out in another file")
    return kept


def _fingerprint(splits: Mapping[str, TokenRows], config: DataConfig) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, config.max_tokens, config.train_on]).encode())
    for split, rows in splits.items():
        digest.update(json.dumps([split, rows.lengths.tolist()]).encode())
        for ids, is_target in zip(rows.ids, rows.is_target, strict=True):
            digest.update(ids.astype("<i4").tobytes())
            digest.update(np.packbits(is_target).tobytes())
    return digest.hexdigest()
