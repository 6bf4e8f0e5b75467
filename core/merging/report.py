"""What the check of a merged model saw, and what the command says of it all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.handoff import TOLERANCE, HandoffReport

COMPUTE = "float32"
"""Type of the arithmetic in which the two ends have to agree."""


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """Held-out rows through the base model, through it with the adapter, and through the merged model alone."""

    report: HandoffReport
    """From base with adapter to the merged model."""
    base_loss: float
    """Nats per target."""
    quantised_loss: float | None
    """Of the merged model in 4 bits, if it was written so."""
    rows: str
    """Which rows, in words."""
    where: str
    """Type of the arithmetic and device: `float32, CPU (2 cores)`."""
    exact: bool
    """Whether both ends compute in float32 over 16-bit weights, so that they have to agree."""
    base_bits: int
    """Of the base model under the adapter."""

    def lines(self) -> list[str]:
        """For people."""
        report = self.report
        lines = [
            f"loss of {report.num_rows} {self.rows} ({report.num_targets} tokens), {self.where}",
            f"{'base model':<24}{self.base_loss:8.4f}" + ("   (in 4 bits)" if self.base_bits == 4 else ""),
            f"{'with adapter':<24}{report.source_loss:8.4f}",
            f"{'merged':<24}{report.target_loss:8.4f}   {report.loss_difference:+.1e}; of a row at most "
            f"{report.max_difference:.1e}",
        ]
        if self.quantised_loss is not None:
            difference = self.quantised_loss - report.target_loss
            lines.append(f"{'merged, 4 bits':<24}{self.quantised_loss:8.4f}   {difference:+.1e} to merged")
        return lines

    def warning(self) -> str | None:
        """A line if the merged model is not what was trained."""
        difference = self.report.loss_difference
        if abs(difference) <= TOLERANCE:
            return None
        if self.exact:
            return (
                f"the merged model's loss differs by {difference:+.1e} nats from base and adapter, more than "
                f"{TOLERANCE:g}: rounding took part of the adapter away; merge with --dtype float32 to see"
            )
        if self.base_bits == 4:
            return (
                f"the merged model's loss differs by {difference:+.1e} nats from base and adapter: the adapter was "
                "trained on 4-bit weights and now sits in 16-bit ones"
            )
        return f"the merged model's loss differs by {difference:+.1e} nats from base and adapter, in 16-bit arithmetic"

    def to_dict(self) -> dict[str, Any]:
        """For `merge_report.json`; losses in nats per target token."""
        report = self.report
        return {
            "rows": self.rows,
            "num_rows": report.num_rows,
            "num_targets": report.num_targets,
            "where": self.where,
            "base_bits": self.base_bits,
            "base_loss": self.base_loss,
            "adapter_loss": report.source_loss,
            "merged_loss": report.target_loss,
            "quantised_loss": self.quantised_loss,
            "difference": report.loss_difference,
            "max_row_difference": report.max_difference,
            "same_token": report.greedy_agreement,
        }


def in_block(word: str, lines: list[str]) -> list[str]:
    """Lines under a word at the left, as the verdict has them."""
    return [f"  {word if number == 0 else '':<8} {line}" for number, line in enumerate(lines)]
