"""`data check`, `data show` and `data prepare`: their arguments, and what they call."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def check(args: argparse.Namespace, settings: Any) -> int:
    """Says what would be trained on, and what is wrong with it."""
    from core.screen import make_console
    from core.workflow.data_check import check

    page = None if args.page is None else Path(args.page)
    return check(settings, as_json=args.json, page=page, console=make_console())


def show(args: argparse.Namespace, settings: Any) -> int:
    """Shows a row as the model sees it: prompt and targets, token by token."""
    from core.screen import make_console
    from core.workflow.data_check import show

    return show(settings, args.rows, split=args.split, console=make_console())


def prepare(args: argparse.Namespace) -> int:
    """Makes rows of a repository, of documents, of a table or of conversations."""
    from core.screen import make_console
    from core.workflow.prepare import prepare

    return prepare(args, console=make_console())


def add_data_commands(
    commands: Any,
    *,
    add_settings: Callable[[argparse.ArgumentParser], None],
    settings_of: Callable[[argparse.Namespace], Any],
) -> None:
    """Adds `data` and its commands to the command line.

    Args:
        add_settings: gives a parser the flags of a run's settings.
        settings_of: resolves them.
    """
    data = commands.add_parser("data", help="look at data before training, or prepare it")
    kinds = data.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = kinds.add_parser("check", help="what would be trained on, and what is wrong with it")
    add_settings(command)
    command.add_argument("--json", action="store_true", help="for scripts")
    command.add_argument("--page", metavar="FILE", help="write a page to open in a browser, with every row's tokens")
    command.set_defaults(run_command=lambda args: check(args, settings_of(args)))

    command = kinds.add_parser("show", help="rows as the model sees them, token by token")
    command.add_argument("rows", nargs="*", type=int, default=[1], help="numbers of rows, counted from 1 (default: 1)")
    command.add_argument("--split", choices=("train", "validation", "test"), default="train", help="default: train")
    add_settings(command)
    command.set_defaults(run_command=lambda args: show(args, settings_of(args)))

    command = kinds.add_parser("prepare", help="make rows of code, documents, a table or conversations")
    from core.prepare_arguments import add_prepare_arguments

    add_prepare_arguments(command)
