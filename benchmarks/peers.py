"""Training speed side by side with mlx_lm.lora and with TRL, on this machine's CPU.

    pip install trl
    python benchmarks/peers.py [--rows 32] [--repeats 3]

Every tool trains the same adapter (rank 8 on q k v o) on SmolLM2-135M-Instruct in float32 with the same rows of the
shipped expert questions, batches of 4, one epoch, the loss on the answers only. The clock runs over the training steps:
not over loading, tokenising or evaluating. Processor seconds are counted, since on a shared machine wall-clock seconds
measure the neighbours too; both are written down. The tools take turns, and the figure to quote is the ratio, turn by
turn. MLX's tools both get the fast BLAS loaded first.
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
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_LAYERS, BATCH_SIZE, MAX_TOKENS, LR = 30, 4, 256, 1e-4
KEYS = [f"self_attn.{name}_proj" for name in "qkvo"]


def model_folder() -> str:
    from core.models import resolve_model

    found = resolve_model(MODEL, revision=None, backend="cuda", bits=16, memory_bytes=1 << 34, accelerator=False)
    return str(found.path)


Seconds = tuple[float, float]
"""Wall-clock and processor seconds of the steps of one epoch."""


def timed(action: Callable[[], object]) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - processor


def ours(backend: str, data: Path, num_frozen: int) -> Seconds:
    from core.settings import resolve
    from core.workflow.job import prepare

    sets = [
        f"model.path={MODEL}",
        "model.bits=16",
        f"data.path={data / 'all.jsonl'}",
        f"data.max_tokens={MAX_TOKENS}",
        "data.validation=0.01",
        "lora.rank=8",
        "lora.alpha=16",
        "lora.dropout=0",
        f"lora.frozen_fraction={num_frozen / NUM_LAYERS}",
        f"train.batch_size={BATCH_SIZE}",
        "train.accumulation=1",
        f"backend={backend}",
        "device=cpu",
    ]
    job = prepare(resolve(assignments=sets).config, choose_bits=False)
    learner = job.backend.open(job.config, job.model, job.adapter)

    def epoch() -> None:
        for step, batch in enumerate(job.data.epoch(0), start=1):
            output = learner.train_step([batch], step=step, lr=LR)
        float(output.loss)

    return timed(epoch)


def mlx_lm_lora(data: Path, num_frozen: int) -> Seconds:
    from backends.mlx.blas import preload_blas

    preload_blas()
    from mlx_lm import lora

    num_rows = len((data / "train.jsonl").read_text().splitlines())
    config = {
        "model": model_folder(),
        "train": True,
        "data": str(data),
        "batch_size": BATCH_SIZE,
        "iters": num_rows // BATCH_SIZE,
        "num_layers": NUM_LAYERS - num_frozen,
        "mask_prompt": True,
        "steps_per_report": num_rows // BATCH_SIZE,
        "steps_per_eval": 10**6,
        "val_batches": 1,
        "max_seq_length": MAX_TOKENS,
        "learning_rate": LR,
        "optimizer": "adamw",
        "adapter_path": str(data / "adapters"),
        "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": KEYS},
        "save_every": 10**6,
    }
    from types import SimpleNamespace

    import mlx.core as mx
    from mlx_lm.tuner import trainer

    # the folder has float16 weights, which MLX on a CPU multiplies some thirty times slower than float32
    load, train = lora.load, lora.train

    def load_float32(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        loaded[0].set_dtype(mx.float32)
        return loaded

    seconds: list[Seconds] = []
    lora.load = load_float32
    lora.train = lambda *args, **kwargs: seconds.append(timed(lambda: train(*args, **kwargs)))
    trainer.evaluate = lambda *args, **kwargs: 0.0
    lora.run(SimpleNamespace(**(lora.CONFIG_DEFAULTS | config)))
    return seconds[0]


def trl(data: Path, num_frozen: int) -> Seconds:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = model_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = load_dataset("json", data_files=str(data / "train.jsonl"), split="train")
    rows = rows.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
    )
    settings = SFTConfig(
        output_dir=str(data / "trl"),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        learning_rate=LR,
        max_length=MAX_TOKENS,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
    )
    layers = None if num_frozen == 0 else list(range(num_frozen, NUM_LAYERS))
    adapter = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=[key.rsplit(".", 1)[-1] for key in KEYS],
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model,
        args=settings,
        train_dataset=rows,
        peft_config=adapter,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    return timed(trainer.train)


TOOLS: dict[str, Callable[[Path, int], Seconds]] = {
    "twinkeel mlx": lambda data, frozen: ours("mlx", data, frozen),
    "mlx_lm.lora": mlx_lm_lora,
    "twinkeel cuda": lambda data, frozen: ours("cuda", data, frozen),
    "trl": trl,
}
PAIRS = (("twinkeel mlx", "mlx_lm.lora"), ("twinkeel cuda", "trl"))


def write_data(folder: Path, num_rows: int) -> None:
    lines = (ROOT / "data/samples/expert.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:num_rows]))
    (folder / "valid.jsonl").write_text("".join(lines[-4:]))
    # ours cuts one validation row off
    (folder / "all.jsonl").write_text("".join(lines[: num_rows + 1]))


def measure(tool: str, data: Path, num_frozen: int) -> Seconds:
    """Seconds of one turn, in a process of its own."""
    command = [sys.executable, __file__, "--turn", tool, "--data", str(data), "--frozen", str(num_frozen)]
    ran = subprocess.run(
        command,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    wall, processor = json.loads(ran.stdout.strip().splitlines()[-1])
    return wall, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turn", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--frozen", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        print(json.dumps(TOOLS[args.turn](args.data, args.frozen)))
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name), args.rows)
        for num_frozen in (0, NUM_LAYERS // 2):
            for mine, peer in PAIRS:
                turns = [(measure(mine, Path(name), num_frozen), measure(peer, Path(name), num_frozen))
                         for _ in range(args.repeats)]  # fmt: skip
                ratios = [theirs[1] / own[1] for own, theirs in turns]
                results.append(
                    {
                        "frozen_layers": num_frozen,
                        "tool": mine,
                        "peer": peer,
                        "wall_and_processor_seconds": turns,
                        "speedup_median": statistics.median(ratios),
                        "speedups": ratios,
                    }
                )
                print(f"{num_frozen} of {NUM_LAYERS} layers frozen: {mine} is {statistics.median(ratios):.2f}x {peer} "
                      f"({min(ratios):.2f} to {max(ratios):.2f}, {args.repeats} turns)", flush=True)  # fmt: skip
    packages = {name: version(name) for name in ("mlx", "mlx-lm", "torch", "transformers", "peft", "trl")}
    record = {
        "date": str(date.today()),
        "device": f"CPU, {os.cpu_count()} cores",
        "rows": args.rows,
        "versions": packages,
    }
    (ROOT / "benchmarks/results").mkdir(exist_ok=True)
    (ROOT / "benchmarks/results/peers.json").write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
