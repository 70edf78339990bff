"""Iterative preference optimization in miniature: which pairs a round makes, that it learns and resumes."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf import train_iterative_dpo, train_sft
from llm_rlhf.evaluate import EvaluateConfig, evaluate_run
from llm_rlhf.evaluation.frontier import rows_of_run
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.generation import Samples
from llm_rlhf.rewards.functions import Scores
from llm_rlhf.train_iterative_dpo import Drawn, IterativeConfig, TrainIterativeDPOConfig, best_against_worst
from llm_rlhf.train_sft import TrainSFTConfig

TASK = {"name": "random_walks", "random_walks": {"walks": 60}}


def small(base: Path, folder: Path, *, steps: int = 6, **sections: Any) -> TrainIterativeDPOConfig:
    settings: dict[str, Any] = {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 1, "seed": 5},
        "task": TASK,
        "model": {"path": str(base)},
        "iterative": {"prompts": 8, "samples_per_prompt": 4, "at_once": 3, "steps_per_round": 3},
        "learning": {"steps": steps, "batch_size": 4, "micro_batch_size": 3, "learning_rate": 1e-3, "warmup": 0.0},
        "validation": {"every": 3, "samples": 2},
    }
    for name, section in sections.items():
        known = settings.get(name)
        settings[name] = {**known, **section} if isinstance(known, dict) else section
    return build_from_dict(settings, TrainIterativeDPOConfig)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen a few walks."""
    settings = {
        "run": {"folder": str(tmp_path_factory.mktemp("base") / "run"), "wandb": "disabled"},
        "task": TASK,
        "model": {"layers": 1, "width": 32, "heads": 2, "context": 16},
        "sft": {"steps": 60, "batch_size": 32, "learning_rate": 5e-3},
        "validation": {"every": 0},
    }
    return train_sft.train(build_from_dict(settings, TrainSFTConfig)).folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_iterative_dpo.train(small(base, tmp_path_factory.mktemp("iterative") / "run")).folder


def weights(folder: Path) -> dict[str, Tensor]:
    return LanguagePolicy.from_pretrained(folder / "checkpoints" / "last" / "policy").state_dict()


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


# ---------------------------------------------------------------- pairs


def drawn(rewards: Sequence[Sequence[float | None]], tokens: Sequence[Sequence[int]]) -> Drawn:
    """Two blocks with prompts of one and of two tokens; a completion is one token and EOS."""
    blocks = []
    for width, part in ((1, slice(0, 2)), (2, slice(2, None))):
        known = [reward for one in rewards[part] for reward in one]
        first = torch.tensor([token for one in tokens[part] for token in one])
        prompt = torch.full((len(known), width), 9)
        ids = torch.cat([prompt, first.unsqueeze(1), torch.full((len(known), 1), 2)], dim=1)
        mask = torch.cat([prompt == 0, torch.ones(len(known), 2, dtype=torch.bool)], dim=1)
        zeros = torch.zeros(ids.shape)
        samples = Samples(
            ids, torch.ones_like(ids), mask, torch.ones(len(known)).bool(), zeros, zeros, None, first * 0
        )
        total = torch.tensor([reward or 0.0 for reward in known])
        blocks.append((samples, Scores(total, torch.tensor([reward is not None for reward in known]), {})))
    prompts = [[4, 7], list(range(20, 18 + len(rewards)))]
    scores = [scores for _, scores in blocks]
    return Drawn(prompts, [samples for samples, _ in blocks], scores, scores)


def test_the_best_meets_the_worst() -> None:
    """A tie, a prompt of which one answer was scored, and one whose answers are the same make no pair."""
    rewards: list[list[float | None]] = [
        [0.0, 3.0, -1.0],
        [1.0, 1.0, 1.0],
        [None, 0.5, 2.5],
        [None, 5.0, None],
        [1.0, 2.0, 1.5],
        [0.0, 0.1, 0.0],
    ]
    tokens = [[31, 32, 33], [31, 32, 33], [34, 35, 36], [37, 38, 39], [30, 30, 30], [41, 42, 43]]
    pairs = best_against_worst(drawn(rewards, tokens), IterativeConfig())
    assert pairs is not None
    assert pairs.chosen.input_ids[pairs.chosen.mask].view(-1, 2)[:, 0].tolist() == [32, 36, 42]
    assert pairs.rejected.input_ids[pairs.rejected.mask].view(-1, 2)[:, 0].tolist() == [33, 35, 41]
    assert pairs.margin.tolist() == pytest.approx([4.0, 2.0, 0.1])
    assert pairs.prompt.tolist() == [4, 20, 23]
    assert pairs.chosen.attention_mask.sum(1).tolist() == [3, 4, 4]
    strict = best_against_worst(drawn(rewards, tokens), IterativeConfig(margin=2.0))
    assert strict is not None
    assert strict.margin.tolist() == [4.0]
    assert best_against_worst(drawn(rewards, tokens), IterativeConfig(margin=4.0)) is None


# ---------------------------------------------------------------- the recipe


def test_every_round_begins_at_ln_2(trained: Path) -> None:
    """The reference is the policy that drew the round; the pairs are then learned."""
    logged = rows(trained)
    assert [row["global_step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    for begin in (0, 3):
        assert logged[begin]["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
        assert logged[begin + 2]["loss/preference"] < math.log(2)
        assert logged[begin]["iterative/pairs"] >= 4
    assert logged[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert logged[3]["objective/kl"] != pytest.approx(0.0, abs=1e-5)
    assert logged[0]["loss/total"] == pytest.approx(math.log(2) + 0.2 * logged[0]["nll_loss"], rel=1e-5)
    names = {"rewards/optimality/mean", "objective/scores", "completions/mean_length", "iterative/margin"}
    assert names | {"objective/entropy", "eval/greedy"} <= logged[0].keys() | logged[2].keys()
    assert logged[-1]["samples"] == 2 * 8 * 4
    assert len(list((trained / "tables" / "completions").glob("*.jsonl"))) == 2


def test_gold_goes_with_the_kl_of_the_policy_that_it_judges(trained: Path) -> None:
    """Not with the one that drew the round: at the first round's end that is the start itself, at a KL of 0."""
    logged = rows(trained)
    found = evaluate_run(trained, EvaluateConfig(splits=("validation",), prompts=200, samples=2))["validation"]
    assert logged[5]["eval/kl"] == pytest.approx(found["kl"], rel=1e-6)
    assert logged[2]["eval/kl"] > 1e-3
    assert [(row.step, row.kl) for row in rows_of_run(trained)] == [
        (3, logged[2]["eval/kl"]),
        (6, logged[5]["eval/kl"]),
    ]


def test_pairs_are_learned_at_temperature_1(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in llm/dpo, whatever the answers were drawn at."""
    seen: list[tuple[str, float]] = []
    for name in ("pair_step", "all_log_probs", "metrics_of"):
        original = getattr(train_iterative_dpo, name)

        def watched(*args: Any, name: str = name, original: Any = original, **more: Any) -> Any:
            policy = next(one for one in args if isinstance(one, LanguagePolicy))
            seen.append((name, policy.temperature))
            return original(*args, **more)

        monkeypatch.setattr(train_iterative_dpo, name, watched)
    train_iterative_dpo.train(small(base, tmp_path / "run", generation={"temperature": 0.5}))
    assert set(seen) == {("pair_step", 1.0), ("all_log_probs", 1.0), ("metrics_of", 0.5)}


def test_anchored_to_the_start_a_later_round_does_not_begin_at_ln_2(tmp_path: Path, base: Path) -> None:
    config = small(base, tmp_path / "run", steps=4, iterative={"reference": "start"}, nll_coef=0.0)
    logged = rows(train_iterative_dpo.train(config).folder)
    assert logged[0]["loss/total"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(logged[3]["loss/total"] - math.log(2)) > 1e-4
    assert logged[3]["rewards/margins"] != 0.0


def test_it_raises_the_reward(tmp_path: Path, base: Path) -> None:
    """What the model writes, on average, towards the shortest ways."""
    config = small(
        base,
        tmp_path / "run",
        steps=40,
        run={"checkpoint_every": 40},
        iterative={"prompts": 14, "samples_per_prompt": 8, "at_once": 14, "steps_per_round": 4},
        learning={"batch_size": 14, "micro_batch_size": None, "learning_rate": 3e-3, "schedule": "constant"},
        validation={"every": 0},
        log_every=40,
    )
    folder = train_iterative_dpo.train(config).folder
    scores = [row["objective/scores"] for row in rows(folder) if "objective/scores" in row]
    assert len(scores) == 10
    assert scores[-1] > scores[0] + 0.25
    result = evaluate_run(folder, EvaluateConfig(splits=("prompted",), samples=8))["prompted"]
    assert result["sampled"] > scores[0] + 0.25
    assert result["kl"] > 0.5, "the distance from the model it began with is reported"


@pytest.mark.parametrize("step", [3, 5])
def test_it_resumes_to_the_bit(tmp_path: Path, base: Path, trained: Path, step: int) -> None:
    """Within the first round, and within the second: the round's pairs are in the checkpoint."""

    class InterruptError(Exception):
        pass

    original = Run.log

    def log(self: Run, metrics: Mapping[str, float], *, global_step: int) -> None:
        if global_step == step:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    config = small(base, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(InterruptError):
            train_iterative_dpo.train(config)
    torch.manual_seed(12345)
    train_iterative_dpo.train(config, resume=tmp_path / "run")
    expected, found = weights(trained), weights(tmp_path / "run")
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert rows(tmp_path / "run") == rows(trained)


def test_the_strength_of_a_preference_is_the_difference_of_rewards(tmp_path: Path, base: Path) -> None:
    config = small(base, tmp_path / "run", steps=1, preference={"loss": "odpo", "odpo_offset": "linear"})
    (only,) = rows(train_iterative_dpo.train(config).folder)
    assert only["offset"] > 0
    assert only["loss/preference"] > math.log(2)


def test_what_broke_a_rule_or_was_cut_loses(tmp_path: Path, base: Path) -> None:
    """No answer that a rule forbids is ever chosen, and dropped answers are in no pair at all."""
    (tmp_path / "rules.py").write_text("def long(prompt, completion):\n    return len(completion) >= 4\n")
    seen: list[tuple[Any, Any]] = []
    original = train_iterative_dpo.best_against_worst

    def pairs(drawn: Any, settings: Any) -> Any:
        seen.append((drawn, original(drawn, settings)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_iterative_dpo, "best_against_worst", pairs)
        ruled = small(base, tmp_path / "ruled", steps=1, safety={"rules": [f"{tmp_path}/rules.py:long"]})
        train_iterative_dpo.train(ruled)
        dropped = small(base, tmp_path / "cut", steps=1, generation={"max_new_tokens": 6}, shaping={"cut": "drop"})
        train_iterative_dpo.train(dropped)
    (_, kept), (drawn, ended) = seen
    long = kept.chosen.mask.sum(1) > 4  # three letters and the end
    assert kept.rejected.mask.sum(1).max() > 4
    assert not bool(long.any())
    assert not bool(torch.cat([block.finished for block in drawn.samples]).all())
    first = drawn.samples[0]
    eos = first.input_ids[first.finished][0][first.mask[first.finished][0]][-1]
    for side in (ended.chosen, ended.rejected):
        assert bool(((side.input_ids == eos) & side.mask).any(1).all())
    with pytest.raises(UserError, match=r"shaping\.cut bootstrap needs a critic"):
        small(base, tmp_path / "no", shaping={"cut": "bootstrap"})


def test_a_round_without_a_pair_changes_nothing(tmp_path: Path, base: Path) -> None:
    """A reward that tells answers apart in the first 32 completions only."""
    file = tmp_path / "reward.py"
    file.write_text(
        "def early(prompts, completions, sample_index):\n"
        "    return [float(len(text)) if i < 32 else 0.0 for text, i in zip(completions, sample_index)]\n"
    )
    config = small(base, tmp_path / "run", rewards={f"{file}:early": 1.0})
    folder = train_iterative_dpo.train(config).folder
    logged = rows(folder)
    assert [row.get("iterative/pairs") for row in logged if "iterative/pairs" in row][1] == 0.0
    assert "loss/total" in logged[2]
    assert "loss/total" not in logged[4]
    three = train_iterative_dpo.train(
        small(base, tmp_path / "three", steps=3, learning={"schedule": "constant"}, rewards={f"{file}:early": 1.0})
    ).folder
    six = train_iterative_dpo.train(
        small(base, tmp_path / "six", learning={"schedule": "constant"}, rewards={f"{file}:early": 1.0})
    ).folder
    for name, tensor in weights(three).items():
        assert torch.equal(tensor, weights(six)[name]), name


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, base: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"iterative": {"margin": 5.0}}, r"iterative\.margin: of no prompt do the 4 answers differ"),
        ({"model": {"path": None}}, r"model\.path: "),
        ({"rewards": {"nothing": 1.0}}, r"rewards\.nothing: unknown"),
        ({"monitor": {"stop": True}, "validation": {"every": 0}}, r"monitor\.stop: .*validation\.every is 0"),
        (
            {"learning": {"learning_rate": 1e30, "max_grad_norm": 1e30}},
            r"lower (learning rate|learning\.learning_rate)",
        ),
    ]
    for number, (sections, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            train_iterative_dpo.train(small(base, tmp_path / f"run{number}", **sections))
    with pytest.raises(UserError, match=r"iterative\.reference: preference\.loss 'simpo' has no reference"):
        small(base, tmp_path / "run", preference={"loss": "simpo"}, iterative={"reference": "start"})
    for bad in ({"samples_per_prompt": 1}, {"prompts": 0}, {"margin": -1.0}):
        with pytest.raises(ValueError, match="iterative"):
            IterativeConfig(**bad)


def test_dry_run_does_one_update(tmp_path: Path, base: Path) -> None:
    config = small(base, tmp_path / "run")
    result = train_iterative_dpo.train(replace(config, run=replace(config.run, dry_run=True)))
    assert result.metrics["global_step"] == 1
