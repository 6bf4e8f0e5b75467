"""Losses, answers and texts of two sides: hand-worked values, and scikit-learn, scipy and rouge-score as peers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core.errors import NonFiniteLossError
from core.evaluation.bootstrap import BETTER, NO_DIFFERENCE, NUM_RESAMPLES, WORSE, Difference, p_value_of, resamples
from core.evaluation.classification import classify, macro_f1
from core.evaluation.labels import LabelScheme, Reading, find_scheme
from core.evaluation.losses import pair_losses, perplexity
from core.evaluation.text_scores import Words, exact_match, rouge_l, score_texts

# --- bootstrap --------------------------------------------------------------------------------------------------------


def test_every_resample_has_as_many_rows_and_they_are_the_same_each_time() -> None:
    weights = np.concatenate(list(resamples(7, seed=3)))
    assert weights.shape == (NUM_RESAMPLES, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert abs(weights.mean() - 1.0) < 1e-12 and weights.max() > 2
    np.testing.assert_array_equal(weights, np.concatenate(list(resamples(7, seed=3))))
    assert not np.array_equal(weights, np.concatenate(list(resamples(7, seed=4))))


def test_many_rows_come_in_portions() -> None:
    portions = [weights.shape for weights in resamples(10_000, seed=0)]
    assert len(portions) > 1 and sum(draws for draws, _ in portions) == NUM_RESAMPLES


def test_p_value_is_twice_the_smaller_side() -> None:
    draws = np.array([-1.0] * 10 + [1.0] * 89)
    assert p_value_of(draws, num_unlike=1000) == pytest.approx(2 * 11 / 100)
    assert p_value_of(-draws, num_unlike=1000) == pytest.approx(2 * 11 / 100)
    assert p_value_of(np.zeros(99), num_unlike=1000) == 1.0


def test_a_few_rows_prove_nothing() -> None:
    """Five rows that all differ the same way: by chance with probability 2 / 32, whatever a bootstrap of them says."""
    draws = np.full(1999, 0.5)
    five = Difference.between(0.5, draws, num_unlike=5, confidence=0.95)
    assert five.p_value == pytest.approx(0.0625) and five.verdict == NO_DIFFERENCE
    six = Difference.between(0.5, draws, num_unlike=6, confidence=0.95)
    assert six.p_value == pytest.approx(0.03125) and six.verdict == BETTER
    assert Difference.between(-0.5, -draws, num_unlike=6, confidence=0.95).verdict == WORSE
    assert Difference.between(0.0, 0 * draws, num_unlike=0, confidence=0.95).verdict == NO_DIFFERENCE


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_are_weighted_by_target_tokens() -> None:
    base, adapter, targets = np.array([2.0, 9.0]), np.array([1.0, 12.0]), np.array([1, 3])
    paired = pair_losses(base, adapter, targets, seed=0, confidence=0.95)
    assert paired.base_loss == pytest.approx(11 / 4)
    assert paired.adapter_loss == pytest.approx(13 / 4)
    assert paired.gain == pytest.approx(-0.5)
    np.testing.assert_allclose(paired.row_differences, [-1.0, 1.0])
    assert paired.num_worse == 1 and paired.num_targets == 4
    assert paired.gain_low == pytest.approx(-1.0) and paired.gain_high == pytest.approx(1.0)  # one row twice
    assert paired.verdict == NO_DIFFERENCE
    assert paired.to_dict()["adapter"]["perplexity"] == pytest.approx(math.exp(13 / 4))


def test_the_interval_is_scipys() -> None:
    from scipy.stats import bootstrap

    rng = np.random.default_rng(0)
    targets = rng.integers(5, 60, 80)
    base = rng.gamma(3.0, 1.0, 80) * targets
    adapter = base - targets * rng.normal(0.12, 0.5, 80)
    ours = pair_losses(base, adapter, targets, seed=1, confidence=0.9)
    peer = bootstrap(
        (base, adapter, targets),
        lambda one, other, tokens, axis: (one - other).sum(axis) / tokens.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(5),
    )
    width = peer.confidence_interval.high - peer.confidence_interval.low
    assert ours.gain_low == pytest.approx(peer.confidence_interval.low, abs=0.05 * width)
    assert ours.gain_high == pytest.approx(peer.confidence_interval.high, abs=0.05 * width)
    share = 2 * min(np.mean(peer.bootstrap_distribution <= 0), np.mean(peer.bootstrap_distribution >= 0))
    assert ours.p_value == pytest.approx(share, abs=0.01)


def test_better_worse_and_neither() -> None:
    rng = np.random.default_rng(1)
    targets = rng.integers(5, 60, 60)
    base = 2.0 * targets
    noise = targets * rng.normal(0, 0.3, 60)
    for change, verdict in ((-0.5, BETTER), (0.5, WORSE), (-noise.sum() / targets.sum(), NO_DIFFERENCE)):
        paired = pair_losses(base, base + change * targets + noise, targets, seed=0, confidence=0.95)
        assert paired.verdict == verdict
        assert (paired.p_value < 0.05) == (verdict != NO_DIFFERENCE)


def test_a_loss_that_is_no_number_is_named() -> None:
    with pytest.raises(NonFiniteLossError, match=r"adapter is not a number on 1 of 2 rows"):
        pair_losses(np.ones(2), np.array([1.0, np.nan]), np.ones(2, int), seed=0, confidence=0.95)


def test_perplexity_may_be_more_than_a_float() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) is None


# --- labels -----------------------------------------------------------------------------------------------------------

SCHEME = LabelScheme(("a", "b", "c"), None)


def readings(answers: str) -> list[Reading]:
    """A letter for each answer; `-` is unreadable."""
    return [Reading(None if answer == "-" else answer, answer != "-") for answer in answers]


def test_unreadable_is_wrong_and_takes_nothing_from_another_label() -> None:
    """By hand: of 3 rows of a 2 are found and no other is called a, F1 4/5; of 2 rows of b 1, F1 2/3; c has no row."""
    found = classify(SCHEME, list("aaabb"), readings("-----"), readings("aa-bc"), seed=0, confidence=0.95)
    adapter = found.adapter
    assert adapter.per_class["a"] == pytest.approx({"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "support": 3})
    assert adapter.per_class["b"] == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2})
    assert adapter.per_class.keys() == {"a", "b"}
    assert adapter.accuracy == pytest.approx(0.6)
    assert adapter.f1.value == pytest.approx((0.8 + 2 / 3) / 2)
    assert adapter.unreadable == pytest.approx(0.2) and adapter.strict == pytest.approx(0.8)
    assert adapter.confusion.tolist() == [[2, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert found.base.accuracy == 0.0 and found.base.f1.value == 0.0 and found.base.unreadable == 1.0
    assert found.difference.value == pytest.approx(adapter.f1.value)
    assert found.to_dict()["adapter"]["strict_json"] is None  # bare labels


def test_macro_f1_of_resamples_is_scikit_learns() -> None:
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    truth, answered = rng.integers(4, size=30), rng.integers(5, size=30)
    answered = np.where(rng.random(30) < 0.5, truth, answered)
    weights = np.stack([np.bincount(rng.integers(30, size=30), minlength=30) for _ in range(20)])
    ours = macro_f1(truth, answered, weights.astype(float), num_labels=4)
    for weight, value in zip(weights, ours, strict=True):
        rows = np.repeat(np.arange(30), weight)
        labels = np.unique(truth[rows])
        peer = f1_score(truth[rows], answered[rows], labels=labels, average="macro", zero_division=0.0)
        assert value == pytest.approx(peer)


def test_the_f1_difference_is_paired() -> None:
    """Two sides that answer alike differ by nothing, however uncertain each is; unpaired draws would not see that."""
    rng = np.random.default_rng(0)
    truth = "".join(rng.choice(list("abc"), 40))
    answers = "".join(rng.choice(list("abc-"), 40))
    same = classify(SCHEME, truth, readings(answers), readings(answers), seed=0, confidence=0.95)
    assert same.base.f1.high - same.base.f1.low > 0.1
    assert (same.difference.low, same.difference.value, same.difference.high) == (0.0, 0.0, 0.0)
    assert same.difference.p_value == 1.0 and same.verdict == NO_DIFFERENCE
    better = classify(SCHEME, truth, readings(answers), readings(truth), seed=0, confidence=0.95)
    assert better.verdict == BETTER and better.difference.low > 0.2
    assert classify(SCHEME, truth, readings(truth), readings(answers), seed=0, confidence=0.95).verdict == WORSE


def test_the_f1_interval_holds_its_value() -> None:
    rng = np.random.default_rng(2)
    truth = "".join(rng.choice(list("abc"), 90))
    answers = "".join(letter if rng.random() < 0.6 else "b" for letter in truth)
    scores = classify(SCHEME, truth, readings("b" * 90), readings(answers), seed=0, confidence=0.95)
    for side in (scores.base, scores.adapter):
        assert side.f1.low < side.f1.value < side.f1.high


# --- texts ------------------------------------------------------------------------------------------------------------


def test_exact_match_forgives_white_space_only() -> None:
    assert exact_match("Two  words\n", " Two words")
    assert exact_match("caf\u00e9", "cafe\u0301")  # composed and decomposed
    assert not exact_match("Two words", "two words")
    assert not exact_match("Two words", "Two words.")


@pytest.mark.parametrize(
    "text", ["Hello, World_2: it's 3.5!", "  tabs\tand\nlines ", "", "---", "snake_case and CamelCase", "a" * 50 + "!b"]
)
def test_words_of_ascii_are_rouge_scores_own(text: str) -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    assert Words().tokenize(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_words_of_all_ascii_characters_are_rouge_scores_own() -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    rng = np.random.default_rng(0)
    for _ in range(50):
        text = "".join(map(chr, rng.integers(1, 127, 60)))
        assert Words().tokenize(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Größe, naïve", ["größe", "naïve"]),
        ("Привет, мир!", ["привет", "мир"]),
        ("今天天气好。", ["今", "天", "天", "气", "好"]),
        ("LoRA是方法", ["lora", "是", "方", "法"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("cafe\u0301", ["café"]),
    ],
)
def test_words_of_other_alphabets_are_kept(text: str, words: list[str]) -> None:
    assert Words().tokenize(text) == words


def test_rouge_l_by_hand() -> None:
    """Longest common subsequence `the cat the mat` of 6 and 5 words: P 4/5, R 4/6, F 8/11."""
    found = rouge_l(["the cat sat on the mat", "今天天气好"], ["the cat was the mat", "今天好"])
    assert found == pytest.approx([8 / 11, 2 * 3 / (5 + 3)])


def test_text_scores_of_both_sides() -> None:
    expected = [f"answer number {number}" for number in range(12)]
    scores = score_texts(expected, ["no"] * 12, expected, seed=0, confidence=0.95)
    assert scores.exact_match[0].value == 0.0 and scores.exact_match[1].value == 1.0
    assert scores.rouge_difference.value == pytest.approx(1.0) and scores.rouge_difference.verdict == BETTER
    assert scores.to_dict()["base"]["rouge_l"] == 0.0


def test_an_accuracy_is_held_against_always_saying_the_most_frequent_label() -> None:
    scheme = find_scheme(["yes", "no"] * 5, [None] * 10, ["Is it?"] * 10)
    assert scheme is not None
    expected = ["yes"] * 6 + ["no"] * 4
    read = [scheme.read(text) for text in (*["yes"] * 6, *["yes"] * 4)]
    always = classify(scheme, expected, read, read, seed=0, confidence=0.95)
    assert always.most_frequent == ("yes", 0.6) and always.is_guessing
    better = classify(scheme, expected, read, [*read[:9], scheme.read("no")], seed=0, confidence=0.95)
    assert better.adapter.accuracy == pytest.approx(0.7) and not better.is_guessing
    assert better.to_dict()["most_frequent"] == {"label": "yes", "share": 0.6}
