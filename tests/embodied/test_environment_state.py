"""What a Stepper captures survives a checkpoint: saved, loaded, continued bit for bit."""

from pathlib import Path

import numpy as np
import pytest

from envs.stepper import Stepper
from experiment.checkpoint import load_state, save_state


@pytest.mark.parametrize("env_id", ["tandem/AdroitDoor-v0", "tandem/TableState-v0", "Pendulum-v1", "CartPole-v1"])
def test_a_saved_environment_continues_bit_for_bit(env_id: str, tmp_path: Path) -> None:
    stepper = Stepper(env_id, [1, 2], max_episode_steps=30)
    stepper.reset()
    rng = np.random.default_rng(0)

    def action() -> np.ndarray:
        if stepper.spec.discrete:
            return rng.integers(0, 2, 2)
        return rng.uniform(-1, 1, (2, stepper.spec.action_dim))

    for _ in range(40):
        stepper.step(action())
    save_state(tmp_path, {"environments": stepper.state()})
    actions = [action() for _ in range(40)]
    expected = [stepper.step(a) for a in actions]

    fresh = Stepper(env_id, [1, 2], max_episode_steps=30)
    fresh.set_state(load_state(tmp_path)["environments"])
    for a, result in zip(actions, expected, strict=True):
        found = fresh.step(a)
        np.testing.assert_array_equal(found.observations, result.observations)
        np.testing.assert_array_equal(found.rewards, result.rewards)
        assert found.episodes == result.episodes
