"""Training speed, memory and load time beside a plain PEFT + transformers loop, at full size, without a model hub.

    python benchmarks/gpu_step.py [--shape mistral-7b] [--layers N] [--bits 4 16] [--repeats 3]
    python benchmarks/gpu_step.py --tiny --device cpu      # does it run? no figures, writes nothing

The model has a real model's shape and random bfloat16 weights, written to a temporary folder (14.5 GB for mistral-7b;
TMPDIR says where), one shard a layer: what is measured depends on shapes, not on what the weights say. Both tools train
the same adapter (rank 16 on q k v o, no dropout, AdamW, clipping) from the same values on the same batches, with the
loss on the second half of each row, and both with gradient checkpointing from 1 billion parameters on. The peer is the
usual loop: `AutoModelForCausalLM` with "sdpa" attention and an attention mask, `get_peft_model`, bfloat16 autocast,
fused `torch.optim.AdamW`, `model(..., labels=...).loss`.

Every turn is a process of its own; the tools take turns, and the ratios are of neighbouring turns. Load time is from
the folder, which the system still has in memory, to a model with its adapter on the device; imports and the start of
CUDA are not in it. The two tools' losses must agree, or there is no result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    BETAS,
    LR,
    MAX_GRAD_NORM,
    RESULTS,
    WARM_UP,
    Step,
    alternate,
    in_new_process,
    loss_difference,
    machine,
    make_batches,
    medians,
    now,
    ratios,
    usual_checkpointing,
    usual_load_options,
    usual_step,
    write_model,
)

RESULT = RESULTS / "gpu_step.json"
MAX_LOSS_DIFFERENCE = 0.02
"""Relative, of any step: both compute in bfloat16, in another order."""

_FIELDS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "vocab_size", "rope_theta", "tie_word_embeddings")  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    name: dict(zip(_FIELDS, values, strict=True))
    for name, values in {
        "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 32768, 1e6, False),
        "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 49152, 1e5, True),
        "tiny": ("llama", 64, 128, 2, 4, 2, 320, 1e4, False),
    }.items()
}


@dataclass(frozen=True)
class Turn:
    """What a turn is told: `device` is `gpu` or `cpu`, `rows` are those of a batch."""

    folder: str
    device: str
    bits: int
    rows: int
    width: int
    steps: int


# --- the tools: each loads the model, and gives a step from a batch to its loss ---------------------------------------


def configuration(turn: Turn) -> Any:
    from core.config import RunConfig

    return RunConfig.model_validate(
        {
            "device": turn.device,
            "model": {"bits": turn.bits},
            "lora": {"rank": 16, "alpha": 32, "dropout": 0.0},
            "optim": {"lr": LR, "weight_decay": 0.0, "betas": BETAS, "max_grad_norm": MAX_GRAD_NORM},
        }
    )


def first_adapter(turn: Turn) -> Any:
    from core.adapter import plan_adapter
    from core.architecture import read_architecture

    return plan_adapter(configuration(turn).lora, read_architecture(Path(turn.folder)), seed=0)


def load_ours(turn: Turn) -> Step:
    import backends
    from core.models import ResolvedModel

    folder = Path(turn.folder)
    model = ResolvedModel(path=folder, name="random weights", revision=None, source="folder", note="", parameters=0)
    learner = backends.get("cuda").open(configuration(turn), model, first_adapter(turn))
    return lambda step, batch: learner.train_step([batch], step=step, lr=LR).loss


def load_peer(turn: Turn) -> Step:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from core.architecture import read_architecture

    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(turn.folder, **usual_load_options(device=turn.device, bits=turn.bits))
    if read_architecture(Path(turn.folder)).num_parameters >= 1e9:
        usual_checkpointing(base)
    keys = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(
        base, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=keys, task_type="CAUSAL_LM")
    )
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, array in first_adapter(turn).tensors.items():
            trained[f"base_model.model.{name}.default.weight"].copy_(torch.from_numpy(array.copy()))
    return usual_step(model, on_gpu=turn.device == "gpu")


TOOLS: dict[str, Callable[[Turn], Step]] = {"twinkeel": load_ours, "peft": load_peer}


# --- one turn, in a process of its own --------------------------------------------------------------------------------


def take_turn(tool: str, turn: Turn) -> dict[str, Any]:
    """Loads, warms up, measures."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from backends.cuda.memory import choose_device, memory_stats
    from core.architecture import read_architecture

    device = choose_device(turn.device)
    torch.zeros(1, device=device)
    on_gpu = device.type == "cuda"

    vocab_size = read_architecture(Path(turn.folder)).vocab_size
    batches = make_batches(rows=turn.rows, width=turn.width, count=WARM_UP + turn.steps, vocab_size=vocab_size)
    began = now(device)
    step = TOOLS[tool](turn)
    load_seconds = now(device) - began
    load_peak = memory_stats(device).peak_bytes
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses = [step(number, batch) for number, batch in enumerate(batches[:WARM_UP], start=1)]
    began = now(device)
    losses += [step(number, batch) for number, batch in enumerate(batches[WARM_UP:], start=WARM_UP + 1)]
    seconds = now(device) - began
    tokens = sum(int(np.count_nonzero(batch.inputs)) for batch in batches[WARM_UP:])
    return {
        "tokens_per_second": tokens / seconds,
        "load_seconds": load_seconds,
        "load_peak_gb": load_peak / 1e9,
        "step_peak_gb": memory_stats(device).peak_bytes / 1e9,
        "losses": [float(loss) for loss in losses],
    }


FIGURES = ("tokens_per_second", "load_seconds", "load_peak_gb", "step_peak_gb")


def compare(turn: Turn, repeats: int) -> dict[str, Any]:
    """Alternating turns: each tool's figures with their medians, and the median of the ratios ours / peer."""
    turns = alternate(list(TOOLS), repeats, lambda tool: in_new_process(__file__, [tool, json.dumps(vars(turn))]))
    mine, theirs = turns.values()
    difference = loss_difference(mine, theirs)
    assert difference < MAX_LOSS_DIFFERENCE, f"the tools' losses differ by {difference:.3g}: not the same training"
    found = ratios(mine, theirs, FIGURES)
    return {
        "bits": turn.bits,
        "ratio_median": {f: statistics.median(values) for f, values in found.items()},
        "ratios": found,
        "median": {tool: medians(runs, FIGURES) for tool, runs in turns.items()},
        "turns": turns,
        "largest_loss_difference": difference,
    }


def show(result: dict[str, Any]) -> None:
    for figure in FIGURES:
        mine, theirs = (of_tool[figure] for of_tool in result["median"].values())
        low, high = min(result["ratios"][figure]), max(result["ratios"][figure])
        print(
            f"{result['bits']:>2} bits  {figure:<18} {mine:>10.4g} ours {theirs:>10.4g} peer   "
            f"ratio {result['ratio_median'][figure]:.3f} ({low:.3f} to {high:.3f})",
            flush=True,
        )
    print(f"{result['bits']:>2} bits  losses agree within {result['largest_loss_difference']:.1e}", flush=True)


def facts(args: argparse.Namespace, *, model_bytes: int) -> dict[str, Any]:
    return machine(args.device) | {
        "shape": args.shape,
        "layers": args.layers or SHAPES[args.shape]["num_hidden_layers"],
        "model_gb": model_bytes / 1e9,
        "batch": [args.rows, args.width],
        "steps": args.steps,
        "repeats": args.repeats,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--layers", type=int, help="so many layers instead of the shape's")
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 16), default=[4, 16])
    parser.add_argument("--rows", type=int, default=4, help="rows in a batch")
    parser.add_argument("--width", type=int, default=512, help="tokens in the longest row")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each tool")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, two steps: to see that this file works")
    parser.add_argument("--output", type=Path, default=RESULT, help="default: %(default)s")
    parser.add_argument("--turn", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.rows, args.width, args.steps, args.repeats = "tiny", 2, 32, 2, 1
    return args


def main() -> None:
    args = parse()
    if args.turn:
        print(json.dumps(take_turn(args.turn[0], Turn(**json.loads(args.turn[1])))))
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        model_bytes = write_model(Path(name), SHAPES[args.shape], layers=args.layers, device=args.device)
        print(f"{model_bytes / 1e9:.2f} GB written in {time.perf_counter() - began:.0f} s", flush=True)
        record = facts(args, model_bytes=model_bytes)
        for bits in args.bits:
            turn = Turn(name, args.device, bits, args.rows, args.width, args.steps)
            results.append(compare(turn, args.repeats))
            show(results[-1])
            if not args.tiny:  # after each, so that a run that is cut short leaves what it has
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
