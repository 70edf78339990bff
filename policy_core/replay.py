"""A ring of one's own transitions, for off-policy learning. Prior data lies elsewhere and is never evicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from policy_core.rollout import Transitions


@dataclass
class Replay:
    """The latest `capacity` transitions, flat tensors allocated at the first `add`.

    returns   [capacity] discounted, from each decision to its episode's end; -inf until that is known, which leaves
              Cal-QL's values as they are
    """

    capacity: int
    held: int = 0
    position: int = 0
    columns: Transitions | None = None
    returns: Tensor | None = None

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {self.capacity}")

    def __len__(self) -> int:
        return self.held

    def add(self, transitions: Transitions) -> Tensor:
        """Take transitions [N] in, over the oldest ones; returns where each lies now, [N] int.

        Raises ValueError if they are more than the ring holds.
        """
        count = len(transitions)
        if count > self.capacity:
            raise ValueError(f"{count} transitions do not fit into a replay of {self.capacity}")
        if self.columns is None:
            empty = {f.name: _empty(getattr(transitions, f.name), self.capacity) for f in fields(transitions)}
            self.columns = Transitions(**empty)
            self.returns = torch.full((self.capacity,), -torch.inf)
        assert self.returns is not None
        where = (self.position + torch.arange(count)) % self.capacity
        for field in fields(transitions):
            getattr(self.columns, field.name)[where] = getattr(transitions, field.name)
        self.returns[where] = -torch.inf
        self.position = (self.position + count) % self.capacity
        self.held = min(self.held + count, self.capacity)
        return where

    def draw(self, size: int, generator: torch.Generator) -> tuple[Transitions, Tensor]:
        """Transitions [size] at random, with replacement, and their returns. Raises ValueError if it is empty."""
        if self.columns is None or self.returns is None:
            raise ValueError("the replay is empty")
        rows = torch.randint(self.held, (size,), generator=generator)
        return self.columns.select(rows), self.returns[rows]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: what is held, no more."""
        state: dict[str, Any] = {"held": self.held, "position": self.position}
        if self.columns is not None and self.returns is not None:
            columns = {f.name: getattr(self.columns, f.name)[: self.held].clone() for f in fields(self.columns)}
            state |= {"columns": columns, "returns": self.returns[: self.held].clone()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        if "columns" in state:
            self.held = self.position = 0
            self.columns = self.returns = None
            where = self.add(Transitions(**state["columns"]))
            assert self.returns is not None
            self.returns[where] = state["returns"]
        self.held, self.position = state["held"], state["position"]


def _empty(column: Tensor, capacity: int) -> Tensor:
    return column.new_zeros((capacity, *column.shape[1:]))
