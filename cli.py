"""The commands. Each is one short function that imports what it needs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NoReturn

from core.after_commands import add_after_commands, whole_number
from core.data_commands import add_data_commands

USER_ERROR = 2
INTERRUPTED = 130
PARITY_STEPS = 20

# flag, setting, type, help
_FLAGS: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
    ("--backend", "backend", str, "mlx, cuda (PyTorch, on a CPU too) or auto"),
    ("--device", "device", str, "auto, gpu or cpu"),
    ("--model", "model.path", str, "hub id, local folder, or auto"),
    ("--bits", "model.bits", int, "4 or 16: precision of the frozen base"),
    ("--data", "data.path", str, "file, folder with train/valid/test, or hub id"),
    ("--max-tokens", "data.max_tokens", int, "longer rows are cut off"),
    ("--rank", "lora.rank", int, "rank of the adapter"),
    ("--alpha", "lora.alpha", float, "scale of the adapter: alpha / rank"),
    ("--dropout", "lora.dropout", float, "dropout on the adapter's input"),
    ("--init-adapter", "lora.init_adapter", str, "go on from an adapter: PEFT's, mlx-lm's or a run's"),
    ("--lr", "optim.lr", float, "peak learning rate"),
    ("--epochs", "train.epochs", float, "passes over the training rows"),
    ("--max-steps", "train.max_steps", int, "train for so many optimiser steps, whatever --epochs says"),
    ("--batch-size", "train.batch_size", int, "rows in a micro-batch"),
    ("--accumulation", "train.accumulation", int, "micro-batches in an optimiser step"),
    ("--eval-every", "eval.every", int, "optimiser steps between evaluations"),
    ("--patience", "guard.patience", int, "evaluations without improvement before stopping"),
    ("--seed", "train.seed", int, "decides split, order, initial adapter, dropout"),
    ("--output", "output", str, "run folder (default: a new one under runs/)"),
)

_SETTING_FLAGS = (*((flag, name) for flag, name, _, _ in _FLAGS), ("--strict", "data.strict"))

_WHERE = ("--backend", "--device", "--model", "--data")
"""Flags that say where things are; a resumed run may find them elsewhere."""

_NOT_REPEATED = ("--backend", "--output")
"""Flags that a command which parity shows has of its own."""


def train(args: argparse.Namespace) -> int:
    """Fine-tunes a model, or continues a run with --resume."""
    return _train_anew(args) if args.resume is None else _resume(args)


def _train_anew(args: argparse.Namespace) -> int:
    from core.errors import UserError
    from core.screen import make_console

    if args.final and args.folds is None:
        raise UserError("--final is the run after the folds", hint="give --folds as well, such as --folds 5")
    settings = _settings(args)  # first: a misspelt preset should not wait for the imports
    if args.folds is not None:
        from core.workflow.folds import train_folds

        return train_folds(settings, folds=args.folds, final=args.final, console=make_console())
    from core.workflow.train import train

    return train(settings, console=make_console())


def _resume(args: argparse.Namespace) -> int:
    from core.config import FREE_ON_RESUME
    from core.errors import UserError
    from core.folds import is_folds
    from core.run import existing_run
    from core.screen import make_console

    names = {text.partition("=")[0].strip() for text in args.assignments}
    free = (*_WHERE, "--set") if names <= set(FREE_ON_RESUME) else _WHERE
    given = [flag for flag in _given(args) if flag not in free] + ["--folds"] * (args.folds is not None)
    if given:
        raise UserError(
            f"--resume continues with the run's own settings; {', '.join(given)} would change them",
            hint=f"only {', '.join(_WHERE)}, and --set of {', '.join(FREE_ON_RESUME)}, may be given; to train on with "
            "other settings, start a new run with: python cli.py train --init-adapter RUN",
        )
    folder = existing_run(args.resume or None)
    may_change: dict[str, Any] = {"flags": _flags(args), "assignments": args.assignments}
    if is_folds(folder):
        from core.workflow.folds import resume_folds

        return resume_folds(folder, final=args.final, **may_change, console=make_console())
    if args.final:
        raise UserError(
            f"{folder}: one run, and --final comes after folds", hint="start them with: python cli.py train --folds 5"
        )
    from core.workflow.train import resume

    return resume(folder, **may_change, console=make_console())


def monitor(args: argparse.Namespace) -> int:
    """Watches a run: losses, gap, speed, time left."""
    from core import monitor
    from core.run import existing_run
    from core.screen import make_console

    folder = existing_run(args.run)
    if args.json:
        return _print_json(monitor.to_json(monitor.snapshot(folder)))
    console = make_console()
    if not args.once:
        return monitor.watch(folder, refresh=args.refresh, console=console)
    console.print(monitor.render(monitor.snapshot(folder), width=console.width))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Writes an adapter for PEFT, for mlx-lm or for both, and proves that it does the same there."""
    from core.screen import make_console
    from core.workflow.convert import convert

    return convert(
        args.adapter, to=args.to, output=args.output, model=args.model, data=args.data, console=make_console()
    )


def parity(args: argparse.Namespace) -> int:
    """Trains the same on both backends and compares every number; or records one side; or compares two records."""
    from pathlib import Path

    from core.errors import UserError
    from core.screen import make_console

    match args.what:
        case ["compare", one, other]:
            given = [flag for flag in _given(args) if flag != "--output"]
            given += ["--steps"] * (args.steps is not None) + ["--skip-4bit"] * args.skip_4bit
            if given:
                raise UserError(f"parity compare has its settings in the records; {', '.join(given)} has no effect")
            from core.parity_run import compare_folders

            return compare_folders(Path(one), Path(other), output=args.output, console=make_console())
        case ["record"]:
            settings = _settings(args)
            from core.workflow.parity import record_parity

            return record_parity(
                settings,
                steps=_steps(args),
                four_bits=not args.skip_4bit,
                console=make_console(),
                typed=None if args.one_of_two else settings.typed_words(without=_NOT_REPEATED),
            )
        case []:
            return _parity_of_both(args)
    raise UserError(
        f"parity {' '.join(args.what)}: no such form",
        hint="parity [settings], parity record [settings], or parity compare RECORD RECORD",
    )


def _parity_of_both(args: argparse.Namespace) -> int:
    import backends
    from core.errors import UserError
    from core.parity_run import run_parity
    from core.screen import make_console

    if args.backend is not None:
        raise UserError(
            f"--backend {args.backend}: parity runs both backends",
            hint=f"leave it out, or record one side with: python cli.py parity record --backend {args.backend}",
        )
    settings = _settings(args)
    reports = [backends.get(name).probe(settings.config.device) for name in backends.names()]
    return run_parity(
        settings,
        steps=_steps(args),
        four_bits=not args.skip_4bit,
        problems={report.backend: "" if report.available else report.problem or "not installed" for report in reports},
        command=(sys.executable, os.path.abspath(__file__)),
        typed=settings.typed_words(without=_NOT_REPEATED),
        console=make_console(),
    )


def _steps(args: argparse.Namespace) -> int:
    return PARITY_STEPS if args.steps is None else int(args.steps)


def config_show(args: argparse.Namespace) -> int:
    """Prints the resolved configuration and where each value came from."""
    from core.settings import show

    print(show(_settings(args)))
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Says what this machine can train, what is missing, and how to get it."""
    import backends
    from core import doctor
    from core.models import hub_reachable
    from core.screen import make_console

    reports = [backends.get(name).probe() for name in backends.names()]
    diagnosis = doctor.diagnose(reports, hub=hub_reachable())
    if args.json:
        _print_json(doctor.to_json(diagnosis))
    else:
        make_console().print(doctor.render(diagnosis))
    return doctor.exit_code(diagnosis)


# --- arguments --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line and where help is, as every other mistake is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {message}\n       see: {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="python cli.py",
        description="LoRA fine-tuning on MLX and PyTorch, with an honest answer to: learning or memorising?",
        epilog="Start with: python cli.py train --preset quickstart",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = commands.add_parser("train", help="fine-tune a model, or --resume a run")
    _add_settings(command)
    command.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="continue a run, also from elsewhere (default: the newest)"
    )
    command.add_argument("--folds", type=_folds, metavar="K", help="one run for each of K folds, judged together")
    command.add_argument("--final", action="store_true", help="after the folds, a run on all rows")
    command.set_defaults(run_command=train)
    add_data_commands(commands, add_settings=_add_settings, settings_of=_settings)
    _add_monitor(commands)
    add_after_commands(commands)
    _add_convert(commands)
    _add_parity(commands)
    config = commands.add_parser("config", help="look at settings").add_subparsers(metavar="show", required=True)
    command = config.add_parser("show", help="print the resolved settings and their sources")
    _add_settings(command)
    command.set_defaults(run_command=config_show)
    command = commands.add_parser("doctor", help="what this machine can train, and what is missing")
    command.add_argument("--json", action="store_true", help="for scripts")
    command.set_defaults(run_command=doctor)
    return parser


def _add_monitor(commands: Any) -> None:
    command = commands.add_parser("monitor", help="watch a run from another terminal")
    command.add_argument("run", nargs="?", help="run folder (default: the newest)")
    command.add_argument("--refresh", type=_positive, default=5.0, metavar="SECONDS", help="default: 5")
    command.add_argument("--once", action="store_true", help="print once and end")
    command.add_argument("--json", action="store_true", help="print once, for scripts")
    command.set_defaults(run_command=monitor)


def _add_convert(commands: Any) -> None:
    command = commands.add_parser("convert", help="write an adapter for PEFT, mlx-lm or both, and prove it")
    command.add_argument("adapter", help="adapter folder made by PEFT, TRL, mlx-lm or here; or a run folder")
    command.add_argument("--to", choices=("both", "peft", "mlx"), default="both", help="default: both in one folder")
    command.add_argument("--output", metavar="DIR", help="new folder (default: beside the adapter)")
    command.add_argument("--model", help="base model (default: the one that the adapter names)")
    command.add_argument("--data", help="rows to compare the logits on (default: a shipped sample)")
    command.set_defaults(run_command=convert)


def _add_parity(commands: Any) -> None:
    command = commands.add_parser("parity", help="prove that both backends train the same adapter")
    command.add_argument(
        "what", nargs="*", help="nothing: both sides, here; `record`: one side; `compare A B`: two records"
    )
    _add_settings(command)
    command.add_argument("--steps", type=_count, help=f"optimiser steps (default: {PARITY_STEPS})")
    command.add_argument("--skip-4bit", action="store_true", help="leave out what 4-bit weights cost")
    # the two sides of one command, which say nothing of what to type next
    command.add_argument("--one-of-two", action="store_true", help=argparse.SUPPRESS)
    command.set_defaults(run_command=parity)


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--preset", action="append", default=[], help="a set-up from presets/; later ones override")
    command.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file with settings")
    command.add_argument(
        "--set", action="append", default=[], dest="assignments", metavar="SECTION.FIELD=VALUE", help="any setting"
    )
    for flag, name, kind, text in _FLAGS:
        command.add_argument(flag, type=kind, default=None, dest=name, help=text)
    command.add_argument(
        "--strict",
        action="store_const",
        const=True,
        dest="data.strict",
        help="stop when the check of the data finds something",
    )


def _folds(text: str) -> int:
    return whole_number(text, least=2)


def _positive(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError("must be between 0.1 and 86400 seconds")
    return value


def _count(text: str) -> int:
    return whole_number(text, least=1)


def _settings(args: argparse.Namespace) -> Any:
    from pathlib import Path

    from core.settings import resolve

    return resolve(
        presets=args.preset,
        files=[Path(path) for path in args.config],
        assignments=args.assignments,
        flags=_flags(args),
    )


def _flags(args: argparse.Namespace) -> dict[str, tuple[str, Any]]:
    """Dotted name -> (flag, value) of the flags that were typed."""
    values = vars(args)
    return {name: (flag, values[name]) for flag, name in _SETTING_FLAGS if values[name] is not None}


def _given(args: argparse.Namespace) -> list[str]:
    """Flags with settings that were typed."""
    values = vars(args)
    given = [flag for flag, name in _SETTING_FLAGS if values[name] is not None]
    lists = (("--preset", "preset"), ("--config", "config"), ("--set", "assignments"))
    return given + [flag for flag, name in lists if values[name]]


def _print_json(value: object) -> int:
    import json

    print(json.dumps(value, indent=1, allow_nan=False))
    return 0


def _prepare_libraries(environment: MutableMapping[str, str]) -> None:
    """What numerical libraries read when they are loaded, unless the user has set it."""
    if "OMP_WAIT_POLICY" not in environment:
        # Waiting threads soon sleep instead of spinning. On a machine that others use too, spinning made training on a
        # CPU several times slower, and on an idle one some microseconds of it are a fifth faster than none.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        environment.setdefault("GOMP_SPINCOUNT", "2000")
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys():
        # Without padding nearly every batch has a size of its own: blocks of a GPU's memory must be able to grow.
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Exit code 2 and two lines for a user's mistake; a traceback only for a bug of ours."""
    args = build_parser().parse_args(argv)
    _prepare_libraries(os.environ)
    from core.errors import UserError

    try:
        return int(args.run_command(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of a pipe went away, as `head` does; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
