"""Every trained parameter's fp32 master and optimizer state as whole tensors, whatever ZeRO has made of them.

DeepSpeed keeps them whole (ZeRO 0), as fragments of one flat tensor per parameter group (1, 2), or as every rank's
share of each parameter (3). `trained_state` hides which: checkpoints written through it can be loaded by any number of
ranks and any stage, and are not tied to DeepSpeed's own files (those refuse another number of ranks; its "universal"
checkpoints are converted by a program beside the run, and know neither LoRA's frozen weights nor Muon's momentum).

It reads what DeepSpeed 0.19's optimizers hold, by their attribute names; the tests of checkpoints train every stage.
`whole`, `put` and `show` are called by all ranks together, in the same order.

Example::

    state = trained_state(engine, student, zero_stage=2)
    for name in state.names():
        state.whole(name, MASTER)                       # [*shape] fp32, on every rank
        {key: state.whole(name, key) for key in state.keys(name)}
    state.put(name, MASTER, value); state.show()        # the model's weights follow their masters
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

MASTER = "master"
"""The fp32 weight itself, beside the optimizer's own keys ("exp_avg", "exp_avg_sq", "momentum_buffer")."""
_STEP = "step"


class TrainedState(Protocol):
    """One rank's view."""

    def names(self) -> list[str]:
        """Of the trained parameters, in the module's order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def keys(self, name: str) -> list[str]:
        """Of the optimizer's tensors for it, sorted; [] before its first step."""
        ...

    def updates(self, name: str) -> float | None:
        """Optimizer steps that it has taken; None where the optimizer does not count."""
        ...

    def begin(self, name: str, keys: Sequence[str], updates: float | None) -> None:
        """Make room for the optimizer's tensors, as if it had taken so many steps."""
        ...

    def whole(self, name: str, key: str) -> torch.Tensor:
        """[*shape] fp32 on this rank's device. Do not write into it."""
        ...

    def put(self, name: str, key: str, value: torch.Tensor) -> None:
        """`value`: [*shape], the same on every rank; each keeps its part."""
        ...

    def shards(self) -> list[torch.Tensor]:
        """What this rank's optimizer steps on: fp32, together all masters (padding included)."""
        ...

    def show(self) -> None:
        """Copy the masters into the weights that the model computes with."""
        ...


def trained_state(engine: Any, student: Any, *, zero_stage: int) -> TrainedState:
    """The view for an engine of that stage."""
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if zero_stage == 0:
        return _WholeState(engine.optimizer, parameters)
    if zero_stage < 3:
        return _FlatState(engine.optimizer, parameters)
    return _SharedOutState(engine.optimizer, parameters)


class _State:
    """What the three have in common."""

    def __init__(self, optimizer: Any, inner: Any, parameters: dict[str, Any]) -> None:
        self._zero = optimizer
        self._inner = inner
        self._parameters = parameters

    def names(self) -> list[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        parameter = self._parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def keys(self, name: str) -> list[str]:
        state = self._inner.state.get(self._stepped(name), {})
        return sorted(key for key in state if key != _STEP)

    def updates(self, name: str) -> float | None:
        step = self._inner.state.get(self._stepped(name), {}).get(_STEP)
        return None if step is None else float(step)

    def begin(self, name: str, keys: Sequence[str], updates: float | None) -> None:
        import torch

        tensor = self._stepped(name)
        state = self._inner.state[tensor]
        for key in keys:
            if key not in state:
                state[key] = self._empty(name, key)
        if updates is None:
            return
        if type(self._inner).__name__ == "MuonWithAuxAdam":
            state[_STEP] = int(updates)  # DeepSpeed's counts in Python
        else:
            fused = any(group.get("fused") for group in self._inner.param_groups)
            state[_STEP] = torch.tensor(updates, dtype=torch.float32, device=tensor.device if fused else "cpu")

    def _empty(self, name: str, key: str) -> torch.Tensor:
        import torch

        return torch.zeros_like(self._stepped(name), requires_grad=False)

    def _stepped(self, name: str) -> Any:
        """The tensor that the inner optimizer knows."""
        raise NotImplementedError


class _WholeState(_State):
    """ZeRO 0: the model's parameters are their own masters."""

    def __init__(self, optimizer: Any, parameters: dict[str, Any]) -> None:
        super().__init__(optimizer, optimizer, parameters)

    def _stepped(self, name: str) -> Any:
        return self._parameters[name]

    def whole(self, name: str, key: str) -> torch.Tensor:
        parameter = self._parameters[name]
        return (parameter if key == MASTER else self._inner.state[parameter][key]).detach()

    def put(self, name: str, key: str, value: torch.Tensor) -> None:
        self.whole(name, key).copy_(value)

    def shards(self) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in self._parameters.values()]

    def show(self) -> None:
        pass


class _FlatState(_State):
    """ZeRO 1 and 2: a rank steps on its stretch of each group's flat tensor, padded at the end."""

    def __init__(self, optimizer: Any, parameters: dict[str, Any]) -> None:
        super().__init__(optimizer, optimizer.optimizer, parameters)
        self._group = {id(p): i for i, group in enumerate(optimizer.bit16_groups) for p in group}

    def _stepped(self, name: str) -> Any:
        return self._zero.single_partition_of_fp32_groups[self._group[id(self._parameters[name])]]

    def _empty(self, name: str, key: str) -> torch.Tensor:
        import torch

        if key != "momentum_buffer":
            return super()._empty(name, key)
        # DeepSpeed's Muon keeps the whole momentum of each parameter that this rank has a stretch of.
        group = self._zero.params_in_partition[self._group[id(self._parameters[name])]]
        return torch.zeros(sum(p.numel() for p in group), dtype=torch.float32, device=self._stepped(name).device)

    def _momentum(self, parameter: Any, buffer: torch.Tensor) -> torch.Tensor | None:
        """The parameter's whole momentum, [numel]; None where this rank has no stretch of it."""
        start = 0
        for other in self._zero.params_in_partition[self._group[id(parameter)]]:
            if other is parameter:
                return buffer.narrow(0, start, parameter.numel())
            start += other.numel()
        return None

    def _fragment(self, name: str, key: str) -> tuple[torch.Tensor, int] | None:
        """This rank's part of it and where in the whole it starts."""
        parameter = self._parameters[name]
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        stepped = self._stepped(name).detach()
        if key == MASTER:
            return stepped.narrow(0, flat.start, flat.numel), whole.start
        buffer = self._inner.state[self._stepped(name)][key]
        if key == "momentum_buffer":
            momentum = self._momentum(parameter, buffer)
            assert momentum is not None
            return momentum.narrow(0, whole.start, whole.numel), whole.start
        return buffer.narrow(0, flat.start, flat.numel), whole.start

    def whole(self, name: str, key: str) -> torch.Tensor:
        import torch

        parameter = self._parameters[name]
        gathered = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        fragment = self._fragment(name, key)
        if fragment is not None:
            values, start = fragment
            gathered.narrow(0, start, values.numel()).copy_(values)
        torch.distributed.all_reduce(gathered, group=parameter._dp_group)
        return gathered.view(parameter.shape)

    def put(self, name: str, key: str, value: torch.Tensor) -> None:
        parameter = self._parameters[name]
        if key == "momentum_buffer":
            momentum = self._momentum(parameter, self._inner.state[self._stepped(name)][key])
            if momentum is not None:
                momentum.copy_(value.flatten())
            return
        fragment = self._fragment(name, key)
        if fragment is not None:
            values, start = fragment
            values.copy_(value.flatten().narrow(0, start, values.numel()))

    def shards(self) -> list[torch.Tensor]:
        return [flat.detach() for flat in self._zero.single_partition_of_fp32_groups]

    def show(self) -> None:
        self._zero.update_lp_params()


class _SharedOutState(_State):
    """ZeRO 3: a rank steps on its share of each parameter, padded where it does not divide."""

    def __init__(self, optimizer: Any, parameters: dict[str, Any]) -> None:
        super().__init__(optimizer, optimizer.optimizer, parameters)

    def _stepped(self, name: str) -> Any:
        group, _, _ = self._zero.grad_position[self._zero.get_param_id(self._parameters[name])]
        return self._zero.fp32_partitioned_groups_flat[group]

    def whole(self, name: str, key: str) -> torch.Tensor:
        return self._zero.get_full_hp_param(self._parameters[name], None if key == MASTER else key)

    def put(self, name: str, key: str, value: torch.Tensor) -> None:
        import torch

        parameter = self._parameters[name]
        share = parameter.ds_tensor.numel()
        start = share * torch.distributed.get_rank(parameter.ds_process_group)
        values = value.flatten()[start : start + share]
        padded = torch.nn.functional.pad(values, (0, share - values.numel()))
        self._zero.set_local_hp_param(padded, parameter, None if key == MASTER else key)

    def shards(self) -> list[torch.Tensor]:
        return [flat.detach() for flat in self._zero.fp32_partitioned_groups_flat]

    def show(self) -> None:
        zero = self._zero
        zero._partition_all_parameters()
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
