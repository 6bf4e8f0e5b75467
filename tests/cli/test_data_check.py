"""`data check` and `data show`, as a person calls them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import backends
from core.adapter import plan_adapter
from core.architecture import read_architecture
from core.config import LoraConfig, MoeConfig, RunConfig
from core.protocols import DeviceReport
from core.workflow.data_check import planned_parameters
from data.check.page import MAX_PIECES
from tests.cli.conftest import Result
from tests.data.made_rows import clean_rows
from tests.tiny import make_model

RunCli = Callable[..., Result]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return write(tmp_path / "clean.jsonl", clean_rows(150))


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A bad line, an answer that is cut off, mojibake, an exact copy."""
    rows = clean_rows(150)
    rows[20]["completion"] *= 9
    rows[30]["completion"] = "A cafÃ© by the lake."
    rows[40] = rows[2]
    path = write(tmp_path / "faulty.jsonl", rows)
    path.write_text(path.read_text() + "{no\n")
    return path


def test_a_clean_file_ends_with_the_command_to_train(run_cli: RunCli, model: Path, clean: Path) -> None:
    done = run_cli("data", "check", "--model", model, "--data", clean)
    assert done.code == 0
    assert "clean.jsonl   prompt and completion" in done.out
    assert "nothing found" in done.out
    assert done.out.rstrip().splitlines()[-1].split() == [
        *("next", "python", "cli.py", "train", "--model", str(model), "--data", str(clean)),
    ]


def test_findings_are_named_by_file_and_line(run_cli: RunCli, model: Path, faulty: Path) -> None:
    done = run_cli("data", "check", "--model", model, "--data", faulty, "--max-tokens", 512)
    assert done.code == 0
    assert "1 problem, 2 warnings, 1 note" in done.out
    levels = re.findall(r"^(problem|warning|note) ", done.out, re.MULTILINE)
    assert levels == ["problem", "warning", "warning", "note"]
    assert "line 151: not JSON" in done.out
    assert re.search(r"faulty\.jsonl:21: \d+ of \d+ target tokens cut off", done.out)
    assert "faulty.jsonl:31: 'Ã©'" in done.out
    assert "faulty.jsonl:41 and faulty.jsonl:3" in done.out
    assert re.search(r"next +python cli\.py data show \d+ .*--max-tokens 512", done.out)


def test_it_fits_a_narrow_terminal(run_cli: RunCli, model: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.chdir(faulty.parent)  # a long path can't be broken
    done = run_cli("data", "check", "--model", model, "--data", faulty.name, "--max-tokens", 512)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.out)
    findings = plain[plain.index("1 problem") : plain.index("next ")]
    assert max(map(len, findings.splitlines())) <= 80


def test_json_for_scripts(run_cli: RunCli, model: Path, faulty: Path) -> None:
    done = run_cli("data", "check", "--model", model, "--data", faulty, "--max-tokens", 512, "--json")
    report = json.loads(done.out)
    assert set(report) == {"facts", "findings", "expectations"}
    assert set(report["facts"]) == {
        *("name", "format", "splits", "max_tokens", "quantiles", "histogram", "share_cut", "share_lost", "labels"),
        "num_parameters",
    }
    kinds = [finding["kind"] for finding in report["findings"]]
    assert kinds == ["bad-rows", "truncated", "mojibake", "exact-copies"]
    assert set(report["findings"][0]) == {"kind", "level", "text", "hint", "num_rows", "rows"}
    assert report["findings"][2]["rows"] == [
        {"origin": "faulty.jsonl:31", "detail": "'Ã©'", "names": ["faulty.jsonl:31"]}
    ]
    splits = report["facts"]["splits"]
    assert splits["train"]["rows"] + splits["validation"]["rows"] == 150
    assert all(isinstance(line, str) for line in report["expectations"])


@pytest.mark.parametrize("as_json", [False, True])
def test_strict_ends_with_1_when_something_is_found(run_cli: RunCli, model: Path, faulty: Path, as_json: bool) -> None:
    done = run_cli("data", "check", "--model", model, "--data", faulty, "--strict", *(["--json"] if as_json else []))
    assert done.code == 1
    if as_json:
        assert json.loads(done.out)
    else:
        assert done.out.rstrip().splitlines()[-1] == "data.strict: bad-rows, mojibake"


def test_a_strict_run_does_not_start_where_the_check_ends_with_1(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [*clean_rows(60), {"prompt": "a", "completion": ""}])
    given = ("--model", model, "--data", rows, "--strict", "--set", "data.skip_bad=true")
    assert run_cli("data", "check", *given).code == 1
    done = run_cli("train", *given)
    assert done.code == 2
    assert re.search(r"this run is strict: 1 bad row left out: .*line 61: completion is empty", done.err)


def test_strict_lets_notes_pass(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    rows = clean_rows(150)
    rows[40] = rows[2]
    done = run_cli("data", "check", "--model", model, "--data", write(tmp_path / "n.jsonl", rows), "--strict")
    assert done.code == 0
    assert "1 note" in done.out


def test_a_page_of_facts_findings_and_rows(run_cli: RunCli, model: Path, faulty: Path, tmp_path: Path) -> None:
    page = tmp_path / "deep" / "page.html"
    done = run_cli("data", "check", "--model", model, "--data", faulty, "--max-tokens", 512, "--page", page)
    assert done.code == 0
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://", text)
    shown = re.findall(r"<small>([\w.]+:\d+) ·", text)
    assert {"faulty.jsonl:21", "faulty.jsonl:31", "faulty.jsonl:41", "faulty.jsonl:3"} <= set(shown)
    assert 50 <= len(shown) <= 54
    assert re.search(r"href='#(train|validation)-\d+'>faulty\.jsonl:31<", text)
    assert "✂ cut off here, at data.max_tokens 512: " in text


def test_a_page_replaces_a_page_and_no_other_file(run_cli: RunCli, model: Path, clean: Path, tmp_path: Path) -> None:
    before = clean.read_bytes()
    done = run_cli("data", "check", "--model", model, "--data", clean, "--page", clean)
    assert (done.code, clean.read_bytes()) == (2, before)
    assert "exists and is no page of this check" in done.err
    page = tmp_path / "page.html"
    for _ in range(2):
        assert run_cli("data", "check", "--model", model, "--data", clean, "--page", page).code == 0


def test_a_page_that_cant_be_written(run_cli: RunCli, model: Path, clean: Path, tmp_path: Path) -> None:
    done = run_cli("data", "check", "--model", model, "--data", clean, "--page", tmp_path)
    assert done.code == 2
    assert "--page" in done.err


def test_a_row_is_shown_with_exactly_its_targets(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"Say {n}?", "completion": f"It is\n{n}."} for n in range(20)])
    done = run_cli("data", "show", 2, "--model", model, "--data", rows)
    assert done.code == 0
    head, shown = done.out.partition("train 2 · ")[2].split("\n", 1)
    number = int(re.match(r"rows\.jsonl:(\d+)", head)[1]) - 1  # type: ignore[index]
    targets = re.findall(r"⟦(.*?)⟧", shown, re.DOTALL)
    assert [text.replace("│", "").replace("⏎\n", "\n") for text in targets] == [f"It is\n{number}.<|im_end|>"]
    plain = re.sub("[│⟦⟧]", "", shown).replace("⏎\n", "\n")
    assert plain.startswith(f"<|im_start|>user\nSay {number}?<|im_end|>\n<|im_start|>assistant\nIt is")
    num_tokens, num_targets = map(int, re.findall(r"(\d+) (?:tokens|of them)", head))
    assert num_targets == targets[0].count("│") + 1
    assert num_tokens == shown.count("│") + 2  # none before the first token, and none before the first target


def test_a_row_that_is_cut_off_is_marked(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"Say {n}?", "completion": f"{n} " * 60} for n in range(20)])
    done = run_cli("data", "show", 1, "--split", "validation", "--model", model, "--data", rows, "--max-tokens", 96)
    assert re.search(r"^✂ cut off here, at data\.max_tokens 96: \d+ of \d+ target tokens cut off$", done.out, re.M)


def test_a_long_row_is_shown_whole_and_on_the_page_in_part(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    words = clean_rows(1)[0]["prompt"]
    rows = [*clean_rows(30), {"prompt": f"{words} " * 20 + "gold?", "completion": "Silver."}]
    given = ("--model", model, "--data", write(tmp_path / "rows.jsonl", rows), "--max-tokens", 8192)
    page = tmp_path / "page.html"
    run_cli("data", "check", *given, "--page", page)
    text = page.read_text(encoding="utf-8")
    split, number, num_tokens = re.search(r"<h3>(\w+) (\d+) <small>rows\.jsonl:31 · ([\d,]+) tokens", text).groups()  # type: ignore[union-attr]
    rest = int(re.search(r"… ([\d,]+) more tokens", text)[1].replace(",", ""))  # type: ignore[index]
    assert rest == int(num_tokens.replace(",", "")) - MAX_PIECES
    done = run_cli("data", "show", number, "--split", split, *given)
    assert "Silver." in done.out.replace("│", "")
    assert "✂" not in done.out


@pytest.mark.parametrize("cut", ["max_tokens", "page"])
def test_half_a_secret_is_not_shown(run_cli: RunCli, model: Path, tmp_path: Path, cut: str) -> None:
    secret = "ghp_" + "a1B2c3D4e5F6g7H8i9J0" + "k1L2m3N4o5P6q7R8"
    before = "Look: " + "ab " * 480
    rows = [{"prompt": f"Say {n}?", "completion": f"{before}{'cd' * n} {secret} and on"} for n in range(9)]
    max_tokens = 1490 if cut == "max_tokens" else 4096
    given = ("--model", model, "--data", write(tmp_path / "rows.jsonl", rows), "--max-tokens", max_tokens)
    page = tmp_path / "page.html"
    run_cli("data", "check", *given, "--page", page)
    shown = [run_cli("data", "show", number, *given).out for number in (1, 2, 3)] if cut == "max_tokens" else []
    for text in (re.sub("<[^>]*>", "", page.read_text(encoding="utf-8")), *shown):
        assert "ghp" not in re.sub("[│⟦⟧]", "", text)


def test_control_characters_do_not_reach_the_terminal(run_cli: RunCli, model: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"\x1b[2J{n}\x9b", "completion": f"{n}\r\tx"} for n in range(9)])
    done = run_cli("data", "show", 1, "--model", model, "--data", rows)
    assert not re.search("[\x1b\x9b\r\t]", done.out)
    assert "␛" in done.out
    assert "<U+009B>" in done.out


def test_no_such_row(run_cli: RunCli, model: Path, clean: Path) -> None:
    done = run_cli("data", "show", 151, "--model", model, "--data", clean)
    assert (done.code, "there is no row 151 of train" in done.err) == (2, True)
    done = run_cli("data", "show", 1, "--split", "test", "--model", model, "--data", clean)
    assert (done.code, "there are no test rows" in done.err) == (2, True)


def test_without_an_installed_backend(
    run_cli: RunCli, model: Path, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = DeviceReport(
        backend="cuda", available=False, device="", accelerator=False, memory_bytes=0, problem="no torch"
    )
    monkeypatch.setattr(type(backends.get("cuda")), "probe", lambda self, device="auto": absent)
    assert run_cli("train", "--backend", "cuda", "--model", model, "--data", clean).code == 2
    assert run_cli("data", "check", "--backend", "cuda", "--model", model, "--data", clean).code == 0


@pytest.mark.parametrize(
    ("lora", "router"),
    [
        (LoraConfig(rank=4), False),
        (LoraConfig(rank=3, targets="all-linear", frozen_fraction=0.5), False),
        (LoraConfig(rank=2, targets=["q_proj", "down_proj"]), True),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_parameters_are_counted_as_they_are_drawn(
    tmp_path: Path, lora: LoraConfig, router: bool, model_type: str
) -> None:
    architecture = read_architecture(make_model(tmp_path / "model", model_type=model_type, num_layers=3))
    config = RunConfig(lora=lora, moe=MoeConfig(train_router=router))
    drawn = plan_adapter(lora, architecture, seed=0, router=router)
    assert planned_parameters(config, architecture) == drawn.num_parameters
