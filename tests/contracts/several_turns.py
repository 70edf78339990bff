"""A real rollout of several turns: between the policy's tokens stand those of an environment, masked columns."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.generation import to_rollout
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.turns.decoding import play
from llm_rlhf.turns.environments import Referee
from llm_rlhf.turns.episodes import Episodes, TurnsConfig
from policy_core.rollout import Rollout
from tests.contracts.bodies import GAMMA, Body, double_precision, jittered, once

LIMIT = 12
PROMPTS = [[4, 5, 6, 7], [8, 9], [10, 11, 12]]


class Quiz:
    """Takes two characters for a turn, answers with those of the row, pays 0.5 for every second turn."""

    def reset(self, row: dict[str, Any]) -> None:
        self.row, self.turns = row, 0

    def ends_turn(self, text: str) -> bool:
        return len(text) >= 2

    def respond(self, text: str) -> tuple[str, float, bool]:
        self.turns += 1
        return self.row["answer"], 0.5 * (self.turns % 2), self.turns == self.row["turns"]


@functools.cache
def played() -> tuple[LanguagePolicy, PreTrainedTokenizerBase, Episodes]:
    """Two episodes on each of three prompts; answers of 0 to 3 tokens; some are ended by the environment after one
    to three turns, some are cut behind a turn, with room for its answer or without."""
    with double_precision(), torch.random.fork_rng():
        torch.manual_seed(4)
        policy, tokenizer = build_policy(
            ModelConfig(layers=2, width=16, heads=2, context=32), alphabet="0123456789+", value_head=True
        )
        policy = jittered(policy, 0.2)
        answers, turns = ["12", "", "345", "6", "78", "9+0"], [2, 3, 9, 1, 9, 3]
        rows = [{"answer": answer, "turns": count} for answer, count in zip(answers, turns, strict=True)]
        episodes = play(
            policy,
            tokenizer,
            PROMPTS,
            rows,
            referee=Referee("quiz", Quiz),
            config=TurnsConfig(stop_tokens=("<pad>", "<bos>", "<unk>")),
            max_new_tokens=LIMIT,
            generator=torch.Generator().manual_seed(7),
            bootstrap=True,
        )
    return policy, tokenizer, episodes


def rollout_of(episodes: Episodes, rewards: Tensor, *, turn_weight: float = 1.0, **options: Any) -> Rollout:
    """Episodes as decisions: the environment's rewards by turn, and one for each episode at its end."""
    by_turn = turn_weight * episodes.turn_rewards
    return to_rollout(episodes.samples, rewards, token_rewards=by_turn, **options)


def body() -> Body:
    """As `bodies.language`: a reward at the end and by turn, and a random penalty for every token."""
    policy, tokenizer, episodes = played()
    reference = jittered(policy, 0.05)
    samples = episodes.samples
    with torch.no_grad():
        ref_log_probs = reference.evaluate(samples.observations(), samples.input_ids).log_probs
    rollout = rollout_of(
        episodes,
        torch.randn(6),
        scored=torch.ones(6, dtype=torch.bool),
        ref_log_probs=ref_log_probs,
        cut_is_end=False,
        gamma=GAMMA,
    )
    penalty = torch.where(rollout.mask, torch.rand(rollout.shape), 0.0)
    return Body(policy, reference, replace(rollout, rewards=rollout.rewards - penalty), len(tokenizer))


several_turns = once(body)
