"""The command line's fixtures: a tiny model, tiny data, and a way to run commands in an empty folder."""

from tests.cli.conftest import model, rows, run_cli

__all__ = ["model", "rows", "run_cli"]
