"""A run that goes on with another backend, in another folder or in another precision: `train --resume`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import core.session
from tests.cli.conftest import Result

Train = Callable[..., Result]
LONG = ("--lr", "1e-2", "--max-steps", "20", "--epochs", "8", "--eval-every", "5", "--set", "log.every=1")
OTHER = {"mlx": "cuda", "cuda": "mlx"}


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Has the runs that follow interrupted, as by Ctrl-C, after so many of their own steps."""

    def stop_after(num_steps: int | None) -> None:
        class Flag(core.session.InterruptFlag):
            asked = 0

            def __call__(self) -> bool:
                self.asked += 1
                return super().__call__() or (num_steps is not None and self.asked > num_steps)

            @property
            def exit_code(self) -> int:
                return 130

        monkeypatch.setattr(core.session, "InterruptFlag", Flag)

    return stop_after
