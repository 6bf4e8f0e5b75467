"""What is compared after training: the base model and the same model with the adapter."""

from __future__ import annotations

from typing import Literal

Side = Literal["base", "adapter"]
SIDES: tuple[Side, ...] = ("base", "adapter")
