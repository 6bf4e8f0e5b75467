"""The tools that `peers.py` compares: each makes a whole run, from its model folder to a saved adapter.

Each gives back how long its parts took, and leaves its last adapter under the turn's folder; `judge` evaluates that.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import Result
from benchmarks.watched import GUARD_OFF, num_evaluations, peaks, since_start, timed, watched_train

if TYPE_CHECKING:
    from core.workflow.job import Job

RANK, ALPHA, LR, WEIGHT_DECAY = 8, 16, 1e-4, 0.01
KEYS = ("q_proj", "k_proj", "v_proj", "o_proj")
CHECKPOINTING_FROM = 1e9
"""Parameters from which all tools recompute activations, as ours does by itself."""


@dataclass(frozen=True)
class Turn:
    """What a process is told."""

    model: str
    """Folder in Hugging Face layout."""
    data: str
    """Folder with train.jsonl and valid.jsonl."""
    output: str
    """Folder of this turn."""
    device: str
    """`cpu` or `gpu`."""
    bits: int
    num_rows: int
    batch_size: int
    epochs: int
    eval_every: int
    max_tokens: int
    num_layers: int
    num_frozen: int
    is_large: bool
    """Whether activations are recomputed."""
    dropout: float = 0.0
    sets: tuple[str, ...] = ()
    """More settings of ours."""

    @property
    def steps(self) -> int:
        return self.epochs * self.num_rows // self.batch_size

    @property
    def on_gpu(self) -> bool:
        return self.device == "gpu"


# --- ours -------------------------------------------------------------------------------------------------------------


def our_settings(turn: Turn) -> list[str]:
    """What differs from the tool's defaults."""
    num_val_rows = len((Path(turn.data) / "valid.jsonl").read_text().splitlines())
    return [
        f"device={turn.device}",
        f"model.path={turn.model}",
        f"model.bits={turn.bits}",
        f"data.path={turn.data}",
        f"data.max_tokens={turn.max_tokens}",
        f"lora.rank={RANK}",
        f"lora.alpha={ALPHA}",
        f"lora.dropout={turn.dropout}",
        f"lora.frozen_fraction={turn.num_frozen / turn.num_layers}",
        f"optim.lr={LR}",
        f"optim.weight_decay={WEIGHT_DECAY}",
        f"train.batch_size={turn.batch_size}",
        "train.accumulation=1",
        f"train.epochs={turn.epochs}",
        f"eval.every={turn.eval_every}",
        f"eval.probe_rows={num_val_rows}",
        *GUARD_OFF,
        *turn.sets,
    ]


def run_ours(turn: Turn, backend: str) -> Result:
    run = Path(turn.output) / "run"
    return watched_train(our_settings(turn), backend=backend, run=run) | {"adapter": str(run)}


# --- mlx_lm.lora ------------------------------------------------------------------------------------------------------


def mlx_lm_settings(turn: Turn) -> dict[str, Any]:
    """Its configuration file, as a dictionary."""
    return {
        "model": turn.model,
        "train": True,
        "data": turn.data,
        "batch_size": turn.batch_size,
        "iters": turn.steps,
        "num_layers": turn.num_layers - turn.num_frozen,
        "mask_prompt": True,
        "steps_per_report": 10,
        "steps_per_eval": turn.eval_every,
        "val_batches": -1,
        "max_seq_length": turn.max_tokens,
        "learning_rate": LR,
        "optimizer": "adamw",
        "optimizer_config": {"adamw": {"bias_correction": True, "weight_decay": WEIGHT_DECAY}},
        "adapter_path": str(Path(turn.output) / "adapters"),
        "lora_parameters": {
            "rank": RANK,
            "scale": ALPHA / RANK,
            "dropout": turn.dropout,
            "keys": [f"self_attn.{key}" for key in KEYS],
        },
        "grad_checkpoint": turn.is_large,
        "save_every": 10**6,
    }


def run_mlx_lm(turn: Turn) -> Result:
    """`mlx_lm.lora` with its own loop, batches and evaluation."""
    from backends.mlx.blas import preload_blas

    preload_blas()
    from types import SimpleNamespace

    import mlx.core as mx
    from mlx_lm import lora
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback

    if not turn.on_gpu:
        mx.set_default_device(mx.cpu)
        mx.disable_compile()  # on a CPU every new width would wait for g++, and no step is faster
    found: Result = {"train_seconds": 0.0}
    evaluations: list[float] = []

    class Reports(TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            found["train_seconds"] += mlx_lm_settings(turn)["steps_per_report"] / info["iterations_per_second"]

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            found.setdefault("base_loss", info["val_loss"])
            found["own_loss"] = info["val_loss"]

    load, train = lora.load, lora.train

    def load_as_meant(path: str, **kwargs: Any) -> Any:
        began = time.perf_counter()
        loaded = load_like_ours(load, turn, path, **kwargs)
        found["load_seconds"], found["loaded_at"] = time.perf_counter() - began, since_start()
        return loaded

    lora.load = load_as_meant
    lora.train = lambda **kwargs: train(**kwargs | {"training_callback": Reports()})
    trainer.evaluate = timed(trainer.evaluate, evaluations)
    settings = mlx_lm_settings(turn)
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        lora.run(SimpleNamespace(**(lora.CONFIG_DEFAULTS | settings)))
    finally:
        sys.stdout = stdout
    return {
        **found,
        "steps": turn.steps,
        "steps_seconds": found.pop("train_seconds"),
        "evaluation_seconds": evaluations,
        "adapter": settings["adapter_path"],
        **peaks("mlx", turn.device),
    }


def load_like_ours(load: Callable[..., Any], turn: Turn, path: str, **kwargs: Any) -> Any:
    """mlx-lm's loading, given the settings of transformers 5 that it would misread; weights as ours has them.

    On a CPU in float32: MLX multiplies 16-bit numbers there some thirty times slower. Four bits are rounded in memory,
    as `mlx_lm.convert -q` does on disk.
    """
    import mlx.core as mx
    import mlx.nn as nn

    from backends.mlx.loading import GROUP_SIZE, mlx_settings

    model, tokenizer = load(path, model_config=mlx_settings(Path(path)), **kwargs)
    model.set_dtype(mx.bfloat16 if turn.on_gpu else mx.float32)
    if turn.bits == 4:
        nn.quantize(model, group_size=GROUP_SIZE, bits=4)
    mx.eval(model.parameters())
    return model, tokenizer


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl_settings(turn: Turn) -> dict[str, Any]:
    """SFTConfig's arguments."""
    padding_free = turn.on_gpu and has_flash_attention()
    return {
        "output_dir": str(Path(turn.output) / "trl"),
        "per_device_train_batch_size": turn.batch_size,
        "per_device_eval_batch_size": turn.batch_size * (4 if turn.on_gpu else 1),
        "num_train_epochs": turn.epochs,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "max_length": None if padding_free else turn.max_tokens,
        "padding_free": padding_free,
        "completion_only_loss": True,
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "steps",
        "eval_steps": turn.eval_every,
        "eval_on_start": True,
        "prediction_loss_only": True,
        "use_cpu": not turn.on_gpu,
        "bf16": turn.on_gpu,
        "gradient_checkpointing": turn.is_large,
        "router_aux_loss_coef": 0.0,  # of a mixture: the router is frozen
        "use_liger_kernel": turn.on_gpu and importlib.util.find_spec("liger_kernel") is not None,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
    }


def has_flash_attention() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def run_trl(turn: Turn) -> Result:
    """SFTTrainer with PEFT's LoRA, and bitsandbytes' NF4 for 4 bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.common import usual_load_options

    began = time.perf_counter()
    options = usual_load_options(device=turn.device, bits=turn.bits)
    if turn.on_gpu and has_flash_attention():
        options["attn_implementation"] = "flash_attention_2"
    model = AutoModelForCausalLM.from_pretrained(turn.model, **options)
    tokenizer = AutoTokenizer.from_pretrained(turn.model)
    load_seconds, loaded_at = time.perf_counter() - began, since_start()
    trainer = _sft_trainer(turn, model, tokenizer)
    if not turn.on_gpu:  # TRL makes an adapter on a 4-bit base bfloat16, which a CPU multiplies slowly
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)
    evaluations: list[float] = []
    trainer.evaluate = timed(trainer.evaluate, evaluations)
    clock = _steps_clock(trainer)
    trainer.train()
    train_seconds = clock["end"] - clock["begin"] - sum(evaluations)
    if len(evaluations) < num_evaluations(turn.steps, turn.eval_every):  # newer versions evaluate at the end themselves
        trainer.evaluate()
    adapter = str(Path(turn.output) / "adapters")
    trainer.save_model(adapter)
    assert trainer.state.global_step == turn.steps
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        "load_seconds": load_seconds,
        "loaded_at": loaded_at,
        "steps": trainer.state.global_step,
        "steps_seconds": train_seconds,
        "evaluation_seconds": evaluations,
        "base_loss": losses[0],
        "own_loss": losses[-1],
        "adapter": adapter,
        **peaks("cuda", turn.device),
    }


def _steps_clock(trainer: Any) -> dict[str, float]:
    """When the loop begins and ends, on `time.perf_counter`; filled in while it runs."""
    from transformers import TrainerCallback

    clock: dict[str, float] = {}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock["begin"] = time.perf_counter()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            clock["end"] = time.perf_counter()

    trainer.add_callback(Clock())
    return clock


def _sft_trainer(turn: Turn, model: Any, tokenizer: Any) -> Any:
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    disable_progress_bars()
    adapter = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=turn.dropout,
        target_modules=list(KEYS),
        layers_to_transform=list(range(turn.num_frozen, turn.num_layers)),
        task_type="CAUSAL_LM",
    )
    train, valid = (Dataset.from_list(_conversations(Path(turn.data) / f"{name}.jsonl")) for name in ("train", "valid"))
    return SFTTrainer(
        model,
        args=SFTConfig(**trl_settings(turn)),
        train_dataset=train,
        eval_dataset=valid,
        peft_config=adapter,
        processing_class=tokenizer,
    )


def _conversations(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]


# --- the judge --------------------------------------------------------------------------------------------------------


def judge(turn: Turn, *, adapters: Sequence[Path], backend: str) -> Result:
    """Losses of adapters on the validation rows, by our learner of `backend`, whichever tools they are from.

    Of a run of ours it is the adapter after the last step, from the checkpoint, as the peers save theirs.
    """
    from core.protocols import TrainState
    from core.settings import resolve
    from core.workflow.job import prepare

    config = resolve(assignments=[*our_settings(turn), f"backend={backend}"]).config
    job = prepare(config, choose_bits=False)
    learner = job.backend.open(job.config, job.model, job.adapter)
    found = []
    for path in adapters:
        learner.import_state(TrainState(adapter=final_tensors(path, job), optimizer={}))
        found.append(learner.evaluate(job.data.validation))
    learner.close()
    return {"losses": [losses.mean for losses in found], "num_targets": int(found[0].num_targets.sum())}


def final_tensors(path: Path, job: Job) -> Mapping[str, npt.NDArray[np.float32]]:
    """The adapter of a run folder's last checkpoint, or of a peer's folder, which must be of the run's modules."""
    from core.adapter_files import find_adapter
    from core.checkpoint import FOLDER, Checkpointer

    if (path / FOLDER).is_dir():
        last = Checkpointer(path, keep=job.config.checkpoint.keep).latest()
        assert last is not None
        return {name: np.asarray(tensor, np.float32) for name, tensor in last.state.adapter.items()}
    found = find_adapter(path).read(job.architecture)
    same = {name: found.scale_of(name) for name in found.modules} == {
        name: job.adapter.scale_of(name) for name in job.adapter.modules
    }
    assert same, "another adapter was trained"
    return found.tensors


TOOLS: dict[str, Callable[[Turn], Result]] = {
    "twinkeel mlx": lambda turn: run_ours(turn, "mlx"),
    "mlx_lm.lora": run_mlx_lm,
    "twinkeel cuda": lambda turn: run_ours(turn, "cuda"),
    "trl": run_trl,
}

__all__ = ["TOOLS", "Turn", "judge", "mlx_lm_settings", "num_evaluations", "our_settings", "trl_settings"]
