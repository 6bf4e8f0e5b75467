"""Mixtral-8x7B in 4 bits on a GPU: load time, memory and speed of our training beside the usual script's.

    python benchmarks/mixtral.py --census                      # where the bytes are; needs no GPU
    python benchmarks/mixtral.py --parts load                  # packing, the second start, shard by shard
    python benchmarks/mixtral.py --parts steps --targets attention
    python benchmarks/mixtral.py --parts steps --targets experts
    python benchmarks/mixtral.py --only twinkeel --tokens 2048 --limit-gb 32     # on a card of 32 GB, so to speak
    python benchmarks/mixtral.py --tiny --device cpu           # does it run? no figures, writes nothing

Goals: attention LoRA loads and trains at 2048 tokens within 32 GB of the device (what the allocator reserves, at its
peak), and trains at least twice as many tokens a second as the usual script.

`steps`: the real shape with random weights; nothing of it is on disk. Ours packs matrices that are made on the device
when it asks for them. The usual script (`usual`: transformers, PEFT, bitsandbytes in 4 bits, and the Trainer's step as
a plain loop) gets the model that `from_pretrained` with `load_in_4bit` would give: attention in NF4, experts in 16
bits, 91 GB, so it needs a card of 141 GB. What tutorials call first, `prepare_model_for_kbit_training`, would turn
those experts to float32 and fits nowhere; it is left out, in the script's favour. `trl` is SFTTrainer on the same
model. Unsloth reads models from folders only, and the 93 GB folder is too large for the disk this was made for. All
train rank 16 without dropout, with AdamW, clipping and gradient checkpointing, on one row at a time, with the loss on
its second half. The tools' weights are other random numbers, so their losses must agree within 10 % only.

A turn is a process of its own that loads once and trains at each number of tokens; tools take turns and ratios are of
neighbouring turns. The share of the peak: what `mixtral_work.py` counts for a step, over the time of a step, as a part
of the speed of one large matrix product in bfloat16, measured in the same process before the load.

`load`: the real shape packed from random matrices made on the device, without and with keeping the packed weights on
disk (24.5 GB in the temporary folder; TMPDIR says where), then started from them; and four layers of the real shape in
a folder of bfloat16 shards (12.1 GB, one a layer, which the system still has in memory), by us and by the usual
`from_pretrained`. Host memory is the process's resident set, the mapped part of a shard included.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    RESULTS,
    WARM_UP,
    Result,
    TurnError,
    alternate,
    in_new_process,
    machine,
    make_batches,
    medians,
    now,
    ratios,
    write_config,
    write_model,
)
from benchmarks.mixtral_tools import RANK, TOOLS, Train, Turn, installed_tools
from benchmarks.mixtral_work import work_of_a_step

if TYPE_CHECKING:
    import torch

RESULT = RESULTS / "mixtral.json"
OURS, USUAL = "twinkeel", "usual"
GOAL_GB, GOAL_RATIO, GOAL_TOKENS = 32.0, 2.0, 2048
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "mixtral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 320,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    },
}
DISK_LAYERS = 4
MAX_LOSS_DIFFERENCE = 0.1
"""Relative, of the mean over a turn's steps."""
STEP_FIGURES = ("tokens_per_second", "share_of_peak", "device_peak_gb", "device_reserved_gb")
LOAD_FIGURES = ("seconds", "device_peak_gb", "device_reserved_gb", "host_before_gb", "host_peak_gb")


# --- one turn, in a process of its own --------------------------------------------------------------------------------


def take_turn(tool: str, turn: Turn) -> Result:
    """Loads, then trains at each width; what does not fit is said and not measured."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch

    import backends.cuda.learner
    import backends.cuda.model  # noqa: F401  (imports are not part of a load)
    from backends.cuda.memory import choose_device, total_bytes
    from core.errors import OutOfMemoryError

    device = choose_device(turn.device)
    if turn.limit_gb is not None:
        torch.cuda.set_per_process_memory_fraction(turn.limit_gb * 1e9 / total_bytes(device))
    found: Result = {"matmul_tflops": matmul_speed(device) / 1e12, "steps": {}}
    place = "load"
    try:
        train, found["load"] = measured_load(tool, turn, device)
        for width in turn.widths:
            place = str(width)
            found["steps"][place] = measured_steps(train, turn, width, device, found["matmul_tflops"] * 1e12)
    except (torch.OutOfMemoryError, OutOfMemoryError) as error:
        found["out_of_memory"] = {"at": place, "error": str(error).splitlines()[0]}
    return found


def matmul_speed(device: torch.device) -> float:
    """Operations a second of one large product, the best of several; bfloat16 on a GPU."""
    import torch

    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(6):
        began = now(device)
        for _ in range(10):
            torch.mm(left, right)
        times.append((now(device) - began) / 10)
    return 2 * size**3 / min(times)


def measured_load(tool: str, turn: Turn, device: torch.device) -> tuple[Train, Result]:
    reset_peaks(device)
    before, _ = host_memory()
    began = now(device)
    train = TOOLS[tool](turn)
    seconds = now(device) - began
    return train, {
        "seconds": seconds,
        "host_before_gb": before / 1e9,
        "host_peak_gb": host_memory()[1] / 1e9,
        **device_peaks(device),
    }


def measured_steps(train: Train, turn: Turn, width: int, device: torch.device, peak: float) -> Result:
    """Speed and memory at one width; `peak` in operations a second."""
    config = turn.config()
    batches = make_batches(rows=turn.rows, width=width, count=WARM_UP + turn.steps, vocab_size=config["vocab_size"])
    reset_peaks(device)
    started: list[float] = []
    loss = train(batches, lambda: started.append(now(device)))
    seconds = now(device) - started[0]
    timed = batches[WARM_UP:]
    work = sum(
        work_of_a_step(
            config,
            lengths=np.count_nonzero(batch.inputs, axis=1).tolist(),
            num_targets=batch.num_targets,
            targets=turn.targets,
            first_layer=int(turn.frozen * config["num_hidden_layers"]),
            rank=RANK,
            checkpointing=True,
        ).operations
        for batch in timed
    )
    return {
        "tokens_per_second": sum(int(np.count_nonzero(batch.inputs)) for batch in timed) / seconds,
        "share_of_peak": work / seconds / peak,
        "seconds_per_step": seconds / len(timed),
        "mean_loss": loss,
        **device_peaks(device),
    }


def reset_peaks(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux, where a container lets us: 5 resets the resident set's peak
        Path("/proc/self/clear_refs").write_text("5")


def device_peaks(device: torch.device) -> Result:
    """What tensors held and what the allocator reserved, at most; on a CPU both are the process's."""
    import torch

    from backends.cuda.memory import memory_stats

    held = memory_stats(device).peak_bytes
    reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else held
    return {"device_peak_gb": held / 1e9, "device_reserved_gb": reserved / 1e9}


def host_memory() -> tuple[int, int]:
    """Resident bytes of this process: now, and the peak since it was reset (where it can't be, since the start)."""
    import torch

    from backends.cuda.memory import memory_stats

    status = Path("/proc/self/status")
    if not status.exists():
        stats = memory_stats(torch.device("cpu"))
        return stats.current_bytes, stats.peak_bytes
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now_kib, peak_kib = (int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return now_kib * 1024, peak_kib * 1024


# --- the parts ------------------------------------------------------


def run_turn(tool: str, turn: Turn, *, cache: Path) -> Result:
    """The figures of a turn. A peer that fails is reported; ours must not."""
    try:
        return in_new_process(__file__, [tool, json.dumps(asdict(turn))], environment={"TWINKEEL_CACHE": str(cache)})
    except TurnError as error:
        if tool == OURS:
            raise
        return {"steps": {}, "failed": str(error)[-1000:]}


def measure_steps(args: argparse.Namespace, base: Turn, scratch: Path) -> None:
    for targets, frozen in itertools.product(args.targets, args.frozen):
        turn = replace(base, targets=targets, frozen=frozen, widths=tuple(args.tokens))
        turns = alternate(args.only, args.repeats, lambda tool, turn=turn: run_turn(tool, turn, cache=scratch))  # type: ignore[misc]
        title = f"{targets}, {frozen:.0%} of the layers frozen"
        report = {"targets": targets, "frozen": frozen, "turns": turns, "tokens": {}}
        for width in map(str, args.tokens):
            report["tokens"][width] = summary = compared(turns, width)
            show_steps(f"{title}, {width} tokens", summary)
            if targets == "attention" and int(width) == GOAL_TOKENS:
                show_goals(summary)
        show_troubles(turns)
        save(args, f"{title}: {', '.join(args.only)}", report)


def show_troubles(turns: dict[str, list[Result]]) -> None:
    for tool, runs in turns.items():
        for place in {run["out_of_memory"]["at"] for run in runs if "out_of_memory" in run}:
            print(f"  {tool} does not fit: out of memory at {place}")
        for words in {run["failed"].strip().splitlines()[-1] for run in runs if "failed" in run}:
            print(f"  {tool} fails: {words}")


def compared(turns: dict[str, list[Result]], width: str) -> Result:
    """Medians of the tools that fit, and the ratios of ours to each of the others."""
    runs = {tool: [run["steps"].get(width) for run in found] for tool, found in turns.items()}
    whole = {tool: found for tool, found in runs.items() if all(found)}
    summary: Result = {"median": {tool: medians(found, STEP_FIGURES) for tool, found in whole.items()}, "ratios": {}}
    for peer in whole.keys() - {OURS} if OURS in whole else ():
        summary["ratios"][peer] = ratios(whole[OURS], whole[peer], STEP_FIGURES)
        losses = ratios(whole[OURS], whole[peer], ["mean_loss"])["mean_loss"]
        difference = max(abs(1 - ratio) for ratio in losses)
        assert difference < MAX_LOSS_DIFFERENCE, f"{peer}'s loss differs by {difference:.3g}: not the same training"
    return summary


def show_steps(title: str, summary: Result) -> None:
    print(title)
    for tool, figures in summary["median"].items():
        line = (
            f"  {tool:<10}{figures['tokens_per_second']:>10.1f} tokens/s {figures['share_of_peak']:>7.2%} of the peak"
            f"{figures['device_peak_gb']:>8.2f} GB ({figures['device_reserved_gb']:.2f} reserved)"
        )
        if found := summary["ratios"].get(tool, {}).get("tokens_per_second"):
            line += f"   ours is {np.median(found):.2f}x ({min(found):.2f} to {max(found):.2f})"
        print(line, flush=True)


def show_goals(summary: Result) -> None:
    if mine := summary["median"].get(OURS):
        reserved = mine["device_reserved_gb"]
        print(f"  goal: within {GOAL_GB:.0f} GB: {'reached' if reserved <= GOAL_GB else 'missed'} ({reserved:.2f})")
    if USUAL in summary["ratios"]:
        ratio = float(np.median(summary["ratios"][USUAL]["tokens_per_second"]))
        print(f"  goal: {GOAL_RATIO:.0f}x the usual: {'reached' if ratio >= GOAL_RATIO else 'missed'} ({ratio:.2f}x)")


def measure_load(args: argparse.Namespace, base: Turn, scratch: Path) -> None:
    """Four layers from disk first: the two do not lie on the disk together."""
    report: Result = {}
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        num_bytes = write_model(folder, SHAPES[args.shape], layers=min(args.layers, DISK_LAYERS), device=args.device)
        largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
        report |= {"disk_gb": num_bytes / 1e9, "largest_shard_gb": largest / 1e9}
        print(f"from disk, {min(args.layers, DISK_LAYERS)} layers, {report['disk_gb']:.2f} GB in bfloat16, "
              f"the largest shard {report['largest_shard_gb']:.2f}")  # fmt: skip
        turn = replace(base, folder=name, from_disk=True)
        report["from disk"] = _starts(args, turn, folder / "cache")
        if USUAL in args.only:
            report["from disk"] |= _loads("usual from_pretrained", USUAL, turn, folder, args.repeats)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        print(f"{args.layers} layers, random matrices made on the device")
        report["made on the device"] = _starts(args, base, Path(name))
    save(args, "load", report)


def _starts(args: argparse.Namespace, turn: Turn, cache: Path) -> Result:
    """Packing; packing and keeping; from what was kept."""
    keeping = replace(turn, cache=True)
    found = _loads("packing", OURS, turn, cache, args.repeats)
    found |= _loads("packing and keeping", OURS, keeping, cache, 1)
    if not list((cache / "nf4").glob("*/manifest.json")):
        print("  the second start      not measured: the packed weights were not kept (no room?)")
        return found
    return found | _loads("the second start", OURS, keeping, cache, args.repeats)


def _loads(title: str, tool: str, turn: Turn, cache: Path, repeats: int) -> Result:
    runs = [run_turn(tool, turn, cache=cache) for _ in range(repeats)]
    if any("load" not in run for run in runs):
        print(f"  {title:<22} does not fit", flush=True)
        return {title: {"turns": runs}}
    median = medians([run["load"] for run in runs], LOAD_FIGURES)
    print(
        f"  {title:<22}{median['seconds']:>8.2f} s   device {median['device_peak_gb']:>6.2f} GB at most, "
        f"host {median['host_before_gb']:.2f} before and {median['host_peak_gb']:.2f} GB at most",
        flush=True,
    )
    return {title: {"median": median, "turns": runs}}


def save(args: argparse.Namespace, name: str, report: Result) -> None:
    """After each part, so that a run that is cut short leaves what it has; a part measured again replaces the old."""
    if args.tiny:
        return
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    sizes = {name: getattr(args, name) for name in ("shape", "layers", "rows", "steps", "repeats", "limit_gb")}
    known[name] = machine(args.device) | sizes | report
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(known, indent=1) + "\n")


PARTS = {"load": measure_load, "steps": measure_steps}


def show_census(shape: str) -> None:
    from backends.cuda.streaming import planned_weights
    from benchmarks.mixtral_census import naive_weights, shape_without_weights, table

    base = shape_without_weights(SHAPES[shape])
    print(table(planned_weights(base), naive_weights(base)))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--census", action="store_true", help="print where the bytes are, and nothing else")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", choices=TOOLS, help="tools; default: those that are installed")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="tokens in a batch's longest row")
    parser.add_argument("--targets", nargs="+", choices=("attention", "experts"), default=["attention", "experts"])
    parser.add_argument("--frozen", type=float, nargs="+", default=[0.0, 0.5], help="first part of the layers frozen")
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--layers", type=int, help="so many layers instead of the shape's")
    parser.add_argument("--rows", type=int, default=1, help="rows in a batch")
    parser.add_argument("--steps", type=int, default=10, help="timed steps at each number of tokens")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each tool")
    parser.add_argument("--limit-gb", type=float, help="let a process have no more of the GPU than this")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, two steps: to see that this file works")
    parser.add_argument("--output", type=Path, default=RESULT, help="default: %(default)s")
    parser.add_argument("--turn", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.limit_gb is not None and args.device == "cpu":
        parser.error("--limit-gb is for a GPU")
    if args.tiny:
        args.shape, args.tokens, args.steps, args.repeats = "tiny", [16, 48], 2, 1
    args.only = args.only or installed_tools()
    args.layers = args.layers or SHAPES[args.shape]["num_hidden_layers"]
    return args


def main() -> None:
    args = parse()
    if args.turn:
        tool, turn = args.turn[0], json.loads(args.turn[1])
        print(json.dumps(take_turn(tool, Turn(**turn | {"widths": tuple(turn["widths"])}))))
        return
    if args.census:
        show_census(args.shape)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        write_config(folder, SHAPES[args.shape], layers=args.layers)
        base = Turn(str(folder), args.device, rows=args.rows, steps=args.steps, limit_gb=args.limit_gb)
        for part in args.parts:
            PARTS[part](args, base, Path(name))


if __name__ == "__main__":
    main()
