"""What only the PyTorch backend has: transformers, PEFT and bitsandbytes under it, and what a GPU needs of the step."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import backends
from core.config import OptimConfig
from core.errors import OutOfMemoryError, UserError
from core.protocols import IGNORE
from tests.backends.conftest import (
    ROOT,
    assert_same_state,
    make_adapter,
    make_batch,
    make_config,
    microbatches,
    missing_package,
    open_learner,
)
from tests.backends.test_shared_start import shared_batch, with_filler
from tests.tiny import VOCAB_SIZE

if missing := missing_package("cuda"):
    pytest.skip(f"cuda: {missing} is not installed", allow_module_level=True)

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from backends.cuda.attention import hands_on_layout  # noqa: E402

LR = 3e-3
CUDA = backends.get("cuda")


class Watch(TorchDispatchMode):
    """Records every operation's name and output."""

    def __init__(self, note: Callable[[str, Any], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.note(str(function), result)
        return result


# --- against the libraries' own way


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_equal_a_plain_peft_loop(folders: dict[str, Path], kind: str, smoothing: float) -> None:
    """transformers with full logits, an attention mask and eager attention, and PEFT as everybody uses it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = folders[kind]
    config = make_config(lora={"rslora": True, "frozen_fraction": 0.5})
    adapter = make_adapter(folder, config)
    settings = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        layers_to_transform=[1],
    )
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    peer = get_peft_model(base, settings)
    values = {
        f"base_model.model.{name}.default.weight": torch.from_numpy(array.copy())
        for name, array in adapter.tensors.items()
    }
    assert not peer.load_state_dict(values, strict=False).unexpected_keys
    batch, total = make_batch((12, 9, 14)), 0.0
    inputs, targets = torch.from_numpy(batch.inputs).long(), torch.from_numpy(batch.targets).long()
    logits = peer(input_ids=inputs, attention_mask=(inputs != 0).long()).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing, ignore_index=IGNORE
    )
    losses.backward()

    learner = open_learner(
        "cuda",
        folder,
        initial=adapter,
        lora={"rslora": True},
        optim={"name": "sgd", "momentum": 0.9, "label_smoothing": smoothing},
    )
    output = learner.train_step([batch], step=1, lr=LR)
    found = learner.export_state().optimizer
    theirs = {n: p.grad for n, p in peer.named_parameters() if p.requires_grad}
    assert len(theirs) == len(found) == 8
    for name in adapter.tensors:
        expected = theirs[f"base_model.model.{name}.default.weight"].numpy()
        np.testing.assert_allclose(
            found[f"momentum/{name}"], expected, rtol=0, atol=2e-6 * np.abs(expected).max(), err_msg=name
        )
        total += float((expected.astype(np.float64) ** 2).sum())
    assert float(output.grad_norm) == pytest.approx(math.sqrt(total), rel=1e-5)
    if smoothing == 0.0:
        assert float(output.loss) == pytest.approx(losses.item(), rel=1e-6)


# --- what a GPU needs of the step


@pytest.mark.parametrize("name", ["lion", "sgd", "adafactor"])
def test_nothing_in_a_step_waits_for_the_device(folders: dict[str, Path], kind: str, name: str) -> None:
    """On a GPU, reading a value (`_local_scalar_dense`) and data-dependent shapes (`nonzero`) synchronise.

    AdamW is left out: on a CPU torch reads its step counters, on a GPU the fused kernel does.
    """
    learner = open_learner("cuda", folders[kind], optim={"name": name, "max_grad_norm": 1.0})
    seen: list[str] = []
    with Watch(lambda function, _: seen.append(function)):
        output = learner.train_step(microbatches(), step=1, lr=LR)
        in_step = len(seen)
        float(output.loss)
    waits = [index for index, function in enumerate(seen) if "_local_scalar_dense" in function or "nonzero" in function]
    assert in_step > 100
    assert waits, "the watch sees float()"
    assert min(waits) >= in_step


def test_logits_exist_at_target_positions_only(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in chunks: 28 targets at 8 at a time give the same gradient, and no more than 8 rows of logits."""
    from backends.cuda import loss

    batch = make_batch((21, 21), width=40)
    found = []
    for chunk in (1024, 8):
        monkeypatch.setattr(loss, "CHUNK", chunk)
        learner = open_learner("cuda", llama, optim={"name": "sgd", "momentum": 0.9, "label_smoothing": 0.1})
        rows: list[int] = []

        def note(_: str, result: Any, rows: list[int] = rows) -> None:
            if isinstance(result, torch.Tensor) and result.ndim >= 2 and result.shape[-1] == VOCAB_SIZE:
                rows.append(result.numel() // VOCAB_SIZE)

        with Watch(note):
            output = learner.train_step([batch], step=1, lr=LR)
        evaluated = learner.evaluate([batch])
        found.append((learner.export_state(), float(output.loss), evaluated.nll))
        assert output.num_targets == 28
        # the transposed output projection [64, V] passes through here as well
        assert max(r for r in rows if r != 64) == min(chunk, 28)
    (whole, loss_whole, nll_whole), (parts, loss_parts, nll_parts) = found
    assert loss_parts == pytest.approx(loss_whole, rel=1e-6)
    np.testing.assert_allclose(nll_parts, nll_whole, rtol=1e-6)
    for slot, array in whole.optimizer.items():
        np.testing.assert_allclose(parts.optimizer[slot], array, rtol=0, atol=2e-6 * np.abs(array).max())


def test_fast_causal_attention(folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask but for rows longer than the sliding window; without one, `is_causal` picks the fast kernel."""
    calls: list[tuple[bool, Any]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Any = None, is_causal: bool = False, **kwargs: Any) -> Any:
        calls.append((is_causal, attn_mask))
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    learner = open_learner("cuda", folders[kind])
    learner.evaluate([make_batch((6,), width=6)])
    assert [(causal, mask is None) for causal, mask in calls] == [(True, True)] * 2
    calls.clear()
    learner.evaluate([make_batch((8, 7))])
    if kind != "mistral":
        assert [(causal, mask is None) for causal, mask in calls] == [(True, True)] * 2
        return
    expected = [[0 <= row - column < 6 for column in range(8)] for row in range(8)]
    for causal, mask in calls:
        assert not causal
        assert mask[0, 0].tolist() == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_compute(llama: Path, dtype: str) -> None:
    """The frozen base and the arithmetic are 16-bit, the adapter and its moments stay float32, and it learns."""
    full = open_learner("cuda", llama)
    half = open_learner("cuda", llama, model={"dtype": dtype}, train={"gradient_checkpointing": True})
    assert half.evaluate(microbatches()).mean == pytest.approx(full.evaluate(microbatches()).mean, rel=5e-3)
    assert f"16-bit weights, {dtype} compute" in half.description
    losses = [float(half.train_step(microbatches(), step=s, lr=0.02).loss) for s in range(1, 7)]
    assert losses[-1] < losses[0] - 0.3
    state = half.export_state()
    assert {array.dtype.name for array in (*state.adapter.values(), *state.optimizer.values())} == {"float32"}
    assert {p.dtype for n, p in half.model.named_parameters() if "lora" not in n} == {getattr(torch, dtype)}


# --- memory


def test_out_of_memory_is_one_line_and_leaves_the_learner_usable(llama: Path) -> None:
    learner, undisturbed = (open_learner("cuda", llama) for _ in range(2))

    def too_much(*_: Any) -> None:
        torch.empty(2**50)

    hook = learner.model.model.layers[1].register_forward_hook(too_much)
    for fails in (
        lambda: learner.train_step(microbatches(), step=1, lr=LR),
        lambda: learner.evaluate(microbatches()),
    ):
        with pytest.raises(OutOfMemoryError) as caught:
            fails()
        assert "16 tokens" in caught.value.what
        assert "\n" not in caught.value.what
        assert caught.value.__context__ is None, "the failed step's tensors would stay alive"
    hook.remove()
    for each in (learner, undisturbed):
        each.train_step(microbatches(), step=1, lr=LR)
    assert_same_state(learner.export_state(), undisturbed.export_state())


def test_other_errors_pass_through(llama: Path) -> None:
    learner = open_learner("cuda", llama)
    out_of_range = make_batch()
    out_of_range.inputs[0, 0] = VOCAB_SIZE + 1
    with pytest.raises(IndexError):
        learner.evaluate([out_of_range])


# --- 4 bits


def test_nf4_layers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NF4 with double quantisation everywhere but in the output; never repacked for evaluation, as on AVX512-BF16."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    learner = open_learner("cuda", llama, model={"bits": 4})
    quantised = {n: m for n, m in learner.model.named_modules() if isinstance(m, modules.Linear4bit)}
    assert len(quantised) == 2 * 7
    for module in quantised.values():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, module.compute_dtype) == ("nf4", True, torch.float32)
        assert not module.support_avx512bf16_for_cpu
    assert isinstance(learner.model.lm_head, torch.nn.Linear)
    assert not isinstance(learner.model.lm_head, modules.Linear4bit)
    assert learner.description.startswith("NF4 4-bit weights, float32 compute, CPU")
    learner.evaluate(microbatches())
    assert float(learner.train_step(microbatches(), step=1, lr=LR).grad_norm) > 0.1


@pytest.mark.parametrize("paged", [False, True])
def test_eight_bit_state_crosses_raw(paged: bool) -> None:
    """bitsandbytes' optimiser runs on CPU tensors too (unpaged): the same code as on a GPU, bit for bit."""
    pytest.importorskip("bitsandbytes")
    from backends.cuda.optim import AdamW, AdamW8bit

    def parameters() -> dict[str, Any]:
        random = torch.Generator().manual_seed(0)
        shapes = {"large": (16, 300), "small": (8, 9)}
        return {n: torch.nn.Parameter(torch.randn(s, generator=random)) for n, s in shapes.items()}

    def step(optimizer: Any, number: int) -> None:
        random = torch.Generator().manual_seed(number)
        for parameter in optimizer.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step(1e-2)

    config = OptimConfig(name="adamw", state_bits=8, paged=paged)
    eight, exact = AdamW8bit(parameters(), config), AdamW(parameters(), config)
    fresh = AdamW8bit(parameters(), config)
    assert eight.export_slots() == {}
    for number in (1, 2, 3):
        step(eight, number)
        step(exact, number)
    state = eight.export_slots()
    assert state["state1/large"].dtype == state["state2/large"].dtype == np.uint8
    assert state["absmax1/large"].shape == (math.ceil(16 * 300 / 256),)
    assert state["state1/small"].dtype == np.float32
    fresh.import_slots(state, num_steps=3)
    for name, parameter in eight.parameters.items():
        fresh.parameters[name].data.copy_(parameter.data)
    again = fresh.export_slots()
    assert again.keys() == state.keys()
    for key in state:
        np.testing.assert_array_equal(again[key], state[key])
    for optimizer in (eight, fresh, exact):
        step(optimizer, 4)
    for name, parameter in eight.parameters.items():
        assert torch.equal(fresh.parameters[name], parameter)
        moved = (exact.parameters[name] - parameters()[name]).norm()
        assert (parameter - exact.parameters[name]).norm() < 0.1 * moved


# --- loading


def test_mlx_folder_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mlx-model"
    shutil.copytree(llama, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization"] = {"bits": 4, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="4-bit MLX weights"):
        open_learner("cuda", folder)


def test_pickled_weights_are_not_read(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(llama, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled"):
        open_learner("cuda", folder)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_the_model_runs_only_when_asked_for(
    llama: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    from transformers import AutoModelForCausalLM

    asked: dict[str, Any] = {}
    real = AutoModelForCausalLM.from_pretrained

    def spy(path: Any, **options: Any) -> Any:
        asked.update(options)
        return real(path, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    open_learner("cuda", llama, model={"trust_remote_code": trusted})
    assert asked["use_safetensors"] is True
    assert asked["local_files_only"] is True
    assert ("trust_remote_code" in asked) == trusted


def test_opening_is_quiet(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    open_learner("cuda", folders["mixtral"], train={"gradient_checkpointing": True})
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_check_warns_of_slow_types() -> None:
    for dtype in ("bfloat16", "float16"):
        assert f"model.dtype {dtype}" in CUDA.check(make_config(model={"dtype": dtype}))[0]


def _run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    heavy = ["torch", "transformers", "peft", "bitsandbytes", "mlx", "mlx_lm"]
    code = f"import sys, backends; backends.get('cuda').probe('cpu'); print([m for m in {heavy} if m in sys.modules])"
    assert _run_python(code).strip() == "[]"


def test_missing_packages_are_named() -> None:
    """With peft and bitsandbytes blocked: a probe that answers, and checks that say what to install."""
    code = """
import sys
sys.modules["peft"] = sys.modules["bitsandbytes"] = None
import backends
from core.config import RunConfig
from core.errors import UserError
backend = backends.get("cuda")
report = backend.probe()
print(report.available, report.problem, sorted(report.packages))
try:
    backend.check(RunConfig())
except UserError as error:
    print(error.what, error.hint)
print("torch" in sys.modules)
"""
    probe, check, imported = _run_python(code).splitlines()
    assert probe == "False not installed: peft; pip install peft ['torch', 'transformers']"
    assert check == "the cuda backend needs peft pip install peft"
    assert imported == "False"


# --- text


def test_a_window_forgets_what_it_has_passed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every few tokens, among rows of other lengths, some of which end: the text is the same, the cache is not."""
    from backends.cuda.generate import generate
    from backends.cuda.kv_cache import KeyValueCache

    learner = open_learner("cuda", folders["mistral"])
    prompts = [np.random.default_rng(i).integers(3, VOCAB_SIZE, n).tolist() for i, n in enumerate((2, 25, 7, 1))]
    expected = generate(learner, SimpleNamespace(eos_token_id=None), prompts, max_tokens=16)
    end = SimpleNamespace(eos_token_id=expected[1].ids[6])
    forgotten: list[int] = []
    forget = KeyValueCache.forget

    def watched(cache: KeyValueCache, count: int) -> None:
        forgotten.append(count)
        forget(cache, count)

    monkeypatch.setattr(KeyValueCache, "forget", watched)
    monkeypatch.setattr("backends.cuda.generate._PREFILL", 40)  # 10 tokens of each of 4 prompts
    monkeypatch.setattr("backends.cuda.generate.ROOM", 3)
    monkeypatch.setattr("backends.cuda.kv_cache.ROOM", 3)
    assert generate(learner, SimpleNamespace(eos_token_id=None), prompts, max_tokens=16) == expected
    # window 6: of 10 tokens 5 stay, of 15 and of 10 again; then each time that there are 9
    assert forgotten[:3] == [5, 10, 5]
    assert set(forgotten[3:]) == {4}
    found = generate(learner, end, prompts, max_tokens=16)
    assert [one.ids for one in found] == [
        one.ids[: one.ids.index(end.eos_token_id)] if end.eos_token_id in one.ids else one.ids for one in expected
    ]
    assert any(one.ended for one in found)


# --- what is computed


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_padding_and_a_shared_start_once(llama: Path, dropout: float) -> None:
    """Rows of 24, 17 and 20 tokens, 9 of them the same, in a batch 28 wide."""
    learner = open_learner("cuda", llama, lora={"dropout": dropout})
    seen: list[int] = []
    learner.model.model.layers[0].mlp.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0][..., 0].numel())
    )
    batch = with_filler(shared_batch((24, 17, 20), start=9, width=28))
    learner.evaluate([batch])
    learner.train_step([batch], step=1, lr=LR)
    every = 24 + 17 + 20
    assert seen == [every - 2 * 9] * 2


def test_a_layout_that_got_lost_is_noticed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the batch would be one long row, and the loss would look right."""
    learner = open_learner("cuda", llama)
    layer = learner.model.model.layers[1]
    forward = layer.forward

    def forgetful(*args: Any, layout: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    layer.forward = forgetful
    with pytest.raises(AssertionError, match="not told of the layout"):
        learner.evaluate([make_batch((12, 9))])


def test_foreign_code_gets_rows(llama: Path) -> None:
    """A model with modules of its own need not know what we hand on: it gets the batch as it is."""
    learner, plain = (open_learner("cuda", llama) for _ in range(2))
    batch = shared_batch((24, 17, 20))
    expected = plain.evaluate([batch]).nll
    attention = learner.model.model.layers[0].self_attn
    attention.__class__ = type("Own", (type(attention),), {"__module__": "transformers_modules.own"})
    assert not hands_on_layout(learner.model.model)
    learner._is_flat = False
    np.testing.assert_allclose(learner.evaluate([batch]).nll, expected, rtol=1e-6)
