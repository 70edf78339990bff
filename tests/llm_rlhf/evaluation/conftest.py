"""A tiny model over printable characters, as a subject under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_rlhf.evaluation.subject import Subject
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.loading import ModelConfig

ALPHABET = "".join(map(chr, range(32, 127))) + "\n"


@pytest.fixture(scope="session")
def make_subject() -> Callable[..., Subject]:
    """A new untrained subject; uniform: one that finds every token equally likely."""

    def make(*, context: int = 64, seed: int = 0, uniform: bool = False, **settings: Any) -> Subject:
        torch.manual_seed(seed)
        policy, tokenizer = build_policy(
            ModelConfig(layers=1, width=16, heads=2, context=context), alphabet=ALPHABET
        )
        for parameter in policy.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        if uniform:
            policy.model.get_output_embeddings().weight.data.zero_()
        return Subject(policy.eval(), tokenizer, **settings)

    return make
