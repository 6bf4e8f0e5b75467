"""The tools that `mixtral.py` compares: each loads a mixture with an adapter and gives back how to train it."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import BETAS, LR, MAX_GRAD_NORM, WARM_UP, Step, as_rows, usual_checkpointing, usual_load_options
from benchmarks.common import usual_step as plain_loop
from benchmarks.mixtral_work import Targets

if TYPE_CHECKING:
    import torch

    from core.adapter import Adapter
    from core.config import RunConfig
    from core.models import ResolvedModel

RANK, ALPHA = 16, 32
EXPERT_KEYS = ["gate_proj", "up_proj", "down_proj"]

Train = Callable[[Sequence[Any], Callable[[], None]], float]
"""Trains on batches, a step each, calls its argument after `WARM_UP` of them, and gives the mean of their losses."""


@dataclass(frozen=True)
class Turn:
    """What a process is told."""

    folder: str
    """With `config.json`, and with weights where `from_disk`."""
    device: str
    """`gpu` or `cpu`."""
    targets: Targets = "attention"
    frozen: float = 0.0
    widths: tuple[int, ...] = ()
    """Tokens in the longest row of a batch; measured one after the other. None: loading only."""
    rows: int = 1
    steps: int = 10
    from_disk: bool = False
    """The folder's own weights; else random ones made on the device."""
    cache: bool = False
    """Keep the packed weights, and start from them where they are kept."""
    limit_gb: float | None = None
    """The process gets no more of the device than this (10^9 bytes, without CUDA's own)."""

    @property
    def on_gpu(self) -> bool:
        return self.device == "gpu"

    def config(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((Path(self.folder) / "config.json").read_text())
        return content


class RandomSource:
    """`backends.cuda.streaming.Source`: every matrix drawn on the device when it is asked for, norms are ones."""

    name = "random"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        import torch

        self._dtype = dtype
        self._random = torch.Generator(device).manual_seed(0)

    def has(self, name: str) -> bool:
        return True

    def read(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        import torch

        place = self._random.device
        if len(shape) == 1:
            yield torch.ones(shape, dtype=self._dtype, device=place)
            return
        count = shape[0] if len(shape) == 3 else 1
        for _ in range(count):
            yield torch.randn(shape[-2:], generator=self._random, dtype=self._dtype, device=place).mul_(0.02)


# --- ours -------------------------------------------------------------------------------------------------------------


def run_config(turn: Turn) -> RunConfig:
    from core.config import RunConfig

    targets = "attention" if turn.targets == "attention" else EXPERT_KEYS
    return RunConfig.model_validate(
        {
            "device": turn.device,
            "model": {"bits": 4, "cache_packed": turn.cache},
            "lora": {
                "rank": RANK,
                "alpha": ALPHA,
                "dropout": 0.0,
                "targets": targets,
                "frozen_fraction": turn.frozen,
            },
            "train": {"gradient_checkpointing": True},
            "optim": {"lr": LR, "weight_decay": 0.0, "betas": BETAS, "max_grad_norm": MAX_GRAD_NORM},
        }
    )


def planned_adapter(turn: Turn) -> Adapter:
    from core.adapter import plan_adapter
    from core.architecture import read_architecture

    return plan_adapter(run_config(turn).lora, read_architecture(Path(turn.folder)), seed=0)


def resolved(folder: str) -> ResolvedModel:
    from core.models import ResolvedModel

    return ResolvedModel(Path(folder), "random weights", revision=None, source="folder", note="", parameters=0)


def load_ours(turn: Turn) -> Train:
    from backends.cuda.backend import CudaBackend, compute_dtype
    from backends.cuda.memory import choose_device

    device = choose_device(turn.device)
    source = None if turn.from_disk else RandomSource(device, compute_dtype("auto", device))
    learner = CudaBackend().open(run_config(turn), resolved(turn.folder), planned_adapter(turn), source=source)
    return _stepwise(lambda step, batch: learner.train_step([batch], step=step, lr=LR).loss)


def _stepwise(step: Step) -> Train:
    def train(batches: Sequence[Any], warmed_up: Callable[[], None]) -> float:
        losses = []
        for number, batch in enumerate(batches, start=1):
            losses.append(step(number, batch))
            if number == WARM_UP:
                warmed_up()
        return sum(float(loss) for loss in losses) / len(losses)

    return train


# --- the usual way ----------------------------------------------------------------------------------------------------


def load_usual(turn: Turn) -> Train:
    model = usual_model(turn)
    model.train()
    return _stepwise(plain_loop(model, on_gpu=turn.on_gpu))


def usual_model(turn: Turn) -> Any:
    """transformers' model with PEFT's adapter of the same rank on the same modules and layers."""
    from peft import get_peft_model
    from transformers.utils import logging

    logging.disable_progress_bar()
    base = usual_base(turn)
    usual_checkpointing(base)
    return get_peft_model(base, peft_config(turn))


def peft_config(turn: Turn) -> Any:
    """Experts are bare parameters for PEFT: gate and up share an A there, where ours, as mlx-lm's, have one each."""
    from peft import LoraConfig

    modules = list(planned_adapter(turn).modules)
    if turn.targets == "attention":
        choice: dict[str, Any] = {"target_modules": modules}
    else:
        paths = dict.fromkeys(module.rpartition(".")[0] for module in modules)
        names = [f"{path}.{leaf}" for path in paths for leaf in ("gate_up_proj", "down_proj")]
        choice = {"target_modules": [], "target_parameters": names}
    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, task_type="CAUSAL_LM", **choice)


def usual_base(turn: Turn) -> Any:
    """`from_pretrained` in 4 bits, or what it would give for random weights, made on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = usual_load_options(device=turn.device, bits=4)
    if turn.from_disk:
        return AutoModelForCausalLM.from_pretrained(turn.folder, **options)
    (place,) = options["device_map"].values()
    with torch.device(place):  # 93.4 GB; the packing of the attention takes 2 of them away
        base = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(turn.folder), dtype=options["dtype"], attn_implementation="sdpa"
        )
    pack_linear(base, dtype=options["dtype"], device=torch.device(place))
    return base.eval()


def pack_linear(base: Any, *, dtype: torch.dtype, device: torch.device) -> None:
    """bitsandbytes' 4-bit layers in place of `nn.Linear`, but for the head: what transformers' quantiser does."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = base.get_output_embeddings()
    linear = {name: m for name, m in base.named_modules() if type(m) is torch.nn.Linear and m is not head}
    for path, old in linear.items():
        parent_path, _, leaf = path.rpartition(".")
        new = Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        new.weight = Params4bit(
            old.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
        ).to(device)
        setattr(base.get_submodule(parent_path), leaf, new)
    base.is_loaded_in_4bit = True  # PEFT asks for it


# --- TRL --------------------------------------------------------------------------------------------------------------


def load_trl(turn: Turn) -> Train:
    """SFTTrainer on the same model: its own loop, collator, loss and optimiser settings as given here."""
    from transformers.utils import logging

    model = usual_model(turn)
    logging.set_verbosity_error()

    def train(batches: Sequence[Any], warmed_up: Callable[[], None]) -> float:
        with tempfile.TemporaryDirectory() as name:
            trainer = _sft_trainer(turn, model, batches, Path(name), warmed_up)
            return float(trainer.train().training_loss)

    return train


def _sft_trainer(turn: Turn, model: Any, batches: Sequence[Any], folder: Path, warmed_up: Callable[[], None]) -> Any:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP:
                warmed_up()

    rows = []
    for batch in batches:
        for inputs, labels, mask in zip(*as_rows(batch), strict=True):
            length = int(mask.sum())
            rows.append({"input_ids": inputs[:length].tolist(), "labels": labels[:length].tolist()})
    settings = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=turn.rows,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused" if turn.on_gpu else "adamw_torch",
        max_length=None,
        train_sampling_strategy="sequential",
        use_cpu=not turn.on_gpu,
        bf16=turn.on_gpu,
        gradient_checkpointing=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    dataset = Dataset.from_list(rows)
    return SFTTrainer(
        model, args=settings, train_dataset=dataset, processing_class=_tokenizer(turn), callbacks=[Clock()]
    )


def _tokenizer(turn: Turn) -> Any:
    """SFTTrainer wants one, for its pad token; the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{index}>": index for index in range(turn.config()["vocab_size"])}
    model = models.WordLevel(words, unk_token="<1>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="<0>", eos_token="<2>")


TOOLS: dict[str, Callable[[Turn], Train]] = {"twinkeel": load_ours, "usual": load_usual, "trl": load_trl}


def installed_tools() -> list[str]:
    return [tool for tool in TOOLS if tool != "trl" or importlib.util.find_spec("trl")]
