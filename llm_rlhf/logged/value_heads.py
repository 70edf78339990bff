"""Implicit language Q-learning on any causal language model: value heads, their loss, and steered decoding.

The heads read the model's last hidden state. They are kept beside the model, in a file of their own, so that the
folder stays a plain transformers model: whoever loads it without the heads has the language model alone.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_rlhf.logged.texts import LoggedTexts
from llm_rlhf.models.causal import LanguagePolicy, hidden_width
from policy_core import ilql
from policy_core.ilql import ILQLConfig, advantage_shift
from policy_core.metrics import Metrics
from policy_core.returns import next_values_of

HEADS = "ilql_heads.safetensors"
CRITICS = 2
FIRST_SCALE = 0.01
"""Last layers begin at this share of torch's own weights, so that first values are nearly 0."""


class ValueHeads(nn.Module):
    """Q of every token (two critics), their slow copy, and V, each a layer of twice the width with ReLU."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.critics = nn.ModuleList(_head(width, vocabulary) for _ in range(CRITICS))
        self.slow = copy.deepcopy(self.critics).requires_grad_(False)
        self.value = _head(width, 1)

    def q_values(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [M, ..., V]."""
        return torch.stack([head(hidden) for head in self.critics])

    @torch.no_grad()
    def slow_q_values(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [M, ..., V] of the slow copy, without gradient."""
        return torch.stack([head(hidden) for head in self.slow])

    def values(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [...]."""
        values: Tensor = self.value(hidden).squeeze(-1)
        return values


def heads_for(policy: LanguagePolicy) -> ValueHeads:
    """New heads for this model, beside it, initialised from torch's global generator."""
    heads = ValueHeads(hidden_width(policy.model), int(policy.model.config.get_text_config().vocab_size))
    return heads.to(policy.device)


class AdvantageSteering:
    """A `LanguagePolicy.steering`: tokens are drawn from the model's distribution times exp(beta * advantage)."""

    def __init__(self, heads: ValueHeads, *, beta: float, top_k: int | None = None) -> None:
        self.heads, self.beta, self.top_k = heads, beta, top_k

    def __call__(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """logits [..., V], hidden [..., D] -> logits [..., V]."""
        return advantage_shift(
            logits=logits,
            slow_q_values=self.heads.slow_q_values(hidden),
            values=self.heads.values(hidden),
            beta=self.beta,
            top_k=self.top_k,
        )

    def save(self, folder: Path) -> None:
        """Write heads, beta and top_k into a model's folder."""
        state = {name: tensor.detach().contiguous() for name, tensor in self.heads.state_dict().items()}
        save_file(state, str(folder / HEADS), {"beta": repr(self.beta), "top_k": str(self.top_k or 0)})

    @classmethod
    def load(cls, folder: Path, policy: LanguagePolicy) -> AdvantageSteering | None:
        """What `save` wrote, for the policy that was loaded from the same folder; None where there are no heads."""
        if not (folder / HEADS).is_file():
            return None
        heads = heads_for(policy)
        with safe_open(str(folder / HEADS), "pt") as file:
            settings = file.metadata()
            heads.load_state_dict({name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118
        return cls(heads, beta=float(settings["beta"]), top_k=int(settings["top_k"]) or None)


def loss_of(
    policy: LanguagePolicy,
    heads: ValueHeads,
    texts: LoggedTexts,
    config: ILQLConfig,
    *,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """`policy_core.ilql.loss` of a batch of logged texts; the model's own logits, whatever steers its decoding.

    denominator     chosen tokens of the whole optimizer step, when this is one of several micro-batches
    """
    columns = policy.columns(texts.observations())
    assert columns is not None, "every logged text has a chosen token"
    batch = texts.between(columns.first, columns.last).to(policy.device)
    taken = batch.input_ids.unsqueeze(-1)
    slow = heads.slow_q_values(columns.hidden)
    values = heads.values(columns.hidden)
    return ilql.loss(
        log_probs=torch.log_softmax(policy.tempered(columns.logits), dim=-1).gather(-1, taken).squeeze(-1),
        values=values,
        next_values=next_values_of(
            values=values.detach(),
            mask=batch.mask,
            episode=batch.episode,
            terminated=batch.terminated,
            final_values=None,
        ),
        q_values=heads.q_values(columns.hidden),
        slow_q_values=slow.gather(-1, taken.expand(CRITICS, *taken.shape)).squeeze(-1),
        actions=batch.input_ids,
        batch=batch,
        config=config,
        denominator=denominator,
    )


def _head(width: int, outputs: int) -> nn.Sequential:
    last = nn.Linear(2 * width, outputs)
    with torch.no_grad():
        last.weight.mul_(FIRST_SCALE)
        last.bias.mul_(FIRST_SCALE)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), last)
