"""`merge`: what it writes runs in the plain libraries, and says what base and adapter say."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import backends
from backends.mlx.blas import needs_blas, preload_blas
from core.adapter_files import write_adapter
from core.config import RunConfig, to_plain
from core.errors import UserError
from core.merging.gguf import find_converter
from core.models import resolve_model
from core.workflow import merge as merging
from core.workflow.after import find_trained, opened_run
from tests.cli.conftest import Result, filled_adapter
from tests.core.tiny_gguf import write_tiny_gguf
from tests.tiny import make_model

Run = Callable[..., Result]
PROMPTS = ("Say red 1.", "Hello, who is there?", "x")
LENGTH = 12


def make_run(folder: Path, model: Path, rows: Path, *, backend: str = "cuda", bits: int = 16, **lora: Any) -> Path:
    """A run folder as training leaves it, as far as `merge` reads it."""
    config = RunConfig.model_validate(
        {
            "backend": backend,
            "device": "cpu",
            "model": {"path": str(model), "bits": bits},
            "data": {"path": str(rows), "max_tokens": 96},
        }
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
    write_adapter(folder / "adapters", filled_adapter(model, **lora), base_model=str(model))
    return folder


@pytest.fixture
def trained(tmp_path: Path, model: Path, rows: Path) -> Path:
    return make_run(tmp_path / "run", model, rows, targets="all-linear")


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge_report.json").read_text())
    return found


def prompt_ids(model: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


def greedy_in_transformers(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for ids in prompts:
        out = module.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=LENGTH, do_sample=False
        )
        found.append(without_end(out[0, len(ids) :].tolist()))
    return found


def greedy_in_mlx_lm(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    pytest.importorskip("mlx_lm")
    if needs_blas():
        preload_blas()
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    module, _ = load(str(folder))
    return [
        without_end([int(token) for token, _ in generate_step(mx.array(ids), module, max_tokens=LENGTH)])
        for ids in prompts
    ]


def without_end(ids: list[int]) -> list[int]:
    """Up to the end token, which is 2 in the tiny models; peers go on after it, or stop."""
    return ids[: ids.index(2)] if 2 in ids else ids


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral"])
def test_the_same_text_in_each_library(model_type: str, tmp_path: Path, run_cli: Run, rows: Path) -> None:
    """Merged and loaded by transformers and by mlx-lm, without our code: what base and adapter say here, greedily."""
    base = make_model(tmp_path / "base", model_type=model_type, new_rope_style=True, rope_theta=50000.0, scale=0.2)
    more = ["gate", "gate_proj", "up_proj", "down_proj"] if model_type == "mixtral" else []
    run = make_run(tmp_path / "run", base, rows, targets=["q_proj", "v_proj", "o_proj", *more])
    result = run_cli("merge", run, "--max-shard-gb", 0.0001)
    assert result.code == 0, result.err
    merged, prompts = run / "merged", prompt_ids(base)
    assert len(list(merged.glob("*.safetensors"))) > 1
    with opened_run(find_trained(run)) as opened:
        ours = [
            found.ids
            for found in backends.generate("cuda", opened.use("adapter"), opened.tokenizer, prompts, max_tokens=LENGTH)
        ]
        plain = backends.generate("cuda", opened.use("base"), opened.tokenizer, prompts, max_tokens=LENGTH)
    assert greedy_in_transformers(merged, prompts) == ours
    assert greedy_in_mlx_lm(merged, prompts) == ours
    assert ours != [found.ids for found in plain]


@pytest.mark.parametrize("backend", ["cuda", "mlx"])
def test_the_check(backend: str, trained: Path, run_cli: Run, model: Path) -> None:
    result = run_cli("merge", trained, "--backend", backend, "--output", "out")
    assert result.code == 0, result.err
    check = report_of(Path("out"))["check"]
    assert abs(check["difference"]) < 1e-5 and check["max_row_difference"] < 1e-5
    assert abs(check["adapter_loss"] - check["base_loss"]) > 1e-3
    assert check["same_token"] == 1.0 and check["rows"] == "validation rows" and check["num_rows"] > 1
    for value in (check["base_loss"], check["adapter_loss"]):
        assert f"{value:.4f}" in result.out
    assert "AutoModelForCausalLM" in result.out and "push" in result.out and "vllm" in result.out
    assert report_of(Path("out"))["changed_tensors"] == 14
    assert not [name for name in os.listdir() if "partial" in name]
    assert load_file("out/model.safetensors").keys() == load_file(model / "model.safetensors").keys()


def test_rounding_shows_in_the_check(trained: Path, run_cli: Run) -> None:
    """bfloat16 keeps 8 bits: the losses differ, and the warning names the way to see that it is rounding."""
    result = run_cli("merge", trained, "--dtype", "bfloat16")
    assert result.code == 0, result.err
    report = report_of(trained / "merged")
    assert report["dtype"] == "bfloat16"
    assert report["check"]["max_row_difference"] > 1e-5
    assert ("--dtype float32" in result.out) == (abs(report["check"]["difference"]) > 1e-3)
    assert json.loads((trained / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_run_on_a_4bit_base(tmp_path: Path, run_cli: Run, model: Path, rows: Path) -> None:
    """Merged into the 16-bit weights; the loss with the adapter is that on 4 bits, and the screen says so."""
    pytest.importorskip("bitsandbytes")
    run = make_run(tmp_path / "run", model, rows, bits=4)
    result = run_cli("merge", run)
    assert result.code == 0, result.err
    check = report_of(run / "merged")["check"]
    assert check["base_bits"] == 4 and "(in 4 bits)" in result.out
    assert abs(check["difference"]) > 1e-6
    exact = run_cli("merge", make_run(tmp_path / "other", model, rows, bits=16))
    assert exact.code == 0
    sixteen = report_of(tmp_path / "other" / "merged")["check"]
    assert check["merged_loss"] == pytest.approx(sixteen["merged_loss"], abs=1e-6)


def test_without_the_data_the_sample_checks(trained: Path, run_cli: Run) -> None:
    config = yaml.safe_load((trained / "config.yaml").read_text())
    config["data"]["path"] = "gone.jsonl"
    (trained / "config.yaml").write_text(yaml.safe_dump(config))
    result = run_cli("merge", trained)
    assert result.code == 0, result.err
    assert "gone.jsonl" in result.out and "shipped sample" in result.out
    assert report_of(trained / "merged")["check"]["rows"] == "rows of the shipped sample"


def test_without_any_rows_it_is_merged_unchecked(tmp_path: Path, run_cli: Run, rows: Path) -> None:
    """A template that refuses each row, the sample's too: that is no reason to throw the merged model away."""
    base = make_model(tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('no rows today') }}"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    run = make_run(tmp_path / "run", base, rows)
    result = run_cli("merge", run)
    assert result.code == 0, result.err
    assert "was not checked: no rows to check it on" in result.out
    assert report_of(run / "merged")["check"] is None
    assert (run / "merged" / "model.safetensors").is_file()


def test_a_model_that_does_not_fit_is_merged_unchecked(
    trained: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_free_memory", lambda run: 1e8)
    result = run_cli("merge", trained)
    assert result.code == 0, result.err
    assert "was not checked: it needs" in result.out and "100 MB are free" in result.out
    assert report_of(trained / "merged")["check"] is None
    assert (trained / "merged" / "model.safetensors").is_file()


def test_no_check(trained: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "opened_run", None)  # no model is loaded
    result = run_cli("merge", trained, "--no-check")
    assert result.code == 0 and "loss of" not in result.out
    assert report_of(trained / "merged")["check"] is None


# --- four bits --------------------------------------------------------------------------------------------------------


def test_four_bits_for_mlx(trained: Path, run_cli: Run, model: Path, rows: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    result = run_cli("merge", trained, "--quantize", 4, "--backend", "mlx")
    assert result.code == 0, result.err
    folder = trained / "merged-4bit"
    assert json.loads((folder / "config.json").read_text())["quantization"] == {
        "bits": 4,
        "group_size": 64,
        "mode": "affine",
    }
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "tokenizer_config.json", "merge_report.json"}
    assert not [path.name for path in folder.iterdir() if path.is_dir() or path.suffix == ".md"]
    module, _ = mlx_lm.load(str(folder))
    assert type(module.model.layers[0].self_attn.q_proj).__name__ == "QuantizedLinear"
    check = report_of(folder)["check"]
    assert 0 < abs(check["quantised_loss"] - check["merged_loss"]) < 1.0
    assert f"{check['quantised_loss']:.4f}" in result.out
    assert f"python cli.py train --backend mlx --model {folder}" in result.out
    # and training goes on from it
    trains = run_cli(
        *("train", "--model", folder, "--data", rows, "--backend", "mlx", "--device", "cpu", "--bits", 4),
        *("--max-steps", 1, "--batch-size", 2, "--accumulation", 1, "--max-tokens", 96, "--output", "more"),
    )
    assert trains.code == 0, trains.err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bits_for_pytorch(dtype: str, trained: Path, run_cli: Run, rows: Path) -> None:
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    result = run_cli("merge", trained, "--quantize", 4, "--dtype", dtype, "--output", "nf4")
    assert result.code == 0, result.err
    module = transformers.AutoModelForCausalLM.from_pretrained("nf4")
    weight = module.model.layers[0].self_attn.q_proj.weight
    assert (type(weight).__name__, weight.quant_state.quant_type, weight.quant_state.nested) == (
        "Params4bit",
        "nf4",
        True,
    )
    check = report_of(Path("nf4"))["check"]
    assert 0 < abs(check["quantised_loss"] - check["merged_loss"]) < 1.0
    assert "mlx_lm" not in result.out and "AutoModel" in result.out
    assert "python cli.py train --backend cuda --model nf4" in result.out
    assert os.stat("nf4/model.safetensors").st_mode == os.stat("nf4/config.json").st_mode
    # and training goes on from it, in float32 as the CPU computes, whatever the folder's own type
    trains = run_cli(
        *("train", "--model", "nf4", "--data", rows, "--backend", "cuda", "--device", "cpu", "--bits", 4),
        *("--max-steps", 1, "--batch-size", 2, "--accumulation", 1, "--max-tokens", 96, "--output", "more"),
    )
    assert trains.code == 0, trains.err


def test_four_bits_of_a_mixture(tmp_path: Path, run_cli: Run, rows: Path) -> None:
    base = make_model(tmp_path / "base", model_type="mixtral", hidden_size=64)
    run = make_run(tmp_path / "run", base, rows, targets=["q_proj", "gate_proj", "up_proj", "down_proj"])
    refused = run_cli("merge", run, "--quantize", 4, "--output", "nf4")
    assert refused.code == 2 and "a mixture's experts" in refused.err and "--backend mlx" in refused.err
    assert not Path("nf4").exists()
    mlx_lm = pytest.importorskip("mlx_lm")
    result = run_cli("merge", run, "--quantize", 4, "--backend", "mlx", "--output", "four")
    assert result.code == 0, result.err
    module, _ = mlx_lm.load("four")
    assert type(module.model.layers[1].block_sparse_moe.switch_mlp.up_proj).__name__ == "QuantizedSwitchLinear"


# --- GGUF -------------------------------------------------------------------------------------------------------------


def has_converter() -> bool:
    try:
        find_converter()
    except UserError:
        return False
    return True


def give_llama_tokenizer(folder: Path) -> None:
    """A byte-fallback BPE, as Llama 2 has it: one of those that llama.cpp reads without knowing it by name."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocab = {word: index for index, word in enumerate(words)}
    vocab |= {f"<filler{index}>": index for index in range(len(vocab), 320)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.skipif(not has_converter(), reason="llama.cpp's converter is not here")
def test_gguf_by_the_real_converter(tmp_path: Path, run_cli: Run, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture: fused experts, permuted q and k, the router; each held against the merged tensor in other words."""
    gguf = pytest.importorskip("gguf")
    base = make_model(tmp_path / "base", model_type="mixtral")
    give_llama_tokenizer(base)
    monkeypatch.setattr(merging.merge_gguf, "check_convertible", lambda converter, base: None)  # as long once more
    run = make_run(tmp_path / "run", base, rows, targets=["q_proj", "gate", "gate_proj", "up_proj", "down_proj"])
    result = run_cli("merge", run, "--gguf", "f32", "--no-check", "--output", "out")
    assert result.code == 0, result.err
    assert "llama-cli -m out/run-f32.gguf" in result.out
    reader = gguf.GGUFReader("out/run-f32.gguf")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    merged = load_file("out/model.safetensors")
    moe = "model.layers.1.block_sparse_moe"
    for name, part in (("ffn_gate_exps", "w1"), ("ffn_up_exps", "w3"), ("ffn_down_exps", "w2")):
        experts = np.stack([merged[f"{moe}.experts.{expert}.{part}.weight"] for expert in range(4)])
        assert np.array_equal(found[f"blk.1.{name}.weight"], experts)
    assert np.array_equal(found["blk.1.ffn_gate_inp.weight"], merged[f"{moe}.gate.weight"])
    query = merged["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(found["blk.0.attn_q.weight"][1], query[8])  # of a head of 16, the second half's first row
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert reader.fields["tokenizer.chat_template"].contents().startswith("{% for m in")
    assert report_of(Path("out"))["gguf"] == {"file": "run-f32.gguf", "type": "F32"}


def test_gguf_that_can_not_be_leaves_nothing(trained: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for converter, message in (
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized')", "not recognized"),
        (None, "LLAMA_CPP"),
    ):
        script = Path("convert_hf_to_gguf.py")
        script.unlink(missing_ok=True)
        if converter:
            script.write_text(converter)
        monkeypatch.setenv("LLAMA_CPP", str(script.resolve()))
        result = run_cli("merge", trained, "--gguf", "--output", "out")
        assert result.code == 2 and message in result.err, result.err
        assert not Path("out").exists() and not Path(".out.partial").exists()


def test_a_gguf_that_is_wrong_is_left_out(trained: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged folder is whole without it, and the screen says that it has none."""
    pytest.importorskip("gguf")
    write_tiny_gguf(Path("other.gguf"))
    copies = f"shutil.copy({str(Path('other.gguf').resolve())!r}, outfile)"
    body = "import shutil, sys; outfile = sys.argv[sys.argv.index('--outfile') + 1]\n"
    for output, conversion, problem in (
        ("compared", copies, "read back, it has 266 tokens, not 320"),
        (
            "failed",
            "open(outfile, 'w').write('half'); sys.exit('no disk') if 'vocab' not in outfile else None",
            "no disk",
        ),
    ):
        Path("convert_hf_to_gguf.py").write_text(body + conversion)
        monkeypatch.setenv("LLAMA_CPP", str(Path("convert_hf_to_gguf.py").resolve()))
        result = run_cli("merge", trained, "--gguf", "--no-check", "--output", output)
        assert result.code == 2 and problem in result.err, result.err
        assert f"{output} holds the merged model, without a GGUF file" in result.err
        assert "llama-cli" not in result.out and "AutoModelForCausalLM" in result.out
        assert not list(Path(output).glob("*.gguf"))
        assert report_of(Path(output))["gguf"] is None
        assert load_file(f"{output}/model.safetensors")


def test_a_gguf_type_that_is_none(trained: Path, run_cli: Run) -> None:
    wrong = run_cli("merge", trained, "--gguf", "q4_k_m")
    assert wrong.code == 2 and "no such type" in wrong.err and "q8_0" in wrong.err


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_quantised_base(tmp_path: Path, run_cli: Run, model: Path, rows: Path) -> None:
    run = make_run(tmp_path / "run", model, rows, backend="mlx")
    quantised = make_model(tmp_path / "quantised")
    raw = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(raw | {"quantization": {"bits": 4, "group_size": 64}}))
    result = run_cli("merge", run, "--model", quantised)
    assert result.code == 2 and "its weights are quantised (MLX, 4-bit)" in result.err and "--model" in result.err
    original = run_cli("merge", run, "--model", model, "--no-check")
    assert original.code == 0, original.err


def test_a_folder_that_is_there(trained: Path, run_cli: Run) -> None:
    Path("out").mkdir()
    Path("out/notes").write_text("mine")
    result = run_cli("merge", trained, "--output", "out")
    assert result.code == 2 and "out: exists already" in result.err and "--output" in result.err
    assert os.listdir("out") == ["notes"]


def test_a_full_disk(trained: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1))
    result = run_cli("merge", trained)
    assert result.code == 2 and "on the disk" in result.err
    assert not (trained / "merged").exists()


def test_ctrl_c_leaves_nothing(trained: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = merging.write_merged

    def stop(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "write_merged", stop)
    before = sorted(os.listdir(trained))
    assert run_cli("merge", trained).code == 130
    assert sorted(os.listdir(trained)) == before


def test_an_adapter_that_rounding_takes_away(tmp_path: Path, run_cli: Run, model: Path, rows: Path) -> None:
    """Updates below float16's last place: the merged model would be the base model, and that is an error."""
    run = make_run(tmp_path / "run", model, rows)
    adapter = filled_adapter(model)
    tiny = adapter.with_tensors({name: tensor * np.float32(3e-4) for name, tensor in adapter.tensors.items()})
    write_adapter(run / "adapters", tiny, base_model=str(model))
    base = tmp_path / "half"
    assert run_cli("merge", run, "--dtype", "float16", "--no-check", "--output", base).code == 0
    result = run_cli("merge", run, "--model", base)
    assert result.code == 2, result.out
    assert "says the same as the base model" in result.err and "float32" in result.err
    assert not (run / "merged").exists()


def test_no_adapter_yet(tmp_path: Path, run_cli: Run, model: Path, rows: Path) -> None:
    run = make_run(tmp_path / "run", model, rows)
    (run / "adapters" / "adapter_model.safetensors").unlink()
    result = run_cli("merge", run)
    assert result.code == 2 and "no adapter yet" in result.err


def test_a_narrow_terminal(trained: Path, model: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    monkeypatch.chdir(trained.parent)
    result = run_cli("merge", "run")
    lines = result.out.replace(str(model), "tiny").splitlines()  # a path of any length is never broken
    lines = [line for line in lines if str(trained.parent) not in line and "transformers" not in line]
    assert lines and max(map(len, lines)) <= 80, lines


def test_it_resolves_as_any_model(trained: Path, run_cli: Run) -> None:
    assert run_cli("merge", trained, "--no-check").code == 0
    found = resolve_model(
        str(trained / "merged"), revision=None, backend="cuda", bits=16, memory_bytes=0, accelerator=False
    )
    assert found.parameters == sum(
        tensor.size for tensor in load_file(trained / "merged" / "model.safetensors").values()
    )
