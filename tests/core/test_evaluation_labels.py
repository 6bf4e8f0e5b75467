"""What expected answers have for labels, and what can be read from what a model wrote."""

from __future__ import annotations

import json

import pytest

from core.evaluation.labels import LabelScheme, canonical, find_scheme

NUMBERS = LabelScheme(("0", "1", "2"), "predicted_label", is_nli=True)
NAMES = LabelScheme(("entailment", "neutral", "contradiction"), "label", is_nli=True)
BARE = LabelScheme(("negative", "positive", "very positive"), None)

STRICT = [
    (NUMBERS, '{"predicted_label": 2}', "2"),
    (NUMBERS, ' {"thought_process": "It {may} be.", "predicted_label": "1"}\n', "1"),
    (NUMBERS, '{"predicted_label": 1.0}', "1"),
    (NUMBERS, '{"predicted_label": "entailment"}', "0"),
    (NAMES, '{"label": 2}', "contradiction"),
    (NAMES, '{"label": "Neutral"}', "neutral"),
    (NUMBERS, '<think>{"predicted_label": 0}</think>\n{"predicted_label": 2}', "2"),
    (NUMBERS, 'Is it {"predicted_label": 0}?</think>\n\n{"predicted_label": 2}', "2"),
    (BARE, "very positive", "very positive"),
    (LabelScheme(("no", "yes"), None, frozenset({"Yes"})), "Yes", "yes"),
    (LabelScheme(("0", "\N{MINUS SIGN}1"), None), "\N{MINUS SIGN}1", "\N{MINUS SIGN}1"),
]
LETTERS = LabelScheme(("A", "B"), None)
FOUR = LabelScheme(("A", "B", "C", "D"), None)
SIGNED = LabelScheme(("-1", "0", "1"), None)
BINARY = LabelScheme(("no", "yes"), None)
TOLERANT = [
    (SIGNED, "The answer is: -1", "-1"),
    (SIGNED, "-1: because bad", "-1"),
    (SIGNED, "Label: -1", "-1"),
    (SIGNED, "Answer: -1", "-1"),
    (SIGNED, "-1 (negative)", "-1"),
    (SIGNED, "**\N{MINUS SIGN}1**: it is bad", "-1"),
    (SIGNED, "It is \N{MINUS SIGN}1", "-1"),
    (SIGNED, "- 1: it is good", "1"),
    (FOUR, "B) Paris", "B"),
    (FOUR, "B. Paris", "B"),
    (FOUR, "(B) Paris", "B"),
    (FOUR, "Option B", "B"),
    (FOUR, "The correct answer is option C.", "C"),
    (FOUR, "C, because it is the capital", "C"),
    (FOUR, "I choose option D, as it is the largest.", "D"),
    (FOUR, "Option A: Paris. Option B: Rome. The answer is B.", "B"),
    (FOUR, "B) Paris\n\nExplanation: it is the capital. A) is in Italy.", "B"),
    (BINARY, "No.", "no"),
    (BINARY, "No it is not", "no"),
    (BINARY, "I would say no, it is wrong", "no"),
    (BINARY, "Yes, there is no doubt of it", "yes"),
    (BINARY, "The answer is no doubt yes", "yes"),
    (NUMBERS, "0 (entailment)", "0"),
    (NUMBERS, "The label is 2, contradiction", "2"),
    (LETTERS, "The answer is B.", "B"),
    (LETTERS, "b", "B"),
    (LETTERS, "A: it is the first", "A"),
    (NUMBERS, "The predicted label is 1 because nothing is said of it", "1"),
    (NUMBERS, 'Sure! Here it is: {"predicted_label": 2} Hope it helps.', "2"),
    (NUMBERS, '```json\n{"predicted_label": 0}\n```', "0"),
    (NUMBERS, "{'thought_process': \"it's so\", 'predicted_label': 1}", "1"),
    (NUMBERS, '{"thought_process": "cut off here, "predicted_label": 1', "1"),
    (NUMBERS, '{"predicted_label": 2}\n{"predicted_label": 0}', "2"),
    (NUMBERS, '{"a": {}} {"predicted_label": 0}', "0"),
    (NUMBERS, "predicted_label: neutral", "1"),
    (NUMBERS, "predicted_label = 2.", "2"),
    (NUMBERS, "2", "2"),
    (NUMBERS, "2 - the hypothesis is ruled out by 1 of the facts", "2"),
    (NUMBERS, "The answer is 1.", "1"),
    (NUMBERS, "Label: 0", "0"),
    (NUMBERS, "This is a contradiction.", "2"),
    (NUMBERS, "This is not a contradiction, it is neutral.", "1"),
    (NAMES, '{"label": "entailment", and so on', "entailment"),
    (NAMES, "0", "entailment"),
    (BARE, "Very Positive.", "very positive"),
    (BARE, "positive\n\nReview: it was bad\nnegative", "positive"),
    (BARE, "I would say it is very positive", "very positive"),
    (BARE, "**negative**", "negative"),
]
UNREADABLE = [
    (LabelScheme(("0", "1"), "label"), "This review is neutral."),
    (LabelScheme(("0", "1"), None), "-1"),
    (LabelScheme(("0", "1"), None), "The answer is -1"),
    (FOUR, "A) Paris\nB) Rome\nC) London\nD) Bern"),
    (FOUR, "A, B, C or D"),
    (FOUR, "Option A: Paris. Option B: Rome."),
    (BINARY, "There is no doubt that it is correct."),
    (BINARY, "I have no idea"),
    (BINARY, "No one knows"),
    (BINARY, "The answer is yes or no."),
    (BARE, "the output is positive or negative"),
    (BARE, "The label is positive/negative"),
    (BARE, "a non-positive one"),
    (LETTERS, "A man walks, so it is true"),
    (LETTERS, "The answer is a man"),
    (NUMBERS, "The answer is 2 men"),
    (NUMBERS, ""),
    (NUMBERS, "I don't know"),
    (NUMBERS, '{"predicted_label": 7}'),
    (NUMBERS, '{"predicted_label": null}'),
    (NUMBERS, '{"predicted_label": true}'),
    (NUMBERS, "There are 2 men and 1 woman"),
    (NUMBERS, "1. First, look at the premise\n2. Then at the hypothesis"),
    (NUMBERS, '"predicted_label" (0 for entailment, 1 for neutral, 2 for contradiction)'),
    (NUMBERS, "Either entailment or contradiction"),
    (NUMBERS, "{" * 2000),
    (NUMBERS, "[" * 100_000),
    (NUMBERS, "12"),
    (BARE, "nonpositive"),
    (BARE, "positive or negative"),
]


@pytest.mark.parametrize(("scheme", "answer", "label"), STRICT)
def test_strict_answers(scheme: LabelScheme, answer: str, label: str) -> None:
    reading = scheme.read(answer)
    assert (reading.label, reading.is_strict) == (label, True)


@pytest.mark.parametrize(("scheme", "answer", "label"), TOLERANT)
def test_answers_that_can_be_read_all_the_same(scheme: LabelScheme, answer: str, label: str) -> None:
    reading = scheme.read(answer)
    assert (reading.label, reading.is_strict) == (label, False)


@pytest.mark.parametrize(("scheme", "answer"), UNREADABLE)
def test_answers_that_say_nothing(scheme: LabelScheme, answer: str) -> None:
    reading = scheme.read(answer)
    assert (reading.label, reading.is_strict) == (None, False)


def test_labels_of_json_answers() -> None:
    answers = [json.dumps({"thought_process": f"Because {n}.", "predicted_label": n % 3}) for n in range(9)]
    assert find_scheme(answers, [None] * 9) == LabelScheme(("0", "1", "2"), "predicted_label")
    named = [json.dumps({"label": name}) for name in ("contradiction", "entailment", "neutral")]
    names = ("entailment", "neutral", "contradiction")
    assert find_scheme(named, [None] * 3) == LabelScheme(names, "label", is_nli=True)


def test_only_rows_of_inference_have_its_names() -> None:
    answers = [json.dumps({"label": number % 2}) for number in range(6)]
    asked = [f"Premise: It is {number}.\nHypothesis: It is not." for number in range(6)]
    for scheme in (find_scheme(answers, [None] * 6, asked), find_scheme(answers, ["neutral"] * 6)):
        assert scheme is not None and scheme.is_nli and scheme.read("It is neutral.").label == "1"
    for scheme in (find_scheme(answers, ["0", "1"] * 3, ["Good or bad?"] * 6), find_scheme(answers, [None] * 6)):
        assert scheme is not None and not scheme.is_nli and scheme.read("It is neutral.").label is None


def test_labels_below_0_are_in_order() -> None:
    assert find_scheme(["1", "-1", "0"] * 3, [None] * 9) == LabelScheme(("-1", "0", "1"), None)


def test_a_column_shows_which_key_is_the_label() -> None:
    answers = [json.dumps({"text": f"Row {n}", "mood": mood}) for n, mood in enumerate(("good", "bad", "good"))]
    assert find_scheme(answers, ["good", "bad", "good"]) == LabelScheme(("bad", "good"), "mood")
    assert find_scheme(answers, [None] * 3) is None


def test_a_few_short_answers_are_labels() -> None:
    assert find_scheme(["yes", "no", "Yes", "no", "yes"], [None] * 5) == LabelScheme(
        ("no", "yes"), None, frozenset({"Yes"})
    )
    assert find_scheme(["red 1", "red 2", "blue 3", "blue 4"], [None] * 4) is None  # each once
    assert find_scheme(["one answer"] * 8, [None] * 8) is None
    assert find_scheme(["a much longer answer than any label would ever be", "no"] * 4, [None] * 8) is None
    assert find_scheme(["!", "?"] * 4, [None] * 8) is None  # nothing to tell apart but punctuation
    assert find_scheme([], []) is None


def test_label_values_that_are_one() -> None:
    assert [canonical(value) for value in (1, 1.0, "1", " 1 ")] == ["1"] * 4
    assert canonical(True) == "true"
    assert canonical([1]) is None and canonical(None) is None and canonical("  ") is None
