"""The group recipe's family: dynamic sampling, overlong shaping, what is counted, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf import train_grpo
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.generation import Samples
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.rewards.functions import Scores
from llm_rlhf.tasks.task import TaskConfig, build_task
from llm_rlhf.train_grpo import TrainGRPOConfig, chosen_rows, groups_with_signal

NAN = float("nan")


def scores_of(total: list[float]) -> Scores:
    """NaN means unscored."""
    values = torch.tensor(total)
    return Scores(total=values.nan_to_num(0.0), scored=~values.isnan(), by_name={})


PROMPTS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4])
EARNED = [1.0, 0, 1, 1, 1, 1, NAN, 0, 0, NAN, NAN, NAN, NAN, 1, 0]


def test_a_group_has_a_signal_if_what_was_scored_differs() -> None:
    """Groups: 1 0 1, 1 1 1, ? 0 0, ? ? ?, ? 1 0. Unscored rows are no zeros."""
    found = groups_with_signal(scores_of(EARNED), PROMPTS)
    assert found.tolist() == [True, False, False, False, True]


def test_rounding_is_no_signal() -> None:
    third = torch.tensor(0.7)
    found = groups_with_signal(scores_of([0.7, float(torch.nextafter(third, 2 * third)), 0.7] * 5), PROMPTS)
    assert not found.any()


def test_the_first_groups_with_a_signal_are_chosen() -> None:
    def chosen(prompts: int) -> list[int]:
        return chosen_rows(scores_of(EARNED), PROMPTS, prompts=prompts).tolist()

    assert chosen(1) == [0, 1, 2]
    assert chosen(2) == chosen(9) == [0, 1, 2, 12, 13, 14]
    flat = chosen_rows(scores_of([1.0] * 15), PROMPTS, prompts=2)
    assert flat.tolist() == [0, 1, 2, 3, 4, 5]


# ---------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    alphabet = build_task(TaskConfig(name="random_walks")).alphabet
    policy, tokenizer = build_policy(ModelConfig(layers=1, width=16, heads=2, context=16), alphabet=alphabet)
    folder = tmp_path_factory.mktemp("start")
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Completions of every other letter's prompts earn a coin each, the rest earn 0."""
    file = tmp_path_factory.mktemp("own") / "halves.py"
    file.write_text(
        "import random\n"
        "def score(prompts, completions, sample_index):\n"
        "    coins = [float(random.Random(index).random() < 0.5) for index in sample_index]\n"
        "    return [coin * (ord(prompt) % 2) for coin, prompt in zip(coins, prompts)]\n"
        "def nothing(prompts, completions):\n"
        "    return [0.0 for _ in completions]\n"
        "def same(prompts, completions):\n"
        "    return [0.7 for _ in completions]\n"
    )
    return f"{file}:score"


def small(folder: Path, start: Path, *, updates: int = 1, **sections: Any) -> TrainGRPOConfig:
    settings = {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 2, "seed": 5},
        "task": {"name": "random_walks", "random_walks": {"walks": 60}},
        "model": {"path": str(start)},
        "generation": {"max_new_tokens": 4},
        "sampling": {"updates": updates, "prompts": 4},
        "grpo": {"group_size": 4},
        "ppo": {"minibatch_size": 8, "learning_rate": 1e-3},
        "validation": {"every": 0},
        **sections,
    }
    return build_from_dict(settings, TrainGRPOConfig)


def weights(run: Path) -> dict[str, Tensor]:
    return LanguagePolicy.from_pretrained(run).state_dict()


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def dynamic(folder: Path, start: Path, halves: str, *, updates: int = 4) -> TrainGRPOConfig:
    sampling = {"updates": updates, "prompts": 4, "dynamic_rounds": 3}
    return small(folder, start, updates=updates, sampling=sampling, rewards={halves: 1.0})


def test_dynamic_sampling_draws_until_the_batch_is_full(tmp_path: Path, start: Path, halves: str) -> None:
    """What is learned from is full of signal or rounds are used up; everything that was drawn is counted."""
    shapes: list[tuple[int, float]] = []
    original = train_grpo.update

    def update(**arguments: Any) -> dict[str, float]:
        rollout = arguments["rollout"]
        per_group = [rollout.rewards[rollout.group[:, 0] == group].sum() for group in rollout.group[:, 0].unique()]
        assert all(0 < total < 4 for total in per_group), "a flat group was learned from"
        shapes.append((len(per_group), float(rollout.shape[0])))
        return original(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_grpo, "update", update)
        config = dynamic(tmp_path / "run", start, halves)
        config = replace(config, kl=replace(config.kl, coef=0.0))
        logged = rows(train_grpo.train(config).folder)
    samples = 0
    for row, (groups, sequences) in zip(logged, shapes, strict=True):
        samples += int(row["sampling/groups_drawn"]) * 4
        assert row["samples"] == samples
        assert row["sampling/groups_drawn"] == 4 * row["sampling/rounds"]
        assert row["sampling/groups_trained"] == min(row["sampling/groups_with_signal"], 4) == groups
        assert sequences == 4 * groups
        assert row["sampling/rounds"] == 3 or groups == 4
        assert row["objective/frac_reward_zero_std"] == 0.0
        assert row["objective/scores"] < 0.6, "of everything that was drawn, flat groups too"
    assert max(row["sampling/rounds"] for row in logged) > 1


def test_dynamic_sampling_resumes_to_the_bit(tmp_path: Path, start: Path, halves: str) -> None:
    class InterruptError(Exception):
        pass

    whole = train_grpo.train(dynamic(tmp_path / "whole", start, halves)).folder
    original = Run.log

    def log(self: Any, metrics: Any, *, global_step: int) -> None:
        if global_step == 3:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(InterruptError):
            train_grpo.train(dynamic(tmp_path / "broken", start, halves))
    torch.manual_seed(12345)
    train_grpo.train(dynamic(tmp_path / "broken", start, halves), resume=tmp_path / "broken")
    assert rows(whole) == rows(tmp_path / "broken")
    expected, found = weights(whole), weights(tmp_path / "broken")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "dr_grpo", "reinforce_pp", "reinforce_pp_baseline"])
@pytest.mark.parametrize("skip", [True, False])
def test_one_and_the_same_reward_teaches_nothing(
    tmp_path: Path, start: Path, halves: str, advantage: str, skip: bool
) -> None:
    """0.7 is no float32, and the mean of eight such numbers is another one: Adam would make steps of that."""
    config = small(
        tmp_path / "run",
        start,
        rewards={halves.replace(":score", ":same"): 1.0},
        grpo={"advantage": advantage, "group_size": 7},
        kl={"coef": 0.0},
        sampling={"updates": 2, "prompts": 4, "skip_flat_groups": skip},
    )
    metrics = train_grpo.train(config).metrics
    assert metrics["objective/frac_reward_zero_std"] == 1.0
    assert metrics["policy/grad_norm"] == 0.0
    before, after = weights(start), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_and_the_same_reward_teaches_nothing_whatever_the_kl_took_off(
    tmp_path: Path, start: Path, halves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reference(_: Any, samples: Samples) -> Tensor:
        return samples.log_probs - torch.where(samples.mask, torch.rand(samples.mask.shape), 0.0)

    monkeypatch.setattr(train_grpo, "reference_log_probs", reference)
    config = small(
        tmp_path / "run",
        start,
        rewards={halves.replace(":score", ":same"): 1.0},
        kl={"coef": 0.1, "placement": "reward"},
        sampling={"updates": 2, "prompts": 4},
    )
    metrics = train_grpo.train(config).metrics
    assert metrics["objective/kl"] > 0.1
    assert metrics["objective/frac_reward_zero_std"] == 1.0
    assert metrics["policy/grad_norm"] == 0.0
    before, after = weights(start), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_strong_kl_holds_the_policy(tmp_path: Path, start: Path, halves: str) -> None:
    """In the loss, where it is by default: what moved without it stays nearer to its start with it."""
    spent = {}
    for coef in (0.0, 50.0):
        config = small(
            tmp_path / f"run-{coef}",
            start,
            updates=12,
            rewards={halves: 1.0},
            kl={"coef": coef},
            ppo={"minibatch_size": 16, "learning_rate": 1e-2},
        )
        found = rows(train_grpo.train(config).folder)
        assert all(("loss/reference_kl" in row) == (coef > 0) for row in found)
        spent[coef] = sum(row["objective/kl"] for row in found[-4:]) / 4
    assert spent[0.0] > 0.05
    assert spent[50.0] < 0.3 * spent[0.0]


def test_no_signal_at_all_ends_after_the_last_round(tmp_path: Path, start: Path, halves: str) -> None:
    config = dynamic(tmp_path / "run", start, halves, updates=1)
    config = replace(config, rewards={halves.replace(":score", ":nothing"): 1.0}, kl=replace(config.kl, coef=0.0))
    metrics = train_grpo.train(config).metrics
    assert metrics["sampling/rounds"] == 3.0
    assert metrics["sampling/groups_with_signal"] == metrics["sampling/groups_trained"] == 0.0
    before, after = weights(start), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("advantage", ["reinforce_pp", "reinforce_pp_baseline"])
def test_reinforce_pp(tmp_path: Path, start: Path, advantage: str) -> None:
    """Its baseline is the batch: one sample a prompt is enough, and it learns."""
    size = 1 if advantage == "reinforce_pp" else 4
    config = small(
        tmp_path / "run", start, grpo={"advantage": advantage, "group_size": size}, rewards={"random": 1.0}
    )
    metrics = train_grpo.train(config).metrics
    assert metrics["samples"] == 4 * size
    assert metrics["policy/grad_norm"] > 0


def test_dapo_punishes_what_ends_late(tmp_path: Path, start: Path) -> None:
    """A policy that learns nothing but to end in time."""
    file = tmp_path / "own.py"
    file.write_text("def nothing(prompts, completions):\n    return [0.0 for _ in completions]\n")
    config = small(
        tmp_path / "run",
        start,
        updates=12,
        rewards={f"{file}:nothing": 1.0},
        overlong={"buffer": 3},
        generation={"max_new_tokens": 6},
        sampling={"updates": 12, "prompts": 14, "dynamic_rounds": 2},
        ppo={"learning_rate": 1e-2, "clip_range_high": 0.28, "aggregation": "decision", "minibatch_size": 64},
        kl={"coef": 0.0},
    )
    logged = rows(train_grpo.train(config).folder)
    assert logged[0]["rewards/overlong/mean"] < -0.7
    assert logged[-1]["rewards/overlong/mean"] > logged[0]["rewards/overlong/mean"] + 0.3
    assert logged[-1]["completions/finished"] > logged[0]["completions/finished"] + 0.2
    assert logged[0]["objective/scores"] == pytest.approx(logged[0]["rewards/overlong/mean"], abs=1e-6)


def test_dropped_completions_teach_nothing(tmp_path: Path, start: Path) -> None:
    """A model that never ends: everything is dropped, and no weight moves."""
    folder = tmp_path / "endless"
    policy, tokenizer = build_policy(ModelConfig(path=str(start)), alphabet="")
    state = policy.model.state_dict()
    state["transformer.ln_f.bias"].fill_(3.0)
    state["transformer.wte.weight"][int(tokenizer.eos_token_id)] = -3.0
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    config = small(
        tmp_path / "run",
        folder,
        shaping={"cut": "drop"},
        rewards={"random": 1.0},
        kl={"coef": 0.1, "target": 1.0, "placement": "loss", "estimator": "k2", "horizon": 16.0},
    )
    result = train_grpo.train(config)
    assert result.metrics["completions/finished"] == 0.0
    before, after = weights(folder), weights(result.folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_makes_no_sense_is_refused(tmp_path: Path, start: Path) -> None:
    for sections, message in (
        ({"shaping": {"cut": "bootstrap"}}, r"shaping\.cut bootstrap needs a critic"),
        ({"generation": {"cut_is_end": False}}, r"shaping\.cut bootstrap needs a critic"),
        ({"shaping": {"cut": "drop"}, "generation": {"cut_is_end": False}}, "contradicts generation.cut_is_end"),
        ({"sampling": {"dynamic_rounds": 0}}, "dynamic_rounds must be at least 1"),
        ({"sampling": {"logprob_gap_every": -1}}, r"sampling\.logprob_gap_every"),
        (
            {"sampling": {"dynamic_rounds": 2}, "grpo": {"advantage": "reinforce_pp", "group_size": 1}},
            r"sampling\.dynamic_rounds needs groups",
        ),
    ):
        with pytest.raises(UserError, match=message):
            small(tmp_path / "run", start, **sections)
