"""The state policy: what it says, what moves in it, and its folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embodied.policies.numpy_actor import Spaces, StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy, ValueUnits
from embodied.rollouts.rollout import Experience, judge
from experiment.errors import UserError
from policy_core import ppo
from policy_core.optimizer import FlatAdam
from policy_core.ppo import PPOConfig
from policy_core.returns import gae

Make = Callable[..., StatePolicy]


def actions_for(policy: StatePolicy, *leading: int) -> torch.Tensor:
    spaces = policy.spaces
    if spaces.discrete:
        return torch.randint(spaces.action_size, leading)
    return torch.randn(*leading, spaces.action_size)


def test_values_change_their_units(make_policy: Make, tmp_path: Path) -> None:
    policy, observations = make_policy(Spaces(5, 3)), torch.randn(4, 5)
    torch.nn.init.normal_(policy.critic.bias)
    values = policy.values(observations)
    policy.set_value_units(ValueUnits(0.5))  # never learned: nothing to rescale
    assert torch.equal(policy.values(observations), values)
    policy.save_pretrained(tmp_path)
    again = StatePolicy.from_pretrained(tmp_path)
    assert again.value_units == ValueUnits(0.5)
    again.set_value_units(ValueUnits(2.0))
    torch.testing.assert_close(again.values(observations), 4 * values)
    again.set_value_units(ValueUnits(2.0, shift=-1.0))
    assert again.values(observations).tolist() == [0.0] * 4
    assert again.value_units == ValueUnits(2.0, shift=-1.0)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_gaussian_log_probs_against_torch(make_policy: Make, activation: str) -> None:
    policy = make_policy(Spaces(5, 3), activation=activation)
    observations, actions = torch.randn(4, 6, 5), actions_for(policy, 4, 6)
    evaluation = policy.evaluate(observations, actions)
    assert evaluation.log_probs.shape == evaluation.entropy.shape == (4, 6, 3)
    assert evaluation.values is not None
    assert evaluation.values.shape == (4, 6)
    mean = policy(observations)[0].mean
    reference = torch.distributions.Normal(mean, policy.log_std.exp())
    torch.testing.assert_close(evaluation.log_probs, reference.log_prob(actions), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evaluation.entropy, reference.entropy(), rtol=1e-5, atol=1e-5)


def test_categorical_log_probs_against_torch(make_policy: Make) -> None:
    policy = make_policy(Spaces(5, 3, discrete=True))
    observations, actions = torch.randn(4, 6, 5), actions_for(policy, 4, 6)
    evaluation = policy.evaluate(observations, actions)
    assert evaluation.log_probs.shape == evaluation.entropy.shape == (4, 6)
    reference = torch.distributions.Categorical(logits=policy(observations)[0].logits)
    torch.testing.assert_close(evaluation.log_probs, reference.log_prob(actions), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(evaluation.entropy, reference.entropy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_outputs_and_values_layer_by_layer(make_policy: Make, activation: str) -> None:
    """The stacked trunks are two plain networks: the first the actor's, the second the critic's."""
    policy = make_policy(Spaces(5, 3), activation=activation)
    observations = torch.randn(7, 5)
    nonlinear = torch.tanh if activation == "tanh" else torch.relu
    hidden = [((observations - policy.normalizer.mean) / policy.normalizer.variance.sqrt()).float()] * 2
    for index in range(2):
        for member in range(2):
            weight, bias = policy.trunks.layer(index, member)
            hidden[member] = nonlinear(hidden[member] @ weight + bias)
    distribution, values = policy(observations)
    torch.testing.assert_close(distribution.mean, policy.actor(hidden[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values, policy.critic(hidden[1]).squeeze(-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(policy.values(observations), values)


def test_a_new_policy_is_nearly_still_with_the_configured_deviation() -> None:
    policy = StatePolicy(Spaces(4, 2), StatePolicyConfig(log_std=-0.7))
    distribution, _ = policy(torch.randn(100, 4))
    assert float(distribution.mean.detach().abs().max()) < 0.1
    assert policy.log_std.tolist() == pytest.approx([-0.7, -0.7])


def test_normalisation_can_be_switched_off() -> None:
    policy = StatePolicy(Spaces(2, 1), StatePolicyConfig(normalize_observations=False))
    policy.learn_normalization(torch.randn(100, 2) * 9)
    assert float(policy.normalizer.count) == 0
    assert policy.normalizer(torch.tensor([[3.0, -4.0]])).tolist() == [[3.0, -4.0]]


# ------------------------------------------------------------------ critic warm-up


def experience_for(policy: StatePolicy, rows: int = 4, steps: int = 16) -> Experience:
    nothing = torch.zeros(rows, steps, dtype=torch.bool)
    size = policy.spaces.observation_size
    return Experience(
        observations=torch.randn(rows, steps, size),
        actions=actions_for(policy, rows, steps),
        rewards=torch.randn(rows, steps),
        terminated=nothing,
        truncated=nothing,
        next_observations=torch.randn(rows, size),
        final_observations=[],
        episodes=[],
    )


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_critic_warm_up_leaves_the_actor_alone_to_the_bit(make_policy: Make, discrete: bool, flat: bool) -> None:
    policy = make_policy(Spaces(5, 3, discrete))
    before, probe = copy.deepcopy(policy), torch.randn(20, 5)
    parameters = list(policy.parameters())
    optimizer: torch.optim.Optimizer = (
        FlatAdam([parameters], learning_rate=1e-2) if flat else torch.optim.Adam(parameters, lr=1e-2)
    )
    experience = experience_for(policy)
    config = PPOConfig(epochs=3, minibatch_size=16)
    for train_policy in (False, True):
        rollout = judge(experience, policy, gamma=0.99, rewards=experience.rewards)
        advantages, returns = gae(rollout, gae_lambda=0.95)
        ppo.update(
            policy=policy,
            optimizer=optimizer,
            rollout=rollout.decisions(),
            advantages=advantages.flatten().unsqueeze(1),
            returns=returns.flatten().unsqueeze(1),
            config=config,
            generator=torch.Generator().manual_seed(0),
            train_policy=train_policy,
        )
        old, new = (p(probe)[0] for p in (before, policy))
        same_outputs = torch.equal(old.logits, new.logits) if discrete else torch.equal(old.mean, new.mean)
        same_trunk = all(
            torch.equal(a, b)
            for index in range(2)
            for a, b in zip(before.trunks.layer(index, 0), policy.trunks.layer(index, 0), strict=True)
        )
        assert same_outputs != train_policy
        assert same_trunk != train_policy
        if not discrete:
            assert torch.equal(before.log_std, policy.log_std) != train_policy
        assert not torch.equal(before.trunks.layer(0, 1)[0], policy.trunks.layer(0, 1)[0])
        assert not torch.equal(before.values(probe), policy.values(probe))


# ------------------------------------------------------------------ the folder


@pytest.mark.parametrize("discrete", [False, True])
def test_the_folder_gives_the_policy_back_to_the_bit(make_policy: Make, tmp_path: Path, discrete: bool) -> None:
    policy = make_policy(Spaces(5, 3, discrete), hidden=(6, 7), activation="relu")
    policy.save_pretrained(tmp_path / "deep" / "policy")
    loaded = StatePolicy.from_pretrained(str(tmp_path / "deep" / "policy"))
    assert (loaded.spaces, loaded.config) == (policy.spaces, policy.config)
    assert loaded.state_dict().keys() == policy.state_dict().keys()
    for name, tensor in policy.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name
    observations, actions = torch.randn(3, 4, 5), actions_for(policy, 3, 4)
    expected, found = policy.evaluate(observations, actions), loaded.evaluate(observations, actions)
    assert torch.equal(found.log_probs, expected.log_probs)
    assert found.values is not None
    assert expected.values is not None
    assert torch.equal(found.values, expected.values)
    sample = torch.randn(9, 5)
    loaded.learn_normalization(sample)
    policy.learn_normalization(sample)
    assert torch.equal(loaded.normalizer.scale, policy.normalizer.scale)


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(content)

    return write


def halve(folder: Path) -> None:
    path = folder / "policy.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def described(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "policy.json"
        description = json.loads(path.read_text())
        change(description)
        path.write_text(json.dumps(description))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("policy.json"), r"policy\.json is missing.*checkpoints/best/policy"),
        (drop("policy.safetensors"), r"policy\.safetensors is missing"),
        (text("policy.json", "{"), "damaged"),
        (text("policy.json", "[1]"), "damaged"),
        (text("policy.safetensors", "no tensors"), "damaged"),
        (halve, "damaged"),
        (described(lambda d: d.pop("spaces")), "damaged"),
        (described(lambda d: d["config"].update(colour="red")), "damaged"),
        (described(lambda d: d["config"].update(hidden=[9, 9])), "damaged"),
        (described(lambda d: d["spaces"].update(action_size=2)), "damaged"),
        (described(lambda d: d["config"].update(activation="swish")), "damaged"),
    ],
)
def test_a_damaged_folder_is_one_line(
    make_policy: Make, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    make_policy(Spaces(5, 3)).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        StatePolicy.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_or_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no policy here"):
        StatePolicy.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: no policy here"):
        StatePolicy.from_pretrained(tmp_path / "file")


def test_export_fills_exactly_its_part(make_policy: Make) -> None:
    policy = make_policy(Spaces(2, 1), hidden=(3,))
    weights = np.full(40, 9.0, np.float32)
    policy.export_actor(weights)
    used = 2 * 3 + 3 + 3 * 1 + 1 + 1 + 1 + 1 + 2 + 2
    assert bool((weights[used:] == 9.0).all())
    assert weights[used - 7] == policy.log_std.item()
    np.testing.assert_array_equal(weights[used - 4 : used - 2], policy.normalizer.scale.numpy())
    np.testing.assert_array_equal(weights[:6].reshape(2, 3), policy.trunks.layer(0, 0)[0].detach().numpy())
