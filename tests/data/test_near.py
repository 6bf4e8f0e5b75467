from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import near
from data.formats import Example, Message, survey
from data.groups import first_with_same, join
from data.keys import SignatureArray
from data.near import PERMUTATIONS, clusters, compared_text, normalised, pieces, signatures
from data.sources import BadRows, Row

GOLDEN = [1405523404, 1446855435, 2569872647, 3239351971]
WORDS = ["".join(random.Random(seed).choices("abcdefghijklmnoprstuvw", k=3 + seed % 6)) for seed in range(4000)]
INSTRUCTION = (
    "You are given the name of a thing. Decide whether it is found at sea or on land, think step by step, and end with "
    "one of the words sea or land, in lower case, without a full stop. Do not explain what the thing is for. "
)


def jaccard(one: str, other: str) -> float:
    return len(pieces(one) & pieces(other)) / len(pieces(one) | pieces(other))


def sentence(draw: random.Random, num_words: int) -> str:
    return " ".join(draw.choices(WORDS, k=num_words))


def with_words_changed(text: str, draw: random.Random, num_words: int) -> str:
    words = text.split(" ")
    for place in draw.sample(range(len(words)), num_words):
        words[place] = draw.choice(WORDS)
    return " ".join(words)


def estimates(signature: SignatureArray, some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float64: share of the minima on which rows `some[i]` and `others[i]` agree."""
    return np.mean(signature[some] == signature[others], axis=1)


def partition(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


def brute_force(num_rows: int, pairs: list[tuple[int, int]]) -> list[int]:
    """Smallest index of each row's cluster, by walking along the pairs."""
    labels = list(range(num_rows))
    changed = True
    while changed:
        changed = False
        for some, other in pairs:
            low = min(labels[some], labels[other])
            changed |= labels[some] != low or labels[other] != low
            labels[some] = labels[other] = low
    return labels


# Texts and signatures


def test_pieces_by_hand() -> None:
    assert pieces("Abc, Def!") == {"abc d", "bc de", "c def"}
    assert pieces("a  b") == {"a b"}
    assert jaccard("abcdefg", "abcdefh") == 2 / 4  # abcde and bcdef of these and cdefg, cdefh
    assert jaccard("banana bandana", "Banana... BANDANA") == 1.0


def test_what_is_the_same_and_what_is_not() -> None:
    assert normalised("  \uff26ull-width,\n“quoted” … Stra\u00dfe ") == "full-width quoted strasse"
    assert normalised("3 + 4 = 7") != normalised("3 * 4 = 7")
    assert normalised("?!") == "?!"
    alike, other, sign = signatures(["What does LoRA change?", "what does lora  change", "What does LoRA change: 3+4"])
    assert (alike == other).all()
    assert (alike != sign).any()


def test_a_signature_depends_on_its_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    texts = [sentence(draw, draw.randrange(1, 40)) for _ in range(60)] + [
        "",
        "a",
        "abcd",
        "abcde",
        "日本語",
        "🙂",
        "𝒳𝒴",
    ]
    together = signatures(texts)
    assert together.shape == (67, PERMUTATIONS)
    assert together.dtype == np.uint32
    assert len(np.unique(together, axis=0)) == 67
    for index, text in enumerate(texts):
        assert (signatures([text])[0] == together[index]).all()
    monkeypatch.setattr(near, "_CHUNK_CHARACTERS", 100)
    assert (signatures(texts[::-1]) == together[::-1]).all()
    assert signatures([]).shape == (0, PERMUTATIONS)


def test_signatures_are_the_same_on_every_machine() -> None:
    """Kept ones are read again later, perhaps elsewhere."""
    (signature,) = signatures(["What does LoRA actually change about a linear layer?"])
    assert signature[:4].tolist() == GOLDEN


def test_the_estimate_is_within_its_statistical_bounds() -> None:
    draw = random.Random(1)
    texts = [sentence(draw, 40) for _ in range(200)]
    changed = [with_words_changed(text, draw, 1 + index % 25) for index, text in enumerate(texts)]
    signature = signatures(texts + changed)
    estimate = estimates(signature, np.arange(200), np.arange(200, 400))
    exact = np.array([jaccard(one, other) for one, other in zip(texts, changed, strict=True)])
    assert exact.min() < 0.3
    assert exact.max() > 0.9
    errors = (estimate - exact) / np.sqrt(exact * (1 - exact) / PERMUTATIONS)
    assert np.abs(errors).max() < 4.5
    assert abs(errors.mean()) < 4 / np.sqrt(200)
    assert 0.8 < errors.std() < 1.2


def test_what_is_compared() -> None:
    chat = Example(
        "a", "a", messages=(Message("system", "Be kind."), Message("user", "Why?"), Message("assistant", "So."))
    )
    assert compared_text(chat) == "Why?\nSo."
    assert compared_text(Example("a", "a", text="Plain.")) == "Plain."


def test_our_template_makes_no_copies() -> None:
    draw = random.Random(2)
    rows = [
        {"premise": f"A {one}.", "hypothesis": f"A {other}.", "label": index % 3, "explanation": ""}
        for index, (one, other) in enumerate((sentence(draw, 1), sentence(draw, 1)) for _ in range(4))
    ]
    rows.append({"premise": "A black dog runs along a beach", "hypothesis": "An animal runs", "label": 0})
    rows.append({"premise": "A black dog runs along a beach.", "hypothesis": "An animal runs.", "label": 2})
    source = [Row(row, "a.jsonl", number) for number, row in enumerate(rows, start=1)]
    examples, _ = survey(source, name="a", fields={}).parse(source, BadRows(skip=False))
    asked = [example.messages[0].content for example in examples]
    assert jaccard(asked[0], asked[1]) > 0.7
    labels = clusters(signatures([compared_text(example) for example in examples]), threshold=0.7)
    assert labels.tolist() == [0, 1, 2, 3, 4, 4]


# Clusters


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_clusters_are_those_of_all_pairs(threshold: float) -> None:
    """Against all pairs of signatures, and against the exact similarity of the texts' pieces."""
    draw = random.Random(3)
    texts = [sentence(draw, 30) for _ in range(100)]
    for _ in range(100):
        texts.append(with_words_changed(draw.choice(texts), draw, draw.randrange(1, 9)))
    draw.shuffle(texts)
    signature = signatures(texts)
    labels = clusters(signature, threshold=threshold)
    everything = list(itertools.combinations(range(len(texts)), 2))
    some, others = np.array(everything).T
    estimated = estimates(signature, some, others)
    expected = brute_force(
        len(texts), [pair for pair, at in zip(everything, estimated, strict=True) if at >= threshold]
    )
    assert labels.tolist() == expected
    assert 20 < len(partition(labels)) < 195
    sets = [pieces(text) for text in texts]
    exact = [len(sets[one] & sets[other]) / len(sets[one] | sets[other]) for one, other in everything]
    surely = [pair for pair, at in zip(everything, exact, strict=True) if at >= threshold + 0.15]
    perhaps = [pair for pair, at in zip(everything, exact, strict=True) if at >= threshold - 0.15]
    assert all(labels[one] == labels[other] for one, other in surely)
    upper = brute_force(len(texts), perhaps)
    assert all(upper[index] == upper[label] for index, label in enumerate(labels))


def test_no_copies_no_clusters() -> None:
    draw = random.Random(4)
    signature = signatures([sentence(draw, 30) for _ in range(300)])
    assert clusters(signature, threshold=0.5).tolist() == list(range(300))
    assert clusters(signature[:0], threshold=0.7).tolist() == []
    assert clusters(signature[:1], threshold=0.7).tolist() == [0]


def test_the_order_of_the_rows_does_not_matter() -> None:
    draw = random.Random(5)
    texts = [sentence(draw, 30) for _ in range(100)]
    texts += [with_words_changed(draw.choice(texts), draw, draw.randrange(1, 6)) for _ in range(100)]
    order = np.array(draw.sample(range(200), 200))
    signature = signatures(texts)
    whole = partition(clusters(signature, threshold=0.7))
    moved = partition(clusters(signature[order], threshold=0.7))
    assert {frozenset(order[list(members)].tolist()) for members in moved} == whole
    assert max(map(len, whole)) > 1


def test_what_every_prompt_says_makes_no_copies() -> None:
    """Rows of which nine tenths are the same instruction; ten of them come twice, all but the same."""
    draw = random.Random(6)
    own = [sentence(draw, 5) for _ in range(200)]
    copies = [f"{text[:-1]}x" for text in own[:10]]
    texts = [INSTRUCTION + text for text in own + copies]
    alike = [jaccard(texts[one], texts[other]) for one, other in itertools.combinations(range(0, 200, 10), 2)]
    assert np.mean(alike) > 0.7
    labels = clusters(signatures(texts), threshold=0.7)
    assert labels[:200].tolist() == list(range(200))
    assert labels[200:].tolist() == list(range(10))


def test_two_instructions_make_no_two_clusters() -> None:
    draw = random.Random(7)
    texts = [(INSTRUCTION if index % 2 else INSTRUCTION[::-1]) + sentence(draw, 4) for index in range(60)]
    assert clusters(signatures(texts), threshold=0.7).tolist() == list(range(60))


def test_few_minima_of_their_own_prove_nothing() -> None:
    """All but four minima are the template's, and of these three agree: too few to call rows copies."""
    random_numbers = np.random.default_rng(2)
    signature = np.tile(random_numbers.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32), (60, 1))
    signature[:, :32:8] = random_numbers.integers(0, 2**32, (60, 4), dtype=np.uint32)
    signature[1::2, :24:8] = signature[::2, :24:8]
    assert clusters(signature, threshold=0.7).tolist() == list(range(60))
    signature[:, 32:64:8] = random_numbers.integers(0, 2**32, (60, 4), dtype=np.uint32)
    signature[1::2, 32:64:8] = signature[::2, 32:64:8]  # seven of eight
    assert clusters(signature, threshold=0.7).tolist() == [row // 2 * 2 for row in range(60)]


def family(draw: random.Random, num_copies: int, *, num_words: int = 40, share: float = 0.05) -> list[str]:
    """A text and copies of it with that share of the words changed."""
    text = sentence(draw, num_words)
    changed = max(round(share * num_words), 1)
    return [text] + [with_words_changed(text, draw, changed) for _ in range(num_copies - 1)]


@pytest.mark.parametrize("share", [0.025, 0.05])
@pytest.mark.parametrize(
    ("num_families", "num_copies", "num_others"),
    [(6, 5, 0), (1, 6, 50), (1, 6, 54), (1, 10, 90), (1, 12, 88), (5, 40, 0), (8, 25, 0), (12, 20, 0), (1, 150, 850)],
)
def test_copies_of_few_rows_are_no_template(num_families: int, num_copies: int, num_others: int, share: float) -> None:
    """However large a part of the data set they are."""
    draw = random.Random(8)
    texts = [text for _ in range(num_families) for text in family(draw, num_copies, share=share)]
    texts += [sentence(draw, 40) for _ in range(num_others)]
    in_families = num_families * num_copies
    expected = [index // num_copies * num_copies for index in range(in_families)]
    assert clusters(signatures(texts), threshold=0.7).tolist() == expected + list(range(in_families, len(texts)))


def test_copies_of_few_rows_after_an_instruction() -> None:
    """The families are told apart, though each says a fifth of what all rows say, and they begin alike."""
    draw = random.Random(9)
    texts = [INSTRUCTION + text for _ in range(5) for text in family(draw, 40, num_words=20)]
    assert clusters(signatures(texts), threshold=0.7).tolist() == [index // 40 * 40 for index in range(200)]


@pytest.mark.parametrize("num_rows", [12, 60, 500])
def test_a_template_with_little_of_its_own(num_rows: int) -> None:
    """Rows that differ in a word at the end, or in one in the middle and one of three endings."""
    draw = random.Random(10)
    words = draw.sample(WORDS, num_rows)
    labels = clusters(signatures([f"{INSTRUCTION}Say {word}." for word in words]), threshold=0.7)
    assert len(np.unique(labels)) >= 0.95 * num_rows  # some words are alike: "Say sea", "Say seal"
    endings = ["It is therefore at sea.", "It is therefore on land.", "That is not settled by the name."]
    texts = [f"{INSTRUCTION[:90]} {word} {INSTRUCTION[90:]} {draw.choice(endings)}" for word in words]
    assert len(np.unique(clusters(signatures(texts), threshold=0.7))) >= 0.95 * num_rows


def test_the_shipped_template_makes_no_copies() -> None:
    """Premise, hypothesis and label in the sample's template: without that left out, 242 units are left of 400."""
    lines = (Path(__file__).parents[2] / "data/samples/nli.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    labels = clusters(signatures([f"{row['prompt']}\n{row['completion']}" for row in rows]), threshold=0.7)
    assert len(np.unique(labels)) > 0.95 * len(rows)
    assert np.unique(labels, return_counts=True)[1].max() == 2


def test_the_same_text_is_one_cluster_however_often_it_comes() -> None:
    labels = clusters(signatures(["This is the same.", "THIS is the same!"] * 3000), threshold=0.7)
    assert (labels == 0).all()


def planted(num_rows: int, num_copies: int, *, agreeing: int) -> tuple[SignatureArray, np.ndarray]:
    """Random signatures, of which the last `num_copies` have `agreeing` minima of an earlier row each."""
    random_numbers = np.random.default_rng(0)
    signature = random_numbers.integers(0, 2**32, (num_rows, PERMUTATIONS), dtype=np.uint32)
    originals = np.arange(num_copies)
    signature[num_rows - num_copies :, :agreeing] = signature[originals, :agreeing]
    return signature[:, random_numbers.permutation(PERMUTATIONS)], originals


def test_twenty_thousand_signatures() -> None:
    signature, originals = planted(20_000, 2_000, agreeing=96)  # 0.75
    labels = clusters(signature, threshold=0.7)
    assert labels[:18_000].tolist() == list(range(18_000))
    assert (labels[18_000:] == originals).mean() > 0.999
    signature, _ = planted(20_000, 2_000, agreeing=80)  # 0.625
    assert clusters(signature, threshold=0.7).tolist() == list(range(20_000))


def test_thousands_of_near_copies_of_one_row() -> None:
    """All pairs of 1,500 would be a million comparisons to a band; neighbours are enough to join them."""
    random_numbers = np.random.default_rng(1)
    signature = random_numbers.integers(0, 2**32, (20_000, PERMUTATIONS), dtype=np.uint32)
    rows = np.sort(random_numbers.choice(20_000, 1_500, replace=False))
    changed = random_numbers.random((1_500, PERMUTATIONS)) < 0.1
    signature[rows] = np.where(changed, signature[rows], signature[rows[0]])
    labels = clusters(signature, threshold=0.7)
    assert (labels[rows] == rows[0]).all()
    assert len(np.unique(labels)) == 18_501


def test_mapped_signatures_are_read_not_copied(tmp_path: object) -> None:
    signature, _ = planted(500, 50, agreeing=110)
    path = f"{tmp_path}/signatures.npy"
    np.save(path, signature)
    mapped = np.load(path, mmap_mode="r")
    assert clusters(mapped, threshold=0.7).tolist() == clusters(signature, threshold=0.7).tolist()


# Groups


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_join_is_a_union_find(case: tuple[int, list[tuple[int, int]]]) -> None:
    num_rows, pairs = case
    members = np.arange(num_rows)
    for start in range(0, len(pairs), 5):
        some, others = np.array(pairs[start : start + 5]).T
        join(members, some, others)
    assert members.tolist() == brute_force(num_rows, pairs)


def test_first_with_same() -> None:
    assert first_with_same(np.array([7, 3, 7, 3, 9], np.uint64)).tolist() == [0, 1, 0, 1, 4]
    assert first_with_same(np.array([], np.uint64)).tolist() == []
