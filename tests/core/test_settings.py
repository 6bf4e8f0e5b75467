"""Presets, files, assignments and flags: who wins, and what is shown of it."""

from __future__ import annotations

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
from tests.core.resolving import refusal, value_of, write

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
