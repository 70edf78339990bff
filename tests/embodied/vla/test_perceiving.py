"""Teaching the eyes while the policy plays: what they learn from, what moves, and by how much."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from embodied.policies.vla import VLAPolicy
from embodied.vla.chunk_rollout import ChunkExperience
from embodied.vla.grounding import GroundingConfig, GroundingScenes
from embodied.vla.perceiving import PerceptionConfig, fit_perception, percept_loss
from envs.table.observations import PERCEPT, PROPRIO, STATE
from policy_core.optimizer import NonFiniteLoss
from tests.embodied.tables import tiny_policy

CONFIG = PerceptionConfig(learning_rate=1e-2, pictures=100, minibatch_size=3)
EXECUTED = torch.tensor([[4, 2, 4], [4, 0, 0]])
PLAYED = EXECUTED > 0


def experience() -> ChunkExperience:
    """Two rows of three chunks, four of which were played."""
    generator = torch.Generator().manual_seed(0)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    return ChunkExperience(
        observations={
            "image": torch.randint(0, 256, (2, 3, 32, 32, 3), dtype=torch.uint8, generator=generator),
            "proprio": torch.randn(2, 3, PROPRIO, generator=generator),
            "words": torch.randint(1, 40, (2, 3, 16), generator=generator),
            "state": torch.randn(2, 3, STATE, generator=generator),
            "percept": torch.randn(2, 3, PERCEPT, generator=generator),  # what the eyes said; it teaches nothing
        },
        actions=torch.zeros(2, 3, 4, 4),
        log_probs=torch.zeros(2, 3, 4),
        rewards=torch.zeros(2, 3, 4),
        executed=EXECUTED,
        terminated=nothing,
        truncated=nothing,
        final_states=[],
        next_states=torch.zeros(2, STATE),
        episodes=[],
    )


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(policy: VLAPolicy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def sgd(policy: VLAPolicy, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(policy.perception.parameters(), lr=rate)


def error(policy: VLAPolicy, seen: ChunkExperience) -> Tensor:
    """Over all that was played."""
    played = {name: tensor[PLAYED] for name, tensor in seen.observations.items()}
    return percept_loss(policy.perceive(played), played["state"])


@pytest.fixture(scope="module")
def scenes() -> GroundingScenes:
    return GroundingScenes.collect(GroundingConfig(scenes=3, batch_size=5, workers=0), tiny_policy(), seed=1)


def test_the_loss_by_hand() -> None:
    percept = torch.tensor([[[1.0, 2.0]], [[0.0, -1.0]]], requires_grad=True)
    state = torch.tensor([[[0.0, 2.0, 100.0]], [[0.0, 1.0, -100.0]]])
    loss = percept_loss(percept, state)
    assert float(loss.detach()) == (1 + 0 + 0 + 4) / 4
    assert torch.autograd.grad(loss, percept)[0].tolist() == [[[0.5, 0.0]], [[0.0, -1.0]]]


def test_only_the_eyes_move_and_the_error_falls() -> None:
    policy, seen = tiny_policy(precision="float32"), experience()
    before = weights(policy)
    optimizer = torch.optim.Adam(policy.perception.parameters(), lr=CONFIG.learning_rate)
    drawn = generator()
    told = [fit_perception(policy, optimizer, seen, None, CONFIG, drawn)["percept_loss"] for _ in range(60)]
    assert told[-1] < 0.3 * told[0]
    assert float(error(policy, seen).detach()) < 0.3 * told[0]
    changed = {name for name, tensor in weights(policy).items() if not torch.equal(tensor, before[name])}
    eyes = {f"perception.{name}" for name, _ in policy.perception.named_parameters()}
    assert changed <= eyes
    assert {name.split(".")[1] for name in changed} == {name.split(".")[1] for name in eyes}
    assert all(parameter.grad is None for parameter in policy.actor_parameters())


def test_one_step_by_hand(scenes: GroundingScenes) -> None:
    """The gradient is that of the error of what was seen plus the error of a batch of scenes."""
    policy, seen = tiny_policy(), experience()
    twin = tiny_policy()
    drawn = generator()
    torch.randperm(4, generator=drawn)  # what was seen is drawn before the scenes
    rows = scenes.draw(drawn)
    playing, grounding = error(twin, seen), scenes.loss(twin, rows)
    (playing + grounding).backward()
    told = fit_perception(policy, sgd(policy, 0.1), seen, scenes, replace(CONFIG, minibatch_size=4), generator())
    assert told == {
        "percept_loss": pytest.approx(float(playing.detach()), rel=1e-5),
        "grounding_loss": pytest.approx(float(grounding.detach()), rel=1e-5),
    }
    for mine, its in zip(policy.perception.parameters(), twin.perception.parameters(), strict=True):
        assert its.grad is not None
        torch.testing.assert_close(mine, its - 0.1 * its.grad, rtol=1e-4, atol=1e-6)


def test_what_is_told_are_means_over_the_pass(scenes: GroundingScenes) -> None:
    policy, seen = tiny_policy(), experience()
    told = fit_perception(policy, sgd(policy, 0.0), seen, scenes, replace(CONFIG, minibatch_size=2), generator())
    assert told["percept_loss"] == pytest.approx(float(error(policy, seen).detach()), rel=1e-5)
    drawn = generator()
    torch.randperm(4, generator=drawn)
    batches = [float(scenes.loss(policy, scenes.draw(drawn)).detach()) for _ in range(2)]
    assert told["grounding_loss"] == pytest.approx(sum(batches) / 2, rel=1e-5)


def test_chunks_that_were_not_played_are_not_learnt_from() -> None:
    learnt = []
    for rubbish in (0.0, float("nan")):
        policy, seen = tiny_policy(), experience()
        for name in ("state", "proprio", "percept"):
            seen.observations[name][~PLAYED] = rubbish
        fit_perception(policy, sgd(policy, 0.1), seen, None, CONFIG, generator())
        learnt.append(weights(policy))
    assert all(torch.equal(tensor, learnt[1][name]) for name, tensor in learnt[0].items())


@pytest.mark.parametrize(("pictures", "sizes"), [(100, [3, 1]), (3, [3]), (2, [2]), (4, [3, 1])])
def test_so_many_pictures_are_drawn_each_once(
    pictures: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, seen = tiny_policy(), experience()
    met: list[Tensor] = []
    perceive = policy.perceive

    def watched(observations: Any) -> Tensor:
        met.append(observations["state"][:, 0])
        return perceive(observations)

    monkeypatch.setattr(policy, "perceive", watched)
    fit_perception(policy, sgd(policy, 0.1), seen, None, replace(CONFIG, pictures=pictures), generator())
    assert [len(batch) for batch in met] == sizes
    played = set(seen.observations["state"][PLAYED][:, 0].tolist())
    drawn = torch.cat(met).tolist()
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= played


def test_which_are_drawn_follows_from_the_generator() -> None:
    config = replace(CONFIG, pictures=2)

    def learnt(seed: int) -> Tensor:
        policy = tiny_policy()
        fit_perception(policy, sgd(policy, 0.1), experience(), None, config, generator(seed))
        return policy.perception.head.last.weight.detach()

    first = learnt(0)
    assert torch.equal(learnt(0), first)
    assert not all(torch.equal(learnt(seed), first) for seed in range(1, 5))


def test_what_is_not_finite_is_told() -> None:
    policy, seen = tiny_policy(), experience()
    seen.observations["state"][0, 1, 3] = torch.inf
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with pytest.raises(NonFiniteLoss, match="in what the eyes say") as caught:
        fit_perception(
            policy, sgd(policy, 0.1), seen, None, replace(CONFIG, pictures=99, minibatch_size=99), generator()
        )
    assert caught.value.setting == "perception.learning_rate"
    assert all(tensor.equal(before[name]) for name, tensor in policy.state_dict().items())  # nothing is spoiled


@pytest.mark.parametrize("wrong", [{"learning_rate": -1e-4}, {"pictures": 0}, {"minibatch_size": 0}])
def test_impossible_numbers(wrong: dict[str, Any]) -> None:
    message = "perception: learning_rate must not be negative, pictures and minibatch_size at least 1"
    with pytest.raises(ValueError, match=message):
        PerceptionConfig(**wrong)
    assert PerceptionConfig().learning_rate == 0.0
