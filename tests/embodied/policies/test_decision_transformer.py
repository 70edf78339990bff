"""What a decision may read and what it may not, its memory while it plays, and that it does as it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embodied import train_dt
from embodied.datasets.episode import Episode
from embodied.evaluate import EvaluateConfig
from embodied.evaluate_dt import evaluate_run
from embodied.logged.demonstrations import EpisodesConfig
from embodied.policies.decision_transformer import Conditioned, DecisionTransformer, DecisionTransformerConfig
from embodied.policies.numpy_actor import Spaces
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from embodied.train_dt import TrainDTConfig, Windows
from experiment.errors import UserError
from experiment.run import RunConfig
from tests.embodied.test_offline_recipes import two_ways

SMALL = DecisionTransformerConfig(context=4, width=16, layers=2, heads=2, dropout=0.0, longest=8)
Told = dict[str, torch.Tensor]


def told(batch: int = 2, length: int = 4) -> tuple[Told, torch.Tensor]:
    observations = {
        "observations": torch.randn(batch, length, 3),
        "returns": torch.randn(batch, length),
        "steps": torch.arange(length).expand(batch, length).clone(),
        "present": torch.ones(batch, length, dtype=torch.bool),
    }
    return observations, torch.rand(batch, length, 2) * 2 - 1


@pytest.fixture
def policy() -> DecisionTransformer:
    torch.manual_seed(1)
    return DecisionTransformer(Spaces(3, 2), SMALL).eval()


@pytest.mark.parametrize("name", ["observations", "returns", "actions"])
def test_a_decision_reads_nothing_that_comes_after_it(policy: DecisionTransformer, name: str) -> None:
    observations, actions = told()
    before = policy(observations, actions).mean.detach()
    if name == "actions":
        actions[:, 2] += 1.0
    else:
        observations[name][:, 2] += 1.0
    after = policy(observations, actions).mean.detach()
    torch.testing.assert_close(after[:, :2], before[:, :2])
    changed = (after - before).abs().amax((0, 2))
    assert (changed[2] > 1e-4) == (name != "actions")  # its own observation and return, not its own action
    assert changed[3] > 1e-4


def test_padding_is_not_read(policy: DecisionTransformer) -> None:
    observations, actions = told()
    short = {name: value[:, 2:] for name, value in observations.items()}
    expected = policy(short, actions[:, 2:]).mean
    observations["present"][:, :2] = False
    observations["observations"][:, :2] = 77.0
    actions[:, :2] = -5.0
    found = policy(observations, actions).mean
    torch.testing.assert_close(found[:, 2:], expected, rtol=1e-4, atol=1e-5)
    assert bool(torch.isfinite(found).all())


def test_it_remembers_what_it_saw_did_and_owes(policy: DecisionTransformer) -> None:
    actor, seen = Conditioned(policy, 2, target=10.0), torch.randn(6, 2, 3)
    history: list[torch.Tensor] = []
    for step in range(6):
        history.append(actor.act(seen[step]))
        ended = torch.tensor([step == 1, False])
        actor.observe(torch.tensor([1.0, 2.0]), ended)
        if step < 3:
            expected = {
                "observations": seen[: step + 1, 1].unsqueeze(0),
                "returns": torch.tensor([[10.0 - 2.0 * i for i in range(step + 1)]]),
                "steps": torch.arange(step + 1).unsqueeze(0),
                "present": torch.ones(1, step + 1, dtype=torch.bool),
            }
            done = torch.stack([*(a[1] for a in history[:-1]), torch.zeros(2)]).unsqueeze(0)
            torch.testing.assert_close(history[-1][1], policy.mode(expected, done)[0], rtol=1e-4, atol=1e-5)
    # the first environment's second episode began at step 2 and is four steps old
    assert actor.present[0].tolist() == [True] * 4
    assert actor.steps[0].tolist() == [0, 1, 2, 3]
    assert actor.returns[0].tolist() == [10.0, 9.0, 8.0, 7.0]
    assert actor.steps[1].tolist() == [2, 3, 4, 5]


def test_windows_stay_within_their_episode() -> None:
    spec = environment_spec(EnvironmentConfig("Pendulum-v1", count=1, workers=0))
    made = []
    for number, length in enumerate((2, 5)):
        seen = np.full((length, 3), number, np.float32)
        rewards = np.arange(1, length + 1, dtype=np.float32)
        made.append(Episode(seen, np.zeros((length, 1), np.float32), rewards, True, False))
    windows = Windows.of(made, spec)
    assert windows.returns.tolist() == [3.0, 2.0, 15.0, 14.0, 12.0, 9.0, 5.0]
    observations, _ = windows.draw(200, 4, torch.Generator().manual_seed(0))
    for row in range(200):
        present = observations["present"][row]
        assert present[-1]
        assert observations["observations"][row][present][:, 0].unique().numel() == 1
        steps = observations["steps"][row][present].tolist()
        assert steps == list(range(steps[0], steps[0] + len(steps)))
        assert steps[0] == 0 or len(steps) == 4


def config(tmp_path: Path, data: Path, **changes: Any) -> TrainDTConfig:
    settings: dict[str, Any] = {
        "run": RunConfig(folder=str(tmp_path / "run"), wandb="disabled", seed=1),
        "environment": EnvironmentConfig("Pendulum-v1", max_episode_steps=6, count=1, workers=0),
        "data": EpisodesConfig(path=str(data)),
        "policy": SMALL,
        "updates": 6,
        "batch_size": 16,
        "log_every": 2,
        "evaluate_every": 3,
        "episodes": 2,
    }
    return TrainDTConfig(**settings | changes)


def test_it_does_what_it_is_asked_for(tmp_path: Path) -> None:
    data = two_ways(tmp_path / "ways.hdf5", good=3)
    settings = config(tmp_path, data, updates=300, episodes=0, evaluate_every=300, learning_rate=3e-3)
    run = train_dt.train(settings).folder
    policy = DecisionTransformer.from_pretrained(run / "checkpoints" / "last" / "policy")
    for target, expected in ((1.0, 1.5), (0.0, -1.5)):
        actions = Conditioned(policy, 50, target).act(torch.randn(50, 3))
        assert float(actions.mean()) == pytest.approx(expected, abs=0.3)


def test_resumed_to_the_bit_and_evaluated(
    tmp_path: Path, pendulum_demonstrations: Path, interrupt_at: Callable[..., None], rows_of: Callable[[Path], Any]
) -> None:
    settings = config(tmp_path, pendulum_demonstrations, policy=replace(SMALL, dropout=0.2))
    whole, broken = (replace(settings, run=replace(settings.run, folder=str(tmp_path / n))) for n in "ab")
    train_dt.train(whole)
    interrupt_at(6, train_dt.train, broken)
    train_dt.train(broken, resume=tmp_path / "b")
    for file in ("policy/policy.safetensors", "state.safetensors"):
        expected, found = (tmp_path / n / "checkpoints/last" / file for n in "ab")
        assert found.read_bytes() == expected.read_bytes()
    assert rows_of(tmp_path / "b") == rows_of(tmp_path / "a")
    short = evaluate_run(tmp_path / "a", EvaluateConfig(checkpoint="last", episodes=2, max_episode_steps=3))
    assert short["eval/ep_len_mean"] == 3
    figures = evaluate_run(tmp_path / "a", EvaluateConfig(checkpoint="last", episodes=3))
    assert figures["eval/episodes"] == 3
    (tmp_path / "a" / "checkpoints" / "best").unlink()
    with pytest.raises(UserError, match="there is no checkpoint 'best'"):
        evaluate_run(tmp_path / "a", EvaluateConfig(checkpoint="best", episodes=1))


def test_it_acts_without_dropout(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    settings = config(tmp_path, pendulum_demonstrations, updates=4, policy=replace(SMALL, dropout=0.5))
    run = train_dt.train(settings).folder
    assert not DecisionTransformer.from_pretrained(run / "checkpoints" / "last" / "policy").training
    short = EvaluateConfig(checkpoint="last", episodes=2, max_episode_steps=20)
    figures = [evaluate_run(run, short)["eval/mean_reward"] for _ in range(2)]
    assert figures[0] == figures[1]


def test_a_diverged_run_stops_with_one_line(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    settings = config(tmp_path, pendulum_demonstrations, learning_rate=1e38, warmup=0.0)
    with pytest.raises(UserError, match=r"^update \d+: NaN or infinity in .*; lower learning_rate, or"):
        train_dt.train(settings)


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="width a multiple of heads"):
        DecisionTransformerConfig(width=10, heads=3)
    with pytest.raises(ValueError, match="continuous actions"):
        DecisionTransformer(Spaces(3, 2, discrete=True), SMALL)
    with pytest.raises(ValueError, match="must be positive"):
        TrainDTConfig(updates=0)
