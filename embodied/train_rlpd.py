"""Off-policy learning online with prior data: half of every batch from the data set, half from one's own replay.

    tandem train configs/embodied/adroit_door_rlpd.yaml data.path=door_human.hdf5
    tandem train configs/embodied/adroit_door_rlpd.yaml data.path=door_human.hdf5 init=runs/door-cal-ql

RLPD (Ball 2023, 2302.02948): soft actor-critic with many normalised critics; prior data is never evicted. With
`conservative` the critics are Cal-QL's, for going on from an offline Cal-QL run without a dip (2303.05479).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from embodied.logged.offline import CriticConfig, Inputs, precision
from embodied.logged.practice import Practice, PracticeConfig, practise
from embodied.train_cql import Moving, new_parts
from experiment.checkpoint import Checkpoint
from experiment.run import RunResult
from policy_core import cql, sac
from policy_core.cql import CQLConfig
from policy_core.metrics import Metrics
from policy_core.sac import SACConfig


@dataclass(frozen=True)
class TrainRLPDConfig(PracticeConfig):
    """init: a run of embodied/cql. sac: entropy and slow critics.

    policy_every         updates of the critics for each of policy and temperature, which learn at least once a
                         round. The paper has 20, as many as `updates_per_step`, and as `sac.target_entropy` minus
                         half the number of action dimensions
    conservative         Cal-QL's term in the critics' loss (null: none); `sac` above counts, not its own
    """

    critic: CriticConfig = field(default_factory=lambda: CriticConfig(members=10, layer_norm=True))
    sac: SACConfig = field(default_factory=lambda: SACConfig(target_critics=2))
    conservative: CQLConfig | None = None
    policy_every: int = 1
    policy_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy_every < 1:
            raise ValueError(f"policy_every must be at least 1, got {self.policy_every}")


def train(config: TrainRLPDConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    return practise(config, recipe="embodied/rlpd", build=build, resume=resume)


def build(
    config: TrainRLPDConfig, inputs: Inputs, checkpoint: Checkpoint | None = None
) -> tuple[Practice, Callable[[int], Metrics]]:
    """What learns (fresh, from the run that `config.init` names, or from a checkpoint), and how it does.

    UserError if that run does not fit.
    """
    rates = (config.policy_learning_rate, config.critic_learning_rate)
    policy, moving = new_parts(config, inputs, rates=rates, sac=config.sac)
    practice = Practice.begin(config, inputs, policy, moving.parts, checkpoint, offline="embodied/cql")
    return practice, partial(improve, moving, practice, config)


def improve(moving: Moving, practice: Practice, config: TrainRLPDConfig, updates: int) -> Metrics:
    """A round's `updates` of the critics, and those of policy and temperature; the last one's metrics."""
    metrics: Metrics = {}
    generator = practice.parts.generator
    lagrange = config.conservative is not None and config.conservative.threshold is not None
    common = (moving.networks, moving.temperature, moving.optimizers)
    for number in range(1, updates + 1):
        improved = number % config.policy_every == 0 or number == updates
        batch, returns = practice.memory.draw(config, generator)
        with precision(config):
            if config.conservative is None:
                metrics = sac.update(*common, batch, config.sac, generator=generator, improve=improved)
            else:
                metrics = cql.update(
                    *common,
                    batch,
                    replace(config.conservative, sac=config.sac),
                    multiplier=moving.multiplier if lagrange else None,
                    returns=returns,
                    generator=generator,
                    improve=improved,
                )
    return metrics
