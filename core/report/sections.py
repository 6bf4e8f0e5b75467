"""What `evaluate` wrote, as a report shows it: losses, scores, confusions, rows, what was forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.comparison.figures import interval
from core.general import CategoryScores, GeneralReport, WorstText
from core.records import number, whole
from core.report.curves import Table

SIDES = (("base", "base model"), ("adapter", "adapter"))
_MAX_LABELS = 30
"""Labels up to which a confusion is drawn."""
_MAX_ROWS = 10


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    hit: bool
    """Whether the answer is right."""


@dataclass(frozen=True, slots=True)
class Confusion:
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    """True label, and how many rows got each answer."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    title: str
    table: Table


@dataclass(frozen=True, slots=True)
class EvaluationSection:
    source: str
    lines: tuple[str, ...]
    tables: tuple[Table, ...]
    confusions: tuple[Confusion, ...]
    rows: tuple[RowGroup, ...]


@dataclass(frozen=True, slots=True)
class ForgettingSection:
    headline: str
    facts: tuple[tuple[str, str], ...]
    table: Table | None
    worst: Table | None


def evaluation_section(report: Mapping[str, Any]) -> EvaluationSection | None:
    """None where nothing was evaluated, or the file is damaged."""
    losses = part(report, "losses")
    if not losses:
        return None
    labels, text = part(report, "classification"), part(report, "text")
    where = [str(report[name]) for name in ("data", "split", "backend") if report.get(name)]
    num_rows, num_targets = whole(losses.get("num_rows")), whole(losses.get("num_targets"))
    sizes = [f"{num_rows:,} rows" if num_rows else "", f"{num_targets:,} target tokens" if num_targets else ""]
    tables = [
        _losses_table(losses),
        *([_scores_table(labels)] if labels else []),
        *([_texts_table(text)] if text else []),
    ]
    if labels and (classes := _classes_table(labels)):
        tables.append(classes)
    return EvaluationSection(
        source=" · ".join([*where, *(size for size in sizes if size)]),
        lines=tuple(_lines(losses, labels)),
        tables=tuple(tables),
        confusions=tuple(_confusions(labels)),
        rows=tuple(_rows(part(report, "rows"))),
    )


def gate_line(report: Mapping[str, Any]) -> str | None:
    """What the gate said, in a line."""
    line = part(report, "gate").get("line")
    return str(line) if line else None


def _lines(losses: Mapping[str, Any], labels: Mapping[str, Any]) -> Iterator[str]:
    gain, ends = number(losses.get("gain")), interval(number(losses.get("gain_low")), number(losses.get("gain_high")))
    if gain is not None:
        verdict = f": {losses['verdict']}" if losses.get("verdict") else ""
        yield f"Gain {gain:z.3f} {ends or ''} nats per token{_chance(losses)}{verdict}."
    f1 = number(labels.get("f1_gain"))
    if f1 is not None:
        ends = interval(number(labels.get("f1_gain_low")), number(labels.get("f1_gain_high")))
        verdict = f": {labels['verdict']}" if labels.get("verdict") else ""
        yield f"F1 gain {f1:z.3f} {ends or ''}{_chance(labels)}{verdict}."


def _chance(values: Mapping[str, Any]) -> str:
    p_value = number(values.get("p_value"))
    if p_value is None:
        return ""
    return " (p < 0.001)" if p_value < 0.001 else f" (p = {p_value:.3f})"


def _losses_table(losses: Mapping[str, Any]) -> Table:
    rows = tuple(
        (name, *(_three(part(losses, side).get(figure)) for figure in ("loss", "perplexity"))) for side, name in SIDES
    )
    return Table("Loss on these rows", ("", "loss", "perplexity"), rows)


_SCORES = (
    ("accuracy", "accuracy"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("f1", "F1"),
    ("unreadable", "unreadable"),
    ("strict_json", "strict JSON"),
)


def _scores_table(labels: Mapping[str, Any]) -> Table:
    known = [
        (key, name)
        for key, name in _SCORES
        if any(number(part(labels, side).get(key)) is not None for side, _ in SIDES)
    ]
    rows = []
    for side, title in SIDES:
        figures = part(labels, side)
        cells = [_three(figures.get(key)) for key, _ in known]
        rows.append((title, *cells, interval(number(figures.get("f1_low")), number(figures.get("f1_high"))) or "–"))
    return Table(
        "Answers: precision, recall and F1 are means over the labels",
        ("", *(name for _, name in known), "F1, interval"),
        tuple(rows),
    )


def _classes_table(labels: Mapping[str, Any]) -> Table | None:
    """F1 of each label, on both sides."""
    sides = {side: part(part(labels, side), "per_class") for side, _ in SIDES}
    names = list(dict.fromkeys(name for classes in sides.values() for name in classes))
    if not names:
        return None
    rows = []
    for name in names[:_MAX_LABELS]:
        figures = {side: part(sides[side], name) for side, _ in SIDES}
        cells = [_three(figures[side].get("f1")) for side, _ in SIDES]
        support = next((found for side in figures.values() if (found := whole(side.get("support"))) is not None), None)
        rows.append((str(name), *cells, "–" if support is None else f"{support:,}"))
    more = len(names) - _MAX_LABELS
    return Table(
        "F1 by label", ("label", "base model", "adapter", "rows"), tuple(rows), f"and {more} more" if more > 0 else ""
    )


def _texts_table(text: Mapping[str, Any]) -> Table:
    rows = tuple(
        (name, *(_three(part(text, side).get(figure)) for figure in ("exact_match", "rouge_l"))) for side, name in SIDES
    )
    return Table("Texts of the answers", ("", "exact match", "ROUGE-L"), rows)


def _confusions(labels: Mapping[str, Any]) -> Iterator[Confusion]:
    names = [str(name) for name in labels.get("labels") or []]
    if not names or len(names) > _MAX_LABELS:
        return
    for side, title in SIDES:
        matrix: Any = part(labels, side).get("confusion")
        if not _is_matrix(matrix, len(names)):
            continue
        columns = [*names, "unreadable", *("" for _ in matrix[0])][: len(matrix[0])]
        rows = tuple(
            (name, tuple(Cell(f"{count:,}", place == index) for place, count in enumerate(matrix[index])))
            for index, name in enumerate(names)
        )
        yield Confusion(f"Answers of the {title}, by true label", tuple(columns), rows)


def _is_matrix(matrix: Any, num_labels: int) -> bool:
    return (
        isinstance(matrix, list)
        and len(matrix) >= num_labels
        and all(isinstance(row, list) and len(row) == len(matrix[0]) >= num_labels for row in matrix)
        and all(whole(count) is not None for row in matrix for count in row)
    )


def _rows(rows: Mapping[str, Any]) -> Iterator[RowGroup]:
    for name, title, sign in (("worst", "Rows that got worse", 1), ("best", "Rows that got better", -1)):
        known = [row for row in rows.get(name) or [] if isinstance(row, dict)]
        listed = [row for row in known if sign * (number(row.get("difference")) or 0.0) > 0][:_MAX_ROWS]
        if listed:
            cells = tuple(
                (
                    str(row.get("origin") or row.get("row")),
                    *(_three(row.get(key)) for key in ("base_loss", "adapter_loss", "difference")),
                )
                for row in map(_named_losses, listed)
            )
            yield RowGroup(
                title, Table("Losses in nats per target token", ("row", "base model", "adapter", "difference"), cells)
            )


def _named_losses(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's losses under the names `base_loss` and `adapter_loss`."""
    return {
        **row,
        "base_loss": row.get("base_loss", row.get("base")),
        "adapter_loss": row.get("adapter_loss", row.get("adapter")),
    }


# --- forgetting -------------------------------------------------------------------------------------------------------


def forgetting_section(general: Mapping[str, Any]) -> ForgettingSection | None:
    """Of `core.general.GeneralReport.to_dict`; None where it was not measured."""
    rise = number(general.get("rise"))
    if rise is None:
        return None
    ends = interval(number(general.get("rise_low")), number(general.get("rise_high")))
    facts = [
        ("loss", f"{_three(general.get('base_loss'))} → {_three(general.get('adapter_loss'))} nats per token"),
        ("divergence from the base", f"{_three(general.get('kl'))} nats per token"),
        ("most likely token changed", _percent(general.get("flipped"))),
    ]
    if num_rows := whole(general.get("num_rows")):
        facts.append(("texts", f"{num_rows:,}"))
    return ForgettingSection(_headline(general, rise, ends), tuple(facts), _categories(general), _worst_texts(general))


def _headline(general: Mapping[str, Any], rise: float, ends: str | None) -> str:
    """As `evaluate` says it; a shorter one for a report that another version wrote."""
    try:
        return _restored(general).lines[0]
    except (TypeError, AttributeError):
        words = {"forgotten": "Forgotten", "improved": "Nothing forgotten", "unchanged": "Nothing forgotten that shows"}
        answer = words.get(str(general.get("verdict")), "Elsewhere")
        return f"{answer}: the loss on general texts moved by {rise:+.3f} {ends or ''}".rstrip()


def _restored(general: Mapping[str, Any]) -> GeneralReport:
    """From what `GeneralReport.to_dict` and JSON made of it. Raises: TypeError, AttributeError: it is another's."""
    values = {name: value for name, value in general.items() if name != "verdict"}
    values["categories"] = {name: CategoryScores(**scores) for name, scores in values["categories"].items()}
    values["worst"] = [WorstText(**text) for text in values["worst"]]
    return GeneralReport(**values)


def _categories(general: Mapping[str, Any]) -> Table | None:
    found = part(general, "categories")
    names = [name for name in found if isinstance(found[name], dict)]
    if not names:
        return None
    ordered = sorted(names, key=lambda name: -(number(found[name].get("rise")) or 0.0))
    rows = tuple(
        (
            str(name),
            *(_three(found[name].get(key)) for key in ("base_loss", "adapter_loss", "rise", "kl")),
            _percent(found[name].get("flipped")),
        )
        for name in ordered
    )
    return Table("By category", ("category", "base model", "adapter", "rise", "divergence", "changed"), rows)


def _worst_texts(general: Mapping[str, Any]) -> Table | None:
    listed = [text for text in general.get("worst") or [] if isinstance(text, dict)][:_MAX_ROWS]
    if not listed:
        return None
    rows = tuple(
        (
            excerpt(str(text.get("prompt") or ""), 60),
            excerpt(str(text.get("answer") or ""), 40),
            _three(text.get("rise")),
        )
        for text in listed
    )
    return Table("Rise in nats per token", ("text", "answer", "rise"), rows)


# --- small things -----------------------------------------------------------------------------------------------------


def part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a JSON object; empty where there is none."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def excerpt(text: str, length: int) -> str:
    """The text's beginning, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def _three(value: object) -> str:
    known = number(value)
    return "–" if known is None else f"{known:z,.3f}"


def _percent(value: object) -> str:
    known = number(value)
    return "–" if known is None else f"{100 * known:.1f} %"
