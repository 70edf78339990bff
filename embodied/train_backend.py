"""Another library's algorithm on the same data, with the same evaluation, run folder and logging.

    tandem train configs/embodied/backend.yaml algorithm=d3rlpy/ReBRAC data.path=FILE environment.id=HalfCheetah-v5
    tandem train configs/embodied/backend.yaml algorithm=sb3/SAC data.path=FILE environment.id=HalfCheetah-v5

d3rlpy learns from the data alone; stable-baselines3 begins with the data in its replay and plays. A resumed run has
the weights (and SAC's temperature), but fresh optimizers, replay and episodes: it says so.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from embodied.backends import d3rlpy_backend, sb3_backend
from embodied.backends.backend import Backend, Units, play
from embodied.evaluate import VALIDATION_SEEDS, score, seeds, summarize
from embodied.logged.offline import Inputs
from embodied.logged.transitions import DataConfig, reward_scale
from embodied.rollouts.workers import EnvironmentConfig
from experiment.errors import UserError
from experiment.run import Run, RunConfig, RunResult

UNITS = "units.json"


@dataclass(frozen=True)
class TrainBackendConfig:
    """algorithm        d3rlpy/NAME or sb3/NAME
    options          of that algorithm, by the library's own names
    hidden           widths of its networks
    data             gamma and n_steps are the library's affair, and do not count here
    total            updates (d3rlpy) or environment steps (sb3)
    log_every, evaluate_every: in the unit of `total`
    episodes         played at each evaluation
    """

    run: RunConfig = field(default_factory=RunConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algorithm: str = "d3rlpy/ReBRAC"
    options: dict[str, str | bool | int | float] = field(default_factory=dict)
    hidden: tuple[int, ...] = (256, 256)
    total: int = 100_000
    log_every: int = 1_000
    evaluate_every: int = 10_000
    episodes: int = 20

    def __post_init__(self) -> None:
        if min(self.total, self.log_every, self.evaluate_every) < 1 or self.episodes < 1:
            raise ValueError("total, log_every, evaluate_every and episodes must be at least 1")
        if self.evaluate_every % self.log_every:
            raise ValueError("evaluate_every must be a multiple of log_every")


def begin(config: TrainBackendConfig, inputs: Inputs, units: Units) -> Any:
    """The back end that `config.algorithm` names, with the data.

    UserError if there is none, an option is unknown, or the data leave nothing to learn from.
    """
    library, _, name = config.algorithm.partition("/")
    if library == "d3rlpy":
        described = d3rlpy_backend.configure(name, config.options, config.hidden)
        return d3rlpy_backend.D3rlpyBackend.of(described, inputs.episodes, units)
    if library == "sb3":
        backend = sb3_backend.SB3Backend(
            name, config.options, config.hidden, config.environment, units, config.run.seed
        )
        backend.remember(inputs.episodes, units)
        return backend
    raise UserError(f"algorithm: {config.algorithm!r} is neither d3rlpy/NAME nor sb3/NAME")


def train(config: TrainBackendConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    inputs = Inputs.read(config)
    scale = reward_scale(inputs.episodes, config.data)
    units = Units.of(inputs.episodes, inputs.environment, reward_scale=scale, reward_shift=config.data.shift)
    begin(config, inputs, units)  # what is not known is told before there is a folder
    pieces = 1 if config.run.dry_run else -(-config.total // config.log_every)
    with Run.start(config, recipe="embodied/backend", resume=resume) as run:
        backend = begin(config, inputs, units)
        first = 1
        if run.checkpoint is not None:
            first = run.checkpoint.step + 1
            backend.restore(run.checkpoint.folder / "policy")
            print("resuming with fresh optimizers, replay and episodes: the back end keeps none", file=sys.stderr)
        run.begin_loop(pieces)
        for piece in range(first, pieces + 1):
            done = (piece - 1) * config.log_every
            count = min(config.log_every, 10 if config.run.dry_run else config.total - done)
            metrics = {f"train/{name}": value for name, value in backend.learn(count).items()}
            judged = piece == pieces or piece * config.log_every % config.evaluate_every == 0
            sound = all(math.isfinite(value) for name, value in metrics.items() if "loss" in name)
            played = judge(backend, units, config) if judged and sound else {}  # logging stops an unsound run
            run.log({**metrics, "samples": float(done + count), **played}, global_step=piece)
            if judged:
                folders = {"policy": partial(save, backend, units)}
                run.save({}, global_step=piece, folders=folders, metric=score(played))
        return run.finish()


def judge(backend: Backend, units: Units, config: TrainBackendConfig) -> dict[str, float]:
    """What the policy's best actions earn."""
    return summarize(play(backend, units, config.environment, seeds(VALIDATION_SEEDS, config.episodes)))


def save(backend: Backend, units: Units, folder: Path) -> None:
    """Write the policy, and the units that it learned in."""
    backend.save(folder)
    (folder / UNITS).write_text(json.dumps(units.as_json()) + "\n")
