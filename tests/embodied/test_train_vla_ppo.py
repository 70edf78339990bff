"""Online fine-tuning at the table, tiny: what moves, what stays, what is kept, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from embodied import train_vla_grpo, train_vla_ppo
from embodied.policies.vla import VLAPolicy
from embodied.train_vla_grpo import TrainVLAGRPOConfig
from embodied.train_vla_ppo import TrainVLAPPOConfig, rates
from embodied.vla.grounding import GroundingConfig
from embodied.vla.learner import TableEvaluationConfig, success_by_task, validation_plays
from embodied.vla.perceiving import PerceptionConfig
from embodied.vla.seats import TableConfig
from envs.stepper import EpisodeRecord
from envs.table.observations import STATE
from experiment.errors import UserError
from experiment.run import RunConfig
from policy_core.grpo import GRPOConfig
from policy_core.kl import KLConfig
from policy_core.ppo import PPOConfig
from tests.embodied.tables import tiny_policy

Rows = Callable[[Path], list[dict[str, Any]]]
STEPS = 2 * 3 * 4  # two tables, three chunks of four
EYES = PerceptionConfig(
    learning_rate=1e-3,
    pictures=5,
    minibatch_size=2,
    grounding=GroundingConfig(scenes=2, batch_size=3, workers=0),
)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    policy = tiny_policy()
    policy.state_normalizer.update(torch.randn(30, STATE))
    policy.save_pretrained(tmp_path / "clone")
    return tmp_path / "clone"


def ppo_config(clone: Path | None, folder: Path, **changes: Any) -> TrainVLAPPOConfig:
    ppo = PPOConfig(learning_rate=1e-3, epochs=1, minibatch_size=4, critic_warmup=0)
    fields: dict[str, Any] = {
        "run": RunConfig(folder=str(folder), wandb="disabled", checkpoint_every=1, seed=4),
        "environment": TableConfig(count=2, workers=0, tasks=("reach", "push")),
        "ppo": ppo,
        "init": None if clone is None else str(clone),
        "log_std": -1.0,
        "total_steps": 2 * STEPS,
        "horizon": 3,
        "update_threads": 1,
        **changes,
    }
    return TrainVLAPPOConfig(**fields)


def grpo_config(clone: Path, folder: Path, **changes: Any) -> TrainVLAGRPOConfig:
    fields: dict[str, Any] = {
        "run": RunConfig(folder=str(folder), wandb="disabled", checkpoint_every=1, seed=4),
        "environment": TableConfig(count=2, workers=0, tasks=("reach",)),
        "grpo": GRPOConfig(group_size=2),
        "ppo": PPOConfig(learning_rate=1e-3, epochs=1, minibatch_size=16, gamma=1.0, normalize_advantages=False),
        "init": str(clone),
        "log_std": -1.0,
        "updates": 2,
        "update_threads": 1,
        **changes,
    }
    return TrainVLAGRPOConfig(**fields)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in VLAPolicy.from_pretrained(folder).state_dict().items()}


def moved(before: Path, run: Path, checkpoint: str = "last") -> set[str]:
    """First parts of the names of what changed, but for the deviation that the configuration sets."""
    old, new = weights(before), weights(run / "checkpoints" / checkpoint / "policy")
    return {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])} - {"log_std"}


# ------------------------------------------------------------------ ppo


def test_two_updates(clone: Path, tmp_path: Path, rows_of: Rows) -> None:
    config = ppo_config(clone, tmp_path / "run", evaluation=TableEvaluationConfig(every=2, episodes=3))
    result = train_vla_ppo.train(config)
    first, second = rows_of(result.folder)
    assert first["train/rollout_logprob_gap"] < 1e-4
    assert "train/rollout_logprob_gap" not in second
    assert (first["env_steps"], second["env_steps"]) == (STEPS, 2 * STEPS)
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert second["objective/kl"] != 0.0
    assert first["train/std"] == pytest.approx(math.exp(-1.0))
    assert "train/percept_loss" not in first  # the eyes stay unless they are to learn
    assert {"eval/success_once", "eval/success_once/reach", "eval/success_once/push"} <= second.keys()
    assert second["eval/episodes"] == 3
    assert moved(clone, result.folder) == {"actor", "critic"}
    kept = weights(result.folder / "checkpoints" / "last" / "policy")["log_std"]
    assert torch.equal(kept, torch.full((4,), -1.0))  # not learned unless asked for


def test_learning_rate_0_leaves_the_weights(clone: Path, tmp_path: Path, rows_of: Rows) -> None:
    config = ppo_config(clone, tmp_path / "run", critic_learning_rate=0.0)
    config = replace(config, ppo=replace(config.ppo, learning_rate=0.0, epochs=3))
    result = train_vla_ppo.train(config)
    assert moved(clone, result.folder) == set()
    for row in rows_of(result.folder):  # every ratio of every pass is 1
        assert row["train/approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert row["train/clip_fraction"] == 0.0


def test_warm_up_moves_the_critic_only(clone: Path, tmp_path: Path, rows_of: Rows) -> None:
    """And the last update of a run is the policy's, however short the run: a dry run has no other."""
    config = ppo_config(clone, tmp_path / "run", total_steps=3 * STEPS)
    result = train_vla_ppo.train(replace(config, ppo=replace(config.ppo, critic_warmup=9)))
    assert moved(clone, result.folder, "000000002") == {"critic"}
    assert moved(clone, result.folder) == {"actor", "critic"}
    assert ["train/policy_loss" in row for row in rows_of(result.folder)] == [False, False, True]


def test_rates_of_their_own(clone: Path, tmp_path: Path) -> None:
    config = ppo_config(clone, tmp_path / "run", critic_learning_rate=0.0)
    assert "critic" not in moved(clone, train_vla_ppo.train(config).folder)


def test_the_actors_schedule_begins_after_the_critics_warm_up() -> None:
    ppo = PPOConfig(learning_rate=1.0, schedule="linear", warmup=0.5, critic_warmup=4)
    eyes = PerceptionConfig(learning_rate=20.0)
    config = TrainVLAPPOConfig(ppo=ppo, critic_learning_rate=10.0, perception=eyes)
    told = [rates(config, update=update, updates=12) for update in range(1, 13)]
    assert [actor for actor, *_ in told] == [0.0] * 5 + [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    assert [critic for _, critic, _ in told[:7]] == pytest.approx([0, 10 / 6, 20 / 6, 5, 40 / 6, 50 / 6, 10])
    assert [eyes for *_, eyes in told] == pytest.approx(
        [2 * critic for _, critic, _ in told]
    )  # no warm-up to wait for
    constant = TrainVLAPPOConfig(ppo=PPOConfig(learning_rate=2.0, critic_warmup=9), critic_learning_rate=3.0)
    assert [rates(constant, update=update, updates=5) for update in range(1, 6)] == [[2.0, 3.0, 0.0]] * 5


def test_what_the_eyes_learn_while_the_hand_does(clone: Path, tmp_path: Path, rows_of: Rows) -> None:
    """They see better and better, and what the hand learns in the same update is the same as without."""
    config = ppo_config(clone, tmp_path / "still", total_steps=STEPS)
    still = train_vla_ppo.train(config).folder
    learning = replace(config, run=replace(config.run, folder=str(tmp_path / "learning")), perception=EYES)
    result = train_vla_ppo.train(learning)
    assert moved(clone, still) == {"actor", "critic"}
    assert moved(clone, result.folder) == {"actor", "critic", "perception"}
    (row,) = rows_of(result.folder)
    assert min(row["train/percept_loss"], row["train/grounding_loss"]) > 0
    one, two = (weights(folder / "checkpoints" / "last" / "policy") for folder in (still, result.folder))
    hand = [name for name in one if not name.startswith("perception.")]
    assert all(torch.equal(one[name], two[name]) for name in hand)
    alone = replace(learning, run=replace(config.run, folder=str(tmp_path / "alone")))
    alone = replace(alone, perception=replace(EYES, grounding=GroundingConfig()))
    (row,) = rows_of(train_vla_ppo.train(alone).folder)
    assert row["train/percept_loss"] > 0
    assert "train/grounding_loss" not in row


def test_the_eyes_learn_while_the_critic_warms_up(clone: Path, tmp_path: Path, rows_of: Rows) -> None:
    config = ppo_config(clone, tmp_path / "run", perception=EYES)
    config = replace(config, kl=KLConfig(coef=0.5, target=1e9, horizon=1.0))
    result = train_vla_ppo.train(replace(config, ppo=replace(config.ppo, critic_warmup=2)))
    assert moved(clone, result.folder, "000000001") == {"critic", "perception"}
    assert [row["objective/kl_coef"] for row in rows_of(result.folder)] == [0.5, 0.5]


def test_a_dry_run_draws_few_scenes(clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = replace(EYES, grounding=replace(EYES.grounding, scenes=40_000))
    config = ppo_config(clone, tmp_path / "run", perception=many)
    train_vla_ppo.train(replace(config, run=replace(config.run, dry_run=True)))
    assert "grounding: 32 of 32 pictures" in capsys.readouterr().err


def test_credit_for_steps_needs_a_ratio_for_each(clone: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs ppo\.ratio_level .factor."):
        ppo_config(clone, tmp_path / "run", credit="step")
    config = ppo_config(clone, tmp_path / "run")
    by_step = replace(config, credit="step", kl=KLConfig(), ppo=replace(config.ppo, ratio_level="factor"))
    metrics = train_vla_ppo.train(by_step).metrics
    assert metrics["train/policy_loss"] != 0.0
    with pytest.raises(ValueError, match="the reward of a control step has no KL"):
        replace(by_step, kl=KLConfig(coef=0.1))


def test_the_kl_in_the_loss_and_a_learned_deviation(clone: Path, tmp_path: Path, rows_of: Rows) -> None:
    config = ppo_config(
        clone,
        tmp_path / "run",
        kl=KLConfig(coef=0.1, placement="loss", estimator="k2", target=0.01, unit="decision", horizon=1.0),
        learn_std=True,
        recompute_log_probs=True,
    )
    result = train_vla_ppo.train(config)
    assert all(row["train/reference_kl"] > 0 for row in rows_of(result.folder))


def test_the_eyes_may_learn_beside_groups(clone: Path, tmp_path: Path, rows_of: Rows) -> None:
    config = grpo_config(clone, tmp_path / "run", perception=EYES, updates=1)
    result = train_vla_grpo.train(config)
    assert moved(clone, result.folder) == {"actor", "perception"}
    (row,) = rows_of(result.folder)
    assert min(row["train/percept_loss"], row["train/grounding_loss"]) > 0


def test_groups_that_all_fail_teach_nothing(clone: Path, tmp_path: Path, rows_of: Rows) -> None:
    sparse = TableConfig(count=2, workers=0, tasks=("stack",), reward="sparse")
    config = grpo_config(clone, tmp_path / "run", environment=sparse, kl=KLConfig())
    result = train_vla_grpo.train(config)
    assert [row["objective/frac_reward_zero_std"] for row in rows_of(result.folder)] == [1.0, 1.0]
    assert moved(clone, result.folder) == set()


def test_groups_must_fill_the_tables() -> None:
    with pytest.raises(ValueError, match=r"multiple of grpo\.group_size, got 6 and 4"):
        TrainVLAGRPOConfig(environment=TableConfig(count=6), grpo=GRPOConfig(group_size=4))


# ------------------------------------------------------------------ mistakes


def test_there_must_be_a_clone_that_fits(clone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"^there is no policy to start from: give init="):
        train_vla_ppo.train(ppo_config(None, run))
    with pytest.raises(UserError, match=r"policy\.json is missing"):
        train_vla_ppo.train(ppo_config(tmp_path, run))
    with pytest.raises(UserError, match=r"^log_std -9.0 is outside the policy's -3.0\.\.0.0$"):
        train_vla_ppo.train(ppo_config(clone, run, log_std=-9.0))
    with pytest.raises(UserError, match="there is no task 'lift'"):
        train_vla_ppo.train(ppo_config(clone, run, environment=TableConfig(count=2, tasks=("lift",))))
    description = (clone / "policy.json").read_text()
    (clone / "policy.json").write_text(description.replace('"front"', '"ceiling"'))
    with pytest.raises(UserError, match="the table's are front, wrist"):
        train_vla_ppo.train(ppo_config(clone, run))
    assert not run.exists()


def test_configurations_that_cannot_be_meant() -> None:
    for config in (TrainVLAPPOConfig, TrainVLAGRPOConfig):
        with pytest.raises(ValueError, match=r"ppo\.aggregation must be 'decision'"):
            config(ppo=PPOConfig(aggregation="episode"))
        with pytest.raises(ValueError, match="must be at least 1"):
            config(update_threads=0)
    for ppo in (PPOConfig(gamma=0.99), PPOConfig(gamma=1.0, critic_warmup=2)):
        with pytest.raises(ValueError, match=r"ppo\.gamma must be 1 and ppo\.critic_warmup 0"):
            TrainVLAGRPOConfig(ppo=ppo)


# ------------------------------------------------------------------ what is told


def test_tasks_take_turns_and_are_told_apart() -> None:
    from embodied.vla.seats import TableEpisode

    plays = validation_plays(("reach", "push", "push"), 3)  # judged alike, though one is played more often
    assert plays == [
        (10_000_000, {"task": "reach"}),
        (10_000_001, {"task": "push"}),
        (10_000_002, {"task": "reach"}),
    ]

    def episode(task: str, won: bool) -> TableEpisode:
        return TableEpisode(EpisodeRecord(1.0, 5, won, won, won, False, 0, 0), task, "", "", None)

    told = success_by_task([episode("push", True), episode("reach", False), episode("push", False)], "env")
    assert told == {"env/success_once/push": 0.5, "env/success_once/reach": 0.0}
