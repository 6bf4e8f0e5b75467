"""A report as one HTML file that needs nothing else: no script, nothing that is loaded, everything escaped."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from core.report.charts import swatch
from core.report.curves import (
    HEAT_WORDS,
    Table,
    evaluations_table,
    expert_charts,
    experts_table,
    gap_chart,
    loss_chart,
)
from core.report.report import RunReport
from core.report.rows import RowsSection
from core.report.sections import evaluation_section, forgetting_section, gate_line, part

HEAD_LENGTH = 200
"""Characters of a file in which `is_page` finds what it looks for."""
_MARK = '<meta name="generator" content="twinkeel report">'
_HERE = Path(__file__).resolve().parent
_SECTIONS = (
    ("curves", "Curves and gap"),
    ("rows", "Rows"),
    ("evaluation", "Evaluation"),
    ("forgetting", "Forgetting"),
    ("experts", "Experts"),
    ("data", "Data"),
    ("settings", "Settings"),
    ("environment", "Environment"),
    ("next", "Next"),
)


@dataclass(frozen=True, slots=True)
class PageFinding:
    """One thing that the data check found."""

    level: str
    text: str
    hint: str = ""
    rows: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DataSection:
    """What is to be said of the data."""

    missing: str = ""
    """Why the data were not looked at again; empty where they were."""
    table: Table | None = None
    lines: tuple[str, ...] = ()
    findings: Sequence[PageFinding] = field(default=())


def is_page(head: str) -> bool:
    """Whether a file that begins so was written by `make_page`."""
    return _MARK in head


def make_page(report: RunReport, *, rows: RowsSection | str, data: DataSection) -> str:
    """The whole page.

    Args:
        rows: the section on single rows, or why there is none.
    """
    section = None if isinstance(rows, str) else rows
    general = part(report.evaluation, "general")
    experts = expert_charts(report)
    forgetting = forgetting_section(general)
    memorised = None if section is None or section.headline is None else f"Memorised: {section.headline}."
    also = [memorised, forgetting and forgetting.headline, gate_line(report.evaluation)]
    return str(
        _template().render(
            r=report,
            mark=_MARK,
            style=(_HERE / "page.css").read_text(encoding="utf-8"),
            subtitle=_subtitle(report),
            sections=[entry for entry in _SECTIONS if entry[0] != "experts" or experts],
            also=[line for line in also if line],
            charts=[chart for chart in (loss_chart(report), gap_chart(report)) if chart is not None],
            evaluations=evaluations_table(report),
            rows=section,
            rows_missing=rows if section is None else "",
            evaluation=evaluation_section(report.evaluation),
            forgetting=forgetting,
            experts=experts,
            experts_table=experts_table(report),
            heat=HEAT_WORDS,
            data=data,
            quoted=shlex.quote(str(report.folder)),
            swatch=swatch,
            written=time.strftime("%Y-%m-%d"),
        )
    )


def _subtitle(report: RunReport) -> str:
    state = report.snapshot.state
    model = str(state.get("model") or "").rstrip("/").rsplit("/", 1)[-1]
    return " · ".join(
        [part for part in (model, str(state.get("data") or ""), str(state.get("backend") or "")) if part]
        + [report.status]
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(_HERE)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return made.get_template("page.html")
