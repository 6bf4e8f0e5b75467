"""The arithmetic of a merge, and the files it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from core.adapter import Adapter, LoraModule
from core.adapter_files import write_adapter
from core.architecture import read_architecture
from core.errors import UserError
from core.merging import merge as merging
from core.merging.merge import MergePlan, plan_merge, write_merged
from core.merging.stored_weights import from_float32, to_float32
from tests.cli.conftest import filled_adapter
from tests.tiny import make_model

Q = "model.layers.0.self_attn.q_proj"
ROUTED = ["q_proj", "gate", "gate_proj", "up_proj", "down_proj"]


def plan(folder: Path, adapter: Adapter, *, dtype: str = "auto", shard: int = 10**9) -> MergePlan:
    return plan_merge(folder, adapter, read_architecture(folder), dtype=dtype, max_shard_bytes=shard, name="base")


def merged(folder: Path, adapter: Adapter, output: Path, **options: Any) -> dict[str, np.ndarray]:
    """The merged tensors, from all shards."""
    output.mkdir()
    write_merged(output, plan(folder, adapter, **options))
    return {name: tensor for path in sorted(output.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def one_module(a: list[list[float]], b: list[list[float]], *, alpha: float, rslora: bool = False) -> Adapter:
    tensors = {f"{Q}.lora_A": np.array(a, np.float32), f"{Q}.lora_B": np.array(b, np.float32)}
    return Adapter({Q: LoraModule(len(a), alpha)}, tensors, num_layers=1, rslora=rslora)


@pytest.fixture
def two_by_two(tmp_path: Path) -> Path:
    """A model whose q is [[1, 2], [3, 4]]."""
    folder = make_model(tmp_path / "small", num_layers=1, hidden_size=2, num_heads=1, num_kv_heads=1)
    weights = load_file(folder / "model.safetensors")
    weights[f"{Q}.weight"] = np.array([[1, 2], [3, 4]], np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_by_hand(two_by_two: Path, tmp_path: Path) -> None:
    """B A = [[1], [2]] [[10, 20]] = [[10, 20], [20, 40]]; alpha 3 at rank 1 takes it three times."""
    found = merged(two_by_two, one_module([[10, 20]], [[1], [2]], alpha=3), tmp_path / "out")
    assert found[f"{Q}.weight"].tolist() == [[31, 62], [63, 124]]


def test_by_hand_with_rank_and_rslora(two_by_two: Path, tmp_path: Path) -> None:
    """Rank 4, alpha 8: twice B A; with rsLoRA 8 / sqrt(4) = four times. Of B A the first row is [5, 0] + 2 * [0, 1]."""
    a, b = [[5, 0], [0, 1], [0, 0], [0, 0]], [[1, 2, 9, 9], [0, 0, 9, 9]]
    plain = merged(two_by_two, one_module(a, b, alpha=8), tmp_path / "plain")
    assert plain[f"{Q}.weight"].tolist() == [[1 + 2 * 5, 2 + 2 * 2], [3, 4]]
    stable = merged(two_by_two, one_module(a, b, alpha=8, rslora=True), tmp_path / "stable")
    assert stable[f"{Q}.weight"].tolist() == [[1 + 4 * 5, 2 + 4 * 2], [3, 4]]


def test_rounds_once_to_the_base_type(two_by_two: Path, tmp_path: Path) -> None:
    """bfloat16 has steps of 2^-7 above 1: 1 + 3/512 rounds to 1 + 4/512, though each third of it alone would vanish."""
    weights = {
        name: from_float32(tensor, "BF16") for name, tensor in load_file(two_by_two / "model.safetensors").items()
    }
    write_as(two_by_two / "model.safetensors", weights, "BF16")
    adapter = one_module([[1 / 512, 0]] * 3, [[1, 1, 1], [0, 0, 0]], alpha=3)
    output = tmp_path / "out"
    output.mkdir()
    write_merged(output, plan(two_by_two, adapter))
    with open(output / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    entry = header[f"{Q}.weight"]
    assert entry["dtype"] == "BF16"
    begin, end = entry["data_offsets"]
    assert to_float32(data[begin:end], "BF16").tolist() == [1 + 4 / 512, 2, 3, 4]
    assert header["__metadata__"] == {"format": "pt"}


def write_as(path: Path, weights: dict[str, np.ndarray], dtype: str) -> None:
    """A safetensors file of a type that NumPy lacks."""
    entries, data = {}, b""
    for name, values in weights.items():
        entries[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + values.nbytes],
        }
        data += values.tobytes()
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_equals_peft(model_type: str, tmp_path: Path) -> None:
    """PEFT's merge_and_unload, dense, experts and router, with ranks of 4 and rsLoRA."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = make_model(tmp_path / "base", model_type=model_type, tied=model_type == "llama")
    targets = "all-linear" if model_type == "llama" else ROUTED
    adapter = filled_adapter(base, targets=targets, rslora=model_type == "llama")
    write_adapter(tmp_path / "adapter", adapter, base_model=str(base), forms=("peft",))
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = peft.PeftModel.from_pretrained(load(base, dtype="float32"), tmp_path / "adapter").merge_and_unload()
    model.save_pretrained(tmp_path / "peft")
    expected = load_file(tmp_path / "peft" / "model.safetensors")
    found = merged(base, adapter, tmp_path / "out")
    assert found.keys() == expected.keys()
    before = load_file(base / "model.safetensors")
    for name, tensor in found.items():
        assert np.allclose(tensor, expected[name], rtol=1e-6, atol=1e-6), name
    changed = [name for name in found if not np.array_equal(found[name], before[name])]
    # 7 linear layers in each of 2 layers; q, router and 3 matrices of 4 experts
    assert len(changed) == (14 if model_type == "llama" else 2 * (1 + 1 + 12))


def test_what_has_no_adapter_is_the_same_to_the_bit(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.extra.table"] = np.arange(7, dtype=np.int64)
    weights["model.norm.weight"][0] = np.float32(np.nan)  # whatever it is
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    found = merged(base, filled_adapter(base, targets="attention", frozen_fraction=0.5), tmp_path / "out")
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        is_adapted = "layers.1.self_attn" in name
        assert (tensor.tobytes() == weights[name].tobytes()) != is_adapted, name


@pytest.mark.parametrize("block", [1, 64 * 3, 64 * 50])
def test_blocks_do_not_show(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one, of three, and ends of modules within a fused tensor."""
    base = fused_mixtral(make_model(tmp_path / "base", model_type="mixtral"))
    adapter = filled_adapter(base, targets=ROUTED)
    whole = merged(base, adapter, tmp_path / "whole")
    monkeypatch.setattr(merging, "BLOCK_VALUES", block)
    parts = merged(base, adapter, tmp_path / "parts")
    for name, tensor in whole.items():
        assert np.allclose(parts[name], tensor, rtol=1e-6, atol=1e-7), name


def fused_mixtral(folder: Path) -> Path:
    """The same Mixtral with experts as transformers 5 keeps them: gate above up, one tensor for all experts."""
    weights = load_file(folder / "model.safetensors")
    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        weights[f"{new}.gate.weight"] = weights.pop(f"{old}.gate.weight")
        parts = {
            part: np.stack([weights.pop(f"{old}.experts.{expert}.{part}.weight") for expert in range(4)])
            for part in ("w1", "w2", "w3")
        }
        weights[f"{new}.experts.gate_up_proj"] = np.concatenate([parts["w1"], parts["w3"]], axis=1)
        weights[f"{new}.experts.down_proj"] = parts["w2"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_fused_and_stacked_experts_are_the_same_experts(tmp_path: Path) -> None:
    single = make_model(tmp_path / "single", model_type="mixtral")
    fused = fused_mixtral(make_model(tmp_path / "fused", model_type="mixtral"))
    adapter = filled_adapter(single, targets=ROUTED)
    one_by_one = merged(single, adapter, tmp_path / "a")
    together = merged(fused, adapter, tmp_path / "b")
    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        assert np.array_equal(together[f"{new}.gate.weight"], one_by_one[f"{old}.gate.weight"])
        for expert in range(4):
            w1, w2, w3 = (one_by_one[f"{old}.experts.{expert}.{part}.weight"] for part in ("w1", "w2", "w3"))
            assert np.allclose(together[f"{new}.experts.gate_up_proj"][expert], np.concatenate([w1, w3]), atol=1e-7)
            assert np.allclose(together[f"{new}.experts.down_proj"][expert], w2, atol=1e-7)


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_other_types(dtype: str, stored: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = filled_adapter(base)
    exact = merged(base, adapter, tmp_path / "exact")
    (tmp_path / "out").mkdir()
    job = plan(base, adapter, dtype=dtype)
    assert job.dtype == dtype
    write_merged(tmp_path / "out", job)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        for name in exact:
            tensor = file.get_tensor(name)
            assert str(tensor.dtype) == f"torch.{dtype}"
            rounded = to_float32(from_float32(exact[name], stored).tobytes(), stored).reshape(exact[name].shape)
            assert np.array_equal(tensor.float().numpy(), rounded), name


def test_shards(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = filled_adapter(base)
    whole = merged(base, adapter, tmp_path / "whole")
    parts = merged(base, adapter, tmp_path / "parts", shard=50_000)
    assert parts.keys() == whole.keys()
    assert all(np.array_equal(parts[name], tensor) for name, tensor in whole.items())
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for file in files:
        held = load_file(tmp_path / "parts" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == held.keys()
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 50_000
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()


def test_a_base_in_shards_is_read(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = filled_adapter(base)
    whole = merged(base, adapter, tmp_path / "whole")
    merged(base, one_module([[0.0] * 64], [[0.0]] * 64, alpha=1), tmp_path / "sharded", shard=50_000)  # adds nothing
    (tmp_path / "sharded" / "config.json").write_text((base / "config.json").read_text())
    again = merged(tmp_path / "sharded", adapter, tmp_path / "again")
    assert all(np.array_equal(again[name], tensor) for name, tensor in whole.items())


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_too_large_for_float16(two_by_two: Path, tmp_path: Path) -> None:
    adapter = one_module([[1e6, 0]], [[1], [0]], alpha=1)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        UserError, match=r"q_proj.weight: a merged weight of 1e\+06 does not fit into float16"
    ) as caught:
        write_merged(tmp_path / "out", plan(two_by_two, adapter, dtype="float16"))
    assert caught.value.hint == "merge with --dtype bfloat16"


def test_a_base_that_lacks_a_module(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", model_type="mixtral")
    adapter = filled_adapter(base, targets=["down_proj"])
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(weights, base / "model.safetensors")
    with pytest.raises(UserError, match=r"no weight for model.layers.1.mlp.experts.down_proj of expert 2"):
        plan(base, adapter)


def test_a_base_of_another_shape(tmp_path: Path) -> None:
    adapter = filled_adapter(make_model(tmp_path / "wide"))
    with pytest.raises(UserError, match=r"proj.weight has shape \[\d+, 32\], the adapter's update \[\d+, 64\]"):
        plan(make_model(tmp_path / "narrow", hidden_size=32), adapter)


def test_a_quantised_tensor(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights[f"{Q}.weight"] = weights[f"{Q}.weight"].astype(np.uint8)
    save_file(weights, base / "model.safetensors")
    with pytest.raises(UserError, match=r"q_proj\.weight is U8"):
        plan(base, filled_adapter(make_model(tmp_path / "good")))


def test_a_head_that_is_shared(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tied=True)
    tensors = {"lm_head.lora_A": np.ones((1, 64), np.float32), "lm_head.lora_B": np.ones((320, 1), np.float32)}
    adapter = Adapter({"lm_head": LoraModule(1, 1.0)}, tensors, num_layers=2)
    with pytest.raises(UserError, match="lm_head, which this model shares with its embeddings"):
        plan(base, adapter)
    found = merged(make_model(tmp_path / "untied"), adapter, tmp_path / "out")
    before = load_file(tmp_path / "untied" / "model.safetensors")["lm_head.weight"]
    assert np.allclose(found["lm_head.weight"], before + 1)


# --- memory -----------------------------------------------------------------------------------------------------------

_LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from core.adapter import Adapter, LoraModule
from core.adapter_files import find_adapter
from core.architecture import read_architecture
from core.merging.merge import plan_merge, write_merged
import safetensors.numpy

base, adapter_folder, output, limit = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
architecture = read_architecture(base)
np.ones((64, 64), np.float32) @ np.ones((64, 64), np.float32)  # the BLAS makes its buffers
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + limit, in_use + limit))
try:
    np.empty(sum(path.stat().st_size for path in base.glob("*.safetensors")), np.uint8)
    sys.exit("the limit does not bind")
except MemoryError:
    pass
adapter = find_adapter(adapter_folder).read(architecture)
plan = plan_merge(base, adapter, architecture, dtype="auto", max_shard_bytes=80_000_000, name="base")
write_merged(output, plan)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, as Linux counts it")
def test_a_model_larger_than_the_memory(tmp_path: Path) -> None:
    """208 MB of bfloat16 weights in 100 MB beside the interpreter. They are zero, holes in a file, so W' is B A."""
    base = make_model(tmp_path / "shape", num_layers=1, hidden_size=64, intermediate_size=96)
    raw = json.loads((base / "config.json").read_text())
    raw |= {"num_hidden_layers": 2, "hidden_size": 2048, "intermediate_size": 6400, "head_dim": 512}
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(raw))
    architecture = read_architecture(large)
    shapes = {
        f"model.layers.{layer}.{key}.weight": shape
        for layer in range(2)
        for key, shape in architecture.module_shapes().items()
    }
    size = write_zeros(large, shapes)
    assert size > 200_000_000
    adapter = filled_adapter(large, rank=2, targets="all-linear")
    write_adapter(tmp_path / "adapter", adapter, base_model="large")
    output = tmp_path / "out"
    output.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, large, tmp_path / "adapter", output, str(100_000_000)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sum(path.stat().st_size for path in output.glob("*.safetensors")) > size
    name = "model.layers.1.mlp.down_proj"
    a, b = adapter.matrices(name)
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(output / index[f"{name}.weight"], framework="pt") as file:
        found = file.get_slice(f"{name}.weight")[2000:].float().numpy()
    expected = from_float32((b[2000:] @ a) * np.float32(adapter.scale_of(name)), "BF16")
    assert np.allclose(found, to_float32(expected.tobytes(), "BF16").reshape(found.shape), rtol=2**-7)


def write_zeros(folder: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A bfloat16 file of zeros that takes no room on the disk; returns its size."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * shape[1]
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end
