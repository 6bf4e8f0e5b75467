from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.errors import UserError
from data.keys import RowKeys, hash_text, positions
from data.near import signatures
from data.split import Cut, cut_rows, overlap, probe_rows, unit_of_rows
from data.token_rows import TokenRows


def hashes(values: Sequence[object]) -> np.ndarray:
    return np.array([hash_text(str(value)) for value in values], np.uint64)


def keys_of(
    values: Sequence[object],
    *,
    seed: int = 0,
    group: Sequence[object] | None = None,
    stratum: Sequence[object] | None = None,
    texts: Sequence[str] | None = None,
) -> RowKeys:
    """Keys of rows that say `values`."""
    content = hashes(values)
    return RowKeys(
        position=positions(content, seed=seed),
        equal=content,
        prompt=content,
        answer=content,
        group=None if group is None else hashes(group),
        stratum=None if stratum is None else hashes(stratum),
        signature=None if texts is None else signatures(texts),
    )


def cut(values: Sequence[object], *, validation: float = 0.2, test: float = 0.0, seed: int = 0, **more: Any) -> Cut:
    columns = {name: more.pop(name) for name in ("group", "stratum", "texts") if name in more}
    return cut_rows(keys_of(values, seed=seed, **columns), validation=validation, test=test, seed=seed, **more)


def sides(done: Cut) -> dict[int, str]:
    """Row -> side."""
    return {row: side for side in ("train", "validation", "test") for row in getattr(done, side)}


def token_rows(values: list[int]) -> TokenRows:
    ids = [np.array([1, value], np.int32) for value in values]
    return TokenRows.of(ids, [np.array([False, True])] * len(ids), [f"a:{value}" for value in values])


VALUES = st.lists(st.integers(0, 60), min_size=3, max_size=60)
SEEDS = st.integers(0, 5)


# Ratios


@pytest.mark.parametrize(("validation", "test"), [(0.2, 0.0), (0.1, 0.1), (0.07, 0.3)])
def test_ratios_are_met_within_chance(validation: float, test: float) -> None:
    num_rows = 20_000
    for seed in range(3):
        done = cut(range(num_rows), validation=validation, test=test, seed=seed)
        assert sorted(done.train + done.validation + done.test) == list(range(num_rows))
        for rows, ratio in ((done.validation, validation), (done.test, test)):
            assert rows == sorted(rows)
            assert abs(len(rows) - ratio * num_rows) <= 4.5 * np.sqrt(num_rows * ratio * (1 - ratio))


def test_large_units_are_held_out_as_often_as_small_ones() -> None:
    """By the lowest of its rows' places alone, a unit of ten would be held out nine times out of ten."""
    tens = [index // 10 for index in range(20_000)]
    for done in (cut(range(20_000), group=tens), cut(tens)):
        assert abs(len(done.validation) - 4_000) <= 4.5 * 10 * np.sqrt(2_000 * 0.2 * 0.8)


def test_seed_and_row_order() -> None:
    values = list(range(300))
    before = sides(cut(values))
    backwards = sides(cut(values[::-1]))
    assert {299 - row: side for row, side in backwards.items()} == before
    assert sides(cut(values, seed=1)) != before


def test_validation_and_test_are_cut_apart() -> None:
    """Asking for test rows as well takes them from the training rows."""
    alone = cut(range(500), validation=0.2)
    both = cut(range(500), validation=0.2, test=0.3)
    assert both.validation == alone.validation
    assert set(both.test) < set(alone.train)


@settings(deadline=None, max_examples=200)
@given(VALUES, st.lists(st.integers(0, 200), min_size=1, max_size=10), SEEDS, st.sampled_from([0.0, 0.1, 0.25]))
def test_added_rows_move_no_others(values: list[int], added: list[int], seed: int, test: float) -> None:
    ratios: dict[str, Any] = {"validation": 0.25, "test": test, "seed": seed}
    needed = 3 if test else 2
    assume(len(set(values)) >= needed)
    assume(2 * max(Counter(values).values()) <= len(values))
    assume(2 * max(Counter(values + added).values()) <= len(values + added))
    before, after = cut(values, **ratios), cut(values + added, **ratios)
    fewest = min(len({values[row] for row in getattr(before, side)}) for side in ("train", "validation"))
    assume(fewest > 1 and (not test or len({values[row] for row in before.test}) > 1))  # no side was filled up
    moved = [row for row, side in sides(before).items() if sides(after)[row] != side]
    assert moved == []


COPIES = 10
"""Near copies of a text that `near_text` makes."""


def near_text(value: int) -> str:
    """Texts `COPIES * k` and the next of these are near copies of one another; others have nothing in common."""
    number, copy = divmod(value, COPIES)
    draw = random.Random(number)
    words = ["".join(draw.choices(string.ascii_lowercase, k=3 + place % 5)) for place in range(40)]
    draw = random.Random(value)
    for place in draw.sample(range(40), min(copy, 1)):
        words[place] = "".join(draw.choices(string.ascii_lowercase, k=5))
    return " ".join(words)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 12 * COPIES - 1), min_size=20, max_size=120),
    st.lists(st.integers(0, 20 * COPIES - 1), min_size=1, max_size=60),
    SEEDS,
)
def test_added_rows_move_no_others_but_their_near_copies(values: list[int], added: list[int], seed: int) -> None:
    """Whether a family of copies is more than a tenth of the rows or not."""
    families = [value // COPIES for value in values]
    assume(2 * max(Counter(families).values()) <= len(values))
    assume(2 * max(Counter(families + [value // COPIES for value in added]).values()) <= len(values + added))
    more: dict[str, Any] = {"validation": 0.4, "seed": seed, "near_duplicates": 0.7}
    texts = [near_text(value) for value in values + added]
    before, after = (
        sides(cut(values, texts=texts[: len(values)], **more)),
        sides(cut(values + added, texts=texts, **more)),
    )
    held_out = [{families[row] for row, side in before.items() if side == name} for name in ("train", "validation")]
    assume(min(map(len, held_out)) > 1)  # no side was filled up
    assert not held_out[0] & held_out[1]
    joined = {value // COPIES for value in added}
    moved = [row for row, side in before.items() if after[row] != side and families[row] not in joined]
    assert moved == []


def test_copies_are_one_unit_whatever_their_share() -> None:
    """Ten of 30 rows, of 60, of 100 and of 300."""
    for num_others in (20, 50, 90, 290):
        values = [*range(COPIES), *range(COPIES, COPIES * (num_others + 1), COPIES)]
        units = unit_of_rows(keys_of(values, texts=[near_text(value) for value in values]), near_duplicates=0.7)
        assert units.tolist() == [0] * COPIES + list(range(COPIES, COPIES + num_others))


@settings(deadline=None, max_examples=200)
@given(VALUES, st.data(), SEEDS)
def test_an_added_row_of_a_group_moves_no_others(values: list[int], data: st.DataObject, seed: int) -> None:
    """Rows by group: neither the group's other rows nor those of other groups."""
    group = [value // 6 for value in values]
    more = data.draw(st.lists(st.integers(100, 120), min_size=1, max_size=8))
    joined = data.draw(st.lists(st.sampled_from(group), min_size=len(more), max_size=len(more)))
    assume(2 * max(Counter(group).values()) <= len(values))
    assume(2 * max(Counter(group + joined).values()) <= len(values + more))
    assume(not Counter(more) - Counter(set(more)))  # equal rows of two groups would join these
    before = sides(cut(values, validation=0.4, group=group, seed=seed))
    assume(min(len({group[row] for row in before if before[row] == side}) for side in ("train", "validation")) > 1)
    after = sides(cut(values + more, validation=0.4, group=group + joined, seed=seed))
    assert all(after[row] == side for row, side in before.items())


@settings(deadline=None, max_examples=200)
@given(VALUES, SEEDS, st.sampled_from([0.0, 0.2]), st.sampled_from([None, 2, 3]))
def test_units_never_straddle(values: list[int], seed: int, test: float, folds: int | None) -> None:
    """Equal rows are on one side, and rows of a group, and what these join: with and without strata and folds."""
    group = [value % 13 // 2 if value % 5 else f"only {index}" for index, value in enumerate(values)]
    for stratum in (None, [value % 3 for value in values]):
        columns: dict[str, Any] = {"group": group, "stratum": stratum}
        units = unit_of_rows(keys_of(values, group=group), near_duplicates=None)
        assume(len(set(units.tolist())) >= (folds or 2) + bool(test))
        done = sides(cut(values, validation=0.3, test=test, seed=seed, folds=folds, **columns))
        assert sorted(done) == list(range(len(values)))
        for same in (values, group, units.tolist()):
            seen: dict[object, str] = {}
            for row, what in enumerate(same):
                assert seen.setdefault(what, done[row]) == done[row]
        assert set(done.values()) == {"train", "validation", *(["test"] if test else [])}


def test_no_side_is_empty_if_that_can_be() -> None:
    for seed in range(200):
        done = cut([1, 2, 3], validation=0.05, test=0.05, seed=seed)
        assert [len(done.train), len(done.validation), len(done.test)] == [1, 1, 1]
        done = cut([1, 2], validation=0.9, seed=seed)
        assert [len(done.train), len(done.validation)] == [1, 1]


def test_the_unit_with_the_lowest_place_fills_validation() -> None:
    """And the highest fills test: so further rows rarely change it. Places are worked out here."""
    values = list(range(4))
    place = positions(positions(hashes(values), seed=3), seed=3)
    done = cut(values, validation=0.000001, test=0.000001, seed=3)
    assert done.validation == [int(np.argmin(place))]
    assert done.test == [int(np.argmax(place))]


def test_places_below_the_ratio_validate() -> None:
    place = positions(positions(hashes(range(400)), seed=0), seed=0) / 2**64
    done = cut(range(400), validation=0.2, test=0.1)
    assert done.validation == np.flatnonzero(place < 0.2).tolist()
    assert done.test == np.flatnonzero(place >= 0.9).tolist()


def test_a_unit_of_most_rows_trains() -> None:
    values = [0] * 60 + list(range(1, 41))
    for seed in range(50):
        assert set(range(60)) <= set(cut(values, seed=seed).train)


def test_sides_without_rows_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"data\.validation 0\.2 of 1 row needs at least 2 rows that differ; there is 1"
    ):
        cut([1])
    with pytest.raises(UserError, match=r"data\.validation 0\.2 of 3 rows needs at least 2 rows that differ; there is"):
        cut([1, 1, 1])
    with pytest.raises(UserError, match=r"data\.validation 0\.2 and data\.test 0\.1 of 3 rows .* 3 .*; there are 2"):
        cut([1, 1, 2], test=0.1)
    with pytest.raises(UserError, match=r"data\.folds 5 of 4 rows needs at least 5 rows that differ; there are 4"):
        cut([1, 2, 3, 4], folds=5)
    with pytest.raises(UserError, match=r"share no group \(data\.group\); there is 1"):
        cut([1, 2, 3, 4], group=[1, 1, 1, 1])
    with pytest.raises(UserError, match=r"no near copies \(data\.near_duplicates\)") as caught:
        cut([1, 2], texts=["One two three four five six.", "One two three four five six!"], near_duplicates=0.7)
    assert "data.near_duplicates=null" in str(caught.value.hint)


# Near copies

TEXTS = [
    "The loss is the sum over target tokens divided by their number.",
    "A checkpoint appears whole or not at all, with a checksum for each file.",
    "Validation rows are evaluated at the same weights as the probe of training rows.",
    "The learning rate is an argument; schedules are pure functions of the step.",
    "Rows that can't be read stop the run, by file and line.",
    "Dropout masks are a function of the seed, the step and the micro-batch.",
]


def test_near_copies_stay_together() -> None:
    texts = [*TEXTS, *(f"{text.upper()} So?" for text in TEXTS)]
    values = range(12)
    for seed in range(20):
        done = sides(cut(values, validation=0.3, seed=seed, texts=texts, near_duplicates=0.7))
        assert all(done[row] == done[row + 6] for row in range(6))
    apart = [sides(cut(values, validation=0.3, seed=seed, texts=texts, near_duplicates=None)) for seed in range(20)]
    assert any(done[row] != done[row + 6] for done in apart for row in range(6))


def test_a_near_copy_joins_two_groups() -> None:
    keys = keys_of(range(4), group=["a", "a", "b", "b"], texts=[TEXTS[0], TEXTS[1], TEXTS[1] + "!", TEXTS[3]])
    assert unit_of_rows(keys, near_duplicates=0.7).tolist() == [0, 0, 0, 0]
    assert unit_of_rows(keys, near_duplicates=None).tolist() == [0, 0, 2, 2]


def test_overlap_of_two_files() -> None:
    train = keys_of([1, 2, 3, 4], texts=TEXTS[:4])
    held_out = keys_of([9, 3], texts=[TEXTS[1].replace("whole", "complete"), "Nothing like it at all in here."])
    assert overlap(train, held_out, near_duplicates=0.7).tolist() == [1, 2]
    assert overlap(train, held_out, near_duplicates=None).tolist() == [2]
    assert overlap(train, held_out.select([]), near_duplicates=0.7).tolist() == []


# Strata


def test_strata_get_their_share() -> None:
    stratum = ["common"] * 500 + ["rare"] * 50 + ["single"] * 5
    for seed in range(10):
        done = cut(range(555), validation=0.2, test=0.1, stratum=stratum, seed=seed)
        counts = [Counter(stratum[row] for row in rows) for rows in (done.train, done.validation, done.test)]
        assert counts[1] == {"common": 100, "rare": 10, "single": 1}
        assert counts[2] == {"common": 50, "rare": 5, "single": 1}
        assert counts[0] == {"common": 350, "rare": 35, "single": 3}


def test_strata_too_rare_for_a_row_are_one_together() -> None:
    """Forty values that come once: as many are held out as of forty rows of one value."""
    for seed in range(10):
        done = cut(range(140), validation=0.2, stratum=["a"] * 100 + list(range(40)), seed=seed)
        assert len([row for row in done.validation if row < 100]) == 20
        assert len([row for row in done.validation if row >= 100]) == 8


def test_a_row_added_to_a_stratum_moves_at_most_one_other() -> None:
    stratum = [index % 3 for index in range(90)]
    for seed in range(20):
        before = sides(cut(range(90), stratum=stratum, seed=seed))
        after = sides(cut(range(91), stratum=[*stratum, 0], seed=seed))
        moved = [row for row in before if before[row] != after[row]]
        assert len(moved) <= 1
        assert all(stratum[row] == 0 for row in moved)


def test_a_group_counts_for_the_stratum_of_most_of_its_rows() -> None:
    """Each stratum has ten groups of three rows, of which one says otherwise."""
    group = [index // 3 for index in range(60)]
    stratum = [index // 30 if index % 3 else 1 - index // 30 for index in range(60)]
    done = cut(range(60), validation=0.2, group=group, stratum=stratum)
    assert Counter(row // 30 for row in done.validation) == {0: 6, 1: 6}
    assert all(Counter(group[row] for row in done.validation)[number] in (0, 3) for number in range(20))


# Folds


@settings(deadline=None, max_examples=100)
@given(VALUES, SEEDS, st.integers(2, 5), st.sampled_from([0.0, 0.2]), st.booleans())
def test_every_row_validates_in_one_fold(values: list[int], seed: int, folds: int, test: float, strata: bool) -> None:
    assume(len(set(values)) >= folds + bool(test))
    columns: dict[str, Any] = {"stratum": [value % 2 for value in values]} if strata else {}
    cuts = [cut(values, test=test, seed=seed, folds=folds, fold=fold, **columns) for fold in range(1, folds + 1)]
    tests = cuts[0].test
    assert all(done.test == tests for done in cuts)
    assert sorted(row for done in cuts for row in done.validation) == sorted(set(range(len(values))) - set(tests))
    for done in cuts:
        assert done.train
        assert done.validation
        assert sorted(done.train + done.validation + done.test) == list(range(len(values)))


def test_folds_are_of_like_size_and_added_rows_move_no_others() -> None:
    num_rows = 10_000
    for fold in (1, 3, 5):
        done = cut(range(num_rows), folds=5, fold=fold, test=0.1)
        assert abs(len(done.validation) - 1800) <= 4.5 * np.sqrt(num_rows * 0.18 * 0.82)
        after = sides(cut(range(num_rows + 50), folds=5, fold=fold, test=0.1))
        assert all(after[row] == side for row, side in sides(done).items())


def test_folds_are_cut_at_equal_places() -> None:
    place = positions(positions(hashes(range(400)), seed=0), seed=0) / 2**64
    for fold in range(1, 5):
        assert cut(range(400), folds=4, fold=fold).validation == np.flatnonzero(place * 4 // 1 == fold - 1).tolist()


def test_strata_have_their_share_in_each_fold() -> None:
    stratum = ["a"] * 60 + ["b"] * 20 + ["c"] * 5
    for fold in range(1, 6):
        done = cut(range(85), folds=5, fold=fold, stratum=stratum)
        assert Counter(stratum[row] for row in done.validation) == {"a": 12, "b": 4, "c": 1}


def test_small_strata_do_not_all_begin_with_the_first_fold() -> None:
    """Twenty strata of three rows: in five folds, each leaves two out."""
    stratum = [row // 3 for row in range(60)]
    sizes = [len(cut(range(60), folds=5, fold=fold, stratum=stratum).validation) for fold in range(1, 6)]
    assert sum(sizes) == 60
    assert min(sizes) >= 6


# Token rows


def test_probe_keeps_row_ids_and_is_fixed() -> None:
    rows = token_rows(list(range(100)))
    probe = probe_rows(rows, count=10, seed=3)
    assert len(probe) == 10
    assert probe.row_ids.tolist() == sorted(set(probe.row_ids.tolist()))
    assert [ids[1] for ids in probe.ids] == probe.row_ids.tolist()
    assert [probe.origin[index] for index in range(10)] == [f"a:{row}" for row in probe.row_ids]
    assert probe_rows(rows, count=10, seed=3).row_ids.tolist() == probe.row_ids.tolist()
    assert probe_rows(rows, count=10, seed=4).row_ids.tolist() != probe.row_ids.tolist()
    assert len(probe_rows(rows, count=200, seed=3)) == 100
