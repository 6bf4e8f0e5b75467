"""From a configuration to a prepared job: everything that can be wrong is found before anything is written."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import backends
from core.adapter import Adapter, plan_adapter, trains_router
from core.adapter_files import find_adapter
from core.architecture import Architecture, read_architecture
from core.census import census, refuse_wide
from core.config import FREE_ON_RESUME, DataConfig, MoeConfig, RunConfig, to_plain
from core.errors import UserError
from core.init_adapter import other_base, read_init_adapter, read_kept
from core.models import QUICKSTART_MODEL, ResolvedModel, resolve_model
from core.models.fingerprint import model_fingerprint
from core.models.wheel import cache_folder
from core.protocols import Backend, DeviceReport, Learner
from core.trackers.process import check_installed
from data.check.collect import check_prepared
from data.check.report import brief, stops
from data.dataset import Prepared, TokenizedData, split_data, tokenize_data
from data.general import general_fingerprint, load_general
from data.token_cache import cached_rows, rows_key
from data.tokenize import load_tokenizer
from data.training import RunData

_log = logging.getLogger("twinkeel")
_ROOT = Path(__file__).resolve().parent.parent.parent


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
        if self.config.eval.general:
            bound["eval"]["general"] = general_fingerprint()
        else:  # a run from before there was this setting goes on
            del bound["eval"]["general"]
        for name in FREE_ON_RESUME:
            section, field = name.split(".")
            del bound[section][field]
        identity = {
            "model": model_fingerprint(self.model.path),
            "data": self.data.fingerprint,
            "settings": hashlib.sha256(repr(bound).encode()).hexdigest(),
        }
        return (
            identity if self.config.lora.init_adapter is None else identity | {"init_adapter": self.adapter.fingerprint}
        )


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
        init_adapter: of a run that is resumed, its copy of the adapter that it started from, if there is one.
    """
    check_installed(config.log.trackers)
    backend, device = find_backend(config)
    config = changed(_on_its_base(config), backend=backend.name)
    model = find_model(config, device)
    config = _with_model(config, model, choose_bits=choose_bits)
    architecture = read_architecture(model.path)
    config, adapter = _first_adapter(config, model, architecture, sources=sources or {}, folder=init_adapter)
    _refuse_memory_settings(config, adapter)
    for warning in [*_warnings(config, architecture, adapter), *backend.check(config)]:
        _log.warning(warning)
    data = load_rows(config, model, architecture)
    if config.eval.general:
        tokenizer = load_tokenizer(model.path, trust_remote_code=config.model.trust_remote_code)
        data = data.with_general(load_general(tokenizer, vocab_size=architecture.vocab_size).batches)
    return Job(config, backend, device, model, architecture, adapter, data)


def _on_its_base(config: RunConfig) -> RunConfig:
    """`auto` with an adapter to go on from means the model that the adapter is for, not the largest that fits."""
    if config.model.path != "auto" or config.lora.init_adapter is None:
        return config
    base = find_adapter(Path(config.lora.init_adapter)).base_model
    if base is None:
        raise UserError(f"{config.lora.init_adapter}: it does not say its base model", hint="give it with --model")
    _log.info("auto: %s, which the adapter was made for", base)
    return changed(config, model=config.model.model_copy(update={"path": base}))


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
        router = config.moe.train_router
        return config, plan_adapter(config.lora, architecture, seed=config.train.seed, router=router)
    if folder is not None:
        return config, read_kept(folder, dropout=config.lora.dropout)
    found = find_adapter(Path(config.lora.init_adapter))
    init = read_init_adapter(found, config.lora, architecture, sources=sources)
    for note in init.notes:
        _log.info(note)
    if (warning := other_base(found, model)) is not None:
        _log.warning(warning)
    return changed(config, lora=init.lora), init.adapter


def find_backend(config: RunConfig) -> tuple[Backend, DeviceReport]:
    """Raises: UserError: it can't train here."""
    backend = backends.get(config.backend)
    device = backend.probe(config.device)
    if not device.available:
        raise UserError(f"backend {backend.name}: {device.problem}", hint="see: python cli.py doctor")
    return backend, device


def find_model(config: RunConfig, device: DeviceReport) -> ResolvedModel:
    """The folder of `model.path`, downloaded if need be; `device` matters for `auto` only."""
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
    return changed(config, model=config.model.model_copy(update=update))


def changed(config: RunConfig, **values: Any) -> RunConfig:
    """The configuration with some sections or settings replaced."""
    return config.model_copy(update=values)


def with_all_layers(config: RunConfig) -> RunConfig:
    """For what is no training: nothing is stored there that could stand for layers left out of memory."""
    return changed(config, model=config.model.model_copy(update={"low_memory": False, "stream_layers": False}))


def _refuse_memory_settings(config: RunConfig, adapter: Adapter) -> None:
    """Raises: UserError: layers are to be left out of memory that every step needs."""
    num_frozen, without_store = adapter.layers[0], config.train.prefix_store is False
    for name, is_set in (("low_memory", config.model.low_memory), ("stream_layers", config.model.stream_layers)):
        if is_set and num_frozen and without_store:
            raise UserError(
                f"model.{name} needs the prefix store, and train.prefix_store is false",
                hint="leave train.prefix_store at auto",
            )
    left_out = config.model.low_memory or config.model.stream_layers
    if left_out and num_frozen and config.model.trust_remote_code:
        raise UserError(
            "model.low_memory and model.stream_layers need the prefix store, which keeps nothing of remote code",
            hint="leave model.trust_remote_code at false",
        )
    if config.model.low_memory and not config.model.stream_layers and num_frozen == 0:
        stream = "stream them all: --set model.stream_layers=true"
        raise UserError(
            "model.low_memory: the first layer has an adapter, so every step needs every layer",
            hint=stream
            if config.lora.init_adapter is not None
            else f"freeze the first half (--set lora.frozen_fraction=0.5), or {stream}",
        )
    if config.model.stream_layers and trains_router(adapter.modules):
        raise UserError(
            "model.stream_layers: an adapter on the router needs all layers at once, for its load-balancing loss",
            hint="leave moe.train_router at false, and `gate` out of lora.targets",
        )


def _warnings(config: RunConfig, architecture: Architecture, adapter: Adapter) -> Iterator[str]:
    """Settings that have no effect on any backend, in this combination."""
    yield from _router_warnings(config, architecture, adapter)
    if architecture.max_positions and config.data.max_tokens > architecture.max_positions:
        yield (
            f"data.max_tokens {config.data.max_tokens} is more than the "
            f"{architecture.max_positions} positions this model was made for"
        )
    if config.model.stream_layers and config.model.low_memory:
        yield "model.low_memory has no effect with model.stream_layers true, which leaves more out"
    if config.model.stream_layers and config.train.gradient_checkpointing is True:
        yield "train.gradient_checkpointing has no effect with model.stream_layers true, which recomputes each layer"
    if config.train.prefix_store is True and adapter.layers[0] == 0:
        yield "train.prefix_store true has no effect: the first layer has an adapter"
    schedule = config.schedule
    if schedule.name == "constant" and schedule.min_lr:
        yield "schedule.min_lr has no effect with schedule.name constant"
    if config.optim.name != "sgd" and config.optim.momentum:
        yield f"optim.momentum has no effect with optim.name {config.optim.name}"


def _router_warnings(config: RunConfig, architecture: Architecture, adapter: Adapter) -> Iterator[str]:
    if trains_router(adapter.modules):
        return
    why = "the router is frozen" if architecture.is_moe else f"this {architecture.model_type} model has no router"
    if config.moe.train_router:
        without = "the initial adapter has none for the router" if architecture.is_moe else why
        yield f"moe.train_router true has no effect: {without}"
    weight = config.moe.aux_loss_weight
    if weight not in (0.0, MoeConfig().aux_loss_weight):  # the default is nobody's wish, and 0 is what happens
        yield f"moe.aux_loss_weight {weight:g} has no effect: {why}"


def load_rows(
    config: RunConfig, model: ResolvedModel, architecture: Architecture, *, say_findings: bool = True
) -> RunData:
    """The rows that the settings name, tokenised for the model, or found as they were tokenised before."""
    source = config.data.model_copy(update={"path": find_data(config.data.path)})
    tokenised = tokenise(source, model, runs_code=config.model.trust_remote_code)
    prepared = split_data(tokenised, source, seed=config.train.seed)
    data = RunData(prepared, config)
    if say_findings:
        _check(tokenised, prepared, data, config)
    data.check_vocabulary(architecture.vocab_size)
    return data


def tokenise(data: DataConfig, model: ResolvedModel, *, runs_code: bool) -> TokenizedData:
    """The rows of `data` for this model's tokenizer, from the cache where they are kept."""
    # what a tokenizer's own code makes of a text can't be told from its files
    key = None if runs_code else rows_key(data, tokenizer=model.path)
    return cached_rows(
        cache_folder() / "tokens",
        key,
        lambda folder: tokenize_data(data, load_tokenizer(model.path, trust_remote_code=runs_code), folder=folder),
    )


def _check(tokenised: TokenizedData, prepared: Prepared, data: RunData, config: RunConfig) -> None:
    """Says in short what `data check` says in full. Raises `UserError` if the run is strict and something was found."""
    report = check_prepared(tokenised, prepared, config, num_parameters=None)
    for line in [*prepared.findings, *brief(report, prepared.lines), *data.warnings()]:
        _log.warning(line)
    if config.data.strict and (found := stops(report)):
        raise UserError(
            f"{prepared.name}: the check found something, and this run is strict: {found[0].text}",
            hint=f"see all with: python cli.py data check --data {config.data.path}; or start without --strict",
        )


def find_data(path: str) -> str:
    """The shipped samples are found from any folder."""
    shipped = _ROOT / path
    return str(shipped) if not Path(path).exists() and shipped.exists() else path


@contextmanager
def opened(job: Job) -> Iterator[Learner]:
    """The model on its device, until the context ends."""
    _log.info("loading %s", job.model.name)
    learner = job.backend.open(job.config, job.model, job.adapter)
    try:
        refuse_wide(census(learner.weights()), bits=job.config.model.bits)
        yield learner
    finally:
        learner.close()
