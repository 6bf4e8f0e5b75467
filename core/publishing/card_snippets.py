"""How to load what was published: the part of a model card that is copied into a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Weights = Literal["adapter", "16-bit", "mlx-4bit", "nf4"]
"""What is published: the adapter alone, or a merged model in one of its forms."""


@dataclass(frozen=True, slots=True)
class Published:
    """Where it lies, and what it needs."""

    repo: str
    weights: Weights
    base: str
    """Hub id of the base model, or the name of its folder."""
    is_base_public: bool
    """Whether `base` is a hub id."""
    is_mlx_base: bool
    """Whether only MLX can read the base model."""
    has_chat_template: bool
    has_gguf: bool = False

    @property
    def folder(self) -> str:
        """Name of the folder that the examples download to."""
        return self.repo.rpartition("/")[2]


def loading_lines(published: Published) -> Iterator[str]:
    """Markdown lines, one section for each library that can load it."""
    if published.weights == "adapter":
        yield from _adapter_lines(published)
    else:
        yield from _merged_lines(published)


def _adapter_lines(published: Published) -> Iterator[str]:
    repo, base, folder = published.repo, published.base, published.folder
    if not published.is_base_public:
        yield f"`{base}` below stands for the base model, which is not on the Hub.\n"
    if not published.is_mlx_base:
        yield "**PEFT and transformers**\n"
        yield from _block("python", _peft(repo, base, published.has_chat_template))
    yield "**mlx-lm** (Apple silicon, or Linux with `mlx[cpu]`)\n"
    yield from _block(
        "bash",
        f'hf download {repo} --local-dir {folder}\nmlx_lm.generate --model {base} --adapter-path {folder} --prompt "…"',
    )
    yield "**Twinkeel**: train on from it, on either backend, and ask the new model\n"
    model = "" if published.is_base_public else f" --model {base}"
    yield from _block(
        "bash",
        f"hf download {repo} --local-dir {folder}\n"
        f"python cli.py train --init-adapter {folder}{model} --data ROWS.jsonl\n"
        'python cli.py generate --prompt "…"',
    )


def _merged_lines(published: Published) -> Iterator[str]:
    repo, weights = published.repo, published.weights
    if weights in ("16-bit", "nf4"):
        yield f"**transformers**{' (needs bitsandbytes)' if weights == 'nf4' else ''}\n"
        yield from _block("python", _transformers(repo, published.has_chat_template))
    if weights in ("16-bit", "mlx-4bit"):
        yield "**mlx-lm** (Apple silicon, or Linux with `mlx[cpu]`)\n"
        yield from _block("bash", f'mlx_lm.generate --model {repo} --prompt "…"')
    if weights == "16-bit":
        yield "**vLLM**\n"
        yield from _block("bash", f"vllm serve {repo}")
    if published.has_gguf:
        yield "**llama.cpp**\n"
        yield from _block("bash", f"llama-cli -hf {repo}")
    yield "**Twinkeel**: train a new adapter on it\n"
    backend = {"mlx-4bit": " --backend mlx", "nf4": " --backend cuda"}.get(weights, "")
    yield from _block("bash", f"python cli.py train{backend} --model {repo} --data ROWS.jsonl")


def _peft(repo: str, base: str, has_chat_template: bool) -> str:
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = "{base}"\n'
        "tokenizer = AutoTokenizer.from_pretrained(base)\n"
        'model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")\n'
        f'model = PeftModel.from_pretrained(model, "{repo}")\n\n' + _ask(has_chat_template)
    )


def _transformers(repo: str, has_chat_template: bool) -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")\n\n' + _ask(has_chat_template)
    )


def _ask(has_chat_template: bool) -> str:
    if has_chat_template:
        question = (
            'messages = [{"role": "user", "content": "…"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
            ")\n"
        )
    else:
        question = 'inputs = tokenizer("…", return_tensors="pt")\n'
    return (
        question + "output = model.generate(**inputs, max_new_tokens=128)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    )


def _block(language: str, text: str) -> Iterator[str]:
    yield f"```{language}"
    yield text
    yield "```\n"
