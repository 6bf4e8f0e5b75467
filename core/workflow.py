"""From a configuration to a verdict: the only module of the core that knows data, backends and the trainer.

`train` and `resume` first find everything that can be wrong (backend, model, data, settings) and only then touch the
disk: a user's mistake leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import backends
from core.adapter import Adapter, plan_adapter
from core.adapter_files import PEFT_WEIGHTS, write_adapter
from core.architecture import Architecture, read_architecture
from core.checkpoint import Checkpoint, Checkpointer
from core.config import RunConfig, to_plain
from core.errors import OutOfMemoryError, UserError
from core.files import disk_errors, write_atomic
from core.handoff import check_saved, read_saved
from core.journal import Journal
from core.models import QUICKSTART_MODEL, ResolvedModel, resolve_model
from core.models.fingerprint import model_fingerprint
from core.plots import write_training_curves
from core.protocols import Backend, DeviceReport, Learner, Tensors, TrainState
from core.row_losses import read_row_losses
from core.run import (
    ADAPTERS,
    COMPLETE,
    CONFIG,
    LOG,
    RunLock,
    RunState,
    new_run_folder,
    read_state,
    write_summary,
)
from core.screen import TrainScreen, count, logging_to, logging_to_file
from core.settings import Settings, load_config
from core.signals import InterruptFlag
from core.trainer import Trainer, plan_steps
from core.verdict import summarize, verdict_lines
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
        folder = new_run_folder(config.output, data_name=Path(config.data.path).name)
        job = prepare(config, choose_bits="model.bits" not in settings.sources)
        with _opened(job) as learner:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with RunLock(folder):
                return _run(job, learner, folder, console=console, is_new=True)


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
                return _run(job, learner, folder, console=console, is_new=False)


def answer(folder: Path, prompt: str, *, max_tokens: int, console: Console) -> int:
    """Answers a prompt greedily with the base model and with the run's adapter. Returns the exit code.

    Raises:
        UserError: the run has no adapter yet, or its model can't be loaded.
    """
    with logging_to(console):
        config = load_config(folder / CONFIG)
        if not (folder / ADAPTERS / PEFT_WEIGHTS).is_file():
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
        raise UserError(
            f"backend {backend.name}: {device.problem}", hint="see: python cli.py doctor"
        )
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


# --- running ----------------------------------------------------------------------------------------------------------


def _run(job: Job, learner: Learner, folder: Path, *, console: Console, is_new: bool) -> int:
    with ExitStack() as stack:
        if is_new:
            _write_config(folder, job.config)
        checkpointer = Checkpointer(folder, keep=job.config.checkpoint.keep)
        checkpoint = None if is_new else _checkpoint_of(job, checkpointer, folder)
        state = RunState(folder, _facts(job, learner, read_state(folder).get("started")))
        stack.enter_context(logging_to_file(folder / LOG))
        flag = stack.enter_context(InterruptFlag())
        kept = checkpoint.trainer["journal_bytes"] if checkpoint else 0
        journal = Journal(folder, keep_bytes=kept)
        stack.callback(journal.close)
        _announce(job, learner, folder, checkpoint)
        screen = TrainScreen(total_steps=_total_steps(job), console=console)
        trainer = Trainer(
            config=job.config,
            learner=learner,
            data=job.data,
            folder=folder,
            journal=journal,
            checkpointer=checkpointer,
            screen=screen,
            save_best=lambda tensors: _write_adapters(job, folder, tensors),
            heartbeat=lambda values: state.update(status="running", **values),
            should_interrupt=flag,
            identity=job.identity,
        )
        status = _guarded(job, trainer, checkpoint, screen, state, folder)
        return _finish(job, trainer, status, checkpointer, state, folder, console, flag)


def _guarded(
    job: Job,
    trainer: Trainer,
    checkpoint: Checkpoint | None,
    screen: TrainScreen,
    state: RunState,
    folder: Path,
) -> str:
    """The loop; whatever ends it badly is written into the state file before it is raised again."""
    first_step = checkpoint.step if checkpoint else 0
    try:
        with screen.live(first_step=first_step):
            return trainer.run(checkpoint)
    except OutOfMemoryError as error:
        mended = OutOfMemoryError(error.what, hint=_memory_hint(job))
        _record_failure(job, trainer, state, folder, mended)
        raise mended from error
    except BaseException as error:
        _record_failure(job, trainer, state, folder, error)
        raise


def _record_failure(
    job: Job, trainer: Trainer, state: RunState, folder: Path, error: BaseException
) -> None:
    reason = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    _log_to_file_only(f"{status}: {reason}")
    try:
        state.update(status=status, error=reason)
        write_summary(folder, _summary(job, trainer, status, error=reason))
    except (UserError, OSError):
        # the disk may be what failed; the reason is on its way to the user anyway
        return


def _log_to_file_only(line: str) -> None:
    for handler in _log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(_log.makeRecord("twinkeel", logging.ERROR, "", 0, line, (), None))


def _finish(
    job: Job,
    trainer: Trainer,
    status: str,
    checkpointer: Checkpointer,
    state: RunState,
    folder: Path,
    console: Console,
    flag: InterruptFlag,
) -> int:
    """Restores and checks the best adapter, writes summary and plot, and says the verdict."""
    state.update(phase="saving")
    if status != "interrupted":
        _restore_best(job, trainer, checkpointer, folder)
    summary = _summary(job, trainer, status)
    write_summary(folder, summary)
    write_training_curves(folder)
    state.update(status=status, phase="ended", elapsed_seconds=summary["wall_seconds"])
    lines = verdict_lines(
        summary,
        gap=trainer.progress.best_gap,
        guard=job.config.guard,
        folder=folder,
        next_command=f'python cli.py generate {folder} --prompt "…"',
    )
    console.print()
    for line in lines:
        _log.info(line)
    return flag.exit_code if status == "interrupted" else 0


def _restore_best(job: Job, trainer: Trainer, checkpointer: Checkpointer, folder: Path) -> None:
    """Leaves the best adapter in the learner and in `adapters/`, and checks what was saved on held-out rows."""
    best_step = trainer.stopping.best_step
    best = checkpointer.read(best_step)
    trained, base = read_row_losses(folder, best_step), read_row_losses(folder, 0)
    assert best is not None and trained is not None and base is not None
    adapter = _write_adapters(job, folder, best.state.adapter)
    report = check_saved(
        folder / ADAPTERS,
        adapter,
        learner=trainer.learner,
        batches=job.data.validation,
        trained=trained[0],
        base=base[0],
    )
    if report.problem is not None:
        _log.warning("%s: %s", folder / ADAPTERS, report.problem)


def _write_adapters(job: Job, folder: Path, tensors: Tensors) -> Adapter:
    adapter = job.adapter.with_tensors(
        {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    )
    write_adapter(folder / ADAPTERS, adapter, base_model=job.model.name)
    return adapter


def _summary(
    job: Job, trainer: Trainer, status: str, *, error: str | None = None
) -> dict[str, Any]:
    return summarize(
        trainer,
        config=job.config,
        model=job.model.name,
        status=status,
        num_train_rows=job.data.num_train_rows,
        num_val_rows=job.data.num_val_rows,
        error=error,
    )


# --- small parts ------------------------------------------------------------------------------------------------------


def _write_config(folder: Path, config: RunConfig) -> None:
    import yaml

    plain = to_plain(_with(config, output=None))
    text = "# The settings of this run, fully resolved. Repeat it with: python cli.py train --config FILE\n"
    write_atomic(folder / CONFIG, text + yaml.safe_dump(plain, sort_keys=False))


def _checkpoint_of(job: Job, checkpointer: Checkpointer, folder: Path) -> Checkpoint | None:
    """The checkpoint to go on from, or None to begin anew.

    Raises:
        UserError: it belongs to another model, other data or other settings.
    """
    checkpoint = checkpointer.latest()
    if checkpoint is None:
        _log.info("no checkpoint yet: starting from the first step")
        return None
    saved = checkpoint.trainer["identity"]
    changed = [name for name, value in job.identity.items() if saved.get(name) != value]
    if changed:
        where = {
            "model": f"model.path {job.config.model.path}",
            "data": f"data.path {job.config.data.path}",
            "settings": f"{folder / CONFIG}",
        }
        raise UserError(
            f"{folder}: the {' and the '.join(changed)} changed since step {checkpoint.step} "
            f"({', '.join(where[name] for name in changed)})",
            hint="put it back, or start a new run with: python cli.py train",
        )
    return checkpoint


def _facts(job: Job, learner: Learner, started: float | None) -> dict[str, Any]:
    """What `monitor` shows of a run and the loop does not change."""
    config, plan = job.config, plan_steps(job.config, batches_per_epoch=job.data.batches_per_epoch)
    facts: dict[str, Any] = {
        "backend": config.backend,
        "model": job.model.name,
        "data": job.data.name,
        "bits": config.model.bits,
        "precision": learner.description,
        "rank": config.lora.rank,
        "device": job.device.device,
        "num_train_rows": job.data.num_train_rows,
        "num_val_rows": job.data.num_val_rows,
        "num_parameters": learner.num_parameters,
        "num_trainable": learner.num_trainable,
        "steps_per_epoch": plan.steps_per_epoch,
        "total_steps": plan.total_steps,
        "epochs": config.train.epochs,
        "eval_every": config.eval.every,
        "patience": config.guard.patience,
        "memory_total_gb": learner.memory().total_bytes / 1e9,
        "phase": "loading",
        "step": 0,
    }
    return facts if started is None else facts | {"started": started}


def _total_steps(job: Job) -> int:
    return plan_steps(job.config, batches_per_epoch=job.data.batches_per_epoch).total_steps


def _announce(job: Job, learner: Learner, folder: Path, checkpoint: Checkpoint | None) -> None:
    """What will be trained on what."""
    config, data = job.config, job.data
    adapted = f"{job.adapter.num_layers - job.adapter.first_layer} of {job.adapter.num_layers} layers"
    _log.info("twinkeel · %s", folder)
    _log.info("  model    %s · %s · %s", job.model.name, config.backend, learner.description)
    _log.info(
        "  adapter  rank %d on %s in %s · %s of %s parameters",
        config.lora.rank,
        " ".join(key.rsplit(".", 1)[-1] for key in job.adapter.layer_keys),
        adapted,
        count(learner.num_trainable),
        count(learner.num_parameters),
    )
    _log.info(
        "  data     %s · %d + %d rows · %s target tokens an epoch · %.1f %% padding",
        data.name,
        data.num_train_rows,
        data.num_val_rows,
        count(data.num_targets),
        100 * data.padding,
    )
    _log.info(
        "  plan     %d steps of %d rows, %s epochs · watch it with: python cli.py monitor",
        _total_steps(job),
        config.train.batch_size * config.train.accumulation,
        f"{config.train.epochs:g}",
    )
    if checkpoint is not None:
        _log.info("  resumed  after step %d, from %s", checkpoint.step, checkpoint.path)


def _memory_hint(job: Job) -> str:
    """Which setting to lower, and by what."""
    train = job.config.train
    if train.batch_size > 1:
        half = train.batch_size // 2
        return (
            f"same training in less memory: --batch-size {half} --accumulation "
            f"{train.accumulation * train.batch_size // half}"
        )
    if train.gradient_checkpointing is not True:
        return "same training in less memory: --set train.gradient_checkpointing=true"
    if job.config.model.bits == 16:
        return "hold the base in 4 bits: --set model.bits=4"
    return f"shorter rows: --set data.max_tokens={max(job.data.longest_row // 2, 8)}"


