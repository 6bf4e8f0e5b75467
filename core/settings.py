"""From presets, files and flags to one `RunConfig`, with the source of every value.

Precedence, weakest first: defaults, `--preset`, `--config` file, `--set section.field=value`, flags. A YAML file may
`extends:` a preset or another file (or a list of them), which it then overrides.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from core.config import RunConfig
from core.errors import UserError

PRESETS = Path(__file__).resolve().parent.parent / "presets"
DEFAULT = "default"

Tree = dict[str, Any]
_LEAF_DICTS = frozenset({"data.fields"})
_MESSAGES = {"missing": "a value is missing", "model_type": "a section of settings, not a value"}
"""Our words for pydantic's, where those name things of the code."""
_PEER_NAMES = {
    "learning_rate": "optim.lr",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "r": "lora.rank",
    "target_modules": "lora.targets",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "iters": "train.max_steps",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "grad_accumulation_steps": "train.accumulation",
    "max_seq_length": "data.max_tokens",
    "max_length": "data.max_tokens",
    "sequence_len": "data.max_tokens",
    "cutoff_len": "data.max_tokens",
    "val_set_size": "data.validation",
    "eval_steps": "eval.every",
    "steps_per_eval": "eval.every",
    "save_steps": "checkpoint.every",
    "logging_steps": "log.every",
    "lr_scheduler_type": "schedule.name",
}
"""What mlx-lm, TRL, PEFT, Axolotl and LLaMA-Factory call a setting, for the hint after a wrong name."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Settings from one source."""

    source: str
    """For people: `preset quickstart`, `my.yaml`, `--set`, `--lr`."""
    values: Tree


@dataclass(frozen=True, slots=True)
class Settings:
    """A resolved configuration that remembers where its values came from."""

    config: RunConfig
    sources: Mapping[str, str]
    """Dotted name -> source, for every value that is not a default."""
    typed: Sequence[tuple[str, ...]] = ()
    """What was typed, each flag with its value, in the order of precedence."""

    def typed_words(self, *, without: Collection[str] = ()) -> list[str]:
        """The settings as words of a command line that gives them again; `without`: flags to leave out."""
        return [word for words in self.typed if words[0] not in without for word in words]

    def source_of(self, name: str) -> str:
        return self.sources.get(name, DEFAULT)


def resolve(
    *,
    presets: Sequence[str] = (),
    files: Sequence[Path] = (),
    assignments: Sequence[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
) -> Settings:
    """Merges all sources and validates the result.

    Args:
        presets: names of built-in presets, later ones override.
        files: YAML files, later ones override.
        assignments: `section.field=value`, the value in YAML.
        flags: dotted name -> (flag, value).

    Raises:
        UserError: an unknown preset, key or value, with the nearest known name.
    """
    layers = [layer for name in presets for layer in _preset_layers(name)]
    layers += [layer for path in files for layer in _file_layers(path, ())]
    layers += [_assignment_layer(text) for text in assignments]
    layers += [Layer(flag, _nest(name, value)) for name, (flag, value) in (flags or {}).items()]
    typed = [
        *(("--preset", name) for name in presets),
        *(("--config", str(path)) for path in files),
        *(("--set", text) for text in assignments),
        *((flag,) if value is True else (flag, str(value)) for flag, value in (flags or {}).values()),
    ]
    return replace(_validated(layers), typed=typed)


def load_config(path: Path) -> RunConfig:
    """The configuration of a run folder's `config.yaml`."""
    return _validated([Layer(str(path), _read_yaml(path))]).config


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def field_names() -> list[str]:
    """Dotted names of every setting."""
    return [name for name, _ in _fields(RunConfig, "")]


def _fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def describe_fields() -> dict[str, str]:
    """Dotted name -> the docstring under the field, on one line."""
    return {name: " ".join((field.description or "").split()) for name, field in _fields(RunConfig, "")}


# --- reading the sources ----------------------------------------------------------------------------------------------


def _preset_layers(name: str) -> list[Layer]:
    path = PRESETS / f"{name}.yaml"
    if not path.is_file() or path.parent != PRESETS:
        near = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--preset {name}: no such preset", hint=f"{hint}presets: {', '.join(preset_names())}")
    return [Layer(f"preset {name}", layer.values) for layer in _file_layers(path, ())]


def _file_layers(path: Path, parents: tuple[Path, ...]) -> list[Layer]:
    """The layers of a YAML file: first those it extends, then its own."""
    if path.resolve() in parents:
        raise UserError(f"{path}: extends itself", hint="remove one extends: line of the circle")
    tree = _read_yaml(path)
    extends = tree.pop("extends", None) or []
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: extends {extends!r} is no name", hint="such as: extends: [quickstart, mine.yaml]")
    layers: list[Layer] = []
    for name in names:
        layers += _extended(name, path, (*parents, path.resolve()))
    return [*layers, Layer(str(path), tree)]


def _extended(name: str, path: Path, parents: tuple[Path, ...]) -> list[Layer]:
    beside = path.parent / name
    if beside.is_file():
        return _file_layers(beside, parents)
    if name in preset_names():
        return [Layer(f"preset {name}", layer.values) for layer in _file_layers(PRESETS / f"{name}.yaml", parents)]
    raise UserError(
        f"{path}: extends {name!r}, which is no file beside it and no preset",
        hint=f"presets: {', '.join(preset_names())}",
    )


def _read_yaml(path: Path) -> Tree:
    import yaml

    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), strict_loader())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", hint="check the path after --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", error)).splitlines()[0]
        raise UserError(
            f"{path}{where}: not YAML ({problem})",
            hint="see presets/quickstart.yaml for the form",
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a set of settings", hint="see presets/quickstart.yaml for the form")
    return tree


def strict_loader() -> Any:
    """PyYAML's safe loader, but a key that stands twice is an error: the first one would vanish silently."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[object] = set()
            for key_node, _ in node.value:
                key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
                if key is not None and key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

    return StrictLoader


def _assignment_layer(text: str) -> Layer:
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UserError(f"--set {text}: not section.field=value", hint="such as: --set lora.rank=8")
    if (whole := name.strip().rpartition(".")[0]) in _LEAF_DICTS:
        raise UserError(
            f"--set {text}: {whole} is set as a whole", hint=f"such as: --set '{whole}={{prompt: question}}'"
        )
    try:
        return Layer("--set", _nest(name.strip(), yaml.safe_load(value)))
    except yaml.YAMLError:
        raise UserError(f"--set {text}: the value is not YAML", hint="put it in quotes") from None


def _nest(name: str, value: Any) -> Tree:
    for part in reversed(name.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


# --- merging and validating -------------------------------------------------------------------------------------------


def _validated(layers: Sequence[Layer]) -> Settings:
    merged: Tree = {}
    sources: dict[str, str] = {}
    for layer in layers:
        _merge(merged, layer.values, layer.source, sources, "")
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        raise _readable(error, sources) from None
    known = set(field_names())
    return Settings(config, {name: source for name, source in sources.items() if name in known})


def _merge(into: Tree, values: Tree, source: str, sources: dict[str, str], prefix: str) -> None:
    for raw_key, value in values.items():
        key = str(raw_key)  # YAML's 1: and on: are not strings, but pydantic names only strings
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in _LEAF_DICTS:
            inner = into.setdefault(key, {})
            if isinstance(inner, dict):
                _merge(inner, value, source, sources, f"{name}.")
                continue
        into[key] = value
        sources[name] = source


def _readable(error: ValidationError, sources: Mapping[str, str]) -> UserError:
    """The first of pydantic's complaints, in one line that names field, value and source."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"] if part in _known_parts())
    full = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown(full, sources)
    if first["type"] == "value_error":
        return UserError(str(first["ctx"]["error"]), hint="see: python cli.py config show")
    message = _MESSAGES.get(first["type"]) or first["msg"][0].lower() + first["msg"][1:]
    return UserError(
        f"{name} = {first['input']!r}{_given(name, sources)}: {message}",
        hint=describe_fields().get(name) or "see: python cli.py config show",
    )


def _known_parts() -> frozenset[str]:
    return frozenset(part for name in field_names() for part in name.split("."))


def _unknown(name: str, sources: Mapping[str, str]) -> UserError:
    near = _nearest(name)
    hint = f"did you mean {near}?" if near else "see the settings with: python cli.py config show"
    return UserError(f"{name}: no such setting{_given(name, sources)}", hint=hint)


def _given(name: str, sources: Mapping[str, str]) -> str:
    """` (from <source>)` of a setting, or of the first one below it."""
    below = (text for key, text in sources.items() if key == name or key.startswith(f"{name}."))
    source = next(below, None)
    return f" (from {source})" if source else ""


def _nearest(name: str) -> str | None:
    """The known setting that `name` was meant to be: by its last part, then by the whole name."""
    known = [*field_names(), *RunConfig.model_fields]
    leaves: dict[str, str] = {}
    for full in known:
        leaves.setdefault(full.rsplit(".", 1)[-1], full)
    whole = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    last = name.rsplit(".", 1)[-1]
    if last in _PEER_NAMES:
        return _PEER_NAMES[last]
    leaf = difflib.get_close_matches(last, leaves, n=1, cutoff=0.6)
    return whole[0] if whole else leaves[leaf[0]] if leaf else None


def differences(one: RunConfig, other: RunConfig, *, ignore: Iterable[str] = ()) -> list[str]:
    """`lora.rank: 8 -> 16` for every setting that differs."""
    left, right = dict(values(one)), dict(values(other))
    ignored = set(ignore)
    return [
        f"{name}: {left[name]} -> {right[name]}" for name in left if left[name] != right[name] and name not in ignored
    ]


def values(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every setting."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def show(settings: Settings) -> str:
    """The resolved configuration as YAML, each value with its source as a comment."""
    import yaml

    lines: list[str] = []
    section = ""
    for name, value in values(settings.config):
        head, _, leaf = name.rpartition(".")
        if head != section:
            section = head
            lines.append(f"{head}:")
        plain = list(value) if isinstance(value, tuple) else value
        value_text = yaml.safe_dump(plain, default_flow_style=True, width=math.inf).strip().removesuffix("\n...")
        text = f"{'  ' if head else ''}{leaf}: {value_text}"
        lines.append(f"{text:<44}  # {settings.source_of(name)}")
    return "\n".join(lines)


__all__ = [
    "Settings",
    "describe_fields",
    "differences",
    "field_names",
    "load_config",
    "preset_names",
    "resolve",
    "show",
    "values",
]
