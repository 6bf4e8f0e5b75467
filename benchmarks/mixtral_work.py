"""How many multiply-adds a training step of a mixture needs, whoever computes it.

Counted are matrix products: the forward pass, the backward pass down to the lowest adapter (through frozen weights, a
gradient for the input only; nothing below it), and with gradient checkpointing the second forward pass of the layers
that the backward pass crosses. A tool that computes more, such as logits where there is no target or a backward pass
down to the embeddings, gets nothing for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Targets = Literal["attention", "experts"]


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds of a step."""

    forward: int
    backward: int
    recomputed: int

    @property
    def operations(self) -> int:
        """What peaks are given in: a multiply-add is two."""
        return 2 * (self.forward + self.backward + self.recomputed)


@dataclass(frozen=True, slots=True)
class _Product:
    """A frozen matrix (out, in) that so many vectors go through, with a LoRA of `rank` beside it (0: none)."""

    size_in: int
    size_out: int
    vectors: int
    rank: int
    is_lowest: bool
    """Whether its input needs no gradient when its layer is the lowest with an adapter."""

    @property
    def forward(self) -> int:
        return self.vectors * (self.size_in * self.size_out + self.rank * (self.size_in + self.size_out))

    def backward(self, *, in_lowest_layer: bool) -> int:
        """Of the adapter twice the forward pass, input and weights; of the frozen matrix the input's gradient."""
        adapter = 2 * self.rank * (self.size_in + self.size_out)
        if in_lowest_layer and self.is_lowest:
            return self.vectors * (adapter - self.rank * self.size_in)
        return self.vectors * (adapter + self.size_in * self.size_out)


def work_of_a_step(
    config: Mapping[str, Any],
    *,
    lengths: Sequence[int],
    num_targets: int,
    targets: Targets,
    first_layer: int,
    rank: int,
    checkpointing: bool,
) -> Work:
    """
    Args:
        config: `config.json` of a mixture.
        lengths: tokens of each row; num_targets: how many of them have a loss, and so need logits.
        first_layer: number of the lowest layer with an adapter.
    """
    products = _products(config, sum(lengths), targets=targets, rank=rank)
    # Each token looks at those before it and itself: half the square of the length, for scores and for values.
    query = config["num_attention_heads"] * config["head_dim"]
    scores = query * sum(length**2 for length in lengths)
    layer = sum(product.forward for product in products) + scores
    head = num_targets * config["hidden_size"] * config["vocab_size"]
    above = config["num_hidden_layers"] - first_layer - 1
    upper = sum(product.backward(in_lowest_layer=False) for product in products) + 2 * scores
    lowest = sum(product.backward(in_lowest_layer=True) for product in products)
    # below the experts' adapters of the lowest layer, attention needs no gradient either
    lowest += 2 * scores if targets == "attention" else 0
    return Work(
        forward=config["num_hidden_layers"] * layer - _adapters(products) * first_layer + head,
        backward=above * upper + lowest + head,
        recomputed=(above + 1) * layer if checkpointing else 0,
    )


def _adapters(products: Sequence[_Product]) -> int:
    return sum(product.vectors * product.rank * (product.size_in + product.size_out) for product in products)


def _products(config: Mapping[str, Any], tokens: int, *, targets: Targets, rank: int) -> list[_Product]:
    hidden, wide, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    query, key_value = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))
    on_attention, on_experts = (rank if targets == name else 0 for name in ("attention", "experts"))
    routed = tokens * config["num_experts_per_tok"]
    is_for_experts = targets == "experts"
    return [
        *(_Product(hidden, out, tokens, on_attention, True) for out in (query, key_value, key_value)),
        _Product(query, hidden, tokens, on_attention, is_for_experts),
        _Product(hidden, experts, tokens, 0, is_for_experts),
        *(_Product(hidden, wide, routed, on_experts, is_for_experts) for _ in ("gate", "up")),
        _Product(wide, hidden, routed, on_experts, False),
    ]
