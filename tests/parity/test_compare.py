"""Comparing records: what must be identical, how differences are measured, and which place is named first."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from core.config import RunConfig, to_plain
from core.parity import ADAPTER_TOLERANCE, LOSS_FLOOR, REPORT, Report, compare, relative, write_report
from core.parity_plot import PLOT, write_parity_plot
from core.parity_record import FourBits, Record
from core.parity_screen import MAX_STEPS, Page, shown_steps
from core.settings import resolve
from tests.fakes import NAME, FakeData, FakeLearner
from tests.parity.made import make_record, with_four_bits


def at_step(record: Record, step: int, **changes: Any) -> Record:
    """The record with other values at one step."""
    return replace(record, steps=[replace(s, **changes) if s.step == step else s for s in record.steps])


def with_rows(record: Record, **factors: float) -> Record:
    """The record with the loss of its third row multiplied."""
    changed = {}
    for name, factor in factors.items():
        column = list(getattr(record.rows, name))
        column[2] *= factor
        changed[name] = column
    return replace(record, rows=replace(record.rows, **changed))


def with_adapter(record: Record, change: float) -> Record:
    return replace(record, adapter={NAME: np.asarray(record.adapter[NAME] * np.float32(1 + change))})


@pytest.fixture(scope="module")
def a() -> Record:
    return make_record(backend="mlx")


@pytest.fixture(scope="module")
def b() -> Record:
    return make_record(backend="cuda")


def test_equal_records_are_the_same(a: Record, b: Record) -> None:
    report = compare(a, b)
    assert (report.verdict, report.exit_code, report.first) == ("same", 0, None)
    assert [step.loss_difference for step in report.steps] == [0.0] * 5


def test_one_backend_twice_is_no_proof_of_two(a: Record, b: Record) -> None:
    repeated = compare(a, a)
    shown = page(repeated, 100)
    assert repeated.verdict == "same" and "Parity." not in shown and "next" not in shown
    assert "mlx twice" in shown and "one backend repeats itself, not that two agree" in shown
    assert "mlx (1) loss  mlx (2) loss" in shown
    assert repeated.to_dict()["caveat"] == repeated.caveat
    elsewhere = compare(a, replace(a, device="GPU"))
    assert "on another device" in page(elsewhere, 100) and elsewhere.caveat != repeated.caveat
    assert compare(a, b).caveat == "" and compare(a, b).to_dict()["caveat"] is None
    wrong = page(compare(a, at_step(a, 2, loss=9.0)), 100)
    assert "mlx (1) and mlx (2) part first at: loss of step 2" in wrong


def test_differences_are_relative_to_the_larger() -> None:
    assert relative(1.0, 1.25) == relative(-1.25, -1.0) == pytest.approx(0.2)
    assert relative(0.0, 0.0) == 0.0 and relative(0.0, 3.0) == 1.0
    assert relative(1e-6, 2e-6, floor=LOSS_FLOOR) == pytest.approx(1e-4)


def test_just_within_the_tolerances(a: Record, b: Record) -> None:
    step = b.steps[2]
    near = at_step(b, 3, loss=step.loss * (1 + 0.9e-4), grad_norm=step.grad_norm * (1 + 0.9e-3))
    near = with_adapter(with_rows(near, base_nll=1 + 0.9e-4, final_nll=1 - 0.9e-4), 0.9e-3)
    report = compare(a, near)
    assert report.verdict == "same"
    assert report.steps[2].loss_difference == pytest.approx(0.9e-4, rel=1e-3)
    assert report.tensors[0].difference == pytest.approx(0.9e-3, rel=1e-3)


PLACES: list[tuple[str, int | None, dict[str, Any]]] = [
    ("base losses", 0, {"base_nll": 1 + 1.1e-4}),
    ("final losses", 5, {"final_nll": 1 - 1.1e-4}),
]


@pytest.mark.parametrize(("place", "step", "factors"), PLACES)
def test_a_row_beyond_tolerance(a: Record, b: Record, place: str, step: int, factors: dict[str, float]) -> None:
    first = compare(a, with_rows(b, **factors)).first
    assert first is not None and (first.place, first.step) == (place, step)
    assert f"row {b.rows.row_ids[2] + 1}:" in first.detail and f"1 of {len(b.rows.row_ids)}" in first.detail


@pytest.mark.parametrize(
    ("step", "hint"), [(1, "label smoothing"), (2, "bias correction"), (4, "special in this step")]
)
def test_a_gradient_norm_beyond_tolerance(a: Record, b: Record, step: int, hint: str) -> None:
    norm = b.steps[step - 1].grad_norm
    first = compare(a, at_step(b, step, grad_norm=norm * (1 + 1.1e-3))).first
    assert first is not None and (first.place, first.step) == ("gradient norm", step)
    assert hint in first.hint and first.where == f"gradient norm of step {step}"


STEADY = [0.0, 2.8e-4, 5.5e-4, 8.2e-4, 1.1e-3]
"""In proportion to the steps taken, as a weight decay that one side lacks."""
GROWING = [1e-7, 3e-6, 3e-5, 3e-4, 3e-3]


@pytest.mark.parametrize(("apart", "hint"), [(STEADY, "weight_decay=0"), (GROWING, "rounding that grows")])
def test_a_difference_that_grows_says_how(a: Record, b: Record, apart: list[float], hint: str) -> None:
    for step, change in enumerate(apart, start=1):
        b = at_step(b, step, grad_norm=b.steps[step - 1].grad_norm * (1 + change))
    first = compare(a, b).first
    assert first is not None and (first.place, first.step) == ("gradient norm", 5)
    assert hint in first.hint


def test_an_adapter_beyond_tolerance_with_equal_losses(a: Record, b: Record) -> None:
    """One tensor that is shorter all over, and one that is elsewhere by as much."""
    first = compare(a, with_adapter(b, 1.1e-3)).first
    assert first is not None and (first.place, first.step) == ("final adapter", 5)
    assert NAME in first.detail and "weight decay that one side lacks" in first.hint
    tensor = b.adapter[NAME].copy()
    tensor[0, 0] += np.float32(1.1e-3 * np.linalg.norm(tensor))
    first = compare(a, replace(b, adapter={NAME: tensor})).first
    assert first is not None and first.place == "final adapter" and "optim.eps" in first.hint


def test_losses_are_divided_by_each_sides_own_targets(a: Record, b: Record) -> None:
    """A side that counts a target less gives a sum that is smaller, and the same mean."""
    counts, nll = list(b.rows.num_targets), list(b.rows.base_nll)
    nll[1] *= (counts[1] - 1) / counts[1]
    counts[1] -= 1
    report = compare(a, replace(b, rows=replace(b.rows, num_targets=counts, base_nll=nll)))
    assert report.base_rows[1].difference == pytest.approx(0.0, abs=1e-12)
    first = report.first
    assert first is not None and (first.place, first.step) == ("base losses", 0)
    assert (
        first.detail == f"validation row {b.rows.row_ids[1] + 1} is summed over {counts[1] + 1} and {counts[1]} targets"
    )


def test_what_was_before_training_has_its_name(a: Record, b: Record) -> None:
    """With an initial adapter, its scale shows in the losses before the first step."""

    def from_adapter(record: Record) -> Record:
        config = {**record.config, "lora": {**record.config["lora"], "init_adapter": "given"}}
        return replace(record, config=config, four_bits=with_four_bits(record.rows, ids=[1], added=0.5))

    wrong = with_rows(b, base_nll=1.5)
    base, initial = (compare(f(a), f(wrong)) for f in (lambda record: record, from_adapter))
    assert base.first is not None and base.first.place == "base losses" and "scale" not in base.first.hint
    assert initial.first is not None and initial.first.place == "initial losses"
    assert "initial adapter: its scale (alpha, rank, rslora)" in initial.first.hint
    assert initial.to_dict()["start"] == "initial adapter" and base.to_dict()["start"] == "base model"
    shown = page(initial, 100)
    assert "part first at: initial losses" in shown and "initial adapter  " in shown and "base" not in shown


# --- what is too weak to be proven ------------------------------------------------------------------------------------


def test_settings_without_an_effect_are_said_not_to_be_proven(a: Record, b: Record) -> None:
    """A decay takes the sum of the rates times itself off the adapter; twice the tolerance of 1e-3 is enough."""
    rates = sum(step.lr for step in a.steps)

    def unproven(**optim: Any) -> list[str]:
        one, other = (replace(record, config={**record.config, "optim": optim}) for record in (a, b))
        return compare(one, other).unproven

    largest = max(step.grad_norm for step in a.steps)
    assert unproven(weight_decay=2.1e-3 / rates, max_grad_norm=0.99 * largest) == []
    assert unproven(weight_decay=0.0, max_grad_norm=None) == []
    decay, clipping = unproven(weight_decay=1.9e-3 / rates, max_grad_norm=1.01 * largest)
    assert decay.startswith("weight decay is too small here to be proven") and clipping.startswith("clipping never")


def test_what_is_not_proven_is_on_the_page_and_in_the_report(a: Record, b: Record) -> None:
    config = {**a.config, "optim": {**a.config["optim"], "weight_decay": 1e-4}}
    report = compare(replace(a, config=config), replace(b, config=config))
    assert report.verdict == "same" and "not proven  weight decay is too small here" in page(report, 100)
    assert report.to_dict()["not_proven"] == report.unproven != []
    assert "not proven" not in page(compare(a, at_step(b, 2, loss=9.0)), 100)


def test_an_adapter_that_is_zero_on_both_sides_is_equal(a: Record, b: Record) -> None:
    zero = {NAME: np.zeros((1, 16), np.float32)}
    report = compare(replace(a, adapter=zero), replace(b, adapter=zero))
    assert report.tensors[0].difference == 0.0 and report.verdict == "same"


def test_the_first_place_is_the_one_that_comes_first_in_training(a: Record, b: Record) -> None:
    """Everything differs: then what is mended first is what the rest follows from."""
    wrong = with_adapter(with_rows(b, final_nll=2.0), 0.5)
    for step in (4, 3):
        wrong = at_step(wrong, step, loss=9.0, grad_norm=9.0)
    found = []
    for changed in (wrong, at_step(wrong, 2, grad_norm=9.0), at_step(wrong, 2, loss=9.0), with_rows(wrong, base_nll=2)):
        first = compare(a, changed).first
        assert first is not None
        found.append((first.place, first.step))
    assert found == [("loss", 3), ("gradient norm", 2), ("loss", 2), ("base losses", 0)]


# --- what must be identical -------------------------------------------------------------------------------------------


def _other_batch(b: Record) -> Record:
    return at_step(b, 3, inputs="0")


def _other_config(b: Record) -> Record:
    return replace(b, config={**b.config, "lora": {**b.config["lora"], "rank": 99}})


MISMATCHES: dict[str, tuple[Any, list[str], str]] = {
    "settings": (_other_config, ["settings"], "lora.rank 16 (mlx) and 99 (cuda)"),
    "model": (lambda b: replace(b, model_fingerprint="other"), ["model"], "not the same files"),
    "inputs": (_other_batch, ["inputs"], "other inputs"),
    "targets": (lambda b: at_step(b, 2, targets="0"), ["targets"], "other targets"),
    "validation": (lambda b: replace(b, validation_targets="0"), ["validation"], "validation rows"),
    "initial adapter": (lambda b: replace(b, initial_adapter="0"), ["initial adapter"], "same tensors"),
    "learning rate": (lambda b: at_step(b, 4, lr=1e-9), ["learning rate"], "1e-09"),
    "steps": (lambda b: replace(b, steps=b.steps[:-1]), ["inputs"], "steps: 5 (mlx) and 4 (cuda)"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_records_of_different_things_are_not_compared(a: Record, b: Record, name: str) -> None:
    change, places, words = MISMATCHES[name]
    report = compare(a, change(b))
    assert (report.verdict, report.exit_code) == ("not comparable", 1)
    assert [mismatch.place for mismatch in report.mismatches] == places
    assert words in report.mismatches[0].detail and report.mismatches[0].hint
    assert report.steps == [] and report.first == report.mismatches[0]


def test_the_step_of_the_first_other_batch_is_named(a: Record, b: Record) -> None:
    report = compare(a, _other_batch(at_step(b, 5, inputs="1")))
    assert report.mismatches[0].where == "inputs of step 3"


def test_other_data_shows_as_inputs_targets_and_validation(a: Record) -> None:
    report = compare(a, make_record(rows=FakeData(seed=3)))
    assert [mismatch.place for mismatch in report.mismatches] == ["inputs", "targets", "validation"]


def test_what_may_differ_between_machines_is_no_mismatch(a: Record) -> None:
    other = make_record(
        model={"path": "elsewhere/model"},
        data={"path": "elsewhere/rows.jsonl"},
        eval={"every": 7},
        train={"gradient_checkpointing": True},
    )
    assert compare(a, other).verdict == "same"


def test_another_seed_is_a_setting(a: Record) -> None:
    assert compare(a, make_record(train={"seed": 1})).mismatches[0].detail == "train.seed 0 (mlx) and 1 (cuda)"


# --- four bits --------------------------------------------------------------------------------------------------------


def test_four_bits_are_compared_on_the_rows_that_both_tried(a: Record, b: Record) -> None:
    """Rows 0 to 3 on one side, 2 to 5 on the other: rows 2 and 3. They never change the verdict."""
    one = replace(a, four_bits=with_four_bits(a.rows, ids=[0, 1, 2, 3], added=0.25))
    other = replace(b, four_bits=with_four_bits(b.rows, ids=[2, 3, 4, 5], added=9.0))
    report = compare(one, other)
    found = report.four_bits
    assert found is not None and report.verdict == "same"
    places = [a.rows.row_ids.index(row) for row in (2, 3)]
    targets = sum(a.rows.num_targets[place] for place in places)
    base = sum(a.rows.base_nll[place] for place in places) / targets
    final = sum(a.rows.final_nll[place] for place in places) / targets
    assert (found.num_rows, found.num_targets) == (2, targets)
    assert found.base_16 == pytest.approx((base, base)) and found.base_4 == pytest.approx((base + 0.25, base + 9.0))
    assert found.final_16 == pytest.approx((final, final)) and found.final_4 == pytest.approx((final + 0.25, final + 9))


def test_why_four_bits_were_left_out_is_said(a: Record, b: Record) -> None:
    """And on which side, where it was one only."""
    report = compare(a, b)
    assert report.four_bits is None and report.four_bits_skipped == "not asked for"
    tried = replace(a, four_bits=with_four_bits(a.rows, ids=[0], added=0.25))
    assert compare(tried, b).four_bits_skipped == "cuda: not asked for"
    missing = replace(b, four_bits=FourBits("", None, "cuda: no bitsandbytes"))
    assert compare(tried, missing).four_bits_skipped == "cuda: no bitsandbytes"
    assert compare(a, missing).four_bits_skipped == "mlx: not asked for; cuda: no bitsandbytes"


# --- files and screen -------------------------------------------------------------------------------------------------


def test_the_report_as_a_file(a: Record, b: Record, tmp_path: Path) -> None:
    write_report(tmp_path, compare(a, with_rows(at_step(b, 2, loss=9.0), final_nll=3.0)))
    plain = json.loads((tmp_path / REPORT).read_text())
    assert plain["verdict"] == "different"
    assert (plain["first_difference"]["place"], plain["first_difference"]["step"]) == ("loss", 2)
    assert plain["tolerances"] == {"loss": 1e-4, "grad_norm": 1e-3, "adapter": 1e-3, "loss_floor": 0.01}
    assert [side["backend"] for side in plain["sides"]] == ["mlx", "cuda"]
    assert plain["steps"][1]["losses"] == [a.steps[1].loss, 9.0]
    assert [row["row"] for row in plain["rows"]["final"]] == [row + 1 for row in b.rows.row_ids], "all of them"
    assert plain["rows"]["final"][2]["difference"] == pytest.approx(2 / 3)
    assert [row["losses"][1] for row in plain["rows"]["base"]] == [
        nll / count for nll, count in zip(b.rows.base_nll, b.rows.num_targets, strict=True)
    ]
    assert plain["adapter"] == [{"name": NAME, "difference": 0.0, "is_length": False}]


def page(report: Report, width: int, *, typed: list[str] | None = None) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Page(report, Path("runs/parity"), typed))
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_page_says_it_in_words_and_fits(a: Record, b: Record, width: int) -> None:
    good, bad = page(compare(a, b), width), page(compare(a, at_step(b, 2, loss=9.0)), width)
    assert "Parity. mlx and cuda train the same adapter" in good and "beyond" not in good
    assert "part first at: loss of step 2" in bad and bad.count("beyond") == 2  # the step's line and the largest
    apart = page(compare(a, _other_config(b)), width)
    assert "Not comparable" in apart and "lora.rank 16 (mlx) and 99 (cuda)" in apart
    for text in (good, bad, apart):
        assert all(len(line) <= width and line == line.rstrip() for line in text.splitlines())


def test_a_place_is_named_only_where_there_is_a_difference(a: Record, b: Record) -> None:
    def largest(report: Report) -> list[str]:
        lines = page(report, 100).splitlines()
        start = next(number for number, line in enumerate(lines) if line.split()[:1] == ["largest"])
        return [" ".join(line.split()) for line in lines[start + 1 : start + 6]]

    assert largest(compare(a, b)) == [
        *("loss 0 1e-04", "gradient norm 0 1e-03", "rows before 0 1e-04", "rows after 0 1e-04", "adapter 0 1e-03")
    ]
    found = largest(compare(a, with_rows(at_step(b, 2, loss=b.steps[1].loss * (1 + 1e-5)), final_nll=1 + 1e-5)))
    assert found[0] == "loss 1.0e-05 1e-04 step 2" and found[1] == "gradient norm 0 1e-03"
    place, of = b.rows.row_ids[2] + 1, len(b.rows.row_ids)
    assert found[2] == "rows before 0 1e-04" and found[3] == f"rows after 1.0e-05 1e-04 row {place} of {of}"


@pytest.mark.parametrize("width", [40, 60, 100])
def test_the_next_command_keeps_the_settings_and_can_be_pasted(a: Record, b: Record, width: int) -> None:
    typed = ["--model", "my model", "--data", "rows.jsonl", "--set", "lora.rank=8", "--lr", "0.3"]
    shown = page(compare(a, b), width, typed=typed)
    command = shown[shown.index("next ") + 4 :]
    assert shlex.split(command.replace("\\\n", " ")) == ["python", "cli.py", "train", *typed, "--backend", "mlx"]
    assert "next" not in page(compare(a, at_step(b, 2, loss=9.0)), width, typed=typed)


def test_the_next_command_after_two_records_has_their_settings() -> None:
    changes: dict[str, Any] = {"model": {"path": "org/it"}, "lora": {"dropout": 0.1, "targets": ["q_proj", "v_proj"]}}
    one, other = (make_record(backend=backend, **changes) for backend in ("mlx", "cuda"))
    shown = page(compare(one, other), 100)
    words = shlex.split(shown[shown.index("next ") + 4 :].replace("\\\n", " "))
    given = words[3:]
    assert given[:4] == ["--model", "org/it", "--data", one.config["data"]["path"]]
    settings = resolve(assignments=[given[at + 1] for at, word in enumerate(given) if word == "--set"]).config
    assert to_plain(settings)["lora"] == {**one.config["lora"], "dropout": RunConfig().lora.dropout}
    assert to_plain(settings)["optim"] == one.config["optim"]
    assert settings.train.accumulation == 2 and settings.train.max_steps is None


def test_many_steps_are_thinned_but_the_telling_ones_stay() -> None:
    report = compare(make_record(backend="mlx"), make_record())
    long = [replace(report.steps[0], step=step) for step in range(1, 101)]
    long[36] = replace(long[36], loss_difference=2e-4)
    long[73] = replace(long[73], norm_difference=5e-3)
    long[90] = replace(long[90], loss_difference=3e-4)
    shown = [step.step for step in shown_steps(long)]
    assert len(shown) == MAX_STEPS and shown == sorted(shown)
    assert {1, 37, 74, 91, 100} <= set(shown)


def test_the_plot_shows_losses_and_differences(
    a: Record, b: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Figure] = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (saved.append(self), real(self, *args, **kw)))
    report = compare(a, with_adapter(with_rows(at_step(b, 2, loss=9.0), base_nll=1.5), 5e-3))
    write_parity_plot(tmp_path, report)
    with Image.open(tmp_path / PLOT) as image:
        assert image.size == (1200, 1200)
    assert all(axes.bbox.width > 400 and axes.bbox.height > 200 for axes in saved[0].axes), "the layout found room"
    losses, differences, rows, tensors = saved[0].axes
    assert losses.lines[0].get_ydata().tolist() == [step.loss for step in a.steps]
    assert losses.lines[1].get_ydata()[1] == 9.0
    drawn = differences.lines[0].get_ydata().tolist()
    assert drawn[1] == pytest.approx(1 - a.steps[1].loss / 9.0) and np.isnan(drawn[0]), "no line leads to 0"
    zeros = differences.lines[1]
    assert zeros.get_xdata().tolist() == [1, 3, 4, 5] and set(zeros.get_ydata()) == {0.0}
    assert zeros.get_linestyle() == "None" and differences.get_yticks()[0] == differences.get_ylim()[0] == 0
    assert rows.lines[0].get_ydata()[0] == pytest.approx(1 / 3)
    assert tensors.lines[0].get_ydata().tolist() == pytest.approx([5e-3 / 1.005], rel=1e-3)
    assert ADAPTER_TOLERANCE in tensors.lines[1].get_ydata()
    assert {axes.get_yscale() for axes in (differences, rows, tensors)} == {"symlog"}
    title = saved[0].get_suptitle()
    assert "fake" in title and "No parity. mlx and cuda part first at: base losses." in title


def test_no_plot_of_records_that_cannot_be_compared(a: Record, b: Record, tmp_path: Path) -> None:
    write_parity_plot(tmp_path, compare(a, _other_config(b)))
    assert not (tmp_path / PLOT).exists()


def test_a_learner_of_another_start_is_noticed(a: Record) -> None:
    learner = FakeLearner(dropout=0.0)
    learner.logits[0, 3] = 1e-3
    assert [m.place for m in compare(a, make_record(learner=learner)).mismatches] == ["initial adapter"]
