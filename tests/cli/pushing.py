"""What the tests of `push` share: the way to the stand-in hub, and how its answers are read."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.cli.conftest import Result
from tests.hub_server import TOKEN, HubServer

NAME = "alice/colours"
BASE = "org/base"


def go_online(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """huggingface_hub reads its environment when it is imported, and the tests' says offline."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def shown(out: str) -> dict[str, str]:
    """Name of a file -> the beginning of its checksum, as the table has them."""
    return dict(re.findall(r"^  (\S+) +[\d.]+ [kMG]?B  sha256 (\w{16})", out, re.MULTILINE))


def is_one_mistake(result: Result, what: str) -> bool:
    """Exit code 2, a line and a hint; neither a traceback, a URL nor the token."""
    lines = result.err.splitlines()
    assert result.code == 2, result
    assert len(lines) == 2 and lines[0].startswith("error: ") and what in lines[0], result.err
    assert "://" not in result.err and "secretSignature" not in result.err
    assert TOKEN not in result.out + result.err
    return True


def typed(*command: object, hub: HubServer, home: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own, in which huggingface_hub reads its environment."""
    hidden = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [str(part) for part in command],
        env=environment | {"HOME": str(home), "HF_HOME": str(cwd / "hf")},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_peft_snippet_works(folder: Path, model: Path) -> None:
    """The card's own example, with folders in place of the hub's names, on a question of a few words."""
    import torch
    from transformers import AutoModelForCausalLM

    card = (folder / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert block is not None
    code = block[1].replace(BASE, str(model)).replace(NAME, str(folder)).replace("…", "Say red 8.")
    names: dict[str, Any] = {"print": lambda text: None}
    exec(code.replace("max_new_tokens=128", "max_new_tokens=2"), names)
    with torch.no_grad():
        trained = names["model"](**names["inputs"]).logits
        plain = AutoModelForCausalLM.from_pretrained(model)(**names["inputs"]).logits
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert float((trained - plain).abs().max()) > 1e-3, "an adapter that does nothing"
