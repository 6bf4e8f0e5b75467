"""A command in a warm process does what it does in a new interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.warm import WarmPython

SAYS_ALL = """
import os, sys
print(sys.argv[1:], os.getcwd(), os.environ.get("GIVEN"), os.environ.get("HOME"), __name__)
print("seen", file=sys.stderr)
"""
COMMANDS = {
    "its surroundings": ("-c", SAYS_ALL, "one", "two words"),
    "a module": ("-m", "calendar", "2024", "2"),
    "a module beside it": ("-m", "beside", "it"),
    "an exit code": ("-c", "import sys; print('gone'); sys.exit(3)"),
    "an exit with words": ("-c", "import sys; sys.exit('no such thing')"),
    "a signal": ("-c", "import os; os.kill(os.getpid(), 9)"),
}


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmPython]:
    with WarmPython("csv") as python:
        yield python


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_does_what_it_does_in_a_new_interpreter(warm: WarmPython, tmp_path: Path, name: str) -> None:
    (tmp_path / "beside.py").write_text("import sys; print(sys.argv[1:], __name__)")
    command = [sys.executable, *COMMANDS[name]]
    env = {key: value for key, value in os.environ.items() if key != "HOME"} | {"GIVEN": "here"}
    new = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    done = warm.run(command, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (new.returncode, new.stdout, new.stderr)


def test_modules_are_loaded_and_nothing_stays(warm: WarmPython, tmp_path: Path) -> None:
    loaded = "import sys; print('csv' in sys.modules, 'wave' in sys.modules); import wave"
    for _ in range(2):
        assert warm.run([sys.executable, "-c", loaded], cwd=tmp_path).stdout == "True False\n"


def test_an_exception_is_shown(warm: WarmPython, tmp_path: Path) -> None:
    done = warm.run([sys.executable, "-c", "1 / 0"], cwd=tmp_path)
    assert done.returncode == 1 and "ZeroDivisionError: division by zero" in done.stderr
