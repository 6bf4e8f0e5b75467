"""What the near-copies benchmark measures, on what it makes of rows; the runs themselves take minutes."""

from __future__ import annotations

import math

import pytest

from benchmarks.near_copies import make_rows, means, row_of
from data.near import clusters, pieces, signatures
from tests.data.test_near import WORDS

ROWS = [
    {"prompt": " ".join(WORDS[number : number + 12]), "completion": " ".join(WORDS[number + 12 : number + 60])}
    for number in range(0, 3000, 60)
]


def said(row: dict[str, str]) -> str:
    return f"{row['prompt']}\n{row['completion']}"


@pytest.mark.parametrize(("share", "num_copies"), [(0.1, 4), (0.5, 34)])
def test_copies_are_near_and_clean_rows_have_none(share: float, num_copies: int) -> None:
    rows, clean = make_rows(ROWS, share=share, seed=3)
    assert (len(clean), len(rows)) == (16, 34 + num_copies)
    assert all(row in ROWS for row in clean)
    assert len([row for row in rows if row not in ROWS]) == num_copies
    labels = clusters(signatures([said(row) for row in rows + clean]), threshold=0.7)
    assert len(set(labels.tolist())) == 34 + 16
    assert (labels[len(rows) :] >= len(rows)).all()
    for row in rows:
        if row not in ROWS:  # a word in twenty is another: each half of the row differs, most of it does not
            nearest = max(ROWS, key=lambda other: len(pieces(said(other)) & pieces(said(row))))
            assert nearest in rows
            assert nearest["prompt"] != row["prompt"]
            assert nearest["completion"] != row["completion"]
    assert make_rows(ROWS, share=share, seed=3) == (rows, clean)
    assert make_rows(ROWS, share=share, seed=4) != (rows, clean)


def test_means_are_over_the_seeds() -> None:
    one = {"gap": 0.1, "grade": "GOOD", "honest_gap": 0.5, "honest_grade": "CRITICAL"}
    other = {"gap": 0.4, "grade": "CRITICAL", "honest_gap": 0.6, "honest_grade": "CRITICAL"}
    found = means([other, one])
    assert found["gap"] == pytest.approx(0.25)
    assert found["grade"] == "MODERATE"  # of the mean: 0.25 is below 0.30
    assert found["flattered"] == pytest.approx(0.3)  # 0.4 and 0.2
    assert found["flattered_standard_error"] == pytest.approx(math.sqrt(0.02) / math.sqrt(2))
    assert row_of("naive", [other, one]) == (
        "| naive | 0.250 | MODERATE | 1 GOOD, 1 CRITICAL | 0.550 | CRITICAL | 2 CRITICAL | 0.300 ± 0.100 |"
    )
