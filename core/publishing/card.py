"""The model card: verdict first, then the run's numbers, its data and settings, and how to load what is published.

Nothing of this machine is in it: no path, no row's text, no name of a user. The metadata is Hugging Face's (`ModelCard`
of huggingface_hub), as https://huggingface.co/docs/hub/model-cards describes it. A licence is never made up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from core.config import RunConfig, to_plain
from core.overfitting import Gap
from core.publishing.base import ROUNDED, PublishedBase
from core.publishing.card_evaluation import CardEvaluation, plain
from core.publishing.card_snippets import Published, Weights, loading_lines
from core.records import gap_of, number
from core.screen import count
from core.settings import values
from core.verdict import NOT_JUDGED, verdict_lines

TAGS = ("lora", "twinkeel")
_LIBRARIES: Mapping[Weights, str] = {
    "adapter": "peft",
    "16-bit": "transformers",
    "mlx-4bit": "mlx",
    "nf4": "transformers",
}
_FORMS: Mapping[Weights, str] = {
    "adapter": "A LoRA adapter for",
    "16-bit": "A LoRA adapter merged into",
    "mlx-4bit": "A LoRA adapter merged, and quantised by MLX to 4 bits, into",
    "nf4": "A LoRA adapter merged, and quantised to NF4, into",
}
BACKENDS = {"mlx": "MLX", "cuda": "PyTorch"}
_QUANTISED = {"mlx": "affine, groups of 64, as MLX does", "cuda": "NF4 with double quantisation"}
_PRIVATE = ("output", "log.project", "log.trackers")
"""Settings that say nothing about the result, and may say something about the machine or its owner."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the card is written from."""

    repo: str
    weights: Weights
    folder: Path
    """The run's, for the folds that judged it; never named."""
    config: RunConfig
    summary: Mapping[str, Any]
    """`training_summary.json`."""
    base: PublishedBase
    data_name: str
    """A file's or folder's name without its path, or a hub id."""
    data_id: str | None
    """The hub id of the data set, if it is one."""
    evaluation: CardEvaluation | None = None
    merge: Mapping[str, Any] | None = None
    """`merge_report.json`."""
    license: Mapping[str, str] = field(default_factory=dict)
    """Keys of the metadata, at least `license`; empty when nobody said."""
    images: tuple[str, ...] = ()
    """Names of the pictures that are uploaded as well."""
    has_gguf: bool = False
    """Whether a merged model comes as GGUF as well."""

    @property
    def gap(self) -> Gap | None:
        return gap_of({**self.summary, "val_loss": self.summary.get("best_val_loss")})

    @property
    def is_measured_here(self) -> bool:
        """Whether the evaluation's numbers are those of the published weights, up to rounding in 16 bits."""
        return self.weights in ("adapter", "16-bit")


def model_card(facts: Facts) -> str:
    """The content of `README.md`."""
    from huggingface_hub import ModelCard

    body = "\n".join(_body(facts))
    return str(ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}"))


# --- metadata ---------------------------------------------------------------------------------------------------------


def _metadata(facts: Facts) -> Any:
    """A `huggingface_hub.ModelCardData`; what is not known is left out."""
    from huggingface_hub import ModelCardData

    results = facts.evaluation.results() if facts.evaluation is not None and facts.is_measured_here else []
    both = facts.weights == "adapter"
    return ModelCardData(
        base_model=facts.base.hub_id,
        base_model_relation=("adapter" if both else "finetune") if facts.base.hub_id else None,
        library_name=_LIBRARIES[facts.weights],
        pipeline_tag="text-generation",
        tags=[*TAGS, "mlx"] if both else list(TAGS),
        datasets=[facts.data_id.partition(":")[0]] if facts.data_id else None,
        model_name=facts.repo.rpartition("/")[2] if results else None,
        eval_results=results or None,
        license=facts.license.get("license"),
        license_name=facts.license.get("license_name"),
        license_link=facts.license.get("license_link"),
    )


# --- the text ---------------------------------------------------------------------------------------------------------


def _body(facts: Facts) -> Iterator[str]:
    yield f"# {facts.repo.rpartition('/')[2]}\n"
    yield f"> **{_verdict(facts)[0]}**\n"
    yield f"{_FORMS[facts.weights]} {_base_link(facts.base)}, made with Twinkeel.\n"
    for line in doubts(facts):
        yield f"- Note: {line}"
    yield ""
    yield from _results(facts)
    if facts.evaluation is not None:
        yield from facts.evaluation.lines()
        if not facts.is_measured_here:
            yield "Measured with the adapter on its base model, before it was merged and quantised.\n"
    yield from _merge(facts)
    yield from _data(facts)
    yield "## How to load it\n"
    yield from loading_lines(
        Published(
            repo=facts.repo,
            weights=facts.weights,
            base=facts.base.name,
            is_base_public=facts.base.hub_id is not None,
            is_mlx_base=facts.base.is_mlx_quantised,
            has_chat_template=facts.base.has_chat_template,
            has_gguf=facts.has_gguf,
        )
    )
    yield from _limitations(facts)
    yield from _settings(facts)


def _verdict(facts: Facts) -> list[str]:
    """As `train` says it at its end, without where things are and what to type."""
    lines = verdict_lines(facts.summary, gap=facts.gap, guard=facts.config.guard, folder=facts.folder, next_command="")
    return [line for line in lines[: lines.index("") if "" in lines else None] if not line.startswith("  continue")]


def doubts(facts: Facts) -> list[str]:
    """Why someone might not want to use it; shown before the upload and at the top of the card."""
    evaluated = facts.evaluation.doubts() if facts.evaluation is not None else ()
    return [*_training_doubts(facts), *evaluated, *_merge_doubts(facts)]


def _training_doubts(facts: Facts) -> Iterator[str]:
    summary, gap = facts.summary, facts.gap
    base_loss = number(summary.get("base_val_loss"))
    if gap is not None and base_loss is not None and gap.val_loss >= base_loss:
        yield (
            f"no better than the {summary.get('start', 'base model')} on held-out rows: "
            f"{base_loss:.3f} → {gap.val_loss:.3f}"
        )
    if gap is not None and gap.grade in ("MODERATE", "CRITICAL"):
        yield f"the gap between held-out and training rows is {gap.value:.3f}, graded {gap.grade}"
    if summary.get(NOT_JUDGED):
        yield f"not judged: {summary[NOT_JUDGED]}"
    if summary.get("status") in ("interrupted", "failed"):
        how = "was interrupted" if summary["status"] == "interrupted" else "failed"
        yield f"training {how} at step {summary.get('steps')} of {summary.get('total_steps')}"


def _results(facts: Facts) -> Iterator[str]:
    yield "## Training\n"
    yield "| | |\n|---|---|"
    for name, value in _rows(facts):
        yield f"| {name} | {value} |"
    yield ""
    yield "Losses and gaps are in nats per target token. The gap compares held-out rows with training rows, measured"
    yield "alike.\n"
    for image, text in (("training_curves.png", "Losses and gap over training"), ("experts.png", "Use of the experts")):
        if image in facts.images:
            yield f"![{text}]({image})\n"


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    summary, gap = facts.summary, facts.gap
    base_loss = number(summary.get("base_val_loss"))
    if gap is not None and base_loss is not None:
        yield f"validation loss, {summary.get('start', 'base model')} → this", f"{base_loss:.3f} → {gap.val_loss:.3f}"
    if gap is not None:
        yield "probe loss (training rows)", f"{gap.probe_loss:.3f}"
        level = f"{facts.config.guard.confidence:.0%}"
        yield "gap", f"{gap.value:.3f} [{gap.low:.3f}, {gap.high:.3f}] ({level} interval), {gap.grade}"
    if (base_gap := number(summary.get("base_gap"))) is not None:
        yield "gap before training", f"{base_gap:.3f}"
    if gap is not None and summary.get("best_step"):
        yield "best at", f"epoch {summary.get('best_epoch')}, step {summary['best_step']}"
    yield "adapter", _adapter(facts)
    stopped = {"early_stopped": ", stopped early", "interrupted": ", interrupted", "failed": ", failed"}
    yield (
        "steps",
        f"{summary.get('steps')} of {summary.get('total_steps')}{stopped.get(str(summary.get('status')), '')}",
    )
    if (epochs := number(summary.get("epochs"))) is not None:
        yield "epochs", f"{epochs:.2f}"
    if (seconds := number(summary.get("wall_seconds"))) is not None:
        yield "time", _time(seconds)
    if (speed := number(summary.get("tokens_per_second"))) is not None:
        yield "speed", f"{speed:,.0f} tokens/s"
    if (memory := number(summary.get("peak_memory_gb"))) is not None:
        yield "memory at most", f"{memory:.1f} GB"
    yield "hardware", _hardware(facts)


def _adapter(facts: Facts) -> str:
    lora = facts.config.lora
    targets = lora.targets if isinstance(lora.targets, str) else " ".join(lora.targets)
    kind = ", rank-stabilised" if lora.rslora else ""
    frozen = f", first {lora.frozen_fraction:.0%} of the layers without" if lora.frozen_fraction else ""
    return plain(f"rank {lora.rank}, alpha {lora.alpha:g}{kind}, on {targets}{frozen}")


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _hardware(facts: Facts) -> str:
    moves = [move for move in facts.summary.get("moves") or [] if isinstance(move, Mapping)]
    if not moves:
        return BACKENDS.get(facts.config.backend, facts.config.backend)
    parts = [f"{BACKENDS.get(str(move.get('backend')), '?')} on {plain(move.get('device'))}" for move in moves]
    steps = [f" from step {move.get('from_step')}" if move.get("from_step") else "" for move in moves]
    return "; ".join(part + step for part, step in zip(parts, steps, strict=True))


def _merge(facts: Facts) -> Iterator[str]:
    """What the check of a merged model saw (`core.merging.report`)."""
    check = (facts.merge or {}).get("check")
    if not isinstance(check, Mapping):
        return
    beside, merged, quantised = (number(check.get(f"{name}_loss")) for name in ("adapter", "merged", "quantised"))
    if beside is None or merged is None:
        return
    rows = number(check.get("num_rows")) or 0
    yield "## Merge\n"
    yield f"Loss of {rows:,.0f} {plain(check.get('rows'))}, in nats per target token ({plain(check.get('where'))}):\n"
    yield "| | |\n|---|---|"
    yield f"| base model and adapter | {beside:.4f} |"
    yield f"| merged | {merged:.4f} |"
    if quantised is not None:
        yield f"| merged, 4 bits | {quantised:.4f} |"
    yield ""


def _merge_doubts(facts: Facts) -> Iterator[str]:
    check = (facts.merge or {}).get("check")
    merged, quantised = (
        number(check.get(name)) if isinstance(check, Mapping) else None for name in ("merged_loss", "quantised_loss")
    )
    if merged is not None and quantised is not None and quantised - merged >= facts.config.guard.grades[0]:
        yield f"quantising it to 4 bits cost {quantised - merged:.3f} nats per target token on the rows of the check"


def _data(facts: Facts) -> Iterator[str]:
    summary, data = facts.summary, facts.config.data
    rows = [number(summary.get(name)) or 0 for name in ("num_train_rows", "num_val_rows")]
    yield "## Data\n"
    if facts.data_id is not None:
        yield f"- [`{facts.data_id}`](https://huggingface.co/datasets/{facts.data_id.partition(':')[0]})"
    else:
        yield f"- `{plain(facts.data_name)}`, not published with this model"
    held_out = f"{rows[1]:,.0f} to validate" if rows[1] else "none held out to validate"
    tested = f", {data.test:.0%} of all rows held out for testing" if data.test else ""
    yield f"- {rows[0]:,.0f} rows to train on, {held_out}{tested}"
    if (targets := number(summary.get("num_target_tokens"))) is not None:
        passes = (
            "over all passes; the loss is taken on answers only"
            if data.train_on == "completions"
            else "over all passes"
        )
        yield f"- {count(targets)} target tokens trained on, {passes}"
    yield f"- rows of at most {data.max_tokens} tokens; longer ones were cut off at the end\n"


def _limitations(facts: Facts) -> Iterator[str]:
    summary, config = facts.summary, facts.config
    yield "## Limitations\n"
    if (val_rows := number(summary.get("num_val_rows"))) and facts.gap is not None:
        yield f"- Judged on {val_rows:,.0f} held-out rows of the same data. Other data may give other results."
        yield from (
            f"- {line.strip()[:1].upper()}{line.strip()[1:]}." for line in _verdict(facts)[1:] if _is_doubt(line)
        )
    if summary.get(NOT_JUDGED):
        yield f"- {summary[NOT_JUDGED][:1].upper()}{summary[NOT_JUDGED][1:]}: nothing says how it does on other rows."
    if facts.evaluation is None or not facts.evaluation.has_general:
        yield "- What it forgot of what the base model could do was not measured."
    if config.model.bits == 4 or facts.base.trained_on:
        yield f"- {_four_bits(facts)}"
    if facts.base.is_rounded:
        yield f"- {ROUNDED}"
    if not facts.license:
        yield "- No licence is stated. That of the base model and of the data apply."
    yield ""


def _is_doubt(line: str) -> bool:
    return "can't tell these grades apart" in line or line.startswith("  experts  ")


def _four_bits(facts: Facts) -> str:
    if facts.base.trained_on:
        trained = f"Trained on `{facts.base.trained_on}`, which MLX quantised"
    else:
        trained = f"Trained on the base model in 4 bits ({_QUANTISED.get(facts.config.backend, 'quantised')})"
    return (
        f"{trained}. On other weights of the same model, 16-bit or quantised in another way, the same adapter gives "
        "slightly different results."
    )


def _settings(facts: Facts) -> Iterator[str]:
    yield "## Settings\n"
    yield "Those that differ from the defaults:\n"
    yield "| setting | value |\n|---|---|"
    shown = public_settings(facts)
    defaults = dict(values(RunConfig()))
    for name, value in _flat(shown):
        default = defaults.get(name)
        if value != (list(default) if isinstance(default, tuple) else default):
            yield f"| `{name}` | `{plain(value)}` |"
    yield "\n<details><summary>All settings</summary>\n"
    import yaml

    yield f"```yaml\n{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip()}\n```\n"
    yield "</details>\n"


def public_settings(facts: Facts) -> dict[str, Any]:
    """The run's settings without what is private: paths become names, the folder and the trackers are left out."""
    shown = to_plain(facts.config)
    for name in _PRIVATE:
        section, _, key = name.rpartition(".")
        (shown[section] if section else shown).pop(key, None)
    if not shown["log"]:
        del shown["log"]
    shown = {name: _without_paths(value) for name, value in shown.items()}
    shown["model"]["path"] = facts.base.trained_on or facts.base.name
    shown["data"]["path"] = facts.data_name
    if facts.config.lora.init_adapter is not None:
        shown["lora"]["init_adapter"] = PurePath(facts.config.lora.init_adapter).name
    return shown


def _without_paths(value: Any) -> Any:
    """A path of this machine becomes its last part, wherever it stands."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~", ".")) and "/" in value:
        return PurePath(value).name
    return value


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name != "data.fields":
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _base_link(base: PublishedBase) -> str:
    if base.hub_id is None:
        return f"`{plain(base.name)}` (not on the Hub)"
    return f"[{base.hub_id}](https://huggingface.co/{base.hub_id})"
