"""What every backend promises of text (`backends.generate`), on tiny models."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import backends
from core.errors import OutOfMemoryError, UserError
from core.protocols import IGNORE, Batch, Learner
from core.sampling import GREEDY, Continuation, Sampling
from tests.backends.conftest import (
    KINDS,
    LR,
    Open,
    make_adapter,
    make_config,
    microbatches,
    missing_package,
    open_learner,
    skip_without,
)
from tests.tiny import VOCAB_SIZE, make_model

NO_END = SimpleNamespace(eos_token_id=None)
WINDOW = KINDS["mistral"]["sliding_window"]
LENGTHS = (3, 17, 1, 9, WINDOW, 14)
"""Shorter and longer than the window; no two prompts are alike."""
WARM = Sampling(temperature=1.5, top_k=100, top_p=0.99, seed=2)


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of each kind that know no end token; big weights, so that what they say changes all the time."""
    root = tmp_path_factory.mktemp("endless")
    folders = {name: make_model(root / name, scale=0.15, **settings) for name, settings in KINDS.items()}
    for folder in folders.values():
        edit_config(folder, eos_token_id=None)
    return folders


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes config.json; a value of None removes the field."""
    raw = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def make_prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [np.random.default_rng([3, i]).integers(3, VOCAB_SIZE, n).tolist() for i, n in enumerate(lengths)]


def ids(found: Sequence[Continuation]) -> list[list[int]]:
    return [one.ids for one in found]


def recomputed(learner: Learner, prompt: list[int], answer: list[int]) -> list[int]:
    """The likeliest token at each place of the answer, from one forward pass without cache and padding."""
    row = np.array([[*prompt, *answer]], np.int32)
    targets = np.full_like(row, IGNORE)
    targets[0, len(prompt) - 1 : -1] = answer
    return learner.replay([Batch(np.zeros(1, np.int64), row, targets)]).greedy.tolist()


# --- a batch, and its rows alone


@pytest.mark.parametrize("prefill", [2048, 30])
def test_rows_of_a_batch_are_what_they_are_alone(
    backend: str, opened: Open, endless: dict[str, Path], kind: str, prefill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a forward pass over the whole text says; with prompts in one part or in several, dropout or not."""
    learner = opened(endless[kind], lora={"dropout": 0.5, "targets": "all-linear"})
    learner.train_step(microbatches(), step=1, lr=LR)  # leaves dropout on, or its keys in the modules
    prompts = make_prompts()
    monkeypatch.setattr(f"backends.{backend}.generate._PREFILL", prefill)
    together = backends.generate(backend, learner, NO_END, prompts, max_tokens=12)
    for prompt, found in zip(prompts, together, strict=True):
        assert len(found.ids) == 12
        assert not found.ended
        assert found.ids == recomputed(learner, prompt, found.ids)
        assert backends.generate(backend, learner, NO_END, [prompt], max_tokens=12) == [found]


def test_rows_that_end_leave_the_others_alone(backend: str, opened: Open, endless: dict[str, Path], kind: str) -> None:
    """One by one, the longest and the shortest among them, so that what is left is padded with less and less."""
    learner, prompts = opened(endless[kind]), make_prompts()
    whole = ids(backends.generate(backend, learner, NO_END, prompts, max_tokens=16))
    assert len({token for text in whole for token in text}) > 16
    lengths = []
    for end in (whole[1][1], whole[2][3], whole[3][5], whole[5][0], whole[4][7]):
        found = backends.generate(backend, learner, SimpleNamespace(eos_token_id=end), prompts, max_tokens=16)
        for text, one in zip(whole, found, strict=True):
            assert one.ended == (end in text)
            assert one.ids == (text[: text.index(end)] if end in text else text)
        lengths.append([len(one.ids) for one in found])
    assert len({length for one in lengths for length in one}) > 4


def test_rows_of_the_same_length(backend: str, opened: Open, endless: dict[str, Path], kind: str) -> None:
    """Without padding no mask is needed: another way through."""
    learner, prompts = opened(endless[kind]), make_prompts((9, 9, 9))
    found = ids(backends.generate(backend, learner, NO_END, prompts, max_tokens=10))
    assert [recomputed(learner, *pair) for pair in zip(prompts, found, strict=True)] == found
    end = SimpleNamespace(eos_token_id=found[1][2])
    assert backends.generate(backend, learner, end, prompts, max_tokens=10)[2].ids == found[2]


def test_in_four_bits(backend: str, opened: Open, endless: dict[str, Path], kind: str) -> None:
    learner, prompts = opened(endless[kind], model={"bits": 4}), make_prompts()
    together = ids(backends.generate(backend, learner, NO_END, prompts, max_tokens=8))
    assert [recomputed(learner, *pair) for pair in zip(prompts, together, strict=True)] == together


# --- against the libraries' own generation


def by_transformers(folder: Path, prompt: list[int], count: int, **settings: Any) -> list[int]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        pad_token_id=0,
        do_sample=False,
        max_new_tokens=count,
        **settings,
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_transformers_says_the_same(
    backend: str, opened: Open, endless: dict[str, Path], kind: str, penalty: float
) -> None:
    folder = endless[kind]
    learner = opened(folder, initial=make_adapter(folder, make_config(), filled=False))
    prompts = make_prompts((17, 4))
    how = Sampling(temperature=0.0, repetition_penalty=penalty)
    found = ids(backends.generate(backend, learner, NO_END, prompts, max_tokens=12, sampling=how))
    assert found == [by_transformers(folder, prompt, 12, repetition_penalty=penalty) for prompt in prompts]
    if penalty != 1.0:
        assert found != ids(backends.generate(backend, learner, NO_END, prompts, max_tokens=12))


@pytest.mark.parametrize("family", ["llama", "mixtral"])  # mlx-lm's Mistral knows no sliding window
def test_mlx_lm_says_the_same(backend: str, opened: Open, endless: dict[str, Path], family: str) -> None:
    if missing_package("mlx"):
        pytest.skip("mlx-lm is not installed")
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    folder = endless[family]
    learner = opened(folder, initial=make_adapter(folder, make_config(), filled=False))
    prompts = make_prompts((17, 4))
    model, _ = load_model(folder)
    expected = [[int(token) for token, _ in generate_step(mx.array(p), model, max_tokens=12)] for p in prompts]
    assert ids(backends.generate(backend, learner, NO_END, prompts, max_tokens=12)) == expected


# --- drawing


def test_draws_do_not_depend_on_the_batch(backend: str, opened: Open, endless: dict[str, Path], kind: str) -> None:
    learner, prompts = opened(endless[kind]), make_prompts()
    keys = [7, 3, 90, 4, 5, 6]

    def sample(places: Sequence[int], sampling: Sampling = WARM) -> list[list[int]]:
        some, of_some = [prompts[i] for i in places], [keys[i] for i in places]
        found = backends.generate(backend, learner, NO_END, some, max_tokens=10, sampling=sampling, keys=of_some)
        return ids(found)

    together = sample(range(6))
    assert sample([4, 1, 3]) == [together[4], together[1], together[3]]
    assert sample([2]) == [together[2]]
    assert sample(range(6), Sampling(temperature=1.5, seed=3)) != together
    assert sample(range(6), Sampling(temperature=1.5, top_k=1)) == sample(range(6), GREEDY)
    assert sample(range(6), Sampling(temperature=1.5, top_p=1e-6)) == sample(range(6), GREEDY)


def test_both_backends_draw_the_same(endless: dict[str, Path], kind: str) -> None:
    found = []
    for backend in ("mlx", "cuda"):
        skip_without(backend)
        learner = open_learner(backend, endless[kind])
        how = Sampling(temperature=1.0, repetition_penalty=1.2, seed=5)
        found.append(ids(backends.generate(backend, learner, NO_END, make_prompts(), max_tokens=12, sampling=how)))
        learner.close()
    assert found[0] == found[1]
    assert len({token for text in found[0] for token in text}) > 30


# --- where text ends


def test_end_tokens_of_tokenizer_and_model(
    backend: str, opened: Open, endless: dict[str, Path], tmp_path: Path
) -> None:
    """The model's are those of generation_config.json, one or several."""
    folder = shutil.copytree(endless["llama"], tmp_path / "model")
    prompt = [5, 6, 7]
    [text] = ids(backends.generate(backend, opened(folder), NO_END, [prompt], max_tokens=12))
    end = next(token for token in text[3:] if token not in text[:3])
    expected = [Continuation(text[: text.index(end)], ended=True)]
    by_tokenizer = SimpleNamespace(eos_token_id=end)
    assert backends.generate(backend, opened(folder), by_tokenizer, [prompt], max_tokens=12) == expected
    for value in (end, [VOCAB_SIZE + 1, end]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert backends.generate(backend, opened(folder), NO_END, [prompt], max_tokens=12) == expected


def test_text_stops_where_the_model_is_full(backend: str, opened: Open, endless: dict[str, Path], kind: str) -> None:
    prompts = make_prompts((3, 15, 16, 18))
    learner = opened(endless[kind])
    whole = backends.generate(backend, learner, NO_END, prompts, max_tokens=20)
    assert {len(text) for text in ids(whole)} == {20}
    found = backends.generate(backend, learner, NO_END, prompts, max_tokens=20, max_length=16)
    assert found == [
        Continuation(one.ids[:count], ended=False) for one, count in zip(whole, (13, 1, 0, 0), strict=True)
    ]


# --- while it runs


def test_tokens_come_as_they_are_made(backend: str, opened: Open, llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    learner, prompts = opened(llama), make_prompts((4, 8))

    def note(row: int, token: int) -> bool:
        seen.append((row, token))
        return False

    one, other = ids(backends.generate(backend, learner, NO_END, prompts, max_tokens=5, on_token=note))
    assert seen == [pair for step in zip(one, other, strict=True) for pair in zip((0, 1), step, strict=True)]


def test_an_answer_ends_where_it_is_long_enough(
    backend: str, opened: Open, endless: dict[str, Path], kind: str
) -> None:
    """Each row at another token; the others go on as if it were there."""
    learner, prompts = opened(endless[kind]), make_prompts()
    whole = backends.generate(backend, learner, NO_END, prompts, max_tokens=8)
    left = [9, 2, 1, 5, 9, 3]

    def note(row: int, token: int) -> bool:
        left[row] -= 1
        return left[row] == 0

    found = backends.generate(backend, learner, NO_END, prompts, max_tokens=8, on_token=note)
    assert [one.ids for one in found] == [one.ids[:count] for one, count in zip(whole, (8, 2, 1, 5, 8, 3), strict=True)]
    assert not any(one.ended for one in found)


@pytest.mark.parametrize("how", [GREEDY, WARM, Sampling(0.0, repetition_penalty=1.2), Sampling(1.0, top_k=0)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_output_that_is_no_number_is_refused(
    backend: str, opened: Open, endless: dict[str, Path], tmp_path: Path, how: Sampling, value: float
) -> None:
    """One logit of all; NaN and infinity are no numbers to compare with."""
    folder = shutil.copytree(endless["llama"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    learner = opened(folder)
    with pytest.raises(UserError, match="the model's output is not a number"):
        backends.generate(backend, learner, NO_END, make_prompts((4, 8)), max_tokens=5, sampling=how)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_learner_survives_a_callback_that_raises(
    backend: str, opened: Open, endless: dict[str, Path], kind: str, error: type[BaseException]
) -> None:
    """The same text as of a learner that was never interrupted, and the same next step as of a fresh one."""
    folder, prompts = endless[kind], make_prompts()
    learner, other, fresh = (opened(folder, lora={"dropout": 0.5}) for _ in range(3))

    def stop(row: int, token: int) -> bool:
        if row == 3:
            raise error("stop")
        return False

    with pytest.raises(error):
        backends.generate(backend, learner, NO_END, prompts, max_tokens=5, on_token=stop)
    again, expected = (backends.generate(backend, one, NO_END, prompts, max_tokens=5) for one in (learner, other))
    assert again == expected
    one, two = (float(x.train_step(microbatches(), step=1, lr=LR).loss) for x in (learner, fresh))
    assert one == two
    for name, array in fresh.export_state().adapter.items():
        np.testing.assert_array_equal(learner.export_state().adapter[name], array)


def test_running_out_of_memory_is_one_line(
    backend: str, opened: Open, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, prompts = opened(llama), make_prompts((4, 8))
    module = importlib.import_module(f"backends.{backend}.generate")

    def fail(*_: Any) -> None:
        raise RuntimeError({"mlx": "[malloc] Unable to allocate 9 bytes", "cuda": "DefaultCPUAllocator: 9"}[backend])

    with monkeypatch.context() as patched:
        patched.setattr(module._Decoder, "step", fail)
        with pytest.raises(OutOfMemoryError, match="generating text from 2 prompts of up to 8 tokens"):
            backends.generate(backend, learner, NO_END, prompts, max_tokens=5)
    assert [len(text) for text in ids(backends.generate(backend, learner, NO_END, prompts, max_tokens=5))] == [5, 5]


def test_nothing_to_do(backend: str, opened: Open, llama: Path) -> None:
    assert backends.generate(backend, opened(llama), NO_END, [], max_tokens=5) == []
