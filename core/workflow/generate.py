"""The answer of a run's adapter beside the base model's."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

import backends
from core.adapter_files import MLX_WEIGHTS, PEFT_WEIGHTS, find_adapter
from core.architecture import read_architecture
from core.errors import UserError
from core.folds import run_with_adapter
from core.handoff import without_effect
from core.protocols import TrainState
from core.run import ADAPTERS, CONFIG
from core.screen import logging_to
from core.settings import load_config
from core.workflow.job import find_backend, find_model, with_all_layers
from data.prompt import decode, render_prompt
from data.tokenize import load_tokenizer


def answer(folder: Path, prompt: str, *, max_tokens: int, console: Console) -> int:
    """Answers a prompt greedily with the base model and with the run's adapter. Returns the exit code.

    Raises:
        UserError: the run has no adapter yet, or its model can't be loaded.
    """
    folder = run_with_adapter(folder)
    with logging_to(console):
        config = with_all_layers(load_config(folder / CONFIG))
        if not all((folder / ADAPTERS / name).is_file() for name in (PEFT_WEIGHTS, MLX_WEIGHTS)):
            raise UserError(
                f"{folder}: no adapter yet",
                hint=f"train it to the first evaluation: python cli.py train --resume {folder}",
            )
        backend, device = find_backend(config)
        model = find_model(config, device)
        trained = find_adapter(folder / ADAPTERS).read(read_architecture(model.path))
        tokenizer = load_tokenizer(model.path, trust_remote_code=config.model.trust_remote_code)
        prompt_ids = render_prompt(tokenizer, prompt)
        learner = backend.open(config, model, trained)
        try:
            for name, adapter in (("base", without_effect(trained)), ("adapter", trained)):
                learner.import_state(TrainState(adapter=adapter.tensors, optimizer={}))
                ids = backends.generate(backend.name, learner, tokenizer, prompt_ids, max_tokens=max_tokens)
                console.print(f"[dim]{name:<8}[/dim] ", end="")
                console.print(decode(tokenizer, ids), markup=False)
        finally:
            learner.close()
    return 0
