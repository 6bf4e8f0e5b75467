"""Python commands in forked children of a process that loaded its libraries once.

`python -c "import peft"` takes seconds of a processor, the work of a test's command a fraction of one. A child is still
a process of its own: it has the libraries that the server loaded, and nothing that another command did.

    python -m tests.warm MODULE...

is the server. It reads a job a line from its standard input, as JSON, and answers each with the exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class WarmPython:
    """A server that has loaded `modules`; closed at the end of a `with`."""

    def __init__(self, *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", *modules],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that it can be ended together with its children
        )

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._process:  # closes its standard input, which ends it, and waits
            pass

    def run(
        self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` with `capture_output` and `text`, of `python -c CODE …` or `python -m MODULE …`.

        A negative exit code is a signal's. What the libraries read from the environment when they are loaded is that of
        the server. No time limit: the test's own ends it.
        """
        assert command[0] == sys.executable and command[1] in ("-c", "-m"), command
        assert not options.get("check"), options
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as scratch:
            out, err = Path(scratch) / "out", Path(scratch) / "err"
            job = {"arguments": command[1:], "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
            try:
                self._process.stdin.write(json.dumps(job | {"out": str(out), "err": str(err)}) + "\n")
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            except BaseException:  # out of time: the next command must not get this one's answer
                os.killpg(self._process.pid, signal.SIGKILL)
                raise
            assert answer, "the server died"
            return subprocess.CompletedProcess(list(command), int(answer), out.read_text(), err.read_text())


# --- the server -------------------------------------------------------------------------------------------------------


def serve(modules: Sequence[str]) -> None:
    """Loads the modules, then forks a child for each job until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(job)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _run(job: Mapping[str, Any]) -> None:
    """The child: runs the command as a new interpreter would, and never returns."""
    code = 70
    try:
        for descriptor, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["env"])
        sys.path[0] = job["cwd"]
        code = _exit_code(*job["arguments"])
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError):
                stream.flush()
    finally:
        os._exit(code)


def _exit_code(form: str, program: str, *arguments: str) -> int:
    sys.argv = [form, *arguments]
    try:
        if form == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1:])
