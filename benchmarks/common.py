"""What the benchmarks share: random weights on disk, batches, the usual loop, turns, figures.

Every turn is a process of its own; the tools take turns, and ratios are of neighbouring turns.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"

PACKAGES = (
    "mlx",
    "mlx-lm",
    "mkl",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "liger-kernel",
)
"""Whose versions stand in a file of results."""

LR, MAX_GRAD_NORM, BETAS = 1e-4, 1.0, (0.9, 0.999)
WARM_UP = 3
"""Steps of a turn before the clock starts."""

Step = Callable[[int, Any], Any]
"""A tool's step, counted from 1, on a `Batch`; gives the loss, on the device if it likes."""
Result = dict[str, Any]


# --- random weights on disk -------------------------------------------------------------------------------------------


def write_model(folder: Path, shape: Mapping[str, Any], *, layers: int | None, device: str) -> int:
    """A folder in Hugging Face layout with random bfloat16 weights, one shard a layer and in memory. Returns its bytes.

    The numbers are drawn on `device` (`gpu` or `cpu`), which is what takes the time.
    """
    import torch

    config = write_config(folder, shape, layers=layers)
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


def write_config(folder: Path, shape: Mapping[str, Any], *, layers: int | None = None) -> dict[str, Any]:
    """The `config.json` of a shape; returns what is in it."""
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
    return config


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], random: Any) -> int:
    import torch
    from safetensors.torch import save_file

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:  # the norms
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=random, device=random.device).mul_(0.02).to(torch.bfloat16).cpu()

    tensors = {name: draw(shape) for name, shape in shapes.items()}
    save_file(tensors, path, {"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _outer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    table = (config["vocab_size"], config["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "model.norm.weight": table[1:]}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": table}


def _layer_shapes(config: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    query, key_value = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        **_mlp_shapes(config),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def _mlp_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """A dense MLP, or a mixture's router and experts in the names of Mixtral's checkpoints."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden)}
    shapes["down_proj"] = (hidden, wide)
    if "num_local_experts" not in config:
        return {f"mlp.{name}": shape for name, shape in shapes.items()}
    letters = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return {"block_sparse_moe.gate": (config["num_local_experts"], hidden)} | {
        f"block_sparse_moe.experts.{expert}.{letters[name]}": shape
        for expert in range(config["num_local_experts"])
        for name, shape in shapes.items()
    }


# --- batches ----------------------------------------------------------------------------------------------------------


def make_batches(*, rows: int, width: int, count: int, vocab_size: int) -> list[Any]:
    """`count` batches: the first row as wide as the batch, the others half to all of it; loss on each second half."""
    from core.protocols import IGNORE, Batch

    random = np.random.default_rng(0)
    batches = []
    for _ in range(count):
        inputs = random.integers(3, vocab_size, (rows, width), dtype=np.int32)
        targets = np.full_like(inputs, IGNORE)
        lengths = random.integers(width // 2, width + 1, rows)
        lengths[0] = width
        for row, length in enumerate(lengths):
            inputs[row, length:] = 0
            targets[row, length // 2 : length - 1] = inputs[row, length // 2 + 1 : length]
        batches.append(Batch(np.arange(rows), inputs, targets))
    return batches


def as_rows(batch: Any) -> tuple[Any, Any, Any]:
    """Token ids, labels in the same place as their tokens (transformers shifts them itself), attention mask."""
    import torch

    labels = np.full(batch.targets.shape, -100, np.int64)
    labels[:, 1:] = batch.targets[:, :-1]
    inputs = batch.inputs.astype(np.int64)
    return torch.from_numpy(inputs), torch.from_numpy(labels), torch.from_numpy((inputs != 0).astype(np.int64))


# --- the usual way ----------------------------------------------------------------------------------------------------


def usual_load_options(*, device: str, bits: int) -> dict[str, Any]:
    """What scripts give `from_pretrained`: "sdpa" attention, and for 4 bits a `BitsAndBytesConfig`."""
    import torch
    from transformers import BitsAndBytesConfig

    on_gpu = device == "gpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": "cuda:0" if on_gpu else "cpu"}}
    if bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return options | {"attn_implementation": "sdpa"}


def usual_checkpointing(base: Any) -> None:
    # transformers 5.23 renamed it
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(base, new if hasattr(base, new) else old)({"use_reentrant": False})


def usual_step(model: Any, *, on_gpu: bool) -> Step:
    """What the Trainer does in a step: autocast to bfloat16, `model(..., labels=...).loss`, clipping, fused AdamW."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, weight_decay=0.0, fused=on_gpu or None)

    def step(_: int, batch: Any) -> Any:
        inputs, labels, mask = (tensor.to(parameters[0].device) for tensor in as_rows(batch))
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=on_gpu):
            loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# --- turns ------------------------------------------------------------------------------------------------------------


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


class TurnError(RuntimeError):
    """The end of what a turn wrote to stderr."""


def in_new_process(script: str, turn: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Result:
    """The JSON in the last line that `script --turn …` prints, and under `process` what the process took: its
    wall-clock and its processor seconds, from its start to its end.

    Raises: TurnError: it ended with an error.
    """
    variables = os.environ | {"HF_HUB_OFFLINE": "1"} | dict(environment or {})
    command = [sys.executable, script, "--turn", *turn]
    began, used = time.perf_counter(), children_seconds()
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    process = {"wall_seconds": time.perf_counter() - began, "processor_seconds": children_seconds() - used}
    if ran.returncode:
        raise TurnError(ran.stderr[-4000:])
    return {**json.loads(ran.stdout.strip().splitlines()[-1]), "process": process}


def children_seconds() -> float:
    """Processor seconds of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def peak_resident_bytes() -> int:
    """The most that this process has had resident, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak outlives exec: it may be that of the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def alternate(tools: Sequence[str], repeats: int, run: Callable[[str], Result]) -> dict[str, list[Result]]:
    """Each tool's turns; the first one changes, so that neither always finds what the other left behind."""
    turns: dict[str, list[Result]] = {tool: [] for tool in tools}
    for repeat in range(repeats):
        for tool in tools if repeat % 2 == 0 else reversed(tools):
            turns[tool].append(run(tool))
    return turns


def medians(runs: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> dict[str, float]:
    return {figure: statistics.median(one[figure] for one in runs) for figure in figures}


def ratios(mine: Sequence[Result], theirs: Sequence[Result], figures: Sequence[str]) -> dict[str, list[float]]:
    """Ours / theirs of neighbouring turns."""
    pairs = list(zip(mine, theirs, strict=True))
    return {figure: [ours[figure] / other[figure] for ours, other in pairs] for figure in figures}


def loss_difference(mine: Sequence[Result], theirs: Sequence[Result]) -> float:
    """The largest relative difference of two tools' losses, of any step."""
    pairs = zip(mine, theirs, strict=True)
    return max(float(np.max(np.abs(np.divide(one["losses"], other["losses"]) - 1.0))) for one, other in pairs)


def machine(device: str) -> Result:
    """Date, device, versions."""
    from backends.cuda.backend import installed_packages
    from backends.cuda.memory import choose_device, device_name

    return {
        "date": str(date.today()),
        "device": device_name(choose_device(device)),
        "versions": installed_packages(),
    }


def facts(backend: str, device: str, *, script: str, arguments: Sequence[str] | None) -> Result:
    """Date, device as a backend names it, versions of what is installed, and what was typed; None: `sys.argv`."""
    import backends

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": str(date.today()),
        "device": backends.get(backend).probe(device).device,
        "python": sys.version.split()[0],
        "versions": versions,
        "command": command_line(script, sys.argv[1:] if arguments is None else arguments),
    }


def model_folder(model: str, backend: str, *, bits: int) -> Path:
    """Folder of a hub id or a path, downloaded if need be."""
    from core.models import resolve_model

    return resolve_model(model, revision=None, backend=backend, bits=bits, memory_bytes=1 << 40, accelerator=False).path


def command_line(script: str, arguments: Sequence[str]) -> str:
    """What was typed, for a file of results: without the folders of this machine."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return " ".join(["python", f"benchmarks/{script}", *words])


def save_part(path: Path, name: str, report: Result) -> None:
    """Puts a part into a file of results; a part that was measured before is replaced, the others stay."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = report
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")
