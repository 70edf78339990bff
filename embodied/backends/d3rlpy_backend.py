"""d3rlpy's offline algorithms for continuous actions (https://d3rlpy.readthedocs.io)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from embodied.backends.backend import Array, Units
from embodied.datasets.episode import Episode
from experiment.errors import UserError

DESCRIPTION, WEIGHTS = "d3rlpy.json", "d3rlpy.safetensors"


def _library() -> Any:
    import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    return d3rlpy


def algorithms() -> list[str]:
    """Names of what can be trained here: offline, continuous actions, step by step."""
    d3rlpy = _library()
    names = []
    for name in dir(d3rlpy.algos):
        config = getattr(d3rlpy.algos, name)
        if name.endswith("Config") and hasattr(config, "get_type") and not name.startswith(("Discrete", "DQN")):
            base = getattr(d3rlpy.algos, name.removesuffix("Config"), None)
            if base is not None and issubclass(base, d3rlpy.algos.QLearningAlgoBase):
                names.append(name.removesuffix("Config"))
    continuous = d3rlpy.constants.ActionSpace.CONTINUOUS
    made = {name: getattr(d3rlpy.algos, f"{name}Config")().create(device="cpu:0") for name in names}
    return sorted(name for name, learner in made.items() if learner.get_action_type() == continuous)


def configure(algorithm: str, options: Mapping[str, Any], hidden: Sequence[int]) -> Any:
    """d3rlpy's configuration. UserError for an algorithm or option that it does not have."""
    d3rlpy = _library()
    known = algorithms()
    if algorithm not in known:
        raise UserError(f"algorithm: d3rlpy has no {algorithm!r} for continuous actions; it has {', '.join(known)}")
    kind = getattr(d3rlpy.algos, f"{algorithm}Config")
    names = [field.name for field in fields(kind)]
    for name in options:
        if name not in names:
            raise UserError(f"options.{name}: d3rlpy's {algorithm} has no such option; it has {', '.join(names)}")
    encoder = d3rlpy.models.encoders.VectorEncoderFactory(list(hidden))
    encoders = {name: encoder for name in names if name.endswith("encoder_factory")}
    return kind(**{**encoders, **options})


class D3rlpyBackend:
    """An algorithm of d3rlpy's on a data set, or without one to act only."""

    def __init__(self, config: Any, sizes: tuple[int, int], dataset: Any = None) -> None:
        self.config, self.sizes, self.dataset = config, sizes, dataset
        self.learner = config.create(device="cpu:0")
        self.learner.create_impl((sizes[0],), sizes[1])

    @classmethod
    def of(cls, config: Any, episodes: Sequence[Episode], units: Units) -> D3rlpyBackend:
        """The algorithm on the episodes in learner's units; where one was cut, d3rlpy leaves its last decision out.

        Raises UserError if that leaves nothing.
        """
        d3rlpy = _library()
        ended = [np.eye(1, len(e), len(e) - 1, dtype=np.float32)[0] for e in episodes]
        dataset = d3rlpy.dataset.MDPDataset(
            observations=units.observations(np.concatenate([e.observations for e in episodes])),
            actions=units.actions(np.concatenate([e.actions for e in episodes])),
            rewards=np.concatenate([units.rewards(e.rewards) for e in episodes]),
            terminals=np.concatenate([end * e.terminated for end, e in zip(ended, episodes, strict=True)]),
            timeouts=np.concatenate([end * (not e.terminated) for end, e in zip(ended, episodes, strict=True)]),
        )
        if not dataset.transition_count:
            raise UserError(
                "data.path: d3rlpy leaves out the last decision of a cut episode, and every episode is one cut step"
            )
        return cls(config, (episodes[0].observations.shape[1], episodes[0].actions.shape[1]), dataset)

    def learn(self, count: int) -> dict[str, float]:
        """Make `count` updates; returns the last one's losses."""
        metrics: dict[str, float] = {}
        for _ in range(count):
            metrics = self.learner.update(self.dataset.sample_transition_batch(self.config.batch_size))
        return {name: float(value) for name, value in metrics.items()}

    def act(self, observations: Array) -> Array:
        """[N, D] -> [N, A]."""
        return np.asarray(self.learner.predict(observations), np.float32)

    def save(self, folder: Path) -> None:
        """Write configuration and weights; the optimizers are left out."""
        folder.mkdir(parents=True, exist_ok=True)
        described = {
            "algorithm": type(self.learner).__name__,
            "config": json.loads(self.config.serialize()),
            "sizes": self.sizes,
        }
        (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")
        save_file(
            {
                f"{name}.{key}": tensor.contiguous().clone()
                for name, module in self.learner.impl.modules.get_torch_modules().items()
                for key, tensor in module.state_dict().items()
            },
            folder / WEIGHTS,
        )

    def restore(self, folder: Path) -> None:
        """Take the weights of a saved back end of the same configuration. UserError if they do not fit."""
        weights = load_file(folder / WEIGHTS)
        try:
            for name, module in self.learner.impl.modules.get_torch_modules().items():
                prefix = f"{name}."
                own = {key.removeprefix(prefix): t for key, t in weights.items() if key.startswith(prefix)}
                module.load_state_dict(own)
        except RuntimeError as error:
            raise UserError(
                f"{folder}: not the weights of this algorithm: {' '.join(str(error).split())}"
            ) from error


def load(folder: Path) -> D3rlpyBackend:
    """A saved back end, to act. UserError if the folder holds none."""
    d3rlpy = _library()
    try:
        described = json.loads((folder / DESCRIPTION).read_text())
        kind = getattr(d3rlpy.algos, f"{described['algorithm']}Config")
        config = kind.deserialize(json.dumps(described["config"]))
        observation_size, action_size = described["sizes"]
        backend = D3rlpyBackend(config, (observation_size, action_size))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{folder}: no saved d3rlpy algorithm here ({error})") from error
    backend.restore(folder)
    return backend
