"""Turns a GGUF file of a dense Llama-family model into a Hugging Face folder, in NumPy alone.

Sources: the GGUF specification (ggml/docs/gguf.md) for the metadata keys; llama.cpp's
`convert_hf_to_gguf.py` (`LlamaModel.permute`) for the row order of q and k, and its
`llama-vocab.cpp` for what `tokenizer.ggml.pre` stands for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

# float16, not bfloat16: it loses less. Measured on SmolLM2-135M (Q4_1, Q8_0) against the
# dequantised float32 weights: largest relative error of a weight 4.9e-4 (bfloat16 3.9e-3), root
# mean square 1.9e-4 (bfloat16 1.4e-3); no weight falls below float16's normal range.
WEIGHT_DTYPE = np.float16

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Writes `gguf_path` as a Hugging Face folder (16-bit safetensors) into the existing `folder`.

    The whole model passes through memory once, in float16. Raises UserError for a file that isn't
    GGUF, and for a model or tokenizer that this reader would only read approximately.
    """
    reader = _open(gguf_path)
    meta = read_metadata(reader)
    _check_supported(meta, reader, gguf_path)
    weights = read_weights(reader, meta, gguf_path)
    _write_weights(folder, weights)
    _write_json(folder / "config.json", model_config(meta, weights))
    _write_json(folder / "generation_config.json", _token_ids(meta))
    build_tokenizer(meta).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(meta))


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    """All key/value pairs of the file as plain Python values."""
    return {name: field.contents() for name, field in reader.fields.items()}


def undo_permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Puts the rows of q or k back into Hugging Face's order.

    llama.cpp stores each head's rows interleaved (0, d/2, 1, d/2 + 1, …) because its rotary
    embedding turns neighbouring pairs, where Hugging Face turns the two halves of a head. The
    shapes are right either way, so a model that skips this loads, and talks nonsense.

    `rows`: [num_heads * head_dim, …], any dtype; a bias has one dimension only.
    """
    head_dim = rows.shape[0] // num_heads
    pairs = rows.reshape(num_heads, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def read_weights(reader: GGUFReader, meta: Mapping[str, Any], gguf_path: Path) -> dict[str, np.ndarray]:
    """Hugging Face name -> float16 array, [out, in] for a matrix. An unknown tensor is an error."""
    from gguf import quants

    heads = {
        "attn_q": int(meta["llama.attention.head_count"]),
        "attn_k": _num_kv_heads(meta),
    }
    weights = {}
    for tensor in reader.tensors:
        name, kind = _hf_name(tensor.name, gguf_path)
        values = quants.dequantize(tensor.data, tensor.tensor_type).astype(WEIGHT_DTYPE)
        if kind in heads:
            values = undo_permute(values, heads[kind])
        weights[name] = np.ascontiguousarray(values)
    return weights


def model_config(meta: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`config.json` of a Llama model, every value taken from the file."""
    num_heads = int(meta["llama.attention.head_count"])
    hidden_size = int(meta["llama.embedding_length"])
    theta = _shortest(meta.get("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": int(meta["llama.feed_forward_length"]),
        "num_hidden_layers": int(meta["llama.block_count"]),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _num_kv_heads(meta),
        "head_dim": int(meta.get("llama.attention.key_length", hidden_size // num_heads)),
        "hidden_act": "silu",
        "max_position_embeddings": int(meta["llama.context_length"]),
        "rms_norm_eps": _shortest(meta["llama.attention.layer_norm_rms_epsilon"]),
        # Both spellings: transformers 5 reads rope_parameters, mlx-lm reads only rope_theta and
        # would silently fall back to 10000.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "attention_bias": any(name.endswith("q_proj.bias") for name in weights),
        "mlp_bias": any(name.endswith("up_proj.bias") for name in weights),
        **_token_ids(meta),
        "dtype": WEIGHT_DTYPE.__name__,
    }


def build_tokenizer(meta: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that the file describes, special tokens included."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    types: list[int] = meta["tokenizer.ggml.token_type"]
    merges = [_merge(line) for line in meta["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(meta["tokenizer.ggml.pre"])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def tokenizer_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`: which tokens begin, end and pad, and the chat template."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: meta.get(f"tokenizer.ggml.{key}_token_id") for role, key in roles.items()}
    if ids["pad"] is None:
        ids["pad"] = ids["eos"]
    config: dict[str, Any] = {
        # Not GPT2Tokenizer: transformers 5 would rebuild that one with GPT-2's own pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": tokens[index] for role, index in ids.items() if index is not None},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(meta["llama.context_length"]),
    }
    template = meta.get("tokenizer.chat_template")
    return config if template is None else {**config, "chat_template": template}


def _open(gguf_path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(gguf_path)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(
            f"{gguf_path}: not a readable GGUF file ({error})",
            hint="download it again; it may have been cut short",
        ) from error


def _check_supported(meta: Mapping[str, Any], reader: GGUFReader, gguf_path: Path) -> None:
    """Raises UserError where a value would have to be guessed."""
    problems = {
        "its architecture is not llama": meta.get("general.architecture") != "llama",
        "it is a mixture of experts": int(meta.get("llama.expert_count", 0)) > 0,
        "it rescales its rotary embedding": _has_rope_scaling(meta, reader),
        "its tokenizer is not byte-level BPE": meta.get("tokenizer.ggml.model") != "gpt2",
        "its pre-tokenizer is unknown": meta.get("tokenizer.ggml.pre") not in _PRE_TOKENIZERS,
    }
    for problem, found in problems.items():
        if found:
            raise UserError(
                f"{gguf_path}: this GGUF cannot be imported: {problem}",
                hint="use the model's original folder with safetensors weights",
            )


def _has_rope_scaling(meta: Mapping[str, Any], reader: GGUFReader) -> bool:
    scaling = meta.get("llama.rope.scaling.type", "none")
    return scaling != "none" or any(t.name.startswith("rope_freqs") for t in reader.tensors)


def _hf_name(name: str, gguf_path: Path) -> tuple[str, str]:
    """GGUF tensor name -> (Hugging Face name, kind such as "attn_q")."""
    if name in _MODEL_TENSORS:
        return _MODEL_TENSORS[name], name
    match = _BLOCK_NAME.fullmatch(name)
    if match is None or match[2] not in _BLOCK_TENSORS:
        raise UserError(
            f"{gguf_path}: unknown tensor {name}",
            hint="use the model's original folder with safetensors weights",
        )
    layer, kind, part = match.groups()
    return f"model.layers.{layer}.{_BLOCK_TENSORS[kind]}.{part}", kind


def _num_kv_heads(meta: Mapping[str, Any]) -> int:
    num_heads = meta["llama.attention.head_count"]
    return int(meta.get("llama.attention.head_count_kv", num_heads))


def _token_ids(meta: Mapping[str, Any]) -> dict[str, int]:
    """bos, eos and pad ids; without a padding token the end token pads, for padding is masked by
    position and never by token id."""
    eos = int(meta["tokenizer.ggml.eos_token_id"])
    return {
        "bos_token_id": int(meta.get("tokenizer.ggml.bos_token_id", eos)),
        "eos_token_id": eos,
        "pad_token_id": int(meta.get("tokenizer.ggml.padding_token_id", eos)),
    }


def _merge(line: str) -> tuple[str, str]:
    # One space parts the two: a space inside a token is spelled Ġ.
    left, right = line.split(" ")
    return left, right


def _smollm_pre_tokenizer() -> Any:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _gpt2_pre_tokenizer()])


def _gpt2_pre_tokenizer() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False)


_PRE_TOKENIZERS = {"smollm": _smollm_pre_tokenizer, "gpt-2": _gpt2_pre_tokenizer}


def _pre_tokenizer(name: str) -> Any:
    return _PRE_TOKENIZERS[name]()


def _shortest(value: float) -> float:
    """The float that was meant: GGUF keeps 1e-5 as the float32 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_weights(folder: Path, weights: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    # transformers refuses a file that doesn't say which framework its layout is for.
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves 0600, and a cache may be shared


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
