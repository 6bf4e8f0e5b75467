"""`data prepare`: from a repository, documents, a table or conversations to rows."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from core.errors import UserError
from core.screen import count, logging_to
from data.prepare.common import MANIFEST, ROWS, Kind, Manifest, Record, check_output, write_prepared

_log = logging.getLogger("twinkeel")


def prepare(args: argparse.Namespace, *, console: Console) -> int:
    """Makes rows of `args.source` in a folder of their own. Returns the exit code.

    Raises:
        UserError: a mistake in the arguments or the source; nothing is written.
    """
    source = Path(args.source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder", hint="give a folder, or a file in it")
    output = Path(args.output) if args.output else Path("prepared") / _name_of(source)
    kind = _kind_of(args)
    check_output(output, force=args.force)
    with logging_to(console):
        record = Record(console)
        with record.progress(f"preparing {args.kind}"):
            manifest = write_prepared(kind.samples(source, record), output, kind=kind, record=record, force=args.force)
        for line in summary(manifest, output):
            _log.info(line)
    return 0


def _name_of(source: Path) -> str:
    """Of the source's own folder or, for a file, without its ending."""
    resolved = source.resolve()
    return (resolved.stem if resolved.is_file() else resolved.name) or "rows"


def _kind_of(args: argparse.Namespace) -> Kind:
    options: dict[str, Any] = dict(vars(args))
    if args.kind == "documents":
        options["tokenizer"] = _tokenizer_folder(args.model)
    made: Kind = import_module(f"data.prepare.{args.kind}").make_kind(options)
    return made


def _tokenizer_folder(model: str | None) -> Path:
    """The folder of the model whose tokens are counted."""
    from core.config import ModelConfig, RunConfig
    from core.protocols import DeviceReport
    from core.workflow.job import find_model

    config = RunConfig(model=ModelConfig() if model is None else ModelConfig(path=model))
    # the weights are not loaded, so that any device will do
    device = DeviceReport(backend="", available=True, device="", accelerator=False, memory_bytes=0)
    return find_model(config, device).path


def summary(manifest: Manifest, output: Path) -> list[str]:
    """What was written, what was left out and why, and what to type next."""
    files = len(manifest.sources)
    lines = [
        f"  {manifest.num_rows:,} row{'' if manifest.num_rows == 1 else 's'} of {files:,} "
        f"file{'' if files == 1 else 's'}, {count(manifest.size)} bytes",
        *_reasons("left out", manifest.left_out),
        *_reasons("note", manifest.noted),
        "",
        f"  rows      {output / ROWS}",
        f"  manifest  {output / MANIFEST}",
    ]
    split = "" if manifest.group is None else f" --set data.group={manifest.group}"
    if manifest.kind == "nli":
        split += " --set data.stratify=label"
    command = f"--data {shlex.quote(str(output / ROWS))}{split}"
    return [*lines, f"  next      python cli.py data check {command}", f"            python cli.py train {command}"]


def _reasons(title: str, reasons: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The most frequent first, each with the first that it is true of."""
    ordered = sorted(reasons.items(), key=lambda entry: (-entry[1]["number"], entry[0]))
    lines: list[str] = []
    for reason, entry in ordered:
        named = ", ".join(entry["named"]) + (", …" if entry["number"] > len(entry["named"]) else "")
        lines.append(f"  {title if not lines else '':<10}{reason}: {entry['number']:,} ({named})")
    return lines
