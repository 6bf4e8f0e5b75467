"""A whole run side by side with mlx_lm.lora, and with TRL's SFTTrainer on PEFT and bitsandbytes.

    pip install trl
    python benchmarks/peers.py                                  # both pairs on this machine's CPU, SmolLM2-135M
    python benchmarks/peers.py --backend cuda --frozen half --repeats 5
    python benchmarks/peers.py --device gpu --model 7b          # random weights in Mistral-7B's shape; also: mixtral

A run is the same for all tools: the model's folder in; rank 8 on q k v o of the same layers, no dropout (or --dropout
0.05, say, each tool's own), AdamW at a constant rate; the same rows of the shipped expert questions with the loss on
the answers only; as many optimiser steps of as many rows; the whole validation split evaluated before the first step,
every --eval-every steps and at the end (mlx_lm before those steps instead of after); an adapter on the disk out. It is
measured twice: with an adapter on every layer, and with the first half of the layers frozen.

What is printed, medians over --repeats turns:
- seconds of an optimiser step: the time in training steps over their number, the first one included. Ours: what the
  trainer counts, reading the losses included; mlx_lm: its own count; TRL: its loop less its evaluations.
- seconds of an evaluation of the validation split: their mean.
- the whole run: from the start of the process to its end. Ours evaluates as many training rows each time (the probe,
  for the gap) and writes checkpoints, which the peers don't: both are in; the figure without the probe stands beside.
- the same without imports and loading: from the loaded model to the end of the process.
- processor seconds of the process; peak memory: the process's resident set on a CPU (mapped weight files included),
  what tensors held on a GPU.
- the loss of the last adapter on the validation rows, every tool's by one and the same code: ours, on the cuda backend
  where PyTorch is installed (in 4 bits, where the roundings differ, on the pair's own backend).

Every turn is a process of its own, the tools take turns, ratios are of neighbouring turns. Ours starts each turn with
an empty cache, so that filling the prefix store counts; "warm" is a second run that finds it filled.

The peers' settings, which are also in the results:
- mlx_lm: rows sorted by length (it does that itself), `mask_prompt`, `val_batches: -1`, AdamW with bias correction, no
  checkpoints in between. On a CPU: a fast BLAS loaded first, float32 weights, no `mx.compile` (it would wait for g++).
- TRL: rows grouped by length (`train_sampling_strategy`), prompts without loss, `prediction_loss_only`, fused AdamW, no
  workers, no checkpoints, "sdpa" attention; its own head at target positions in Triton on a GPU, at every position on a
  CPU, with entropy and accuracy, which can't be turned off. On a GPU bfloat16, evaluation batches four times as large,
  flash attention without padding and Liger where they are installed. In 4 bits on a CPU the adapter is kept in float32.
- The peers' threads wait as their libraries have them wait. Given our settings for waiting instead, or sleep at once,
  TRL took 1.05 and 1.17 times as long over a run of 24 + 8 rows and one epoch, mlx_lm 0.99 and 1.09 (means of one or
  two turns on two busy cores).
- All: activations are recomputed from 1 billion parameters on and not below.
Each row has a target more with the peers: what stands after the end token, a line break for TRL, padding for mlx_lm.
Their order of rows and first adapters are their own.

The GPU part has not been measured yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import (  # noqa: E402
    RESULTS,
    Result,
    alternate,
    facts,
    in_new_process,
    medians,
    model_folder,
    ratios,
    save_part,
    write_model,
)
from benchmarks.peers_tools import (  # noqa: E402
    CHECKPOINTING_FROM,
    TOOLS,
    Turn,
    judge,
    mlx_lm_settings,
    num_evaluations,
    our_settings,
    trl_settings,
)

RESULT = RESULTS / "peers.json"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = ROOT / "data/samples/expert.jsonl"
PEERS = {"mlx": "mlx_lm.lora", "cuda": "trl"}
NEEDED = {"mlx": ("mlx", "mlx_lm"), "cuda": ("torch", "peft", "trl")}
WARM = ", warm"
"""Of a tool's name: it finds what its first run left in the cache."""
GOALS = {
    "nothing": {"seconds_per_step": 1.3, "run_seconds": 1.3, "run_without_probe_seconds": 1.3},
    "half": {"run_seconds": 2.5, "run_without_probe_seconds": 2.5},
}
"""How many times faster than the peer."""
FIGURES = {
    "seconds_per_step": "s / step",
    "seconds_per_evaluation": "s / evaluation",
    "run_seconds": "whole run, s",
    "run_without_probe_seconds": "without probe, s",
    "after_load_seconds": "after the load, s",
    "processor_seconds": "processor, s",
    "peak_gb": "peak, GB",
}
PATHS = ("model", "data", "adapter_path", "output_dir", "model.path", "data.path")
"""Settings that say where things are on this machine."""


# --- model and rows ---------------------------------------------------------------------------------------------------


def find_model(args: argparse.Namespace, scratch: Path) -> Path:
    """The folder of a hub id or a path; random weights for the name of a shape."""
    from benchmarks.gpu_step import SHAPES as DENSE
    from benchmarks.mixtral import SHAPES as MIXTURES
    from tests.tiny import make_tokenizer

    shapes = {"7b": DENSE["mistral-7b"], "tiny": DENSE["tiny"], "mixtral": MIXTURES["mixtral-8x7b"]}
    if args.model not in shapes:
        backend = "cuda" if "cuda" in args.backends else "mlx"
        return model_folder(args.model, backend, bits=args.bits)
    folder = scratch / "model"
    folder.mkdir()
    num_bytes = write_model(folder, shapes[args.model], layers=args.layers, device=args.device)
    make_tokenizer(folder)  # every byte is a token
    print(f"{num_bytes / 1e9:.2f} GB of random weights written", flush=True)
    return folder


def write_rows(args: argparse.Namespace, folder: Path) -> None:
    """The first rows for training, the last ones for validation."""
    folder.mkdir()
    lines = args.data.read_text(encoding="utf-8").splitlines(keepends=True)
    assert args.rows + args.val_rows <= len(lines), f"{args.data.name} has {len(lines)} rows only"
    (folder / "train.jsonl").write_text("".join(lines[: args.rows]), encoding="utf-8")
    (folder / "valid.jsonl").write_text("".join(lines[-args.val_rows :]), encoding="utf-8")


def first_turn(args: argparse.Namespace, model: Path, data: Path) -> Turn:
    """What all turns have in common."""
    from core.architecture import read_architecture

    architecture = read_architecture(model)
    return Turn(
        model=str(model),
        data=str(data),
        output="",
        device=args.device,
        bits=args.bits,
        num_rows=args.rows,
        batch_size=args.batch_size,
        epochs=args.epochs,
        eval_every=args.eval_every,
        max_tokens=args.max_tokens,
        num_layers=architecture.num_layers,
        num_frozen=0,
        is_large=architecture.num_parameters >= CHECKPOINTING_FROM,
        dropout=args.dropout,
        sets=tuple(args.set),
    )


# --- turns ------------------------------------------------------------------------------------------------------------


def run_turn(tool: str, turn: Turn, *, scratch: Path) -> Result:
    """One whole run in a process of its own; its adapter stays in `scratch`."""
    warm = tool.endswith(WARM)
    output = Path(tempfile.mkdtemp(dir=scratch))
    kept = scratch / f"kept, {tool.removesuffix(WARM)}"
    # the first cold run's cache is what the warm ones find
    cache = kept if warm or not kept.exists() else output / "cache"
    cache.mkdir(exist_ok=True)
    turn = replace(turn, output=str(output))
    request = json.dumps(asdict(turn))
    found = in_new_process(__file__, [tool.removesuffix(WARM), request], environment=environment(tool, cache))
    if cache != kept:
        shutil.rmtree(cache)
    return figures(found, turn)


def environment(tool: str, cache: Path) -> dict[str, str]:
    """Ours as `cli.py` sets it. For the peers nothing: that was their best, or as good as any."""
    found = {"TWINKEEL_CACHE": str(cache)}
    return found | {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"} if tool.startswith("twinkeel") else found


def add_final_losses(turns: Mapping[str, Sequence[Result]], turn: Turn, *, judge_on: str, scratch: Path) -> None:
    """Puts the loss of each turn's adapter beside its figures: all by one process."""
    runs = [run for of_tool in turns.values() for run in of_tool]
    request = asdict(turn) | {"adapters": [run.pop("adapter") for run in runs], "backend": judge_on}
    judged = in_new_process(__file__, ["judge", json.dumps(request)], environment=environment("twinkeel", scratch))
    for run, loss in zip(runs, judged["losses"], strict=True):
        run["final_loss"] = loss


def figures(found: Result, turn: Turn) -> Result:
    """What is compared, from what a tool's turn measured."""
    evaluations = found["evaluation_seconds"]
    expected = num_evaluations(turn.steps, turn.eval_every)
    assert found["steps"] == turn.steps, f"{found['steps']} steps instead of {turn.steps}"
    assert len(evaluations) == expected, f"{len(evaluations)} evaluations instead of {expected}"
    run, probe = found["process"]["wall_seconds"], sum(found.get("probe_seconds", []))
    return found | {
        "seconds_per_step": found["steps_seconds"] / found["steps"],
        "seconds_per_evaluation": statistics.fmean(evaluations),
        "run_seconds": run,
        "run_without_probe_seconds": run - probe,
        # ours reads its rows before it loads the model, the peers after
        "after_load_seconds": run - found["loaded_at"] + found.get("rows_seconds", 0.0),
        "processor_seconds": found["process"]["processor_seconds"],
    }


def measure(args: argparse.Namespace, backend: str, frozen: str, common: Turn, scratch: Path) -> Result:
    """One pair of tools in one set-up."""
    turn = replace(common, num_frozen=common.num_layers // 2 if frozen == "half" else 0)
    mine, peer = f"twinkeel {backend}", PEERS[backend]
    tools = [mine, *([mine + WARM] if frozen == "half" else []), peer]
    judge_on = backend if args.bits == 4 or not has_packages(NEEDED["cuda"][:2]) else "cuda"
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        turns = alternate(tools, args.repeats, lambda tool: run_turn(tool, turn, scratch=Path(name)))
        add_final_losses(turns, turn, judge_on=judge_on, scratch=Path(name))
    found = {tool: ratios(turns[peer], turns[tool], tuple(FIGURES)) for tool in tools if tool != peer}
    return {
        "sizes": {
            "rows": args.rows,
            "validation_rows": args.val_rows,
            "batch_size": args.batch_size,
            "steps": turn.steps,
            "evaluations": num_evaluations(turn.steps, turn.eval_every),
            "layers": turn.num_layers,
            "frozen_layers": turn.num_frozen,
            "bits": turn.bits,
            "dropout": turn.dropout,
        },
        "judged_on": judge_on,
        "settings": settings_of(turn, backend),
        "median": {tool: medians(runs, (*FIGURES, "final_loss", "base_loss")) for tool, runs in turns.items()},
        "times_faster_median": {
            tool: {figure: statistics.median(values) for figure, values in of_tool.items()}
            for tool, of_tool in found.items()
        },
        "times_faster": found,
        "turns": turns,
    }


def settings_of(turn: Turn, backend: str) -> Result:
    """What each tool was given, but for paths."""
    theirs = mlx_lm_settings(turn) if backend == "mlx" else trl_settings(turn)
    mine = dict(setting.split("=", 1) for setting in our_settings(turn))
    return {
        name: {key: value for key, value in settings.items() if key not in PATHS}
        for name, settings in ((f"twinkeel {backend}", mine), (PEERS[backend], theirs))
    }


# --- what is printed --------------------------------------------------------------------------------------------------


def table(title: str, report: Result) -> str:
    """For a README."""
    lines = [
        title,
        "",
        f"| | {' | '.join(FIGURES.values())} | final validation loss |",
        f"|---|{'---|' * (len(FIGURES) + 1)}",
    ]
    for tool, median in report["median"].items():
        numbers = [f"{median[figure]:.3g}" if median[figure] < 100 else f"{median[figure]:.0f}" for figure in FIGURES]
        lines.append(f"| {tool} | {' | '.join(numbers)} | {median['final_loss']:.4f} |")
    for tool, found in report["times_faster"].items():
        numbers = [_spread(found[figure]) for figure in FIGURES]
        lines.append(f"| {tool}: times less | {' | '.join(numbers)} | |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.2f}x"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}–{max(values):.2f})"


def title_of(args: argparse.Namespace, report: Result, device: str) -> str:
    sizes = report["sizes"]
    frozen = f"the first {sizes['frozen_layers']} of {sizes['layers']} layers frozen"
    return (
        f"{Path(args.model).name}, {sizes['bits']}-bit, {frozen if sizes['frozen_layers'] else 'nothing frozen'}"
        f"{f', dropout {args.dropout}' if args.dropout else ''}: "
        f"{sizes['rows']} + {sizes['validation_rows']} rows, {sizes['steps']} steps of {sizes['batch_size']} rows, "
        f"{sizes['evaluations']} evaluations; {device}; medians of {args.repeats} turns"
    )


def goals(frozen: str, backend: str, report: Result) -> Iterable[str]:
    """Each goal, and whether it was reached."""
    for tool, ratios_of_tool in report["times_faster_median"].items():
        for figure, goal in GOALS[frozen].items():
            ratio = ratios_of_tool[figure]
            verdict = "reached" if ratio >= goal else "missed"
            yield f"goal, {tool}, {FIGURES[figure]}: {goal}x {PEERS[backend]}: {verdict} ({ratio:.2f}x)"


# --- the command ------------------------------------------------------------------------------------------------------


def has_packages(names: Iterable[str]) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("mlx", "cuda", "both"), default="both")
    parser.add_argument("--frozen", choices=("0", "half", "both"), default="both", help="layers without an adapter")
    parser.add_argument("--model", default=MODEL, help="hub id or folder; 7b, mixtral, tiny: random weights")
    parser.add_argument("--layers", type=int, help="so many layers of a model of random weights")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=16)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rows", type=int, default=172, help="training rows; default: all that is shipped")
    parser.add_argument("--val-rows", type=int, default=44, help="validation rows")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--eval-every", type=int, default=10, help="optimiser steps between evaluations")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--dropout", type=float, default=0.0, help="of what enters the adapter")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each tool")
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL with prompt and completion")
    parser.add_argument("--set", action="append", default=[], metavar="S=V", help="another setting of ours")
    parser.add_argument("--output", type=Path, default=RESULT, help="default: %(default)s")
    parser.add_argument("--turn", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.rows % args.batch_size or args.val_rows % args.batch_size:
        parser.error("--rows and --val-rows must be multiples of --batch-size: mlx_lm leaves out what is over")
    if not 0 <= args.dropout < 1:
        parser.error("--dropout must be 0 or more and below 1")
    if args.eval_every < 2:
        parser.error("--eval-every must be 2 or more: mlx_lm's first evaluation is that of its first step")
    args.frozen_parts = {"0": ["nothing"], "half": ["half"], "both": ["nothing", "half"]}[args.frozen]
    args.backends = list(PEERS) if args.backend == "both" else [args.backend]
    if args.device == "gpu" and args.backend == "both":  # a machine has a GPU for one of them
        args.backends = ["mlx" if sys.platform == "darwin" else "cuda"]
    missing = [name for name in args.backends if not has_packages(NEEDED[name])]
    if missing and args.turn is None:
        parser.error(f"{', '.join(missing)}: needs {', '.join(NEEDED[missing[0]])}")
    return args


def take_turn(tool: str, request: dict[str, Any]) -> Result:
    request["sets"] = tuple(request["sets"])
    if tool == "judge":
        adapters, backend = map(Path, request.pop("adapters")), request.pop("backend")
        return judge(Turn(**request), adapters=list(adapters), backend=backend)
    return TOOLS[tool](Turn(**request))


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.turn:
        print(json.dumps(take_turn(args.turn[0], json.loads(args.turn[1]))))
        return
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        common = first_turn(args, find_model(args, scratch), scratch / "data")
        write_rows(args, scratch / "data")
        for backend in args.backends:
            about = facts(backend, args.device, script="peers.py", arguments=arguments)
            for frozen in args.frozen_parts:
                report = measure(args, backend, frozen, common, scratch)
                print(table(title_of(args, report, about["device"]), report))
                print("\n".join(goals(frozen, backend, report)), flush=True)
                # after each, so that a run that is cut short leaves what it has
                part = f"{Path(args.model).name}, {args.bits}-bit, {args.device}, {backend}, {frozen} frozen"
                part += f", dropout {args.dropout}" if args.dropout else ""
                save_part(args.output, part, about | report)


if __name__ == "__main__":
    main()
