"""stable-baselines3's off-policy algorithms, their replay filled with the data set before they play."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import RescaleAction, TransformObservation, TransformReward
from safetensors.torch import load_file, save_file

from embodied.backends.backend import Array, Units
from embodied.datasets.episode import Episode
from envs.make import make_environment
from experiment.errors import UserError, user_errors

ALGORITHMS = ("DDPG", "SAC", "TD3")
DESCRIPTION, WEIGHTS = "sb3.json", "sb3.safetensors"
OURS = ("policy", "env", "policy_kwargs", "seed", "device")
"""SB3's arguments that are no options here: they have settings of their own, or none."""
ENTROPY = "log_ent_coef"
"""SAC's learned temperature, under SB3's own name: it is no part of the policy's weights."""


def check(algorithm: str, options: Mapping[str, Any]) -> Any:
    """SB3's class of that name. UserError for an algorithm or option that it does not have."""
    import stable_baselines3

    if algorithm not in ALGORITHMS:
        raise UserError(f"algorithm: sb3 has no {algorithm!r} to learn off policy; it has {', '.join(ALGORITHMS)}")
    kind = getattr(stable_baselines3, algorithm)
    names = [name for name in inspect.signature(kind).parameters if name not in OURS]
    for name in options:
        if name not in names:
            raise UserError(f"options.{name}: sb3's {algorithm} has no such option; it has {', '.join(names)}")
    return kind


def wrapped(environment: Any, units: Units) -> gymnasium.Env[Any, Any]:
    """The environment in learner's units. environment: an `EnvironmentConfig`."""
    made = make_environment(
        environment.id, max_episode_steps=environment.max_episode_steps, options=environment.options
    )
    space = gymnasium.spaces.Box(-np.inf, np.inf, units.mean.shape, np.float32)
    flat = gymnasium.wrappers.FlattenObservation(made)
    paid = TransformReward(flat, lambda reward: float(units.rewards(np.asarray(reward))))
    return RescaleAction(TransformObservation(paid, units.observations, space), np.float32(-1), np.float32(1))


class SB3Backend:
    """An algorithm of SB3's in an environment."""

    def __init__(
        self,
        algorithm: str,
        options: Mapping[str, Any],
        hidden: Sequence[int],
        environment: Any,
        units: Units,
        seed: int,
    ) -> None:
        kind = check(algorithm, options)
        self.algorithm, self.options, self.hidden = algorithm, dict(options), list(hidden)
        with user_errors("options"):
            self.model = kind(
                "MlpPolicy",
                wrapped(environment, units),
                policy_kwargs={"net_arch": self.hidden},
                seed=seed,
                device="cpu",
                **options,
            )
        self.model._setup_learn(total_timesteps=1)  # its logger and first observation, before the first `learn`

    def remember(self, episodes: Sequence[Episode], units: Units) -> int:
        """Put the data set into the replay; returns how many decisions.

        A cut episode's last decision needs its final observation; without it, the episode is cut a step earlier.
        Raises UserError if the replay is too small, or no decision is left.
        """
        count = 0
        for episode in episodes:
            final = episode.final_observation
            last = len(episode) if final is not None or episode.terminated else len(episode) - 1
            seen = np.concatenate(
                [episode.observations, (episode.observations[-1] if final is None else final)[None]]
            )
            observations, actions = units.observations(seen), units.actions(episode.actions)
            rewards = units.rewards(episode.rewards)
            for step in range(last):
                ended = step == last - 1
                cut = ended and not episode.terminated
                # As SB3's own episodes lie there: a cut is `done` as well, which ends sums over several steps; the
                # mark beside it keeps the bootstrap.
                self.model.replay_buffer.add(
                    observations[step][None],
                    observations[step + 1][None],
                    actions[step][None],
                    rewards[step][None],
                    np.array([ended]),
                    [{"TimeLimit.truncated": cut}],
                )
            count += last
        if not count:
            raise UserError("data.path: no decision has a next observation: every episode is one cut step")
        if count > self.model.replay_buffer.buffer_size:
            raise UserError(f"options.buffer_size: the data set's {count:,} decisions do not fit into the replay")
        return count

    def learn(self, count: int) -> dict[str, float]:
        """Make `count` environment steps, with SB3's gradient steps; returns its latest metrics."""
        with redirect_stdout(io.StringIO()):
            self.model.learn(count, reset_num_timesteps=False, log_interval=1_000_000)
        values = self.model.logger.name_to_value
        return {name.removeprefix("train/"): float(v) for name, v in values.items() if name.startswith("train/")}

    def act(self, observations: Array) -> Array:
        """[N, D] -> [N, A]."""
        return np.asarray(self.model.predict(observations, deterministic=True)[0], np.float32)

    def save(self, folder: Path) -> None:
        """Write policy, critics and SAC's learned temperature; replay and optimizers are left out."""
        folder.mkdir(parents=True, exist_ok=True)
        described = {"algorithm": self.algorithm, "options": self.options, "hidden": self.hidden}
        (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")
        weights = self.model.policy.state_dict()
        if self._temperature() is not None:
            weights[ENTROPY] = self._temperature()
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / WEIGHTS)

    def restore(self, folder: Path) -> None:
        """Take the weights of a saved back end. UserError if they do not fit."""
        weights = load_file(folder / WEIGHTS)
        temperature = weights.pop(ENTROPY, None)
        if temperature is not None and self._temperature() is not None:
            self._temperature().data.copy_(temperature)  # in place: its optimizer holds it
        try:
            self.model.policy.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"{folder}: not the weights of this algorithm: {' '.join(str(error).split())}"
            ) from error

    def _temperature(self) -> Any:
        """SAC's learned log temperature [1]; None where it is fixed, and for the others."""
        return getattr(self.model, ENTROPY, None)


def load(folder: Path, environment: Any, units: Units) -> SB3Backend:
    """A saved back end, to act. UserError if the folder holds none."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text())
        options = described.get("options", {}) | {"buffer_size": 1}
        backend = SB3Backend(described["algorithm"], options, described["hidden"], environment, units, 0)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no saved sb3 algorithm here ({error})") from error
    backend.restore(folder)
    return backend
