"""The check as one HTML file that needs nothing else: facts, findings, and rows token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from data.check.findings import Finding, FoundRow
from data.check.pieces import Piece
from data.check.report import Report

MAX_PIECES = 1500
"""Pieces of a row that are shown."""


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row on the page."""

    split: str
    number: int
    """Counted from 1, as in `data show`."""
    origin: str
    num_tokens: int
    num_targets: int
    pieces: Sequence[Piece]
    cut: str = ""
    """Where the row was cut off, in words; empty if it is whole."""


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Nothing is loaded from anywhere."""


HEAD_LENGTH = 200
"""Characters of a file in which `is_page` finds what it looks for."""
_MARK = '<meta name="generator" content="twinkeel data check">'


def is_page(head: str) -> bool:
    """Whether a file that begins so was written by `make_page`."""
    return _MARK in head


def make_page(report: Report, rows: Iterable[ShownRow], *, total_rows: int) -> str:
    """The whole page. `total_rows`: rows of the data set, of which `rows` are some."""
    shown = list(rows)
    name = escape(report.facts.name)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{_MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{name} · data check</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{name}</h1><p class="dim">{_summary(report)}</p></header>
<main>
<section aria-labelledby="facts"><h2 id="facts">Facts</h2>{_facts(report)}</section>
<section aria-labelledby="findings"><h2 id="findings">Findings</h2>{_findings(report, shown)}</section>
<section aria-labelledby="expect"><h2 id="expect">What to expect</h2>
{"".join(f"<p>{_words(line)}</p>" for line in report.expectations)}</section>
<section aria-labelledby="rows"><h2 id="rows">Rows</h2>{_rows(shown, total_rows)}</section>
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _words(text: str) -> str:
    """Escaped, with what stands in backticks as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _summary(report: Report) -> str:
    counts = [(len(report.of_level(level)), level) for level in ("problem", "warning", "note")]
    parts = [f"{num} {level}{'' if num == 1 else 's'}" for num, level in counts if num]
    return escape(" · ".join([report.facts.format or "data", *(parts or ["nothing found"])]))


def _facts(report: Report) -> str:
    facts = report.facts
    lines = "".join(
        f"<tr><th scope='row'>{escape(split)}{' <small>given</small>' if some.is_given else ''}</th>"
        f"<td>{some.rows:,}</td><td>{some.tokens:,}</td><td>{some.targets:,}</td></tr>"
        for split, some in facts.splits.items()
        if some.rows
    )
    quantiles = " · ".join(f"{value:,} {escape(key)}" for key, value in facts.quantiles.items())
    return (
        "<table><thead><tr><th scope='col'>split</th><th scope='col'>rows</th><th scope='col'>tokens</th>"
        f"<th scope='col'>targets</th></tr></thead><tbody>{lines}</tbody></table>"
        f"<p>Tokens a row: {quantiles}. Cut off at {facts.max_tokens:,}: {facts.share_cut:.1%} of the rows.</p>"
        f"{_histogram(facts.histogram, facts.max_tokens)}{_labels(report)}"
    )


def _histogram(bars: Sequence[tuple[int, int, int]], max_tokens: int) -> str:
    most = max((rows for _, _, rows in bars), default=0)
    lines = []
    for low, high, rows in bars:
        is_cut = low > max_tokens
        label = f"{low:,}–{high:,}"
        width = 100 * rows / most if most else 0
        lines.append(
            f"<tr><th scope='row'>{label}</th><td class='bar'><span class='{'cut' if is_cut else ''}' "
            f"style='width:{width:.1f}%'></span></td><td>{rows:,}</td></tr>"
        )
    return f"<table class='bars'><caption>Tokens a row</caption><tbody>{''.join(lines)}</tbody></table>"


def _labels(report: Report) -> str:
    labels = list(report.facts.labels.items())
    if not labels:
        return ""
    listed = " · ".join(f"{escape(label)} {rows:,}" for label, rows in labels[:12])
    more = f" · and {len(labels) - 12} more" if len(labels) > 12 else ""
    return f"<p>Labels: {listed}{more}</p>"


def _findings(report: Report, shown: Sequence[ShownRow]) -> str:
    if not report.findings:
        return "<p>Nothing found.</p>"
    links = {row.origin: _anchor(row) for row in shown}
    return "".join(_finding(finding, links) for finding in report.findings)


def _finding(finding: Finding, links: dict[str, str]) -> str:
    rows = "".join(
        f"<li>{_link(row, links)}{f' <span class=dim>{escape(row.detail)}</span>' if row.detail else ''}</li>"
        for row in finding.rows
    )
    more = finding.num_rows - len(finding.rows)
    rest = f"<li class='dim'>and {more:,} more</li>" if rows and more > 0 else ""
    listed = f"<details><summary>rows</summary><ul>{rows}{rest}</ul></details>" if rows else ""
    hint = f"<p class='hint'>{_words(finding.hint)}</p>" if finding.hint else ""
    return (
        f"<article class='finding {finding.level}'><p><b>{finding.level}</b> {_words(finding.text)}</p>"
        f"{hint}{listed}</article>"
    )


def _link(row: FoundRow, links: dict[str, str]) -> str:
    names = row.names or (row.origin,)
    made = [f"<a href='#{links[name]}'>{escape(name)}</a>" if name in links else escape(name) for name in names]
    return " and ".join(made)


def _rows(shown: Sequence[ShownRow], total_rows: int) -> str:
    splits = dict.fromkeys(row.split for row in shown)
    options = "".join(f"<option>{escape(split)}</option>" for split in splits)
    return (
        f"<p>{len(shown):,} of {total_rows:,} rows are on this page: the first, and those that findings name. "
        "<code>python cli.py data show N</code> shows any row.</p>"
        "<p class='legend'><span class='t p'>prompt</span> <span class='t a'>target: what is learned</span> "
        "<span class='t p s'>special token</span></p>"
        f"<form id='go'><label>Row <input id='number' inputmode='numeric' size='6'></label> "
        f"<label>of <select id='split'>{options}</select></label> <button>Show</button> "
        "<output id='said'></output></form>"
        f"{''.join(_row(row) for row in shown)}"
    )


def _anchor(row: ShownRow) -> str:
    return f"{row.split}-{row.number}"


def _row(row: ShownRow) -> str:
    shown = row.pieces[:MAX_PIECES]
    tokens = "".join(map(_token, shown))
    rest = row.num_tokens - sum(piece.num_tokens for piece in shown)
    more = f"<span class='dim'> … {rest:,} more tokens</span>" if rest > 0 else ""
    cut = f"<p class='cutoff'>✂ {escape(row.cut)}</p>" if row.cut else ""
    return (
        f"<article class='row' id='{escape(_anchor(row))}'><h3>{escape(row.split)} {row.number} "
        f"<small>{escape(row.origin)} · {row.num_tokens:,} tokens, {row.num_targets:,} targets</small></h3>"
        f"<p class='tokens'>{tokens}{more}</p>{cut}</article>"
    )


def _token(piece: Piece) -> str:
    kind = f"t {'a' if piece.is_target else 'p'}{' s' if piece.is_special else ''}"
    tag = "u" if piece.is_target else "span"
    text = escape(piece.text).replace("\n", "⏎<br>").replace("\t", "⇥\t")
    return f"<{tag} class='{kind}'>{text or '∅'}</{tag}>"


_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c1e21;--dim:#61666d;--line:#d9dce0;--soft:#f4f5f7;--bar:#7a93b8;
--target:#0b5d33;--target-bg:#dff3e6;--problem:#b3261e;--warning:#8a5a00;--note:#3b5b8c}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--fg:#e4e6e9;--dim:#9aa0a8;--line:#33373d;--soft:#1e2125;
--bar:#5f7ba6;--target:#9fe0b9;--target-bg:#16372a;--problem:#ff8a80;--warning:#e8b64c;--note:#9dbbea}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:60rem;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:.5rem 0 0}h2{font-size:1.1rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:0 0 .5rem}
p{margin:.4rem 0}small,.dim,.hint{color:var(--dim)}small{font-weight:400}
table{border-collapse:collapse;margin:.5rem 0}th,td{padding:.15rem .9rem .15rem 0;text-align:right;font-weight:400}
th[scope=row],th:first-child{text-align:left}thead th,caption{color:var(--dim);text-align:left}
thead th:not(:first-child){text-align:right}
.bars{width:100%}.bars th{white-space:nowrap;width:1%}.bars td:last-child{width:1%;padding-right:0;white-space:nowrap}
.bars th,.bars td:last-child,thead,code{overflow-wrap:normal}
.bar span{display:block;height:.8rem;background:var(--bar);min-width:1px}.bar .cut{background:var(--problem)}
.finding{border-left:4px solid var(--note);background:var(--soft);padding:.4rem .8rem;margin:.5rem 0}
.problem{border-color:var(--problem)}.warning{border-color:var(--warning)}
.problem b{color:var(--problem)}.warning b{color:var(--warning)}.note b{color:var(--note)}
ul{margin:.3rem 0;padding-left:1.2rem}a{color:inherit}
.row{border-top:1px solid var(--line);padding:.8rem 0;scroll-margin-top:.5rem}.row:target{background:var(--soft)}
.tokens{font:14px/1.9 ui-monospace,monospace;white-space:pre-wrap;margin:0}
.t{border-right:1px solid var(--line);padding:.1em 0;text-decoration:none}.p{color:var(--dim)}
.a{color:var(--target);background:var(--target-bg);text-decoration:underline;text-underline-offset:.25em}
.s{font-style:italic;font-weight:600}.cutoff{color:var(--problem)}
.legend .t{font-family:ui-monospace,monospace;font-size:14px;border:0}
input,select,button{font:inherit;padding:.2rem .4rem;color:inherit;background:var(--soft);
border:1px solid var(--line);border-radius:4px}
"""
_SCRIPT = """
document.getElementById("go").addEventListener("submit", function (event) {
  event.preventDefault();
  var split = document.getElementById("split").value;
  var number = parseInt(document.getElementById("number").value, 10);
  var isHere = document.getElementById(split + "-" + number) !== null;
  document.getElementById("said").textContent = isHere ? "" :
    "not on this page: python cli.py data show " + (number || 1) + " --split " + split;
  if (isHere) { location.hash = split + "-" + number; }
});
"""
