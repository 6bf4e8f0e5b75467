"""A mixture in 4 bits on PyTorch: every matrix packed, the same numbers as unpacked, kept on disk, and never whole."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.config import ModelConfig
from core.errors import UserError
from tests.backends.conftest import make_batch, open_learner, resolved
from tests.tiny import make_model

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit  # noqa: E402

from backends.cuda import packed_cache, streaming  # noqa: E402
from backends.cuda.attention import ATTENTION  # noqa: E402
from backends.cuda.nf4 import Nf4Matrix, packed_bytes  # noqa: E402

NUM_EXPERTS = 8
FEW = [make_batch((4, 3), seed=1)]
"""So few tokens that some experts get none."""
MANY = [make_batch((40, 33), width=48, seed=3), make_batch((16, 7, 3), first_row=2)]
TARGETS: dict[str, Any] = {
    "attention": "attention",
    "experts": ["gate_proj", "up_proj", "down_proj"],
    "all": "all-linear",
}
BITS = {"model": {"bits": 4}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("TWINKEEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nf4"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("packed") / "mixtral", model_type="mixtral", num_experts=NUM_EXPERTS)


@pytest.fixture(scope="module")
def unpacked(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with every packed matrix replaced by the values that it stands for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWINKEEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        values = dict(values_of(load(mixtral)))
    folder = tmp_path_factory.mktemp("unpacked") / "mixtral"
    shutil.copytree(mixtral, folder)
    weights = load_file(mixtral / "model.safetensors")
    changed = 0
    for name in weights:
        new = values.get(modern(name))
        if new is not None:
            changed += not np.array_equal(weights[name], new)
            weights[name] = new
    assert changed == 2 * (4 + 3 * NUM_EXPERTS)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path, **config: Any) -> Any:
    settings = ModelConfig(bits=4, **config)
    base, _ = streaming.load_in_pieces(
        resolved(folder), settings, device=torch.device("cpu"), dtype=torch.float32, attention=ATTENTION
    )
    return base


def modern(name: str) -> str:
    """A name in Mixtral's checkpoint -> what `values_of` calls it."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def values_of(base: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Name in the checkpoint, with `mlp`, and value of every packed matrix."""
    for path, module in base.named_modules():
        if isinstance(module, Nf4Matrix):
            value = dequantize_4bit(module.packed, module.state).numpy()
            stem, leaf, expert = path.rsplit(".", 2)
            if leaf == "down_proj":
                yield f"{stem}.{expert}.w2.weight", value
            else:
                gate, up = np.split(value, 2)
                yield f"{stem}.{expert}.w1.weight", np.ascontiguousarray(gate)
                yield f"{stem}.{expert}.w3.weight", np.ascontiguousarray(up)
        elif getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            yield f"{path}.weight", dequantize_4bit(module.weight.data, module.weight.quant_state).numpy()


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [FEW, MANY], ids=["experts without tokens", "many tokens"])
@pytest.mark.parametrize("targets", TARGETS)
def test_loss_and_gradients_are_those_of_the_unpacked_model(
    mixtral: Path, unpacked: Path, targets: str, batches: list[Any]
) -> None:
    """A step of plain gradient descent at rate 1 leaves parameter minus gradient."""
    sections = {"lora": {"targets": TARGETS[targets], "rank": 4, "alpha": 8}, "optim": {"name": "sgd"}}
    found = []
    for folder, bits in ((mixtral, 4), (unpacked, 16)):
        learner = open_learner("cuda", folder, model={"bits": bits}, **sections)
        before = learner.export_state().adapter
        rows = learner.evaluate(batches)
        out = learner.train_step(batches, step=1, lr=1.0)
        after = learner.export_state().adapter
        found.append((rows.nll, float(out.loss), {name: before[name] - after[name] for name in before}))
    (nll, loss, gradients), (other_nll, other_loss, other_gradients) = found
    np.testing.assert_allclose(nll, other_nll, rtol=1e-5)
    assert loss == pytest.approx(other_loss, rel=1e-5)
    size = max(np.abs(gradient).max() for gradient in other_gradients.values())
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, other_gradients[name], rtol=0, atol=1e-5 * size, err_msg=name)


def test_an_expert_without_tokens_is_not_touched(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched = []
    forward = Nf4Matrix.forward

    def counting(self: Nf4Matrix, x: Any) -> Any:
        touched.append((id(self), len(x)))
        return forward(self, x)

    monkeypatch.setattr(Nf4Matrix, "forward", counting)
    learner = open_learner("cuda", mixtral, **BITS)
    learner.evaluate([make_batch((3,), seed=1)])
    assert all(tokens for _, tokens in touched)
    # 3 tokens to 2 experts each, in 2 layers, 2 products for each expert
    assert len(touched) == len(set(touched)) <= 2 * 2 * 6
    assert len(touched) < 2 * 2 * NUM_EXPERTS


def test_no_unpacked_matrix_is_kept_for_the_backward_pass(mixtral: Path) -> None:
    learner: Any = open_learner("cuda", mixtral, lora={"targets": "all-linear"}, **BITS)
    matrices = {tuple(m.shape) for m in learner.model.modules() if isinstance(m, Nf4Matrix)}
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Any) -> Any:
        if tensor.is_floating_point():
            kept.extend([tuple(tensor.shape), tuple(reversed(tensor.shape))])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        learner.train_step(MANY, step=1, lr=1e-3)
    assert kept
    assert not matrices & set(kept)


def test_the_same_batch_gives_the_same_bits(mixtral: Path) -> None:
    learner = open_learner("cuda", mixtral, lora={"targets": "all-linear"}, **BITS)
    one, other = learner.evaluate(MANY), learner.evaluate(MANY)
    assert one.nll.tobytes() == other.nll.tobytes()


def test_the_same_step_gives_the_same_bits(mixtral: Path) -> None:
    ends = []
    for _ in range(2):
        learner = open_learner("cuda", mixtral, lora={"targets": "all-linear", "dropout": 0.1}, **BITS)
        for step in (1, 2):
            learner.train_step(MANY, step=step, lr=1e-3)
        ends.append(learner.export_state().adapter)
    for name, value in ends[0].items():
        assert value.tobytes() == ends[1][name].tobytes(), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_stays_near_float32(mixtral: Path, checkpointing: bool) -> None:
    sections = {
        "lora": {"targets": ["gate_proj", "down_proj", "mlp.gate"]},
        "train": {"gradient_checkpointing": checkpointing},
    }
    found = []
    for dtype in ("float32", "bfloat16"):
        learner = open_learner("cuda", mixtral, model={"bits": 4, "dtype": dtype}, **sections)
        found.append([float(learner.train_step(MANY, step=step, lr=1e-2).loss) for step in (1, 2, 3)])
    np.testing.assert_allclose(found[0], found[1], rtol=0.01)
    assert found[1][2] < found[1][0]


def test_frozen_layers_have_no_adapter_and_no_gradient(mixtral: Path) -> None:
    learner: Any = open_learner("cuda", mixtral, lora={"frozen_fraction": 0.5, "targets": "all-linear"}, **BITS)
    entering = []
    learner.model.model.layers[1].register_forward_pre_hook(lambda _, args: entering.append(args[0].requires_grad))
    learner.train_step(MANY, step=1, lr=1e-3)
    assert entering == [False] * len(MANY)
    assert all(".layers.1." in name for name in learner.export_state().adapter)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_what_is_packed_and_what_is_not(mixtral: Path) -> None:
    base = load(mixtral)
    for name, parameter in base.named_parameters():
        is_packed = parameter.dtype == torch.uint8
        assert is_packed == (".self_attn." in name), name
    experts = [m for m in base.modules() if isinstance(m, Nf4Matrix)]
    assert len(experts) == 2 * 2 * NUM_EXPERTS
    assert sum(m.num_bytes for m in experts) == sum(packed_bytes(int(np.prod(m.shape))) for m in experts)


def test_one_matrix_at_a_time(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = []
    of = Nf4Matrix.of
    monkeypatch.setattr(Nf4Matrix, "of", lambda matrix: largest.append(matrix.numel()) or of(matrix))
    load(mixtral)
    assert max(largest) == 2 * 128 * 64  # gate and up of one expert


def test_names_of_every_kind_of_checkpoint(mixtral: Path, tmp_path: Path) -> None:
    """One by one as Mixtral and as Qwen name them, and fused: the same bits."""
    weights = load_file(mixtral / "model.safetensors")
    letters = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    qwen = {}
    for name, value in weights.items():
        *path, leaf, weight = modern(name).split(".")
        qwen[".".join([*path, letters.get(leaf, leaf), weight])] = value
    fused = {name: value for name, value in qwen.items() if ".experts." not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        parts = {
            leaf: np.stack([qwen[f"{stem}.{expert}.{leaf}.weight"] for expert in range(NUM_EXPERTS)])
            for leaf in letters.values()
        }
        fused[f"{stem}.gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
        fused[f"{stem}.down_proj"] = parts["down_proj"]
    expected = dict(values_of(load(mixtral)))
    for kind, tensors in (("qwen", qwen), ("fused", fused)):
        folder = tmp_path / kind
        shutil.copytree(mixtral, folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        found = dict(values_of(load(folder)))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.tobytes() == expected[name].tobytes(), f"{kind} {name}"


def test_other_families_with_experts_of_the_same_form(tmp_path: Path) -> None:
    """OLMoE and Qwen3-MoE, made and run by transformers: packed is what unpacked weights of those values compute."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 96, "head_dim": 16}
    for kind in ("Olmoe", "Qwen3Moe"):
        config = getattr(transformers, f"{kind}Config")(**sizes, moe_intermediate_size=64, pad_token_id=0)
        torch.manual_seed(0)
        plain = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        plain.save_pretrained(tmp_path / kind)
        packed = load(tmp_path / kind)
        with torch.no_grad():
            for path, module in packed.named_modules():
                if isinstance(module, Nf4Matrix):
                    stem, leaf, expert = path.rsplit(".", 2)
                    value = dequantize_4bit(module.packed, module.state)
                    getattr(plain.get_submodule(stem), leaf)[int(expert)] = value
                elif getattr(getattr(module, "weight", None), "quant_state", None) is not None:
                    value = dequantize_4bit(module.weight.data, module.weight.quant_state)
                    plain.get_submodule(path).weight.copy_(value)
            ids = torch.arange(1, 33)[None]
            torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


def test_nothing_is_repacked_for_an_evaluation(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is loaded at first nor a layer that is read later, on a CPU where bitsandbytes would."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    base, pieces = streaming.load_in_pieces(
        resolved(mixtral), ModelConfig(bits=4), device=torch.device("cpu"), dtype=torch.float32, attention=ATTENTION,
        left_out=range(1),
    )  # fmt: skip
    pieces.install_layer(base, 0)
    found = [module for module in base.modules() if isinstance(module, modules.Linear4bit)]
    assert len(found) == 2 * 4
    assert not any(module.support_avx512bf16_for_cpu for module in found)


def test_experts_of_another_form_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, num_local_experts=2, num_experts_per_tok=1, vocab_size=64,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "gpt-oss")
    with pytest.raises(UserError, match=r"GptOssExperts\) has biases"):
        load(tmp_path / "gpt-oss")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.layers.1.block_sparse_moe.experts.3.w2.weight", None, "have no model.layers.1.mlp.experts.3.w2.weight"),
        ("model.layers.0.self_attn.q_proj.weight", np.zeros((8, 64), np.float32), "have the wrong shape for"),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", np.zeros((8, 64), np.float32), "have the wrong shape"),
        ("model.norm.weight", None, "have no model.norm.weight"),
    ],
)
def test_weights_that_do_not_fit(
    mixtral: Path, tmp_path: Path, cache: Path, name: str, change: Any, words: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(mixtral, folder)
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    if change is not None:
        weights[name] = change
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=words):
        load(folder)
    assert not list(cache.iterdir())


# --- the cache --------------------------------------------------------------------------------------------------------


def bits_of(base: Any) -> dict[str, bytes]:
    tensors = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    found = {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}
    return found | {name: value.tobytes() for name, value in values_of(base)}


@pytest.fixture
def no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(matrix: Any) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(Nf4Matrix, "of", refuse)


def test_the_second_start_packs_nothing_and_has_the_same_bits(mixtral: Path, request: pytest.FixtureRequest) -> None:
    first = bits_of(load(mixtral))
    request.getfixturevalue("no_packing")
    assert bits_of(load(mixtral)) == first


def test_a_damaged_cache_is_made_again(mixtral: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = bits_of(load(mixtral))
    (folder,) = cache.iterdir()
    path = folder / "layer-001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "twinkeel"):
        assert bits_of(load(mixtral)) == first
    assert "damaged; packing the weights again" in caplog.text
    assert packed_cache.PackedCache(folder).is_whole()


def test_other_weights_of_the_same_size_are_not_mixed_up(mixtral: Path, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(mixtral, folder)
    first = bits_of(load(folder))
    weights = load_file(folder / "model.safetensors")
    save_file({name: -value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert bits_of(load(folder)) != first
    assert len(list(cache.iterdir())) == 2


def test_a_manifest_of_another_format_is_not_used(mixtral: Path, cache: Path) -> None:
    load(mixtral)
    (folder,) = cache.iterdir()
    manifest = json.loads((folder / packed_cache.MANIFEST).read_text())
    (folder / packed_cache.MANIFEST).write_text(json.dumps({**manifest, "format": 0}))
    assert not packed_cache.PackedCache(folder).is_whole()
    assert not folder.exists()


FAILURES = {
    "the first file": ("safetensors.torch.save_file", OSError(28, "No space left on device")),
    "the draft": ("tempfile.mkdtemp", PermissionError(13, "Permission denied")),
    "the manifest": ("pathlib.Path.write_text", OSError(28, "No space left on device")),
    "the last step": ("pathlib.Path.replace", OSError(30, "Read-only file system")),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_disk_that_fails_costs_the_cache_and_not_the_run(
    mixtral: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    name, error = FAILURES[where]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with caplog.at_level(logging.WARNING, "twinkeel"), monkeypatch.context() as patch:
        patch.setattr(name, fail)
        load(mixtral)
    assert caplog.text.count("4-bit weights are not kept") == 1
    assert not list(cache.iterdir())


def test_an_error_of_the_loading_stays_that_error(
    mixtral: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(matrix: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Nf4Matrix, "of", fail)
    with pytest.raises(OSError, match="Input/output error"):
        load(mixtral)
    assert "not kept" not in caplog.text
    assert not list(cache.iterdir())


def test_drafts_of_killed_processes_are_removed(mixtral: Path, cache: Path) -> None:
    dead, mine = cache / ".making-4194999-x", cache / f".making-{os.getpid()}-y"
    for draft in (dead, mine):
        draft.mkdir(parents=True)
    load(mixtral)
    assert not dead.exists()
    assert mine.exists()


def test_weights_from_elsewhere_have_a_cache_of_their_own(mixtral: Path, cache: Path) -> None:
    class Zeros:
        name = "zeros"

        def has(self, name: str) -> bool:
            return True

        def read(self, name: str, shape: tuple[int, ...]) -> Iterator[Any]:
            yield from torch.zeros(shape if len(shape) == 3 else (1, *shape))

    first = bits_of(load(mixtral))
    settings = {"device": torch.device("cpu"), "dtype": torch.float32, "attention": ATTENTION}
    streaming.load_in_pieces(resolved(mixtral), ModelConfig(bits=4), source=Zeros(), **settings)
    assert len(list(cache.iterdir())) == 2
    assert bits_of(load(mixtral)) == first


def test_a_model_with_biases_starts_a_second_time(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.OlmoeConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, vocab_size=96, attention_bias=True, pad_token_id=0,
    )  # fmt: skip
    transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path / "biased")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        one, other = (load(tmp_path / "biased")(ids).logits for _ in range(2))
    assert torch.equal(one, other)


def test_no_cache_when_it_is_switched_off_or_has_no_room(
    mixtral: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(mixtral, cache_packed=False)
    assert not cache.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    load(mixtral)
    assert not list(cache.iterdir())
