"""Writes docs/settings.md from the docstrings in core/config.py. `--check` exits 1 when the file differs."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.settings import describe_fields, preset_names, resolve, values  # noqa: E402

HEAD = """# Settings

Made from `core/config.py` by `python docs/make_settings.py`. Every count of steps is in optimiser steps.

Weakest first: defaults, `--preset NAME`, `--config FILE`, `--set section.field=value`, flags such as `--lr`. A YAML
file may `extends:` a preset or another file. `python cli.py config show …` prints what comes out, and where from.
"""


def text() -> str:
    defaults = dict(values(resolve().config))
    lines = [
        HEAD,
        f"Presets: {', '.join(f'`{name}`' for name in preset_names())}.\n",
        "| setting | default | meaning |",
    ]
    lines.append("|---|---|---|")
    for name, meaning in describe_fields().items():
        default = defaults[name]
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        lines.append(f"| `{name}` | `{shown}` | {meaning.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    target = ROOT / "docs" / "settings.md"
    if "--check" in sys.argv[1:]:
        return int(target.read_text(encoding="utf-8") != text())
    target.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
