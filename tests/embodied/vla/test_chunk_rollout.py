"""From chunks to the core's rollout: folded rewards, executed factors, episodes, groups and bootstraps by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embodied.vla.chunk_rollout import ChunkExperience, judge_chunks, log_probs_of
from embodied.vla.learner import settle_log_probs
from envs.table.observations import PERCEPT, PROPRIO, STATE
from experiment.errors import UserError
from policy_core.grpo import GRPOConfig, group_advantages
from policy_core.returns import gae
from tests.embodied.tables import tiny_policy

WIDTH = STATE


def flags(*rows: str) -> Tensor:
    return torch.tensor([[character == "1" for character in row] for row in rows])


def state(value: float) -> np.ndarray:
    return np.full(WIDTH, value, np.float32)


def experience(**changes: Any) -> ChunkExperience:
    """Two rows of four chunks of three steps; what lies beyond `executed` is 100, so that it shows.

    Row 0: an episode that ends by success after 1 + 2 / 3 chunks, then one that goes on.
    Row 1: one that is cut after three chunks, the last of one step; then nothing is played.
    States are column + 10 * row; after the last column, 7 and 17; at the ends, 50 and 60.
    """
    executed = torch.tensor([[3, 2, 3, 3], [3, 3, 1, 0]])
    rewards = torch.tensor(
        [
            [[1.0, 2.0, 4.0], [1.0, 1.0, 100.0], [0.0, 0.0, 8.0], [1.0, 0.0, 0.0]],
            [[0.0, 2.0, 0.0], [4.0, 0.0, 4.0], [5.0, 100.0, 100.0], [100.0, 100.0, 100.0]],
        ]
    )
    values = torch.tensor([[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0]])
    generator = torch.Generator().manual_seed(0)
    fields: dict[str, Any] = {
        "observations": {
            "image": torch.randint(0, 255, (2, 4, 32, 32, 3), dtype=torch.uint8, generator=generator),
            "proprio": torch.randn(2, 4, PROPRIO, generator=generator),
            "percept": torch.randn(2, 4, PERCEPT, generator=generator),
            "words": torch.randint(0, 20, (2, 4, 16), generator=generator),
            "state": values.unsqueeze(-1).expand(2, 4, WIDTH).contiguous(),
        },
        "actions": torch.randn(2, 4, 3, 4, generator=generator),
        "log_probs": torch.arange(24.0).view(2, 4, 3),
        "rewards": rewards,
        "executed": executed,
        "terminated": flags("0100", "0000"),
        "truncated": flags("0000", "0010"),
        "final_states": [(0, 1, state(50.0)), (1, 2, state(60.0))],
        "next_states": torch.tensor([[7.0], [17.0]]).expand(2, WIDTH),
        "episodes": [],
        **changes,
    }
    return ChunkExperience(**fields)


class Critic:
    """Values are the first number of the state."""

    def values(self, observations: dict[str, Tensor]) -> Tensor:
        return observations["state"][..., 0]


def test_rewards_are_folded_by_hand() -> None:
    rollout = judge_chunks(experience(), gamma=0.5)
    rollout.validate()
    assert rollout.rewards.tolist() == [[1 + 1 + 1, 1 + 0.5, 2.0, 1.0], [1.0, 4 + 1, 5.0, 0.0]]
    assert rollout.discount[0].tolist() == [0.125, 0.25, 0.125, 0.125]
    assert rollout.discount[1, :3].tolist() == [0.125, 0.125, 0.5]
    assert torch.equal(rollout.mask, flags("1111", "1110"))
    assert rollout.factor_mask is not None
    assert rollout.factor_mask.sum(-1).tolist() == [[3, 2, 3, 3], [3, 3, 1, 0]]
    assert rollout.factor_mask[0, 1].tolist() == [True, True, False]
    assert rollout.episode.tolist() == [[0, 0, 1, 1], [0, 0, 0, -1]]
    assert torch.equal(rollout.old_log_probs, experience().log_probs)
    assert (rollout.values, rollout.next_values, rollout.ref_log_probs, rollout.group) == (None, None, None, None)
    assert experience().control_steps == 18


def test_values_and_bootstraps_by_hand() -> None:
    critic: Any = Critic()
    rollout = judge_chunks(experience(), gamma=0.5, critic=critic)
    assert rollout.values is not None
    assert rollout.next_values is not None
    assert rollout.values[0].tolist() == [0.0, 1.0, 2.0, 3.0]
    # row 0: the next chunk's; terminated (ignored); the next chunk's; after the last column
    assert rollout.next_values[0, [0, 2, 3]].tolist() == [1.0, 3.0, 7.0]
    # row 1: the next chunks'; at the cut the true last state
    assert rollout.next_values[1, :3].tolist() == [11.0, 12.0, 60.0]
    advantages, _ = gae(rollout, gae_lambda=0.0)
    assert advantages[0].tolist() == [3 + 0.125 * 1 - 0, 1.5 - 1, 2 + 0.125 * 3 - 2, 1 + 0.125 * 7 - 3]
    assert advantages[1].tolist() == [1 + 0.125 * 11 - 10, 5 + 0.125 * 12 - 11, 5 + 0.5 * 60 - 12, 0.0]


def test_groups_are_of_neighbouring_rows_episode_by_episode() -> None:
    same = torch.tensor([[1, 1, 1, 1]]).repeat(4, 1)
    fields = {
        name: tensor.repeat_interleave(2, 0)
        for name, tensor in vars(experience()).items()
        if isinstance(tensor, Tensor)
    }
    observations = {name: tensor.repeat_interleave(2, 0) for name, tensor in experience().observations.items()}
    grown = {
        **fields,
        "observations": observations,
        "executed": same,
        "terminated": flags("0101", "0011", "0101", "1001"),
        "truncated": flags("0000", "0000", "0000", "0000"),
        "rewards": torch.zeros(4, 4, 3) + torch.tensor([1.0, 2.0, 3.0, 5.0]).view(4, 1, 1),
    }
    rollout = judge_chunks(experience(**grown), gamma=1.0, group_size=2)
    assert rollout.group is not None
    pairs = [row.tolist() for row in rollout.group]
    assert pairs[0] == [0, 0, 1, 1]
    assert pairs[1] == [0, 0, 0, 1]
    assert set(pairs[0]) & set(pairs[2]) == set()
    assert pairs[3] == [pairs[2][0], *[pairs[2][2]] * 3]
    advantages, _ = group_advantages(rollout, config=GRPOConfig(advantage="dr_grpo", group_size=2))
    # first episodes: 1 + 1 of row 0 against 2 + 2 + 2 of row 1; the second ones 1 + 1 against 2
    assert advantages[0].tolist() == [-2.0, -2.0, 0.0, 0.0]
    assert advantages[1].tolist() == [2.0, 2.0, 2.0, 0.0]


def test_the_references_log_probs_are_those_of_its_own_judgement() -> None:
    policy = tiny_policy(3, chunk=3)
    seen = experience()
    expected = policy.evaluate(seen.observations, seen.actions).log_probs.detach()
    rollout = judge_chunks(seen, gamma=0.9, reference=policy)
    assert rollout.ref_log_probs is not None
    torch.testing.assert_close(rollout.ref_log_probs[0], expected[0], rtol=1e-5, atol=1e-5)
    assert rollout.ref_log_probs[1, 3].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(log_probs_of(policy, seen, at_once=2), rollout.ref_log_probs, rtol=1e-5, atol=1e-5)


def test_what_the_eyes_said_is_all_that_is_judged_by() -> None:
    """No image goes into the update; a reference with eyes of its own acts on what the policy's said."""
    seen, reference = experience(), tiny_policy(3, chunk=3)
    rollout = judge_chunks(seen, gamma=0.9, reference=reference)
    assert isinstance(rollout.observations, dict)
    assert rollout.observations.keys() == {"proprio", "percept", "words", "state"}
    assert rollout.observations["percept"].equal(seen.observations["percept"])
    with torch.no_grad():
        for parameter in reference.perception.parameters():
            parameter.add_(1.0)
    again = judge_chunks(seen, gamma=0.9, reference=reference)
    assert rollout.ref_log_probs is not None
    assert again.ref_log_probs is not None
    assert again.ref_log_probs.equal(rollout.ref_log_probs)
    images = {**seen.observations, "image": 255 - seen.observations["image"]}
    assert log_probs_of(reference, replace(seen, observations=images)).equal(rollout.ref_log_probs)
    moved = {**seen.observations, "percept": seen.observations["percept"] + 0.1}
    assert not log_probs_of(reference, replace(seen, observations=moved)).equal(rollout.ref_log_probs)


def test_workers_that_judge_differently_are_found_out() -> None:
    policy = tiny_policy(3, chunk=3)
    seen = experience()
    own = log_probs_of(policy, seen)
    beyond = own.clone()
    beyond[1, 3] += 9.0  # nothing was played there
    seen = replace(seen, log_probs=beyond)
    assert settle_log_probs(seen, policy, recompute=False, check=False) == (seen, {})
    settled, gap = settle_log_probs(seen, policy, recompute=False, check=True)
    assert settled is seen
    assert gap == {"train/rollout_logprob_gap": 0.0}
    beyond[1, 2, 0] += 0.5
    with pytest.raises(UserError, match=r"by up to 0\.5 nats .*: set recompute_log_probs=true$"):
        settle_log_probs(seen, policy, recompute=False, check=True)
    settled, gap = settle_log_probs(seen, policy, recompute=True, check=False)
    assert torch.equal(settled.log_probs, own)
    assert gap["train/rollout_logprob_gap"] == pytest.approx(0.5, abs=1e-5)
