"""From episodes to transitions: next observations, ends, n steps, returns, units; and back from the workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from embodied.datasets.episode import Episode
from embodied.logged.off_policy import OpenEpisodes, experienced
from embodied.logged.transitions import DataConfig, discounted, mixed, reward_scale, to_transitions
from embodied.policies.numpy_actor import Spaces, StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Experience, fresh_policy
from envs.make import EnvironmentSpec
from experiment.errors import UserError
from policy_core.replay import Replay

SPEC = EnvironmentSpec("Test-v0", 2, 1, False, np.array([-2.0], np.float32), np.array([4.0], np.float32), 100)


def policy(head: str = "bounded", *, normalize: bool = False) -> StatePolicy:
    config = StatePolicyConfig(hidden=(4,), head=head, normalize_observations=normalize)  # type: ignore[arg-type]
    made = StatePolicy(Spaces(2, 1), config)
    assert SPEC.action_low is not None
    assert SPEC.action_high is not None
    made.set_action_bounds(torch.from_numpy(SPEC.action_low), torch.from_numpy(SPEC.action_high))
    return made


def episode(length: int, *, terminated: bool = False, final: bool = True, first: float = 0.0) -> Episode:
    """Observations count up from `first`, rewards are 1, 2, 3, ..., actions run over the bounds and beyond."""
    observations = np.stack([np.arange(first, first + length), np.zeros(length)], 1).astype(np.float32)
    return Episode(
        observations=observations,
        actions=np.linspace(-2.0, 5.0, length, dtype=np.float32)[:, None],
        rewards=np.arange(1, length + 1, dtype=np.float32),
        terminated=terminated,
        truncated=not terminated,
        final_observation=np.array([first + length, 0.0], np.float32) if final else None,
    )


def test_steps_by_hand() -> None:
    data = to_transitions(
        [episode(3), episode(2, terminated=True, first=7.0)], policy(), SPEC, DataConfig(gamma=0.5)
    )
    columns: Any = data.transitions
    assert columns.observations[:, 0].tolist() == [0.0, 1.0, 2.0, 7.0, 8.0]
    assert columns.next_observations[:, 0].tolist() == [1.0, 2.0, 3.0, 8.0, 9.0]
    assert columns.terminated.tolist() == [False, False, False, False, True]
    assert columns.rewards.tolist() == [1.0, 2.0, 3.0, 1.0, 2.0]
    assert columns.discount.tolist() == [0.5] * 5
    assert data.returns.tolist() == [2.75, 3.5, 3.0, 2.0, 2.0]
    # the bounds -2 and 4 are -1 and 1; what lies beyond them is what the environment would have made of it
    assert columns.actions[:, 0].tolist() == pytest.approx([-1.0, 1 / 6, 1.0, -1.0, 1.0])
    assert data.next_actions[:, 0].tolist() == pytest.approx([1 / 6, 1.0, 1.0, 1.0, 1.0])


def test_n_steps_stop_at_the_end() -> None:
    config = DataConfig(gamma=0.5, n_steps=3)
    columns: Any = to_transitions([episode(4, terminated=True)], policy(), SPEC, config).transitions
    assert columns.rewards.tolist() == [1 + 1 + 0.75, 2 + 1.5 + 1, 3 + 2, 4]
    assert columns.next_observations[:, 0].tolist() == [3.0, 4.0, 4.0, 4.0]
    assert columns.discount.tolist() == [0.125, 0.125, 0.25, 0.5]
    assert columns.terminated.tolist() == [False, True, True, True]


def test_next_actions_are_those_of_the_next_observations() -> None:
    config = DataConfig(gamma=0.5, n_steps=3)
    data = to_transitions([episode(5, terminated=True)], policy(), SPEC, config)
    columns: Any = data.transitions
    assert columns.next_observations[:2, 0].tolist() == [3.0, 4.0]
    assert data.next_actions[:, 0].tolist() == columns.actions[[3, 4, 4, 4, 4], 0].tolist()


def test_returns_of_cut_episodes_are_lower_bounds() -> None:
    """With rewards of -1 and a discount of 0.9 what follows a cut is worth -10 at least; without one, anything."""
    data = to_transitions([episode(3)], policy(), SPEC, DataConfig(gamma=0.5, shift=-2.0))  # -1, 0, 1 and a cut
    assert data.worst == pytest.approx(-2.0)
    assert data.returns.tolist() == pytest.approx([-1 + 0 + 0.25 - 0.25, 0.5 - 0.5, 1 - 1])
    ended = to_transitions([episode(3, terminated=True)], policy(), SPEC, DataConfig(gamma=0.5, shift=-2.0))
    assert ended.returns.tolist() == pytest.approx([-0.75, 0.5, 1.0])
    endless = to_transitions([episode(3)], policy(), SPEC, DataConfig(gamma=1.0, shift=-2.0))
    assert endless.returns.tolist() == [-np.inf] * 3
    assert to_transitions([episode(3)], policy(), SPEC, DataConfig(gamma=1.0)).returns.tolist() == [6.0, 5.0, 3.0]


def test_actions_in_other_units_are_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    far = episode(10)
    config = DataConfig(path="set.hdf5")
    to_transitions([far], policy(), SPEC, config)  # one number in ten lies beyond
    assert capsys.readouterr().err == (
        "set.hdf5: 20% of the actions' numbers lie beyond the environment's bounds and are clipped to them; "
        "are they in other units?\n"
    )
    to_transitions([replace(far, actions=far.actions.clip(-2, 4.01))], policy(), SPEC, config)
    assert capsys.readouterr().err == ""


def test_what_is_left_out_is_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    """Two cut episodes of four steps with rewards 1, 2, 3, 4, and a whole one: 8 of 30 is lost."""
    made = [episode(4, final=False), episode(4, final=False), episode(4)]
    for n_steps, steps in ((1, 2), (3, 6)):
        to_transitions(made, policy(), SPEC, DataConfig(path="set.hdf5", n_steps=n_steps))
        assert capsys.readouterr().err.splitlines()[0] == (
            "set.hdf5: left out: the last steps of 2 episodes that were cut, without the observation behind them "
            f"({steps} of 12 steps, 27% of the rewards' size)"
        )
    at_the_end = [replace(one, rewards=np.array([0, 0, 0, 1], np.float32)) for one in made[:2]]
    with pytest.raises(
        UserError, match=r"^x: every reward lies on the last steps of 2 .*data\.done_means=terminated"
    ):
        to_transitions(at_the_end, policy(), SPEC, DataConfig(path="x"))
    ended = [replace(one, terminated=True, truncated=False) for one in at_the_end]
    assert float(to_transitions(ended, policy(), SPEC, DataConfig()).transitions.rewards.sum()) == 2.0
    to_transitions([episode(4)], policy(), SPEC, DataConfig())
    assert "left out" not in capsys.readouterr().err


def test_a_cut_without_its_final_observation_cannot_be_bootstrapped() -> None:
    columns: Any = to_transitions([episode(4, final=False)], policy(), SPEC, DataConfig()).transitions
    assert columns.next_observations[:, 0].tolist() == [1.0, 2.0, 3.0]
    two: Any = to_transitions([episode(4, final=False)], policy(), SPEC, DataConfig(n_steps=2)).transitions
    assert two.next_observations[:, 0].tolist() == [2.0, 3.0]
    ended = to_transitions([episode(4, terminated=True, final=False)], policy(), SPEC, DataConfig()).transitions
    assert len(ended) == 4  # where an episode terminated nothing is needed


def test_episodes_of_one_step() -> None:
    columns: Any = to_transitions([episode(1), episode(1, final=False)], policy(), SPEC, DataConfig()).transitions
    assert len(columns) == 1
    with pytest.raises(UserError, match="no decision has a next observation"):
        to_transitions([episode(1, final=False)], policy(), SPEC, DataConfig(path="x"))


def test_rewards_are_scaled_by_the_spread_of_returns() -> None:
    episodes = [episode(2), episode(4)]  # returns 3 and 10
    config = DataConfig(rewards="returns", shift=-1.0, gamma=1.0)
    assert reward_scale(episodes, config) == pytest.approx(1000 / 7)
    columns: Any = to_transitions(episodes, policy(), SPEC, config).transitions
    assert columns.rewards[1].item() == pytest.approx(2000 / 7 - 1, rel=1e-6)
    with pytest.raises(UserError, match="all 2 episodes have the same return"):
        reward_scale([episode(2), episode(2)], config)


def test_observations_are_normalised_and_the_policy_keeps_the_units() -> None:
    episodes = [episode(5), episode(5, first=20.0)]
    made = policy(normalize=True)
    for one in episodes:
        made.learn_normalization(torch.from_numpy(one.observations))
    columns: Any = to_transitions(episodes, made, SPEC, DataConfig()).transitions
    assert columns.observations[:, 0].mean().item() == pytest.approx(0.0, abs=1e-5)
    assert columns.observations[:, 0].std(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    raw = torch.from_numpy(episodes[0].observations)
    distribution = made.distribution_of(made.normalizer(raw))
    torch.testing.assert_close(distribution.mode(), made(raw)[0].mode())


def test_a_head_with_bounds_needs_bounds() -> None:
    free = EnvironmentSpec(
        "Free-v0", 2, 1, False, np.array([-np.inf], np.float32), np.array([1.0], np.float32), 100
    )
    with pytest.raises(UserError, match=r"Free-v0: policy\.head 'squashed' needs actions with bounds"):
        fresh_policy(free, StatePolicyConfig(head="squashed"))
    fresh_policy(free, StatePolicyConfig())


def test_discounted_by_hand() -> None:
    assert discounted(torch.tensor([1.0, 2.0, 4.0]), 0.5).tolist() == [3.0, 4.0, 4.0]
    assert discounted(torch.zeros(0), 0.5).tolist() == []


def test_two_kinds_in_one_batch() -> None:
    data = to_transitions([episode(3)], policy(), SPEC, DataConfig()).transitions
    both = mixed(data, data.select(torch.tensor([2])))
    assert both.rewards.tolist() == [1.0, 2.0, 3.0, 3.0]
    both.validate()


def collected() -> Experience:
    """Two environments, three steps; the first one's episode ends (truncated) at its second step."""
    observations = torch.arange(12.0).view(2, 3, 2) / 2
    cut = torch.tensor([[False, True, False], [False, False, False]])
    return Experience(
        observations=observations,
        actions=torch.tensor([[[-2.0], [1.0], [9.0]], [[4.0], [1.0], [1.0]]]),
        rewards=torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        terminated=torch.zeros(2, 3, dtype=torch.bool),
        truncated=cut,
        next_observations=torch.full((2, 2), 9.5),
        final_observations=[(0, 1, np.array([7.5, 8.5], np.float32))],
        episodes=[],
    )


def test_experience_becomes_transitions() -> None:
    columns: Any = experienced(collected(), policy(), gamma=0.9, scale=2.0, shift=-1.0)
    assert columns.observations[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert columns.next_observations[:, 0].tolist() == [1.0, 7.5, 9.5, 4.0, 5.0, 9.5]
    assert columns.rewards.tolist() == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]
    assert columns.actions[:, 0].tolist() == [-1.0, 0.0, 1.0, 1.0, 0.0, 0.0]


def test_experience_is_in_the_policys_units_and_only_a_termination_is_one() -> None:
    """An episode that was cut has a future: its last step is none."""
    experience = collected()
    ended = torch.tensor([[False, False, False], [False, True, False]])
    experience = replace(experience, terminated=ended)
    normalized = policy(normalize=True)
    normalized.learn_normalization(torch.tensor([[0.0, 1.0], [4.0, 3.0], [9.0, 0.0]]))
    columns: Any = experienced(experience, normalized, gamma=0.9, scale=1.0, shift=0.0)
    plain: Any = experienced(experience, policy(), gamma=0.9, scale=1.0, shift=0.0)
    assert columns.terminated.tolist() == ended.flatten().tolist()
    for name in ("observations", "next_observations"):
        assert torch.equal(getattr(columns, name), normalized.normalizer(getattr(plain, name)))
        assert not torch.equal(getattr(columns, name), getattr(plain, name))


def test_returns_are_written_when_an_episode_ends() -> None:
    replay, watch = Replay(20), OpenEpisodes(2, 0.5, worst=0.0)
    experience = collected()
    for _ in range(2):
        columns = experienced(experience, policy(), gamma=0.5, scale=1.0, shift=0.0)
        where = replay.add(columns).view(2, 3)
        ends = {"terminated": experience.terminated, "truncated": experience.truncated}
        watch.add(replay, where, columns.rewards.view(2, 3), **ends)
    assert replay.returns is not None
    unknown = -torch.inf
    # the first environment: 1 + 2 / 2 and 2; then 3, of the episode that ended in the second round: 3 + 0.5 + 0.5
    expected = [2.0, 2.0, 4.0, unknown, unknown, unknown, 2.0, 2.0, unknown, unknown, unknown, unknown]
    assert replay.returns[:12].tolist() == expected
    again = OpenEpisodes(2, 0.5, worst=-8.0)
    again.load_state_dict(watch.state_dict())
    assert [w.tolist() for w in again.where] == [[8], [3, 4, 5, 9, 10, 11]]
    again.forget()  # new episodes begin: 3 + 0.5 * (1 + 2 / 2), which the state above would have led to, is no more
    columns = experienced(experience, policy(), gamma=0.5, scale=1.0, shift=0.0)
    again.add(replay, replay.add(columns).view(2, 3), columns.rewards.view(2, 3), **ends)
    assert replay.returns[8:12].tolist() == [unknown] * 4
    assert replay.returns[12:15].tolist() == [2.0 - 0.25 * 8, 2.0 - 0.5 * 8, unknown]  # cut: the worst follows
