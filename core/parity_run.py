"""`parity` from its command line: both sides one after the other, each in a process of its own, then the comparison.

In one process the two backends' libraries would share threads and memory; in two, neither knows of the other, and the
record of a side is the same as one that was made on another machine.
"""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from core.config import RunConfig, to_plain
from core.errors import UserError
from core.files import write_atomic
from core.parity import compare, write_report
from core.parity_commands import command_line, compare_command, record_command
from core.parity_plot import write_parity_plot
from core.parity_record import RECORD, Record, certified, read_record
from core.parity_screen import Page
from core.run import NewFolder, new_run_folder
from core.screen import logging_to
from core.settings import Settings
from core.signals import termination_as_interrupt

SETTINGS = "settings.yaml"
_log = logging.getLogger("twinkeel")


def run_parity(
    settings: Settings,
    *,
    steps: int,
    four_bits: bool,
    problems: Mapping[str, str],
    command: Sequence[str],
    typed: Sequence[str],
    console: Console,
) -> int:
    """Records both sides and compares them. Returns the exit code: 0 within tolerance, 1 beyond.

    Args:
        problems: name of each backend -> why it can't train here; empty if it can.
        command: what starts this program: interpreter and script.
        typed: the settings as they were typed, for the commands that are shown.

    Raises:
        UserError: a backend that is missing here, or a side that could not be recorded.
    """
    _refuse_missing(problems, steps=steps, typed=typed, four_bits=four_bits)
    with logging_to(console):
        config, overridden = certified(settings, steps=steps)
        folder = new_run_folder(config.output, data_name=f"parity-{Path(config.data.path).name}")
        if overridden:
            _log.info("for parity: %s", ", ".join(overridden))
        records: list[Record] = []
        with termination_as_interrupt(), NewFolder(folder) as new:
            for name in problems:
                # `auto` may mean another model on each backend: the second takes the one that the first found
                model = records[0].model if records else config.model.path
                _write_settings(folder / SETTINGS, config, backend=name, model=model)
                own = ["--output", str(folder / name), *([] if four_bits else ["--skip-4bit"])]
                record = ["parity", "record", "--config", str(folder / SETTINGS), "--steps", str(steps), *own]
                try:
                    code = _run([*command, *record, "--one-of-two"], name)
                finally:
                    if not _is_recorded(folder / name):
                        _log.error("the %s side was not recorded", name)
                        if records:
                            _say_what_is_left(folder, list(problems), record)
                if code:
                    return code
                records.append(read_record(folder / name))
                new.keep()
    return _finish(records[0], records[1], folder, typed=typed, console=console)


def _is_recorded(side: Path) -> bool:
    """Whether the side is whole; if not, what there is of it goes away, so that it can be recorded again."""
    if (side / RECORD).is_file():
        return True
    shutil.rmtree(side, ignore_errors=True)
    return False


def _say_what_is_left(folder: Path, names: Sequence[str], record: Sequence[str]) -> None:
    """After a second side that was not recorded: the first need not be recorded again."""
    _log.info("the %s side is recorded in %s; to go on from it: %s", names[0], folder / names[0], command_line(record))
    _log.info("and then: %s", compare_command(folder / names[0], folder / names[1]))


def compare_folders(one: Path, other: Path, *, output: str | None, console: Console) -> int:
    """Compares two records made before, here or elsewhere. Returns the exit code: 0 within tolerance, 1 beyond.

    Raises:
        UserError: a folder that is not a record, or is damaged, or one folder twice.
    """
    a, b = read_record(one), read_record(other)
    if one.samefile(other):
        raise UserError(f"{one} and {other} are one folder", hint="give the record of each side")
    folder = new_run_folder(output, data_name=f"parity-{a.data}")
    return _finish(a, b, folder, typed=None, console=console)


def _finish(a: Record, b: Record, folder: Path, *, typed: Sequence[str] | None, console: Console) -> int:
    report = compare(a, b)
    with NewFolder(folder) as new:
        write_report(folder, report)
        write_parity_plot(folder, report)
        new.keep()
    console.print(Page(report, folder, typed))
    return report.exit_code


def _refuse_missing(problems: Mapping[str, str], *, steps: int, typed: Sequence[str], four_bits: bool) -> None:
    missing = [name for name, problem in problems.items() if problem]
    if not missing:
        return
    able = [name for name in problems if name not in missing]
    what = "; ".join(f"{name} can't train here ({problems[name]})" for name in missing)
    if not able:
        raise UserError(what, hint="see: python cli.py doctor")

    def recording(name: str) -> str:
        return record_command(typed, backend=name, steps=steps, output=f"parity-{name}", four_bits=four_bits)

    raise UserError(
        what,
        hint=f"record this side here:      {recording(able[0])}\n"
        f"       the other where it can:    {recording(missing[0])}\n"
        f"       and with both folders:     {compare_command(f'parity-{able[0]}', f'parity-{missing[0]}')}",
    )


def _write_settings(path: Path, config: RunConfig, *, backend: str, model: str) -> None:
    import yaml

    update = {"output": None, "backend": backend, "model": config.model.model_copy(update={"path": model})}
    text = "# The settings of both sides, fully resolved.\n"
    write_atomic(path, text + yaml.safe_dump(to_plain(config.model_copy(update=update)), sort_keys=False))


def _run(arguments: Sequence[str], name: str) -> int:
    """Runs one side to its end; what it says goes where ours goes. Returns its exit code.

    Ctrl-C reaches both processes. The side ignores it: this one ends the side, and says so once.
    """
    code = subprocess.run(arguments, check=False, preexec_fn=_ignore_interrupts).returncode
    if code < 0:
        raise UserError(f"the {name} side was ended by signal {-code}", hint="if memory is short: --batch-size 1")
    return code


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
