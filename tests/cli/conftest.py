"""The command line on a tiny model and a tiny data set, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import cli
from tests.tiny import make_model

COLOURS = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")


def write_rows(path: Path, num_rows: int = 24) -> Path:
    """Questions about colours, of different lengths."""
    with open(path, "w", encoding="utf-8") as file:
        for index in range(num_rows):
            colour = COLOURS[index % len(COLOURS)]
            row = {"prompt": f"Say {colour} {index}." + " Please." * (index % 3), "completion": f"{colour} {index}"}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "colours.jsonl")


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Runs a command in an empty folder, offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: object) -> Result:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def train(run_cli: Callable[..., Result], model: Path, rows: Path) -> Callable[..., Result]:
    """A short run on the tiny model; arguments that come later override."""

    def run(*arguments: object) -> Result:
        return run_cli(
            *("train", "--model", model, "--data", rows, "--bits", 16, "--device", "cpu", "--output", "run"),
            *("--batch-size", 2, "--accumulation", 2, "--max-steps", 4, "--eval-every", 2, "--max-tokens", 96),
            *arguments,
        )

    return run
