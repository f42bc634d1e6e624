"""A plan, as plain data: stages with their places, memory of each model, an estimate, and what to change or to know.

Example::

    plan.fits, [warning.text for warning in plan.warnings], plan.to_json()["stages"]
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from launch.placement import RoleGroup
from launch.planning.cost import Estimate
from launch.planning.memory import EngineMemory, Memory
from launch.planning.nodes import PlanNode


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """Something to change, or to know."""

    text: str
    fatal: bool
    """It would not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Roles that are there at the same time."""

    when: str
    groups: tuple[RoleGroup, ...]
    places: dict[str, dict[str, int]] | None
    """Node -> what (a role's group, in words) -> how many actors of it; None where there are no nodes, or it does not
    fit."""
    missing: str = ""
    """Why not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMemory:
    """Of one GPU (or process) of a role."""

    role: str
    model: str
    memory: Memory | None
    """None where the model's shape is not known: `note` says why."""
    device: str
    """What it is on, in words."""
    available: float | None
    """Bytes; None: not known."""
    engine: EngineMemory | None = None
    note: str = ""
    offloaded_ranks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything."""

    stages: tuple[Stage, ...]
    memory: tuple[ModelMemory, ...]
    estimate: Estimate
    warnings: tuple[Warned, ...]
    nodes: tuple[PlanNode, ...]

    @property
    def fits(self) -> bool:
        """As far as is known."""
        return not any(warning.fatal for warning in self.warnings)

    def to_json(self) -> dict[str, Any]:
        """Plain data; bytes are bytes, times seconds."""
        return {
            "fits": self.fits,
            "warnings": [asdict(warning) for warning in self.warnings],
            "nodes": [
                {"name": n.node.name, "total": dict(n.node.total), "free": n.node.free and dict(n.node.free),
                 "labels": dict(n.node.labels), "gpu": n.gpu, "gpu_gib": n.gpu_gib}
                for n in self.nodes
            ],
            "stages": [
                {
                    "when": stage.when,
                    "roles": [
                        {"role": each.role, "who": each.group.who, "wants": each.group.wants(),
                         "bundles": [dict(bundle) for bundle in each.group.bundles], "strategy": each.group.strategy}
                        for each in stage.groups
                    ],
                    "places": stage.places,
                    "missing": stage.missing,
                }
                for stage in self.stages
            ],
            "memory": [
                {
                    "role": each.role, "model": each.model, "device": each.device, "available_bytes": each.available,
                    "total_bytes": each.memory and each.memory.total, "host_bytes": each.memory and each.memory.host,
                    "parts": [asdict(part) for part in each.memory.parts] if each.memory else [], "note": each.note,
                    **({"kv_bytes_per_token": each.engine.kv_bytes_per_token, "kv_tokens": each.engine.kv_tokens,
                        "sequences": each.engine.sequences} if each.engine else {}),
                }
                for each in self.memory
            ],
            "estimate": [asdict(line) for line in self.estimate.lines],
        }  # fmt: skip
