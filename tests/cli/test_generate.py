"""`generate`: one prompt on the screen, many in a file, and what can't be answered."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import backends
import cli
from core.errors import OutOfMemoryError, UserError
from core.sampling import Continuation
from tests.backends.conftest import missing_package
from tests.cli.conftest import Result
from tests.tiny import make_model

Run = Callable[..., Result]
ONE_STEP = ("--max-steps", 1, "--eval-every", 1)
PROMPTS = ("Say red 0.", "Say a colour that is neither red nor blue. Please.", "Say 海 1.", "Say blue 1.", "Hi")


def trained_run(folder: Path, model: Path, rows: Path, *arguments: object) -> Path:
    """A run that has learned something."""
    code = cli.main(
        [
            *("train", "--model", str(model), "--data", str(rows), "--bits", "16", "--device", "cpu"),
            *("--backend", "cuda", "--output", str(folder / "run"), "--batch-size", "4", "--accumulation", "1"),
            *("--max-steps", "6", "--eval-every", "3", "--lr", "0.02", "--max-tokens", "96", *map(str, arguments)),
        ]
    )
    assert code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path, rows: Path) -> Path:
    return trained_run(tmp_path_factory.mktemp("trained"), model, rows)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """A run of a model without a chat template."""
    folder = tmp_path_factory.mktemp("plain")
    return trained_run(folder, make_model(folder / "model", chat_template=None), rows, *ONE_STEP)


@pytest.fixture
def ask(run_cli: Run, trained: Path) -> Run:
    return lambda *arguments: run_cli("generate", trained, "--max-tokens", 12, *arguments)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def write_prompts(path: Path) -> Path:
    rows: list[dict[str, Any]] = [{"id": index, "prompt": prompt} for index, prompt in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_refused(result: Result, *words: str) -> None:
    """One line and a hint, and nothing of an answer."""
    assert result.code == 2 and result.out == ""
    lines = result.err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in result.err
    for word in words:
        assert word in result.err


def test_both_sides_answer_one_prompt(ask: Run, tmp_path: Path) -> None:
    result = ask("--prompt", PROMPTS[0])
    assert result.code == 0 and "loading" in result.err
    assert result.out.startswith("base     ") and "\nadapter  " in result.out
    base, adapter = ask("--prompt", PROMPTS[0], "--base").out, ask("--prompt", PROMPTS[0], "--adapter").out
    assert base != adapter
    indented = base.removesuffix("\n").replace("\n", "\n" + " " * 9)
    assert result.out.startswith(f"base     {indented}\nadapter  ")
    # the batched way says the same
    write_prompts(tmp_path / "prompts.jsonl")
    assert ask("--prompts", "prompts.jsonl", "--output", "out.jsonl").code == 0
    first = records(tmp_path / "out.jsonl")[0]
    assert (first["base"], first["adapter"]) == (base.removesuffix("\n"), adapter.removesuffix("\n"))


def test_records_are_in_the_prompts_order_whatever_the_batches(ask: Run, tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl")
    for size in (1, 3):
        how = ("--temperature", 1, "--top-k", 0, "--seed", 5, "--batch-size", size)
        result = ask("--prompts", "prompts.jsonl", "--output", f"out{size}.jsonl", *how)
        assert result.code == 0 and result.out == f"out{size}.jsonl: 5 prompts answered by base and adapter\n"
    found = records(tmp_path / "out3.jsonl")
    assert found == records(tmp_path / "out1.jsonl")
    assert [(record["id"], record["prompt"]) for record in found] == list(enumerate(PROMPTS))
    # a byte a token: the user's turn and the beginning of the assistant's are 19 more
    assert [record["prompt_tokens"] - len(record["prompt"].encode()) for record in found] == [19] * 5
    assert all(0 <= record["base_tokens"] <= 12 for record in found)
    assert all(record["adapter_ended"] == (record["adapter_tokens"] < 12) for record in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out1.jsonl", "out3.jsonl", "prompts.jsonl"]


def test_the_other_backend_says_the_same(ask: Run, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    write_prompts(tmp_path / "prompts.jsonl")
    for name in backends.names():
        result = ask("--prompts", "prompts.jsonl", "--output", f"{name}.jsonl", "--backend", name)
        assert result.code == 0, result.err
    assert records(tmp_path / "mlx.jsonl") == records(tmp_path / "cuda.jsonl")


def test_many_prompts_on_the_screen(ask: Run, tmp_path: Path, stdin: Callable[[bytes], None]) -> None:
    stdin(b"Say red 0.\r\n\n  \nHi\n")
    result = ask("--prompts", "-", "--adapter", "--batch-size", 1)
    assert result.code == 0
    first, _, second = result.out.partition("\n\n> Hi\n")
    assert first.startswith("> Say red 0.\n")
    assert first == "> Say red 0.\n" + ask("--prompt", "Say red 0.", "--adapter").out.removesuffix("\n")
    assert second == ask("--prompt", "Hi", "--adapter").out


def test_conversations_and_system_messages(ask: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hi, yo, who = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Who?"},
    )
    own = {"role": "system", "content": "Own."}
    rows = [
        {"messages": [hi, yo, who], "id": "a"},
        {"messages": [own, hi, yo]},
        {"prompt": "Hi", "system": "Brief."},
        {"prompt": "Hi"},
    ]
    (tmp_path / "p.ndjson").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[list[int]] = []
    real = backends.generate

    def spy(name: str, learner: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        asked.extend(prompts)
        texts[:] = [tokenizer.decode(prompt) for prompt in asked]
        return real(name, learner, tokenizer, prompts, **options)

    texts: list[str] = []
    monkeypatch.setattr(backends, "generate", spy)
    result = ask("--prompts", "p.ndjson", "--base", "--system", "All.", "--output", "o.jsonl", "--batch-size", 1)
    assert result.code == 0 and "1 conversation with an answer to the last question: it is left out" in result.err

    def turns(*pairs: tuple[str, str]) -> str:
        return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in pairs) + "<|im_start|>assistant\n"

    assert sorted(texts) == sorted(
        [
            turns(("system", "All."), ("user", "Hi"), ("assistant", "Yo"), ("user", "Who?")),
            turns(("system", "Own."), ("user", "Hi")),
            turns(("system", "Brief."), ("user", "Hi")),
            turns(("system", "All."), ("user", "Hi")),
        ]
    )
    found = records(tmp_path / "o.jsonl")
    assert found[0]["id"] == "a" and found[0]["messages"][0]["role"] == "system"
    assert [record.get("system") for record in found] == [None, None, "Brief.", "All."]
    assert "adapter" not in found[0]


def test_memory_that_runs_out_halves_the_batches(ask: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(tmp_path / "prompts.jsonl")
    assert ask("--prompts", "prompts.jsonl", "--output", "whole.jsonl", "--temperature", 1).code == 0
    real = backends.generate

    def short_of_memory(name: str, learner: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        if len(prompts) > most:
            raise OutOfMemoryError("the device is full")
        return real(name, learner, tokenizer, prompts, **options)

    monkeypatch.setattr(backends, "generate", short_of_memory)
    most = 2
    result = ask("--prompts", "prompts.jsonl", "--output", "halves.jsonl", "--temperature", 1)
    assert result.code == 0 and "out of memory with 5 prompts at once: from here 2" in result.err
    assert records(tmp_path / "halves.jsonl") == records(tmp_path / "whole.jsonl")
    most = 0
    refused = ask("--prompts", "prompts.jsonl", "--output", "none.jsonl")
    assert_refused(refused, "prompts.jsonl, line 5: the device is full", "shorten")  # the shortest came first
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("error", [OutOfMemoryError("the device is full"), UserError("the output is not a number")])
def test_a_prompt_that_fails_does_not_cost_the_others(
    ask: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: UserError
) -> None:
    """The longest comes last, and does not fit."""
    write_prompts(tmp_path / "prompts.jsonl")
    assert ask("--prompts", "prompts.jsonl", "--output", "whole.jsonl").code == 0
    real = backends.generate

    def short_of_memory(name: str, learner: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        if max(map(len, prompts)) > 60:
            raise error
        return real(name, learner, tokenizer, prompts, **options)

    monkeypatch.setattr(backends, "generate", short_of_memory)
    result = ask("--prompts", "prompts.jsonl", "--output", "part.jsonl", "--batch-size", 2)
    place = "prompts.jsonl, line 2: " * isinstance(error, OutOfMemoryError)
    assert_refused(result, f"error: {place}{error.what}", "part.jsonl: the 4 prompts of 5 that were finished")
    whole = records(tmp_path / "whole.jsonl")
    assert records(tmp_path / "part.jsonl") == [whole[0], *whole[2:]]


def test_an_interrupt_keeps_what_is_finished(ask: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(tmp_path / "prompts.jsonl")
    assert ask("--prompts", "prompts.jsonl", "--output", "whole.jsonl").code == 0
    real = backends.generate
    left = 5  # two prompts by both sides, and one by the base

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return real(*arguments, **options)

    monkeypatch.setattr(backends, "generate", interrupted)
    result = ask("--prompts", "prompts.jsonl", "--output", "part.jsonl", "--batch-size", 1)
    assert result.code == 130 and "part.jsonl: the 2 prompts of 5 that were finished" in result.err
    whole = records(tmp_path / "whole.jsonl")
    assert records(tmp_path / "part.jsonl") == [whole[0], whole[4]]  # the shortest came first
    assert ask("--prompts", "prompts.jsonl", "--output", "none.jsonl").code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.jsonl", "prompts.jsonl", "whole.jsonl"]


def test_a_model_without_a_template(run_cli: Run, plain: Path) -> None:
    result = run_cli("generate", plain, "--prompt", "Hi", "--max-tokens", 3)
    assert result.code == 0 and "template" not in result.err
    result = run_cli("generate", plain, "--prompt", "Hi", "--max-tokens", 3, "--system", "Be brief.")
    assert result.code == 0 and "no chat template: the system message goes before the prompt" in result.err


def test_a_stop_ends_answers_of_a_batch_as_it_ends_one(
    run_cli: Run, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a chat template a model goes on with the user's next turn: that is not waited for, said or counted."""
    words = {"Hi": "Yes.\n\nUser:\nAnd then?", "Ho": "A longer answer that nothing ends"}
    made: list[int] = []

    def speak(name: str, learner: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[Continuation]:
        found = []
        for place, prompt in enumerate(prompts):
            text = next(text for asked, text in words.items() if asked in tokenizer.decode(prompt))
            ids: list[int] = []
            for token in tokenizer(text)["input_ids"][: options["max_tokens"]]:
                ids.append(token)
                if options["on_token"](place, token):
                    break
            found.append(Continuation(ids, ended=False))
        made.extend(len(one.ids) for one in found)
        return found

    monkeypatch.setattr(backends, "generate", speak)
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in words]
    (tmp_path / "two.jsonl").write_text("\n".join(lines))
    asked = ("--adapter", "--max-tokens", 24)
    assert run_cli("generate", plain, "--prompts", "two.jsonl", "--output", "out.jsonl", *asked).code == 0
    found = [(row["adapter"], row["adapter_tokens"], row["adapter_ended"]) for row in records(tmp_path / "out.jsonl")]
    assert made == [12, 24]  # a byte a token, the last of the stop's among them
    assert found == [("Yes.", 12, True), ("A longer answer that not", 24, False)]
    (tmp_path / "one.jsonl").write_text(lines[0])
    assert run_cli("generate", plain, "--prompts", "one.jsonl", *asked).out == "Yes.\n"
    assert made[2:] == [12]


def test_an_answer_ends_where_the_model_is_full(run_cli: Run, rows: Path, tmp_path: Path) -> None:
    """Of Mixtral too, whose length mlx-lm does not read: 7 of 30 tokens are left."""
    model = make_model(tmp_path / "mixtral", model_type="mixtral")
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 128}
    (model / "config.json").write_text(json.dumps(config))
    run = trained_run(tmp_path, model, rows, *ONE_STEP)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x" * 102}))
    for name in backends.names():
        if missing_package(name):
            continue
        what = ("--prompts", "p.jsonl", "--output", f"{name}.jsonl", "--max-tokens", 30, "--backend", name)
        assert run_cli("generate", run, *what).code == 0
        (row,) = records(tmp_path / f"{name}.jsonl")
        assert row["prompt_tokens"] == 121
        assert (row["base_tokens"], row["adapter_tokens"]) == (7, 7)


def test_paths_that_look_like_somebodys_home_folder(ask: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for where, file in (("~prompts.txt", tmp_path / "~prompts.txt"), ("~/p.txt", tmp_path / "home" / "p.txt")):
        file.write_text("Hi\n")
        assert ask("--prompts", where, "--base", "--output", f"{where}.jsonl").code == 0
        assert records(file.with_name(f"{file.name}.jsonl"))[0]["prompt"] == "Hi"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["--prompts: p.jsonl does not exist"]),
        (b"", ["p.jsonl: no prompts"]),
        (b"\n  \n", ["p.jsonl: no prompts"]),
        (b'{"prompt": "Hi"}\n{"prompt": Hi}\n', ["p.jsonl, line 2: not JSON (", "column 12"]),
        (b'{"prompt": "Hi"}\n["Hi"]\n', ["p.jsonl, line 2: a list, not an object"]),
        (b'{"question": "Hi"}\n', ["p.jsonl, line 1: neither prompt nor messages", "question"]),
        (b'{"prompt": "Hi", "messages": []}\n', ["line 1: prompt and messages at once"]),
        (b'{"prompt": 3}\n', ["line 1: the prompt is a number (3), not text"]),
        (b'{"prompt": "  "}\n', ["line 1: the prompt is empty"]),
        (b'{"prompt": "\\ud83d"}\n', ["line 1: the prompt is not whole UTF-8", "\\ud83d"]),
        (b'{"prompt": "Hi", "system": 1}\n', ["line 1: system is a number"]),
        (b'{"messages": "Hi"}\n', ["line 1: messages is text, not a list"]),
        (b'{"messages": []}\n', ["line 1: messages is empty"]),
        (b'{"messages": ["Hi"]}\n', ["line 1: messages[0] is not an object with role and content"]),
        (b'{"messages": [{"role": "tool", "content": "Hi"}]}\n', ["role 'tool' is not supported"]),
        (b'{"messages": [{"role": "system", "content": "Hi"}]}\n', ["no question"]),
        (b'{"messages": [{"role": "assistant", "content": "Hi"}]}\n', ["no question"]),
        (
            b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Ho"}]}\n',
            ["a message of user, where assistant is due"],
        ),
        (b"\x89PNG\r\n\x00\x01", ["p.jsonl: not a text file"]),
        (b'{"prompt": "Hi"}\n{"prompt": "\xe9"}', ["p.jsonl, line 2: not UTF-8 (byte 0xe9 at byte 13"]),
        ('{"prompt": "Hi"}'.encode("utf-16"), ["UTF-16"]),
        (json.dumps({"prompt": "Say red. " * 70}).encode(), ["p.jsonl, line 1: 649 tokens", "made for 512"]),
    ],
)
def test_files_that_can_not_be_answered(ask: Run, tmp_path: Path, content: bytes | None, words: list[str]) -> None:
    if content is not None:
        (tmp_path / "p.jsonl").write_bytes(content)
    assert_refused(ask("--prompts", "p.jsonl", "--output", "out.jsonl"), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl"] * (content is not None)


def test_prompts_and_places_that_can_not_be(ask: Run, run_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "p.txt").write_text("Hi\n")
    assert_refused(ask("--prompt", " "), "--prompt: the prompt is empty")
    assert_refused(ask("--prompt", "n\udce9"), "--prompt: the prompt is not whole UTF-8")
    assert_refused(ask("--prompt", "Hi", "--system", "n\udce9"), "--system: it is not whole UTF-8")
    assert_refused(ask("--prompt", "Say red. " * 70), "--prompt: 649 tokens", "made for 512")
    assert_refused(ask("--prompts", "folder"), "--prompts: folder is a folder")
    assert_refused(ask("--prompts", "p.txt", "--output", "there.jsonl"), "there.jsonl is there already")
    assert_refused(ask("--prompts", "p.txt", "--output", "folder"), "folder is there already")
    assert_refused(ask("--prompts", "p.txt", "--output", "none/out.jsonl"), "none/out.jsonl: cannot write here")
    assert_refused(run_cli("generate", "nowhere", "--prompt", "Hi"), "nowhere")
    assert (tmp_path / "there.jsonl").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "p.txt", "there.jsonl"]


def test_what_is_json_and_what_is_text(ask: Run, tmp_path: Path, stdin: Callable[[bytes], None]) -> None:
    stdin(b'\xef\xbb\xbf{"prompt": "Hi"}\n')
    assert ask("--prompts", "-", "--base").out == ask("--prompt", "Hi", "--base").out
    (tmp_path / "p.txt").write_text('{"a": 1}\n{"b": 2}\n')
    assert ask("--prompts", "p.txt", "--base").out.startswith('> {"a": 1}\n')
    stdin(b'{"prompt": "Hi"}\nHo\n')
    assert_refused(ask("--prompts", "-"), "standard input, line 2: not JSON", ".txt")
