"""From a configuration to a verdict: the only module of the core that knows data, backends and the trainer.

`train` and `resume` first find everything that can be wrong (backend, model, data, settings) and only then touch the
disk: a user's mistake leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

import backends
from backends import peer
from core.adapter import Adapter, plan_adapter
from core.adapter_files import BOTH, MLX_WEIGHTS, PEFT_WEIGHTS, Form, find_adapter
from core.architecture import Architecture, read_architecture
from core.config import DataConfig, ModelConfig, RunConfig, to_plain
from core.convert import LIBRARIES, Bench, PeerLogits, refuse_taken, summary
from core.convert import convert as convert_adapter
from core.errors import UserError
from core.handoff import without_effect
from core.init_adapter import COPY, read_init_adapter
from core.models import QUICKSTART_MODEL, ResolvedModel, resolve_model
from core.models.fingerprint import model_fingerprint
from core.moves import choose_backend
from core.parity_record import (
    CPU_TOKEN_BUDGET,
    Record,
    certified,
    record_four_bits,
    record_training,
    use_whole_float32,
    without_four_bits,
    write_record,
)
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
from core.settings import Settings, load_config, resolve
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
        del bound["model"]["path"], bound["data"]["path"], bound["lora"]["init_adapter"]
        bound["model"]["revision"] = None  # like the path: where the model is
        identity = {
            "model": model_fingerprint(self.model.path),
            "data": self.data.fingerprint,
            "settings": hashlib.sha256(repr(bound).encode()).hexdigest(),
        }
        return (
            identity if self.config.lora.init_adapter is None else identity | {"init_adapter": self.adapter.fingerprint}
        )


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
        job = prepare(config, choose_bits="model.bits" not in settings.sources, sources=settings.sources)
        with _opened(job) as learner:
            folder, lock = claim_run_folder(config.output, data_name=data_name)
            with lock:
                return Session(job, learner, folder, console=console).begin()


def resume(folder: Path, *, flags: Mapping[str, tuple[str, Any]] | None = None, console: Console) -> int:
    """Continues a run from its newest good checkpoint, as if it had never stopped. Returns the exit code.

    Args:
        flags: as of `core.settings.resolve`: where things are now.

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
            job = prepare(_config_here(folder, flags or {}), choose_bits=False, init_adapter=folder / COPY)
            with _opened(job) as learner:
                return Session(job, learner, folder, console=console).resume()


def _config_here(folder: Path, flags: Mapping[str, tuple[str, Any]]) -> RunConfig:
    """The run's settings, with what was typed, for a backend that is there."""
    written = load_config(folder / CONFIG)
    config = resolve(files=[folder / CONFIG], flags=flags).config
    if "model.path" in flags:  # another model folder has no commit of the one before
        config = _with(config, model=config.model.model_copy(update={"revision": None}))
    config, notes = choose_backend(
        config,
        written=written.backend,
        typed=flags.keys(),
        probe=lambda name, device: backends.get(name).probe(device),
        names=backends.names(),
    )
    for note in notes:
        _log.info(note)
    return config


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
        resolved = _resolve_model(config, DeviceReport("", True, "", False, 0))
        architecture = read_architecture(resolved.path)
        adapter = found.read(architecture)
        bench = _bench(config, resolved, architecture)
        _log.info("comparing %s", " and ".join(LIBRARIES[form] for form in BOTH if form not in bench.left_out))
        done = convert_adapter(
            found, adapter, folder, to=to, base_model=resolved.name, architecture=architecture, bench=bench
        )
        for line in ["", *summary(done, bench), "", f"next: python cli.py train --init-adapter {folder}"]:
            _log.info(line)
    return 0


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
    batches = _load_data(config, model, architecture).validation[:2]

    def run(form: Form, folders: Sequence[Path]) -> list[PeerLogits]:
        return peer.peer_logits(form, model=model.path, adapters=folders, batches=batches, dtype=dtype)

    return Bench(batches, dtype, left_out, run)


def record_parity(settings: Settings, *, steps: int, four_bits: bool, console: Console) -> int:
    """Writes one side of `parity`: `steps` optimiser steps on the backend of the settings. Returns the exit code.

    Raises:
        UserError: as `train`, or a loss that became NaN or infinite; no record is written.
    """
    with logging_to(console):
        use_whole_float32()
        config, overridden = certified(settings, steps=steps)
        if overridden:
            _log.info("for parity: %s", ", ".join(overridden))
        folder = new_run_folder(config.output, data_name=f"parity-{Path(config.data.path).name}")
        job = prepare(config, choose_bits=False)
        with _opened(job) as learner:
            record = record_training(job, learner)
        record = _add_four_bits(job, record) if four_bits else record
        write_record(folder, record)
        _log.info("%s: recorded in %s", job.backend.name, folder)
    return 0


def _add_four_bits(job: Job, record: Record) -> Record:
    """Tries base and final adapter on 4-bit weights. What stands against it is a line in the record, no failure."""
    if job.architecture.mlx_bits is not None:
        return without_four_bits(record, f"the model folder holds {job.architecture.mlx_bits}-bit weights already")
    narrow = replace(job, config=_with(job.config, model=job.config.model.model_copy(update={"bits": 4})))
    try:
        job.backend.check(narrow.config)
        with _opened(narrow) as learner:
            budget = None if job.device.accelerator else CPU_TOKEN_BUDGET
            return record_four_bits(record, learner, job.data.validation, budget=budget)
    except UserError as error:
        _log.warning("4 bits left out: %s", error.what)
        return without_four_bits(record, f"{job.backend.name}: {error.what}")


def prepare(
    config: RunConfig,
    *,
    choose_bits: bool,
    sources: Mapping[str, str] | None = None,
    init_adapter: Path | None = None,
) -> Job:
    """Finds and checks everything.

    Args:
        choose_bits: lets `auto` choose 16 bits for a small model.
        sources: where the settings came from.
        init_adapter: where the adapter to start from lies now, if there is one.
    """
    backend, device = _backend(config)
    config = _with(config, backend=backend.name)
    model = _resolve_model(config, device)
    config = _with_model(config, model, choose_bits=choose_bits)
    architecture = read_architecture(model.path)
    config, adapter = _first_adapter(config, model, architecture, sources=sources or {}, folder=init_adapter)
    for warning in [*_warnings(config, architecture), *backend.check(config)]:
        _log.warning(warning)
    data = _load_data(config, model, architecture)
    return Job(config, backend, device, model, architecture, adapter, data)


def _first_adapter(
    config: RunConfig,
    model: ResolvedModel,
    architecture: Architecture,
    *,
    sources: Mapping[str, str],
    folder: Path | None,
) -> tuple[RunConfig, Adapter]:
    """The adapter to start from: drawn, or read; and the settings that say what it is."""
    if config.lora.init_adapter is None:
        return config, plan_adapter(config.lora, architecture, seed=config.train.seed)
    folder = folder or Path(config.lora.init_adapter)
    init = read_init_adapter(folder, config.lora, architecture, model=model.name, sources=sources)
    for note in init.notes:
        _log.info(note)
    return _with(config, lora=init.lora), init.adapter


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
