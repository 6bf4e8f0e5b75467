"""The model card: what it says, what it never says, and that the hub can read its metadata."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from core.config import RunConfig
from core.models.fingerprint import model_fingerprint
from core.publishing.base import ROUNDED, PublishedBase, published_base
from core.publishing.card import Facts, doubts, model_card, public_settings
from core.publishing.card_evaluation import read_evaluation
from core.settings import preset_names, resolve, values
from tests.tiny import make_model

HOME = "/home/carol"
SUMMARY: dict[str, Any] = {
    "backend": "mlx",
    "model": f"{HOME}/models/base",
    "status": "early_stopped",
    "error": None,
    "steps": 90,
    "total_steps": 120,
    "epochs": 2.25,
    "start": "base model",
    "base_val_loss": 2.5,
    "best_val_loss": 1.25,
    "best_step": 80,
    "best_epoch": 2,
    "probe_loss": 1.1875,
    "gap": 0.0625,
    "gap_low": 0.0312,
    "gap_high": 0.0944,
    "base_gap": 0.0156,
    "grade": "GOOD",
    "not_judged": None,
    "routing": None,
    "num_train_rows": 1200,
    "num_val_rows": 300,
    "num_target_tokens": 45_678,
    "tokens_per_second": 2345.6,
    "peak_memory_gb": 21.44,
    "wall_seconds": 4328.0,
    "moves": [
        {"backend": "mlx", "device": "Apple M3 Max", "from_step": 0},
        {"backend": "cuda", "device": "NVIDIA L4", "from_step": 40},
    ],
}
REPORT: dict[str, Any] = {
    "run": f"{HOME}/runs/one",
    "model": f"{HOME}/models/base",
    "data": "letters.jsonl",
    "split": "test",
    "losses": {
        "base": {"loss": 2.4, "perplexity": 11.023},
        "adapter": {"loss": 1.3, "perplexity": 3.669},
        "gain": 1.1,
        "gain_low": 0.9,
        "gain_high": 1.3,
        "num_rows": 150,
    },
    "classification": {
        "base": {"accuracy": 0.4, "f1": 0.3125, "f1_low": 0.25, "f1_high": 0.375, "unreadable": 0.2},
        "adapter": {"accuracy": 0.9, "f1": 0.875, "f1_low": 0.8125, "f1_high": 0.9375, "unreadable": 0.0},
        "f1_gain": 0.5625,
        "f1_gain_low": 0.5,
        "f1_gain_high": 0.625,
    },
    "text": None,
    "rows": {"worst": [{"origin": "letters.jsonl:3", "text": "Dear Ms Private,"}], "best": []},
    "general": {"rise": 0.0123, "kl": 0.045, "flipped": 0.0678, "verdict": "unchanged"},
    "gate": {"keep": True, "line": "Keep it: better on the test rows, nothing forgotten", "reasons": []},
}
BASE = PublishedBase("org/base", "org/base")


def settings(**sections: Any) -> RunConfig:
    own: dict[str, Any] = {
        "backend": "cuda",
        "output": f"{HOME}/runs/one",
        "model": {"path": f"{HOME}/models/base", "bits": 16},
        "data": {"path": f"{HOME}/letters.jsonl", "test": 0.1},
        "lora": {"rank": 8},
        "log": {"project": "carols-secret"},
    }
    return RunConfig.model_validate(own | sections)


def facts(*, summary: dict[str, Any] | None = None, report: dict[str, Any] | None = None, **values: Any) -> Facts:
    known: dict[str, Any] = {
        "repo": "carol/letters",
        "weights": "adapter",
        "folder": Path(HOME) / "runs/one",
        "config": settings(),
        "summary": SUMMARY | (summary or {}),
        "base": BASE,
        "data_name": "letters.jsonl",
        "data_id": None,
        "evaluation": read_evaluation(
            report, data_name="letters.jsonl", data_path=f"{HOME}/letters.jsonl", data_id=None
        ),
    }
    return Facts(**(known | values))


def text_of(**values: Any) -> str:
    return model_card(facts(**values))


def data_of(card: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])  # type: ignore[index]
    assert yaml.safe_load(ModelCard(card).data.to_yaml()) == data
    return data


def model_index_to_results(card: str) -> tuple[list[EvalResult], str]:
    """As the hub's library reads the metadata back, and the model's name."""
    name, results = model_index_to_eval_results(data_of(card)["model-index"])
    return results, name


def table(card: str) -> dict[str, list[str]]:
    """First cell of every table's row -> the others."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in card.splitlines() if line[:2] == "| "]
    return {row[0].strip("`"): [cell.strip("`") for cell in row[1:]] for row in rows}


def first_lines(card: str) -> str:
    body = card.split("\n---\n", 1)[1]
    return "\n".join(body.strip().splitlines()[:8])


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_verdict_stands_first_and_the_numbers_are_the_run_s() -> None:
    card = text_of(images=("training_curves.png",))
    assert "> **Good generalization. Train/val loss difference: 0.06**" in first_lines(card)
    assert "A LoRA adapter for [org/base](https://huggingface.co/org/base)" in first_lines(card)
    assert table(card) | {
        "validation loss, base model → this": ["2.500 → 1.250"],
        "probe loss (training rows)": ["1.188"],
        "gap": ["0.062 [0.031, 0.094] (95% interval), GOOD"],
        "gap before training": ["0.016"],
        "best at": ["epoch 2, step 80"],
        "adapter": ["rank 8, alpha 32, on attention"],
        "steps": ["90 of 120, stopped early"],
        "epochs": ["2.25"],
        "time": ["1 h 12 min"],
        "speed": ["2,346 tokens/s"],
        "memory at most": ["21.4 GB"],
        "hardware": ["MLX on Apple M3 Max; PyTorch on NVIDIA L4 from step 40"],
    } == table(card)
    assert "- 1,200 rows to train on, 300 to validate, 10% of all rows held out for testing" in card
    assert "- 45.7 k target tokens trained on" in card
    assert "![Losses and gap over training](training_curves.png)" in card


def test_metadata_of_an_adapter() -> None:
    assert data_of(text_of()) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "twinkeel", "mlx"],
    }
    hub = data_of(text_of(data_id="org/letters:short", data_name="org/letters:short", license={"license": "mit"}))
    assert (hub["datasets"], hub["license"]) == (["org/letters"], "mit")


@pytest.mark.parametrize(
    ("weights", "library", "libraries", "training"),
    [
        ("16-bit", "transformers", {"transformers", "mlx-lm", "vLLM", "Twinkeel"}, "train --model"),
        ("mlx-4bit", "mlx", {"mlx-lm", "Twinkeel"}, "train --backend mlx --model"),
        ("nf4", "transformers", {"transformers", "Twinkeel"}, "train --backend cuda --model"),
    ],
)
def test_a_merged_model_says_what_can_read_it(weights: str, library: str, libraries: set[str], training: str) -> None:
    check = {
        "rows": "validation rows",
        "num_rows": 8,
        "where": "float32, CPU",
        "adapter_loss": 1.5,
        "merged_loss": 1.5001,
    }
    card = text_of(weights=weights, report=REPORT, merge={"check": check | {"quantised_loss": 1.61}})
    data = data_of(card)
    assert (data["library_name"], data["base_model_relation"]) == (library, "finetune")
    assert {name for name in ("transformers", "mlx-lm", "vLLM", "Twinkeel", "PEFT") if f"**{name}" in card} == libraries
    assert f"python cli.py {training} carol/letters --data ROWS.jsonl" in card
    assert table(card) | {"merged": ["1.5001"], "merged, 4 bits": ["1.6100"]} == table(card)
    assert "- Note: quantising it to 4 bits cost 0.110 nats per target token" in first_lines(card)
    # the evaluation was of the adapter on its base: its numbers are not those of quantised weights
    assert ("model-index" in data) == (weights == "16-bit")
    assert ("before it was merged and quantised" in card) == (weights != "16-bit")


def test_an_evaluation_is_shown_and_becomes_a_model_index() -> None:
    card = text_of(report=REPORT)
    assert table(card) | {
        "loss (nats per target token)": ["2.400", "1.300"],
        "accuracy": ["0.400", "0.900"],
        "F1 (macro)": ["0.312 [0.250, 0.375]", "0.875 [0.812, 0.938]"],
        "share of unreadable answers": ["0.200", "0.000"],
    } == table(card)
    assert "`letters.jsonl`, test split, 150 rows" in card
    assert "F1: 0.562 [0.500, 0.625] higher." in card
    assert "loss +0.012 nats per token; divergence from the base model 0.045 nats per token; 6.8% of" in card
    assert "Gate: Keep it" in card
    results, name = model_index_to_results(card)
    assert {result.metric_type: result.metric_value for result in results} == {
        "f1": 0.875,
        "accuracy": 0.9,
        "loss": 1.3,
        "perplexity": 3.669,
    }
    assert {(result.dataset_name, result.dataset_type, result.dataset_split) for result in results} == {
        ("letters.jsonl", "custom", "test")
    }
    assert name == "letters"


def test_a_negative_gain_is_said_the_other_way_round() -> None:
    worse = {
        "losses": REPORT["losses"] | {"gain": -0.05, "gain_low": -0.1, "gain_high": 0.0},
        "classification": {"f1_gain": -0.02, "f1_gain_low": -0.06, "f1_gain_high": 0.02},
    }
    card = text_of(report=REPORT | worse)
    assert "Loss: 0.050 [0.000, 0.100] nats per target token higher." in card
    assert "F1: 0.020 [-0.020, 0.060] lower." in card
    assert "Loss: 1.100 [0.900, 1.300] nats per target token lower." in text_of(report=REPORT)


def test_an_evaluation_on_other_data_is_not_said_to_be_on_the_run_s() -> None:
    report = REPORT | {"data": f"{HOME}/other.csv"}
    found = read_evaluation(report, data_name="org/set", data_path="org/set", data_id="org/set")
    assert found is not None and (found.data_name, found.data_id) == ("other.csv", None)
    own = read_evaluation(REPORT | {"data": "org/set"}, data_name="org/set", data_path="org/set", data_id="org/set")
    assert own is not None and own.results()[0].dataset_type == "org/set"
    namesake = REPORT | {"data": f"{HOME}/set"}
    found = read_evaluation(namesake, data_name="set", data_path="set", data_id="set")
    assert found is not None and (found.data_name, found.data_id) == ("set", None)
    assert read_evaluation({"losses": None}, data_name="x", data_path="x", data_id=None) is None
    assert read_evaluation(None, data_name="x", data_path="x", data_id=None) is None


# --- honest -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "headline", "doubt"),
    [
        (
            {"best_val_loss": 2.6, "probe_loss": 2.59, "gap": 0.01},
            "No better than the base model",
            "no better than the base model on held-out rows: 2.500 → 2.600",
        ),
        (
            {"best_val_loss": 1.5875, "gap": 0.4, "gap_low": 0.3, "gap_high": 0.5, "grade": "CRITICAL"},
            "Potential overfitting detected!",
            "the gap between held-out and training rows is 0.400, graded CRITICAL",
        ),
        ({"status": "interrupted"}, "Good generalization", "training was interrupted at step 90 of 120"),
        (
            {"not_judged": "every row was trained on", "best_val_loss": None, "probe_loss": None, "gap": None}
            | {"gap_low": None, "gap_high": None, "grade": None, "num_val_rows": 0, "best_step": None},
            "Not judged: every row was trained on",
            "not judged: every row was trained on",
        ),
    ],
)
def test_what_speaks_against_it_is_said_at_the_top(changes: dict[str, Any], headline: str, doubt: str) -> None:
    card = text_of(summary=changes)
    assert headline in first_lines(card)
    assert f"- Note: {doubt}" in first_lines(card)
    assert doubts(facts(summary=changes)) == [doubt]
    assert ("best at" in table(card)) == ("not_judged" not in changes)


def test_a_good_run_has_no_doubts_and_a_bad_evaluation_gives_some() -> None:
    assert doubts(facts(report=REPORT)) == []
    bad = REPORT | {
        "losses": REPORT["losses"] | {"gain": 0.02, "gain_low": -0.01},
        "general": {"rise": 0.4, "verdict": "forgotten"},
        "gate": {"keep": False, "line": "Don't keep it: it forgot"},
    }
    assert doubts(facts(report=bad)) == [
        "on the test rows it is not surely better than the base model (gain 0.020 nats)",
        "it forgot some of the rest: the loss on general texts rose by 0.400 nats",
        "the gate says: Don't keep it: it forgot",
    ]


def test_few_validation_rows_are_a_limitation() -> None:
    card = text_of(summary={"gap_low": -0.2, "gap_high": 0.4, "num_val_rows": 7})
    assert "- Judged on 7 held-out rows" in card
    assert "7 validation rows can't tell these grades apart." in card
    assert "What it forgot of what the base model could do was not measured" in card
    assert "was not measured" not in text_of(report=REPORT)


def test_a_4_bit_base_is_named() -> None:
    assert "Trained on" not in text_of()
    four = settings(model={"path": "org/base", "bits": 4})
    assert "Trained on the base model in 4 bits (NF4 with double quantisation)" in text_of(config=four)
    base = published_base("mlx-community/Mistral-7B-Instruct-v0.3-4bit", revision=None, named=None, fingerprint=None)
    card = text_of(base=base)
    # readers get the model that both libraries can load, and are told what it was trained on
    assert data_of(card)["base_model"] == "mistralai/Mistral-7B-Instruct-v0.3"
    assert "Trained on `mlx-community/Mistral-7B-Instruct-v0.3-4bit`, which MLX quantised" in card
    assert "PeftModel" in card
    other = published_base("mlx-community/Other-4bit", revision=None, named=None, fingerprint=None)
    assert "PeftModel" not in text_of(base=other)


# --- private ----------------------------------------------------------------------------------------------------------


def test_no_path_and_no_row_s_text_is_in_it() -> None:
    config = settings(lora={"init_adapter": f"{HOME}/runs/zero", "rank": 8})
    card = text_of(config=config, report=REPORT, base=PublishedBase("base", None))
    for private in (HOME, "/home", "carols-secret", "Ms Private", "letters.jsonl:3"):
        assert private not in card
    assert table(card)["lora.init_adapter"] == ["zero"]


def test_settings_are_whole_but_for_what_is_private() -> None:
    shown = public_settings(facts())
    assert shown["model"]["path"] == "org/base"
    assert shown["data"]["path"] == "letters.jsonl"
    assert "output" not in shown and shown["log"] == {"every": 10}
    # what is shown is a configuration that can be given again
    assert RunConfig.model_validate(shown).lora.rank == 8
    differing = {name: row for name, row in table(text_of()).items() if "." in name and "/" not in name}
    assert differing == {
        "model.bits": ["16"],
        "data.path": ["letters.jsonl"],
        "data.test": ["0.1"],
        "lora.rank": ["8"],
    } | {"model.path": ["org/base"]}
    block = re.search(r"```yaml\n(.*?)```", text_of(), re.DOTALL)
    assert block is not None and yaml.safe_load(block[1]) == shown


def test_a_name_can_t_break_the_table() -> None:
    card = text_of(data_name="a|b`c\nd.jsonl")
    assert "| `data.path` | `a/b'c d.jsonl` |" in card


# --- how to load it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_template", [True, False])
def test_snippets_are_python(has_template: bool, tmp_path: Path) -> None:
    template = {"chat_template": "{{ messages }}"} if has_template else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(template))
    base = PublishedBase("org/base", "org/base", folder=tmp_path)
    for weights in ("adapter", "16-bit"):
        card = text_of(base=base, weights=weights)
        block = re.search(r"```python\n(.*?)```", card, re.DOTALL)
        assert block is not None
        ast.parse(block[1])
        assert ("apply_chat_template" in block[1]) == has_template
    assert "mlx_lm.generate --model org/base --adapter-path letters" in text_of(base=base)
    assert "python cli.py train --init-adapter letters --data ROWS.jsonl" in text_of(base=base)


# --- the base model ---------------------------------------------------------------------------------------------------


def test_a_licence_comes_from_the_base_s_own_card_and_from_nowhere_else(tmp_path: Path) -> None:
    base = PublishedBase("org/base", "org/base", folder=tmp_path)
    assert base.license() == {}
    (tmp_path / "LICENSE").write_text("Apache License")
    (tmp_path / "README.md").write_text("# no metadata\nlicense: mit\n")
    assert base.license() == {}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: open-rail\nlanguage: en\n---\n")
    assert base.license() == {"license": "other", "license_name": "open-rail"}
    (tmp_path / "README.md").write_text("---\nlicense: [unfinished\n---\n")
    assert base.license() == {}
    assert "No licence is stated" in text_of() and "No licence" not in text_of(license={"license": "mit"})


def test_the_base_model_of_a_folder(tmp_path: Path) -> None:
    def found(path: Path | str, named: str | None = None) -> PublishedBase:
        return published_base(str(path), revision=None, named=named, fingerprint=None)

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--org--some.model" / "snapshots" / commit
    assert (found(cached).hub_id, found(cached).revision) == ("org/some.model", commit)
    folder = make_model(tmp_path / "mine")
    assert (found(folder).name, found(folder).hub_id, found(folder).folder) == ("mine", None, folder)
    assert found(folder).has_chat_template
    assert found(folder, "org/name").hub_id == "org/name"
    assert found("gone folder").name == "gone folder"  # no path by its look, and no name that the hub takes
    unsure = found("models/mine")
    assert unsure.hub_id == "models/mine" and "no such folder here" in str(unsure.note)


def test_the_packaged_copy_of_the_quickstart_model_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged, original = make_model(tmp_path / "packaged"), make_model(tmp_path / "original", seed=1)
    monkeypatch.setattr("core.publishing.base.packaged_model", lambda *, offline: packaged)
    monkeypatch.setattr("core.publishing.base.cached_snapshot", lambda name, *, revision: original)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    for folder, is_rounded in ((packaged, True), (original, False)):
        base = published_base(name, revision=None, named=None, fingerprint=model_fingerprint(folder))
        assert (base.hub_id, base.folder, base.is_rounded) == (name, folder, is_rounded)
        assert (ROUNDED in text_of(base=base)) == is_rounded


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_can_stand_in_a_card(preset: str) -> None:
    config = resolve(presets=[preset]).config
    card = text_of(config=config)
    differing = {name: value for name, value in values(config) if value != dict(values(RunConfig()))[name]}
    assert {"backend", *differing} - {"output"} <= {"backend", *table(card)}
