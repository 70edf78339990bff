"""What holds of turns beyond the contracts of every body: an environment's tokens are read and never learned,
values bootstrap across them, and a step is the one that is computed by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from llm_rlhf.models.generation import Samples
from llm_rlhf.turns.environments import Reply
from llm_rlhf.turns.episodes import Episodes, Turn
from policy_core.kl import KLConfig
from policy_core.policy import Evaluation
from policy_core.ppo import PPOConfig, update
from policy_core.returns import gae
from policy_core.rollout import Rollout
from tests.contracts.bodies import GAMMA, LAMBDA, NAN, same, trained
from tests.contracts.several_turns import LIMIT, played, rollout_of, several_turns

WHOLE = PPOConfig(epochs=1, minibatch_size=10_000, normalize_advantages=False, entropy_coef=0.01)
KL: dict[str, Any] = {"kl": KLConfig(coef=0.2, placement="loss", estimator="k2"), "kl_coef": 0.2}


def answers_of(rollout: Rollout) -> Tensor:
    """[B, T] bool: the environment's tokens, which stand behind a row's first decision."""
    return (rollout.mask.cumsum(1) > 0) & ~rollout.mask & (rollout.episode >= 0)


def decisions_of(rollout: Rollout, row: int) -> list[int]:
    """Columns of a row's decisions."""
    columns: list[int] = rollout.mask[row].nonzero().squeeze(1).tolist()
    return columns


def test_the_body_has_what_the_contracts_are_about() -> None:
    rollout = several_turns().rollout
    rollout.validate()
    assert answers_of(rollout).sum() > 10
    assert rollout.terminated.sum() == 4
    assert rollout.truncated.sum() == 2
    assert (several_turns().rollout.episode == -1).any()
    _, _, episodes = played()
    assert {len(turns) for turns in episodes.turns} >= {1, 2, 3}


class Watched(nn.Module):
    """A policy of which the last evaluation is kept, with the gradient that each of its numbers gets."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def critic_parameters(self) -> Iterator[Parameter]:
        parameters: Iterator[Parameter] = self.policy.critic_parameters()
        return parameters

    def evaluate(self, observations: Any, actions: Any) -> Evaluation:
        self.decisions: Tensor = observations["decisions"]  # in the order of the step's rows
        evaluation: Evaluation = self.policy.evaluate(observations, actions)
        assert evaluation.values is not None
        self.said: list[Tensor] = [evaluation.log_probs, evaluation.entropy, evaluation.values]
        for part in self.said:
            part.retain_grad()
        return evaluation


def test_only_the_policys_own_tokens_get_a_gradient() -> None:
    """Of likelihood, entropy, reference KL and value error alike; every token of its own gets one."""
    rollout = several_turns().rollout
    policy = Watched(copy.deepcopy(several_turns().policy))
    advantages, returns = gae(rollout, gae_lambda=LAMBDA)
    update(
        policy=policy,
        optimizer=torch.optim.SGD(policy.parameters(), lr=0.0),
        rollout=rollout,
        advantages=advantages,
        returns=returns,
        config=WHOLE,
        **KL,
    )
    for part in policy.said:
        assert part.grad is not None
        assert not part.grad[~policy.decisions].any()
        assert (part.grad[policy.decisions] != 0).all()


@pytest.mark.parametrize("aggregation", ["decision", "episode", "constant"])
def test_what_is_said_of_the_environments_tokens_changes_nothing(aggregation: Any) -> None:
    """Their likelihoods, values and what they would have been as actions; what they are as text does."""
    body = several_turns()
    rollout, answers = body.rollout, answers_of(body.rollout)
    assert rollout.ref_log_probs is not None
    assert rollout.values is not None
    assert rollout.next_values is not None
    actions, observations = rollout.actions, rollout.observations
    assert isinstance(actions, Tensor)
    assert isinstance(observations, dict)
    config = replace(WHOLE, aggregation=aggregation, aggregation_constant=9.0, epochs=2, value_clip_range=0.1)
    plain, metrics = trained(body.policy, rollout, config, **KL)
    spoiled = replace(
        rollout,
        actions=torch.where(answers, (actions + 1) % len(played()[1]), actions),
        rewards=rollout.rewards.masked_fill(answers, NAN),
        discount=rollout.discount.masked_fill(answers, 0.1),
        old_log_probs=rollout.old_log_probs.masked_fill(answers, NAN),
        ref_log_probs=rollout.ref_log_probs.masked_fill(answers, NAN),
        values=rollout.values.masked_fill(answers, NAN),
        next_values=rollout.next_values.masked_fill(answers, NAN),
    )
    weights, spoiled_metrics = trained(body.policy, spoiled, config, **KL)
    assert torch.equal(weights, plain)
    assert spoiled_metrics == metrics
    others = torch.where(answers, 4 + (actions - 3) % 11, actions)
    read = replace(rollout, observations={**observations, "input_ids": others})
    assert not torch.equal(trained(body.policy, read, config, **KL)[0], plain)


def test_values_bootstrap_across_the_environments_tokens() -> None:
    """Each value is the head's at the token before, in the row alone and unpadded; a decision's next value is that
    of the next decision, over whatever was answered in between, and behind the last one that of the whole text with
    the answer that nobody was to read any more."""
    policy, tokenizer, episodes = played()
    rollout = several_turns().rollout
    assert rollout.values is not None
    assert rollout.next_values is not None
    assert policy.value_head is not None
    advantages, _ = gae(rollout, gae_lambda=0.0)
    gaps = 0
    for row, turns in enumerate(episodes.turns):
        real = rollout.episode[row] >= 0
        start = int(real.nonzero()[0])
        text = episodes.samples.input_ids[row][real].tolist()
        reply = turns[-1].reply
        if reply is not None and not reply.done:
            unread = tokenizer.encode(reply.text, add_special_tokens=False)
            new = len(text) - int((real & (rollout.mask[row].cumsum(0) == 0)).sum())
            text = [*text, *(unread if new + len(unread) <= LIMIT else [])]
        with torch.no_grad():
            hidden = policy.model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0]
            values = policy.value_head(hidden).squeeze(-1)
        columns = decisions_of(rollout, row)
        for column, following in zip(columns, [*columns[1:], None], strict=True):
            same(rollout.values[row, column], values[column - start - 1])
            after = values[-1] if following is None else values[following - start - 1]
            if not rollout.terminated[row, column]:
                same(rollout.next_values[row, column], after)
            ends = bool(rollout.terminated[row, column])
            expected = rollout.rewards[row, column] + (0.0 if ends else GAMMA * after)
            same(advantages[row, column], expected - values[column - start - 1])
            gaps += following is not None and following - column > 1
    assert gaps > 4


def test_the_first_step_is_that_of_each_row_alone() -> None:
    """Row by row through transformers' own model, unpadded: the step is that of -mean(A log p) over the policy's
    tokens, whatever stands between them."""
    policy, _, episodes = played()
    rollout = several_turns().rollout
    advantages, _ = gae(rollout, gae_lambda=LAMBDA)
    plain = copy.deepcopy(policy)
    loss = torch.zeros(())
    for row in range(len(episodes.turns)):
        real = rollout.episode[row] >= 0
        start = int(real.nonzero()[0])
        text = episodes.samples.input_ids[row][real]
        log_softmax = torch.log_softmax(plain.model(input_ids=text.unsqueeze(0)).logits[0], dim=-1)
        for column in decisions_of(rollout, row):
            loss = loss - advantages[row, column] * log_softmax[column - start - 1, text[column - start]]
    (loss / rollout.mask.sum()).backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)
    expected = torch.cat([parameter.detach().flatten() for parameter in plain.parameters()])
    config = replace(WHOLE, entropy_coef=0.0)
    same(trained(policy, rollout, config, returns=None)[0], expected, atol=1e-10)


class Bandit(nn.Module):
    """The same distribution over three tokens and the same value everywhere, whatever was read."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = Parameter(torch.tensor([0.2, -0.1, 0.4]))
        self.value = Parameter(torch.tensor(0.4))

    def critic_parameters(self) -> Iterator[Parameter]:
        return iter([self.value])

    def evaluate(self, observations: Any, actions: Any) -> Evaluation:
        log_softmax = self.logits.log_softmax(0)
        log_probs = log_softmax[actions]
        entropy = -(log_softmax.exp() * log_softmax).sum()
        return Evaluation(log_probs, entropy.expand_as(log_probs), self.value.expand_as(log_probs))


def test_a_step_by_hand() -> None:
    """Row 0: prompt 2, own 0 and 1 (paid 1), answered 2 2, own 0 (paid 2), done. Row 1: prompt 2, own 1 (paid 0.5),
    cut; the value behind it is 0.8. gamma 0.5, lambda 0.8, every value 0.4; over the answer there is neither
    discount nor decay:

    own 0 (end)   2   - 0.4             = 1.6
    own 1         1   + 0.5 * 0.4 - 0.4 = 0.8     + 0.4 * 1.6  = 1.44
    own 0         0   + 0.5 * 0.4 - 0.4 = -0.2    + 0.4 * 1.44 = 0.376
    own 1 (cut)   0.5 + 0.5 * 0.8 - 0.4 = 0.5
    """
    policy = Bandit()
    mask = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]]).bool()
    input_ids = torch.tensor([[2, 0, 1, 2, 2, 0], [2, 1, 0, 0, 0, 0]])
    log_probs = torch.where(mask, policy.evaluate(None, input_ids).log_probs.detach(), 0.0)
    samples = Samples(
        input_ids=input_ids,
        attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]),
        mask=mask,
        finished=torch.tensor([True, False]),
        log_probs=log_probs,
        entropy=torch.zeros(2, 6),
        values=torch.where(mask, 0.4, 0.0),
        prompt=torch.tensor([0, 1]),
        final_values=torch.tensor([0.0, 0.8]),
    )
    paid = torch.tensor([[0, 0, 1.0, 0, 0, 2.0], [0, 0.5, 0, 0, 0, 0]])
    turns = [[Turn("", Reply("", 1.0)), Turn("", Reply("", 2.0, True))], [Turn("", None)]]
    episodes = Episodes(samples, paid, turns)
    rollout = rollout_of(episodes, torch.zeros(2), scored=mask.any(1), cut_is_end=False, gamma=0.5)
    advantages, returns = gae(rollout, gae_lambda=0.8)
    same(advantages, torch.tensor([[0, 0.376, 1.44, 0, 0, 1.6], [0, 0.5, 0, 0, 0, 0]]))
    moved = copy.deepcopy(policy)
    update(
        policy=moved,
        optimizer=torch.optim.SGD(moved.parameters(), lr=0.1),
        rollout=rollout,
        advantages=advantages,
        returns=returns,
        config=replace(WHOLE, entropy_coef=0.0, value_coef=0.5, max_grad_norm=1e9),
    )
    total = 0.376 + 1.44 + 1.6 + 0.5
    chances = policy.logits.detach().softmax(0)
    gradient = torch.tensor([0.376 + 1.6, 1.44 + 0.5, 0.0]) - total * chances
    same(moved.logits.detach(), policy.logits.detach() + 0.1 * gradient / 4)
    same(moved.value.detach(), torch.tensor(0.4 + 0.1 * 0.5 * 2 * total / 4))
