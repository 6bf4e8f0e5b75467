"""A prompt is the beginning of the row that training would make of it, and text comes in whole characters."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Built

from core.errors import UserError
from data.formats import Example, Message
from data.prompt import PromptRenderer, TextStream, decode, render_prompt
from data.tokenize import Renderer, Tokenizer, load_tokenizer, tokenize_examples
from tests.data.conftest import MakeTokenizer
from tests.data.test_tokenize import MISTRAL
from tests.tiny import CHAT_TEMPLATE, END_ID, SPECIAL, START_ID

DATED = "{{ '<|im_start|>' + strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
SYSTEM = Message("system", "Be brief.")
HI, YO, WHO, ME = Message("user", "Hi"), Message("assistant", "Yo"), Message("user", "Who?"), Message("assistant", "Me")


def prompt_of_row(tokenizer: Tokenizer, *messages: Message, is_pair: bool) -> list[int]:
    """Token ids of a training row up to its last answer."""
    row = Example("rows.jsonl, line 1", "rows.jsonl:1", messages, is_pair=is_pair)
    (ids,) = tokenize_examples([row], Renderer(tokenizer), max_tokens=512, train_on="completions").rows.ids
    answer = len(messages[-1].content.encode()) + 1  # a byte a token, and the end token
    return [int(token) for token in ids[:-answer]]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, DATED, None, MISTRAL])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("messages", "is_pair"),
    [
        ((HI, YO), True),
        ((Message("user", "Hi \n"), YO), True),
        ((HI, YO), False),
        ((SYSTEM, HI, YO), False),
        ((SYSTEM, HI, YO, WHO, ME), False),
    ],
)
def test_a_prompt_is_the_beginning_of_its_training_row(
    make: MakeTokenizer, template: str | None, adds_bos: bool, messages: tuple[Message, ...], is_pair: bool
) -> None:
    tokenizer = make(template, adds_bos=adds_bos)
    row = prompt_of_row(tokenizer, *messages, is_pair=is_pair)
    if template == MISTRAL:
        row = row[:-1]  # its answers begin with a space, which the model has to write itself
    assert PromptRenderer(tokenizer).ids(messages[:-1], is_pair=is_pair) == row


def test_a_prompt_worked_by_hand(chatml: Tokenizer) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = render_prompt(chatml, "Hi")
    assert (ids[0], ids[8], len(ids)) == (START_ID, END_ID, 21)
    assert chatml.decode(ids) == text  # type: ignore[attr-defined]
    with_system = render_prompt(chatml, "Hi", system="Be brief.")
    assert chatml.decode(with_system) == f"<|im_start|>system\nBe brief.<|im_end|>\n{text}"  # type: ignore[attr-defined]


def test_without_a_template_the_system_message_stands_before_the_prompt(make: MakeTokenizer) -> None:
    plain = make(None)
    assert decode(plain, render_prompt(plain, "Hi", system="Be brief.")) == "Be brief.\n\nHi"


def test_a_tokenizer_that_ends_its_texts_does_not_end_a_prompt(make: MakeTokenizer, tmp_path: Path) -> None:
    from tokenizers import processors

    make(None)
    file = str(tmp_path / "tokenizer" / "tokenizer.json")
    built = Built.from_file(file)
    built.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[1]} $A {SPECIAL[2]}", special_tokens=[(SPECIAL[1], START_ID), (SPECIAL[2], END_ID)]
    )
    built.save(file)
    ids = render_prompt(load_tokenizer(tmp_path / "tokenizer"), "Hi")
    assert ids[0] == START_ID and END_ID not in ids and len(ids) == 4


def test_what_was_done_to_the_system_message_is_said_once(make: MakeTokenizer) -> None:
    renderer = PromptRenderer(make(MISTRAL))
    renderer.ids([HI])
    assert renderer.notes() == [] and renderer.stops() == ()
    for _ in range(2):
        renderer.ids([SYSTEM, HI])
    assert renderer.notes() == ["the chat template takes no system message: it goes before the first question"]
    plain = PromptRenderer(make(None))
    plain.ids([SYSTEM, HI])
    assert "no chat template" in plain.notes()[0]
    assert plain.stops() == ("\n\nUser:\n",) and plain.stops(is_pair=True) == ()


def test_a_template_that_refuses_is_the_users_mistake(make: MakeTokenizer) -> None:
    with pytest.raises(UserError, match="chat template refuses this conversation"):
        PromptRenderer(make(MISTRAL)).ids([HI, WHO])


# --- streams ----------------------------------------------------------------------------------------------------------

TEXTS = (
    "plain words, and more of them",
    "  white space around\n\nand between\t",
    "日本語と中文 — ж ñ 👩🏽‍🚀🇫🇷 e\u0301",
    "a \N{REPLACEMENT CHARACTER} b\N{REPLACEMENT CHARACTER}",
    "",
)


def sentencepiece(folder: Path) -> Tokenizer:
    """As Llama's: words begin with ▁, other characters are tokens of one byte, the first space is left out."""
    vocab = {name: index for index, name in enumerate(SPECIAL)}
    for piece in ("<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz"):
        vocab.setdefault(piece, len(vocab))
    built = Built(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(content=" ", left=1, right=0)
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    built.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    folder.mkdir()
    built.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "sentencepiece":
        return sentencepiece(tmp_path_factory.mktemp("made") / "tokenizer")
    chatml: Tokenizer = request.getfixturevalue("chatml")
    return chatml


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = encoded(tokenizer, text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == decode(tokenizer, ids) == text.strip()
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    if len(text) > 20:  # a stream, not all at the end
        assert sum(map(bool, pieces)) > len(text) // 3


def test_any_tokens_make_the_text_that_they_decode_to(tokenizer: Tokenizer) -> None:
    """Special tokens anywhere, and broken characters where the tokenizer decodes them one by one."""
    rng = random.Random(0)
    whole = [[END_ID], *(encoded(tokenizer, text) for text in (" 👩", "a", " ", "b c"))]
    broken = [] if tokenizer.convert_tokens_to_ids("<0x00>") else [[token] for token in range(len(tokenizer))]  # type: ignore
    for _ in range(200):
        ids = [token for _ in range(rng.randrange(30)) for token in rng.choice(rng.choice((whole, broken or whole)))]
        stream = TextStream(tokenizer)
        shown = "".join([*map(stream.push, ids), stream.finish()])
        assert shown == decode(tokenizer, ids)


def test_half_a_character_at_the_end_spoils_nothing(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    pieces = [*map(stream.push, encoded(tokenizer, "a 👩👩")[:-2]), stream.finish()]
    assert "".join(pieces).rstrip("\N{REPLACEMENT CHARACTER}") == "a 👩"


def test_a_stop_ends_the_text_and_its_beginning_is_never_shown(chatml: Tokenizer) -> None:
    stream = TextStream(chatml, stops=("\n\nUser:\n",))
    pieces = [stream.push(token) for token in encoded(chatml, "One\n\nUser: two\n\nUser:\nthree")]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == "One\n\nUser: two" and stream.stopped
    assert pieces[: len("One\n\nUser:")] == ["O", "n", "e", *[""] * 7]
    empty = TextStream(chatml, stops=("\n\nUser:\n",))
    assert [empty.push(token) for token in encoded(chatml, "\n\nUser:\nme")][-1] == "" and empty.stopped
    unfinished = TextStream(chatml, stops=("\n\nUser:\n",))
    assert "".join([*map(unfinished.push, encoded(chatml, "One\n\nUse")), unfinished.finish()]) == "One\n\nUse"
