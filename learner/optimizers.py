"""Which parameter is trained by which rule, and the optimizer for an engine that does not shard it.

"muon": Muon (https://kellerjordan.github.io/posts/muon/, scaled to AdamW's update size as in arXiv 2502.16982) on the
matrices of the layers, AdamW on everything else; "adamw": AdamW on all. Every group carries `base_lr`; the learning
rate of a step is `base_lr` times the schedule's factor. What ZeRO shards is flat, so under ZeRO 1 to 3 Muon is
DeepSpeed's own (`learner.deepspeed_backend`), fed with the same groups.

Example::

    groups = parameter_groups(model, config)
    optimizer = MuonAdamW(groups)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon

from learner.config import LearnerConfig


def parameter_groups(model: nn.Module, config: LearnerConfig) -> list[dict[str, Any]]:
    """Groups for `MuonAdamW` and for DeepSpeed's Muon: `params`, `kind`, `lr`, `base_lr`, `weight_decay`, ... .

    Muon's matrices are grouped by shape: what makes its update as large as AdamW's (0.2 * sqrt(longer side)) depends on
    it.
    """
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        embeddings |= {id(p) for p in head.parameters()}
    matrices: dict[tuple[int, int], list[nn.Parameter]] = {}
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim == 2 and id(parameter) not in embeddings
        if is_matrix and config.optimizer == "muon":
            matrices.setdefault((parameter.shape[0], parameter.shape[1]), []).append(parameter)
        else:
            (decayed if is_matrix else rest).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "kind": "muon",
            "use_muon": True,
            "shape": shape,
            "base_lr": config.muon_lr,
            "lr": config.muon_lr,
            "momentum": config.muon_momentum,
            "weight_decay": config.weight_decay,
        }
        for shape, parameters in sorted(matrices.items())
    ]
    for parameters, decay in ((decayed, config.weight_decay), (rest, 0.0)):
        if parameters:
            groups.append(
                {
                    "params": parameters,
                    "kind": "adamw",
                    "use_muon": False,
                    "base_lr": config.lr,
                    "lr": config.lr,
                    "betas": tuple(config.betas),
                    "eps": 1e-8,
                    "weight_decay": decay,
                }
            )
    return groups


def rescale_for_unit_muon(group: dict[str, Any]) -> dict[str, Any]:
    """A Muon group for an implementation that scales its update by sqrt(max(1, rows / columns)), such as DeepSpeed's.

    The learning rate takes up the difference to 0.2 * sqrt(longer side), and the decay is divided by what that adds.
    """
    rows, columns = group["shape"]
    factor = 0.2 * math.sqrt(max(rows, columns)) / math.sqrt(max(1.0, rows / columns))
    return {
        **group,
        "base_lr": group["base_lr"] * factor,
        "lr": group["lr"] * factor,
        "weight_decay": group["weight_decay"] / factor,
    }


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW as one optimizer over the groups of `parameter_groups`."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self._parts: list[torch.optim.Optimizer] = []
        self._link()

    def _link(self) -> None:
        """Let each rule work on this optimizer's own groups and state, so that schedules and checkpoints see one of
        each."""
        muon = [group for group in self.param_groups if group["kind"] == "muon"]
        adamw = [group for group in self.param_groups if group["kind"] == "adamw"]
        parts: list[torch.optim.Optimizer] = []
        if muon:
            parts.append(Muon([{"params": group["params"]} for group in muon], adjust_lr_fn="match_rms_adamw"))
        if adamw:
            parts.append(AdamW([{"params": group["params"]} for group in adamw], fused=True))
        for part, groups in zip(parts, [groups for groups in (muon, adamw) if groups], strict=True):
            for group in groups:
                for key, value in part.defaults.items():
                    group.setdefault(key, value)
            part.param_groups = groups
            part.state = self.state
        self._parts = parts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._link()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure")
        for part in self._parts:
            part.step()
