"""Records in milliseconds: what `record_training` makes of the fake learner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from core.config import RunConfig
from core.parity_record import FourBits, Record, RowRecord, certified, record_training
from core.settings import Settings
from tests.fakes import FakeData, FakeLearner

STEPS = 5


def make_settings(**changes: dict[str, Any]) -> Settings:
    plain: dict[str, dict[str, Any]] = {"optim": {"lr": 0.3}, "train": {"accumulation": 2}}
    for name, values in changes.items():
        plain[name] = plain.get(name, {}) | values
    names = {f"{section}.{field}": "--set" for section, values in plain.items() for field in values}
    return Settings(RunConfig.model_validate(plain), names)


def make_record(
    *, backend: str = "cuda", learner: FakeLearner | None = None, rows: FakeData | None = None, **changes: Any
) -> Record:
    config, _ = certified(make_settings(**changes), steps=STEPS)
    learner, data = learner or FakeLearner(dropout=0.0), rows or FakeData()
    data.name = "fake.jsonl"  # type: ignore[attr-defined]
    job: Any = SimpleNamespace(
        config=config.model_copy(update={"backend": backend}),
        data=data,
        identity={"model": "1234"},
        model=SimpleNamespace(name="org/fake"),
        device=SimpleNamespace(device="CPU (2 cores)", packages={"numpy": np.__version__}),
    )
    return record_training(job, learner)


def with_four_bits(rows: RowRecord, *, ids: list[int], added: float) -> FourBits:
    """4-bit losses on the rows `ids`: `added` nats more for each of their targets."""
    places = [rows.row_ids.index(row) for row in ids]
    counts = [rows.num_targets[place] for place in places]

    def raised(nll: list[float]) -> list[float]:
        return [nll[place] + added * count for place, count in zip(places, counts, strict=True)]

    return FourBits("four bits", RowRecord(ids, counts, raised(rows.base_nll), raised(rows.final_nll)))
