"""`compare`: what differs between runs, in their settings and in what came of them.

Losses are per target token, so they can be held against each other only on the same rows with the same tokens;
`core.comparison.rows` finds out whether they can, and by how much two runs differ there.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console

from core.comparison.figures import OF_TRAINING, EvaluatedRows, Figure, Value, evaluated_figures, figures_of, interval
from core.comparison.rows import JudgedRows, PairedDifference, difference, read_judged
from core.config import BASE_MODEL, RunConfig
from core.errors import UserError
from core.evaluation.report import read_evaluation_of
from core.files import disk_errors, to_json, write_atomic
from core.folds import FoldsVerdict, is_folds, judge, read_folds
from core.monitor import RunReader, Snapshot
from core.records import gap_of, number, whole
from core.run import COMPLETE, CONFIG, RUNS, NewFolder
from core.run_summary import summary_of
from core.settings import load_config
from core.settings import values as settings_of

TABLE, RESULT, PLOT = "compare.csv", "compare.json", "compare.png"
NOTHING = "–"
_IGNORED = frozenset({"output"})
_LUCK = frozenset({"train.seed"})


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """A run, or folds with the means of their runs, as its files show it."""

    folder: Path
    name: str
    config: RunConfig
    status: str
    """`core.monitor.Snapshot.status`, or how many folds are done."""
    is_complete: bool
    data: str | None
    model: str | None
    steps_per_epoch: int | None
    figures: Mapping[str, Value]
    evaluated_on: EvaluatedRows | None
    """None where there is no evaluation."""
    judged: JudgedRows | None
    error: str | None = None
    evaluation_note: str | None = None
    """Why an evaluation that is there is not used."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs side by side."""

    runs: tuple[ComparedRun, ...]
    settings: Mapping[str, tuple[Any, ...]]
    """Dotted name -> value of each run, of the settings that are not the same in all."""
    pairs: Mapping[tuple[int, int], PairedDifference | str]
    """Places of two runs -> the first's validation loss less the second's; or why that can't be said."""
    best: Mapping[str, int]
    """Figure -> place of the run that is best in it, where one is."""
    notes: tuple[str, ...] = field(default=())
    """What can be concluded, a sentence each."""

    @property
    def lines(self) -> tuple[Figure, ...]:
        """The figures that any run may have."""
        return _lines(self.runs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `runs` with their figures, `settings`, `best`, `pairs`, `notes`."""
        return {
            "runs": [
                {
                    "folder": str(run.folder),
                    "name": run.name,
                    "status": run.status,
                    "error": run.error,
                    "data": run.data,
                    "model": run.model,
                    "evaluated_on": None if run.evaluated_on is None else asdict(run.evaluated_on),
                    **run.figures,
                }
                for run in self.runs
            ],
            "settings": {name: [_plain(value) for value in values] for name, values in self.settings.items()},
            "best": {name: self.runs[place].name for name, place in self.best.items()},
            "pairs": [
                {
                    "runs": [self.runs[one].name, self.runs[other].name],
                    **({"not_comparable": found} if isinstance(found, str) else asdict(found)),
                }
                for (one, other), found in self.pairs.items()
            ],
            "notes": list(self.notes),
        }


def compare(folders: Sequence[Path], *, output: str | None, as_json: bool, console: Console) -> int:
    """Prints runs side by side, and writes table and plot.

    Args:
        output: folder for them; None for a new one under `runs/`.
        as_json: prints the comparison for scripts, and writes nothing.

    Returns:
        The exit code.

    Raises:
        UserError: less than two runs, the same one twice, or a folder that can't be written to.
    """
    _refuse_too_few(folders)
    comparison = make_comparison(folders)
    if as_json:
        console.out(to_json(comparison.to_dict()), highlight=False, end="")
        return 0
    from core.comparison.screen import print_comparison

    folder = _output_folder(output)
    written = _write(comparison, folder)
    print_comparison(comparison, console=console, written=written)
    return 0


def _refuse_too_few(folders: Sequence[Path]) -> None:
    if len(folders) < 2:
        raise UserError(
            f"compare: one run ({folders[0]}) has nothing to be compared with",
            hint="name two or more: python cli.py compare RUN RUN",
        )
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (before := seen.setdefault(folder.resolve(), folder)) is not folder:
            names = f"{folder}" if str(folder) == str(before) else f"{before} and {folder}"
            raise UserError(f"compare: {names}: the same run twice", hint="name each run once; see them with: ls runs")


def make_comparison(folders: Sequence[Path]) -> Comparison:
    """Reads the runs and finds out what differs. Raises `UserError` for a `config.yaml` that can't be read."""
    names = _names(folders)
    runs = tuple(_read_run(folder, name) for folder, name in zip(folders, names, strict=True))
    pairs = {(one, other): _difference(runs[one], runs[other]) for one, other in combinations(range(len(runs)), 2)}
    same_rows = all(isinstance(found, PairedDifference) and found.is_all for found in pairs.values())
    settings = differing_settings([run.config for run in runs])
    best = _best(runs, pairs, same_rows=same_rows)
    from core.comparison.words import notes

    found = Comparison(runs, settings, pairs, best)
    return Comparison(
        runs, settings, pairs, best, tuple(notes(found, only_luck=bool(settings) and set(settings) <= _LUCK))
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' last names; the whole path where two have the same."""
    last = [folder.resolve().name for folder in folders]
    return [name if last.count(name) == 1 else str(folder) for folder, name in zip(folders, last, strict=True)]


def differing_settings(configs: Sequence[RunConfig]) -> dict[str, tuple[Any, ...]]:
    """Dotted name -> each configuration's value, where they are not all the same."""
    columns = [dict(settings_of(config)) for config in configs]
    rows = {name: tuple(column[name] for column in columns) for name in columns[0] if name not in _IGNORED}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values[1:])}


def _difference(one: ComparedRun, other: ComparedRun) -> PairedDifference | str:
    for run in (one, other):
        if run.judged is None:
            return f"{run.name} has no losses of validation rows at a best step"
    assert one.judged is not None and other.judged is not None
    same_model = (one.model, one.config.model.bits) == (other.model, other.config.model.bits) and all(
        run.config.start == BASE_MODEL for run in (one, other)
    )
    return difference(one.judged, other.judged, same_name=one.data == other.data, same_model=same_model)


def _lines(runs: Sequence[ComparedRun]) -> tuple[Figure, ...]:
    return figures_of(run.evaluated_on.split for run in runs if run.evaluated_on is not None)


def _best(
    runs: Sequence[ComparedRun], pairs: Mapping[tuple[int, int], PairedDifference | str], *, same_rows: bool
) -> dict[str, int]:
    """Figure -> place of the only run that is best in it, among those that ended well and can be compared."""
    best = {}
    for figure in _lines(runs):
        if figure.better is None or (figure.kind == "loss" and not same_rows):
            continue
        values = [(_rank(figure, run), place) for place, run in enumerate(runs) if run.is_complete]
        known = sorted((value, place) for value, place in values if value is not None)
        evaluated = {run.evaluated_on for run in runs if run.figures.get(figure.name) is not None}
        models = {run.model for run in runs if run.figures.get(figure.name) is not None}
        if (
            len(known) < 2
            or (figure.kind == "evaluation" and len(evaluated) != 1)
            or (figure.kind == "model" and len(models) != 1)
        ):
            continue
        if figure.name == "best_val_loss" and _are_as_good(pairs, known[0][1], known[1][1]):
            continue
        # gaps of one grade are alike: what is told apart are grades
        name = "grade" if figure.name == "gap" else figure.name
        shown = [
            str(runs[place].figures[name]) if name == "grade" else figure.show(runs[place].figures[name])
            for _, place in known[:2]
        ]
        if known[0][0] < known[1][0] and shown[0] != shown[1]:
            best[figure.name] = known[0][1]
    return best


def _are_as_good(pairs: Mapping[tuple[int, int], PairedDifference | str], one: int, other: int) -> bool:
    pair = pairs[min(one, other), max(one, other)]
    return isinstance(pair, PairedDifference) and pair.is_negligible


def _rank(figure: Figure, run: ComparedRun) -> float | None:
    """Lower is better. A gap below 0 is no better than none."""
    value = number(run.figures.get(figure.name))
    if value is None:
        return None
    if figure.name == "gap":
        return max(value, 0.0)
    return value if figure.better == "low" else -value


# --- one run ----------------------------------------------------------------------------------------------------------


def _read_run(folder: Path, name: str) -> ComparedRun:
    config = load_config(folder / CONFIG)
    if is_folds(folder):
        return _read_folds(folder, name, config)
    snapshot = RunReader(folder).poll()
    summary = summary_of(snapshot)
    state = snapshot.state
    figures = _figures(snapshot, summary)
    evaluation = read_evaluation_of(folder)
    evaluated, evaluated_on = evaluated_figures(evaluation.report)
    return ComparedRun(
        folder=folder,
        name=name,
        config=config,
        status=snapshot.status,
        is_complete=snapshot.status in COMPLETE,
        data=_text(state.get("data")),
        model=_text(state.get("model")) or _text(summary.get("model")),
        steps_per_epoch=whole(state.get("steps_per_epoch")),
        figures={**figures, **evaluated},
        evaluated_on=evaluated_on,
        judged=read_judged(folder, whole(figures["best_step"])),
        error=_text(state.get("error")) if snapshot.status == "failed" else None,
        evaluation_note=evaluation.note,
    )


def _figures(snapshot: Snapshot, summary: Mapping[str, Any]) -> dict[str, Value]:
    """From the summary; of a run that has none, as far as it has come, from its state and its records."""
    state, newest = snapshot.state, snapshot.newest
    best_step = whole(summary.get("best_step")) or whole(state.get("best_step"))
    at_best = next((record for record in snapshot.evaluations if record.get("step") == best_step), {})
    first = next((record for record in snapshot.evaluations if record.get("step") == 0), {})
    gap = gap_of({**summary, "val_loss": summary.get("best_val_loss")}) or gap_of(at_best)
    return {
        "base_val_loss": _first(summary.get("base_val_loss"), state.get("base_val_loss"), first.get("val_loss")),
        "best_val_loss": gap.val_loss if gap else _first(summary.get("best_val_loss"), state.get("best_val_loss")),
        "gap": gap.value if gap else None,
        "gap_interval": interval(gap.low, gap.high) if gap else None,
        "gap_low": gap.low if gap else None,
        "gap_high": gap.high if gap else None,
        "grade": gap.grade if gap else None,
        "base_gap": _first(summary.get("base_gap"), first.get("gap")),
        "best_step": best_step or None,
        "best_epoch": _first(summary.get("best_epoch"), at_best.get("epoch")),
        "steps": whole(summary.get("steps")) or snapshot.step,
        "num_target_tokens": _first(summary.get("num_target_tokens")),
        "wall_seconds": _first(summary.get("wall_seconds"), snapshot.elapsed_seconds),
        "tokens_per_second": _first(summary.get("tokens_per_second"), newest.get("tokens_per_second")) or None,
        "peak_memory_gb": _first(summary.get("peak_memory_gb"), newest.get("memory_gb")),
    }


def _read_folds(folder: Path, name: str, config: RunConfig) -> ComparedRun:
    """The folds' means; the best step is their median, the spread is the mean's t-interval."""
    results = read_folds(folder)
    verdict = judge(results, config.guard)
    first = RunReader(folder / "fold-1").poll()
    return ComparedRun(
        folder=folder,
        name=name,
        config=config,
        status=f"{len(verdict.done) if verdict else 0} of {len(results)} folds",
        is_complete=verdict is not None and len(verdict.done) == len(results),
        data=_text(first.state.get("data")),
        model=_text(first.state.get("model")),
        steps_per_epoch=whole(first.state.get("steps_per_epoch")),
        figures=_folds_figures(verdict),
        evaluated_on=None,
        judged=read_judged(folder, None),
    )


def _folds_figures(verdict: FoldsVerdict | None) -> dict[str, Value]:
    figures: dict[str, Value] = dict.fromkeys(figure.name for figure in OF_TRAINING)
    if verdict is None:
        return figures
    gap = verdict.gap
    return figures | {
        "base_val_loss": verdict.base_val_loss.mean,
        "best_val_loss": verdict.best_val_loss.mean,
        "gap": gap.mean,
        "gap_interval": interval(gap.low, gap.high),
        "gap_low": gap.low,
        "gap_high": gap.high,
        "grade": verdict.grade,
        "best_step": verdict.median_best_step,
    }


def _first(*candidates: object) -> float | None:
    """The first that is a number."""
    return next((value for value in map(number, candidates) if value is not None), None)


def _text(value: object) -> str | None:
    return str(value) if value else None


# --- what is written --------------------------------------------------------------------------------------------------


def _output_folder(output: str | None) -> Path:
    """The folder to write to. Raises: UserError: there is something else."""
    if output is None:
        return _new_folder()
    folder = Path(output)
    if folder.is_dir():
        others = sorted({item.name for item in folder.iterdir()} - {TABLE, RESULT, PLOT})
        if not others:
            return folder
        raise UserError(f"--output: {folder} is not empty (it has {others[0]})", hint="name a new folder")
    if folder.exists():
        raise UserError(f"--output: {folder} is a file", hint="name a new folder")
    return folder


def _new_folder() -> Path:
    """`runs/compare-<MMDD>-<HHMM>`, with a number when that exists; without a state file, it is no run."""
    base = RUNS / f"compare-{datetime.now():%m%d-%H%M}"
    path, times = base, 2
    while path.exists():
        path, times = base.with_name(f"{base.name}-{times}"), times + 1
    return path


def _write(comparison: Comparison, folder: Path) -> Path:
    from core.comparison.plot import write_plot

    with NewFolder(folder) as new, disk_errors(folder):
        write_atomic(folder / TABLE, _csv(comparison))
        write_atomic(folder / RESULT, to_json(comparison.to_dict()))
        write_plot(folder / PLOT, comparison)
        new.keep()
    return folder


def _csv(comparison: Comparison) -> str:
    """A line for each run: folder, status, the figures as numbers, then the settings that differ."""
    text = io.StringIO()
    names = list(
        dict.fromkeys(name for run in comparison.runs for name in run.figures if not name.endswith("_interval"))
    )
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "folder", "status", *names, *comparison.settings])
    for place, run in enumerate(comparison.runs):
        settings = [_cell(values[place]) for values in comparison.settings.values()]
        writer.writerow([run.name, run.folder, run.status, *(run.figures.get(name) for name in names), *settings])
    return text.getvalue()


def _cell(value: Any) -> Any:
    plain = _plain(value)
    return json.dumps(plain) if isinstance(plain, list | dict | bool) or plain is None else plain


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def shown_setting(value: Any) -> str:
    """A setting as `--set` takes it."""
    plain = _plain(value)
    if isinstance(plain, float):
        return f"{plain:g}"
    return plain if isinstance(plain, str) else json.dumps(plain)


__all__ = ["Comparison", "compare", "make_comparison"]
