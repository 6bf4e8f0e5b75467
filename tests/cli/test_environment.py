"""What the command line tells the numerical libraries before they are loaded."""

from __future__ import annotations

import pytest

import cli

GROWING = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
OURS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000", **GROWING}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, OURS),
        ({"GOMP_SPINCOUNT": "7"}, {**OURS, "GOMP_SPINCOUNT": "7"}),
        (
            {"OMP_WAIT_POLICY": "ACTIVE"},
            {"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_ALLOC_CONF": OURS["PYTORCH_ALLOC_CONF"]},
        ),
        ({"PYTORCH_ALLOC_CONF": "a:1"}, {**OURS, "PYTORCH_ALLOC_CONF": "a:1"}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "a:1", "OMP_WAIT_POLICY": "ACTIVE"},
            {"PYTORCH_CUDA_ALLOC_CONF": "a:1", "OMP_WAIT_POLICY": "ACTIVE"},
        ),
    ],
)
def test_what_the_user_has_set_stays(given: dict[str, str], expected: dict[str, str]) -> None:
    environment = dict(given)
    cli._prepare_libraries(environment)
    assert environment == expected
