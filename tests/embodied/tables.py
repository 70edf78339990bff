"""A policy for the table that is small enough for tests."""

from __future__ import annotations

from typing import Any

import torch

from embodied.policies.vla import VLAConfig, VLAPolicy, VLASpaces
from embodied.policies.words import Words
from envs.table.language import TRAINING_WORDS
from envs.table.observations import PROPRIO, STATE


def tiny_policy(seed: int = 0, **config: Any) -> VLAPolicy:
    """32 pixels, chunks of 4; its actor's last layer is large enough that what it sees matters."""
    sizes: dict[str, Any] = {
        "channels": (8, 8),
        "blocks": 1,
        "queries": 2,
        "words": 8,
        "hidden": (16,),
        "critic_hidden": (16,),
        **config,
    }
    torch.manual_seed(seed)
    policy = VLAPolicy(VLASpaces(32, ("front",), PROPRIO, STATE, 4), VLAConfig(**sizes), Words(TRAINING_WORDS))
    with torch.no_grad():
        policy.actor.last.weight.mul_(50.0)
    return policy
