"""The benchmarks of speed in their smallest form: every tool trains the same, figures are there and add up, and the
multiply-adds are those that torch counts."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import dropout_cost, growth, peers, profile_step
from benchmarks.common import command_line, make_batches
from benchmarks.dense_work import work_of_a_step
from benchmarks.peers_tools import Turn, trl_settings
from benchmarks.watched import num_evaluations
from tests.backends.conftest import added_product, make_batch, open_learner, skip_without
from tests.tiny import make_model

NUM_LAYERS, RANK = 4, 4
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture(params=["mlx", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short questions and answers, no two alike."""
    path, words = tmp_path_factory.mktemp("rows") / "rows.jsonl", random.Random(0)

    def some(least: int, most: int) -> str:
        return " ".join(words.choices(WORDS, k=words.randint(least, most)))

    lines = [json.dumps({"prompt": f"{n} {some(2, 6)}", "completion": some(3, 12)}) for n in range(40)]
    path.write_text("\n".join(lines) + "\n")
    return path


# --- whole runs beside the peers --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("dropout", "named"), [("0", ""), ("0.1", ", dropout 0.1")])
def test_a_whole_run_beside_its_peer(
    backend: str,
    model: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dropout: str,
    named: str,
) -> None:
    if not peers.has_packages([*peers.NEEDED[backend], *peers.NEEDED["cuda"][:2]]):
        pytest.skip(f"{peers.PEERS[backend]} is not installed")
    output, mine, peer = tmp_path / "peers.json", f"twinkeel {backend}", peers.PEERS[backend]
    peers.main(
        [
            *("--backend", backend, "--frozen", "half", "--model", str(model), "--data", str(rows)),
            *("--rows", "16", "--val-rows", "4", "--epochs", "2", "--eval-every", "3", "--repeats", "1"),
            *("--output", str(output), "--dropout", dropout),
        ]
    )
    text = output.read_text()
    assert str(tmp_path) not in text and str(model.parent) not in text
    ((part, report),) = json.loads(text).items()
    assert part == f"tiny, 16-bit, cpu, {backend}, half frozen{named}"
    assert report["settings"][mine]["lora.dropout"] == str(float(dropout))
    assert report["sizes"] | {"steps": 8, "evaluations": 4, "frozen_layers": 2, "layers": 4} == report["sizes"]
    assert list(report["turns"]) == list(report["median"]) == [mine, mine + peers.WARM, peer]
    for (turn,) in report["turns"].values():
        assert all(turn[figure] > 0.0 for figure in peers.FIGURES)
        assert turn["steps"] == 8 and len(turn["evaluation_seconds"]) == 4
        inside = turn["steps_seconds"] + sum(turn["evaluation_seconds"]) + turn["load_seconds"]
        assert inside < turn["run_seconds"] == turn["process"]["wall_seconds"]
        assert turn["run_without_probe_seconds"] == turn["run_seconds"] - sum(turn.get("probe_seconds", []))
    (cold,), (warm,), (theirs,) = report["turns"].values()
    assert cold["filled_rows"] == 20 and warm["filled_rows"] == 0
    assert cold["store_bytes"] > 20 * 64 * 4 and "probe_seconds" not in theirs
    # the same model and rows to begin with; the peers' own losses have a target more in each row
    assert theirs["base_loss"] == pytest.approx(cold["base_loss"], rel=0.02)
    # the same training, from another first adapter and in another order; and one code that judges
    assert cold["final_loss"] == pytest.approx(warm["final_loss"], rel=1e-6)
    assert cold["final_loss"] == pytest.approx(cold["own_loss"], rel=1e-4)
    assert theirs["final_loss"] == pytest.approx(cold["final_loss"], rel=3e-3)
    assert all(one["final_loss"] < cold["base_loss"] for one in (cold, theirs))
    ratio = report["times_faster"][mine]["run_seconds"]
    assert ratio == [theirs["run_seconds"] / cold["run_seconds"]]
    assert report["settings"][mine]["lora.frozen_fraction"] == "0.5"
    shown = capsys.readouterr().out
    assert f"| {peer} | " in shown and f"| {mine}{peers.WARM}: times less | " in shown
    assert f"goal, {mine}, whole run, s: 2.5x {peer}: " in shown


def test_sizes_that_the_peers_would_cut_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--rows", "18"], ["--val-rows", "5"], ["--eval-every", "1"]):
        with pytest.raises(SystemExit):
            peers.parse(arguments)
        assert "mlx_lm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parse", "arguments", "said"),
    [
        (peers.parse, ["--dropout", "1.5"], "--dropout must be"),
        (dropout_cost.parse, ["--rate", "0"], "--rate must be"),
        (dropout_cost.parse, ["--rows", "16"], "--rows must be 48 or more for --batches 6"),
        (dropout_cost.parse, ["--data", "nowhere.jsonl"], "--data nowhere.jsonl: no such file"),
    ],
)
def test_options_that_can_t_be_are_one_line(
    capsys: pytest.CaptureFixture[str], parse: Any, arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("is_large", [False, True])
def test_trl_knows_every_setting_that_it_is_given(is_large: bool, tmp_path: Path) -> None:
    from trl import SFTConfig  # type: ignore[attr-defined]

    turn = Turn(
        *("", "", str(tmp_path), "cpu"), bits=16, num_rows=8, batch_size=4, epochs=1, eval_every=2, max_tokens=64,
        num_layers=4, num_frozen=0, is_large=is_large,
    )  # fmt: skip
    settings = trl_settings(turn)
    config = SFTConfig(**settings)
    assert config.gradient_checkpointing is is_large
    for name in settings.keys() - {"output_dir", "report_to"}:  # these two it rewrites
        assert getattr(config, name) == settings[name], name


@pytest.mark.parametrize(("steps", "every", "count"), [(48, 10, 6), (8, 4, 3), (3, 5, 2)])
def test_evaluations_of_a_run(steps: int, every: int, count: int) -> None:
    assert num_evaluations(steps, every) == count


def test_the_command_is_noted_without_this_machines_folders() -> None:
    assert command_line("peers.py", ["--model", "/some/where/model", "--bits", "4"]) == (
        "python benchmarks/peers.py --model model --bits 4"
    )


# --- growth -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_growth_with_the_rows(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "AXES", {"rows": (1, 3)})
    output = tmp_path / "growth.json"
    growth.main(["--backend", backend, "--rows", "4", "--tokens", "32", "--layers", "2", "--output", str(output)])
    ((part, report),) = json.loads(output.read_text()).items()
    assert part == f"{backend}, cpu"
    assert [(one["rows"], one["store"]) for one in report["points"]] == [(4, True), (4, False), (12, True), (12, False)]
    for one in report["points"]:
        assert one["seconds_per_step"] > 0.0 and one["seconds_per_evaluation"] > 0.0 and one["peak_gb"] > 0.0
        assert one["steps"] == growth.EPOCHS * one["rows"] // 4
        # every row's states once, float32, and little beside them
        states = (one["rows"] + 4) * 32 * growth.SHAPE["hidden_size"] * 4 / 1e6
        assert states <= one["store_mb"] < 1.1 * states if one["store"] else one["store_mb"] == 0.0
        assert one["filled_rows"] == (one["rows"] + 4 if one["store"] else 0)
    with_store, without = report["slopes"]
    assert with_store["store"] and not without["store"]
    assert with_store["store_mb"] == pytest.approx(math.log(16 / 8) / math.log(3), rel=0.05)
    assert without["store_mb"] is without["fill_seconds"] is None
    for plain, stored in zip(report["points"][1::2], report["points"][::2], strict=True):
        np.testing.assert_allclose(stored["losses"], plain["losses"], rtol=1e-5)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_slope_is_the_exponent() -> None:
    line = [{"rows": rows, "peak_gb": 3.0 * rows**1.5, "store_mb": 0.0} for rows in (2, 6, 20)]
    assert growth.slope(line, "rows", "peak_gb") == pytest.approx(1.5)
    assert growth.slope(line, "rows", "store_mb") is None


# --- where a step's time goes -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_profile_of_a_step(
    backend: str, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "profile.json"
    profile_step.main(
        [
            *("--backend", backend, "--model", str(model), "--data", str(rows), "--batches", "2"),
            *("--repeats", "1", "--output", str(output)),
        ]
    )
    ((part, report),) = json.loads(output.read_text()).items()
    assert part == f"tiny, {backend}, cpu" and list(report["setups"]) == list(profile_step.SETUPS)
    whole, half, stored = report["setups"].values()
    assert whole["tokens"] == half["tokens"] == stored["tokens"] <= whole["positions"]
    for one in (whole, half, stored):
        assert 0.0 < one["share_of_limit"] < 1.0 and one["rates_gflops"]["large"] > 0.0
        assert sum(one["split"].values()) == pytest.approx(one["seconds_per_step"])
        if backend == "cuda":
            assert sum(one["by_kind"].values()) == pytest.approx(1.0)
            kinds = ("matrix products of the head", "other matrix products", "attention", "optimiser and clipping")
            assert all(one["by_kind"][kind] > 0.0 for kind in kinds) and one["by_kind"]["other"] < 0.05
            # AdamW looks at each tensor's count of steps, once: nothing else reads a number between logs
            tensors = 2 * 4 * (NUM_LAYERS if one is whole else NUM_LAYERS // 2)
            assert one["scalar_reads_per_step"]["aten::item"] in (0.0, tensors)
            assert sum(one["host_waits_per_step"].values()) == 0.0
    forward = [sum(one["multiply_adds"]["forward"].values()) for one in (whole, half, stored)]
    assert forward[2] < forward[1] < forward[0]  # half the adapters, then half the layers
    assert half["multiply_adds"]["weight_gradients"] == stored["multiply_adds"]["weight_gradients"]
    shown = capsys.readouterr().out
    assert "| share of the limit |" in shown and "| backward, s |" in shown


@pytest.mark.slow
def test_cost_of_dropout(
    backend: str, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "dropout.json"
    given = ["--backend", backend, "--model", str(model), "--data", str(rows), "--batches", "2", "--repeats", "2"]
    dropout_cost.main([*given, "--rate", "0.2", "--output", str(output)])
    ((part, report),) = json.loads(output.read_text()).items()
    assert part == f"tiny, {backend}, cpu" and report["rate"] == 0.2
    assert report["seconds_without"] > 0.0 and report["seconds_with"] > 0.0 and report["ratio"] > 0.0
    assert "times as long" in capsys.readouterr().out


def test_switching_dropout_off_and_on_is_seen_by_the_learner(backend: str, tmp_path: Path) -> None:
    learner = open_learner(backend, make_model(tmp_path / "model"), lora={"dropout": 0.5})
    losses = {}
    for rate in (0.5, 0.0):
        dropout_cost.switch(learner, backend, rate)
        losses[rate] = [float(learner.train_step([make_batch()], step=step, lr=0.0).loss) for step in (1, 2)]
    assert losses[0.5][0] != losses[0.5][1] and losses[0.0][0] == losses[0.0][1]
    learner.close()


@pytest.mark.parametrize("first_layer", [0, 2], ids=["all layers", "half frozen"])
def test_multiply_adds_of_a_step_are_those_that_torch_counts(model: Path, first_layer: int) -> None:
    """torch's counter does not know our attention's kernel: its scores are taken off."""
    skip_without("cuda")
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    learner: Any = open_learner("cuda", model, lora={"rank": RANK, "frozen_fraction": first_layer / NUM_LAYERS})
    (batch,) = make_batches(rows=1, width=40, count=1, vocab_size=320)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        learner.train_step([batch], step=1, lr=0.0)
    learner.close()
    config = json.loads((model / "config.json").read_text())

    def operations(lengths: list[int]) -> int:
        targets = batch.num_targets
        return (
            2 * work_of_a_step(config, lengths=lengths, num_targets=targets, first_layer=first_layer, rank=RANK).total
        )

    length = batch.num_real_tokens  # padding is not computed
    whole, single = operations([length]), operations([1] * length)
    scores = (whole - single) * length**2 // (length**2 - length)
    assert counter.get_flop_counts()["Global"].keys() == {torch.ops.aten.mm, torch.ops.aten.addmm_}
    assert counter.get_total_flops() == whole - scores


def test_stored_layers_cost_nothing(model: Path) -> None:
    """What is left is a model of the upper layers alone."""
    config = json.loads((model / "config.json").read_text())
    sizes: dict[str, Any] = {"lengths": [9, 5], "num_targets": 6, "rank": RANK}
    stored = work_of_a_step(config, first_layer=1, stored=True, **sizes)
    assert stored == work_of_a_step(config | {"num_hidden_layers": NUM_LAYERS - 1}, first_layer=0, **sizes)
    # scores by hand: 64 query features, half of 9 * 9 + 5 * 5 pairs, for scores and for values
    assert stored.forward["attention scores"] == 3 * 64 * 106
    assert stored.input_gradients["attention scores"] == 2 * stored.forward["attention scores"]
