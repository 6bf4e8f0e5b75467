"""What a run's summary says, while it is still true of the run."""

from __future__ import annotations

from typing import Any

from core.files import read_json
from core.monitor import Snapshot
from core.run import ENDED, SUMMARY


def summary_of(snapshot: Snapshot) -> dict[str, Any]:
    """`training_summary.json` of a run that has ended; empty where there is none, or it is damaged.

    A run that was resumed has the summary of when it stopped until it ends again; if it is killed, it never ends.
    """
    found = read_json(snapshot.folder / SUMMARY)
    return found if isinstance(found, dict) and snapshot.status in ENDED else {}
