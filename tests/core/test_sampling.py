"""The choice of the next token, by hand and against transformers, and the bookkeeping of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from core.errors import UserError
from core.generation import continue_prompts, end_tokens
from core.sampling import GREEDY, Continuation, Sampling, penalise, pick_token

VOCAB = 50

# --- one token


def test_pick_token_draws_what_it_should() -> None:
    """Probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1; 16, 4, 1, 1 of 22 at 1/2 (squares)."""
    values = np.log([0.125, 0.5, 0.125, 0.25])

    def shares(temperature: float, top_p: float = 1.0, top_k: int = 0) -> npt.NDArray[np.float64]:
        random = np.random.default_rng(0)
        drawn = [pick_token(values, temperature, top_p=top_p, top_k=top_k, random=random) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(1.0), [0.125, 0.5, 0.125, 0.25], atol=0.03)
    np.testing.assert_allclose(shares(0.5), np.array([1, 16, 1, 4]) / 22, atol=0.03)
    np.testing.assert_allclose(shares(1.0, top_k=2), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(shares(1.0, top_k=9), [0.125, 0.5, 0.125, 0.25], atol=0.03)
    np.testing.assert_allclose(shares(1.0, top_k=3), [1 / 7, 4 / 7, 0, 2 / 7], atol=0.03)  # of equals, the first
    np.testing.assert_allclose(shares(1.0, top_p=0.6), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    assert shares(1.0, top_p=0.3).tolist() == [0, 1, 0, 0]
    # of the three likeliest, 4/7 and 2/7 hold 0.8 (and 4/7 alone does not): 2/3 and 1/3 remain
    np.testing.assert_allclose(shares(1.0, top_k=3, top_p=0.8), [0, 2 / 3, 0, 1 / 3], atol=0.03)


@pytest.mark.parametrize("top_k", [0, 1, 5, 20, VOCAB])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_pick_token_draws_from_what_transformers_leaves(top_k: int, top_p: float) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(1)
    values = rng.normal(0, 2, VOCAB).astype(np.float32)
    scores = transformers.TemperatureLogitsWarper(1.5)(None, torch.tensor(values)[None])
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    expected = transformers.TopPLogitsWarper(top_p)(None, scores).softmax(dim=-1)[0].numpy()
    drawn = [pick_token(values, 1.5, top_p=top_p, top_k=top_k, random=rng) for _ in range(3000)]
    shares = np.bincount(drawn, minlength=VOCAB) / 3000
    assert not shares[expected == 0].any()
    np.testing.assert_allclose(shares, expected, atol=0.04)


def test_pick_token_takes_one_number() -> None:
    """So that the next draw does not depend on how many tokens there were to choose from."""
    one, other = np.random.default_rng(5), np.random.default_rng(5)
    pick_token(np.zeros(VOCAB), 1.0, top_p=1.0, top_k=0, random=one)
    pick_token(np.zeros(VOCAB), 1.0, top_p=0.5, top_k=3, random=other)
    assert one.random() == other.random()


def test_penalise_by_hand() -> None:
    """Positive logits are divided, negative ones multiplied: both become less likely."""
    logits = np.array([3.0, -3.0, 1.0, 0.0, 2.0])
    penalise(logits, np.array([0, 1, 3]), 1.5)
    assert logits.tolist() == [2.0, -4.5, 1.0, 0.0, 2.0]


@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_penalise_is_that_of_transformers(penalty: float) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = np.random.default_rng(0).normal(0, 3, VOCAB).astype(np.float32)
    ids = [7, 3, 7, 49, 3, 0]
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([ids]), torch.tensor(values)[None])[0].numpy()
    penalise(values, np.unique(ids), penalty)
    np.testing.assert_array_equal(values, expected)


# --- a batch


class FakeDecoder:
    """The likeliest next token is the sum of all tokens so far (mod VOCAB), the next likeliest the one after it."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.kept: list[list[int]] = []
        self.num_rows: list[int] = []

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        self.rows = [list(prompt) for prompt in prompts]

    def likeliest(self) -> list[int]:
        return [sum(row) % VOCAB for row in self.rows]

    def logits(self) -> npt.NDArray[np.float32]:
        places = np.arange(VOCAB)[None] - np.array(self.likeliest())[:, None]
        return 2.0 - 0.1 * (places % VOCAB).astype(np.float32)

    def keep(self, places: Sequence[int]) -> None:
        self.kept.append(list(places))
        self.rows = [self.rows[place] for place in places]

    def step(self, tokens: Sequence[int]) -> None:
        self.num_rows.append(len(tokens))
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)


def run(prompts: Sequence[Sequence[int]], decoder: FakeDecoder | None = None, **settings: Any) -> list[Continuation]:
    settings = {"max_tokens": 4, "max_length": None, "ends": {0}, "sampling": GREEDY, **settings}
    return continue_prompts(decoder or FakeDecoder(), prompts, **settings)


def test_rows_end_by_themselves_and_cost_nothing_then() -> None:
    """1 -> 1 2 4 8; 25 -> 25, then 50 = 0 ends it; 20 30 -> 0 at once; 3 -> 3 6 12 24."""
    decoder, seen = FakeDecoder(), []

    def note(row: int, token: int) -> bool:
        seen.append((row, token))
        return False

    found = run([[1], [25], [20, 30], [3]], decoder, on_token=note)
    assert found == [
        Continuation([1, 2, 4, 8], ended=False),
        Continuation([25], ended=True),
        Continuation([], ended=True),
        Continuation([3, 6, 12, 24], ended=False),
    ]
    assert seen == [(0, 1), (1, 25), (3, 3), (0, 2), (3, 6), (0, 4), (3, 12), (0, 8), (3, 24)]
    assert decoder.kept == [[0, 1, 3], [0, 2]]  # places among the rows that were left
    assert decoder.num_rows == [3, 2, 2]  # no step after the last token


def test_an_answer_stops_where_the_model_is_full() -> None:
    """Prompt and answer together have 5 tokens at most; a prompt that fills it is not even read."""
    decoder = FakeDecoder()
    found = run([[1, 1, 1], [9, 9, 9, 9, 9], [1, 2, 3, 5, 7, 9], [7]], decoder, max_length=5)
    assert [c.ids for c in found] == [[3, 6], [], [], [7, 14, 28, 6]]
    assert not any(c.ended for c in found)
    assert [len(row) for row in decoder.rows] == [4]
    assert run([[1]], max_tokens=0) == [Continuation([], ended=False)]
    assert run([]) == []


def test_an_end_token_past_the_limit_is_not_looked_for() -> None:
    assert run([[25]], max_tokens=1) == [Continuation([25], ended=False)]
    assert run([[25]], max_tokens=2) == [Continuation([25], ended=True)]


def test_draws_are_a_function_of_seed_and_key() -> None:
    """Whatever batch a row is in, wherever it is there, and whichever rows end beside it."""
    how = Sampling(temperature=2.0, top_k=0, top_p=1.0, seed=3)

    def sample(prompts: list[list[int]], keys: list[int] | None, how: Sampling = how) -> list[list[int]]:
        return [c.ids for c in run(prompts, max_tokens=20, sampling=how, keys=keys)]

    prompts = [[1], [2, 2], [3], [4]]
    together = sample(prompts, [10, 11, 12, 13])
    assert sample(prompts[::-1], [13, 12, 11, 10])[::-1] == together
    assert [sample([p], [k])[0] for p, k in zip(prompts, [10, 11, 12, 13], strict=True)] == together
    assert len({len(ids) for ids in together}) > 1  # some ended before others
    assert sample([[1]], [11])[0] != together[0]
    assert sample(prompts, None) == sample(prompts, [0, 1, 2, 3])
    assert sample([[1]], [10], replace(how, seed=4))[0] != together[0]


def test_a_penalty_counts_prompt_and_answer() -> None:
    """The two likeliest have the logits 2.0 and 1.9. Of a token that was there, 1.02 leaves 1.96, and 1.1 1.82."""

    def text(prompt: list[int], penalty: float) -> list[int]:
        return run([prompt], ends=(), sampling=Sampling(0.0, repetition_penalty=penalty))[0].ids

    assert text([7], 1.0) == text([7], 1.02) == [7, 14, 28, 6]
    assert text([7], 1.1) == [8, 15, 30, 10]
    assert text([5, 45], 1.02) == [0, 0, 0, 0]
    assert text([5, 45], 1.1) == [0, 1, 2, 3]


def test_what_a_callback_raises_is_passed_on() -> None:
    def stop(row: int, token: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([[1]], on_token=stop)


def test_a_row_ends_where_it_is_long_enough() -> None:
    """1 -> 1 2, where the 2 is enough; 3 -> 3 6 12 24, with a batch of one from then on."""
    decoder = FakeDecoder()
    found = run([[1], [3]], decoder, on_token=lambda row, token: token == 2)
    assert found == [Continuation([1, 2], ended=False), Continuation([3, 6, 12, 24], ended=False)]
    assert decoder.kept == [[1]] and decoder.num_rows == [2, 1, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=0), Sampling(0.0, repetition_penalty=1.1)])
def test_logits_that_are_no_numbers_are_refused(value: float, sampling: Sampling) -> None:
    class Diverged(FakeDecoder):
        def logits(self) -> npt.NDArray[np.float32]:
            found = super().logits()
            found[-1, 30] = value
            return found

    with pytest.raises(UserError, match="the model's output is not a number") as caught:
        run([[1], [3]], Diverged(), sampling=sampling)
    assert "model.dtype" in str(caught.value.hint)
    assert len(run([[1], [3]], FakeDecoder(), sampling=sampling)) == 2


def test_a_token_that_can_not_be_is_never_drawn() -> None:
    """Minus infinity is a probability of 0."""
    logits = np.array([-np.inf, 1.0, -np.inf, 1.0])
    random = np.random.default_rng(0)
    assert {pick_token(logits, 1.0, top_p=1.0, top_k=0, random=random) for _ in range(50)} == {1, 3}


@pytest.mark.filterwarnings("error")
def test_a_temperature_near_zero_takes_the_likeliest() -> None:
    logits = np.array([1.0, 700.0, 699.0], np.float32)
    for temperature in (5e-324, 1e-308, 1e-40):
        assert pick_token(logits, temperature, top_p=0.95, top_k=0, random=np.random.default_rng(0)) == 1


def test_end_tokens_are_the_tokenizers_and_the_models() -> None:
    assert end_tokens(SimpleNamespace(eos_token_id=2), [3, 2]) == {2, 3}
    assert end_tokens(SimpleNamespace(eos_token_id=None), 0) == {0}
    assert end_tokens(SimpleNamespace(eos_token_id=5), None) == {5}
