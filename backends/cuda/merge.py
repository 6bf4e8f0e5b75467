"""A merged model as an NF4 folder, by bitsandbytes through transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from backends.cuda import memory
from core.errors import UserError

DESCRIPTION = "NF4 with double quantisation"


def refuse_4bit(num_experts: int) -> None:
    """Raises: UserError: bitsandbytes can't write this model in 4 bits, or is not here."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "--quantize 4 with --backend cuda needs bitsandbytes, which is not installed",
            hint="pip install bitsandbytes, or use --backend mlx",
        )
    if num_experts:
        raise UserError(
            "--quantize 4 with --backend cuda: transformers and bitsandbytes leave a mixture's experts, most of it, in "
            "16 bits",
            hint="use --backend mlx, or merge without --quantize: train and chat pack the experts when they load them",
        )


def write_4bit(source: Path, folder: Path, *, device: str) -> None:
    """Reads the 16-bit folder `source` and writes weights and `config.json` into `folder`.

    Raises:
        UserError: a device that is not there.
        OutOfMemoryError: it does not fit.
    """
    chosen = memory.choose_device(device)
    memory.within_memory(
        lambda: _write(source, folder, chosen), device=chosen, doing="while quantising the merged model"
    )


def _write(source: Path, folder: Path, device: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from backends.cuda.model import silence_libraries
    from backends.cuda.nf4 import KIND

    silence_libraries()
    dtype = AutoConfig.from_pretrained(source, local_files_only=True).dtype or torch.bfloat16
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=KIND,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantisation,
            use_safetensors=True,
            local_files_only=True,
        )
        model.save_pretrained(folder)
