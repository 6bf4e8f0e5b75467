"""What comes after training (`evaluate`, `compare`, `report`, `chat`, `generate`, `merge`, `push`, `track`): arguments,
and what they call."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_WHERE: tuple[tuple[str, str, str], ...] = (
    ("--backend", "backend", "mlx, cuda (PyTorch, on a CPU too) or auto (default: the run's)"),
    ("--device", "device", "auto, gpu or cpu (default: the run's)"),
    ("--model", "model.path", "where the run's base model is now (default: the run's)"),
)
"""Flag, setting, help of what says where things are."""

TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow")
SPLITS = ("test", "validation", "train")


def evaluate(args: argparse.Namespace) -> int:
    """Base model and adapter on the same held-out rows: losses, answers, what was forgotten, keep it or not."""
    from core.screen import make_console
    from core.workflow.evaluate import EvaluateOptions, evaluate

    limits = {name: getattr(args, name) for name in ("max_gap", "min_gain", "max_forgotten")}
    given = {name: value for name, value in limits.items() if value is not None}
    gate = args.gate or bool(given)  # a limit is a question
    options = EvaluateOptions(
        data=args.data,
        settings=tuple(args.assignments),
        split=args.split,
        max_samples=args.max_samples,
        generate=args.generate,
        text_scores=args.text_scores,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        general=args.general or gate,
        gate=gate,
        output=args.output,
        anew=args.anew,
        **given,
    )
    return evaluate(_run(args), options, flags=_flags(args), console=make_console())


def compare(args: argparse.Namespace) -> int:
    """What differs between runs: settings, losses, gap, time, memory, answers."""
    from core.comparison.compare import compare
    from core.errors import UserError
    from core.run import existing_run
    from core.screen import make_console

    if args.json and args.output is not None:
        raise UserError("--json writes nothing, so --output has no effect", hint="leave one of them out")
    folders = [existing_run(path) for path in args.runs]
    return compare(folders, output=args.output, as_json=args.json, console=make_console())


def report(args: argparse.Namespace) -> int:
    """One page that shows a run and opens without a network."""
    from core.screen import make_console
    from core.workflow.report import report

    return report(_run(args), output=args.output, console=make_console())


def generate(args: argparse.Namespace) -> int:
    """Answers prompts with base model and adapter."""
    from core.screen import make_console
    from core.workflow.generate import generate

    return generate(
        _run(args),
        prompt=args.prompt,
        prompts=args.prompts,
        side=args.side,
        system=args.system,
        sampling=_sampling(args),
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        output=args.output,
        flags=_flags(args),
        console=make_console(),
    )


def chat(args: argparse.Namespace) -> int:
    """A conversation with base model, adapter or both side by side."""
    from core.screen import make_console
    from core.workflow.chat import chat

    return chat(
        _run(args),
        side=args.side,
        system=args.system,
        sampling=_sampling(args),
        max_tokens=args.max_tokens,
        flags=_flags(args),
        console=make_console(),
    )


def merge(args: argparse.Namespace) -> int:
    """Puts the adapter into the base model's weights."""
    from core.screen import make_console
    from core.workflow.merge import merge

    return merge(
        _run(args),
        output=args.output,
        dtype=args.dtype,
        quantize=args.quantize,
        gguf=args.gguf,
        max_shard_gb=args.max_shard_gb,
        check=not args.no_check,
        flags=_flags(args),
        console=make_console(),
    )


def push(args: argparse.Namespace) -> int:
    """Uploads an adapter or a merged model to the Hugging Face Hub, with a model card."""
    from core.screen import make_console
    from core.workflow.push import push

    return push(
        _run(args),
        repo=args.repo,
        merged=args.merged,
        private=not args.public,
        license_name=args.license,
        dry_run=args.dry_run,
        assume_yes=args.yes,
        base_model=args.base_model,
        console=make_console(),
    )


def track(args: argparse.Namespace) -> int:
    """Sends a run's records to experiment trackers, as if they had been there while it ran."""
    from core.screen import make_console
    from core.trackers.command import track

    return track(_run(args), to=args.to, console=make_console())


def _run(args: argparse.Namespace) -> Path:
    from core.run import existing_run

    return existing_run(args.run)


def _flags(args: argparse.Namespace) -> dict[str, tuple[str, Any]]:
    """Dotted name -> (flag, value) of the flags that were typed."""
    values = vars(args)
    return {name: (flag, values[name]) for flag, name, _ in _WHERE if values[name] is not None}


def _sampling(args: argparse.Namespace) -> Any:
    from core.sampling import Sampling

    return Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


# --- arguments --------------------------------------------------------------------------------------------------------


def add_after_commands(commands: Any) -> None:
    """Adds the commands of this module to the command line."""
    _add_evaluate(commands)
    _add_compare(commands)
    _add_report(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_merge(commands)
    _add_push(commands)
    _add_track(commands)


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser("evaluate", help="base model and adapter on held-out rows; keep it or not")
    _add_run(command)
    command.add_argument("--data", metavar="PATH", help="other rows: file, folder or hub id (default: the run's)")
    command.add_argument(
        "--set", action="append", default=[], dest="assignments", metavar="data.FIELD=VALUE", help="how --data is read"
    )
    command.add_argument("--split", choices=SPLITS, help="rows of the run's data (default: test, else validation)")
    command.add_argument("--max-samples", type=_count, metavar="N", help="at most so many rows, the same each time")
    answers = command.add_mutually_exclusive_group()
    answers.add_argument(
        "--generate", action="store_true", default=None, help="have rows answered (default: those with labels)"
    )
    answers.add_argument("--no-generate", action="store_false", dest="generate", help="losses only")
    command.add_argument("--text-scores", action="store_true", help="exact match and ROUGE-L of the answers")
    command.add_argument("--max-tokens", type=_count, default=256, metavar="N", help="of an answer; default: 256")
    command.add_argument("--batch-size", type=_count, metavar="N", help="rows at a time (default: by their length)")
    command.add_argument("--general", action="store_true", help="what it did to everything else: shipped texts")
    command.add_argument("--gate", action="store_true", help="keep it or not: exit code 0 or 3")
    command.add_argument(
        "--max-gap", type=_number, metavar="NATS", help="gate: largest gap (default: the bound of GOOD, 0.15)"
    )
    command.add_argument("--min-gain", type=_number, metavar="NATS", help="gate: least fall of the loss; default: 0")
    command.add_argument(
        "--max-forgotten", type=_number, metavar="NATS", help="gate: largest rise elsewhere; default: 0.1"
    )
    command.add_argument(
        "--output", metavar="DIR", help="default: evaluation/ in the run folder; of other rows evaluation-…/"
    )
    command.add_argument("--anew", action="store_true", help="do again what an earlier evaluation has done")
    _add_where(command)
    command.set_defaults(run_command=evaluate)


def _add_compare(commands: Any) -> None:
    command = commands.add_parser("compare", help="what differs between runs, in settings and outcome")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders, two or more")
    command.add_argument("--output", metavar="DIR", help="folder for table and plot (default: a new one under runs/)")
    command.add_argument("--json", action="store_true", help="for scripts; writes nothing")
    command.set_defaults(run_command=compare)


def _add_report(commands: Any) -> None:
    command = commands.add_parser("report", help="one page that shows a run, to open in a browser or to send")
    _add_run(command)
    command.add_argument("--output", metavar="FILE", help="default: report.html in the run folder")
    command.set_defaults(run_command=report)


def _add_generate(commands: Any) -> None:
    command = commands.add_parser("generate", help="answer prompts with and without the adapter")
    _add_run(command)
    prompts = command.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="what to answer")
    prompts.add_argument("--prompts", metavar="FILE", help="text file with a prompt a line, or JSONL; - for the input")
    command.add_argument("--output", metavar="FILE", help="write JSONL instead of showing the answers")
    command.add_argument("--batch-size", type=_count, default=8, metavar="N", help="prompts at a time; default: 8")
    _add_talk(command, max_tokens=128, temperature=0.0)
    _add_where(command)
    command.set_defaults(run_command=generate)


def _add_chat(commands: Any) -> None:
    command = commands.add_parser("chat", help="talk to a run's model, before and after training side by side")
    _add_run(command)
    _add_talk(command, max_tokens=512, temperature=0.7)
    _add_where(command)
    command.set_defaults(run_command=chat)


def _add_talk(command: argparse.ArgumentParser, *, max_tokens: int, temperature: float) -> None:
    sides = command.add_mutually_exclusive_group()
    for side, text in (
        ("base", "the model before training"),
        ("adapter", "the trained model"),
        ("both", "the default"),
    ):
        sides.add_argument(f"--{side}", action="store_const", const=side, dest="side", default="both", help=text)
    command.add_argument("--system", metavar="TEXT", help="a system message")
    command.add_argument("--max-tokens", type=_count, default=max_tokens, help=f"of an answer; default: {max_tokens}")
    command.add_argument(
        "--temperature", type=_number, default=temperature, help=f"0: the most likely token; default: {temperature:g}"
    )
    command.add_argument("--top-k", type=_natural, default=50, help="of the k most likely tokens; 0: all; default: 50")
    command.add_argument("--top-p", type=_share, default=0.95, help="of this probability; default: 0.95")
    command.add_argument("--repetition-penalty", type=_penalty, default=1.0, help="above 1: fewer repetitions")
    command.add_argument("--seed", type=_natural, default=0, help="the same seed, the same answer")


def _add_merge(commands: Any) -> None:
    command = commands.add_parser("merge", help="put the adapter into the base model's weights")
    _add_run(command)
    command.add_argument("--output", metavar="DIR", help="new folder (default: merged/ in the run folder)")
    command.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    command.add_argument("--quantize", type=int, choices=(4,), help="4-bit weights: MLX's or NF4, as --backend says")
    command.add_argument(
        "--gguf", nargs="?", const="auto", metavar="TYPE", help="a GGUF file as well: auto, f32, f16, bf16 or q8_0"
    )
    command.add_argument("--max-shard-gb", type=_positive, default=5.0, help="size of a file; default: 5")
    command.add_argument("--no-check", action="store_true", help="don't hold the merged model against the adapter")
    _add_where(command)
    command.set_defaults(run_command=merge)


def _add_push(commands: Any) -> None:
    command = commands.add_parser("push", help="upload to the Hugging Face Hub, with a model card")
    _add_run(command)
    command.add_argument("--repo", required=True, metavar="NAME", help="user/name")
    command.add_argument("--merged", metavar="DIR", help="a merged model instead of the adapter")
    command.add_argument("--public", action="store_true", help="for everybody (default: private)")
    command.add_argument("--base-model", metavar="NAME", help="its name on the hub, if the run's model is a folder")
    command.add_argument("--license", metavar="ID", help="of what is uploaded, such as apache-2.0")
    command.add_argument("--dry-run", action="store_true", help="show every file and the card; upload nothing")
    command.add_argument("--yes", action="store_true", help="upload what is shown without asking")
    command.set_defaults(run_command=push)


def _add_track(commands: Any) -> None:
    command = commands.add_parser("track", help="send a run's records to experiment trackers")
    _add_run(command)
    command.add_argument("--to", nargs="+", choices=TRACKERS, required=True, metavar="NAME", help=", ".join(TRACKERS))
    command.set_defaults(run_command=track)


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", nargs="?", help="run folder (default: the newest)")


def _add_where(command: argparse.ArgumentParser) -> None:
    for flag, name, text in _WHERE:
        command.add_argument(flag, default=None, dest=name, help=text)


# --- values -----------------------------------------------------------------------------------------------------------


def _number(text: str) -> float:
    """At least 0."""
    return _within(text, least=0.0, most=1e6, what="a number of at least 0")


def _positive(text: str) -> float:
    return _within(text, least=1e-6, most=1e6, what="a number above 0")


def _share(text: str) -> float:
    return _within(text, least=1e-6, most=1.0, what="above 0 and at most 1")


def _penalty(text: str) -> float:
    return _within(text, least=0.1, most=10.0, what="between 0.1 and 10")


def _within(text: str, *, least: float, most: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:  # NaN is neither
        raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
    return value


def _natural(text: str) -> int:
    return whole_number(text, least=0)


def _count(text: str) -> int:
    return whole_number(text, least=1)


def whole_number(text: str, *, least: int) -> int:
    """Raises: argparse.ArgumentTypeError: it is none, or below `least`."""
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
    return int(text)
