"""The report's page: what it says, that it needs nothing else, and that everybody can read it."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import UserError
from core.folds import FOLDS
from core.general import GeneralReport
from core.journal import Journal
from core.protocols import RowLosses
from core.report.page import DataSection, PageFinding, is_page, make_page
from core.report.report import RunReport, read_report
from core.report.rows import JudgedHistory, read_rows, rows_section
from core.report.sections import forgetting_section
from core.row_losses import write_row_losses
from core.run import write_split
from tests.core.pages import Page
from tests.core.run_folders import make_run

EVIL = "<script>alert('x')</script>&amp;\"'"


def page_of(folder: Path, *, data: DataSection | None = None, texts: dict[tuple[str, int], str] | None = None) -> str:
    report = read_report(folder)
    judged = read_rows(report)
    rows = judged
    if isinstance(judged, JudgedHistory):
        rows = rows_section(judged, texts=texts or {}, without_texts="")
    return make_page(report, rows=rows, data=data or DataSection(missing="The data are gone."))


def facts(page: Page, section: str) -> dict[str, str]:
    part = page.section(section)
    return {term.words: text.words for term, text in zip(part.all("dt"), part.all("dd"), strict=True)}


def memorising_run(folder: Path, **changes: Any) -> Path:
    """Rows of 20 tokens: 30 held-out ones fall from 3 to 2, but one rises; of 20 probe rows two fall much further."""
    rng = np.random.default_rng(0)
    count = 20
    steps = {0: 1.0, 10: 0.0, 20: 0.05}
    made = make_run(folder, targets=[count] * 30, **changes)
    for step, left in steps.items():
        val = 2.0 + left + rng.normal(0.0, 0.02, 30)
        probe = 2.0 + left + rng.normal(0.0, 0.02, 20)
        if step:
            val[4] = 3.6
            probe[[3, 7]] = (0.2, 0.4)
        counts = np.full(30, count)
        write_row_losses(
            made,
            step,
            validation=RowLosses(np.arange(30), val * count, counts),
            probe=RowLosses(np.arange(20), probe * count, counts[:20]),
        )
    rows = [("train", row, f"d.jsonl:{row + 1}") for row in range(20)]
    write_split(made, [*rows, *(("validation", row, f"d.jsonl:{101 + row}") for row in range(30))])
    return made


def full_evaluation(folder: Path, label: str = "yes") -> None:
    """All that `evaluate` may have found."""
    side = {"accuracy": 0.75, "precision": 0.8, "recall": 0.7, "f1": 0.72, "f1_low": 0.6, "f1_high": 0.83}
    classes = {label: {"f1": 0.9, "support": 30}, "no": {"f1": 0.54, "support": 10}}
    text = {"category": "facts", "prompt": f"2 + 2 {EVIL}", "answer": "4", "rise": 1.25}
    report = {
        "data": "d.jsonl",
        "split": "test",
        "losses": {
            "base": {"loss": 3.0, "perplexity": 20.086},
            "adapter": {"loss": 2.0, "perplexity": 7.389},
            "gain": 1.0,
            "gain_low": 0.8,
            "gain_high": 1.2,
            "p_value": 0.0004,
            "num_rows": 40,
            "num_targets": 80,
        },
        "classification": {
            "labels": [label, "no"],
            "base": {**side, "f1": 0.31, "per_class": classes, "confusion": [[5, 20, 5], [3, 6, 1]]},
            "adapter": {**side, "per_class": classes, "confusion": [[28, 1, 1], [4, 6, 0]], "unreadable": 0.025},
            "f1_gain": 0.41,
            "f1_gain_low": 0.2,
            "f1_gain_high": 0.6,
            "p_value": 0.013,
            "verdict": "better than the base model",
        },
        "text": {"base": {"exact_match": 0.1, "rouge_l": 0.2}, "adapter": {"exact_match": 0.3, "rouge_l": 0.4}},
        "rows": {"worst": [{"origin": f"{EVIL}:9", "base_loss": 1.0, "adapter_loss": 1.5, "difference": 0.5}]},
        "general": {
            "verdict": "forgotten",
            "num_rows": 200,
            "base_loss": 2.5,
            "adapter_loss": 2.75,
            "rise": 0.25,
            "rise_low": 0.2,
            "rise_high": 0.3,
            "kl": 0.4,
            "flipped": 0.123,
            "categories": {"facts": {"base_loss": 2.0, "adapter_loss": 2.4, "rise": 0.4, "kl": 0.1, "flipped": 0.1}},
            "worst": [text],
        },
        "gate": {"keep": False, "line": "Don't keep it: forgotten", "reasons": []},
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation_report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = memorising_run(tmp_path_factory.mktemp("report") / "run", settings={"optim": {"lr": 1e-3}})
    full_evaluation(folder)
    return folder


@pytest.fixture(scope="module")
def full_source(full_run: Path) -> str:
    finding = PageFinding("warning", f"3 copies {EVIL}", "take them out", (f"d.jsonl:3 {EVIL}",))
    return page_of(full_run, data=DataSection(lines=("a line",), findings=[finding]), texts={("train", 3): EVIL})


@pytest.fixture(scope="module")
def full_page(full_source: str) -> Page:
    return Page(full_source)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_sections_stand_in_their_order_and_the_verdict_first(full_page: Page) -> None:
    names = [part.attributes["aria-labelledby"] for part in full_page.all("section")]
    assert names == [
        *("verdict", "curves", "rows", "evaluation", "forgetting", "data", "settings", "environment", "next"),
    ]
    links = [link.attributes["href"] for link in full_page.all("nav")[0].all("a")]
    assert links == [f"#{name}" for name in names[1:]]


def test_the_verdict_is_that_of_the_run(full_page: Page) -> None:
    verdict = full_page.section("verdict")
    assert verdict.all("p")[0].words == "Good generalization. Train/val loss difference: 0.10"
    assert "good" in verdict.attributes["class"].split()
    assert facts(full_page, "verdict") == {
        "validation loss": "3.000 → 2.000 (best at epoch 1, step 10)",
        "gap": "0.100 [0.080, 0.130] GOOD (0.020 before training)",
        "trained on": "33 rows (3 + 30), 1,234 target tokens, 1:05, 321 tok/s, 1.5 GB",
    }
    also = [line.words for line in verdict.all("li")]
    assert also[0].startswith("Memorised: 2 of 20 training rows looked at fell further")
    assert also[1] == "Forgotten: the loss on general texts moved by +0.250 [0.200, 0.300]"
    assert also[2] == "Don't keep it: forgotten"


def test_memorised_and_worse_rows_are_named_with_their_text(full_page: Page) -> None:
    memorised, worse = (table for table in full_page.section("rows").all("table"))
    rows = [[cell.words for cell in row.children] for row in memorised.all("tr")]
    assert rows[0] == ["row", "before", "best step", "last", "too far by", "text"]
    assert [row[0] for row in rows[1:]] == ["d.jsonl:4", "d.jsonl:8"]
    assert rows[1][2:4] == ["0.200", "0.200"] and rows[1][5] == " ".join(EVIL.split())
    assert [row.all("th")[0].words for row in worse.all("tr")[1:]] == ["d.jsonl:105"]


def test_the_evaluation_is_shown(full_page: Page) -> None:
    part = full_page.section("evaluation")
    lines = [line.words for line in part.all("p")]
    assert lines[1] == "Gain 1.000 [0.800, 1.200] nats per token (p < 0.001)."
    assert lines[2] == "F1 gain 0.410 [0.200, 0.600] (p = 0.013): better than the base model."
    tables = {table.all("caption")[0].words: table for table in part.all("table")}
    scores = tables["Answers: precision, recall and F1 are means over the labels"].all("tr")
    assert [cell.words for cell in scores[2].children] == [
        *("adapter", "0.750", "0.800", "0.700", "0.720", "0.025", "[0.600, 0.830]"),
    ]
    confusion = tables["Answers of the adapter, by true label"]
    assert [cell.words for cell in confusion.all("tr")[0].children] == ["true label", "yes", "no", "unreadable"]
    assert [cell.words for cell in confusion.all("tr")[1].children] == ["yes", "28", "1", "1"]
    assert [cell.words for cell in confusion.all("td") if cell.attributes.get("class") == "hit"] == ["28", "6"]


def test_what_was_forgotten_is_shown(full_page: Page) -> None:
    assert facts(full_page, "forgetting") == {
        "loss": "2.500 → 2.750 nats per token",
        "divergence from the base": "0.400 nats per token",
        "most likely token changed": "12.3 %",
        "texts": "200",
    }


def test_what_was_forgotten_is_said_as_evaluate_says_it() -> None:
    figures = {
        "num_rows": 1,
        "num_targets": 9,
        "base_loss": 2.0,
        "adapter_loss": 2.5,
        "rise": 0.5,
        "kl": 0.1,
        "flipped": 0.2,
    }
    ends = {"rise_low": 0.4, "rise_high": 0.6, "confidence": 0.95}
    found = GeneralReport(**figures, **ends, categories={}, worst=[])
    section = forgetting_section(json.loads(json.dumps(found.to_dict())))
    assert section is not None and section.headline == found.lines[0]
    assert "rose by 0.500 [+0.400, +0.600]" in section.headline


def test_settings_that_differ_come_first_with_the_defaults(full_page: Page) -> None:
    first, second = full_page.section("settings").all("table")
    assert [[cell.words for cell in row.children] for row in first.all("tr")[1:]] == [["optim.lr", "0.001", "0.0002"]]
    others = {row.children[0].words for row in second.all("tr")[1:]}
    assert {"lora.rank", "guard.grades"} <= others and "optim.lr" not in others


def test_the_evaluations_stand_in_a_table_as_well(full_page: Page) -> None:
    table = full_page.section("curves").all("details")[0].all("table")[0]
    assert [cell.words for cell in table.all("tr")[2].children] == [
        *("10", "1.00", "2.000", "1.900", "0.100", "[0.080, 0.130]", "GOOD"),
    ]


def test_the_environment_is_the_runs_and_not_todays(full_page: Page) -> None:
    found = facts(full_page, "environment")
    assert (found["device"], found["versions"]) == ("CPU (2 cores)", "not in the run's files")


def test_versions_and_moves_are_shown_where_they_are_known(tmp_path: Path) -> None:
    moves = [{"backend": "mlx", "device": "M2", "from_step": 0}, {"backend": "cuda", "device": "A10", "from_step": 7}]
    folder = make_run(tmp_path / "run", state={"versions": {"torch": "1.2.3"}, "moves": moves})
    found = dict(read_report(folder).environment)
    assert found["versions"] == "torch 1.2.3"
    assert found["moved"] == "mlx on M2 from step 0; cuda on A10 from step 7"


# --- runs of every kind -----------------------------------------------------------------------------------------------


def test_a_run_that_is_no_better_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", summary={"best_val_loss": 3.5})
    report = read_report(folder)
    assert report.verdict.headline.startswith("No better than the base model") and report.verdict.tone == "bad"


def test_an_interval_that_reaches_into_another_grade_is_a_part_of_the_gap(tmp_path: Path) -> None:
    report = read_report(make_run(tmp_path / "run", summary={"gap_high": 0.4}))
    assert dict(report.verdict.facts)["gap"] == (
        "0.100 [0.080, 0.400] GOOD (0.020 before training); the interval reaches into CRITICAL: 4 validation rows "
        "can't tell these grades apart"
    )


def test_a_failed_run_says_why_and_how_to_go_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", status="failed", state={"error": f"out of memory {EVIL}"})
    page = Page(page_of(folder))
    assert page.section("verdict").all("p")[0].words == f"Failed at step 20: out of memory {EVIL}"
    assert page.section("next").all("code")[0].words == f"python cli.py train --resume {folder}"


def test_an_interrupted_run_has_its_verdict_so_far(tmp_path: Path) -> None:
    report = read_report(make_run(tmp_path / "run", status="interrupted", summary={"status": "interrupted"}))
    assert "interrupted at 20 of 20" in dict(report.verdict.facts)["validation loss"]
    assert report.commands[0][0] == "go on"


def test_a_killed_run_without_a_summary_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", status="running", state={"best_val_loss": 2.0, "base_val_loss": 3.0})
    (folder / "training_summary.json").unlink()
    report = read_report(folder)
    assert report.verdict.headline == "Its process ended without a word: step 20 of 20."
    assert dict(report.verdict.facts)["validation loss"] == "3.000 → 2.000 (best so far, step 10)"
    Page(page_of(folder))


def test_a_summary_of_before_a_resume_is_not_the_verdict(tmp_path: Path) -> None:
    """A run that goes on has the summary of when it stopped."""
    folder = make_run(tmp_path / "run", status="running", state={"host": "elsewhere"})
    report = read_report(folder)
    assert report.verdict.headline == "Not finished (running): step 20 of 20." and not report.summary


def test_an_evaluation_of_an_earlier_adapter_is_not_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    full_evaluation(folder)
    assert read_report(folder).evaluation  # of an adapter that is gone, and no other is there
    (folder / "adapters").mkdir()
    (folder / "adapters" / "adapter_model.safetensors").write_bytes(b"now")
    page = Page(page_of(folder))
    assert page.section("evaluation").all("p")[0].words == (
        "Not shown: the evaluation does not say of which adapter it is and is left out; again: "
        f"python cli.py evaluate {folder}"
    )
    assert "Forgotten" not in page.section("verdict").words
    assert f"python cli.py evaluate {folder}" in [code.words for code in page.section("next").all("code")]


def test_a_run_before_its_first_record_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", status="failed", state={"error": "no memory"})
    for name in ("metrics.jsonl", "training_summary.json", "split.csv"):
        (folder / name).unlink()
    for path in (folder / "row_losses").iterdir():
        path.unlink()
    page = Page(page_of(folder))
    assert "No evaluation and no training loss were recorded yet." in page.section("curves").words
    assert "not recorded" in page.section("rows").words


def test_a_run_that_holds_nothing_out_has_no_gap(tmp_path: Path) -> None:
    reason = "every row was trained on"
    folder = make_run(tmp_path / "run", state={"not_judged": reason}, summary={"not_judged": reason})
    journal = Journal(folder)
    journal.append({"step": 0, "probe_loss": 3.0})
    journal.append({"step": 10, "loss": 2.0, "probe_loss": 1.5})
    journal.close()
    page = Page(page_of(folder))
    assert page.section("verdict").all("p")[0].words == "Not judged: every row was trained on"
    assert "nothing is held out to judge by" in page.section("curves").words


def test_damaged_row_losses_don_t_stop_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "row_losses" / "step10.safetensors").write_bytes(b"broken")
    assert "can't be read" in Page(page_of(folder)).section("rows").words


def test_folds_are_refused_and_one_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / FOLDS).write_text("{}")
    with pytest.raises(UserError, match="folds") as caught:
        read_report(folder)
    assert f"report {folder}/fold-1" in str(caught.value)


def test_a_mixture_has_its_experts(tmp_path: Path) -> None:
    even = {"entropy": 1.0, "entropy_min": 1.0, "entropy_min_layer": 0, "moved_max": 0.0, "moved_max_layer": 0}
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    journal = Journal(folder)
    shares = {0: [[0.25] * 4] * 2, 10: [[0.7, 0.1, 0.1, 0.1], [0.25] * 4]}
    for step, layers in shares.items():
        routing = {**even, "collapsed": [], "shares": layers}
        journal.append({"step": step, "val_loss": 2.0, "probe_loss": 1.9, "routing": routing})
    journal.close()
    part = Page(page_of(folder)).section("experts")
    assert [chart.all("figcaption")[0].words for chart in part.all("figure")] == ["Before training", "At step 10"]
    before, after = (chart.all("svg")[0] for chart in part.all("figure"))
    cells = [
        {path.attributes["class"]: path.attributes["d"].count("M") for path in chart.all("path")}
        for chart in (before, after)
    ]
    # 0.7 of the choices is 2.8 times an even share, 0.1 is 0.4 times
    assert cells == [{"h2": 8}, {"h1": 3, "h2": 4, "h4": 1}]
    rows = [[cell.words for cell in row.children] for row in part.all("table")[0].all("tr")[1:]]
    entropy = -(0.7 * np.log(0.7) + 0.3 * np.log(0.1)) / np.log(4)
    assert rows == [
        ["0", "1.000", f"{entropy:.3f}", "0 (70.0%)", "0.450"],
        ["1", "1.000", "1.000", "0 (25.0%)", "0.000"],
    ]


def test_a_long_run_with_many_rows_stays_small(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, 20_001):
        record: dict[str, Any] = {"step": step, "epoch": step / 1000, "loss": 2.0 + float(rng.normal())}
        if step % 20 == 0:
            gap = float(rng.normal(0.1, 0.02))
            record |= {
                "val_loss": 2.0 + gap,
                "probe_loss": 2.0,
                "gap": gap,
                "gap_low": gap - 0.05,
                "gap_high": gap + 0.05,
            }
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for path in (folder / "row_losses").iterdir():
        path.unlink()
    for step in (0, *(100, 200, 300)):
        nll = rng.normal(40.0, 8.0, 10_000)
        counts = np.full(10_000, 20)
        probe = RowLosses(np.arange(200), nll[:200], counts[:200])
        write_row_losses(folder, step, validation=RowLosses(np.arange(10_000), nll, counts), probe=probe)
    source = page_of(folder)
    assert len(source.encode()) < 400_000
    page = Page(source)
    table = page.section("curves").all("details")[0].all("table")[0]
    assert "240 of 1,000 evaluations" in table.all("caption")[0].words
    assert [row.children[0].words for row in table.all("tr")][-1] == "20,000"


# --- that it needs nothing, and that everybody can read it ------------------------------------------------------------


def test_nothing_is_loaded_from_anywhere(full_page: Page, full_source: str) -> None:
    assert not [tag for tag in ("script", "link", "img", "iframe", "object", "embed", "base") if full_page.all(tag)]
    for element in full_page.elements:
        for name, value in element.attributes.items():
            assert name not in ("src", "srcset", "action", "background", "poster") and not name.startswith("on"), name
            if name in ("href", "xlink:href"):
                assert value.startswith("#")
                assert value == "#main" or value[1:] in {one.attributes.get("id") for one in full_page.elements}
    styles = [*(style.text for style in full_page.all("style")), *re.findall(r'style="([^"]*)"', full_source)]
    assert not any(word in style for style in styles for word in ("url(", "@import", "//"))
    policy = next(meta for meta in full_page.all("meta") if "http-equiv" in meta.attributes)
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_what_comes_from_rows_and_files_is_text(full_page: Page, full_source: str) -> None:
    assert "<script" not in full_source
    shown = full_page.root.words
    assert shown.count("<script>alert('x')</script>&amp;\"'") == 5  # a row, an origin, a text, a finding, its row


def test_headings_step_down_one_at_a_time(full_page: Page) -> None:
    levels = [int(element.tag[1]) for element in full_page.elements if re.fullmatch(r"h[1-6]", element.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_pictures_say_what_they_show(full_page: Page) -> None:
    ids = [element.attributes["id"] for element in full_page.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    drawn = [chart for chart in full_page.all("svg") if chart.attributes.get("aria-hidden") != "true"]
    assert len(drawn) == 4
    for chart in drawn:
        assert chart.attributes["role"] == "img"
        title, words = chart.attributes["aria-labelledby"].split()
        assert chart.all("title")[0].attributes["id"] == title and chart.all("desc")[0].attributes["id"] == words
        assert len(chart.all("desc")[0].words) > 20
    assert "2.000 at step 10" in drawn[0].all("desc")[0].words


def test_tables_name_their_cells(full_page: Page) -> None:
    for table in full_page.all("table"):
        assert table.all("caption")[0].words
        head, *rows = table.all("tr")
        assert all(cell.tag == "th" and cell.attributes["scope"] == "col" for cell in head.children)
        assert all(row.children[0].tag == "th" and row.children[0].attributes["scope"] == "row" for row in rows)
        assert {len(row.children) for row in rows} == {len(head.children)}


def test_it_can_be_used_without_a_mouse(full_page: Page) -> None:
    assert full_page.all("html")[0].attributes["lang"] == "en"
    skip = full_page.all("body")[0].children[0]
    assert (skip.tag, skip.attributes["href"]) == ("a", "#main") and full_page.all("main")[0].attributes["id"] == "main"
    scrolling = [part for part in full_page.all("div") if part.attributes.get("class") == "scroll"]
    assert scrolling and all(part.attributes["tabindex"] == "0" and part.attributes["aria-label"] for part in scrolling)


def test_it_is_known_as_a_report(full_source: str, full_run: Path) -> None:
    assert is_page(full_source[:200]) and not is_page((full_run / "config.yaml").read_text()[:200])


def test_the_report_is_read_once_for_all(full_run: Path) -> None:
    report = read_report(full_run)
    assert isinstance(report, RunReport) and [record["step"] for record in report.evaluations] == [0, 10, 20]
    assert report.training == ((10.0, 2.1), (20.0, 2.3000000000000003))
