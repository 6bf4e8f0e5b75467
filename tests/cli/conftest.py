"""The command line on a tiny model and a tiny data set, in this process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli
from core.adapter import Adapter, plan_adapter
from core.architecture import read_architecture
from core.config import LoraConfig
from data import token_cache
from tests.pictures import draw, draw_blank
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


def filled_adapter(model: Path, *, seed: int = 1, **lora: Any) -> Adapter:
    """An adapter as a training leaves it: no zeros in B."""
    config = LoraConfig.model_validate({"rank": 4, "alpha": 8, "dropout": 0.0, **lora})
    adapter = plan_adapter(config, read_architecture(model), seed=seed)
    rng = np.random.default_rng(seed)
    return adapter.with_tensors(
        {name: rng.normal(0, 0.1, tensor.shape).astype(np.float32) for name, tensor in adapter.tensors.items()}
    )


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "colours.jsonl")


@pytest.fixture(scope="module", autouse=True)
def blank_pictures() -> Iterator[None]:
    """Runs draw nothing; a test that looks at a picture uses `drawn`, a module of such tests overrides this."""
    with pytest.MonkeyPatch.context() as patch:
        draw_blank(patch)
        yield


@pytest.fixture
def drawn(blank_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are real ones."""
    draw(monkeypatch)


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
    # how fast a tokenizer was loaded in the test before must not decide what this one sees
    monkeypatch.setattr(token_cache, "WORTH_SECONDS", math.inf)

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
