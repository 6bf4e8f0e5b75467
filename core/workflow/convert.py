"""An adapter folder in another form, proven on rows of a real base model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import backends
from backends import peer
from core.adapter_files import BOTH, AdapterFolder, Form, find_adapter
from core.architecture import Architecture, read_architecture
from core.config import DataConfig, ModelConfig, RunConfig
from core.convert import FORMS, LIBRARIES, Bench, PeerLogits, refuse_taken, summary, unproven
from core.convert import convert as convert_adapter
from core.errors import UserError
from core.init_adapter import other_base
from core.models import ResolvedModel
from core.models.reference import original_of
from core.protocols import DeviceReport
from core.screen import logging_to
from core.workflow.job import find_model, load_rows

_NO_DEVICE = DeviceReport(backend="", available=True, device="", accelerator=False, memory_bytes=0)
"""The device matters for `model.path auto` only."""
_log = logging.getLogger("twinkeel")


def convert(source: str, *, to: str, output: str | None, model: str | None, data: str | None, console: Console) -> int:
    """Writes an adapter folder in another form and proves it. Returns the exit code.

    Raises:
        UserError: an adapter that can't be carried, no base model, or ends that differ; nothing is written.
    """
    with logging_to(console):
        found = find_adapter(Path(source))
        name = model or found.base_model
        if name is None:
            raise UserError(f"{found.path}: it does not say its base model", hint="give it with --model")
        folder = Path(output) if output else found.path.with_name(f"{found.path.name}-{to}")
        refuse_taken(folder)  # before a model is loaded
        settings = ModelConfig(path=name)
        config = RunConfig(
            model=settings, data=DataConfig(path=data or DataConfig().path, max_tokens=64, train_on="all")
        )
        resolved = _base_of(found, config, is_typed=model is not None)
        if (warning := other_base(found, resolved)) is not None:
            _log.warning(warning)
        architecture = read_architecture(resolved.path)
        adapter = found.read(architecture)
        base_model = resolved.name
        if architecture.mlx_bits is not None and "peft" in FORMS[to]:
            base_model = _original(base_model)
        bench = _bench(config, resolved, architecture)
        used = [form for form in BOTH if form in {found.form, *FORMS[to]} and form not in bench.left_out]
        _log.info("running the base model in %s", " and ".join(LIBRARIES[form] for form in used))
        done = convert_adapter(
            found, adapter, folder, to=to, base_model=base_model, architecture=architecture, bench=bench
        )
        for line in ["", *summary(done, bench), ""]:
            _log.info(line)
        for gap in unproven(done, bench):
            _log.warning(gap)
        for line in _next(folder, to=to, base_model=base_model):
            _log.info(line)
    return 0


def _base_of(found: AdapterFolder, config: RunConfig, *, is_typed: bool) -> ResolvedModel:
    try:
        return find_model(config, _NO_DEVICE)
    except UserError as error:
        if is_typed:
            raise
        raise UserError(
            f"{found.path} names its base model, but: {error.what}", hint="give yours with --model"
        ) from None


def _next(folder: Path, *, to: str, base_model: str) -> list[str]:
    """What to type now."""
    uses = {
        "mlx": f'use    mlx_lm.generate --model {base_model} --adapter-path {folder} --prompt "…"',
        "peft": f'use    PeftModel.from_pretrained(base_model, "{folder}")',
    }
    more = f"train  python cli.py train --init-adapter {folder} --data ROWS.jsonl"
    return [f"  {line}" for line in (*(uses[form] for form in FORMS[to]), more)]


def _original(name: str) -> str:
    """The model that PEFT can read, of one that MLX quantised."""
    if (original := original_of(name)) is None:
        raise UserError(
            f"{name}: quantised by MLX, which PEFT can't read",
            hint="give the original model with --model, or use --to mlx",
        )
    return original


def _bench(config: RunConfig, model: ResolvedModel, architecture: Architecture) -> Bench:
    """A few rows, and the libraries that can run this base model here."""
    left_out: dict[Form, str] = {}
    wide, narrow = 4.4 * model.parameters, 2.2 * model.parameters  # float32, bfloat16, with a tenth for the rest
    dtype = "float32"
    for form, name in peer.BACKENDS.items():
        memory = backends.get(name).probe().memory_bytes or wide
        if not peer.is_installed(form):
            left_out[form] = "it is not installed here"
        elif form == "peft" and architecture.mlx_bits is not None:
            left_out[form] = "it can't read a base model quantised by MLX; give the original with --model"
        elif architecture.mlx_bits is None and narrow > memory:
            left_out[form] = f"the base model needs {narrow / 1e9:.0f} GB, of {memory / 1e9:.0f} here"
        elif architecture.mlx_bits is None and wide > memory:
            dtype = "bfloat16"
    batches = load_rows(config, model, architecture, say_findings=False).validation[:2]

    def run(form: Form, folders: Sequence[Path]) -> list[PeerLogits]:
        return peer.peer_logits(form, model=model.path, adapters=folders, batches=batches, dtype=dtype)

    return Bench(batches, dtype, left_out, run)
