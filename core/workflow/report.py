"""`report`: one page that shows a run. What the data are like is looked at again where they are still there."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from core.comparison.rows import data_fingerprint
from core.config import RunConfig
from core.errors import UserError
from core.files import user_path, write_atomic
from core.models import ResolvedModel, resolve_model
from core.report.curves import Table
from core.report.page import HEAD_LENGTH, DataSection, PageFinding, is_page, make_page
from core.report.report import RunReport, read_report
from core.report.rows import RowsSection, read_rows, rows_section
from core.report.sections import excerpt
from core.run import SPLIT
from core.screen import logging_to
from core.workflow.job import find_data, tokenise
from data.check.collect import check_prepared
from data.check.pieces import pieces
from data.check.report import Report
from data.dataset import Prepared, TokenizedData, split_data
from data.sources import source_fingerprint
from data.tokenize import load_tokenizer
from data.training import RunData

PAGE = "report.html"
"""In the run folder."""
MAX_ROWS = 20_000
"""Rows of a data set that are gone over again for a report."""
_MAX_ROW_NAMES = 8
_EXCERPT_TOKENS = 80
_EXCERPT = 110
_log = logging.getLogger("twinkeel")


@dataclass(frozen=True, slots=True)
class FoundData:
    """The run's data as they are here and now."""

    missing: str = ""
    """Why they can't be shown; empty where they can."""
    report: Report | None = None
    prepared: Prepared | None = None
    model: ResolvedModel | None = field(default=None)


def report(folder: Path, *, output: str | None, console: Console) -> int:
    """Writes the page of a run, finished or not. Returns the exit code.

    Args:
        output: file to write; None for `report.html` in the run folder.

    Raises:
        UserError: folds, or a place that can't be written to or holds another file.
    """
    path = folder / PAGE if output is None else Path(output)
    refuse_other_file(path)
    with logging_to(console):
        found = read_report(folder)
        data = find_run_data(found)
        page = make_page(found, rows=_rows(found, data), data=data_section(found, data))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, page)
        except OSError as error:
            raise UserError(f"--output: {path} can't be written ({error.strerror})", hint="give another file") from None
    console.print(Text(found.verdict.headline), soft_wrap=True)
    console.print(Text(f"  page      {path}   ({len(page.encode()) / 1000:,.0f} kB)"), soft_wrap=True)
    if data.missing:
        console.print(Text(f"  data      {data.missing}", "dim"), soft_wrap=True)
    console.print(Text(f"  next      open it in a browser: {path.resolve().as_uri()}"), soft_wrap=True)
    return 0


def _rows(report: RunReport, data: FoundData) -> RowsSection | str:
    judged = read_rows(report)
    if isinstance(judged, str):
        return judged
    names = [(fate.split, fate.row) for fate in judged.named]
    return rows_section(judged, texts=texts_of(report.config, data, names), without_texts=data.missing)


def refuse_other_file(path: Path) -> None:
    """Raises: UserError: there is a folder, or a file that is no report, such as a run's own."""
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder", hint=f"give a file, such as {path / PAGE}")
    if not path.exists():
        return
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        if is_page(file.read(HEAD_LENGTH)):
            return
    raise UserError(f"{path}: exists and is no report", hint="give another file with --output")


# --- data -------------------------------------------------------------------------------------------------------------


def find_run_data(report: RunReport) -> FoundData:
    """Reads, splits and checks the rows again as the run did, if they are the same rows still."""
    config, folder = report.config, report.folder
    check = f"python cli.py data check --data {shlex.quote(config.data.path)}"
    num_rows = _num_rows(folder)
    if num_rows > MAX_ROWS:
        return FoundData(f"With {num_rows:,} rows, the data were not gone over again: {check}")
    path = find_data(config.data.path)
    if user_path(path).exists():
        return _look_again(report, path)
    with _offline_hub():
        try:
            is_cached = source_fingerprint(path) is not None
        except UserError:  # a name on the hub
            return FoundData(f"The data are on the hub: {check}")
        if is_cached:
            return _look_again(report, path)
    return FoundData(f"The data are not here any more ({config.data.path}), so they can't be looked at again.")


@contextmanager
def _offline_hub() -> Iterator[None]:
    """The hub's libraries look into their caches only: nothing is downloaded for a page."""
    from huggingface_hub import constants

    modules: list[Any] = [constants]
    with suppress(ImportError):  # without `datasets` there are no data of the hub
        from datasets import config

        modules.append(config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _look_again(report: RunReport, path: str) -> FoundData:
    config, folder = report.config, report.folder
    try:
        model = _find_model(config)
        data = config.data.model_copy(update={"path": path})
        tokenised = tokenise(data, model, runs_code=config.model.trust_remote_code)
        prepared = split_data(tokenised, data, seed=config.train.seed)
    except (UserError, OSError) as error:
        what = error.what if isinstance(error, UserError) else str(error)
        return FoundData(f"The data could not be looked at again: {what}")
    if not _is_the_same(folder, prepared, config):
        return FoundData(f"The data changed since the run: what is in {path} now was not what it trained on.")
    return FoundData(report=_check(tokenised, prepared, report), prepared=prepared, model=model)


def _find_model(config: RunConfig) -> ResolvedModel:
    """The model's folder, for its tokenizer; nothing is downloaded for a page."""
    return resolve_model(
        config.model.path,
        revision=config.model.revision,
        backend=config.backend,
        bits=config.model.bits,
        memory_bytes=0,
        accelerator=False,
        offline=True,
    )


def _num_rows(folder: Path) -> int:
    try:
        with open(folder / SPLIT, "rb") as file:
            return sum(1 for _ in file) - 1
    except OSError:
        return 0


def _is_the_same(folder: Path, prepared: Prepared, config: RunConfig) -> bool:
    """Whether rows, tokens and split are those that the run's checkpoints are bound to, or, without one, its rows."""
    data = RunData(prepared, config)
    if (fingerprint := data_fingerprint(folder)) is not None:
        return data.fingerprint == fingerprint
    with suppress(OSError):
        lines = (folder / SPLIT).read_text(encoding="utf-8").splitlines()[1:]
        return lines == [f"{split},{row},{origin}" for split, row, origin in data.split_rows()]
    return False


def _check(tokenised: TokenizedData, prepared: Prepared, report: RunReport) -> Report:
    trainable = report.snapshot.state.get("num_trainable")
    return check_prepared(
        tokenised, prepared, report.config, num_parameters=trainable if isinstance(trainable, int) else None
    )


def data_section(report: RunReport, data: FoundData) -> DataSection:
    """Facts, findings and what to expect, or why there are none."""
    found = data.report
    if found is None:
        return DataSection(missing=data.missing)
    rows = tuple(
        (split, f"{some.rows:,}", f"{some.tokens:,}", f"{some.targets:,}")
        for split, some in found.facts.splits.items()
        if some.rows
    )
    labels = list(found.facts.labels.items())
    listed = ", ".join(f"{label} {rows:,}" for label, rows in labels[:12])
    lengths = ", ".join(f"{value:,} {name}" for name, value in found.facts.quantiles.items())
    lines = [
        f"Tokens a row: {lengths}. Cut off at {found.facts.max_tokens:,}: {found.facts.share_cut:.1%} of the rows.",
        *([f"Labels: {listed}{', …' if len(labels) > 12 else ''}."] if labels else []),
        *([] if found.findings else ["The check found nothing wrong with the rows."]),
    ]
    return DataSection(
        table=Table(f"Rows of {found.facts.name}", ("split", "rows", "tokens", "targets"), rows),
        lines=tuple(lines),
        findings=[
            PageFinding(
                finding.level,
                finding.text,
                finding.hint,
                tuple(
                    f"{row.origin}: {row.detail}" if row.detail else row.origin for row in finding.rows[:_MAX_ROW_NAMES]
                ),
            )
            for finding in found.findings
        ],
    )


def texts_of(config: RunConfig, data: FoundData, names: Collection[tuple[str, int]]) -> Mapping[tuple[str, int], str]:
    """Excerpts of rows, by split and number, secrets as dots; empty where the data are not here.

    Args:
        names: rows to show.
    """
    if data.prepared is None or data.model is None or not names:
        return {}
    tokenizer = load_tokenizer(data.model.path, trust_remote_code=config.model.trust_remote_code)
    found = {}
    for split, number in names:
        rows = getattr(data.prepared, split)
        if number < len(rows):
            found[split, number] = _excerpt(
                tokenizer, rows.ids[number], rows.is_target[number], max_tokens=config.data.max_tokens
            )
    return found


def _excerpt(tokenizer: Any, ids: Any, is_target: Any, *, max_tokens: int) -> str:
    """The end of the prompt, and the answer's beginning. Secrets are found in the row from its first token on."""
    stop = int(is_target.argmax()) + _EXCERPT_TOKENS
    is_cut = stop < len(ids) or len(ids) >= max_tokens
    shown = pieces(tokenizer, ids[:stop], is_target[:stop], is_cut=is_cut)
    asked = " ".join("".join(one.text for one in shown if not one.is_target and not one.is_special).split())
    answer = "".join(one.text for one in shown if one.is_target and not one.is_special)
    asked = asked if len(asked) <= _EXCERPT // 2 else f"…{asked[-_EXCERPT // 2 :]}"
    return f"{asked} → {excerpt(answer, _EXCERPT // 2)}" if asked else excerpt(answer, _EXCERPT)
