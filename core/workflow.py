"""From a configuration to a verdict: the only module of the core that knows data, backends and the trainer.

`train` and `resume` first find everything that can be wrong (backend, model, data, settings) and only then touch the
disk: a user's mistake leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import backends
from core.adapter import Adapter, plan_adapter
from core.adapter_files import MLX_WEIGHTS, PEFT_WEIGHTS, read_saved
from core.architecture import Architecture, read_architecture
from core.config import RunConfig, to_plain
from core.errors import UserError
from core.models import QUICKSTART_MODEL, ResolvedModel, resolve_model
from core.models.fingerprint import model_fingerprint
from core.protocols import Backend, DeviceReport, Learner, TrainState
from core.run import (
    ADAPTERS,
    COMPLETE,
    CONFIG,
    RunLock,
    claim_run_folder,
    new_run_folder,
    read_state,
)
from core.screen import logging_to
from core.session import Session
from core.settings import Settings, load_config
from data.dataset import load_data
from data.prompt import decode, render_prompt
from data.tokenize import load_tokenizer
from data.training import RunData

_log = logging.getLogger("twinkeel")
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a run needs, found and checked; nothing is written yet."""

    config: RunConfig
    """Fully resolved: no `auto` for backend and model."""
    backend: Backend
    device: DeviceReport
    model: ResolvedModel
    architecture: Architecture
    adapter: Adapter
    data: RunData

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint is bound to: it may be continued with the same model, data and settings only."""
        bound = to_plain(self.config)
        for free in ("output", "device", "backend"):
            del bound[free]
        del bound["model"]["path"], bound["data"]["path"]
        return {
            "model": model_fingerprint(self.model.path),
            "data": self.data.fingerprint,
            "settings": hashlib.sha256(repr(bound).encode()).hexdigest(),
        }


# --- the two ways to start --------------------------------------------------------------------------------------------


def train(settings: Settings, *, console: Console) -> int:
    """A new run, to its end. Returns the exit code.

    Raises:
        UserError: something in the settings, the model, the data or the machine; the run folder is not written, or
            says why the run failed.
    """
    with logging_to(console):
        config = settings.config
        data_name = Path(config.data.path).name
        new_run_folder(config.output, data_name=data_name)  # before anything is loaded: is --output free?
        job = prepare(config, choose_bits="model.bits" not in settings.sources)
        with _opened(job) as learner:
            folder, lock = claim_run_folder(config.output, data_name=data_name)
            with lock:
                return Session(job, learner, folder, console=console).begin()


def resume(folder: Path, *, console: Console) -> int:
    """Continues a run from its newest good checkpoint, as if it had never stopped. Returns the exit code.

    Raises:
        UserError: the run is complete, another process trains in it, or its model, data or settings have changed.
    """
    with logging_to(console):
        state = read_state(folder)
        if state.get("status") in COMPLETE:
            raise UserError(
                f"{folder}: already {state['status'].replace('_', ' ')}; nothing to resume",
                hint=f"see its verdict with: python cli.py monitor {folder} --once",
            )
        with RunLock(folder):  # before the model is loaded: somebody may be training here, somebody may be watching
            job = prepare(load_config(folder / CONFIG), choose_bits=False)
            with _opened(job) as learner:
                return Session(job, learner, folder, console=console).resume()


def answer(folder: Path, prompt: str, *, max_tokens: int, console: Console) -> int:
    """Answers a prompt greedily with the base model and with the run's adapter. Returns the exit code.

    Raises:
        UserError: the run has no adapter yet, or its model can't be loaded.
    """
    with logging_to(console):
        config = load_config(folder / CONFIG)
        if not all((folder / ADAPTERS / name).is_file() for name in (PEFT_WEIGHTS, MLX_WEIGHTS)):
            raise UserError(
                f"{folder}: no adapter yet",
                hint=f"train it to the first evaluation: python cli.py train --resume {folder}",
            )
        backend, device = _backend(config)
        model = _resolve_model(config, device)
        adapter = plan_adapter(config.lora, read_architecture(model.path), seed=config.train.seed)
        tokenizer = load_tokenizer(model.path, trust_remote_code=config.model.trust_remote_code)
        prompt_ids = render_prompt(tokenizer, prompt)
        learner = backend.open(config, model, adapter)
        try:
            trained = read_saved(folder / ADAPTERS, adapter)
            for name, tensors in (("base", adapter.tensors), ("adapter", trained.tensors)):
                learner.import_state(TrainState(adapter=tensors, optimizer={}))
                ids = backends.generate(backend.name, learner, tokenizer, prompt_ids, max_tokens=max_tokens)
                console.print(f"[dim]{name:<8}[/dim] ", end="")
                console.print(decode(tokenizer, ids), markup=False)
        finally:
            learner.close()
    return 0


def prepare(config: RunConfig, *, choose_bits: bool) -> Job:
    """Finds and checks everything; `choose_bits` lets `auto` choose 16 bits for a small model."""
    backend, device = _backend(config)
    config = _with(config, backend=backend.name)
    model = _resolve_model(config, device)
    config = _with_model(config, model, choose_bits=choose_bits)
    architecture = read_architecture(model.path)
    adapter = plan_adapter(config.lora, architecture, seed=config.train.seed)
    for warning in [*_warnings(config, architecture), *backend.check(config)]:
        _log.warning(warning)
    data = _load_data(config, model, architecture)
    return Job(config, backend, device, model, architecture, adapter, data)


def _backend(config: RunConfig) -> tuple[Backend, DeviceReport]:
    backend = backends.get(config.backend)
    device = backend.probe(config.device)
    if not device.available:
        raise UserError(f"backend {backend.name}: {device.problem}", hint="see: python cli.py doctor")
    return backend, device


# --- preparing --------------------------------------------------------------------------------------------------------


def _resolve_model(config: RunConfig, device: DeviceReport) -> ResolvedModel:
    model = resolve_model(
        config.model.path,
        revision=config.model.revision,
        backend=config.backend,
        bits=config.model.bits,
        memory_bytes=device.memory_bytes,
        accelerator=device.accelerator,
    )
    if model.note:
        _log.info(model.note)
    return model


def _with_model(config: RunConfig, model: ResolvedModel, *, choose_bits: bool) -> RunConfig:
    """Puts the model that was found into the configuration, for `config.yaml`."""
    update: dict[str, Any] = {"path": model.name}
    is_auto = config.model.path == "auto"
    if is_auto and choose_bits and model.name == QUICKSTART_MODEL and config.model.bits == 4:
        _log.info("16-bit weights: four bits cost a model this small more than training gains")
        update["bits"] = 16
    return _with(config, model=config.model.model_copy(update=update))


def _with(config: RunConfig, **values: Any) -> RunConfig:
    return config.model_copy(update=values)


def _warnings(config: RunConfig, architecture: Architecture) -> Iterator[str]:
    """Settings that have no effect on any backend, in this combination."""
    if config.log.trackers:
        raise UserError(
            f"log.trackers: {', '.join(config.log.trackers)}: this version has no trackers",
            hint="remove the setting; metrics.jsonl in the run folder holds every record",
        )
    if config.moe.train_router:
        yield "moe.train_router has no effect: this version has no adapters for routers"
    if architecture.is_moe and config.moe.aux_loss_weight:
        yield "moe.aux_loss_weight has no effect: the router is frozen"
    if architecture.max_positions and config.data.max_tokens > architecture.max_positions:
        yield (
            f"data.max_tokens {config.data.max_tokens} is more than the "
            f"{architecture.max_positions} positions this model was made for"
        )
    schedule = config.schedule
    if schedule.name == "constant" and schedule.min_lr:
        yield "schedule.min_lr has no effect with schedule.name constant"
    if config.optim.name != "sgd" and config.optim.momentum:
        yield f"optim.momentum has no effect with optim.name {config.optim.name}"


def _load_data(config: RunConfig, model: ResolvedModel, architecture: Architecture) -> RunData:
    tokenizer = load_tokenizer(model.path, trust_remote_code=config.model.trust_remote_code)
    source = config.data.model_copy(update={"path": _find_data(config.data.path)})
    prepared = load_data(source, tokenizer, seed=config.train.seed)
    for finding in prepared.findings:
        _log.warning(finding)
    data = RunData(prepared, config)
    data.check_vocabulary(architecture.vocab_size)
    return data


def _find_data(path: str) -> str:
    """The shipped samples are found from any folder."""
    shipped = _ROOT / path
    return str(shipped) if not Path(path).exists() and shipped.exists() else path


@contextmanager
def _opened(job: Job) -> Iterator[Learner]:
    _log.info("loading %s", job.model.name)
    learner = job.backend.open(job.config, job.model, job.adapter)
    try:
        yield learner
    finally:
        learner.close()
