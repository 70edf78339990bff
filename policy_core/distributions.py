"""Action distributions without the overhead of torch.distributions: a few tensors and closed forms.

`log_prob` and `entropy` keep the last dimension (one entry a factor): the caller sums, or not, by its ratio level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normals. mean [..., F]; log_std [F] or [..., F]."""

    mean: Tensor
    log_std: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """[..., F]; gradients do not flow."""
        with torch.no_grad():
            noise = torch.randn(
                self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
            )
            return self.mean + noise * self.log_std.exp()

    def mode(self) -> Tensor:
        """[..., F]."""
        return self.mean

    def log_prob(self, actions: Tensor) -> Tensor:
        """[..., F] nats."""
        standardized = (actions - self.mean) * torch.exp(-self.log_std)
        return torch.addcmul(-(self.log_std + HALF_LOG_TWO_PI), standardized, standardized, value=-0.5)

    def entropy(self) -> Tensor:
        """[..., F] nats, a view where log_std is shared."""
        return (self.log_std + (0.5 + HALF_LOG_TWO_PI)).expand_as(self.mean)


@dataclass(frozen=True)
class TanhGaussian:
    """tanh of independent normals: actions in (-1, 1). mean [..., F]; log_std [F] or [..., F] of the normals."""

    mean: Tensor
    log_std: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """[..., F] in [-1, 1]."""
        return torch.tanh(DiagonalGaussian(self.mean, self.log_std).sample(generator))

    def rsample_with_log_prob(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Reparameterised actions [..., F] and their log-probs [..., F]."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.from_noise(noise)

    def from_noise(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and log-probs for standard normal noise [..., F], any number in front of the mean's dimensions.

        The log-probs are computed before the squashing: stable where tanh saturates, and without inverting it.
        """
        raw = torch.addcmul(self.mean, noise, self.log_std.exp())
        log_probs = torch.addcmul(-(self.log_std + HALF_LOG_TWO_PI), noise, noise, value=-0.5)
        return torch.tanh(raw), log_probs - log_tanh_slope(raw)

    def mode(self) -> Tensor:
        """tanh of the mean, [..., F]: the median; the density's peak differs where the scale is large."""
        return torch.tanh(self.mean)

    def log_prob(self, actions: Tensor) -> Tensor:
        """[..., F] nats. Actions at or beyond +-1 are pulled in by one float's step, where atanh is finite."""
        limit = 1.0 - torch.finfo(actions.dtype).eps
        raw = torch.atanh(actions.clamp(-limit, limit))
        return DiagonalGaussian(self.mean, self.log_std).log_prob(raw) - log_tanh_slope(raw)

    def entropy(self, generator: torch.Generator | None = None) -> Tensor:
        """[..., F] nats: one-sample estimate, for there is no closed form. Gradients flow."""
        return -self.rsample_with_log_prob(generator)[1]

    def entropy_at_median(self) -> Tensor:
        """[..., F] nats: the normal's entropy and the slope at its mean. Exact as the deviation goes to 0, and the
        same at every call."""
        return DiagonalGaussian(self.mean, self.log_std).entropy() + log_tanh_slope(self.mean)


def log_tanh_slope(raw: Tensor) -> Tensor:
    """log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2x)), which never takes the log of 0."""
    return 2.0 * (math.log(2.0) - raw - F.softplus(-2.0 * raw))


@dataclass(frozen=True)
class Categorical:
    """Independent choices. logits [..., K]; with logits [..., F, K] a decision of F tokens (factors)."""

    logits: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """[...] int."""
        with torch.no_grad():
            probabilities = torch.softmax(self.logits, dim=-1)
            flat = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
            return flat.view(self.logits.shape[:-1])

    def mode(self) -> Tensor:
        """[...] int."""
        return self.logits.argmax(-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """actions [...] int -> [...] nats."""
        chosen = self.logits.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
        return chosen - torch.logsumexp(self.logits, dim=-1)

    def entropy(self) -> Tensor:
        """[...] nats; choices with probability 0 (logit -inf) add nothing, to the gradient either."""
        log_probabilities = torch.log_softmax(self.logits, dim=-1)
        finite = log_probabilities.clamp(min=torch.finfo(log_probabilities.dtype).min)
        return -(log_probabilities.exp() * finite).sum(-1)
