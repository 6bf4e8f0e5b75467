"""Presets, files, assignments and flags: who wins, and what a mistake is answered with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import cli
from core.config import RunConfig, to_plain
from core.errors import UserError
from core.settings import (
    DEFAULT,
    describe_fields,
    differences,
    field_names,
    load_config,
    preset_names,
    resolve,
    show,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def value_of(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def refusal(**sources: Any) -> UserError:
    """The error of a resolution; both its parts must be one line each."""
    with pytest.raises(UserError) as caught:
        resolve(**sources)
    assert "\n" not in caught.value.what
    assert "\n" not in (caught.value.hint or "")
    return caught.value


# --- precedence -------------------------------------------------------------------------------------------------------

# weakest first; each sets lora.rank to its own value. quickstart has rank 8.
SOURCES = ("default", "preset", "file", "--set", "flag")
RANKS = {"default": 16, "preset": 8, "file": 21, "--set": 22, "flag": 23}


def resolve_with(names: tuple[str, ...], tmp_path: Path) -> Any:
    return resolve(
        presets=["quickstart"] if "preset" in names else [],
        files=[write(tmp_path / "my.yaml", "lora: {rank: 21}")] if "file" in names else [],
        assignments=["lora.rank=22"] if "--set" in names else [],
        flags={"lora.rank": ("--rank", 23)} if "flag" in names else {},
    )


def test_what_was_typed_gives_the_same_settings_again(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "lora: {rank: 5, alpha: 3}")
    file = write(tmp_path / "mine.yaml", "extends: [quickstart, base.yaml]\nlora: {rank: 21}")
    given: dict[str, Any] = {
        "presets": ["quickstart", "conservative"],
        "files": [file],
        "assignments": ["data.fields={prompt: q}", "optim.betas=[0.8, 0.9]"],
        "flags": {"optim.lr": ("--lr", 0.25), "data.strict": ("--strict", True), "output": ("--output", "my run")},
    }
    settings = resolve(**given)
    typed = settings.typed_words(without=("--output",))
    assert typed[-3:] == ["--lr", "0.25", "--strict"] and typed.count("--config") == 1, "a file brings what it extends"
    args = vars(cli.build_parser().parse_args(["train", *typed]))
    assert (args["preset"], args["config"], args["assignments"]) == (
        given["presets"],
        [str(file)],
        given["assignments"],
    )
    assert args["optim.lr"] == 0.25 and args["data.strict"] is True and args["output"] is None
    assert settings.typed_words()[-2:] == ["--output", "my run"]


@pytest.mark.parametrize(
    ("weaker", "stronger"), [(one, other) for i, one in enumerate(SOURCES) for other in SOURCES[i + 1 :]]
)
def test_the_stronger_of_each_pair_wins(tmp_path: Path, weaker: str, stronger: str) -> None:
    settings = resolve_with((weaker, stronger), tmp_path)
    assert settings.config.lora.rank == RANKS[stronger]
    source = {"preset": "preset quickstart", "file": str(tmp_path / "my.yaml"), "flag": "--rank"}
    assert settings.source_of("lora.rank") == source.get(stronger, stronger)


def test_all_together(tmp_path: Path) -> None:
    settings = resolve_with(SOURCES, tmp_path)
    assert settings.config.lora.rank == 23
    # what the stronger sources do not name stays
    assert settings.config.lora.alpha == 16.0
    assert settings.source_of("lora.alpha") == "preset quickstart"
    assert settings.config.lora.rslora is False
    assert settings.source_of("lora.rslora") == DEFAULT
    assert "lora.rslora" not in settings.sources


def test_later_ones_of_the_same_kind_override(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.yaml", "lora: {rank: 1, alpha: 1}"), write(tmp_path / "2.yaml", "lora: {rank: 2}")
    config = resolve(files=[one, two]).config
    assert (config.lora.rank, config.lora.alpha) == (2, 1.0)
    assert resolve(assignments=["lora.rank=3", "lora.rank=4"]).config.lora.rank == 4
    settings = resolve(presets=["mistral-mlx-v2", "conservative"])
    assert (settings.config.optim.lr, settings.config.lora.rank) == (1e-4, 6)
    assert settings.source_of("optim.lr") == "preset conservative"
    assert settings.source_of("lora.rank") == "preset mistral-mlx-v2"


def test_nothing_given_is_the_defaults() -> None:
    assert resolve().config == RunConfig()
    assert resolve().sources == {}


# --- extends ----------------------------------------------------------------------------------------------------------


def test_a_file_extends_a_preset(tmp_path: Path) -> None:
    path = write(tmp_path / "my.yaml", "extends: quickstart\nlora: {alpha: 99}")
    settings = resolve(files=[path])
    assert (settings.config.lora.rank, settings.config.lora.alpha) == (8, 99.0)
    assert settings.source_of("lora.rank") == "preset quickstart"
    assert settings.source_of("lora.alpha") == str(path)


def test_a_chain_of_files_in_other_folders(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "a.yaml", "extends: b.yaml\nlora: {rank: 1}")  # b.yaml beside a.yaml
    write(tmp_path / "base" / "b.yaml", "lora: {rank: 2, alpha: 2}\ntrain: {epochs: 2}")
    path = write(tmp_path / "my.yaml", "extends: base/a.yaml\ntrain: {epochs: 7}")
    config = resolve(files=[path]).config
    assert (config.lora.rank, config.lora.alpha, config.train.epochs) == (1, 2.0, 7.0)


def test_a_list_overrides_in_order(tmp_path: Path) -> None:
    write(tmp_path / "one.yaml", "lora: {rank: 1, alpha: 1}")
    write(tmp_path / "two.yaml", "lora: {rank: 2}")
    path = write(tmp_path / "my.yaml", "extends: [quickstart, one.yaml, two.yaml]")
    config = resolve(files=[path]).config
    assert (config.lora.rank, config.lora.alpha, config.lora.frozen_fraction) == (2, 1.0, 0.5)


def test_the_same_base_twice_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "lora: {rank: 5}")
    write(tmp_path / "left.yaml", "extends: base.yaml")
    write(tmp_path / "right.yaml", "extends: base.yaml")
    assert resolve(files=[write(tmp_path / "my.yaml", "extends: [left.yaml, right.yaml]")]).config.lora.rank == 5


@pytest.mark.parametrize("members", [("a",), ("a", "b"), ("a", "b", "c")])
def test_a_circle_is_refused(tmp_path: Path, members: tuple[str, ...]) -> None:
    for name, following in zip(members, (*members[1:], members[0]), strict=True):
        write(tmp_path / f"{name}.yaml", f"extends: {following}.yaml")
    error = refusal(files=[tmp_path / "a.yaml"])
    assert "a.yaml: extends itself" in error.what


def test_an_unknown_base_is_refused(tmp_path: Path) -> None:
    error = refusal(files=[write(tmp_path / "my.yaml", "extends: quickstat")])
    assert "my.yaml" in error.what
    assert "'quickstat'" in error.what
    assert "quickstart" in (error.hint or "")


@pytest.mark.parametrize("value", ["5", "{a: b}", "[quickstart, 5]", "true"])
def test_a_base_that_is_no_name_is_refused(tmp_path: Path, value: str) -> None:
    error = refusal(files=[write(tmp_path / "my.yaml", f"extends: {value}")])
    assert "my.yaml: extends" in error.what


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lora.rnk", "lora.rank"),
        ("lora.rang", "lora.rank"),
        ("optim.lrr", "optim.lr"),
        ("rank", "lora.rank"),
        ("epochs", "train.epochs"),
        ("trian", "train"),
        ("guard.patince", "guard.patience"),
        ("lor", "lora"),
        # mlx-lm, TRL, PEFT, Axolotl, LLaMA-Factory
        ("learning_rate", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("lora_alpha", "lora.alpha"),
        ("lora_dropout", "lora.dropout"),
        ("r", "lora.rank"),
        ("lora.r", "lora.rank"),
        ("lora_r", "lora.rank"),
        ("lora.target_modules", "lora.targets"),
        ("num_train_epochs", "train.epochs"),
        ("num_epochs", "train.epochs"),
        ("iters", "train.max_steps"),
        ("per_device_train_batch_size", "train.batch_size"),
        ("micro_batch_size", "train.batch_size"),
        ("gradient_accumulation_steps", "train.accumulation"),
        ("grad_accumulation_steps", "train.accumulation"),
        ("max_seq_length", "data.max_tokens"),
        ("sequence_len", "data.max_tokens"),
        ("cutoff_len", "data.max_tokens"),
        ("val_set_size", "data.validation"),
        ("eval_steps", "eval.every"),
        ("steps_per_eval", "eval.every"),
        ("save_steps", "checkpoint.every"),
        ("logging_steps", "log.every"),
        ("lr_scheduler_type", "schedule.name"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(given: str, meant: str) -> None:
    error = refusal(assignments=[f"{given}=1"])
    assert error.what == f"{given}: no such setting (from --set)"
    assert error.hint == f"did you mean {meant}?"


def test_a_name_like_no_other(tmp_path: Path) -> None:
    error = refusal(files=[write(tmp_path / "my.yaml", "quux: {a: 1}")])
    assert "quux: no such setting" in error.what
    assert "my.yaml" in error.what
    assert "did you mean" not in (error.hint or "")


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    error = refusal(presets=["quickstrat"])
    assert "--preset quickstrat" in error.what
    assert "did you mean quickstart?" in (error.hint or "")
    for name in ("../presets/quickstart", "", ".", "quickstart.yaml"):
        refusal(presets=[name])


BAD_VALUES = [
    ("backend", "tpu"),
    ("device", "tpu"),
    ("output", "5"),
    ("model.path", "''"),
    ("model.revision", "1.5"),
    ("model.bits", "8"),
    ("model.bits", "null"),
    ("model.dtype", "int8"),
    ("model.trust_remote_code", "maybe"),
    ("model.low_memory", "half"),
    ("model.stream_layers", "2"),
    ("data.path", "''"),
    ("data.fields", "5"),
    ("data.max_tokens", "7"),
    ("data.max_tokens", "10.5"),
    ("data.train_on", "prompts"),
    ("data.validation", "1.0"),
    ("data.validation", "-0.1"),
    ("data.validation", ".nan"),
    ("data.test", "1"),
    ("data.skip_bad", "7"),
    ("data.strict", "very"),
    ("data.stratify", "[label]"),
    ("data.group", "7"),
    ("data.near_duplicates", "0"),
    ("data.near_duplicates", "1.1"),
    ("data.folds", "1"),
    ("data.fold", "0"),
    ("lora.rank", "0"),
    ("lora.rank", "eight"),
    ("lora.rank", "{a: 1}"),
    ("lora.alpha", "0"),
    ("lora.alpha", ".inf"),
    ("lora.dropout", "1"),
    ("lora.targets", "atention"),
    ("lora.targets", "[1, 2]"),
    ("lora.frozen_fraction", "1.0"),
    ("lora.rslora", "often"),
    ("lora.init_adapter", "[x]"),
    ("model.cache_packed", "perhaps"),
    ("optim.name", "adam"),
    ("optim.lr", "0"),
    ("optim.lr", "-1e-4"),
    ("optim.lr", ".nan"),
    ("optim.lr", "fast"),
    ("optim.weight_decay", "-1"),
    ("optim.betas", "[0.9]"),
    ("optim.betas", "[0.9, 1.0]"),
    ("optim.betas", "[0.9, 0.99, 0.999]"),
    ("optim.eps", "0"),
    ("optim.momentum", "1"),
    ("optim.max_grad_norm", "0"),
    ("optim.label_smoothing", "1"),
    ("optim.state_bits", "16"),
    ("schedule.name", "cosin"),
    ("schedule.min_lr", "-1"),
    ("schedule.warmup_ratio", "1"),
    ("schedule.warmup_steps", "-1"),
    ("schedule.restarts", "0"),
    ("train.epochs", "0"),
    ("train.max_steps", "0"),
    ("train.batch_size", "0"),
    ("train.batch_tokens", "0"),
    ("train.batch_tokens", "2k"),
    ("train.prefix_store", "always"),
    ("train.prefix_store_gb", "0"),
    ("train.prefix_store_gb", ".inf"),
    ("train.accumulation", "0"),
    ("train.gradient_checkpointing", "sometimes"),
    ("train.seed", "-1"),
    ("train.seed", "2147483648"),
    ("eval.every", "0"),
    ("eval.probe_rows", "0"),
    ("eval.batch_size", "0"),
    ("guard.patience", "0"),
    ("guard.min_delta", "-1"),
    ("guard.grades", "[0.1, 0.2]"),
    ("guard.grades", "[0.1, 0.2, .inf]"),
    ("guard.relative_gap", "0"),
    ("guard.confidence", "1"),
    ("checkpoint.every", "0"),
    ("checkpoint.keep", "0"),
    ("moe.aux_loss_weight", "-1"),
    ("moe.train_router", "2"),
    ("log.every", "0"),
    ("log.trackers", "[tensorbord]"),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_is_one_line_with_field_value_and_source(name: str, value: str) -> None:
    error = refusal(assignments=[f"{name}={value}"])
    assert error.what.startswith(f"{name} = ")
    assert "(from --set): " in error.what
    given = yaml.safe_load(value)
    # of a list, the part that is wrong is enough
    parts = [given, *given] if isinstance(given, list) else [given]
    assert any(repr(part) in error.what for part in parts)
    assert error.hint == describe_fields()[name]
    assert "Config" not in error.what  # the names of our classes say nothing to a user


def test_every_field_has_a_bad_value_above() -> None:
    assert {name for name, _ in BAD_VALUES} | {"optim.paged"} == set(field_names())


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["optim.state_bits=8", "optim.name=sgd"], ("optim.state_bits 8", "sgd")),
        (["optim.paged=true"], ("optim.paged", "optim.state_bits=8")),
        (["schedule.min_lr=0.5"], ("schedule.min_lr 0.5", "optim.lr 0.0002")),
        (["data.validation=0.6", "data.test=0.5"], ("data.validation 0.6", "data.test 0.5")),
        (["guard.grades=[0.3, 0.2, 0.1]"], ("guard.grades", "[0.3, 0.2, 0.1]")),
        (["guard.grades=[0.0, 0.2, 0.3]"], ("guard.grades", "[0.0, 0.2, 0.3]")),
    ],
)
def test_values_that_do_not_go_together(assignments: list[str], words: tuple[str, ...]) -> None:
    error = refusal(assignments=assignments)
    for word in words:
        assert word in error.what


@pytest.mark.parametrize("value", ["null", "5", "[1]"])
def test_a_section_is_not_a_value(tmp_path: Path, value: str) -> None:
    error = refusal(files=[write(tmp_path / "my.yaml", f"lora: {value}")])
    assert error.what.startswith("lora = ")
    assert "section" in error.what


@pytest.mark.parametrize("text", ["lora.rank", "=5", " =5", "lora.rank=[", "lora.rank={a"])
def test_an_assignment_that_is_none(text: str) -> None:
    assert f"--set {text}" in refusal(assignments=[text]).what


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a:\n\tb: 1", ", line 2"),
        ("lora: {rank: 1", ", line 1"),
        ("[1, 2]", ""),
        ("just text", ""),
        ("? [1, 2]\n: 3", ", line 1"),
        ("lora: !!python/object:os.system {}", ", line 1"),
        ("\x00", ""),
        ("{1: 2}", ""),
        ("on: 2", ""),
        ("lora: {1: 2}", ""),
    ],
)
def test_a_file_that_is_not_a_set_of_settings(tmp_path: Path, text: str, where: str) -> None:
    error = refusal(files=[write(tmp_path / "my.yaml", text)])
    assert f"my.yaml{where}" in error.what


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "nowhere.yaml: no such file" in refusal(files=[tmp_path / "nowhere.yaml"]).what
    assert "cannot be read" in refusal(files=[tmp_path]).what
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00lora")
    assert "binary.yaml" in refusal(files=[tmp_path / "binary.yaml"]).what


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("optim.lr=2e-4", "optim.lr", 2e-4),  # a string to YAML 1.1
        ("optim.lr=2.0e-4", "optim.lr", 2e-4),
        ("optim.lr='3e-5'", "optim.lr", 3e-5),
        ("guard.patience=null", "guard.patience", None),
        ("guard.patience=~", "guard.patience", None),
        ("guard.patience=", "guard.patience", None),
        ("optim.max_grad_norm=null", "optim.max_grad_norm", None),
        ("optim.betas=[0.9, 0.95]", "optim.betas", (0.9, 0.95)),
        ("guard.grades=[0.1, 0.2, 0.3]", "guard.grades", (0.1, 0.2, 0.3)),
        ("lora.targets=all-linear", "lora.targets", "all-linear"),
        ("lora.targets=q_proj,v_proj", "lora.targets", ["q_proj", "v_proj"]),
        ("lora.targets=q_proj", "lora.targets", ["q_proj"]),
        ("lora.targets=[self_attn.q_proj]", "lora.targets", ["self_attn.q_proj"]),
        ("train.gradient_checkpointing=true", "train.gradient_checkpointing", True),
        ("train.gradient_checkpointing=auto", "train.gradient_checkpointing", "auto"),
        ("train.epochs=0.5", "train.epochs", 0.5),
        ("train.batch_size=4", "train.batch_size", 4),
        ("lora={rank: 3}", "lora.rank", 3),
        (
            "data.fields={prompt: question, completion: answer}",
            "data.fields",
            {"prompt": "question", "completion": "answer"},
        ),
        ("data.fields={}", "data.fields", {}),
        ("log.trackers=[wandb, trackio]", "log.trackers", ["wandb", "trackio"]),
        ("model.path=a=b", "model.path", "a=b"),
        ("output=runs/x y", "output", "runs/x y"),
        (" lora.rank =5", "lora.rank", 5),
    ],
)
def test_values_in_yaml(assignment: str, name: str, value: object) -> None:
    settings = resolve(assignments=[assignment])
    assert value_of(settings.config, name) == value
    assert type(value_of(settings.config, name)) is type(value)
    assert settings.source_of(name) == "--set"


def test_a_file_without_settings(tmp_path: Path) -> None:
    assert resolve(files=[write(tmp_path / "empty.yaml", "# nothing\n")]).config == RunConfig()


def test_the_mapping_of_fields_is_one_value(tmp_path: Path) -> None:
    """A file's mapping replaces a preset's: half of one and half of the other would name columns nobody has."""
    one = write(tmp_path / "1.yaml", "data: {fields: {prompt: a, completion: b}}")
    two = write(tmp_path / "2.yaml", "data: {fields: {text: c}}")
    assert resolve(files=[one, two]).config.data.fields == {"text": "c"}
    # so a part of it can't be set: what stood there would be lost
    error = refusal(files=[one], assignments=["data.fields.prompt=c"])
    assert "data.fields" in error.what


def test_settings_are_frozen() -> None:
    config = resolve().config
    with pytest.raises(ValueError, match="frozen"):
        config.lora.rank = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.backend = "mlx"  # type: ignore[misc]


# --- show, differences, round trip ------------------------------------------------------------------------------------


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{key}" != "data.fields":
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_show_prints_every_field_with_its_source(tmp_path: Path) -> None:
    settings = resolve(
        presets=["mixtral-expert"],
        files=[write(tmp_path / "my.yaml", "train: {epochs: 2}")],
        assignments=["data.fields={prompt: a question, completion: the answer, system: what the system should say}"],
        flags={"optim.lr": ("--lr", 1e-5), "output": ("--output", "runs/" + "long name " * 12 + "x")},
    )
    text = show(settings)
    # it is YAML, and it is the same configuration
    assert RunConfig.model_validate(yaml.safe_load(text)) == settings.config
    assert sorted(name for name, _ in _leaves(yaml.safe_load(text))) == sorted(field_names())
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["lr"].endswith("# --lr")
    assert lines["epochs"].endswith(f"# {tmp_path / 'my.yaml'}")
    assert lines["frozen_fraction"].endswith("# preset mixtral-expert")
    assert lines["fields"].endswith("# --set")
    assert lines["rslora"].endswith("# default")
    # each on one line, below the headings of the eleven sections
    assert len([line for line in text.splitlines() if "#" in line]) == len(field_names())
    assert len(text.splitlines()) == len(field_names()) + 11


def test_every_field_is_explained() -> None:
    texts = describe_fields()
    assert set(texts) == set(field_names())
    assert all(len(text) > 10 or name == "optim.name" for name, text in texts.items())
    assert len(field_names()) == len(set(field_names())) > 50


@pytest.mark.parametrize("preset", preset_names())
def test_a_configuration_survives_yaml(tmp_path: Path, preset: str) -> None:
    config = resolve(presets=[preset], assignments=["optim.eps=1e-9", "data.fields={a: b}"]).config
    path = write(tmp_path / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
    assert load_config(path) == config


def test_the_run_folders_configuration_is_validated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.rank = 0"):
        load_config(write(tmp_path / "config.yaml", "lora: {rank: 0}"))


def test_differences() -> None:
    one = resolve(assignments=["lora.rank=8", "optim.lr=1e-4", "output=a"]).config
    other = resolve(assignments=["lora.rank=16", "optim.lr=2e-4", "output=b"]).config
    assert differences(one, one) == []
    assert differences(one, other) == ["output: a -> b", "lora.rank: 8 -> 16", "optim.lr: 0.0001 -> 0.0002"]
    assert differences(one, other, ignore=(name for name in ("output", "lora.rank"))) == ["optim.lr: 0.0001 -> 0.0002"]


# --- presets: the table of the reference set-ups ----------------------------------------------------------------------

MISTRAL_MLX = "mlx-community/Mistral-7B-Instruct-v0.3-4bit"
MIXTRAL_INSTRUCT = "mistralai/Mixtral-8x7B-Instruct-v0.1"
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]

PRESETS: dict[str, dict[str, Any]] = {
    "mistral-mlx-v1": {
        "backend": "mlx", "model.path": MISTRAL_MLX, "model.bits": 4,
        "lora.rank": 8, "lora.alpha": 16, "lora.dropout": 0.0, "lora.targets": "attention",
        "optim.lr": 5e-4, "schedule.name": "constant", "train.batch_size": 4, "train.accumulation": 4,
        "optim.weight_decay": 0.0, "optim.max_grad_norm": 1.0, "train.epochs": 3,
        "eval.every": 200, "guard.patience": None,
    },
    "mistral-mlx-v2": {
        "backend": "mlx", "model.path": MISTRAL_MLX, "model.bits": 4,
        "lora.rank": 6, "lora.alpha": 12, "lora.dropout": 0.08, "lora.targets": "attention",
        "optim.lr": 2e-4, "schedule.name": "cosine", "schedule.warmup_ratio": 0.03,
        "train.batch_size": 2, "train.accumulation": 4,
        "optim.weight_decay": 0.01, "optim.max_grad_norm": 1.0, "train.epochs": 3,
        "eval.every": 200, "guard.patience": 5, "guard.min_delta": 0.001,
    },
    "mixtral-expert": {
        "backend": "cuda", "model.path": MIXTRAL_INSTRUCT, "model.bits": 4,
        "lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.15,
        "lora.targets": [*QKVO, "gate_proj", "up_proj", "down_proj"],
        "optim.lr": 1.5e-5, "schedule.name": "cosine", "schedule.warmup_ratio": 0.03,
        "train.batch_size": 1, "train.accumulation": 8,
        "optim.weight_decay": 0.08, "optim.max_grad_norm": 1.0, "train.epochs": 3,
        "eval.every": 50, "guard.patience": 3, "guard.min_delta": 0.0,
        "lora.frozen_fraction": 0.5, "data.validation": 0.2,
    },
    "mixtral-attention": {
        "backend": "cuda", "model.path": MIXTRAL_INSTRUCT, "model.bits": 16,
        "lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.05, "lora.targets": "attention",
        "optim.lr": 2e-4, "schedule.name": "cosine", "schedule.min_lr": 1e-6, "schedule.warmup_ratio": 0.03,
        "train.batch_size": 1, "train.accumulation": 16,
        "optim.weight_decay": 0.01, "optim.max_grad_norm": 1.0, "train.epochs": 3,
        "eval.every": 100, "guard.patience": 3, "guard.min_delta": 0.001,
        "moe.aux_loss_weight": 0.001, "data.max_tokens": 4096, "data.validation": 0.05, "checkpoint.keep": 3,
    },
    "mistral-nli": {
        "backend": "cuda", "model.path": "mistralai/Mistral-7B-v0.3", "model.bits": 4,
        "lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.05, "lora.targets": "attention",
        "optim.lr": 2e-4, "schedule.name": "cosine", "schedule.warmup_ratio": 0.03,
        "train.batch_size": 4, "train.accumulation": 4,
        "optim.weight_decay": 0.01, "optim.max_grad_norm": 1.0, "train.epochs": 3,
        "eval.every": 250, "guard.patience": 3, "guard.min_delta": 0.0,
        "optim.name": "adamw", "optim.state_bits": 8, "optim.paged": True, "data.max_tokens": 512,
    },
    "mixtral-academic": {
        "backend": "cuda", "model.path": "mistralai/Mixtral-8x7B-v0.1", "model.bits": 4,
        "lora.rank": 16, "lora.alpha": 16, "lora.dropout": 0.05, "lora.targets": [*QKVO, "gate_proj"],
        "optim.lr": 2.5e-5, "schedule.name": "constant", "schedule.warmup_steps": 5,
        "train.batch_size": 1, "train.accumulation": 4,
        "optim.weight_decay": 0.001, "optim.max_grad_norm": 0.3, "train.epochs": 1,
        "eval.every": 30, "guard.patience": None,
        "data.max_tokens": 1200, "data.validation": 0.1, "data.test": 0.1,
    },
    "conservative": {
        "optim.lr": 1e-4, "train.accumulation": 32, "optim.weight_decay": 0.1, "train.epochs": 5,
    },
    "balanced": {
        "optim.lr": 2e-4, "train.accumulation": 16, "optim.weight_decay": 0.01, "train.epochs": 3,
    },
    "aggressive": {
        "optim.lr": 3e-4, "train.accumulation": 8, "optim.weight_decay": 0.001, "train.epochs": 2,
    },
    "quickstart": {
        "backend": "auto", "model.path": "HuggingFaceTB/SmolLM2-135M-Instruct", "lora.targets": "attention",
    },
}  # fmt: skip


def test_these_are_all_presets() -> None:
    assert preset_names() == sorted(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_reference_set_up(preset: str) -> None:
    config = resolve(presets=[preset]).config
    assert {name: value_of(config, name) for name in PRESETS[preset]} == PRESETS[preset]


@pytest.mark.parametrize("overlay", ["conservative", "balanced", "aggressive"])
def test_an_overlay_sets_nothing_but_its_four(overlay: str) -> None:
    assert set(resolve(presets=[overlay]).sources) == set(PRESETS[overlay])


def test_the_constant_baseline_has_no_warmup() -> None:
    assert resolve(presets=["mistral-mlx-v1"]).config.schedule.warmup_ratio == 0.0


def test_hints_name_commands_that_exist() -> None:
    """`config show` is named in hints; the command line must have it."""
    import cli

    named = re.findall(r"python cli\.py ([a-z ]+)", str(refusal(assignments=["quux=1"])))
    assert named == ["config show"]
    args = cli.build_parser().parse_args(["config", "show"])
    assert callable(args.run_command)


def test_a_section_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("lora: {rank: 4}\noptim: {lr: 1.0e-3}\nlora: {alpha: 8}\n")
    with pytest.raises(UserError, match=r"twice.yaml, line 3: not YAML \('lora' stands twice\)"):
        resolve(files=[file])
