"""Imports point one way, and nothing heavy is imported before it is needed. Seen from fresh interpreters."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TENSOR_LIBRARIES = {"torch", "mlx", "mlx_lm", "transformers", "peft", "bitsandbytes", "accelerate"}
HEAVY = TENSOR_LIBRARIES | {"numpy", "pydantic", "rich", "pandas", "datasets", "yaml", "safetensors", "matplotlib"}
HEAVY |= {"rensa", "pypdf", "bs4", "pylatexenc", "tree_sitter", "detect_secrets"}
HEAVY |= {"sklearn", "scipy", "rouge_score", "huggingface_hub", "wandb", "mlflow", "trackio", "tensorboard"}
ABOVE_CORE = {"data", "backends", "cli"}
KNOWS_ALL = "core.workflow"
"""The package that puts the rest together."""


def modules_of(package: str) -> list[str]:
    """Dotted names of all modules of a package."""
    names = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


CORE = [name for name in modules_of("core") if not name.startswith(KNOWS_ALL)]


def python(code: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST"))}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout


EACH_ALONE = """
import importlib, os, sys
for name in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork()  # a fresh interpreter that has imported nothing but these three
    if child:
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{name} can't be imported")
        continue
    importlib.import_module(name)
    print(name, *sorted({module.split(".")[0] for module in sys.modules}), flush=True)
    os._exit(0)
"""


@cache
def loaded_by() -> dict[str, set[str]]:
    """Core module -> top-level packages that are loaded after importing it alone."""
    lines = (line.split() for line in python(EACH_ALONE, *CORE).splitlines())
    return {name: set(packages) for name, *packages in lines}


@pytest.mark.parametrize("name", CORE)
def test_a_core_module_loads_no_tensor_library_and_nothing_above_it(name: str) -> None:
    loaded = loaded_by()[name]
    assert "core" in loaded
    assert loaded & (TENSOR_LIBRARIES | ABOVE_CORE) == set()


def test_the_package_of_backends_loads_no_tensor_library() -> None:
    code = (
        "import sys, backends\nfor name in backends.names(): backends.get(name)\n"
        "print(*{module.split('.')[0] for module in sys.modules})"
    )
    loaded = set(python(code).split())
    assert "backends" in loaded
    assert loaded & TENSOR_LIBRARIES == set()


HELP = """
import runpy, sys
sys.argv = ["cli.py", *sys.argv[1:]]
try:
    runpy.run_path("cli.py", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", *{name if name.startswith("core") else name.split(".")[0] for name in sys.modules})
"""
ARGUMENTS_ONLY = {"core", "core.after_commands", "core.data_commands", "core.prepare_arguments"}


@pytest.mark.parametrize(
    "command",
    [(), ("train",), ("monitor",), ("config", "show"), ("doctor",), ("parity",), ("data", "check"), ("evaluate",)],
)
def test_help_loads_nothing_heavy(command: tuple[str, ...]) -> None:
    text, _, loaded = python(HELP, *command, "--help").rpartition("LOADED")
    assert "usage: python cli.py" in text
    assert "argparse" in loaded.split()
    assert set(loaded.split()) & (HEAVY | ABOVE_CORE) == set()
    assert {name for name in loaded.split() if name.startswith("core")} <= ARGUMENTS_ONLY


def test_help_answers_at_once() -> None:
    """Under 0.3 s. Processor time, the best of three: other processes on this machine don't count."""
    times = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "cli.py", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0
        times.append(usage.ru_utime + usage.ru_stime)
    assert min(times) < 0.3


# --- imports as they are written, those inside functions included -----------------------------------------------------


def imports_of(module: str) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


FORBIDDEN = {
    "core": ("data", "backends", "cli", "tests", "torch", "mlx", "mlx_lm", "transformers", "peft", "bitsandbytes"),
    "data": ("backends", "cli", "tests", "torch", "mlx", "mlx_lm"),
    "backends.mlx": ("backends.cuda", "data", "cli", "tests", "torch", "peft", "bitsandbytes", "accelerate"),
    "backends.cuda": ("backends.mlx", "data", "cli", "tests", "mlx", "mlx_lm"),
}


@pytest.mark.parametrize(
    ("package", "module"),
    [(package, module) for package in FORBIDDEN for module in modules_of(package.replace(".", "/"))],
)
def test_imports_point_one_way(package: str, module: str) -> None:
    found = {name for name in imports_of(module) if is_within(name, FORBIDDEN[package])}
    if module.startswith(KNOWS_ALL):
        assert {name.split(".")[0] for name in found} <= {"data", "backends"}
    else:
        assert found == set()


@pytest.mark.parametrize("module", [*modules_of("data"), *modules_of("backends")])
def test_what_is_above_the_core_does_not_know_the_run(module: str) -> None:
    """The loop, its files and its screen belong to the core alone."""
    mine = (
        "core.workflow",
        "core.trainer",
        "core.checkpoint",
        "core.journal",
        "core.run",
        "core.monitor",
        "core.screen",
    )
    assert {name for name in imports_of(module) if is_within(name, mine)} == set()


def test_only_the_entry_point_and_tests_are_at_the_top() -> None:
    assert [path.name for path in ROOT.glob("*.py")] == ["cli.py"]
