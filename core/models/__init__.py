"""From what a user writes under `model.path` to a folder that both backends can read."""

from core.models.hub import hub_reachable
from core.models.reference import QUICKSTART_MODEL
from core.models.resolve import ResolvedModel, resolve_model

__all__ = ["QUICKSTART_MODEL", "ResolvedModel", "hub_reachable", "resolve_model"]
