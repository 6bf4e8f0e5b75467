"""A random Llama with grouped heads, written as GGUF the way llama.cpp writes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NUM_LAYERS, HIDDEN, FFN, HEADS, KV_HEADS = 2, 64, 96, 4, 2
HEAD_DIM = HIDDEN // HEADS
CONTROL, NORMAL = 3, 1
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "Ġ w", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@dataclass(frozen=True)
class TinyGguf:
    """`weights` are in Hugging Face's names and order: what the import must give back."""

    path: Path
    weights: dict[str, np.ndarray]


def llama_cpp_permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py, in words of its own.

    Each head's first half and second half are dealt out alternately.
    """
    heads = np.split(rows, num_heads)
    dealt = []
    for head in heads:
        first, second = np.split(head, 2)
        for row in range(len(first)):
            dealt += [first[row], second[row]]
    return np.stack(dealt)


def tokens() -> list[str]:
    """Special tokens, then the bytes, then what the merges make."""
    from tokenizers import pre_tokenizers

    merged = [merge.replace(" ", "") for merge in MERGES]
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *merged]


def write_tiny_gguf(
    path: Path, *, tied: bool = True, largest: float | None = None, q8_0: bool = False, **changes: Any
) -> TinyGguf:
    """Writes the file. `changes`: metadata keys (dots as __) to override; None leaves one out.

    Args:
        largest: uniform weights up to this one, which each block of 32 holds, in place of normal ones.
        q8_0: matrices are quantised, by the gguf package.
    """
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        # Values that float16 holds exactly, so that the way there and back must be exact.
        if largest is None:
            return (rng.standard_normal(shape) * 0.1).astype(np.float16).astype(np.float32)
        values = rng.uniform(-largest, largest, shape)
        values[..., ::32] = largest
        return values.astype(np.float16).astype(np.float32)

    vocabulary = tokens()
    weights = {"model.embed_tokens.weight": matrix(len(vocabulary), HIDDEN)}
    stored = {"token_embd.weight": weights["model.embed_tokens.weight"]}
    for layer in range(NUM_LAYERS):
        _add_block(layer, matrix, weights, stored)
    weights["model.norm.weight"] = stored["output_norm.weight"] = matrix(HIDDEN)
    if not tied:
        weights["lm_head.weight"] = stored["output.weight"] = matrix(len(vocabulary), HIDDEN)
    _write(path, stored, vocabulary, changes, q8_0=q8_0)
    return TinyGguf(path, weights)


def _add_block(layer: int, matrix: Any, weights: dict[str, np.ndarray], stored: dict[str, np.ndarray]) -> None:
    kv = KV_HEADS * HEAD_DIM
    shapes = {
        ("self_attn.q_proj", "attn_q"): (HIDDEN, HIDDEN),
        ("self_attn.k_proj", "attn_k"): (kv, HIDDEN),
        ("self_attn.v_proj", "attn_v"): (kv, HIDDEN),
        ("self_attn.o_proj", "attn_output"): (HIDDEN, HIDDEN),
        ("mlp.gate_proj", "ffn_gate"): (FFN, HIDDEN),
        ("mlp.up_proj", "ffn_up"): (FFN, HIDDEN),
        ("mlp.down_proj", "ffn_down"): (HIDDEN, FFN),
        ("input_layernorm", "attn_norm"): (HIDDEN,),
        ("post_attention_layernorm", "ffn_norm"): (HIDDEN,),
    }
    for (name, gguf_name), shape in shapes.items():
        values = matrix(*shape)
        weights[f"model.layers.{layer}.{name}.weight"] = values
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(gguf_name)
        kept = values if heads is None else llama_cpp_permute(values, heads)
        stored[f"blk.{layer}.{gguf_name}.weight"] = kept


def _write(
    path: Path, stored: dict[str, np.ndarray], vocabulary: list[str], changes: dict[str, Any], *, q8_0: bool
) -> None:
    import gguf

    metadata: dict[str, Any] = {
        "llama.block_count": NUM_LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 50000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(vocabulary) - 3),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    arch = changes.pop("arch", "llama")
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, arch)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, values in stored.items():
        if q8_0 and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
