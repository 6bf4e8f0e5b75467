"""`data check` and `data show`: what would be trained on, and what is wrong with it, before a model is loaded."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

import backends
from core.adapter import first_layer, target_keys
from core.adapter_files import find_adapter
from core.architecture import Architecture, read_architecture
from core.config import DataConfig, RunConfig
from core.errors import UserError
from core.files import write_atomic
from core.models import ResolvedModel
from core.protocols import DeviceReport, TokenArray
from core.screen import logging_to
from core.settings import Settings
from core.workflow.data_screen import print_legend, print_report, print_row
from core.workflow.job import changed, find_data, find_model, tokenise
from data.check.collect import ReadRows, check_rows, read_rows
from data.check.page import HEAD_LENGTH, MAX_PIECES, ShownRow, is_page, make_page
from data.check.pieces import pieces
from data.check.report import Report, stops
from data.dataset import TokenizedData
from data.tokenize import load_tokenizer

FOUND = 1
"""Exit code of a strict check that found something."""
_NUM_FIRST = 50
"""Rows of each page, beside those that findings name."""
_MARGIN = 64
"""Tokens behind those that the page shows: the last word, which is masked where it is cut off, is not among them."""
_log = logging.getLogger("twinkeel")


@dataclass(frozen=True)
class _Loaded:
    config: RunConfig
    """With the backend named, and the path at which the data was found."""
    model: ResolvedModel

    @cached_property
    def tokenizer(self) -> Any:
        """Of the model, to show tokens with."""
        return load_tokenizer(self.model.path, trust_remote_code=self.config.model.trust_remote_code)

    def tokenise(self, data: DataConfig) -> TokenizedData:
        """As a run does, with the same cache."""
        return tokenise(data, self.model, runs_code=self.config.model.trust_remote_code)


def check(settings: Settings, *, as_json: bool, page: Path | None, console: Console) -> int:
    """Reads the data as a run would, and says what is wrong with it.

    Args:
        as_json: prints the report for scripts, and nothing else.
        page: file for a page with facts, findings and rows.

    Returns:
        The exit code: 1 with `data.strict` and a problem or a warning, else 0.

    Raises:
        UserError: the data has no row that can be read, or there is no such model.
    """
    if page is not None:
        _refuse_other_file(page)
    with nullcontext() if as_json else logging_to(console):
        loaded = _load(settings.config)
        positions = read_architecture(loaded.model.path).max_positions
        if positions and loaded.config.data.max_tokens > positions:
            _log.warning(
                "data.max_tokens %d is more than the %d positions this model was made for",
                loaded.config.data.max_tokens,
                positions,
            )
        rows = read_rows(loaded.config, loaded.tokenise)
        report = check_rows(rows, loaded.config, num_parameters=num_adapter_parameters(loaded))
        if page is not None:
            _write_page(page, report, rows, loaded)
    if as_json:
        console.out(json.dumps(report.to_json(), indent=1, ensure_ascii=False), highlight=False)
    else:
        print_report(report, console=console, next_command=_next(settings, report, rows))
    if not (settings.config.data.strict and stops(report)):
        return 0
    if not as_json:
        kinds = ", ".join(dict.fromkeys(finding.kind for finding in stops(report)))
        console.print(f"data.strict: {kinds}", markup=False, style="red")
    return FOUND


def show(settings: Settings, rows: Sequence[int], *, split: str, console: Console) -> int:
    """Prints rows of a split, counted from 1, token by token. Returns the exit code.

    Raises:
        UserError: there is no such row.
    """
    with logging_to(console):
        loaded = _load(settings.config)
        there = read_rows(loaded.config, loaded.tokenise)
    some = there.splits.get(split, ())
    wrong = [number for number in rows if not 1 <= number <= len(some)]
    if wrong:
        what = f"there is no row {wrong[0]} of {split}" if len(some) else f"there are no {split} rows"
        hint = (
            f"rows are counted from 1 to {len(some)}"
            if len(some)
            else f"choose from: {', '.join(name for name, part in there.splits.items() if len(part))}"
        )
        raise UserError(what, hint=hint)
    print_legend(console)
    for number in rows:
        console.print()
        print_row(_shown(loaded, there, split, number - 1), console=console)
    return 0


def _load(config: RunConfig) -> _Loaded:
    """Finds model and data as a run would, but loads the tokenizer only."""
    name, device = _device(config)
    data = config.data.model_copy(update={"path": find_data(config.data.path)})
    config = changed(config, backend=name, data=data)
    return _Loaded(config, find_model(config, device))


def _device(config: RunConfig) -> tuple[str, DeviceReport]:
    """The backend and its device; they decide what `model.path auto` means. None has to be installed for a check."""
    backend = backends.get(config.backend)
    device = backend.probe(config.device)
    if device.available:
        return backend.name, device
    return backend.name, DeviceReport(
        backend=backend.name, available=True, device="", accelerator=False, memory_bytes=0
    )


def num_adapter_parameters(loaded: _Loaded) -> int:
    """Of the adapter that a run would train; nothing of the model is read but its configuration."""
    config, architecture = loaded.config, read_architecture(loaded.model.path)
    if config.lora.init_adapter is not None:
        return find_adapter(Path(config.lora.init_adapter)).read(architecture).num_parameters
    return planned_parameters(config, architecture)


def planned_parameters(config: RunConfig, architecture: Architecture) -> int:
    """Parameters of the adapter that `plan_adapter` would draw, without drawing them."""
    shapes = architecture.module_shapes()
    total = 0
    for key in target_keys(config.lora.targets, architecture, router=config.moe.train_router):
        *experts, out_features, in_features = shapes[key]
        total += config.lora.rank * (in_features + out_features) * (experts[0] if experts else 1)
    return total * (architecture.num_layers - first_layer(config.lora, architecture))


def _shown(loaded: _Loaded, there: ReadRows, split: str, index: int, *, num_tokens: int | None = None) -> ShownRow:
    """A row as it can be shown; with `num_tokens`, its first tokens only."""
    rows = there.splits[split]
    ids, is_target, origin = rows.ids[index], rows.is_target[index], rows.origin[index]
    cut, few = _cut(loaded, ids, there.lost_of(origin)), slice(num_tokens)
    is_cut = bool(cut) or len(ids[few]) < len(ids)
    return ShownRow(
        split=split,
        number=index + 1,
        origin=origin,
        num_tokens=len(ids),
        num_targets=int(is_target.sum()),
        pieces=pieces(loaded.tokenizer, ids[few], is_target[few], is_cut=is_cut),
        cut=cut,
    )


def _cut(loaded: _Loaded, ids: TokenArray, lost: str) -> str:
    """Where a row was cut off, in words; empty for a whole one."""
    max_tokens = loaded.config.data.max_tokens
    if len(ids) < max_tokens or ids[-1] == loaded.tokenizer.eos_token_id:
        return ""
    return f"cut off here, at data.max_tokens {max_tokens}" + (f": {lost}" if lost else "")


def _refuse_other_file(page: Path) -> None:
    """Raises: UserError: there is a file that is no page of ours, such as the data itself."""
    if not page.exists():
        return
    with suppress(OSError), open(page, encoding="utf-8", errors="replace") as file:
        if is_page(file.read(HEAD_LENGTH)):
            return
    raise UserError(f"--page: {page} exists and is no page of this check", hint="give another file")


def _write_page(path: Path, report: Report, there: ReadRows, loaded: _Loaded) -> None:
    named = {name for finding in report.findings for row in finding.rows for name in row.names}
    places = {place for place in map(there.place_of, named) if place}
    places |= {("train", number) for number in range(1, min(_NUM_FIRST, len(there.splits["train"])) + 1)}
    order = list(there.splits)
    shown = [
        _shown(loaded, there, split, number - 1, num_tokens=MAX_PIECES + _MARGIN)
        for split, number in sorted(places, key=lambda place: (order.index(place[0]), place[1]))
    ]
    total = sum(len(rows) for rows in there.splits.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, make_page(report, shown, total_rows=total))
    except OSError as error:
        raise UserError(f"--page: {path} can't be written ({error.strerror})", hint="give another file") from None
    _log.info("page: %s", path)


def _next(settings: Settings, report: Report, there: ReadRows) -> str:
    """What to type now: training, or a look at the first row that was found."""
    found = stops(report)
    words = ["train"]
    if found:
        named = (name for finding in found for row in finding.rows for name in row.names)
        split, number = next((place for place in map(there.place_of, named) if place), ("train", 1))
        words = ["data", "show", str(number), *(("--split", split) if split != "train" else ())]
    return shlex.join(["python", "cli.py", *words, *settings.typed_words(without=("--strict",))])
