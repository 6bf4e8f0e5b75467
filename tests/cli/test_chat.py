"""`chat`: who reads what, commands, interrupts. The model's words are given; what it is asked is looked at."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import backends
import core.workflow.chat
from core.errors import OutOfMemoryError
from core.sampling import Continuation
from tests.cli.conftest import Result
from tests.cli.test_generate import trained_run
from tests.tiny import make_model

Run = Callable[..., Result]
END = "<|im_end|>\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path, rows: Path) -> Path:
    return trained_run(tmp_path_factory.mktemp("trained"), model, rows)


class Voice:
    """Stands for `backends.generate`: says what it was told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.asked: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.interrupt_after: int | None = None

    def __call__(
        self,
        name: str,
        learner: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        on_token: Any,
        **options: Any,
    ) -> list[Continuation]:
        (prompt,) = prompts
        self.asked.append(tokenizer.decode(prompt))
        self.options.append(options)
        words = self.words.pop(0) if self.words else f"answer {len(self.asked)}"
        if words == "OOM":
            raise OutOfMemoryError("the device is full")
        if words == "BUG":
            raise RuntimeError("nobody thought of this")
        ids = tokenizer(words)["input_ids"][: options["max_tokens"]]
        for place, token in enumerate(ids, start=1):
            if on_token(0, token):
                return [Continuation(ids[:place], ended=False)]
            if place == self.interrupt_after:
                signal.raise_signal(signal.SIGINT)
        return [Continuation(ids, ended=True)]


@pytest.fixture
def voice(monkeypatch: pytest.MonkeyPatch) -> Voice:
    made = Voice()
    monkeypatch.setattr(backends, "generate", made)
    return made


@pytest.fixture
def chat(run_cli: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Lines through a pipe."""

    def talk(*lines: str, arguments: Sequence[object] = (), run: Path = trained) -> Result:
        content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        return run_cli("chat", run, *arguments)

    return talk


@pytest.fixture
def typed(run_cli: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Lines at a keyboard, and Ctrl-C where one is None."""

    def talk(*lines: str | None, arguments: Sequence[object] = ()) -> Result:
        left = list(lines)

        def typed_line(prompt: str) -> str:
            if not left:
                raise EOFError
            line = left.pop(0)
            if line is None:
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr(core.workflow.chat, "is_interactive", lambda: True)
        monkeypatch.setattr("builtins.input", typed_line)
        for name, value in (("FORCE_COLOR", "1"), ("NO_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "80")):
            monkeypatch.setenv(name, value)
        result = run_cli("chat", trained, *arguments)
        assert not left, "it ended before the last line"
        return result

    return talk


def said(*pairs: tuple[str, str], system: str | None = None) -> str:
    """What the model reads."""
    turns = ([("system", system)] if system else []) + list(pairs)
    return "".join(f"<|im_start|>{role}\n{text}{END}" for role, text in turns) + "<|im_start|>assistant\n"


def test_the_real_model_answers_and_the_conversation_grows(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    real = backends.generate

    def spy(name: str, learner: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        lengths.append(len(prompts[0]))
        return real(name, learner, tokenizer, prompts, **options)

    monkeypatch.setattr(backends, "generate", spy)
    lines = ("Say red 0.", "Say red 1.")
    result = chat(*lines, arguments=("--base", "--temperature", 0, "--max-tokens", 8))
    assert result.code == 0 and len(result.out) > 4, result
    assert lengths[1] > 2 * lengths[0] - 19  # it reads the first question again
    assert chat(*lines, arguments=("--base", "--temperature", 0, "--max-tokens", 8)).out == result.out


def test_each_side_reads_its_own_answers_only(chat: Run, voice: Voice) -> None:
    voice.words = ["base one", "adapter one", "base two", "adapter two", "adapter three"]
    result = chat("Hi", "And?", "/side adapter", "So?", arguments=("--system", "Be brief."))
    assert result.code == 0
    assert result.out.splitlines() == [
        "base     base one",
        "adapter  adapter one",
        "base     base two",
        "adapter  adapter two",
        "adapter three",
    ]
    for place, side in ((2, "base"), (3, "adapter")):
        first = [("user", "Hi"), ("assistant", f"{side} one"), ("user", "And?")]
        assert voice.asked[place] == said(*first, system="Be brief.")
    third = [("user", "And?"), ("assistant", "adapter two"), ("user", "So?")]
    assert voice.asked[4] == said(("user", "Hi"), ("assistant", "adapter one"), *third, system="Be brief.")


def test_commands_change_what_is_asked(chat: Run, voice: Voice) -> None:
    lines = (
        *("Hi", "/retry", "/set temperature 0.25", "/set max_tokens 9", "/system Be kind.", "And?", "/undo", "So?"),
        *("/clear", "/system", '"""', "/two", 'lines"""', "a\\", "b", "/quit", "never asked"),
    )
    result = chat(*lines, arguments=("--adapter", "--top-k", 7))
    assert result.code == 0, result.err
    hi = (("user", "Hi"), ("assistant", "answer 2"))  # the second answer took the place of the first
    assert voice.asked == [
        said(("user", "Hi")),
        said(("user", "Hi")),
        said(*hi, ("user", "And?"), system="Be kind."),
        said(*hi, ("user", "So?"), system="Be kind."),
        said(("user", "/two\nlines")),
        said(("user", "/two\nlines"), ("assistant", "answer 5"), ("user", "a\nb")),
    ]
    keys = [options["keys"][0] for options in voice.options]
    assert len(set(keys)) == len(keys)  # a new draw each time
    first, last = voice.options[0], voice.options[-1]
    assert (first["sampling"].temperature, first["sampling"].top_k, first["max_tokens"]) == (0.7, 7, 512)
    assert (last["sampling"].temperature, last["sampling"].top_k, last["max_tokens"]) == (0.25, 7, 9)


def test_what_is_saved_can_be_trained_on(chat: Run, voice: Voice, tmp_path: Path) -> None:
    voice.words = ["Yo", "Me"]
    assert chat("Hi", "Who?", "/save talk.jsonl", "/save talk.jsonl", arguments=("--adapter",)).code == 0
    (row,) = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    contents = [(turn["role"], turn["content"]) for turn in row["messages"]]
    assert contents == [("user", "Hi"), ("assistant", "Yo"), ("user", "Who?"), ("assistant", "Me")]

    from data.formats import survey
    from data.sources import BadRows, open_source

    bad = BadRows(skip=False)
    rows = list(open_source("talk.jsonl").read(bad))
    (example,), _ = survey(rows, name="talk", fields={}).parse(rows, bad)
    assert [(turn.role, turn.content) for turn in example.messages] == contents


def test_a_long_conversation_loses_its_oldest_turns_and_says_so(chat: Run, voice: Voice) -> None:
    # 512 tokens, of which 128 are kept for the answer; a turn of these is 200 and more
    voice.words = ["a" * 100] * 4
    questions = [f"{number}" * 90 for number in range(3)]
    result = chat(*questions, arguments=("--adapter", "--system", "Be brief."))
    assert result.code == 0
    assert "adapter: longer than the model's 512 tokens: from here without the oldest turn" in result.err
    assert questions[0] in voice.asked[1]
    assert voice.asked[2] == said(
        ("user", questions[1]), ("assistant", "a" * 100), ("user", questions[2]), system="Be brief."
    )
    result = chat("Hi", "x" * 600, arguments=("--adapter",))
    assert result.code == 2 and "standard input, line 2: 619 tokens" in result.err


def test_mistakes_in_a_pipe_end_it(chat: Run, run_cli: Run, voice: Voice) -> None:
    for line, words in (
        ("/sav", "standard input, line 2: /sav: no such command"),
        ("/set top_p 2", "line 2: /set top_p 2: must be above 0 and at most 1"),
        ("/undo", "line 2: nothing was asked yet"),
        ("/retry", "line 2: nothing was asked yet"),
        ("/save x.jsonl", "line 2: nothing to save yet"),
        ("n\udce9", "standard input, line 2: not UTF-8 (byte 0xe9)"),
    ):
        result = chat("", line, "Hi")
        assert result.code == 2 and words in result.err and "Traceback" not in result.err
    assert voice.asked == []
    assert run_cli("chat", "nowhere").code == 2
    assert chat("Hi", arguments=("--system", "n\udce9")).code == 2


def test_somebody_who_types_goes_on_after_mistakes(typed: Run, voice: Voice) -> None:
    voice.words = ["Yo", "OOM", "Me"]
    result = typed(
        "Hi", "/hlep", "/set", "too much", "n\udce9", None, "Who?", "/help", None, None, arguments=("--adapter",)
    )
    assert result.code == 0
    for words in ("did you mean /help?", "repetition_penalty 1.0", "the device is full", "not UTF-8", "/save FILE"):
        assert words in result.out
    assert "2 tokens · " in result.out and "Ctrl-C once more ends the chat" in result.out
    # what could not be answered is no part of the conversation
    assert voice.asked[-1] == voice.asked[-2].replace("too much", "Who?") and "Yo" in voice.asked[-1]


def test_a_retry_that_fails_loses_nothing(typed: Run, voice: Voice, tmp_path: Path) -> None:
    """The first side has its new answer when the second fails: neither keeps it."""
    voice.words = ["Yo base", "Yo adapter", "new", "OOM"]
    result = typed("Hi", "/retry", "/save both.jsonl")
    assert result.code == 0 and "the device is full" in result.out
    saved = [json.loads(line)["messages"] for line in (tmp_path / "both.jsonl").read_text().splitlines()]
    assert [[turn["content"] for turn in messages] for messages in saved] == [["Hi", "Yo base"], ["Hi", "Yo adapter"]]
    voice.words, voice.interrupt_after = ["Yo", "   cut off"], 2
    typed("Hi", "/retry", "/save one.jsonl", arguments=("--adapter",))  # stopped before there was a word
    (row,) = (tmp_path / "one.jsonl").read_text().splitlines()
    assert [turn["content"] for turn in json.loads(row)["messages"]] == ["Hi", "Yo"]


def test_a_mistake_of_the_program_does_not_cost_the_conversation(typed: Run, voice: Voice, tmp_path: Path) -> None:
    voice.words = ["Yo", "BUG", "Me"]
    result = typed("Hi", "And?", "Who?", "/save ~talk.jsonl", arguments=("--adapter",))
    assert result.code == 0
    assert "nobody thought of this" in result.err and "Traceback" in result.err
    assert "the conversation is still there: /save FILE.jsonl" in " ".join(result.out.split())
    (row,) = (tmp_path / "~talk.jsonl").read_text().splitlines()
    assert [turn["content"] for turn in json.loads(row)["messages"]] == ["Hi", "Yo", "Who?", "Me"]


def test_an_interrupt_ends_an_answer_and_what_was_said_stays(typed: Run, voice: Voice) -> None:
    voice.words, voice.interrupt_after = ["One two three", "One two three", "No"], 7
    result = typed("Hi", "And?", arguments=("--adapter",))
    assert result.code == 0 and result.out.count("· stopped") == 2 and "three" not in result.out
    assert voice.asked[1] == said(("user", "Hi"), ("assistant", "One two"), ("user", "And?"))


def test_without_a_chat_template_the_next_question_is_not_the_models(
    chat: Run, voice: Voice, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_run(tmp_path, make_model(tmp_path / "plain", chat_template=None), rows)
    capsys.readouterr()
    voice.words = ["Yo\n\nUser:\nAnd then?\n\nAssistant:\nNo", "Me"]
    result = chat("Hi", "Who?", run=run, arguments=("--adapter",))
    assert result.out.splitlines() == ["Yo", "Me"]
    assert voice.asked == [
        "User:\nHi\n\nAssistant:\n",
        "User:\nHi\n\nAssistant:\nYo<|im_end|>\n\nUser:\nWho?\n\nAssistant:\n",
    ]
    assert result.err.count("no chat template: messages are written under `User:`") == 1
