"""The heat map of a mixture's routing: what is drawn, and that a dense run has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from core.expert_plot import write_expert_plot
from core.journal import JOURNAL
from core.run import EXPERTS_PLOT
from tests.core.test_plots import evaluation, figures, write_run

__all__ = ["figures"]

BASE = [[0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]]
BEST = [[0.3, 0.25, 0.25, 0.2], [0.1, 0.2, 0.3, 0.4]]
LAST = [[0.5, 0.5, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]]


def routed(step: int, val: float, shares: Any) -> dict[str, Any]:
    return evaluation(step, val, val - 0.1, routing={"entropy": 0.9, "shares": shares})


def maps_of(figure: Figure) -> dict[str, np.ndarray[Any, Any]]:
    return {axes.get_title(): np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images}


def test_draws_before_best_and_difference(tmp_path: Path, figures: list[Figure]) -> None:
    records = [routed(0, 2.6, BASE), {"step": 25, "loss": 2.0}, routed(50, 1.9, BEST), routed(100, 1.95, LAST)]
    write_expert_plot(write_run(tmp_path / "run-x", records))
    drawn = maps_of(figures[0])
    assert list(drawn) == ["before training", "best step, 50", "difference"]
    np.testing.assert_allclose(drawn["before training"], 100 * np.array(BASE))
    np.testing.assert_allclose(drawn["best step, 50"], 100 * np.array(BEST))
    np.testing.assert_allclose(drawn["difference"], 100 * (np.array(BEST) - np.array(BASE)))
    numbers = [text.get_text() for text in figures[0].axes[2].texts]
    assert numbers == ["+5", "0", "0", "-5", "0", "0", "0", "0"]
    with Image.open(tmp_path / "run-x" / EXPERTS_PLOT) as image:
        assert image.width > 1000


def test_both_maps_have_one_scale(tmp_path: Path, figures: list[Figure]) -> None:
    write_expert_plot(write_run(tmp_path / "x", [routed(0, 2.6, BASE), routed(50, 1.9, LAST)]))
    first, second = (figures[0].axes[i].images[0].get_clim() for i in (0, 1))
    assert first == second == (0.0, 50.0)


def test_before_the_first_step_there_is_only_that(tmp_path: Path, figures: list[Figure]) -> None:
    write_expert_plot(write_run(tmp_path / "x", [routed(0, 2.6, BASE)]))
    assert not maps_of(figures[0])["difference"].any()


@pytest.mark.parametrize("num_experts", [8, 128])
def test_many_layers_and_experts_fit(tmp_path: Path, figures: list[Figure], num_experts: int) -> None:
    shares = np.full((48, num_experts), 1 / num_experts).tolist()
    write_expert_plot(write_run(tmp_path / "x", [routed(0, 2.6, shares), routed(50, 1.9, shares)]))
    assert not figures[0].axes[0].texts
    assert len(figures[0].axes[0].get_yticks()) <= 32


def test_dense_and_damaged_runs_have_no_map(tmp_path: Path) -> None:
    dense = write_run(tmp_path / "dense", [evaluation(0, 2.6, 2.5)])
    write_expert_plot(dense)
    assert not (dense / EXPERTS_PLOT).exists()
    with open(dense / JOURNAL, "a") as file:
        file.write('{"step": 1, "val_loss": 1.0, "routing": {"shares": [[1], [1, 2]]}}\n3\n')
    write_expert_plot(dense)
    assert not (dense / EXPERTS_PLOT).exists()
