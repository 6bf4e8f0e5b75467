"""What can be concluded from runs side by side, in sentences."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from itertools import combinations

from core.comparison.compare import ComparedRun, Comparison
from core.comparison.rows import NEGLIGIBLE, PairedDifference
from core.overfitting import GRADES
from core.records import number

_MANY = 3
"""Runs from which the lowest of them owes something to having been chosen."""


def notes(comparison: Comparison, *, only_luck: bool) -> Iterator[str]:
    """The answer first, then what it does not say.

    Args:
        only_luck: whether nothing but the seed differs.
    """
    runs = comparison.runs
    yield from _different_data(runs)
    yield from _losses(comparison)
    if not comparison.settings:
        yield "The settings are the same."
    elif only_luck:
        yield "Only the seed differs: how far the runs lie apart is what luck alone does."
    yield from _unfinished(runs)
    yield from _evaluations(runs)


def _different_data(runs: Sequence[ComparedRun]) -> Iterator[str]:
    names = dict.fromkeys(run.data for run in runs if run.data is not None)
    if len(names) > 1:
        groups = (f"{', '.join(run.name for run in runs if run.data == data)} on {data}" for data in names)
        yield f"Different data ({'; '.join(groups)}): losses, gaps and scores can't be compared between them."


def _losses(comparison: Comparison) -> Iterator[str]:
    """The run with the lowest validation loss against each of the others."""
    runs = comparison.runs
    places = [place for place, run in enumerate(runs) if number(run.figures.get("best_val_loss")) is not None]
    if len(places) < 2:
        yield f"No validation losses to compare: {_without_losses(runs)}."
        return
    lowest = _lowest(comparison, places)
    others = [place for place in range(len(runs)) if place != lowest]
    found = {place: _pair(comparison, lowest, place) for place in others}
    known = {place: pair for place, pair in found.items() if isinstance(pair, PairedDifference)}
    for place, pair in known.items():
        if pair.value > 0:  # the lowest is so by other rows than these two share
            yield _verdict(runs[place], runs[lowest], pair.reversed())
        else:
            yield _verdict(runs[lowest], runs[place], pair)
    same_data = {place: pair for place, pair in found.items() if runs[place].data == runs[lowest].data}
    for place, why in same_data.items():
        if isinstance(why, str):
            yield f"{runs[lowest].name} and {runs[place].name}: their losses can't be compared, {why}."
    if len(known) >= _MANY - 1 and _on_the_same_rows(comparison, [lowest, *known]):
        yield (
            f"The lowest of {len(known) + 1} on the same rows looks better than it is, for it was chosen by them; "
            "test rows tell: python cli.py evaluate RUN"
        )


def _on_the_same_rows(comparison: Comparison, places: Sequence[int]) -> bool:
    pairs = (_pair(comparison, one, other) for one, other in combinations(places, 2))
    return all(isinstance(pair, PairedDifference) and pair.is_all for pair in pairs)


def _without_losses(runs: Sequence[ComparedRun]) -> str:
    names = [run.name for run in runs if number(run.figures.get("best_val_loss")) is None]
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} none"


def _lowest(comparison: Comparison, places: Sequence[int]) -> int:
    """The run that is no worse than any other on the rows it shares with them; else the lowest loss in the table."""

    def beats(one: int) -> int:
        pairs = (_pair(comparison, one, other) for other in places if other != one)
        return sum(isinstance(pair, PairedDifference) and pair.value <= 0 for pair in pairs)

    return min(
        places, key=lambda place: (-beats(place), number(comparison.runs[place].figures["best_val_loss"]) or 0.0)
    )


def _pair(comparison: Comparison, one: int, other: int) -> PairedDifference | str:
    """`one` less `other`, whichever way round it was measured."""
    if one < other:
        return comparison.pairs[one, other]
    found = comparison.pairs[other, one]
    if isinstance(found, str):
        return found
    return found.reversed()


def _verdict(lower: ComparedRun, higher: ComparedRun, pair: PairedDifference) -> str:
    """Args: pair: the lower's loss less the higher's."""
    assert pair.value <= 0
    rows = f"on {'the same' if pair.is_all else 'the shared'} {pair.num_rows} validation rows"
    if pair.is_negligible:
        more = pair.reversed()
        return (
            f"{lower.name} and {higher.name} are as good as each other: their validation losses differ by "
            f"{more.value:z.3f} [{more.low:z.3f}, {more.high:z.3f}], less than {NEGLIGIBLE:g} nats "
            f"({100 * NEGLIGIBLE:g} % of perplexity), {rows}."
        )
    if pair.is_clear:
        near, far = sorted(map(abs, (pair.low, pair.high)))
        by = f"{abs(pair.value):.3f} [{near:.3f}, {far:.3f}] {rows}{_but(lower, higher)}"
        return f"{lower.name} is better than {higher.name}: its validation loss is lower by {by}."
    ends = f"{pair.value:z.3f} [{pair.low:z.3f}, {pair.high:z.3f}]"
    return f"{lower.name} and {higher.name} can't be told apart: their validation losses differ by {ends} {rows}."


def _but(lower: ComparedRun, higher: ComparedRun) -> str:
    """Where the better run overfits more."""
    grades = [run.figures.get("grade") for run in (lower, higher)]
    if any(grade not in GRADES for grade in grades) or GRADES.index(grades[0]) <= GRADES.index(grades[1]):  # type: ignore[arg-type]
        return ""
    return f", though its gap is {grades[0]}, not {grades[1]}"


def _unfinished(runs: Sequence[ComparedRun]) -> Iterator[str]:
    for run in runs:
        if not run.is_complete:
            why = f" ({run.error})" if run.error else ""
            yield f"{run.name}: {run.status.replace('_', ' ')}{why}; its figures are those so far."


def _evaluations(runs: Sequence[ComparedRun]) -> Iterator[str]:
    measured = [run for run in runs if run.evaluated_on is not None]
    if len({run.evaluated_on for run in measured}) > 1:
        groups = "; ".join(f"{run.name} on {run.evaluated_on}" for run in measured)
        yield f"Evaluated on different rows ({groups}): these losses and scores can't be compared."
    noted = [run for run in runs if run.evaluation_note is not None]
    yield from (f"{run.name}: {run.evaluation_note}" for run in noted)
    others = [run for run in runs if run.evaluated_on is None and run not in noted]
    if measured and others:
        yield f"{others[0].name} is not evaluated: python cli.py evaluate {shlex.quote(str(others[0].folder))}"
