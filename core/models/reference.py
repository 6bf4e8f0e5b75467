"""The reference models, what each needs, and which of them `model.path: auto` means here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

QUICKSTART_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

GIGABYTE = 1e9

# Bits per weight of a quantised matrix, its scales included. MLX affine, groups of 64, each with a
# 16-bit scale and bias: 4 + 32/64. NF4, blocks of 64, double quantisation: 4 + 8/64 + 32/(64*256)
_QUANTISED_BITS = {"mlx": 4.5, "cuda": 4.127}

# The shape a run is sized for: micro-batch 2 of 2048 tokens (the defaults), rank 16 on attention,
# gradient checkpointing. `plan` sizes an actual configuration; this only picks a model.
_NUM_TOKENS = 2 * 2048
_RANK = 16
_CONTEXT_BYTES = 1.0 * GIGABYTE  # CUDA or Metal context, kernels and the allocator's slack


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """One model that `auto` may choose, with the sizes from its config.json.

    `num_experts` 0 means dense. `prequantised`: the folder on the hub is already in 4 bits.
    """

    hub_id: str
    label: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    kv_size: int
    vocab_size: int
    num_experts: int = 0
    experts_per_token: int = 1
    prequantised: bool = False

    @property
    def num_attention_weights(self) -> int:
        """q and o are hidden x hidden, k and v hidden x kv."""
        return self.num_layers * 2 * self.hidden_size * (self.hidden_size + self.kv_size)

    @property
    def num_mlp_weights(self) -> int:
        """Gate, up and down, in every expert."""
        copies = max(self.num_experts, 1)
        return self.num_layers * copies * 3 * self.hidden_size * self.intermediate_size

    @property
    def num_embedding_weights(self) -> int:
        """The embedding and the output head."""
        return 2 * self.vocab_size * self.hidden_size


def _mistral(
    hub_id: str,
    label: str,
    *,
    vocab_size: int,
    num_experts: int = 0,
    experts_per_token: int = 1,
    prequantised: bool = False,
) -> ReferenceModel:
    """Mistral-7B and Mixtral-8x7B have the same shape but for the experts."""
    return ReferenceModel(
        hub_id=hub_id,
        label=label,
        num_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        kv_size=1024,
        vocab_size=vocab_size,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        prequantised=prequantised,
    )


MIXTRAL = _mistral(
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "Mixtral-8x7B-Instruct",
    vocab_size=32000,
    num_experts=8,
    experts_per_token=2,
)
MISTRAL = _mistral("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-Instruct", vocab_size=32768)
MISTRAL_MLX_4BIT = _mistral(
    "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
    "Mistral-7B-Instruct",
    vocab_size=32768,
    prequantised=True,
)

# Largest first; SmolLM2 stands behind every list and needs no entry, for nothing smaller is left.
_CANDIDATES = {
    ("mlx", 4): (MISTRAL_MLX_4BIT,),
    ("mlx", 16): (MISTRAL,),
    ("cuda", 4): (MIXTRAL, MISTRAL),
    ("cuda", 16): (MIXTRAL, MISTRAL),
}


def choose_reference(
    *,
    backend: str,
    bits: int,
    memory_bytes: int,
    accelerator: bool,
    problem_with: Callable[[str], str | None],
) -> tuple[str, str]:
    """The hub id of the largest reference model that fits and can be had, and a line saying why.

    `memory_bytes`: what training may use on the device. `problem_with(hub_id)` says why a
    model can't be had, or None; it may ask the network, so it is asked only about one that fits.
    """
    smallest = QUICKSTART_MODEL.split("/")[1]
    if not accelerator:
        reason = "no accelerator: a larger model would take days on a CPU"
        return QUICKSTART_MODEL, f"auto: {smallest} ({reason})"
    passed_over: list[str] = []
    for model in _CANDIDATES[backend, bits]:
        need = needed_bytes(model, backend=backend, bits=bits)
        if need > memory_bytes:
            passed_over.append(f"{model.label} needs {_gigabytes(need)}")
            continue
        problem = problem_with(model.hub_id)
        if problem is not None:
            passed_over.append(f"{model.label} {problem}")
            continue
        fit = f"needs {_gigabytes(need)} of {_gigabytes(memory_bytes)}"
        return model.hub_id, _note(model.label, [fit, *passed_over])
    return QUICKSTART_MODEL, _note(smallest, [f"{_gigabytes(memory_bytes)} available", *passed_over])


def original_of(hub_id: str) -> str | None:
    """The 16-bit model that a reference model in MLX's 4 bits was made from; None for any other."""
    models = {model for candidates in _CANDIDATES.values() for model in candidates}
    for quantised in models:
        if quantised.hub_id == hub_id and quantised.prequantised:
            originals = (model for model in models if model.label == quantised.label and not model.prequantised)
            return next((model.hub_id for model in originals), None)
    return None


def needed_bytes(model: ReferenceModel, *, backend: str, bits: int) -> int:
    """What training needs at the reference shape: weights, adapters, activations, context."""
    need = _weight_bytes(model, backend=backend, bits=bits)
    need += _adapter_bytes(model) + _activation_bytes(model) + _CONTEXT_BYTES
    return round(need)


def _weight_bytes(model: ReferenceModel, *, backend: str, bits: int) -> float:
    quantised_bits = _QUANTISED_BITS[backend] if bits == 4 else 16
    # mlx-lm quantises the embedding as well, bitsandbytes only the linear layers.
    embedding_bits = quantised_bits if model.prequantised else 16
    # transformers 5 keeps Mixtral's experts in 3-D parameters; bitsandbytes leaves them in 16 bits.
    is_left_out = backend == "cuda" and model.num_experts > 0
    mlp_bits = 16 if is_left_out else quantised_bits
    return (
        model.num_attention_weights * quantised_bits
        + model.num_mlp_weights * mlp_bits
        + model.num_embedding_weights * embedding_bits
    ) / 8


def _adapter_bytes(model: ReferenceModel) -> float:
    """LoRA on q, k, v and o: float32 weight, gradient and two AdamW moments."""
    inputs_and_outputs = 6 * model.hidden_size + 2 * model.kv_size
    return 16.0 * _RANK * model.num_layers * inputs_and_outputs


def _activation_bytes(model: ReferenceModel) -> float:
    """With checkpointing: each layer's input, one layer's insides, logits with their gradient."""
    layer_inputs = 2 * model.num_layers * model.hidden_size
    insides = 2 * (12 * model.hidden_size + 4 * model.experts_per_token * model.intermediate_size)
    logits = (4 + 4) * model.vocab_size
    return float(_NUM_TOKENS * (layer_inputs + insides + logits))


def _note(label: str, remarks: list[str]) -> str:
    return f"auto: {label} ({'; '.join(remarks)})"


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / GIGABYTE:.1f} GB"
