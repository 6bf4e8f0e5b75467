"""The commands that `parity` names: to record a side, to compare two, to train what was compared."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.config import RunConfig, to_plain
from core.parity_record import FORCED, Record

PROGRAM = ("python", "cli.py")
_NOT_TYPED = (*FORCED, "train.max_steps", "train.epochs", "backend", "device", "output")


def command_line(arguments: Sequence[str]) -> str:
    """Our program with these arguments, as a shell takes it."""
    return shlex.join([*PROGRAM, *arguments])


def record_command(typed: Sequence[str], *, backend: str, steps: int, output: str | Path, four_bits: bool) -> str:
    """Records one side. `typed`: the settings as they were typed, without backend and output."""
    own = ["--backend", backend, "--steps", str(steps), "--output", str(output)]
    return command_line(["parity", "record", *typed, *own, *([] if four_bits else ["--skip-4bit"])])


def compare_command(one: str | Path, other: str | Path) -> str:
    """Compares two records."""
    return command_line(["parity", "compare", str(one), str(other)])


def train_words(typed: Sequence[str], *, backend: str) -> list[str]:
    """Trains with the settings that were typed; a word each, as `wrapped` takes them."""
    return [shlex.quote(word) for word in (*PROGRAM, "train", *typed, "--backend", backend)]


def typed_again(record: Record) -> list[str]:
    """What has to be typed for the settings of a record, apart from those that parity itself sets."""
    default = dict(_flat(to_plain(RunConfig())))
    path = record.config["model"]["path"]
    # `auto` may mean another model on another machine
    typed = ["--model", record.model if path == "auto" else path, "--data", record.config["data"]["path"]]
    for name, value in _flat(record.config):
        if name not in (*_NOT_TYPED, "model.path", "data.path") and value != default.get(name):
            typed += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return typed


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, values in config.items():
        if isinstance(values, Mapping):
            yield from ((f"{section}.{name}", value) for name, value in values.items())
        else:
            yield section, values


def wrapped(words: Sequence[str], width: int) -> list[str]:
    """A command in lines of at most `width` columns that a shell reads as one; a longer word has a line of its own."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 <= width:  # a space, and " \" should the line end here
            lines[-1] += f" {word}"
        else:
            lines[-1] += " \\"
            lines.append(word)
    return lines
