"""Conversations, commands, lines and columns of a chat, without a model."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path

import pytest
from rich.console import Console

from core.chat.commands import Command, Settings, parse
from core.chat.conversation import Conversation, SavedFiles, Turn, last_turn, to_rows
from core.chat.input import AnswerInterrupt, Lines, completions, whole_text
from core.chat.screen import Answer, Below, SideBySide, Wrapper, answers_screen, columns, printable, wrapped_lines
from core.errors import UserError
from core.sampling import Sampling


def talked(*answers: str) -> Conversation:
    conversation = Conversation()
    for number, answer in enumerate(answers, start=1):
        conversation.add(Turn(number, f"Question {number}?", answer))
    return conversation


# --- conversations ----------------------------------------------------------------------------------------------------


def test_messages_alternate_and_begin_with_the_system_message() -> None:
    assert talked("One.").messages("Be brief.", "And?") == [
        ("system", "Be brief."),
        ("user", "Question 1?"),
        ("assistant", "One."),
        ("user", "And?"),
    ]
    assert talked("One.", "Two.").messages(None, skip=1) == [("user", "Question 2?"), ("assistant", "Two.")]


def test_the_oldest_turns_are_left_out_until_an_answer_fits() -> None:
    conversation = talked("a", "b", "c", "d")
    # each turn is 20 tokens and the question 10: 90 tokens; of 100, 25 are kept for the answer
    lengths = [90, 70, 50, 30, 10]
    assert conversation.fit(lengths.__getitem__, max_length=100, max_tokens=512) == 1
    assert conversation.num_left_out == 1
    assert conversation.fit(lengths.__getitem__, max_length=100, max_tokens=512) == 0  # said once
    assert conversation.fit(lengths.__getitem__, max_length=80, max_tokens=5) == 0
    assert conversation.fit(lengths.__getitem__, max_length=40, max_tokens=1) == 2
    assert conversation.num_left_out == 3 and len(conversation.turns) == 4  # what was said is still there to be saved
    assert conversation.fit(lambda skip: 10**9, max_length=None, max_tokens=512) == 0


def test_a_question_that_fills_the_model_is_refused_and_leaves_nothing_out() -> None:
    conversation = talked("a", "b")
    with pytest.raises(UserError, match=r"1,100 tokens .* the model was made for 1,024"):
        conversation.fit([2000, 1500, 1100].__getitem__, max_length=1024, max_tokens=16)
    assert conversation.num_left_out == 0
    # it fits without room for a long answer: the answer is short
    assert conversation.fit([1060, 1040, 1020].__getitem__, max_length=1024, max_tokens=16) == 2


def test_the_last_question_is_taken_back_wherever_it_was_asked() -> None:
    base, adapter = talked("a", "b"), talked("a", "b", "c")
    last = last_turn([base, adapter])
    assert last is not None and last.number == 3
    for conversation in (base, adapter):
        conversation.drop(last.number)
    assert [len(base.turns), len(adapter.turns)] == [2, 2]
    assert last_turn([Conversation()]) is None


def test_what_is_saved_is_a_row_a_side(tmp_path: Path) -> None:
    rows = list(to_rows([("base", talked("Hé")), ("adapter", Conversation())], system="Be brief."))
    assert [json.loads(row) for row in rows] == [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Question 1?"},
                {"role": "assistant", "content": "Hé"},
            ],
            "side": "base",
        }
    ]
    saved = SavedFiles()
    file = tmp_path / "talk.jsonl"
    for _ in range(2):  # its own file is brought up to date
        assert saved.save(str(file), rows) == file
    assert file.read_text().splitlines() == rows
    for name, content, message in (
        (str(file), rows, "is there already"),
        (str(tmp_path / "talk.txt"), rows, ".jsonl"),
        (str(tmp_path / "none" / "talk.jsonl"), rows, "cannot write here"),
        (str(tmp_path / f"{'x' * 300}.jsonl"), rows, "too long"),
        (str(tmp_path / "other.jsonl"), [], "nothing to save yet"),
    ):
        with pytest.raises(UserError, match=message):
            SavedFiles().save(name, content)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.jsonl"]


def test_a_file_named_as_nobodys_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert SavedFiles().save("~talk.jsonl", ["{}"]) == Path("~talk.jsonl")
    assert (tmp_path / "~talk.jsonl").read_text() == "{}\n"


# --- commands ---------------------------------------------------------------------------------------------------------


def test_commands_are_told_from_questions() -> None:
    assert parse("What is /help?") is None
    assert parse(" /etc/passwd is what?") is None
    assert parse("/help") == Command("/help")
    assert parse("/exit") == Command("/quit")
    assert parse("/system You are  brief. ") == Command("/system", "You are  brief.")
    assert parse("/system") == Command("/system")
    assert parse("/side both") == Command("/side", "both")


@pytest.mark.parametrize(
    ("line", "what", "hint"),
    [
        ("/hlep", "/hlep: no such command", "/help"),
        ("/frobnicate", "no such command", "begin with a space"),
        ("/clear all", "/clear stands alone", "/help"),
        ("/save", "/save: of what", "/save FILE.jsonl"),
        ("/side left", "/side left: no such side", "base|adapter|both"),
    ],
)
def test_a_mistyped_command_says_what_is_meant(line: str, what: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(line)
    assert what in caught.value.what and hint in str(caught.value.hint)


def test_settings_change_one_by_one() -> None:
    settings = Settings(Sampling(), max_tokens=512)
    for typed in ("temperature 0.2", "top-k=5", "TOP_P 1", "--repetition-penalty 1.3", "seed 7", "max_tokens 20"):
        settings, _ = settings.changed(typed)
    assert settings == Settings(Sampling(0.2, 5, 1.0, 1.3, 7), max_tokens=20)
    assert settings.lines()[:2] == ["temperature 0.2", "top_k 5"] and len(settings.lines()) == 6
    assert settings.lines("max_tokens") == ["max_tokens 20"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("temperature", "temperature: must be a number of at least 0"),
        ("temperature 0,2", "temperature 0,2: must be"),
        ("temperature -1", "at least 0"),
        ("temperature nan", "at least 0"),
        ("top_p 0", "above 0 and at most 1"),
        ("top_k 1.5", "a whole number"),
        ("max_tokens 0", "at least 1"),
        ("temprature 1", "did you mean temperature?"),
        ("colour red", "there are temperature, top_k"),
    ],
)
def test_settings_that_can_not_be_are_refused(typed: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Settings(Sampling(), 512).changed(typed)
    assert message in str(caught.value)


# --- lines ------------------------------------------------------------------------------------------------------------


def wholes(*lines: str) -> list[str]:
    assembled = Lines()
    found = [whole for line in lines if (whole := assembled.add(line)) is not None]
    rest = assembled.rest()
    assert not assembled.is_open
    return found if rest is None else [*found, rest]


def test_lines_are_put_together() -> None:
    assert wholes("one", "two") == ["one", "two"]
    assert wholes("one\\", "", "two\\", "three", "four") == ["one\n", "two\nthree", "four"]
    assert wholes('"""', "/help", "", "two", '"""', "three") == [" /help\n\ntwo\n", "three"]
    assert wholes('"""one', 'two"""') == [" one\ntwo"]
    assert wholes('"""one"""') == [" one"]
    assert wholes('"""one', "two") == [" one\ntwo"]  # never closed
    assert wholes("one\\") == ["one"]
    assert all(parse(whole) is None for whole in wholes('"""', "/help", '"""'))  # a block is no command


def test_half_a_character_is_seen() -> None:
    assert whole_text("né") == "né"
    assert whole_text("n\udce9") is None


def test_commands_complete() -> None:
    assert completions("", "/s") == ["/side ", "/system ", "/set ", "/save "]
    assert completions("/side ", "b") == ["base ", "both "]
    assert completions("/set ", "top") == ["top_k ", "top_p "]
    assert completions("", "") == completions("What ", "b") == []


def test_the_first_interrupt_asks_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupted_twice() -> None:
        with AnswerInterrupt() as interrupted:
            assert not interrupted()
            signal.raise_signal(signal.SIGINT)
            assert interrupted()
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert signal.getsignal(signal.SIGINT) is before


# --- screen -----------------------------------------------------------------------------------------------------------


def test_text_is_broken_between_words_however_it_comes() -> None:
    text = "The sea is wide,\n\n    and deep; antidisestablishmentarianism  ends"
    lines = ["The sea is", "wide,", "", "    and", "deep;", "antidisest", "ablishment", "arianism", "ends"]
    assert wrapped_lines(text, 10) == lines
    for size in (1, 3, 7):
        wrapper = Wrapper(10)
        pieces = [wrapper.feed(text[start : start + size]) for start in range(0, len(text), size)]
        assert ("".join(pieces) + wrapper.end()).split("\n") == lines
    assert wrapped_lines("", 10) == [""]


def test_wide_characters_count_double_and_break_anywhere() -> None:
    assert wrapped_lines("海很宽也很深", 6) == ["海很宽", "也很深"]
    assert wrapped_lines("a 海很宽", 6) == ["a 海很", "宽"]
    assert wrapped_lines("👩\N{ZERO WIDTH JOINER}🚀x", 20) == ["👩\N{ZERO WIDTH JOINER}🚀x"]


def test_a_model_can_not_write_to_the_terminal_itself() -> None:
    assert printable("a\x1b[2Jb\x07\x9b1mc\r\n\td") == "a[2Jb1mc\n    d"


def test_facts_say_why_an_answer_ended() -> None:
    assert Answer("Hi", 20, True, 2.0).facts() == "20 tokens · 10.0 tok/s"
    assert Answer("Hi", 1, False, 2.0).facts() == "1 token · 0.5 tok/s · cut off: max_tokens"
    assert Answer("Hi", 1, False, 2.0, interrupted=True).facts() == "1 token · 0.5 tok/s · stopped"
    assert Answer("Hi", 1, False, 2.0, is_full=True).facts() == "1 token · 0.5 tok/s · the model is full"
    assert Answer("", 0, True, 2.0).facts() == "0 tokens · the model ended at once"


def shown(width: int, answers: dict[str, str], *, terminal: bool = True) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
    screen = answers_screen(console, list(answers))
    assert isinstance(screen, SideBySide if width >= 100 and terminal and len(answers) > 1 else Below)
    for side, text in answers.items():
        show = screen.begin(side)
        for start in range(0, len(text), 3):
            show(text[start : start + 3])
        screen.end(Answer(text, 9, True, 1.0))
    screen.close()
    return [line.rstrip() for line in file.getvalue().split("\n")]


LONG = "one two three four five six seven eight nine ten"


def test_answers_below_each_other() -> None:
    facts = "9 tokens · 9.0 tok/s"
    assert shown(40, {"base": LONG, "adapter": "short"}) == [
        "base     one two three four five six",
        "         seven eight nine ten",
        f"         {facts}",
        "",
        "adapter  short",
        f"         {facts}",
        "",
        "",
    ]
    assert shown(40, {"adapter": "short"}) == ["short", facts, "", ""]


def test_a_program_gets_answers_in_whole_lines() -> None:
    assert shown(40, {"base": LONG, "adapter": "two\nlines"}, terminal=False) == [
        f"base     {LONG}",
        "adapter  two",
        "         lines",
        "",
    ]
    assert shown(40, {"base": LONG}, terminal=False) == [LONG, ""]
    code = "if x:\n\treturn  1"
    assert shown(40, {"base": code}, terminal=False) == [*code.split("\n"), ""]


def test_answers_side_by_side() -> None:
    text = "\n".join(shown(100, {"base": LONG, "adapter": "short"}))
    assert f"{'base':<48} │ adapter" in text
    assert f"{LONG:<48} │ short" in text
    assert f"{'9 tokens · 9.0 tok/s':<48} │ 9 tokens · 9.0 tok/s" in text


def test_columns_show_the_last_lines_where_not_all_fit() -> None:
    texts = {"base": "\n".join(f"line {number}" for number in range(9)), "adapter": "short"}
    file = io.StringIO()
    console = Console(file=file, width=100, color_system=None)
    console.print(columns(texts, {"base": "", "adapter": ""}, width=100, height=3))
    left = [line.split("│")[0].strip() for line in file.getvalue().splitlines()]
    assert left == ["base", "line 6", "line 7", "line 8", ""]
