"""Tiny models with random weights and a tiny tokenizer, built on the spot as Hugging Face folders.

NumPy, safetensors and tokenizers only, so that a test of one backend does not import the other's library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
PAD_ID, START_ID, END_ID = 0, 1, 2
VOCAB_SIZE = 320

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_model(
    folder: Path,
    *,
    model_type: str = "llama",
    num_layers: int = 2,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    vocab_size: int = VOCAB_SIZE,
    rope_theta: float = 10000.0,
    new_rope_style: bool = False,
    tied: bool = False,
    sliding_window: int | None = None,
    num_experts: int = 4,
    chat_template: str | None = CHAT_TEMPLATE,
    seed: int = 0,
    scale: float = 0.08,
) -> Path:
    """A llama, mistral or mixtral folder: config.json, model.safetensors (float32) and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "bos_token_id": START_ID,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "dtype": "float32",
    }
    if new_rope_style:  # as transformers 5 saves it
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": rope_theta}
    else:
        config["rope_theta"] = rope_theta
    if model_type == "mistral":
        config["sliding_window"] = sliding_window
    if model_type == "mixtral":
        config |= {"num_local_experts": num_experts, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(
        _weights(config, np.random.default_rng(seed), scale),
        folder / "model.safetensors",
        {"format": "pt"},
    )
    make_tokenizer(folder, chat_template=chat_template)
    return folder


def _weights(config: dict[str, Any], rng: np.random.Generator, scale: float) -> dict[str, np.ndarray]:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key_value = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (query, hidden),
            prefix + "self_attn.k_proj.weight": (key_value, hidden),
            prefix + "self_attn.v_proj.weight": (key_value, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, query),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
        if config["model_type"] == "mixtral":
            moe = prefix + "block_sparse_moe."
            shapes[moe + "gate.weight"] = (config["num_local_experts"], hidden)
            for expert in range(config["num_local_experts"]):
                shapes[f"{moe}experts.{expert}.w1.weight"] = (wide, hidden)
                shapes[f"{moe}experts.{expert}.w2.weight"] = (hidden, wide)
                shapes[f"{moe}experts.{expert}.w3.weight"] = (wide, hidden)
        else:
            shapes |= {
                prefix + "mlp.gate_proj.weight": (wide, hidden),
                prefix + "mlp.up_proj.weight": (wide, hidden),
                prefix + "mlp.down_proj.weight": (hidden, wide),
            }
    return {
        name: np.ones(shape, np.float32) if "norm" in name else rng.normal(0.0, scale, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def make_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A byte-level tokenizer: every byte is a token, after three special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
