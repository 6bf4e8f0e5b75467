"""Where a resumed run goes on, what is said of it, and which stretches it then has."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from core.architecture import Architecture
from core.checkpoint import Checkpoint
from core.config import RunConfig
from core.errors import UserError
from core.models.fingerprint import model_traits
from core.models.reference import original_of
from core.monitor_screen import backends_of
from core.moves import (
    Arrival,
    Move,
    Place,
    backend_at,
    choose_backend,
    differences,
    is_exact,
    is_other_rounding,
    moved_to,
    moves_of,
    other_traits,
    place_of,
)
from core.protocols import DeviceReport

ARCHITECTURE = Architecture(
    model_type="llama",
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=320,
    tied_embeddings=False,
    num_experts=0,
    max_positions=512,
    mlx_bits=None,
)
MAC = DeviceReport("mlx", True, "Apple M3 Max", True, 10**9)
H200 = DeviceReport("cuda", True, "NVIDIA H200", True, 10**9)
CPU = DeviceReport("cuda", True, "CPU (2 cores)", False, 10**9)


def config_of(backend: str, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"backend": backend, **sections})


def place(report: DeviceReport, *, mlx_bits: int | None = None, **sections: Any) -> Place:
    return Place.of(config_of(report.backend, **sections), report, replace(ARCHITECTURE, mlx_bits=mlx_bits))


def checkpoint(trainer: dict[str, Any], *, step: int = 10) -> Checkpoint:
    return Checkpoint(path=None, step=step, state=None, trainer=trainer)  # type: ignore[arg-type]


# --- choosing ---------------------------------------------------------------------------------------------------------


def choose(
    config: RunConfig,
    here: dict[tuple[str, str], DeviceReport],
    *,
    written: str | None = None,
    typed: tuple[str, ...] = (),
) -> tuple[str, str, list[str]]:
    """`here`: what works on this machine, as (backend, device)."""

    def probe(name: str, device: str) -> DeviceReport:
        name = "cuda" if name == "auto" else name
        absent = DeviceReport(name, False, "x86_64", False, 0, problem=f"no {device} for {name}")
        return here.get((name, device), absent)

    chosen, notes = choose_backend(
        config, written=written or config.backend, typed=typed, probe=probe, names=("mlx", "cuda")
    )
    return chosen.backend, chosen.device, notes


MAC_HERE = {("mlx", "auto"): MAC, ("mlx", "gpu"): MAC}
LINUX_HERE = {("cuda", "auto"): CPU, ("cuda", "cpu"): CPU}
RENTED_HERE = {("cuda", "auto"): H200, ("cuda", "gpu"): H200}


def test_a_backend_that_is_here_stays() -> None:
    assert choose(config_of("mlx"), {**MAC_HERE, **RENTED_HERE}) == ("mlx", "auto", [])


def test_one_that_is_not_here_gives_way_in_a_line() -> None:
    assert choose(config_of("mlx", device="gpu"), RENTED_HERE) == (
        "cuda",
        "gpu",
        ["backend mlx: no gpu for mlx; going on with cuda"],
    )


def test_a_gpu_that_is_not_here_gives_way_when_the_backend_moved() -> None:
    assert choose(config_of("mlx", device="gpu"), LINUX_HERE) == (
        "cuda",
        "auto",
        [
            "backend mlx: no gpu for mlx; going on with cuda",
            "device gpu: not here with cuda; going on with CPU (2 cores)",
        ],
    )
    typed = choose(config_of("cuda", device="gpu"), LINUX_HERE, written="mlx", typed=("backend",))
    assert typed == ("cuda", "auto", ["device gpu: not here with cuda; going on with CPU (2 cores)"])


def test_a_gpu_alone_that_is_missing_moves_a_run_to_another_gpu_only() -> None:
    """MLX can compute on a CPU here, which is slower than anybody wants without asking."""
    mlx_on_cpu = {("mlx", "auto"): replace(CPU, backend="mlx")}
    assert choose(config_of("mlx", device="gpu"), {**mlx_on_cpu, **RENTED_HERE})[:2] == ("cuda", "gpu")
    assert choose(config_of("mlx", device="gpu"), {**mlx_on_cpu, **LINUX_HERE}) == ("mlx", "gpu", [])


def test_what_was_typed_stays() -> None:
    here = {**LINUX_HERE, **RENTED_HERE}
    assert choose(config_of("mlx"), here, written="cuda", typed=("backend",)) == ("mlx", "auto", [])
    assert choose(config_of("mlx", device="gpu"), LINUX_HERE, typed=("device",)) == ("mlx", "gpu", [])
    assert choose(config_of("auto"), here, written="mlx", typed=("backend",)) == ("cuda", "auto", [])


def test_nothing_here_leaves_the_settings_alone() -> None:
    assert choose(config_of("mlx"), {}) == ("mlx", "auto", [])


def test_a_reference_model_in_4_bits_of_mlx_is_refused_before_it_is_fetched() -> None:
    config = config_of("mlx", model={"path": "mlx-community/Mistral-7B-Instruct-v0.3-4bit"})
    with pytest.raises(UserError, match="cuda can't read") as caught:
        choose(config, RENTED_HERE)
    assert "--model mistralai/Mistral-7B-Instruct-v0.3" in (caught.value.hint or "")
    assert choose(config, MAC_HERE) == ("mlx", "auto", [])
    assert choose(config, RENTED_HERE, typed=("model.path",))[0] == "cuda"


def test_the_original_of_a_quantised_model() -> None:
    assert original_of("mlx-community/Mistral-7B-Instruct-v0.3-4bit") == "mistralai/Mistral-7B-Instruct-v0.3"
    assert original_of("mistralai/Mistral-7B-Instruct-v0.3") is None
    assert original_of("somebody/else-4bit") is None


# --- stretches --------------------------------------------------------------------------------------------------------


def test_stretches_follow_the_moves() -> None:
    moves = moved_to((), place(MAC), from_step=0)
    assert moves == (Move("mlx", "Apple M3 Max", 0),)
    assert moved_to(moves, place(MAC), from_step=10) == moves
    moves = moved_to(moves, place(H200), from_step=10)
    assert moves == (Move("mlx", "Apple M3 Max", 0), Move("cuda", "NVIDIA H200", 10))
    assert moved_to(moves, place(CPU), from_step=30)[-1] == Move("cuda", "CPU (2 cores)", 30)
    assert [backend_at(moves, step) for step in (0, 5, 10, 11, 40)] == ["mlx", "mlx", "mlx", "cuda", "cuda"]


def test_a_stretch_without_a_checkpoint_is_gone() -> None:
    """The rented machine died before it saved: back at step 10, or at step 5 when the later ones were damaged."""
    moves = (Move("mlx", "Apple M3 Max", 0), Move("cuda", "NVIDIA H200", 10))
    assert moved_to(moves, place(MAC), from_step=10) == moves[:1]
    assert moved_to(moves, place(CPU), from_step=5) == (moves[0], Move("cuda", "CPU (2 cores)", 5))


def test_which_steps_were_measured_here() -> None:
    there = Arrival((Move("mlx", "Apple M3 Max", 0), Move("cuda", "NVIDIA H200", 10)))
    assert [there.is_measured_here(step) for step in (0, 10, 11)] == [False, False, True]
    assert Arrival(there.moves[:1]).is_measured_here(0)


def test_a_checkpoint_keeps_place_and_moves() -> None:
    moves = (Move("mlx", "Apple M3 Max", 0), Move("cuda", "NVIDIA H200", 10))
    saved = checkpoint({"place": place(H200).to_dict(moves)})
    assert place_of(saved) == place(H200) and moves_of(saved, {}) == moves


def test_an_older_checkpoint_has_what_the_state_file_says() -> None:
    older = checkpoint({})
    assert place_of(older) is None
    assert moves_of(older, {"backend": "mlx", "device": "Apple M3 Max"}) == (Move("mlx", "Apple M3 Max", 0),)


# --- what differs -----------------------------------------------------------------------------------------------------


def test_only_what_applies_is_said() -> None:
    plain = {"model": {"bits": 16, "dtype": "float32"}, "lora": {"dropout": 0.0}}
    config = config_of("cuda", **plain)
    assert list(differences(place(MAC, **plain), place(H200, **plain), config)) == []
    config = config_of("cuda", lora={"dropout": 0.1})
    assert [line.partition(":")[0] for line in differences(place(MAC), place(CPU), config)] == [
        "dropout masks",
        "4-bit base",
        "compute type",
    ]
    assert [line.partition(":")[0] for line in differences(place(H200), place(CPU), config)] == [
        "dropout masks",
        "compute type",
    ]
    assert list(differences(place(H200), place(H200), config)) == []


def test_a_quantised_folder_of_mlx_is_four_bit_whatever_the_setting() -> None:
    lines = list(differences(place(MAC, mlx_bits=4), place(H200, model={"bits": 16}), config_of("cuda")))
    assert (
        "4-bit base: MLX's affine groups of 64 there, 16-bit weights here: the weights are rounded differently" in lines
    )


def test_float32_on_the_same_weights_is_held_to_the_tolerance() -> None:
    wide: dict[str, Any] = {"model": {"bits": 16, "dtype": "float32"}}
    narrow: dict[str, Any] = {"model": {"bits": 4, "dtype": "float32"}}
    assert is_exact(place(MAC, **wide), place(H200, **wide))
    assert not is_exact(place(MAC, model={"bits": 16}), place(H200, model={"bits": 16})), "bfloat16"
    assert not is_exact(place(MAC, **narrow), place(H200, **narrow))
    assert is_exact(place(CPU, **narrow), place(H200, **narrow)), "NF4 on both"


def test_another_rounding_of_the_model() -> None:
    there = place(MAC, mlx_bits=4)
    assert is_other_rounding(there, place(H200))
    assert is_other_rounding(place(H200), there)
    assert not is_other_rounding(place(MAC), place(H200)), "neither side is quantised by MLX"
    assert not is_other_rounding(there, place(MAC)), "the backend stays"
    assert not is_other_rounding(None, place(H200)), "an older checkpoint"
    wider = replace(place(H200), architecture={**asdict(ARCHITECTURE), "intermediate_size": 256})
    assert not is_other_rounding(there, wider)


def model_folder(folder: Path, config: dict[str, Any], tokenizer: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


TOKENS = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<end>"}]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0}


def test_traits_are_the_same_however_a_folder_writes_them(tmp_path: Path) -> None:
    """Old and new rope keys; a tokenizer whose tokens come in another order."""
    other_form = {"added_tokens": TOKENS["added_tokens"], "model": {"vocab": {"b": 1, "a": 0}, "merges": []}}
    old = {"rope_theta": 500000, "rope_scaling": {"type": "llama3", "factor": 8.0}}
    new = {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}
    ours = model_traits(model_folder(tmp_path / "old", old, TOKENS))
    assert ours == model_traits(model_folder(tmp_path / "new", new, other_form))
    assert ours["rope theta"] == 500000.0 and ours["rope scaling"] == LLAMA3 and len(ours["tokenizer"]) == 64
    plain = model_traits(model_folder(tmp_path / "plain", {"rope_theta": 1e4, "rope_scaling": None}))
    default = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert plain == model_traits(model_folder(tmp_path / "default", default)) == {"rope theta": 1e4, "rope scaling": {}}
    assert model_traits(model_folder(tmp_path / "silent", {})) == {}


def test_what_two_folders_say_differently(tmp_path: Path) -> None:
    renamed = {**TOKENS, "model": {"vocab": {"a": 1, "b": 0}}}
    there = replace(place(MAC), traits=model_traits(model_folder(tmp_path / "a", {"rope_theta": 1e4}, TOKENS)))
    changed = {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    here = replace(place(H200), traits=model_traits(model_folder(tmp_path / "b", changed, renamed)))
    assert other_traits(there, here) == ["rope theta 10000 there, 500000 here", "another tokenizer"]
    assert other_traits(there, place(H200)) == [], "where one says nothing"
    unscaled = replace(here, traits={**here.traits, "rope scaling": {}})
    (scaling, *_) = other_traits(unscaled, here)
    assert scaling == "rope scaling none there, {'rope_type': 'llama3', 'factor': 8.0} here"


def test_losses_can_be_compared_on_the_same_weights_in_the_same_precision() -> None:
    wide: dict[str, Any] = {"model": {"bits": 16}}
    assert place(MAC, **wide).measures_as(place(H200, **wide))
    assert not place(H200, **wide).measures_as(place(CPU, **wide)), "bfloat16 there, float32 here"
    assert not place(MAC).measures_as(place(H200)), "two roundings to 4 bits"
    assert place(H200).measures_as(place(H200))


# --- what the monitor says --------------------------------------------------------------------------------------------


def test_the_monitor_names_every_backend_of_a_run_that_moved() -> None:
    moves = [
        {"backend": "mlx", "from_step": 0},
        {"backend": "cuda", "from_step": 10},
        {"backend": "mlx", "from_step": 30},
    ]
    assert backends_of({"backend": "mlx", "moves": moves}) == "mlx to step 10, cuda to step 30, mlx"
    assert backends_of({"backend": "mlx", "moves": moves[:1]}) == "mlx"
    assert backends_of({"backend": "mlx"}) == "mlx" and backends_of({}) == ""


@pytest.mark.parametrize("damaged", ["text", 5, [1, 2], None, {}])
def test_the_monitor_stands_a_damaged_list(damaged: Any) -> None:
    assert backends_of({"backend": "cuda", "moves": damaged}) == "cuda"
