"""Running statistics that travel with the policy and its checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CONSTANT = 1e-12
"""A variance that is rounding: a standard deviation of a millionth."""


class RunningMoments(nn.Module):
    """Mean and variance of everything seen, merged batch by batch (Chan et al. 1979), in float64.

    Buffers: mean, variance [*shape], count []. Before the first update they are 0, 1 and 0.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Merge a batch [N, *shape]; an empty one changes nothing."""
        if batch.shape[0] == 0:
            return
        values = batch.to(torch.float64)
        mean, variance, count = values.mean(0), values.var(0, correction=0), float(values.shape[0])
        total = self.count + count
        delta = mean - self.mean
        squares = variance * count + delta.square() * self.count * count / total
        if self.count > 0:
            squares = squares + self.variance * self.count
        self.mean.add_(delta * count / total)
        self.variance.copy_(squares / total)
        self.count.copy_(total)


class ObservationNormalizer(RunningMoments):
    """(x - mean) / sqrt(variance + epsilon), clipped to +-limit; the identity until it has seen data.

    What has not varied says nothing about its scale: such a number is shifted alone.
    """

    def __init__(self, size: int, *, limit: float = 10.0, epsilon: float = 1e-8) -> None:
        super().__init__((size,))
        self.limit = limit
        self.epsilon = epsilon
        self.register_buffer("scale", torch.ones(size), persistent=False)
        self.register_buffer("offset", torch.zeros(size), persistent=False)

    scale: Tensor
    offset: Tensor

    def update(self, batch: Tensor) -> None:
        """Merge raw observations [N, D]."""
        super().update(batch)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the float32 scale and offset after the moments were changed or loaded."""
        scale = torch.where(self.variance > CONSTANT, torch.rsqrt(self.variance + self.epsilon), 1.0)
        self.scale.copy_(scale)
        self.offset.copy_(-self.mean * scale)

    def forward(self, observations: Tensor) -> Tensor:
        """[..., D] raw -> [..., D] normalised."""
        return torch.addcmul(self.offset, observations, self.scale).clamp(-self.limit, self.limit)


class RewardScaler(RunningMoments):
    """Divides rewards by the running standard deviation of the discounted return (as VecNormalize does).

    Only the scale is touched: the mean stays, so the sign of a reward is kept.
    """

    running_return: Tensor

    def __init__(self, environments: int, *, gamma: float, limit: float = 10.0, epsilon: float = 1e-8) -> None:
        super().__init__(())
        self.gamma, self.limit, self.epsilon = gamma, limit, epsilon
        self.register_buffer("running_return", torch.zeros(environments, dtype=torch.float64))

    @property
    def factor(self) -> float:
        """What rewards are multiplied with, as things stand."""
        return float(torch.rsqrt(self.variance + self.epsilon))

    @torch.no_grad()
    def forward(self, rewards: Tensor, ended: Tensor) -> Tensor:
        """rewards [B, T] raw, ended [B, T] bool -> [B, T] scaled; the statistics take the batch in first."""
        raw = rewards.to(torch.float64)
        keep = self.gamma * (~ended).to(torch.float64)
        returns = torch.empty_like(raw)
        running = self.running_return
        for reward, decay, out in zip(raw.unbind(1), keep.unbind(1), returns.unbind(1), strict=True):
            total = running + reward
            out.copy_(total)
            running = total * decay
        self.running_return.copy_(running)
        self.update(returns.flatten())
        scaled = raw / torch.sqrt(self.variance + self.epsilon)
        return scaled.clamp(-self.limit, self.limit).to(rewards.dtype)
