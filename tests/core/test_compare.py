"""Runs side by side: what differs, which is better, and when that can't be said."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from core.comparison import compare as compare_module
from core.comparison.compare import Comparison, compare, make_comparison
from core.comparison.plot import read_evaluations, write_plot
from core.comparison.rows import PairedDifference, difference, read_judged
from core.comparison.screen import print_comparison
from core.errors import UserError
from core.run import newest_run
from tests.core.run_folders import bind_to_data, make_run

TARGETS = [2] * 20
ROWS_A = [2.0 * (1.0 + 0.1 * (row % 3)) for row in range(20)]


def pair_of_runs(tmp_path: Path, shift: float, **other: Any) -> list[Path]:
    """Two runs on the same 20 rows of two targets; the second's loss is `shift` nats a token above in each row."""
    base = [8.0] * 20
    one = make_run(tmp_path / "one", targets=TARGETS, val_nll={0: base, 10: ROWS_A})
    shifted = [nll + 2 * shift for nll in ROWS_A]
    two = make_run(tmp_path / "two", **{"targets": TARGETS, "val_nll": {0: base, 10: shifted}, **other})
    return [one, two]


def text_of(found: Comparison, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    print_comparison(found, console=console, written=None)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_difference_in_every_row_is_clear(tmp_path: Path) -> None:
    found = make_comparison(pair_of_runs(tmp_path, 0.25))
    pair = found.pairs[0, 1]
    assert isinstance(pair, PairedDifference)
    # the same in every row: no resample can make another of it
    assert pair.value == pytest.approx(-0.25) and pair.low == pytest.approx(-0.25) and pair.high == pytest.approx(-0.25)
    assert pair.is_clear and pair.is_all and (pair.num_rows, pair.num_targets) == (20, 40)
    assert found.notes[0] == (
        "one is better than two: its validation loss is lower by 0.250 [0.250, 0.250] on the same 20 validation rows."
    )


def test_the_difference_is_weighted_by_target_tokens(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", val_nll={10: [1.0, 2.0, 3.0, 4.0]})
    two = make_run(tmp_path / "two", val_nll={10: [2.0, 2.0, 2.0, 2.0]})
    pair = make_comparison([one, two]).pairs[0, 1]
    assert isinstance(pair, PairedDifference)
    assert pair.value == pytest.approx((-1 + 0 + 1 + 2) / (1 + 2 + 3 + 4))
    assert pair.low < 0 < pair.high and not pair.is_clear


def test_no_difference_is_said_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0.0, 0.5, 20)
    noise -= noise.mean()
    noisy = (np.array(ROWS_A) + noise).tolist()
    found = make_comparison(pair_of_runs(tmp_path, 0.0, val_nll={0: [8.0] * 20, 10: noisy}))
    assert "can't be told apart" in found.notes[0] and "better" not in found.notes[0]


def test_three_rows_are_too_few_to_be_clear(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", targets=[1, 1, 1], val_nll={10: [1.0, 1.0, 1.0]})
    two = make_run(tmp_path / "two", targets=[1, 1, 1], val_nll={10: [2.0, 2.0, 2.0]})
    assert "can't be told apart" in make_comparison([one, two]).notes[0]


def test_only_rows_that_both_hold_out_count(tmp_path: Path) -> None:
    names = [f"d.jsonl:{number}" for number in (3, 1, 9, 8)]
    one = make_run(tmp_path / "one", targets=[1, 2, 3, 4], val_nll={10: [1.0, 2.0, 3.0, 4.0]})
    two = make_run(tmp_path / "two", targets=[3, 1, 5, 5], origins=names, val_nll={10: [6.0, 3.0, 100.0, 100.0]})
    pair = make_comparison([one, two]).pairs[0, 1]
    assert isinstance(pair, PairedDifference)
    # rows 1 (1 target: 1.0 against 3.0) and 3 (3 targets: 3.0 against 6.0)
    assert pair.value == pytest.approx(((1.0 - 3.0) + (3.0 - 6.0)) / 4)
    assert (pair.num_rows, pair.num_targets, pair.is_all) == (2, 4, False)


def test_a_loss_on_shared_rows_only_is_not_marked_as_best(tmp_path: Path) -> None:
    names = [f"d.jsonl:{number}" for number in range(2, 22)]
    found = make_comparison(pair_of_runs(tmp_path, 0.2, origins=names))
    assert "best_val_loss" not in found.best
    assert "on the shared 19 validation rows" in found.notes[0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data": "other.jsonl"}, "they were judged by different data"),
        ({"targets": [2] * 19 + [3]}, "their rows have other target tokens"),
        ({"origins": [f"d.jsonl:{900 + number}" for number in range(20)]}, "they have no validation row in common"),
        ({"val_nll": {0: [9.0] * 20, 10: ROWS_A}}, "the rows have other texts"),
        ({"val_nll": {0: [8.0] * 20}}, "two has no losses of validation rows at a best step"),
    ],
)
def test_losses_on_other_rows_are_not_compared(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    found = make_comparison(pair_of_runs(tmp_path, 0.2, **changes))
    pair = found.pairs[0, 1]
    assert isinstance(pair, str) and pair.startswith(why)
    assert "best_val_loss" not in found.best and not any("better" in note for note in found.notes)


def test_different_data_are_named(tmp_path: Path) -> None:
    found = make_comparison(pair_of_runs(tmp_path, 0.2, data="other.jsonl"))
    assert found.notes[0] == (
        "Different data (one on d.jsonl; two on other.jsonl): losses, gaps and scores can't be compared between them."
    )


def test_the_same_fingerprint_settles_it(tmp_path: Path) -> None:
    """Another base model makes other base losses of the same rows."""
    folders = pair_of_runs(tmp_path, 0.2, val_nll={0: [9.0] * 20, 10: ROWS_A})
    for folder in folders:
        bind_to_data(folder, "same")
    assert isinstance(make_comparison(folders).pairs[0, 1], PairedDifference)


def test_only_settings_that_differ_are_shown(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", settings={"optim": {"lr": 1e-3}, "output": "x"})
    two = make_run(tmp_path / "two", settings={"optim": {"lr": 2e-3}, "lora": {"rank": 4}, "output": "y"})
    assert make_comparison([one, two]).settings == {"lora.rank": (16, 4), "optim.lr": (1e-3, 2e-3)}


def test_another_seed_alone_is_luck(tmp_path: Path) -> None:
    found = make_comparison(pair_of_runs(tmp_path, 0.2, settings={"train": {"seed": 7}}))
    assert "Only the seed differs: how far the runs lie apart is what luck alone does." in found.notes


def test_the_best_of_each_figure(tmp_path: Path) -> None:
    folders = pair_of_runs(
        tmp_path, 0.2, summary={"best_val_loss": 2.2, "wall_seconds": 10.0, "tokens_per_second": 99.0}
    )
    found = make_comparison(folders)
    assert found.best == {"best_val_loss": 0, "wall_seconds": 1, "tokens_per_second": 0}
    lines = text_of(found, 80).splitlines()
    assert next(line for line in lines if "best validation loss" in line).split()[-2:] == ["2.000*", "2.200"]
    assert next(line for line in lines if " time" in line).split()[-2:] == ["1:05", "0:10*"]


@pytest.mark.parametrize(
    ("shift", "words"), [(0.001, "differ by 0.001 [0.001, 0.001]"), (0.0, "differ by 0.000 [0.000")]
)
def test_less_than_one_percent_of_perplexity_is_no_difference(tmp_path: Path, shift: float, words: str) -> None:
    found = make_comparison(pair_of_runs(tmp_path, shift, summary={"best_val_loss": 2.0 + shift}))
    assert found.notes[0].startswith("one and two are as good as each other: their validation losses " + words)
    assert found.notes[0].endswith(", less than 0.01 nats (1 % of perplexity), on the same 20 validation rows.")
    assert "best_val_loss" not in found.best
    assert found.to_dict()["pairs"][0]["is_negligible"]


def test_more_than_that_or_not_surely_less_is_said_as_ever(tmp_path: Path) -> None:
    found = make_comparison(pair_of_runs(tmp_path / "more", 0.011, summary={"best_val_loss": 2.011}))
    assert found.notes[0].startswith("one is better than two") and found.best["best_val_loss"] == 0
    wide = [nll + (0.4 if row % 2 else -0.396) for row, nll in enumerate(ROWS_A)]  # 0.001 a token, of -0.2 or 0.2
    found = make_comparison(pair_of_runs(tmp_path / "wide", 0.0, val_nll={0: [8.0] * 20, 10: wide}))
    pair = found.pairs[0, 1]
    assert isinstance(pair, PairedDifference) and abs(pair.value) < 0.01 < pair.high - pair.low
    assert "can't be told apart" in found.notes[0]


def test_three_rows_are_too_few_to_be_as_good(tmp_path: Path) -> None:
    few = {"targets": [1, 1, 1], "val_nll": {10: [1.0, 1.0, 1.0]}}
    found = make_comparison([make_run(tmp_path / "one", **few), make_run(tmp_path / "two", **few)])
    assert "can't be told apart" in found.notes[0]


def test_the_better_run_is_named_though_the_table_has_another_lowest(tmp_path: Path) -> None:
    """a and b share rows on which a is lower by 0.2, b and c others on which b is lower by 0.3, a and c none."""
    names = [f"d.jsonl:{number}" for number in range(1, 41)]
    runs = {
        # of each row: its loss
        "a": (names[:20], [3.0] * 20),
        "b": (names, [3.2] * 20 + [1.0] * 20),
        "c": (names[20:], [1.3] * 20),
    }
    folders = [
        make_run(
            tmp_path / name,
            targets=[1] * len(rows),
            origins=rows,
            val_nll={0: [4.0] * len(rows), 10: nll},
            summary={"best_val_loss": sum(nll) / len(nll) if name != "c" else 2.5},
        )
        for name, (rows, nll) in runs.items()
    ]
    found = make_comparison(folders)
    assert found.notes[0] == (
        "a is better than b: its validation loss is lower by 0.200 [0.200, 0.200] on the shared 20 validation rows."
    )
    assert found.notes[1].startswith("b is better than c: its validation loss is lower by 0.300 [0.300, 0.300]")
    assert not any("The lowest of" in note for note in found.notes)


def test_a_gap_is_better_by_its_grade(tmp_path: Path) -> None:
    changes = {
        "probe_loss": 1.1,
        "gap": 0.9,
        "gap_low": 0.8,
        "gap_high": 1.0,
        "grade": "CRITICAL",
        "best_val_loss": 1.9,
    }
    found = make_comparison(pair_of_runs(tmp_path, -0.3, summary=changes))
    assert found.best["gap"] == 0
    assert found.notes[0].startswith("two is better than one") and "its gap is CRITICAL, not GOOD" in found.notes[0]


def test_a_run_that_did_not_end_well_is_shown_and_not_marked(tmp_path: Path) -> None:
    folders = pair_of_runs(tmp_path, 0.2, status="failed", state={"error": "out of memory"})
    found = make_comparison(folders)
    assert found.best == {}
    assert "two: failed (out of memory); its figures are those so far." in found.notes
    assert "failed at step 20" in text_of(found, 80)


def test_a_run_without_a_summary_has_what_is_known(tmp_path: Path) -> None:
    folders = pair_of_runs(tmp_path, 0.2, status="interrupted")
    (folders[1] / "training_summary.json").unlink()
    figures = make_comparison(folders).runs[1].figures
    assert (figures["best_step"], figures["base_val_loss"], figures["gap"]) == (10, 3.0, pytest.approx(0.1))
    assert figures["wall_seconds"] is None


def write_evaluation(
    folder: Path, *, loss: float, f1: float, rows: int = 50, split: str = "test", adapter: str | None = None
) -> None:
    (folder / "evaluation").mkdir()
    report = {
        **({} if adapter is None else {"adapter_sha256": adapter}),
        "data": "d.jsonl",
        "split": split,
        "losses": {
            "base": {"loss": 3.0},
            "adapter": {"loss": loss},
            "gain": 3.0 - loss,
            "gain_low": 0.5,
            "gain_high": 1.5,
            "num_rows": rows,
            "num_targets": 100,
        },
        "classification": {"adapter": {"f1": f1, "f1_low": f1 - 0.1, "f1_high": f1 + 0.1}},
        "general": {"rise": 0.01},
    }
    (folder / "evaluation" / "evaluation_report.json").write_text(json.dumps(report))


def test_figures_on_test_rows_are_read_and_marked(tmp_path: Path) -> None:
    folders = pair_of_runs(tmp_path, 0.2)
    for folder, loss, f1 in zip(folders, (2.0, 1.9), (0.8, 0.7), strict=True):
        write_evaluation(folder, loss=loss, f1=f1)
    found = make_comparison(folders)
    names = ("loss_on_test_rows", "gain_on_test_rows", "f1_on_test_rows")
    assert [found.best[name] for name in names] == [1, 1, 0]
    shown = text_of(found, 80)
    assert re.search(r"  loss on test rows +2\.000  +1\.900\*", shown)
    assert re.search(r"  gain on test rows, interval +\[0\.500, 1\.500\]", shown)
    assert "0.800*" in shown and "[0.700, 0.900]" in shown and "loss rise elsewhere" in shown


def test_figures_on_other_rows_are_not_marked(tmp_path: Path) -> None:
    folders = pair_of_runs(tmp_path, 0.2)
    write_evaluation(folders[0], loss=2.0, f1=0.8)
    write_evaluation(folders[1], loss=1.9, f1=0.7, rows=40)
    found = make_comparison(folders)
    assert not [name for name in found.best if name.endswith("rows")]
    assert (
        "Evaluated on different rows (one on 50 rows of d.jsonl (test); two on 40 rows of d.jsonl (test)): these "
        "losses and scores can't be compared."
    ) in found.notes


def test_figures_on_validation_rows_are_called_so(tmp_path: Path) -> None:
    folders = pair_of_runs(tmp_path, 0.2)
    write_evaluation(folders[0], loss=2.0, f1=0.8, split="validation")
    write_evaluation(folders[1], loss=1.9, f1=0.7)
    found = make_comparison(folders)
    for width in (80, 200):
        assert all(f"loss on {split} rows" in text_of(found, width) for split in ("validation", "test"))
    one, two = json.loads(json.dumps(found.to_dict()))["runs"]
    assert one["loss_on_validation_rows"] == 2.0 and two["loss_on_test_rows"] == 1.9
    assert "loss_on_test_rows" not in one and "loss_on_validation_rows" not in two
    assert one["evaluated_on"] == {"data": "d.jsonl", "split": "validation", "num_rows": 50, "num_targets": 100}
    assert not [name for name in found.best if name.endswith("rows")]
    assert any("one on 50 rows of d.jsonl (validation)" in note for note in found.notes)
    assert compare(folders, output=str(tmp_path / "out"), as_json=False, console=Console(file=io.StringIO())) == 0
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["loss_on_validation_rows"] for row in rows] == ["2.0", ""]
    assert [row["f1_on_test_rows"] for row in rows] == ["", "0.7"]


def test_an_evaluation_of_an_earlier_adapter_is_not_this_ones(tmp_path: Path) -> None:
    folders = pair_of_runs(tmp_path, 0.2)
    for folder in folders:
        (folder / "adapters").mkdir()
        (folder / "adapters" / "adapter_model.safetensors").write_bytes(b"now")
    write_evaluation(folders[0], loss=2.0, f1=0.8, adapter=hashlib.sha256(b"now").hexdigest())
    write_evaluation(folders[1], loss=1.9, f1=0.7, adapter=hashlib.sha256(b"before").hexdigest())
    found = make_comparison(folders)
    one, two = found.runs
    assert one.figures["loss_on_test_rows"] == 2.0 and one.evaluation_note is None
    assert two.figures.get("loss_on_test_rows") is None and two.evaluated_on is None
    again = f"python cli.py evaluate {folders[1]}"
    assert f"two: the evaluation is of an earlier adapter and is left out; again: {again}" in found.notes
    assert not any("is not evaluated" in note for note in found.notes)


@pytest.mark.parametrize("state", [{"host": "elsewhere"}, {}])
def test_a_summary_of_before_a_resume_is_not_compared(tmp_path: Path, state: dict[str, Any]) -> None:
    """Whether the run goes on, on another machine, or was killed since."""
    newer = {"best_step": 20, "best_val_loss": 2.2, **state}
    folders = pair_of_runs(
        tmp_path, 0.2, status="running", state=newer, val_nll={0: [8.0] * 20, 10: ROWS_A, 20: [4.4] * 20}
    )
    run = make_comparison(folders).runs[1]
    assert run.status == ("running" if state else "died")
    assert (run.figures["best_step"], run.figures["best_val_loss"]) == (20, 2.2)
    assert run.figures["wall_seconds"] != 65.0 and run.figures["num_target_tokens"] is None
    assert run.judged is not None and run.judged.nll.tolist() == [4.4] * 20


def five_runs(tmp_path: Path) -> list[Path]:
    return [
        make_run(
            tmp_path / f"a-run-with-a-long-name-{number}",
            settings={"optim": {"lr": 1e-4 * number}, "data": {"path": "/somewhere/very/far/away/in/a/folder/d.jsonl"}},
            targets=TARGETS,
            val_nll={10: [nll + 0.2 * number for nll in ROWS_A]},
        )
        for number in range(1, 6)
    ]


@pytest.mark.parametrize("num_runs", [2, 3, 5])
def test_the_tables_fit_into_80_columns(tmp_path: Path, num_runs: int) -> None:
    found = make_comparison(five_runs(tmp_path)[:num_runs])
    lines = text_of(found, 80).splitlines()
    tables = lines[
        num_runs + 1 : next(place for place, line in enumerate(lines) if line.strip() == "* best" or "better" in line)
    ]
    assert max(map(len, tables)) <= 80
    shown = "\n".join(lines)
    for label in ("optim.lr", "best validation loss", "gap before training", "memory, GB"):
        assert label in shown
    assert all(f"{1e-4 * number:g}" in shown for number in range(1, num_runs + 1))


def test_the_lowest_of_many_is_held_against_each(tmp_path: Path) -> None:
    notes = make_comparison(five_runs(tmp_path)).notes
    assert [note.split(":")[0] for note in notes[:4]] == [
        f"a-run-with-a-long-name-1 is better than a-run-with-a-long-name-{number}" for number in (2, 3, 4, 5)
    ]
    assert "The lowest of 5 on the same rows looks better than it is" in notes[4]


def test_files_are_written_into_a_folder_that_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = pair_of_runs(tmp_path / "runs", 0.2)
    console = Console(file=io.StringIO(), width=80)
    assert compare(folders, output=None, as_json=False, console=console) == 0
    (made,) = (tmp_path / "runs").glob("compare-*")
    assert {path.name for path in made.iterdir()} == {"compare.csv", "compare.json", "compare.png"}
    assert newest_run(tmp_path / "runs").name in ("one", "two")
    with open(made / "compare.csv", newline="") as file:
        one, two = csv.DictReader(file)
    assert (one["run"], two["run"], one["best_val_loss"], one["grade"]) == ("one", "two", "2.0", "GOOD")
    assert json.loads((made / "compare.json").read_text())["pairs"][0]["value"] == pytest.approx(-0.2)
    assert (made / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_json_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = pair_of_runs(tmp_path, 0.2)
    console = Console(file=io.StringIO(), width=40)
    assert compare(folders, output=None, as_json=True, console=console) == 0
    assert isinstance(console.file, io.StringIO)
    content = json.loads(console.file.getvalue())
    assert [run["best_val_loss"] for run in content["runs"]] == [2.0, 2.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("names", [["one"], ["one", "two", "one"], ["one", "./two/../one"]])
def test_less_than_two_runs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    pair_of_runs(tmp_path, 0.2)
    with pytest.raises(UserError, match="the same run twice" if len(names) > 1 else "nothing to be compared with"):
        compare([Path(name) for name in names], output=None, as_json=True, console=Console(file=io.StringIO()))


def test_a_folder_with_something_in_it_is_refused_and_untouched(tmp_path: Path) -> None:
    folders = pair_of_runs(tmp_path, 0.2)
    before = sorted(folders[0].rglob("*"))
    with pytest.raises(UserError, match="not empty"):
        compare(folders, output=str(folders[0]), as_json=False, console=Console(file=io.StringIO()))
    assert sorted(folders[0].rglob("*")) == before


def test_a_plot_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("core.comparison.plot.write_plot", fail)
    with pytest.raises(KeyboardInterrupt):
        compare(pair_of_runs(tmp_path, 0.2), output=str(tmp_path / "out"), as_json=False, console=Console())
    assert not (tmp_path / "out").exists()


def test_the_plot_has_every_run_and_a_legend_off_the_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (kept.append(self), save(self, *args, **kwargs))
    )
    write_plot(tmp_path / "compare.png", make_comparison(pair_of_runs(tmp_path, 0.2)))
    (figure,) = kept
    losses, gaps = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1 one", "2 two"]
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in (losses, gaps))
    curves = [line for line in losses.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_ydata()) for line in curves[:2]] == [[3.0, 2.0, 2.2], [2.98, 1.9, 1.5]]
    looks = {(line.get_color(), line.get_marker()) for line in curves}
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 2  # told apart in grey too
    assert list(gaps.lines[0].get_ydata()) == pytest.approx([0.02, 0.1, 0.7])


def test_runs_with_other_epochs_are_drawn_over_epochs(tmp_path: Path) -> None:
    folders = pair_of_runs(tmp_path, 0.2, state={"steps_per_epoch": 5})
    assert compare_module.make_comparison(folders).runs[1].steps_per_epoch == 5
    assert read_evaluations(folders[0]).epoch.tolist() == [0.0, 1.0, 2.0]


def test_rows_are_judged_at_the_best_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    judged = read_judged(folder, 10)
    assert judged is not None and judged.origins == tuple(f"d.jsonl:{number}" for number in (1, 2, 3, 4))
    assert difference(judged, judged, same_name=True, same_model=True).value == 0.0  # type: ignore[union-attr]
    assert read_judged(folder, None) is None


def test_rows_without_origins_are_those_of_the_same_fingerprint_only(tmp_path: Path) -> None:
    folders = pair_of_runs(tmp_path, 0.2)
    (folders[0] / "split.csv").unlink()
    assert make_comparison(folders).pairs[0, 1] == "it is not known which rows judged them (no split.csv)"
    bind_to_data(folders[0], "same")
    bind_to_data(folders[1], "same")
    pair = make_comparison(folders).pairs[0, 1]
    assert isinstance(pair, PairedDifference) and pair.value == pytest.approx(-0.2)


def test_folds_are_compared_by_their_means_and_all_their_rows(tmp_path: Path) -> None:
    parent = make_run(tmp_path / "folds")
    (parent / "training_summary.json").unlink()
    for fold, (gap, loss) in enumerate(((0.1, 2.0), (0.3, 2.4)), start=1):
        rows = range(1, 11) if fold == 1 else range(11, 21)
        make_run(
            parent / f"fold-{fold}",
            targets=[2] * 10,
            origins=[f"d.jsonl:{row}" for row in rows],
            val_nll={0: [8.0] * 10, 10: [2 * loss] * 10},
            summary={"best_val_loss": loss, "gap": gap},
        )
    (parent / "folds.json").write_text(json.dumps({"folds": 2}))
    run = make_run(tmp_path / "run", targets=TARGETS, val_nll={0: [8.0] * 20, 10: [2 * 2.0] * 20})
    found = make_comparison([parent, run])
    folds = found.runs[0]
    assert (folds.status, folds.is_complete) == ("2 of 2 folds", True)
    assert folds.figures["best_val_loss"] == pytest.approx(2.2) and folds.figures["gap"] == pytest.approx(0.2)
    pair = found.pairs[0, 1]
    assert isinstance(pair, PairedDifference) and (pair.num_rows, pair.is_all) == (20, True)
    assert pair.value == pytest.approx((10 * 2 * 0.0 + 10 * 2 * 0.4) / 40)
    assert read_evaluations(parent).val_loss.tolist() == pytest.approx([3.0, 2.0, 2.2])
