"""The arguments of `data prepare` and its kinds."""

from __future__ import annotations

import argparse
from typing import Any

LANGUAGES = ("python", "rust", "javascript", "typescript", "go", "java", "c", "cpp")


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the command `data prepare` its kinds, each with a source, an output folder and options of its own."""
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    _add_code(kinds)
    _add_documents(kinds)
    _add_nli(kinds)
    _add_chat(kinds)


def run(args: argparse.Namespace) -> int:
    """Prepares data; what a kind needs is imported when it runs."""
    from core.data_commands import prepare

    return prepare(args)


def _add_kind(kinds: Any, name: str, *, text: str, source: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text)
    command.add_argument("source", metavar="SOURCE", help=source)
    command.add_argument("--output", metavar="DIR", help="new folder (default: prepared/ and the source's name)")
    command.add_argument("--force", action="store_true", help="replace rows that were prepared there before")
    command.set_defaults(kind=name, run_command=run)
    return command


def _add_code(kinds: Any) -> None:
    command = _add_kind(
        kinds, "code", text="rows of source code: completion, infilling or instructions", source="repository or file"
    )
    command.add_argument(
        "--as",
        dest="form",
        choices=("completion", "infill", "instruction", "text"),
        default="completion",
        help="completion: the beginning of a file or item, and the rest (default); infill: what is before and after, "
        "and the middle; instruction: a doc comment as the task, and the code; text: the code alone",
    )
    command.add_argument(
        "--level",
        choices=("file", "item", "both"),
        help="whole files, functions and types, or both (default: both; item for instructions)",
    )
    command.add_argument(
        "--languages", metavar="NAMES", help=f"with commas, of {', '.join(LANGUAGES)} (default: all that are there)"
    )
    command.add_argument("--no-tests", action="store_true", help="leave out tests")
    command.add_argument(
        "--max-chars",
        type=_count,
        default=6000,
        metavar="N",
        help="leave out longer items, cut longer files into parts (default: 6000)",
    )
    command.add_argument(
        "--min-chars", type=_count, default=60, metavar="N", help="leave out shorter items and files (default: 60)"
    )
    command.add_argument(
        "--infill-markers",
        nargs=3,
        metavar=("PREFIX", "SUFFIX", "MIDDLE"),
        default=("<PREFIX>", "<SUFFIX>", "<MIDDLE>"),
        help="what stands before each part of an infill prompt (default: <PREFIX> <SUFFIX> <MIDDLE>)",
    )


def _add_documents(kinds: Any) -> None:
    command = _add_kind(
        kinds, "documents", text="rows of text, Markdown, HTML, PDF and LaTeX, in chunks", source="folder or file"
    )
    command.add_argument("--tokens", type=_count, default=512, metavar="N", help="longest chunk (default: 512)")
    command.add_argument(
        "--overlap",
        type=_natural,
        default=64,
        metavar="N",
        help="tokens that a chunk shares with the next (default: 64)",
    )
    command.add_argument(
        "--model", help="whose tokens to count: hub id, local folder, or auto (default: as in training)"
    )


def _add_nli(kinds: Any) -> None:
    command = _add_kind(
        kinds, "nli", text="rows of premises and hypotheses that ask for JSON", source="CSV, TSV, JSONL or Parquet file"
    )
    command.add_argument(
        "--fields",
        metavar="ROLE=COLUMN,…",
        help="names of the columns: premise=sentence1,hypothesis=sentence2,label=gold",
    )


def _add_chat(kinds: Any) -> None:
    command = _add_kind(kinds, "chat", text="rows of exported conversations", source="exported file or folder")
    command.add_argument("--system", choices=("keep", "drop"), default="keep", help="system messages (default: keep)")
    command.add_argument(
        "--turns", type=_count, metavar="N", help="most questions with answers in a row (default: whole conversations)"
    )
    command.add_argument(
        "--overlap",
        type=_natural,
        default=1,
        metavar="N",
        help="with --turns: questions with answers that a row repeats of the one before (default: 1)",
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value
