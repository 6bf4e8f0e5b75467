"""Targets at hand-worked positions: the tiny tokenizer has one token per byte, after three special ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from core.errors import UserError
from data.formats import Example, Message
from data.tokenize import Renderer, Tokenized, Tokenizer, load_tokenizer, tokenize_examples
from tests.data.conftest import MakeTokenizer
from tests.tiny import CHAT_TEMPLATE, END_ID, START_ID, make_tokenizer

START, END = "<|im_start|>", "<|im_end|>"
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
FORGETS_THOUGHTS = (  # like Qwen3: what stands before </think> is shown in the last answer only
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENS_THOUGHT = CHAT_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")  # like DeepSeek-R1
NO_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
OTHER_END = CHAT_TEMPLATE.replace("<|im_end|>", "<|pad|>")
NO_GENERATION_PROMPT = CHAT_TEMPLATE.split("{% if add_generation_prompt")[0]


def chat(*contents: str, system: str | None = None, is_pair: bool = False) -> Example:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    messages = [Message(roles[index % 2], content) for index, content in enumerate(contents)]
    if system is not None:
        messages.insert(0, Message("system", system))
    return Example("rows.jsonl, line 1", "rows.jsonl:1", tuple(messages), is_pair=is_pair)


def text(content: str) -> Example:
    return Example("rows.jsonl, line 1", "rows.jsonl:1", text=content)


def run(
    tokenizer: Tokenizer,
    *examples: Example,
    max_tokens: int = 2048,
    train_on: Literal["completions", "all"] = "completions",
) -> tuple[Tokenized, list[str]]:
    renderer = Renderer(tokenizer)
    done = tokenize_examples(examples, renderer, max_tokens=max_tokens, train_on=train_on)
    return done, [line.text for line in renderer.findings()]


def marked(tokenizer: Tokenizer, done: Tokenized) -> str:
    """The only row as text, with its targets in ⟦ ⟧."""
    (ids,), (is_target,) = done.rows.ids, done.rows.is_target
    changes = np.flatnonzero(np.diff(np.concatenate([[False], is_target, [False]]).astype(int)))
    parts = np.split(ids, changes) if len(changes) else [ids]
    decode = tokenizer.decode  # type: ignore[attr-defined]
    texts = [decode(part) for part in parts]
    return "".join(f"⟦{part}⟧" if index % 2 else part for index, part in enumerate(texts))


def test_token_ids_and_targets_worked_by_hand(chatml: Tokenizer) -> None:
    done, findings = run(chatml, chat("Hi", "Yo"))
    # <|im_start|> u s e r \n H i <|im_end|> \n <|im_start|> a s s i s t a n t \n Y o <|im_end|>: 24 tokens
    (ids,), (is_target,) = done.rows.ids, done.rows.is_target
    assert len(ids) == 24
    # printable ASCII follows the special tokens in order from "!": Y is 0x59 - 0x21 + 3, o is 0x6f - 0x21 + 3
    assert ids[[0, 8, 10, 21, 22, 23]].tolist() == [START_ID, END_ID, START_ID, 59, 81, END_ID]
    assert np.flatnonzero(is_target).tolist() == [21, 22, 23]
    assert ids.dtype == np.int32
    assert is_target.dtype == np.bool_
    assert done.rows.origin == ["rows.jsonl:1"]
    assert (done.rows.num_tokens, done.rows.num_targets, findings) == (24, 3, [])


def test_every_answer_is_a_target_with_its_end_token(chatml: Tokenizer) -> None:
    done, _ = run(chatml, chat("a", "b", "b", "a", "a", "ä!\n", system="be"))
    prompt = f"{START}system\nbe{END}\n{START}user\na{END}\n{START}assistant\n⟦b{END}⟧\n{START}user\nb{END}\n"
    rest = f"{START}assistant\n⟦a{END}⟧\n{START}user\na{END}\n{START}assistant\n⟦ä!\n{END}⟧"
    assert marked(chatml, done) == prompt + rest


def test_end_token_is_a_target_where_it_is_the_padding_too(make: MakeTokenizer) -> None:
    tokenizer = make(pad_token=END)
    done, _ = run(tokenizer, chat("Hi", "Yo"))
    assert done.rows.ids[0][-1] == END_ID
    assert done.rows.is_target[0][-1]


def test_train_on_all_keeps_everything_but_the_first_token(chatml: Tokenizer) -> None:
    done, _ = run(chatml, chat("Hi", "Yo"), train_on="all")
    assert len(done.rows.ids[0]) == 25  # the template's last line end as well
    assert np.flatnonzero(done.rows.is_target[0]).tolist() == list(range(1, 25))


def test_template_that_strips_refuses_system_and_writes_bos(make: MakeTokenizer) -> None:
    tokenizer = make(MISTRAL, adds_bos=True)
    done, findings = run(tokenizer, chat("Hi", "  Yo \n", "2", "3", system="Be brief"))
    assert marked(tokenizer, done) == f"{START}[INST] Be brief\n\nHi [/INST]⟦ Yo{END}⟧[INST] 2 [/INST]⟦ 3{END}⟧"
    assert np.count_nonzero(done.rows.ids[0] == START_ID) == 1
    assert findings == ["the chat template takes no system message: in 1 row it went before the user's first"]


def test_template_that_leaves_the_system_message_out(make: MakeTokenizer) -> None:
    tokenizer = make(CHAT_TEMPLATE.replace("messages %}", "messages if message['role'] != 'system' %}", 1))
    done, findings = run(tokenizer, chat("Hi", "Yo", system="Be brief"))
    assert marked(tokenizer, done) == f"{START}user\nBe brief\n\nHi{END}\n{START}assistant\n⟦Yo{END}⟧"
    assert len(findings) == 1


def test_prompt_that_is_no_prefix_is_searched_for(make: MakeTokenizer) -> None:
    tokenizer = make(OPENS_THOUGHT)
    probe = Renderer(tokenizer)
    assert "<think>" in probe._template([[Message("user", "Hi")]], prompt=True)[0]
    done, findings = run(tokenizer, chat("is it Yo?", "Yo", "s", "s"))
    expected = f"{START}user\nis it Yo?{END}\n{START}assistant\n⟦Yo{END}⟧\n{START}user\ns{END}\n"
    # the second answer, s, is in its own header too: the text behind the last answer says which s it is
    assert marked(tokenizer, done) == expected + f"{START}assistant\n⟦s{END}⟧"
    assert findings == [
        "1 row: the chat template's prompt is not the beginning of the whole text; answers were found by their content"
    ]


def test_template_that_rewrites_earlier_answers(make: MakeTokenizer) -> None:
    tokenizer = make(FORGETS_THOUGHTS)
    done, _ = run(tokenizer, chat("Hi", "Yo", "2", "hm</think>3"))
    assert marked(tokenizer, done).endswith(f"⟦Yo{END}⟧\n{START}user\n2{END}\n{START}assistant\n⟦hm</think>3{END}⟧")
    # the first answer is not in the text as it stands in the row: such a row is left out, whatever follows
    for question in ("2", "is hm</think>Yo it?"):
        done, _ = run(tokenizer, chat("Hi", "hm</think>Yo", question, "3"))
        assert len(done.rows) == 0
        assert done.unplaced == ["rows.jsonl, line 1"]


def test_template_without_end_token_gets_one(make: MakeTokenizer) -> None:
    tokenizer = make(NO_END)
    done, _ = run(tokenizer, chat("Hi", "Yo", "2", "3"))
    assert marked(tokenizer, done) == f"user: Hi\nassistant:⟦ Yo⟧\nuser: 2\nassistant:⟦ 3{END}⟧"


def test_template_that_writes_no_bos_gets_none(make: MakeTokenizer) -> None:
    """As transformers' apply_chat_template, which is how the model will be asked."""
    tokenizer = make(NO_END, adds_bos=True)
    done, _ = run(tokenizer, chat("Hi", "Yo"))
    assert marked(tokenizer, done) == f"user: Hi\nassistant:⟦ Yo{END}⟧"


def test_other_end_of_turn_token_is_a_target_before_the_end_token(make: MakeTokenizer) -> None:
    tokenizer = make(OTHER_END)
    done, _ = run(tokenizer, chat("a", "b", "c", "d"))
    assert marked(tokenizer, done).split("assistant\n", 1)[1].startswith("⟦b<|pad|>⟧\n")
    assert marked(tokenizer, done).endswith(f"⟦d<|pad|>{END}⟧")


def test_header_that_the_model_must_write_itself_is_a_target(make: MakeTokenizer) -> None:
    tokenizer = make(NO_GENERATION_PROMPT)
    done, _ = run(tokenizer, chat("q", "a", "q", "a"))
    turn = f"{START}user\nq{END}\n⟦{START}assistant\na{END}⟧"
    assert marked(tokenizer, done) == f"{turn}\n{turn}"


def test_date_does_not_change_the_rows(make: MakeTokenizer) -> None:
    tokenizer = make("{{ strftime_now('%d %b %Y') + '\n' }}" + CHAT_TEMPLATE)
    done, findings = run(tokenizer, chat("Hi", "Yo"))
    assert marked(tokenizer, done) == f"26 Jul 2024\n{START}user\nHi{END}\n{START}assistant\n⟦Yo{END}⟧"
    assert "date" in findings[0]


def test_template_that_refuses_a_row_names_it(make: MakeTokenizer) -> None:
    tokenizer = make(
        CHAT_TEMPLATE + "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no bad') }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: the model's chat template refuses .* \(no bad\)"):
        run(tokenizer, chat("bad", "Yo"))


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [("Q: 1", "2", "Q: 1\n⟦2{}⟧"), ("Q:\n", "2", "Q:\n⟦2{}⟧"), ("Q:", " 2", "Q:⟦ 2{}⟧"), ("Q", f"2{END}", "Q\n⟦2{}⟧")],
)
def test_pair_without_template(make: MakeTokenizer, prompt: str, completion: str, expected: str) -> None:
    tokenizer = make(None)
    done, findings = run(tokenizer, chat(prompt, completion, is_pair=True))
    assert marked(tokenizer, done) == expected.format(END)
    assert findings == ["the tokenizer has no chat template: prompt and completion are joined as plain text"]


def test_chat_without_template(make: MakeTokenizer) -> None:
    tokenizer = make(None, adds_bos=True)
    done, findings = run(tokenizer, chat("a", "b", "c", "d", system="be"))
    turns = f"User:\na\n\nAssistant:\n⟦b{END}⟧\n\nUser:\nc\n\nAssistant:\n⟦d{END}⟧"
    assert marked(tokenizer, done) == f"{START}be\n\n{turns}"
    assert "`User:` and `Assistant:`" in findings[0]


def test_text_rows(make: MakeTokenizer) -> None:
    tokenizer = make(adds_bos=True)  # a chat template plays no part
    for content in ("Hé", f"{START}Hé", f"Hé{END}"):  # neither token is written twice
        done, _ = run(tokenizer, text(content))
        assert marked(tokenizer, done) == f"{START}⟦Hé{END}⟧"
        assert len(done.rows.ids[0]) == 5  # é is two bytes
    plain, _ = run(make(), text("Hé"))
    assert np.flatnonzero(plain.rows.is_target[0]).tolist() == [1, 2, 3]  # nothing predicts the first


def test_truncation_keeps_the_start_and_leaves_out_rows_without_targets(chatml: Tokenizer) -> None:
    done, _ = run(chatml, chat("Hi", "Yo"), chat("Hi you", "Yo"), max_tokens=23)
    assert [len(ids) for ids in done.rows.ids] == [23]
    assert np.flatnonzero(done.rows.is_target[0]).tolist() == [21, 22]
    assert done.num_truncated == 1
    assert done.without_targets == ["rows.jsonl, line 1"]


def test_chunks_do_not_change_the_rows(chatml: Tokenizer) -> None:
    many = [chat(f"question {index}", "x" * (index % 50 + 1)) for index in range(1100)]
    done, _ = run(chatml, *many)
    for index in (0, 511, 512, 1099):
        (alone,) = run(chatml, many[index])[0].rows.ids
        assert np.array_equal(done.rows.ids[index], alone)
        assert done.rows.is_target[index].sum() == index % 50 + 2


def test_peer_masks_the_same_tokens(make: MakeTokenizer) -> None:
    """transformers' own assistant mask, with the template's `generation` marks, agrees."""
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make(template)
    example = chat("Hi", "Yo, señor", "and?", "end", system="Be")
    peer = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in example.messages],  # type: ignore[misc]
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    done, _ = run(tokenizer, example)
    length = len(done.rows.ids[0])
    assert done.rows.ids[0].tolist() == peer["input_ids"][:length]
    assert done.rows.is_target[0].tolist() == [bool(mask) for mask in peer["assistant_masks"][:length]]
    assert not any(peer["assistant_masks"][length:])


def test_load_tokenizer_refuses_folders_without_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="can't be loaded"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_refuses_slow_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(UserError, match="ByT5Tokenizer is not a fast tokenizer"):
        load_tokenizer(tmp_path)
