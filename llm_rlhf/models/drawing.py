"""Drawing one token a row from the policy's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from experiment.errors import UserError

LOWEST = torch.finfo(torch.float32).min


def chances(rows: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), [rows] float64: one a token, where torch.multinomial draws one for every word.

    The generator is the processor's, so that a seed draws the same numbers for every device.
    """
    return torch.rand(rows, generator=generator, dtype=torch.float64)


def pick(probabilities: Tensor, chance: Tensor) -> Tensor:
    """One index a row of probabilities [B, V], [B] int: where its chance [B] falls in their running sum.

    In float64, so that no index of positive probability is out of reach; none of probability 0 is ever picked.
    """
    total = probabilities.double().cumsum(-1)
    at = (
        chance.to(total.device).clamp(max=1 - 1e-12) * total[:, -1]
    )  # below the sum, so that the last stays the last
    return torch.searchsorted(total, at.unsqueeze(1), right=True).squeeze(1)


def draw(scores: Tensor, chance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row from its logits over the temperature [B, V]; returns tokens, log-probs and entropies, [B].

    chance  [B] float64 (`chances`); None takes the likeliest

    Raises UserError if the logits are NaN.
    """
    log_softmax = torch.log_softmax(scores, dim=-1)
    if bool(log_softmax.isnan().any()):
        raise UserError("the model's logits are NaN, training has diverged: try a lower learning rate")
    probabilities = log_softmax.exp()
    token = scores.argmax(-1) if chance is None else pick(probabilities, chance)
    log_probs = log_softmax.gather(1, token.unsqueeze(1)).squeeze(1)
    return token, log_probs, -(probabilities * log_softmax.clamp(min=LOWEST)).sum(-1)  # what cannot come counts 0
