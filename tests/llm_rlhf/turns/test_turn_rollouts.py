"""Episodes of two turns as a rollout, by hand: where rewards land, what GAE makes of them, what a gradient sees."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.generation import Samples
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.turns.environments import Reply
from llm_rlhf.turns.episodes import Episodes, Turn
from policy_core.policy import Evaluation
from policy_core.ppo import PPOConfig, update
from policy_core.returns import gae
from policy_core.rollout import Rollout, credit_decisions
from tests.contracts.several_turns import rollout_of


def tiny_policy() -> LanguagePolicy:
    torch.manual_seed(1)
    policy, _ = build_policy(ModelConfig(layers=2, width=16, heads=2, context=40), alphabet="abcd", value_head=True)
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return policy


def two_turns() -> Episodes:
    """Row 0: prompt of 2, turn of 2, answer of 2, turn of 1, done. Row 1: prompt of 1, turn of 1, cut."""
    samples = Samples(
        input_ids=torch.tensor([[4, 5, 6, 7, 5, 5, 6], [0, 4, 6, 0, 0, 0, 0]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0]]),
        mask=torch.tensor([[0, 0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0]]).bool(),
        finished=torch.tensor([True, False]),
        log_probs=torch.zeros(2, 7),
        entropy=torch.zeros(2, 7),
        values=torch.tensor([[0, 0, 0.1, 0.2, 0, 0, 0.3], [0, 0, 0.4, 0, 0, 0, 0]]),
        prompt=torch.tensor([0, 1]),
        final_values=torch.tensor([0.0, 0.8]),
    )
    rewards = torch.tensor([[0, 0, 0, 1.0, 0, 0, 2.0], [0, 0, 0.5, 0, 0, 0, 0]])
    turns = [[Turn("cd", Reply("bb", 1.0)), Turn("c", Reply("", 2.0, True))], [Turn("c", None)]]
    return Episodes(samples, rewards, turns)


YES = torch.tensor([True, True])


def test_gae_of_a_two_turn_episode_by_hand() -> None:
    """gamma 0.5, lambda 0.8: over the answer's two columns there is neither discount nor lambda."""
    rollout = rollout_of(two_turns(), torch.tensor([10.0, 20.0]), scored=YES, gamma=0.5, cut_is_end=False)
    rollout.validate()
    assert rollout.rewards.tolist() == [[0, 0, 0, 1, 0, 0, 12], [0, 0, 20.5, 0, 0, 0, 0]]
    assert rollout.terminated.nonzero().tolist() == [[0, 6]]
    assert rollout.truncated.nonzero().tolist() == [[1, 2]]
    advantages, returns = gae(rollout, gae_lambda=0.8)
    last = 12 - 0.3
    middle = (1 + 0.5 * 0.3 - 0.2) + 0.4 * last
    first = (0.5 * 0.2 - 0.1) + 0.4 * middle
    cut = 20.5 + 0.5 * 0.8 - 0.4
    expected = torch.tensor([[0, 0, first, middle, 0, 0, last], [0, 0, cut, 0, 0, 0, 0]])
    torch.testing.assert_close(advantages, expected)
    assert rollout.values is not None
    torch.testing.assert_close(returns[rollout.mask], (expected + rollout.values)[rollout.mask])


def test_rewards_by_turn_land_where_the_turn_ended() -> None:
    found = rollout_of(two_turns(), torch.tensor([0.0, 0.0]), scored=YES, turn_weight=3.0)
    assert found.rewards.tolist() == [[0, 0, 0, 3, 0, 0, 6], [0, 0, 1.5, 0, 0, 0, 0]]
    assert found.terminated.nonzero().tolist() == [[0, 6], [1, 2]]
    off = rollout_of(two_turns(), torch.tensor([0.0, 0.0]), scored=YES, turn_weight=0.0)
    assert not off.rewards.any()


def test_a_reward_on_the_answer_comes_back_to_the_turn_that_earned_it() -> None:
    """What the core's credit_decisions makes of rewards on the columns that brought them is what we have."""
    ours = rollout_of(two_turns(), torch.tensor([0.0, 0.0]), scored=YES)
    on_answers = torch.tensor([[0, 0, 0, 0, 1.0, 0, 2.0], [0, 0, 0.5, 0, 0, 0, 0]])
    assert torch.equal(credit_decisions(replace(ours, rewards=on_answers)).rewards, ours.rewards)
    assert torch.equal(credit_decisions(ours).rewards, ours.rewards)


def test_unscored_episodes_count_for_nothing() -> None:
    found = rollout_of(two_turns(), torch.tensor([1.0, 1.0]), scored=torch.tensor([False, True]))
    found.validate()
    assert not found.mask[0].any()
    assert not found.rewards[0].any()
    assert not found.terminated[0].any()
    assert found.mask[1].any()


def gradient_of(policy: LanguagePolicy, rollout: Rollout) -> Tensor:
    advantages, returns = gae(rollout, gae_lambda=0.9)
    update(
        policy=policy,
        optimizer=torch.optim.SGD(policy.parameters(), lr=0.0),
        rollout=rollout,
        advantages=advantages,
        returns=returns,
        config=PPOConfig(
            epochs=1, minibatch_size=64, micro_batch_size=20, max_grad_norm=1e9, learning_rate=0.0, entropy_coef=0.1
        ),
        generator=torch.Generator().manual_seed(0),
    )
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def test_inserting_an_answer_changes_only_what_it_is_read_for() -> None:
    """A model that cannot see the inserted tokens has the same gradient with them as without.

    Attention to the answer is masked and positions are told, as if it were padding inside the row; everything else
    (GAE with gamma below 1, weights, losses) sees the columns.
    """
    with_answer = two_turns()
    keep = torch.tensor([0, 1, 2, 3, 6])
    samples = with_answer.samples
    blind = samples.attention_mask.clone()
    blind[0, 4:6] = 0
    hidden = replace(with_answer, samples=replace(samples, attention_mask=blind))
    narrow = replace(
        with_answer,
        samples=Samples(
            input_ids=samples.input_ids[:, keep],
            attention_mask=samples.attention_mask[:, keep],
            mask=samples.mask[:, keep],
            finished=samples.finished,
            log_probs=samples.log_probs[:, keep],
            entropy=samples.entropy[:, keep],
            values=None if samples.values is None else samples.values[:, keep],
            prompt=samples.prompt,
        ),
        turn_rewards=with_answer.turn_rewards[:, keep],
    )
    policy = tiny_policy()
    gradients = []
    for found, inside in ((narrow, None), (hidden, 4)):
        rollout = rollout_of(found, torch.tensor([1.0, -1.0]), scored=YES, gamma=0.5)
        if inside is not None:
            rollout = replace(rollout, episode=rollout.episode.index_fill(1, torch.tensor([4, 5]), 0))
            rollout.episode[1, 4:] = -1
            policy = _Told(policy)  # type: ignore[assignment]
        gradients.append(gradient_of(policy, rollout))
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


class _Told(torch.nn.Module):
    """A policy for which the hidden state before the token behind an unseen gap is that before the gap."""

    def __init__(self, policy: LanguagePolicy) -> None:
        super().__init__()
        self.policy = policy

    def critic_parameters(self) -> Any:
        return self.policy.critic_parameters()

    def evaluate(self, observations: Any, actions: Tensor) -> Evaluation:
        keep = torch.tensor([0, 1, 2, 3, 6])
        seen = {name: tensor[:, keep] for name, tensor in observations.items()}
        evaluation = self.policy.evaluate(seen, actions[:, keep])

        def wide(tensor: Tensor) -> Tensor:
            return torch.full(actions.shape, torch.nan).index_copy(1, keep, tensor)

        assert evaluation.values is not None
        return Evaluation(*(wide(part) for part in (evaluation.log_probs, evaluation.entropy, evaluation.values)))
