"""What an evaluation adds to a model card: its numbers for people and, as metadata, for the hub.

Read from `evaluation_report.json`; what is not in it is left out. Rows and answers are in it too, and stay there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from core.records import number

_METRICS = (
    ("classification", "f1", "f1", "F1 (macro)"),
    ("classification", "accuracy", "accuracy", "Accuracy"),
    ("text", "exact_match", "exact_match", "Exact match"),
    ("text", "rouge_l", "rouge", "ROUGE-L"),
    ("losses", "loss", "loss", "Loss (nats per target token)"),
    ("losses", "perplexity", "perplexity", "Perplexity"),
)
"""Section and key in the report; Hugging Face's name of the metric, and ours."""
_SHOWN = (
    ("losses", "loss", "loss (nats per target token)"),
    ("losses", "perplexity", "perplexity"),
    ("classification", "accuracy", "accuracy"),
    ("classification", "f1", "F1 (macro)"),
    ("classification", "unreadable", "share of unreadable answers"),
    ("classification", "strict_json", "share of strictly valid answers"),
    ("text", "exact_match", "exact match"),
    ("text", "rouge_l", "ROUGE-L"),
)


@dataclass(frozen=True, slots=True)
class CardEvaluation:
    """An evaluation, and what it was on."""

    report: Mapping[str, Any]
    data_name: str
    """Of the rows that it was on, without their path."""
    data_id: str | None
    """Their hub id, if they are on the hub."""

    @property
    def split(self) -> str:
        return plain(self.report.get("split") or "test")

    @property
    def has_general(self) -> bool:
        """Whether what was forgotten is measured."""
        return bool(_section(self.report, "general"))

    def results(self) -> list[Any]:
        """A `huggingface_hub.EvalResult` for every number of the adapter's side."""
        from huggingface_hub import EvalResult

        return [
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type=self.data_id.partition(":")[0] if self.data_id else "custom",
                dataset_name=self.data_name,
                dataset_split=self.split,
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 4),
            )
            for section, key, kind, name in _METRICS
            if (value := number(_side(self.report, section, "adapter").get(key))) is not None
        ]

    def doubts(self) -> Iterator[str]:
        """Why someone might not want to use the adapter."""
        losses = _section(self.report, "losses")
        gain, low = number(losses.get("gain")), number(losses.get("gain_low"))
        if gain is not None and low is not None and low <= 0:
            yield f"on the {self.split} rows it is not surely better than the base model (gain {gain:.3f} nats)"
        general = _section(self.report, "general")
        if (rise := number(general.get("rise"))) is not None and general.get("verdict") == "forgotten":
            yield f"it forgot some of the rest: the loss on general texts rose by {rise:.3f} nats"
        gate = _section(self.report, "gate")
        if gate.get("keep") is False:
            yield f"the gate says: {plain(gate.get('line'))}"

    def lines(self) -> Iterator[str]:
        """Markdown lines."""
        yield "## Evaluation\n"
        losses = _section(self.report, "losses")
        rows = number(losses.get("num_rows"))
        amount = "" if rows is None else f", {rows:,.0f} rows"
        yield f"Base model and adapter on the same rows: `{self.data_name}`, {self.split} split{amount}.\n"
        yield "| | base model | with the adapter |\n|---|---|---|"
        for section, key, name in _SHOWN:
            cells = [_cell(_side(self.report, section, side), key) for side in ("base", "adapter")]
            if None not in cells:
                yield f"| {name} | {cells[0]} | {cells[1]} |"
        yield ""
        yield from _difference(losses, "gain", "Loss: {} nats per target token {}.\n", ("lower", "higher"))
        yield from _difference(_section(self.report, "classification"), "f1_gain", "F1: {} {}.\n", ("higher", "lower"))
        yield from self._forgotten()
        if (line := _section(self.report, "gate").get("line")) is not None:
            yield f"Gate: {plain(line)}\n"

    def _forgotten(self) -> Iterator[str]:
        general = _section(self.report, "general")
        rise, kl, flipped = (number(general.get(name)) for name in ("rise", "kl", "flipped"))
        if rise is None:
            return
        rest = "" if kl is None else f"; divergence from the base model {kl:.3f} nats per token"
        rest += "" if flipped is None else f"; {flipped:.1%} of the most likely tokens changed"
        yield f"General texts, which it was not trained on: loss {rise:+.3f} nats per token{rest}.\n"


def read_evaluation(report: object, *, data_name: str, data_path: str, data_id: str | None) -> CardEvaluation | None:
    """A report as the card uses it; None where there is none.

    Args:
        data_name: of the run's data; `data_path` is their setting.
        data_id: their hub id, if they are on the hub.
    """
    if not isinstance(report, Mapping) or not _section(report, "losses"):
        return None
    data = report.get("data")
    if data is None or data in (data_path, data_name):
        return CardEvaluation(report, plain(data_name), data_id)
    return CardEvaluation(report, _name(data), None)


def _difference(section: Mapping[str, Any], key: str, line: str, directions: tuple[str, str]) -> Iterator[str]:
    """A gain with its interval and the first direction; what is below 0 without its sign, with the second."""
    value, low, high = (number(section.get(name)) for name in (key, f"{key}_low", f"{key}_high"))
    if value is not None and low is not None and high is not None:
        is_loss = value < 0
        if is_loss:
            value, low, high = -value, -high, -low
        yield line.format(f"{value:z.3f} [{low:z.3f}, {high:z.3f}]", directions[is_loss])


def _cell(side: Mapping[str, Any], key: str) -> str | None:
    value, low, high = (number(side.get(name)) for name in (key, f"{key}_low", f"{key}_high"))
    if value is None:
        return None
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _side(report: Mapping[str, Any], section: str, side: str) -> Mapping[str, Any]:
    return _section(_section(report, section), side)


def _section(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = report.get(name)
    return found if isinstance(found, Mapping) else {}


def _name(data: object) -> str:
    return plain(PurePath(str(data)).name)


def plain(value: object) -> str:
    """A value in a cell of a Markdown table, in one line and without what Markdown would take for its own."""
    text = "null" if value is None else str(value)
    if isinstance(value, bool):
        text = text.lower()
    elif isinstance(value, float) and math.isfinite(value):
        text = f"{value:g}"
    return re.sub(r"\s+", " ", text).replace("|", "/").replace("`", "'")
