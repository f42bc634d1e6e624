"""What of an engine goes into a checkpoint and comes out of it: masters, optimizer state, the average.

Between `learner.trained_state` (whole tensors) and `learner.checkpoints` (files). Frozen weights are not saved: they
are at `model_path`.

Example::

    store.write_part(name, rank, tensors_of(state, average, rank=0, world_size=2), facts=facts_of(state, average))
    restore(state, average, store.open(name), store.facts(name)[0], device)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from learner.trained_state import MASTER, TrainedState

if TYPE_CHECKING:
    import torch

    from learner.checkpoints import TensorFiles
    from learner.ema import Average

_AVERAGE = "average"


def tensors_of(
    state: TrainedState, average: Average | None, *, rank: int, world_size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(key/parameter, CPU tensor) of every `world_size`-th parameter, for this rank to write. All ranks gather all of
    them together, so every rank must exhaust it."""
    import torch

    with torch.no_grad():
        for i, name in enumerate(state.names()):
            for key in (MASTER, *state.keys(name)):
                value = state.whole(name, key)
                if i % world_size == rank:
                    yield f"{key}/{name}", value.to("cpu", copy=True)
        if average is None:
            return
        with average.in_place():
            for i, name in enumerate(state.names()):
                value = state.whole(name, MASTER)
                if i % world_size == rank:
                    yield f"{_AVERAGE}/{name}", value.to("cpu", copy=True)


def facts_of(state: TrainedState, average: Average | None) -> dict[str, Any]:
    """What `restore` needs beside the tensors; JSON-able, the same on every rank."""
    return {
        "parameters": {name: {"keys": state.keys(name), "updates": state.updates(name)} for name in state.names()},
        "average": None if average is None else average.updates,
    }


def restore(
    state: TrainedState, average: Average | None, tensors: TensorFiles, facts: Mapping[str, Any], device: Any
) -> None:
    """Put it back, on every rank. An average that the checkpoint does not have begins at its weights. Raises ValueError
    when the checkpoint is of another model."""
    import torch

    saved = facts["parameters"]
    if set(saved) != set(state.names()):
        raise ValueError(f"{sorted(set(saved).symmetric_difference(state.names()))[:3]} differ")
    for name in state.names():
        shape = tuple(tensors[f"{MASTER}/{name}"].shape)
        if shape != state.shape(name):
            raise ValueError(f"{name} is {list(shape)} there and {list(state.shape(name))} here")
    with torch.no_grad():
        for name, fact in saved.items():
            state.begin(name, fact["keys"], fact["updates"])
            for key in (MASTER, *fact["keys"]):
                state.put(name, key, tensors[f"{key}/{name}"].to(device))
        if average is not None and facts["average"] is not None:
            average.updates = facts["average"]
            with average.in_place():
                for name in state.names():
                    state.put(name, MASTER, tensors[f"{_AVERAGE}/{name}"].to(device))
        elif average is not None:
            average.restart()
        state.show()
