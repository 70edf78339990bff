"""The one data structure of on-policy learning (`Rollout`) and that of offline learning (`Transitions`).

A row is an environment slot or a token sequence, a column is one *decision*. Adapters own the shapes of
observations and actions; nothing here, or in the algorithms, asks which body made the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

Nested = Tensor | Mapping[str, Any]
"""A tensor, or a mapping of names to nested tensors, with the same leading dimensions throughout."""


def map_nested(function: Callable[[Tensor], Tensor], nested: Nested) -> Nested:
    """Apply `function` to every tensor of `nested`, keeping its structure."""
    if isinstance(nested, Tensor):
        return function(nested)
    return {name: map_nested(function, value) for name, value in nested.items()}


def leaves(nested: Nested) -> list[Tensor]:
    """All tensors of `nested`, in the order of its keys."""
    if isinstance(nested, Tensor):
        return [nested]
    return [leaf for value in nested.values() for leaf in leaves(value)]


def split_rows(nested: Nested, size: int | list[int]) -> list[Any]:
    """Views of consecutive blocks of at most `size` rows, or of these sizes, each structured as `nested`."""
    if isinstance(nested, Tensor):
        return list(nested.split(size))
    columns = [split_rows(value, size) for value in nested.values()]
    return [dict(zip(nested, blocks, strict=True)) for blocks in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Rollout:
    """Decisions of a policy and what came of them; all tensors lead with [B, T].

    observations, actions   nested, [B, T, ...]
    rewards                 [B, T] float; a chunk of decisions holds its own discounted sum
    terminated              [B, T] bool; the episode ended here and has no future value
    truncated               [B, T] bool; the episode was cut here, but its state has a future value
    mask                    [B, T] bool; True = the policy chose this decision, it counts
    discount                [B, T] float; gamma**j for a decision that lasted j steps, gamma for a token
    old_log_probs           [B, T] or [B, T, F]; of the policy that acted
    episode                 [B, T] int; -1 on padding; a row may hold several episodes
    ref_log_probs           as old_log_probs, of a frozen reference policy
    behaviour_log_probs     as old_log_probs, of the sampling engine where it differs from the policy (`mismatch`)
    factor_mask             [B, T, F] bool; which factors (action dimensions, chunk steps) were executed
    values, next_values     [B, T]; next_values[t] is the value at the same episode's next decision or, at a cut
                            or at the end of the row, at the true next observation; ignored where terminated
    group                   [B, T] int; prompt, or task and seed
    """

    observations: Nested
    actions: Nested
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    mask: Tensor
    discount: Tensor
    old_log_probs: Tensor
    episode: Tensor
    ref_log_probs: Tensor | None = None
    behaviour_log_probs: Tensor | None = None
    factor_mask: Tensor | None = None
    values: Tensor | None = None
    next_values: Tensor | None = None
    group: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[B, T]."""
        return self.rewards.shape[0], self.rewards.shape[1]

    def validate(self) -> None:
        """Raise ValueError naming the first rule of the structure that is broken."""
        shape = self.rewards.shape
        if len(shape) != 2:
            raise ValueError(f"rewards must be [B, T], got {tuple(shape)}")
        for name in ("observations", "actions"):
            for leaf in leaves(getattr(self, name)):
                if leaf.shape[:2] != shape:
                    raise ValueError(f"{name} must lead with {tuple(shape)}, got {tuple(leaf.shape)}")
        for name in (
            "terminated",
            "truncated",
            "mask",
            "discount",
            "episode",
            "values",
            "next_values",
            "group",
        ):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
        for name in ("terminated", "truncated", "mask"):
            if getattr(self, name).dtype != torch.bool:
                raise ValueError(f"{name} must be bool, got {getattr(self, name).dtype}")
        log_prob_shape = self.old_log_probs.shape
        if log_prob_shape[:2] != shape or len(log_prob_shape) > 3:
            raise ValueError(f"old_log_probs must be [B, T] or [B, T, F], got {tuple(log_prob_shape)}")
        for name in ("ref_log_probs", "behaviour_log_probs", "factor_mask"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != log_prob_shape:
                raise ValueError(f"{name} must be {tuple(log_prob_shape)}, got {tuple(tensor.shape)}")
        if (self.mask & (self.episode < 0)).any():
            raise ValueError("mask is True on padding (episode -1)")
        self._validate_cuts()

    def _validate_cuts(self) -> None:
        """Cuts lie on decisions, and an episode that ends inside a row ends with one.

        The scan of `gae` relies on it: its carry must not cross from one episode into the one before.
        """
        cut = self.terminated | self.truncated
        if (cut & ~self.mask).any():
            raise ValueError("a cut lies on a masked column: call credit_decisions first")
        following = next_decision(self.mask)  # [B, T], T where none
        width = self.rewards.shape[1]
        inside = self.mask & (following < width)
        next_episode = self.episode.gather(1, following.clamp(max=width - 1))
        if (inside & (next_episode != self.episode) & ~cut).any():
            raise ValueError("an episode is followed by another one without being terminated or truncated")
        if (inside & (next_episode == self.episode) & cut).any():
            raise ValueError("an episode goes on after it was terminated or truncated")

    def select(self, rows: Tensor) -> Rollout:
        """The rollout of the given rows, [N] int."""
        return self._map(lambda tensor: tensor.index_select(0, rows))

    def decisions(self) -> Rollout:
        """Every counted decision as a row of its own, [N, 1]: for policies that judge decisions one by one.

        Order is row by row. Returns and advantages must have been computed before (the columns are gone).
        """
        if self.mask.all():
            return self._map(lambda tensor: tensor.flatten(0, 1).unsqueeze(1))
        index = self.mask.flatten().nonzero().squeeze(1)
        return self._map(lambda tensor: tensor.flatten(0, 1).index_select(0, index).unsqueeze(1))

    def to(self, device: torch.device | str) -> Rollout:
        """The rollout on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _present(self) -> dict[str, Any]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Rollout:
        mapped: dict[str, Any] = {name: map_nested(function, value) for name, value in self._present().items()}
        return Rollout(**mapped)


def next_decision(mask: Tensor) -> Tensor:
    """[B, T] -> [B, T] int: column of the first decision after each column; T where there is none."""
    width = mask.shape[1]
    columns = torch.arange(width, device=mask.device).expand_as(mask)
    here = torch.where(mask, columns, width)
    from_here_on = here.flip(1).cummin(1).values.flip(1)
    return torch.cat([from_here_on[:, 1:], torch.full_like(here[:, :1], width)], dim=1)


def last_decision(mask: Tensor) -> Tensor:
    """[B, T] -> [B, T] int: column of the last decision at or before each column; -1 where there is none."""
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return torch.where(mask, columns, -1).cummax(1).values


def credit_decisions(rollout: Rollout) -> Rollout:
    """Move rewards and cut flags from masked columns to the decision that they follow.

    What falls on a column that the policy did not choose (an environment's token, a forced step) is moved,
    undiscounted, to the last decision of the same episode. Padding is cleared.

    Raises ValueError where an episode has no decision before the moved reward or flag.
    """
    inside = rollout.episode >= 0
    stray = inside & ~rollout.mask
    target = last_decision(rollout.mask)
    reachable = (target >= 0) & (rollout.episode.gather(1, target.clamp(min=0)) == rollout.episode)
    moves = stray & ((rollout.rewards != 0) | rollout.terminated | rollout.truncated)
    if (moves & ~reachable).any():
        row, column = (moves & ~reachable).nonzero()[0].tolist()
        raise ValueError(f"row {row}, column {column}: a reward or a cut has no decision of its episode before it")
    target = target.clamp(min=0)

    def moved(kept: Tensor, stray_part: Tensor) -> Tensor:
        return kept.scatter_add(1, target, stray_part)

    zero = torch.zeros_like(rollout.rewards)
    rewards = moved(torch.where(rollout.mask, rollout.rewards, zero), torch.where(moves, rollout.rewards, zero))
    flags = {
        name: moved((flag & rollout.mask).long(), (flag & moves).long()) > 0
        for name, flag in (("terminated", rollout.terminated), ("truncated", rollout.truncated))
    }
    return replace(rollout, rewards=rewards, **flags)


class Outcomes(Protocol):
    """What came of decisions: the fields that `Transitions` [N], `Rollout` [B, T] and logged texts share."""

    @property
    def rewards(self) -> Tensor:
        """Float."""

    @property
    def terminated(self) -> Tensor:
        """Bool; no bootstrap."""

    @property
    def discount(self) -> Tensor:
        """Float; of what comes after."""

    @property
    def mask(self) -> Tensor:
        """Bool; True = counts."""


@dataclass(frozen=True)
class Transitions:
    """Logged decisions for offline learning; all tensors lead with [N].

    observations, actions, next_observations   nested, [N, ...]; next_observations at a truncation is the true one
    rewards        [N] float; discounted within a decision that lasted several steps
    terminated     [N] bool; no bootstrap
    discount       [N] float; gamma**j for a decision that lasted j steps
    mask           [N] bool; True = counts
    """

    observations: Nested
    actions: Nested
    rewards: Tensor
    next_observations: Nested
    terminated: Tensor
    discount: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.rewards.shape[0]

    def validate(self) -> None:
        """Raise ValueError naming the first field whose length or type disagrees."""
        count = len(self)
        for field in fields(self):
            for leaf in leaves(getattr(self, field.name)):
                if leaf.shape[0] != count:
                    raise ValueError(f"{field.name} holds {leaf.shape[0]} transitions, rewards {count}")
        for name in ("terminated", "mask"):
            if getattr(self, name).dtype != torch.bool:
                raise ValueError(f"{name} must be bool, got {getattr(self, name).dtype}")
        for name, leaf in (("rewards", self.rewards), ("discount", self.discount)):
            if not torch.isfinite(leaf).all():
                raise ValueError(f"{name} holds NaN or infinity")

    def select(self, index: Tensor) -> Transitions:
        """The transitions at `index`, [M] int."""
        selected: dict[str, Any] = {
            field.name: map_nested(lambda leaf: leaf.index_select(0, index), getattr(self, field.name))
            for field in fields(self)
        }
        return Transitions(**selected)
