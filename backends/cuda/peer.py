"""An adapter folder in PEFT, as its users load it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def load(model: Path, adapter: str | None, *, dtype: str) -> Any:
    """The base model, with the adapter if there is one, on the GPU if there is one.

    Raises:
        RuntimeError: PEFT left out part of the adapter.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), device_map={"": device}, local_files_only=True
    )
    if adapter is None:
        return base.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted: Any = PeftModel.from_pretrained(base, adapter)
    for warning in caught:
        # PEFT only warns where the folder lacks, or has too many, of the tensors that its configuration speaks of
        if "adapter keys" in str(warning.message):
            raise RuntimeError(" ".join(str(warning.message).split())[:300])
    return adapted.eval()


def logits(model: Any, inputs: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Those of every batch, float32 [B, T, V], for int32 `inputs` [B, T]."""
    device = next(model.parameters()).device
    with torch.no_grad():
        for ids in inputs:
            found = model(input_ids=torch.from_numpy(ids.astype(np.int64)).to(device), use_cache=False)
            yield found.logits.float().cpu().numpy()
