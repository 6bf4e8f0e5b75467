"""What the Mixtral benchmark counts: bytes of the real shape, and multiply-adds of a step, against torch's count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.protocols import Weight
from tests.backends.conftest import added_product, open_learner, resolved, skip_without
from tests.tiny import make_model

skip_without("cuda")
torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from backends.cuda.attention import ATTENTION  # noqa: E402
from backends.cuda.experts import IMPLEMENTATION  # noqa: E402
from backends.cuda.streaming import empty_model, load_in_pieces, planned_weights  # noqa: E402
from backends.cuda.weights import weights_of  # noqa: E402
from benchmarks.common import make_batches, usual_load_options  # noqa: E402
from benchmarks.mixtral import SHAPES  # noqa: E402
from benchmarks.mixtral_census import naive_weights, shape_without_weights, table  # noqa: E402
from benchmarks.mixtral_tools import EXPERT_KEYS, RandomSource  # noqa: E402
from benchmarks.mixtral_work import Targets, work_of_a_step  # noqa: E402
from core.config import ModelConfig  # noqa: E402

NUM_LAYERS, RANK = 3, 4
PACKED = ModelConfig(bits=4, cache_packed=False)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    return make_model(folder, model_type="mixtral", num_layers=NUM_LAYERS, num_experts=8)


def by_name(weights: list[Weight]) -> dict[str, Weight]:
    found = {weight.name: weight for weight in weights}
    assert len(found) == len(weights)
    return found


# --- the census -------------------------------------------------------------------------------------------------------


def test_mixtral_8x7b_in_4_bits_and_as_it_is_loaded_naively() -> None:
    """Its published size is 46,702,792,704 parameters."""
    base = shape_without_weights(SHAPES["mixtral-8x7b"])
    ours, naive = planned_weights(base), naive_weights(base)
    assert sum(w.parameters for w in ours) == sum(w.parameters for w in naive) == 46_702_792_704
    assert sum(w.bytes for w in ours) <= 27e9
    assert sum(w.bytes for w in naive) > 90e9
    experts = 32 * 8 * 3 * 4096 * 14336
    lines = {line.split()[0]: line.split()[1:] for line in table(ours, naive).splitlines()}
    assert lines["experts"] == [f"{experts:,}", "nf4", "23.3", "GB", "bfloat16", f"{2 * experts / 1e9:.1f}", "GB"]


def test_what_was_planned_is_what_is_loaded(mixtral: Path) -> None:
    base = empty_model(mixtral, PACKED, dtype=torch.float32, attention=ATTENTION)
    planned = by_name(planned_weights(base))
    loaded, _ = load_in_pieces(
        resolved(mixtral), PACKED, device=torch.device("cpu"), dtype=torch.float32, attention=ATTENTION
    )
    found = by_name(list(weights_of(loaded, {})))
    experts = {name: weight for name, weight in planned.items() if ".experts." in name}
    assert len(experts) == 2 * NUM_LAYERS
    for name, weight in experts.items():  # planned as a stack, loaded matrix by matrix
        parts = [found.pop(f"{name}.{expert}") for expert in range(8)]
        assert {part.dtype for part in parts} == {weight.dtype} == {"nf4"}
        assert sum(part.parameters for part in parts) == weight.parameters
        assert sum(part.bytes for part in parts) == weight.bytes
    assert found == {name: weight for name, weight in planned.items() if name not in experts}


def test_the_naive_count_is_what_transformers_loads(mixtral: Path) -> None:
    from transformers import AutoModelForCausalLM

    counted = naive_weights(empty_model(mixtral, PACKED, dtype=torch.float32, attention=ATTENTION))
    loaded = AutoModelForCausalLM.from_pretrained(mixtral, **usual_load_options(device="cpu", bits=4))
    assert by_name(list(weights_of(loaded, {}))) == by_name(counted)
    assert {weight.dtype for weight in counted if ".experts." in weight.name} == {"float32"}


def test_matrices_from_elsewhere_than_the_folder(mixtral: Path) -> None:
    """Random ones, the same each time, and norms of ones; what is held is of the same form."""
    source = RandomSource(torch.device("cpu"), torch.float32)
    models = [
        load_in_pieces(
            resolved(mixtral),
            PACKED,
            device=torch.device("cpu"),
            dtype=torch.float32,
            attention=ATTENTION,
            source=one,
        )[0]
        for one in (source, RandomSource(torch.device("cpu"), torch.float32), None)
    ]
    one, same, of_folder = (model.model.embed_tokens.weight for model in models)
    assert torch.equal(one, same) and not torch.equal(one, of_folder)
    assert one.std() == pytest.approx(0.02, rel=0.05)
    assert (models[0].model.norm.weight == 1.0).all()
    assert by_name(list(weights_of(models[0], {}))) == by_name(list(weights_of(models[2], {})))


# --- the multiply-adds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [0.0, 0.4], ids=["all layers", "the lowest frozen"])
@pytest.mark.parametrize("targets", ["attention", "experts"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_multiply_adds_of_a_step_are_those_that_torch_counts(
    mixtral: Path, targets: Targets, frozen: float, checkpointing: bool
) -> None:
    """In 16-bit form on a CPU, with experts in plain products: torch's counter knows those, but not the attention's."""
    from torch.utils.flop_counter import FlopCounterMode

    lora = {"rank": RANK, "frozen_fraction": frozen, "targets": EXPERT_KEYS if targets == "experts" else "attention"}
    learner: Any = open_learner(
        "cuda", mixtral, model={"bits": 16}, lora=lora, train={"gradient_checkpointing": checkpointing}
    )
    learner.model.set_experts_implementation(IMPLEMENTATION)
    (batch,) = make_batches(rows=1, width=40, count=1, vocab_size=320)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        learner.train_step([batch], step=1, lr=0.0)
    config = json.loads((mixtral / "config.json").read_text())

    def operations(lengths: list[int]) -> int:
        return work_of_a_step(
            config,
            lengths=lengths,
            num_targets=batch.num_targets,
            targets=targets,
            first_layer=int(frozen * NUM_LAYERS),
            rank=RANK,
            checkpointing=checkpointing,
        ).operations

    whole, single = operations([40]), operations([1] * 40)
    scores = (whole - single) * 40**2 // (40**2 - 40)
    assert counter.get_flop_counts()["Global"].keys() == {torch.ops.aten.mm, torch.ops.aten.addmm_}
    assert counter.get_total_flops() == whole - scores


def test_attention_scores_worked_out_by_hand() -> None:
    """Rows of 6 and 4 tokens beside one of 10, with 8 query features: what is linear in tokens is the same."""
    config = SHAPES["tiny"] | {"head_dim": 2, "num_hidden_layers": 3}

    def work(lengths: list[int]) -> Any:
        return work_of_a_step(
            config,
            lengths=lengths,
            num_targets=5,
            targets="attention",
            first_layer=1,
            rank=RANK,
            checkpointing=True,
        )

    one, other = work([6, 4]), work([10])
    # each token with half the row on average, for scores and for values: 10**2 - 6**2 - 4**2 = 48 more in one row
    more = 48 * 8
    assert other.forward - one.forward == 3 * more
    assert other.backward - one.backward == 2 * 2 * more
    assert other.recomputed - one.recomputed == 2 * more
    assert one.operations == 2 * (one.forward + one.backward + one.recomputed)
