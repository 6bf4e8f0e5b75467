"""How many multiply-adds a training step of a dense model needs, by part, whoever computes it.

As `mixtral_work`: counted are matrix products on real tokens, the forward pass and the backward pass down to the lowest
adapter (through frozen weights a gradient for the input only). Padding, logits where there is no target and a backward
pass below the lowest adapter are nothing that a step needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PARTS = ("attention projections", "attention scores", "MLP", "LoRA", "head")


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds of a step by part of the model."""

    forward: Mapping[str, int]
    input_gradients: Mapping[str, int]
    weight_gradients: Mapping[str, int]
    """Of the adapters: nothing else is trained."""

    @property
    def total(self) -> int:
        return sum(sum(part.values()) for part in (self.forward, self.input_gradients, self.weight_gradients))


def work_of_a_step(
    config: Mapping[str, Any],
    *,
    lengths: Sequence[int],
    num_targets: int,
    first_layer: int,
    rank: int,
    stored: bool = False,
) -> Work:
    """
    Args:
        config: `config.json` of a llama or mistral.
        lengths: tokens of each row; num_targets: how many of them have a loss, and so need logits.
        first_layer: number of the lowest layer with an adapter, which is on q k v o.
        stored: whether what the layers below it make of the rows is known.
    """
    tokens, num_layers, hidden = sum(lengths), config["num_hidden_layers"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key_value = (config[f"num_{name}_heads"] * head_dim for name in ("attention", "key_value"))
    adapted = num_layers - first_layer
    computed = adapted if stored else num_layers
    into_attention = tokens * hidden * (query + 2 * key_value)  # q k v
    out_of_attention = tokens * query * hidden
    # each token looks at those before it and itself, half the row on average: for scores and for values
    scores = query * sum(length * length for length in lengths)
    mlp = 3 * tokens * hidden * config["intermediate_size"]
    widths = [(hidden, query), (hidden, key_value), (hidden, key_value), (query, hidden)]
    lora = tokens * rank * sum(size_in + size_out for size_in, size_out in widths)
    head = num_targets * hidden * config["vocab_size"]
    # nothing below q k v of the lowest adapted layer wants a gradient: A's input needs none there
    lora_inputs_of_lowest = lora - tokens * rank * sum(size_in for size_in, _ in widths[:3])
    return Work(
        forward=dict(
            zip(
                PARTS,
                (
                    computed * (into_attention + out_of_attention),
                    computed * scores,
                    computed * mlp,
                    adapted * lora,
                    head,
                ),
                strict=True,
            )
        ),
        input_gradients=dict(
            zip(
                PARTS,
                (
                    (adapted - 1) * into_attention + adapted * out_of_attention,
                    adapted * 2 * scores,
                    adapted * mlp,
                    (adapted - 1) * lora + lora_inputs_of_lowest,
                    head,
                ),
                strict=True,
            )
        ),
        weight_gradients={"LoRA": adapted * lora},
    )
