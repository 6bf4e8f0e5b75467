"""`merge`: a run's adapter in the weights of its base model, as a folder that needs no adapter any more."""

from __future__ import annotations

import importlib
import logging
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from core.adapter import Adapter
from core.config import DataConfig, RunConfig
from core.errors import OutOfMemoryError, UserError
from core.files import to_json, write_atomic
from core.float32 import use_whole_float32
from core.handoff import NUM_BATCHES, compare_ends, without_effect
from core.merging import gguf as merge_gguf
from core.merging.folder import (
    REPORT,
    Draft,
    copy_side_files,
    folder_bytes,
    gigabytes,
    readable,
    refuse_full_disk,
    refuse_quantised,
    refuse_taken,
    write_config,
)
from core.merging.gguf import GgufReport
from core.merging.merge import MergePlan, plan_merge, write_merged
from core.merging.report import COMPUTE, MergeCheck, in_block
from core.models import ResolvedModel
from core.models.folder import count_parameters
from core.protocols import Batch, Replay
from core.screen import logging_to
from core.workflow.after import Flags, TrainedRun, find_trained, opened_run
from core.workflow.job import changed, load_rows

MERGED, MERGED_4BIT = "merged", "merged-4bit"
"""Default folders in the run folder."""
_SIXTEEN = ".16-bit"
"""Of a 4-bit merge, while it is made: the 16-bit model."""
_MAX_POSITIONS = 8192
"""Of the rows that are replayed, padding included: a minute on a CPU with a small model."""
_OVERHEAD_BYTES = 500_000_000
_WIDE, _NARROW = 4.4, 2.2
"""Bytes of memory for a parameter in float32 and in 16 bits, with a tenth for the rest."""
_log = logging.getLogger("twinkeel")


@dataclass(frozen=True, slots=True)
class _Options:
    output: Path
    kind: str
    """`auto`, `float32`, `bfloat16` or `float16`."""
    four_bits: Any
    """The backend's module that writes 4 bits, if asked for."""
    gguf: str | None
    converter: Sequence[str]


def merge(
    folder: Path,
    *,
    output: str | None,
    dtype: str,
    quantize: int | None,
    gguf: str | None,
    max_shard_gb: float,
    check: bool,
    flags: Flags,
    console: Console,
) -> int:
    """Writes the merged model and holds it against base and adapter. Returns the exit code.

    Args:
        output: the new folder; None: `merged`, or `merged-4bit`, in the run folder.
        dtype: of the weights: `auto` (the base's own), `float32`, `bfloat16` or `float16`.
        quantize: 4 for 4-bit weights, of the backend's kind.
        gguf: write a GGUF file as well, of this type (`core.merging.gguf.TYPES`).
        max_shard_gb: of a file, in GB (10^9 bytes).

    Raises:
        UserError: no adapter yet, a quantised base, no room, no converter, or a merged model that does nothing; no
            folder is left. Or the GGUF file is not right: the folder is there without it.
    """
    with logging_to(console):
        if gguf is not None and gguf not in merge_gguf.TYPES:
            raise UserError(f"--gguf {gguf}: no such type", hint=f"one of {', '.join(merge_gguf.TYPES)}")
        converter = merge_gguf.find_converter() if gguf else []
        use_whole_float32()
        run = find_trained(folder, flags=flags)
        refuse_quantised(run.model, run.architecture)
        four_bits = _four_bits(run) if quantize else None
        target = Path(output) if output else run.folder / (MERGED_4BIT if quantize else MERGED)
        refuse_taken(target)
        plan = plan_merge(
            run.model.path,
            run.adapter,
            run.architecture,
            dtype=dtype,
            max_shard_bytes=round(max_shard_gb * 1e9),
            name=run.model.name,
        )
        refuse_full_disk(target, _disk_bytes(run, plan, four_bits=quantize is not None, gguf=gguf))
        options = _Options(target, dtype, four_bits, gguf, converter)
        if gguf:
            _log.info("asking llama.cpp's converter whether it knows this model")
            merge_gguf.check_convertible(converter, run.model.path)
        with Draft(target) as draft:
            lines, problem = _write_all(run, plan, draft, options, check=check, console=console)
            draft.keep()
        gguf_files = [path.name for path in target.glob("*.gguf")]
        for line in ["", *lines, *_next(target, folder, options, gguf_files)]:
            _log.info(line)
        if problem is not None:
            raise UserError(
                f"{problem.what}; {target} holds the merged model, without a GGUF file",
                hint=f"{problem.hint}; to try again, give another --output or remove that folder",
            ) from problem
    return 0


def _four_bits(run: TrainedRun) -> Any:
    """The backend's module that writes 4-bit folders. Raises: UserError: not of this model, or not here."""
    module = importlib.import_module(f"backends.{run.backend.name}.merge")
    module.refuse_4bit(run.architecture.num_experts)
    return module


def _disk_bytes(run: TrainedRun, plan: MergePlan, *, four_bits: bool, gguf: str | None) -> int:
    """What lies on the disk at most at a time."""
    parameters = run.architecture.num_parameters
    needed = float(plan.num_bytes)
    if four_bits:  # embeddings and head may stay in 16 bits
        needed += parameters * 0.6 + 4.0 * run.architecture.vocab_size * run.architecture.hidden_size
    if gguf:
        needed += parameters * merge_gguf.BITS.get(gguf, 16.0) / 8
    return round(needed)


def _write_all(
    run: TrainedRun, plan: MergePlan, draft: Draft, options: _Options, *, check: bool, console: Console
) -> tuple[list[str], UserError | None]:
    """Fills the draft; says what is in it, and what is wrong with the GGUF file, which is left out then."""
    base, code = run.model.path, run.config.model.trust_remote_code
    sixteen = draft.path / _SIXTEEN if options.four_bits else draft.path
    sixteen.mkdir(exist_ok=True)
    with _progress(console, "merging", plan.num_bytes) as on_bytes:
        write_merged(sixteen, plan, on_bytes=on_bytes)
    write_config(sixteen, base, run.architecture, dtype=plan.dtype)
    copy_side_files(base, sixteen, code=code)
    gguf, problem = _write_gguf(run, sixteen, options)
    if options.four_bits:
        _log.info("quantising: %s", options.four_bits.DESCRIPTION)
        options.four_bits.write_4bit(sixteen, draft.path, device=run.config.device)
        copy_side_files(base, draft.path, code=code)
        readable(draft.path)
    checked = _check(run, sixteen, draft.path if options.four_bits else None) if check else None
    written = _described(plan, draft.path, options)
    if options.four_bits:
        if gguf is not None:
            gguf.path.replace(draft.path / gguf.path.name)
        shutil.rmtree(sixteen)
    write_atomic(draft.path / REPORT, to_json(_record(run, plan, options, gguf, checked)))
    return _said(run, plan, options, written, gguf, checked), problem


def _write_gguf(run: TrainedRun, folder: Path, options: _Options) -> tuple[GgufReport | None, UserError | None]:
    """The file, if one is asked for; or why there is none: the merged model is whole without it."""
    if options.gguf is None:
        return None, None
    _log.info("converting to GGUF")
    name = f"{run.model.name.rstrip('/').rpartition('/')[2]} {run.folder.name}"
    stem = run.folder.name or MERGED
    try:
        path = merge_gguf.convert_to_gguf(options.converter, folder, kind=options.gguf, stem=stem, name=name)
        return merge_gguf.check_gguf(path, folder, run.architecture), None
    except UserError as problem:
        for path in folder.glob("*.gguf"):
            path.unlink()
        return None, problem


@contextmanager
def _progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield lambda count: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


# --- the check --------------------------------------------------------------------------------------------------------


def _check(run: TrainedRun, merged: Path, quantised: Path | None) -> MergeCheck | None:
    """Replays held-out rows at each end, one model in memory at a time.

    None, with a line, where there are no rows that this tokenizer takes, or a model does not fit.

    Raises:
        UserError: the merged model says what the base model says.
    """
    if (config := _check_config(run)) is None:
        return None
    four_bits = quantised is not None or config.model.bits == 4
    try:
        batches, rows = _rows(run, num_batches=_num_batches(run, four_bits=four_bits))
    except UserError as error:
        _log.warning("the merged model was not checked: no rows to check it on (%s)", error.what)
        return None
    try:
        with opened_run(replace(run, config=config)) as opened:
            base = opened.use("base").replay(batches)
            adapted = opened.use("adapter").replay(batches)
        nothing = without_effect(run.adapter)
        plain = _replay(run, config, merged, nothing, batches, bits=16)
        four = None if quantised is None else _replay(run, config, quantised, nothing, batches, bits=4)
    except OutOfMemoryError as error:
        _log.warning("the merged model was not checked: %s; %s", error.what, _ELSEWHERE)
        return None
    report = compare_ends(adapted, plain, base=base)
    if report.does_nothing:
        raise UserError(
            "the merged model says the same as the base model: rounding took the whole adapter away",
            hint="merge with --dtype float32, or train longer",
        )
    exact = config.model.bits == 16 and config.model.dtype == COMPUTE
    found = MergeCheck(
        report=report,
        base_loss=float(base.nll.mean()),
        quantised_loss=None if four is None else float(four.nll.mean()),
        rows=rows,
        where=f"{config.model.dtype if config.model.dtype != 'auto' else '16-bit'}, {run.device.device}",
        exact=exact,
        base_bits=config.model.bits,
    )
    if (warning := found.warning()) is not None:
        _log.warning(warning)
    return found


_ELSEWHERE = "the same command on a machine with more memory checks it"


def _check_config(run: TrainedRun) -> RunConfig | None:
    """The run's settings for the check: in float32 where that fits, on an accelerator else in the run's type."""
    parameters = run.architecture.num_parameters
    room = _free_memory(run)
    if parameters * _WIDE + _OVERHEAD_BYTES <= room:
        return _with_type(run.config, COMPUTE)
    if run.device.accelerator and run.config.model.dtype != COMPUTE:
        if parameters * _NARROW + _OVERHEAD_BYTES <= room:
            return run.config
        needed = parameters * _NARROW + _OVERHEAD_BYTES
    else:
        needed = parameters * _WIDE + _OVERHEAD_BYTES
    _log.warning(
        "the merged model was not checked: it needs %s of memory, and %s are free; %s",
        gigabytes(needed),
        gigabytes(room),
        _ELSEWHERE,
    )
    return None


def _with_type(config: RunConfig, dtype: str) -> RunConfig:
    return changed(config, model=config.model.model_copy(update={"dtype": dtype}))


def _free_memory(run: TrainedRun) -> float:
    """Bytes that a model may take: of an accelerator its own memory, which a Mac's shares with the system."""
    free = float(psutil.virtual_memory().available)
    total = float(run.device.memory_bytes or free)
    return total if run.device.accelerator and run.backend.name == "cuda" else min(free, total)


def _replay(
    run: TrainedRun, config: RunConfig, folder: Path, nothing: Adapter, batches: Sequence[Batch], *, bits: int
) -> Replay:
    """The rows through a folder by itself, opened as any model is."""
    model = ResolvedModel(
        path=folder, name=MERGED, revision=None, source="folder", note="", parameters=count_parameters(folder)
    )
    _log.info("loading the merged model%s", " in 4 bits" if bits == 4 else "")
    plain = changed(config, model=config.model.model_copy(update={"bits": bits, "cache_packed": False}))
    learner = run.backend.open(plain, model, nothing)
    try:
        return learner.replay(batches)
    finally:
        learner.close()


def _num_batches(run: TrainedRun, *, four_bits: bool) -> int:
    """MLX's 4-bit products are some 20 times slower than others on a CPU."""
    return 1 if four_bits and run.backend.name == "mlx" and not run.device.accelerator else NUM_BATCHES


def _rows(run: TrainedRun, *, num_batches: int) -> tuple[list[Batch], str]:
    """Rows that the run held out, as far as they are at hand, and what they are, in words.

    Raises:
        UserError: neither the run's data nor the shipped sample can be read with this tokenizer.
    """
    try:
        data = load_rows(run.config, run.model, run.architecture, say_findings=False)
        held_out, name = (data.validation, "validation rows") if data.num_val_rows else (data.probe, "training rows")
    except UserError as error:
        _log.info("the run's data can't be read (%s): checking on rows of the shipped sample", error.what)
        sample = changed(run.config, data=DataConfig(max_tokens=256, train_on="all"))
        held_out = load_rows(sample, run.model, run.architecture, say_findings=False).validation
        name = "rows of the shipped sample"
    chosen: list[Batch] = []
    for batch in held_out[:num_batches]:
        if chosen and sum(one.num_tokens for one in chosen) + batch.num_tokens > _MAX_POSITIONS:
            break
        chosen.append(batch)
    return chosen, name


# --- what is said -----------------------------------------------------------------------------------------------------


def _described(plan: MergePlan, folder: Path, options: _Options) -> str:
    """Type, size and files."""
    files = len(list(folder.glob("*.safetensors")))
    kind = options.four_bits.DESCRIPTION if options.four_bits else plan.dtype
    return f"{kind} · {gigabytes(folder_bytes(folder))} in {files} file{'s' if files > 1 else ''}"


def _record(
    run: TrainedRun, plan: MergePlan, options: _Options, gguf: GgufReport | None, checked: MergeCheck | None
) -> dict[str, Any]:
    return {
        "run": run.folder.name,
        "base_model": Path(run.model.name).name if run.model.source == "folder" else run.model.name,
        "base_revision": run.model.revision,
        "adapter": run.adapter.fingerprint,
        "dtype": plan.dtype,
        "changed_tensors": plan.num_changed,
        "tensors": len(plan.targets),
        "quantised": options.four_bits.DESCRIPTION if options.four_bits else None,
        "gguf": None if gguf is None else {"file": gguf.path.name, "type": gguf.kind},
        "check": None if checked is None else checked.to_dict(),
    }


def _said(
    run: TrainedRun,
    plan: MergePlan,
    options: _Options,
    written: str,
    gguf: GgufReport | None,
    checked: MergeCheck | None,
) -> list[str]:
    lines = in_block("merged", [f"{options.output} · {written}"])
    lines += in_block("base", [f"{run.model.name}: {plan.num_changed} of {len(plan.targets)} tensors changed"])
    if checked is not None:
        lines += in_block("check", checked.lines())
    if gguf is not None:
        lines += in_block(
            "gguf", [f"{gguf.path.name} · {gguf.kind} · {gigabytes(gguf.num_bytes)} · read back and compared"]
        )
    return lines


def _next(target: Path, folder: Path, options: _Options, gguf_files: Sequence[str]) -> list[str]:
    """What to type now."""
    place = shlex.quote(str(target))
    is_mlx = options.four_bits is not None and "mlx" in options.four_bits.__name__
    # 4-bit weights are one backend's own
    backend = "" if options.four_bits is None else f" --backend {'mlx' if is_mlx else 'cuda'}"
    loads = {
        "transformers": f'AutoModelForCausalLM.from_pretrained("{target}")',
        "mlx-lm": f'mlx_lm.generate --model {place} --prompt "…"',
        "vLLM": f"vllm serve {place}",
        "train on": f"python cli.py train{backend} --model {place} --data ROWS.jsonl",
    }
    if options.four_bits:
        loads = {name: loads[name] for name in ("mlx-lm" if is_mlx else "transformers", "train on")}
    for name in gguf_files:
        loads["llama.cpp"] = f"llama-cli -m {shlex.quote(str(target / name))}"
    lines = [f"{name:<13}{how}" for name, how in loads.items()]
    push = f"python cli.py push {shlex.quote(str(folder))} --merged {place} --repo USER/NAME"
    return [*in_block("use", lines), *in_block("publish", [push])]
