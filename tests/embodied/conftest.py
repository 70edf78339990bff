"""What the embodied room's tests share: policies with lively weights, demonstrations, runs cut in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from embodied.policies.numpy_actor import Spaces, StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from experiment.run import Run

PolicyMaker = Callable[..., StatePolicy]


@pytest.fixture(autouse=True)
def _same_torch_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_policy() -> PolicyMaker:
    """A policy whose outputs, values and normaliser are nowhere near their starting points."""

    def make(spaces: Spaces, *, seed: int = 0, **config: Any) -> StatePolicy:
        torch.manual_seed(seed)
        policy = StatePolicy(spaces, StatePolicyConfig(**{"hidden": (8, 8), **config}))
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        policy.learn_normalization(2.0 + 3.0 * torch.randn(50, spaces.observation_size))
        return policy

    return make


def teacher(observations: np.ndarray) -> np.ndarray:
    """Pendulum: [N, 3] -> torques [N, 1], within the bounds."""
    return np.tanh(observations @ np.array([[0.5], [-1.0], [-0.2]])).astype(np.float32)


@pytest.fixture(scope="session")
def pendulum_demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten demonstrations of Pendulum-v1, of a teacher that is a smooth function of the observation."""
    path = tmp_path_factory.mktemp("demonstrations") / "pendulum.hdf5"
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(10):
            angle, speed = generator.uniform(-np.pi, np.pi, 60), generator.uniform(-4, 4, 60)
            observations = np.stack([np.cos(angle), np.sin(angle), speed], axis=1)
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"] = teacher(observations)
            demo["rewards"] = np.zeros(60)
            demo["obs/state"] = observations
    return path


@pytest.fixture
def rows_of() -> Callable[[Path], list[dict[str, Any]]]:
    """The rows of a run's metrics.jsonl without what the clock says."""

    def read(folder: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]

    return read


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """interrupt_at(step, recipe, config): train until `step` is about to be logged, and lose what came since."""

    def run(step: int, recipe: Callable[..., Any], config: Any) -> None:
        original = Run.log

        def log(self: Run, metrics: Any, *, global_step: int) -> None:
            if global_step == step:
                raise Interrupted
            original(self, metrics, global_step=global_step)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "log", log)
            with pytest.raises(Interrupted):
                recipe(config)
        torch.manual_seed(12345)  # a new process would not have the old one's generators
        np.random.seed(12345)

    return run
