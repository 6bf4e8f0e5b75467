"""The training curves: what is drawn, from short, long and damaged runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from core import plots
from core.config import RunConfig, to_plain
from core.journal import JOURNAL, Journal
from core.run import CURVES, RunState


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that get saved, as objects: what is drawn can then be read back."""
    saved: list[Figure] = []
    real = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def evaluation(step: int, val: float, probe: float, **values: Any) -> dict[str, Any]:
    gap = val - probe
    trained = {"loss": val + 0.1, "lr": 1e-4 / step} if step else {"loss": None, "lr": None}
    bounds = {"gap": gap, "gap_low": gap - 0.03, "gap_high": gap + 0.05, "grade": "GOOD"}
    return {"step": step, **trained, "val_loss": val, "probe_loss": probe, **bounds, **values}


def write_run(folder: Path, records: list[dict[str, Any]], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(RunConfig.model_validate(config))))
    journal = Journal(folder)
    for record in records:
        journal.append(record)
    journal.close()
    RunState(folder, {"backend": "mlx", "model": "org/Tiny-1B", "rank": 8}).update(steps_per_epoch=50)
    return folder


def lines_of(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(np.asarray(line.get_xdata())), list(np.asarray(line.get_ydata())))
        for line in axes.get_lines()
    }


RUN = [
    evaluation(0, 2.6, 2.58),
    {"step": 25, "loss": 2.3, "lr": 2e-4},
    evaluation(50, 1.9, 1.8),
    {"step": 75, "loss": 1.8, "lr": 1e-4},
    evaluation(100, 1.95, 1.6),
]


def test_draws_losses_base_and_best(tmp_path: Path, figures: list[Figure]) -> None:
    plots.write_training_curves(write_run(tmp_path / "runs-x", RUN))
    losses, _, rate = figures[0].axes[:3]
    drawn = lines_of(losses)
    assert drawn["validation loss"] == ([0, 50, 100], [2.6, 1.9, 1.95])
    assert drawn["probe loss (training rows)"] == ([0, 50, 100], [2.58, 1.8, 1.6])
    assert drawn["training loss (with dropout)"] == ([25, 50, 75, 100], [2.3, 2.0, 1.8, pytest.approx(2.05)])
    assert drawn["base model, 2.600"][1] == [2.6, 2.6]
    assert drawn["best, 1.900 at step 50"] == ([50], [1.9])
    assert losses.get_title(loc="left") == "runs-x · mlx · Tiny-1B · r8"
    (lr,) = rate.get_lines()
    assert list(np.asarray(lr.get_ydata())) == [2e-4, 2e-6, 1e-4, 1e-6]
    assert Image.open(tmp_path / "runs-x" / CURVES).size == (1200, 1050)


def test_gap_has_its_interval_and_the_runs_own_bands(tmp_path: Path, figures: list[Figure]) -> None:
    plots.write_training_curves(write_run(tmp_path / "x", RUN, guard={"grades": [0.1, 0.2, 0.25]}))
    axes = figures[0].axes[1]
    (bars,) = axes.containers
    points, _, (whiskers,) = bars.lines  # type: ignore[attr-defined]
    assert list(points.get_ydata()) == pytest.approx([0.02, 0.1, 0.35])
    ends = [segment[:, 1].tolist() for segment in whiskers.get_segments()]
    assert ends == [pytest.approx([gap - 0.03, gap + 0.05]) for gap in (0.02, 0.1, 0.35)]
    named = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert list(named) == ["EXCELLENT", "GOOD", "MODERATE", "CRITICAL"]
    assert 0.1 < named["GOOD"] < 0.2 < named["MODERATE"] < 0.25 < named["CRITICAL"]


def test_base_model_alone(tmp_path: Path, figures: list[Figure]) -> None:
    plots.write_training_curves(write_run(tmp_path / "x", RUN[:1]))
    losses = figures[0].axes[0]
    assert "base model, 2.600" in lines_of(losses)
    assert not any("best" in label for label in lines_of(losses))


def test_an_adapter_worse_than_the_base_is_still_the_best_adapter(tmp_path: Path, figures: list[Figure]) -> None:
    worse = [evaluation(0, 1.0, 0.9), evaluation(50, 1.5, 0.8), evaluation(100, 1.4, 0.7)]
    plots.write_training_curves(write_run(tmp_path / "x", worse))
    assert lines_of(figures[0].axes[0])["best, 1.400 at step 100"] == ([100], [1.4])


def test_without_evaluations(tmp_path: Path, figures: list[Figure]) -> None:
    plots.write_training_curves(write_run(tmp_path / "x", [{"step": 5, "loss": 2.0, "lr": 1e-4}]))
    assert lines_of(figures[0].axes[0]) == {"training loss (with dropout)": ([5], [2.0])}


def test_missing_values_are_gaps_in_the_curve(tmp_path: Path, figures: list[Figure]) -> None:
    missing = dict.fromkeys(("gap", "gap_low", "gap_high", "probe_loss"))
    records = [*RUN[:3], evaluation(75, 1.85, 1.7, **missing), RUN[4]]
    plots.write_training_curves(write_run(tmp_path / "x", records))
    drawn = lines_of(figures[0].axes[0])
    assert drawn["validation loss"][1] == [2.6, 1.9, 1.85, 1.95]
    assert np.isnan(drawn["probe loss (training rows)"][1][2])


def test_long_runs_are_thinned_to_means(tmp_path: Path, figures: list[Figure]) -> None:
    folder = write_run(tmp_path / "x", [])
    with open(folder / JOURNAL, "w") as file:
        for step in range(1, 20_001):  # alternating 1 and 3: the mean is 2 everywhere, the range 1 to 3
            file.write(json.dumps({"step": step, "loss": 1.0 + 2 * (step % 2), "lr": 1e-4}) + "\n")
    plots.write_training_curves(folder)
    axes = figures[0].axes[0]
    steps, loss = lines_of(axes)["training loss (with dropout)"]
    assert len(steps) == plots.MAX_BINS
    assert steps[0] == pytest.approx(13)
    assert steps[-1] == pytest.approx(19_988)
    assert loss == pytest.approx([2.0] * len(loss), abs=0.05)
    (band,) = axes.collections
    height = band.get_datalim(axes.transData)
    assert (height.ymin, height.ymax) == (1.0, 3.0)


def test_a_spike_does_not_flatten_the_curve(tmp_path: Path, figures: list[Figure]) -> None:
    records: list[dict[str, Any]] = [{"step": step, "loss": 2.0, "lr": 1e-4} for step in range(1, 300)]
    records[100]["loss"] = 900.0
    plots.write_training_curves(write_run(tmp_path / "x", records))
    assert figures[0].axes[0].get_ylim()[1] < 3.0


def test_nothing_to_draw_writes_nothing(tmp_path: Path) -> None:
    plots.write_training_curves(tmp_path)
    plots.write_training_curves(write_run(tmp_path / "x", []))
    assert not list(tmp_path.rglob("*.png"))


def test_a_damaged_configuration_and_journal_still_draw(tmp_path: Path, figures: list[Figure]) -> None:
    folder = write_run(tmp_path / "x", RUN)
    (folder / "config.yaml").write_text("a: [")
    with open(folder / JOURNAL, "ab") as file:
        file.write(b'nonsense\n7\n{"step": "x"}\n{"step": 125, "loss": NaN, "lr": true}\n')
    plots.write_training_curves(folder)
    assert lines_of(figures[0].axes[0])["training loss (with dropout)"][0] == [25, 50, 75, 100]


def test_importing_draws_nothing_in_and_keeps_pyplot_out(tmp_path: Path) -> None:
    write_run(tmp_path / "x", RUN)
    code = (
        "import sys, pathlib; from core import plots; assert 'matplotlib' not in sys.modules;"
        f"plots.write_training_curves(pathlib.Path({str(tmp_path / 'x')!r}));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(plots.__file__).parent.parent)
    assert (tmp_path / "x" / CURVES).read_bytes().startswith(b"\x89PNG")
