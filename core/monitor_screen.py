"""How a run looks in a terminal: the lines of `monitor`, from a `Snapshot`.

Colour carries meaning only (grade, trend, an end that was none) and nothing is lost without it. Below 60 columns the
chart goes, the facts stay; a terminal without UTF-8 gets ASCII.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from core import chart
from core.config import BASE_MODEL, INITIAL_ADAPTER
from core.expert_map import MAP_HEAD, expert_map, experts_facts
from core.monitor import Snapshot
from core.overfitting import GRADES
from core.records import Record, number
from core.run import COMPLETE
from core.verdict import NOT_JUDGED, next_command

NARROW = 60
_FACTS_WIDTH = 36
_MIN_CHART, _MAX_CHART = 6, 22
_DEFAULT_CHART = 12
_SHORT_NAME = 10
_TABLE_ROWS = 8
_MAX_MAP = 16
_LEAST_HEIGHT = 16
"""What a run keeps above the table of many folds."""

_GRADE_STYLES: dict[str, str] = dict(zip(GRADES, ("bold green", "green", "yellow", "bold red"), strict=True))
_STATUS_STYLES = {
    "failed": "bold red",
    "died": "bold red",
    "silent": "yellow",
    "finished": "green",
    "early_stopped": "green",
}
_ASCII = str.maketrans("·●○▼▲━╸─│┤└┬…░▒▓█", "-oxv^==-|+++..:*#")


@dataclass(frozen=True, slots=True)
class Screen:
    """A rich renderable: the whole screen."""

    snapshot: Snapshot
    width: int
    height: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        folds = [] if self.snapshot.folds is None else self.snapshot.folds.lines(self.width)
        room = None if self.height is None else max(self.height - len(folds), _LEAST_HEIGHT)
        for line in [*screen_lines(self.snapshot, self.width, room), *folds]:
            line.truncate(self.width)
            line.no_wrap = True
            line.rstrip()
            if options.ascii_only:
                line.plain = _to_ascii(line.plain)
            yield line


def _to_ascii(text: str) -> str:
    """As many characters, all ASCII: styles stay where they are."""
    plain = text.translate(_ASCII)
    return "".join(
        c if c.isascii() else "." if "\u2801" <= c <= "\u28ff" else " " if c == "\u2800" else "?" for c in plain
    )


def screen_lines(snapshot: Snapshot, width: int, height: int | None = None) -> list[Text]:
    """The screen's lines, `width` cells at most; at most `height` of them where the facts allow."""
    head = [*_title(snapshot, width), *_progress(snapshot, width)]
    facts = _facts(snapshot)
    machine = _flow(_machine(snapshot), width)
    foot = list(_foot(snapshot, width))
    if width < NARROW:
        return _fit([*head, Text(), *facts, Text(), *machine, *foot], height)
    room = None if height is None else height - len(head) - len(machine) - len(foot) - 3
    rows = _DEFAULT_CHART if room is None else max(min(room - 1, _MAX_CHART, width // 4), _MIN_CHART)
    body = _body(snapshot, facts, width, rows)
    table: list[Text] = []
    if snapshot.evaluations and room is not None and room - len(body) >= 4:
        table = [Text(), *_table(snapshot, room - len(body) - 2)]
    left = _MAX_MAP if room is None else min(room - len(body) - len(table) - 2, _MAX_MAP)
    experts = _experts(snapshot, width, left)
    return _fit([*head, Text(), *body, *table, *experts, Text(), *machine, *foot], height)


def _experts(snapshot: Snapshot, width: int, height: int) -> list[Text]:
    """A mixture's heat map under its heading, when there is room for it."""
    lines = expert_map(snapshot.evaluation, width=width, height=height)
    return [Text(), Text(MAP_HEAD, "dim"), *lines] if lines else []


def _fit(lines: list[Text], height: int | None) -> list[Text]:
    """Blank lines go first when there are too many."""
    excess = 0 if height is None else len(lines) - height
    kept: list[Text] = []
    for line in lines:
        if excess > 0 and not line.plain.strip():
            excess -= 1
        else:
            kept.append(line)
    return kept


# --- head -------------------------------------------------------------------------------------------------------------


def _title(snapshot: Snapshot, width: int) -> list[Text]:
    left = Text.assemble(("twinkeel", "bold"), " · ", str(snapshot.folder))
    state = snapshot.state
    rank = state.get("rank")
    precision = str(state.get("precision") or "").split(",")[0]  # of `16-bit, float32 compute, CPU (2 cores)`
    items = [backends_of(state), _short(state.get("model")), precision, rank and f"r{rank}"]
    words = [str(item) for item in items if item]
    status = Text(status_word(snapshot), _STATUS_STYLES.get(snapshot.status, ""))
    space = width if width < NARROW else max(width - left.cell_len - 2, width // 2)
    words = _shortened(words, space - status.cell_len)
    right = Text(" · ").join([*map(Text, words), status])
    if left.cell_len + 2 + right.cell_len <= width:
        return [left + Text(" " * (width - left.cell_len - right.cell_len)) + right]
    left.truncate(width, overflow="ellipsis")
    right.truncate(width, overflow="ellipsis")
    return [left, right]


def backends_of(state: Mapping[str, Any]) -> str:
    """The backend; of a run that moved, all of them: `mlx to step 10, cuda`."""
    last = str(state.get("backend") or "")
    moves = state.get("moves")
    if not isinstance(moves, list) or not all(isinstance(move, dict) for move in moves):
        return last
    before = [(str(move.get("backend")), after.get("from_step")) for move, after in pairwise(moves)]
    return ", ".join([*(f"{backend} to step {step}" for backend, step in before), last])


def _shortened(words: list[str], space: int) -> list[str]:
    """Words that, with " · " behind each, fit: the longest (the model's name) is cut first, then the last go."""
    words = list(words)
    while words and (excess := sum(len(word) + 3 for word in words) - space) > 0:
        longest = max(range(len(words)), key=lambda index: len(words[index]))
        if len(words[longest]) - excess >= _SHORT_NAME:
            words[longest] = words[longest][: -excess - 1] + "…"
        else:
            words.pop()
    return words


def status_word(snapshot: Snapshot) -> str:
    """`running`, or what it is doing; or how it ended."""
    phase = snapshot.state.get("phase")
    if snapshot.status in ("starting", "running") and phase in ("loading", "evaluating", "saving"):
        return str(phase)
    return snapshot.status.replace("_", " ")


def _short(model: object) -> str | None:
    return str(model).rstrip("/").rsplit("/", 1)[-1] if model else None


def _progress(snapshot: Snapshot, width: int) -> list[Text]:
    total = snapshot.total_steps
    if not total:
        return []
    share = min(snapshot.step / total, 1.0)
    steps = f"step {snapshot.step:,}/{total:,}  {_epoch(snapshot)}"
    times = f"{math.floor(share * 100)} %   {clock(snapshot.elapsed_seconds)} gone"
    if snapshot.eta_seconds is not None:
        times += f"  {clock(snapshot.eta_seconds)} left"
    bar = width - len(steps) - len(times) - 6
    if bar < 8:
        return [Text(steps), Text(times)]
    halves = round(share * bar * 2)
    filled = "━" * (halves // 2) + "╸" * (halves % 2)
    return [Text.assemble(steps, "  ", (filled, "bold"), " " * (bar - len(filled)), "    ", times)]


def _epoch(snapshot: Snapshot) -> str:
    epoch, epochs = number(snapshot.state.get("epoch")), number(snapshot.state.get("epochs"))
    if epoch is None or epochs is None:
        return ""
    if epochs != int(epochs):
        return f"epoch {epoch:.2f}/{epochs:g}"
    return f"epoch {min(math.ceil(epoch), int(epochs))}/{int(epochs)}"


def clock(seconds: float | None) -> str:
    """`58:12`, `1:39:41`, `2 d 3:04:05`."""
    if seconds is None:
        return "?"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"


# --- body -------------------------------------------------------------------------------------------------------------


def _body(snapshot: Snapshot, facts: Sequence[Text], width: int, rows: int) -> list[Text]:
    """The chart with its legend on the left, the facts on the right."""
    chart_width = width - _FACTS_WIDTH - 2
    lines = chart.draw(snapshot.loss, snapshot.val, snapshot.probe, width=chart_width, height=rows)
    if lines is None:
        return list(facts)
    left = [*lines, _legend(snapshot)]
    body = []
    for row in range(max(len(left), len(facts))):
        line = left[row].copy() if row < len(left) else Text()
        if row < len(facts):
            line.pad_right(chart_width + 2 - line.cell_len)
            line.append_text(facts[row])
        body.append(line)
    return body


def _legend(snapshot: Snapshot) -> Text:
    """What is drawn, in the words of the facts."""
    names = ((chart.LOSS_MARK, "loss", snapshot.loss), (chart.VAL_MARK, "val", snapshot.val))
    entries = [*names, (chart.PROBE_MARK, "probe", snapshot.probe)]
    legend = Text("    ")
    for mark, name, points in entries:
        if points:
            legend.append(mark * (2 if mark == chart.LOSS_MARK else 1), chart.STYLES[mark]).append(f" {name}   ")
    return legend


def _facts(snapshot: Snapshot) -> list[Text]:
    """`val 1.842 ▼ 0.012` and so on, a line each; only what is known."""
    record, state = snapshot.evaluation, snapshot.state
    rows: list[tuple[str, Text | None]] = [
        ("loss", _loss(snapshot.newest.get("loss"))),
        ("val", _with_trend(snapshot, "val_loss")),
        ("probe", _with_trend(snapshot, "probe_loss")),
        ("gap", _gap(record)),
        ("general", _general(record)),
        ("grade", _grade(snapshot)),
        ("best", _loss(state.get("best_val_loss"), f" at step {state.get('best_step')}")),
        ("patience", _patience(snapshot)),
        (
            "start" if state.get("start") == INITIAL_ADAPTER else "base",
            _loss(state.get("base_val_loss"), " before training"),
        ),
    ]
    return [Text.assemble((f"{name:<9}", "dim"), value) for name, value in rows if value is not None]


def _loss(value: object, after: str = "") -> Text | None:
    loss = number(value)
    return None if loss is None else Text(f"{loss:.3f}{after}")


def _with_trend(snapshot: Snapshot, name: str) -> Text | None:
    line, change = _loss(snapshot.evaluation.get(name)), snapshot.trend(name)
    if line is None or change is None:
        return line
    if abs(change) < 0.0005:
        return line.append("  = same", "dim")
    mark, style = ("▼", "green") if change < 0 else ("▲", "red")
    return line.append(f"  {mark} {abs(change):.3f}", style)


def _gap(record: Record) -> Text | None:
    gap, low, high = (number(record.get(name)) for name in ("gap", "gap_low", "gap_high"))
    if gap is None:
        return None
    interval = "" if low is None or high is None else f"  [{low:.3f}, {high:.3f}]"
    return Text(f"{gap:.3f}{interval}")


def _general(record: Record) -> Text | None:
    """Loss on the general texts, and how much of what the model would say there is something else now."""
    line, flipped = _loss(record.get("general_loss")), number(record.get("general_flipped"))
    return line if line is None or flipped is None else line.append(f"  {100 * flipped:.1f} % flipped")


def _grade(snapshot: Snapshot) -> Text | None:
    """The grade and the bound to the next better one."""
    grade = snapshot.evaluation.get("grade")
    if grade not in GRADES:
        return None
    better = max(GRADES.index(grade) - 1, 0)
    name = "" if grade == GRADES[0] else f"{GRADES[better]} "
    bound = f"({name}< {snapshot.guard.grades[better]:.2f})"
    return Text.assemble((f"{grade} ", _GRADE_STYLES[grade]), (f" {bound}", "dim"))


def _patience(snapshot: Snapshot) -> Text | None:
    if not snapshot.state:
        return None
    left, patience = (snapshot.state.get(name) for name in ("patience_left", "patience"))
    if patience is None:
        return Text("off: no early stopping")
    left = patience if left is None else left
    return Text(f"{left} of {patience} left", "yellow" if left == 1 < patience else "")


def _table(snapshot: Snapshot, room: int) -> list[Text]:
    """The last evaluations, newest last."""
    rows = [Text(f"  {'step':>8}{'val':>9}{'probe':>9}{'gap':>9}  {'interval':<18}grade", "dim")]
    best = snapshot.state.get("best_step")
    for record in snapshot.evaluations[-min(room, _TABLE_ROWS) :]:
        losses = "".join(f"{_three(record.get(name)):>9}" for name in ("val_loss", "probe_loss", "gap"))
        interval = f"[{_three(record.get('gap_low'))}, {_three(record.get('gap_high'))}]"
        grade = str(record.get("grade") or "")
        row = Text(f"  {record['step']:>8,}{losses}  {interval:<18}")
        row.append(f"{grade:<12}", _GRADE_STYLES.get(grade, ""))
        row.append("best" if record["step"] == best else "base model" if record["step"] == 0 else "")
        rows.append(row)
    return rows


def _three(value: object) -> str:
    known = number(value)
    return "?" if known is None else f"{known:.3f}"


# --- foot -------------------------------------------------------------------------------------------------------------


def _machine(snapshot: Snapshot) -> list[str]:
    record, state = snapshot.newest, snapshot.state
    speed, memory, lr, norm = (
        number(record.get(name)) for name in ("tokens_per_second", "memory_gb", "lr", "grad_norm")
    )
    total = number(state.get("memory_total_gb"))
    items = []
    if speed is not None:
        items.append(f"speed {speed:,.0f} tok/s")
    if memory is not None:
        items.append(f"memory {memory:.1f} GB" + (f" of {total:.1f}" if total else ""))
    if lr is not None:
        items.append(f"lr {lr:.2e}")
    if norm is not None:
        items.append(f"grad norm {norm:.2f}")
    if snapshot.next_eval_step is not None:
        steps = snapshot.next_eval_step - snapshot.step
        items.append(f"next eval in {steps} step{'s' * (steps != 1)}")
    items += experts_facts(snapshot.evaluation, start=str(state.get("start") or BASE_MODEL))
    return items


def _flow(items: Iterable[str], width: int) -> list[Text]:
    """Items side by side, on as many lines as they need."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + 3 + len(item) <= width:
            lines[-1] += f"   {item}"
        else:
            lines.append(item)
    return [Text(line) for line in lines]


def _foot(snapshot: Snapshot, width: int) -> Iterable[Text]:
    """Warnings, problems, and how it ended with what to type next."""
    messages = [(f"warning: {text}", "yellow") for text in snapshot.warnings]
    messages += [(f"note: {text}", "dim") for text in snapshot.problems]
    messages += [(text, style) for text, style in _ending(snapshot)]
    for text, style in messages:
        for line in Text(text, style).wrap(_PLAIN, width):
            line.rstrip()
            yield line


def _ending(snapshot: Snapshot) -> Iterable[tuple[str, str]]:
    state, folder = snapshot.state, snapshot.folder
    if snapshot.folds is not None:
        folder = snapshot.folds.folder
    silent = clock(snapshot.silent_seconds)
    resume = f"continue with: python cli.py train --resume {folder}"
    if snapshot.verdict:
        yield snapshot.verdict, "bold"
    if why := state.get("not_judged"):
        yield f"not judged: {why}", "bold"
    if snapshot.status == "died":
        yield f"died: process {state.get('pid')} is gone; last sign of life {silent} ago", "bold red"
    elif snapshot.status == "failed":
        yield f"failed: {state.get('error') or 'see training.log'}", "bold red"
    elif snapshot.status == "silent":
        yield f"no sign of life from {state.get('host')} for {silent}; if it is gone, {resume}", "yellow"
    elif snapshot.status == "running" and snapshot.silent_seconds > 120:
        yield f"alive, but the last update was {silent} ago", "dim"
    if snapshot.folds is not None:
        return  # what to type is said of all of them
    if snapshot.status in ("died", "failed", "interrupted"):
        step = state.get("last_checkpoint_step")
        yield f"{resume}   ({f'from step {step}' if step else 'no checkpoint yet'})", ""
    elif snapshot.status in COMPLETE:
        yield f"next: {next_command(folder, is_judged=not state.get(NOT_JUDGED))}", ""


def evaluation_line(snapshot: Snapshot) -> str:
    """One evaluation for a log: no styles, ASCII."""
    record = snapshot.evaluation
    names = (("val", "val_loss"), ("probe", "probe_loss"), ("gap", "gap"))
    losses = "  ".join(f"{name} {_three(record.get(field))}" for name, field in names)
    left = f"  {clock(snapshot.eta_seconds)} left" if snapshot.eta_seconds is not None else ""
    run = "" if snapshot.folds is None else f"{snapshot.folder.name}  "
    return f"{run}step {record.get('step')}/{snapshot.total_steps or '?'}  {losses}  {record.get('grade')}{left}"


_PLAIN = Console(width=80, file=None, force_terminal=False, no_color=True)
