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
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULT = ROOT / "benchmarks/results/gpu_step.json"

LR, MAX_GRAD_NORM, BETAS = 1e-4, 1.0, (0.9, 0.999)
WARM_UP = 3
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


def write_model(folder: Path, shape: dict[str, Any], *, layers: int | None, device: str) -> int:
    """A folder in Hugging Face layout with random weights, one shard in memory at a time. Returns its bytes."""
    import torch

    config = {
        **shape,
        "architectures": [f"{shape['model_type'].capitalize()}ForCausalLM"],
        "num_hidden_layers": layers or shape["num_hidden_layers"],
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "sliding_window": None,  # mistral's default is 4096
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    place = torch.device("cuda" if device == "gpu" else "cpu")
    random = torch.Generator(place).manual_seed(0)
    shards = [_outer_shapes(config), *(_layer_shapes(config, layer) for layer in range(config["num_hidden_layers"]))]
    where: dict[str, str] = {}
    total = 0
    for index, shapes in enumerate(shards, start=1):
        name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(folder / name, shapes, random)
        where |= dict.fromkeys(shapes, name)
    index_file = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return total


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], random: Any) -> int:
    import torch
    from safetensors.torch import save_file

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:  # the norms
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=random, device=random.device).mul_(0.02).to(torch.bfloat16).cpu()

    tensors = {name: draw(shape) for name, shape in shapes.items()}
    save_file(tensors, path, {"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _outer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    table = (config["vocab_size"], config["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "model.norm.weight": table[1:]}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": table}


def _layer_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    query, key_value = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def make_batches(turn: Turn, vocab_size: int) -> list[Any]:
    """One `Batch` a step: rows of half the width to the whole, with the loss on the second half of each."""
    from core.protocols import IGNORE, Batch

    random = np.random.default_rng(0)
    batches = []
    for _ in range(WARM_UP + turn.steps):
        inputs = random.integers(3, vocab_size, (turn.rows, turn.width), dtype=np.int32)
        targets = np.full_like(inputs, IGNORE)
        lengths = random.integers(turn.width // 2, turn.width + 1, turn.rows)
        lengths[0] = turn.width
        for row, length in enumerate(lengths):
            inputs[row, length:] = 0
            targets[row, length // 2 : length - 1] = inputs[row, length // 2 + 1 : length]
        batches.append(Batch(np.arange(turn.rows), inputs, targets))
    return batches


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


def load_ours(turn: Turn) -> Callable[[int, Any], Any]:
    import backends
    from core.models import ResolvedModel

    folder = Path(turn.folder)
    model = ResolvedModel(path=folder, name="random weights", revision=None, source="folder", note="", parameters=0)
    learner = backends.get("cuda").open(configuration(turn), model, first_adapter(turn))
    return lambda step, batch: learner.train_step([batch], step=step, lr=LR).loss


def load_peer(turn: Turn) -> Callable[[int, Any], Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.utils import logging

    from core.architecture import read_architecture

    logging.disable_progress_bar()
    base = _peer_base(turn)
    if read_architecture(Path(turn.folder)).num_parameters >= 1e9:
        # transformers 5.23 renamed it
        new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
        getattr(base, new if hasattr(base, new) else old)({"use_reentrant": False})
    keys = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(
        base, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=keys, task_type="CAUSAL_LM")
    )
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, array in first_adapter(turn).tensors.items():
            trained[f"base_model.model.{name}.default.weight"].copy_(torch.from_numpy(array.copy()))
    parameters = list(trained.values())
    on_gpu = turn.device == "gpu"
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, weight_decay=0.0, fused=on_gpu or None)

    def step(_: int, batch: Any) -> Any:
        inputs, labels, mask = (tensor.to(base.device) for tensor in as_rows(batch))
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=on_gpu):
            loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _peer_base(turn: Turn) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    on_gpu = turn.device == "gpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": "cuda:0" if on_gpu else "cpu"}}
    if turn.bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(turn.folder, attn_implementation="sdpa", **options)


def as_rows(batch: Any) -> tuple[Any, Any, Any]:
    """Token ids, labels in the same place as their tokens (transformers shifts them itself), attention mask."""
    import torch

    labels = np.full(batch.targets.shape, -100, np.int64)
    labels[:, 1:] = batch.targets[:, :-1]
    inputs = batch.inputs.astype(np.int64)
    return torch.from_numpy(inputs), torch.from_numpy(labels), torch.from_numpy((inputs != 0).astype(np.int64))


TOOLS: dict[str, Callable[[Turn], Callable[[int, Any], Any]]] = {"twinkeel": load_ours, "peft": load_peer}


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

    def wait() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    batches = make_batches(turn, read_architecture(Path(turn.folder)).vocab_size)
    began = wait()
    step = TOOLS[tool](turn)
    load_seconds = wait() - began
    load_peak = memory_stats(device).peak_bytes
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses = [step(number, batch) for number, batch in enumerate(batches[:WARM_UP], start=1)]
    began = wait()
    losses += [step(number, batch) for number, batch in enumerate(batches[WARM_UP:], start=WARM_UP + 1)]
    seconds = wait() - began
    tokens = sum(int(np.count_nonzero(batch.inputs)) for batch in batches[WARM_UP:])
    return {
        "tokens_per_second": tokens / seconds,
        "load_seconds": load_seconds,
        "load_peak_gb": load_peak / 1e9,
        "step_peak_gb": memory_stats(device).peak_bytes / 1e9,
        "losses": [float(loss) for loss in losses],
    }


def in_new_process(tool: str, turn: Turn) -> dict[str, Any]:
    command = [sys.executable, __file__, "--turn", tool, json.dumps(vars(turn))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return dict(json.loads(ran.stdout.strip().splitlines()[-1]))


FIGURES = ("tokens_per_second", "load_seconds", "load_peak_gb", "step_peak_gb")


def compare(turn: Turn, repeats: int) -> dict[str, Any]:
    """Alternating turns: each tool's figures with their medians, and the median of the ratios ours / peer."""
    turns: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
    for repeat in range(repeats):
        # the first one changes, so that neither always finds what the other left behind
        for tool in list(TOOLS) if repeat % 2 == 0 else reversed(TOOLS):
            turns[tool].append(in_new_process(tool, turn))
    pairs = list(zip(*turns.values(), strict=True))
    difference = max(float(np.max(np.abs(np.divide(mine["losses"], theirs["losses"]) - 1.0))) for mine, theirs in pairs)
    assert difference < MAX_LOSS_DIFFERENCE, f"the tools' losses differ by {difference:.3g}: not the same training"
    ratios = {f: [mine[f] / theirs[f] for mine, theirs in pairs] for f in FIGURES}
    return {
        "bits": turn.bits,
        "ratio_median": {f: statistics.median(values) for f, values in ratios.items()},
        "ratios": ratios,
        "median": {t: {f: statistics.median(one[f] for one in runs) for f in FIGURES} for t, runs in turns.items()},
        "turns": turns,
        "largest_loss_difference": difference,
    }


def show(result: dict[str, Any]) -> None:
    for figure in FIGURES:
        mine, theirs = (medians[figure] for medians in result["median"].values())
        low, high = min(result["ratios"][figure]), max(result["ratios"][figure])
        print(
            f"{result['bits']:>2} bits  {figure:<18} {mine:>10.4g} ours {theirs:>10.4g} peer   "
            f"ratio {result['ratio_median'][figure]:.3f} ({low:.3f} to {high:.3f})",
            flush=True,
        )
    print(f"{result['bits']:>2} bits  losses agree within {result['largest_loss_difference']:.1e}", flush=True)


def facts(args: argparse.Namespace, *, model_bytes: int) -> dict[str, Any]:
    from backends.cuda.backend import installed_packages
    from backends.cuda.memory import choose_device, device_name

    return {
        "date": str(date.today()),
        "device": device_name(choose_device(args.device)),
        "versions": installed_packages(),
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
