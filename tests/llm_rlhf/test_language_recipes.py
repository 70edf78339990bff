"""Every recipe in miniature: it runs, learns, resumes to the bit, and says plainly what it cannot do."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.checkpoint import load_checkpoint
from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import RunConfig, RunResult
from llm_rlhf import train_grpo, train_ppo, train_rejection, train_sft
from llm_rlhf.evaluate import EvaluateConfig, evaluate_run
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.online.experience import ShapingConfig
from llm_rlhf.online.self_imitation import SelfImitationConfig
from llm_rlhf.rewards.safety import SafetyConfig
from llm_rlhf.tasks.task import TaskConfig
from llm_rlhf.train_grpo import TrainGRPOConfig
from llm_rlhf.train_ppo import TrainPPOConfig
from llm_rlhf.train_rejection import TrainRejectionConfig
from llm_rlhf.train_sft import TrainSFTConfig

Recipe = Callable[..., RunResult]
TASK = {"name": "random_walks", "random_walks": {"walks": 60}}
MODEL = {"layers": 1, "width": 16, "heads": 2, "context": 16}
VALIDATION = {"every": 2, "samples": 2}


def settings(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 3, "seed": 5},
        "task": TASK,
        "validation": VALIDATION,
        **sections,
    }


def small_sft(folder: Path, steps: int = 6) -> TrainSFTConfig:
    sections = {"model": MODEL, "sft": {"steps": steps, "batch_size": 16}, "log_every": 1}
    return build_from_dict(settings(folder, **sections), TrainSFTConfig)


def small_ppo(folder: Path, base: Path, updates: int = 6) -> TrainPPOConfig:
    sections = {
        "model": {"path": str(base)},
        "sampling": {"updates": updates, "prompts": 8, "samples_per_prompt": 2},
        "ppo": {"minibatch_size": 8, "critic_warmup": 1},
        "self_imitation": {"coef": 0.5, "threshold": 0.1, "batch_size": 4},
        "kl": {"coef": 0.05, "target": 1.0, "horizon": 100.0},
    }
    return build_from_dict(settings(folder, **sections), TrainPPOConfig)


def small_grpo(folder: Path, base: Path, updates: int = 6) -> TrainGRPOConfig:
    sections = {
        "model": {"path": str(base)},
        "sampling": {"updates": updates, "prompts": 4, "skip_flat_groups": True},
        "grpo": {"group_size": 4},
        "ppo": {"minibatch_size": 8},
    }
    return build_from_dict(settings(folder, **sections), TrainGRPOConfig)


def small_rejection(folder: Path, base: Path, steps: int = 6) -> TrainRejectionConfig:
    sections = {
        "model": {"path": str(base)},
        "sft": {"steps": steps, "batch_size": 8},
        "rejection": {"samples_per_prompt": 4, "threshold": 0.0, "steps_per_round": 2, "keep": 2},
    }
    return build_from_dict(settings(folder, **sections), TrainRejectionConfig)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen a few walks."""
    folder = tmp_path_factory.mktemp("base") / "run"
    return train_sft.train(small_sft(folder, steps=40)).folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return LanguagePolicy.from_pretrained(folder, value_head=True).state_dict()


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")} for line in lines
    ]


def resumed(recipe: Recipe, make: Callable[[Path, int], Any], folder: Path) -> None:
    """Three updates, then three more after a break, against six at a stretch: equal to the last bit.

    The first part is configured for six and interrupted after the checkpoint at three, as a kill would.
    """

    class InterruptError(Exception):
        pass

    whole = recipe(make(folder / "whole", 6)).folder
    original = train_sft.Run.log

    def log(self: Any, metrics: Any, *, global_step: int) -> None:
        if global_step == 5:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    config = make(folder / "broken", 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft.Run, "log", log)
        with pytest.raises(InterruptError):
            recipe(config)
    torch.manual_seed(12345)  # a new process would not have the old one's global generator
    recipe(config, resume=folder / "broken")
    expected, found = weights(whole), weights(folder / "broken")
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert rows(folder / "broken") == rows(whole)


def test_sft_learns_and_writes_a_plain_model(base: Path) -> None:
    logged = rows(base)
    assert logged[-1]["loss/sft"] < logged[0]["loss/sft"] - 0.5
    assert logged[-1]["global_step"] == 40
    assert logged[-1]["samples"] == 40 * 16
    assert {"eval/greedy", "eval/sampled", "eval/pass@2", "lr", "tokens"} <= logged[-1].keys()
    assert (base / "checkpoints" / "last" / "policy" / "tokenizer.json").is_file()


def test_sft_resumes_to_the_bit(tmp_path: Path) -> None:
    resumed(train_sft.train, small_sft, tmp_path)


def test_ppo_resumes_to_the_bit(tmp_path: Path, base: Path) -> None:
    resumed(train_ppo.train, lambda folder, updates: small_ppo(folder, base, updates), tmp_path)


def test_grpo_resumes_to_the_bit(tmp_path: Path, base: Path) -> None:
    resumed(train_grpo.train, lambda folder, updates: small_grpo(folder, base, updates), tmp_path)


def test_rejection_resumes_to_the_bit(tmp_path: Path, base: Path) -> None:
    resumed(train_rejection.train, lambda folder, steps: small_rejection(folder, base, steps), tmp_path)


def test_ppo_reports_trls_names_and_moves_the_policy(tmp_path: Path, base: Path) -> None:
    folder = train_ppo.train(small_ppo(tmp_path / "run", base, 3)).folder
    logged = rows(folder)
    names = {
        "objective/kl",
        "objective/scores",
        "objective/entropy",
        "objective/non_score_reward",
        "objective/rlhf_reward",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "val/explained_variance",
        "loss/value_avg",
        "rewards/optimality/mean",
        "completions/mean_length",
        "global_step",
        "samples",
        "tokens",
    }
    assert names <= logged[-1].keys()
    assert logged[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert logged[0]["samples"] == 16
    assert "loss/policy_avg" not in logged[0]  # critic warm-up
    assert "loss/policy_avg" in logged[1]
    before, after = weights(base), weights(folder)
    assert not torch.equal(before["model.transformer.wte.weight"], after["model.transformer.wte.weight"])
    reference = LanguagePolicy.from_pretrained(folder / "reference").state_dict()
    assert torch.equal(before["model.transformer.wte.weight"], reference["model.transformer.wte.weight"])


def test_critic_warm_up_leaves_the_language_model_alone(tmp_path: Path, base: Path) -> None:
    """And a run's last update is the policy's, however long the warm-up."""
    config = small_ppo(tmp_path / "run", base, 3)
    config = replace(config, ppo=replace(config.ppo, critic_warmup=9), run=replace(config.run, checkpoint_every=1))
    folder = train_ppo.train(config).folder
    before, warm, after = weights(base), weights(folder / "checkpoints" / "000000002"), weights(folder)
    for name, tensor in before.items():
        assert torch.equal(tensor, warm[name]) != name.startswith("value_head."), name
        assert not torch.equal(tensor, after[name]), name


def test_rloo_and_dr_grpo_are_a_setting(tmp_path: Path, base: Path) -> None:
    config = small_grpo(tmp_path / "rloo", base, 1)
    rloo = train_grpo.train(replace(config, grpo=replace(config.grpo, advantage="rloo")))
    assert "objective/frac_reward_zero_std" in rloo.metrics
    config = small_grpo(tmp_path / "dr_grpo", base, 1)
    constant = replace(config.ppo, aggregation="constant", aggregation_constant=10.0)
    dr_grpo = train_grpo.train(replace(config, grpo=replace(config.grpo, advantage="dr_grpo"), ppo=constant))
    assert "objective/frac_reward_zero_std" in dr_grpo.metrics


def test_kl_in_the_loss_of_ppo_and_in_the_reward_of_grpo(tmp_path: Path, base: Path) -> None:
    ppo = small_ppo(tmp_path / "ppo", base, 3)
    ppo = replace(ppo, kl=replace(ppo.kl, placement="loss", estimator="k2"))
    assert "loss/reference_kl" in train_ppo.train(ppo).metrics
    grpo = small_grpo(tmp_path / "grpo", base, 2)
    grpo = replace(grpo, kl=replace(grpo.kl, placement="reward", estimator="k1"))
    assert "objective/rlhf_reward" in train_grpo.train(grpo).metrics


def test_filtered_demonstrations(tmp_path: Path) -> None:
    sections = {
        "model": MODEL,
        "sft": {"steps": 2, "batch_size": 8},
        "rejection": {"source": "demonstrations", "threshold": 0.85},
    }
    config = build_from_dict(settings(tmp_path / "run", **sections), TrainRejectionConfig)
    result = train_rejection.train(config)
    first = rows(result.folder)[0]
    assert 0 < first["rejection/kept"] < 60
    assert first["rejection/share"] == pytest.approx(first["rejection/kept"] / 60)


def test_what_is_kept_is_learned_at_temperature_1(tmp_path: Path, base: Path) -> None:
    """Imitation has no temperature: the same demonstrations make the same model, whatever it will draw at."""
    learned = []
    for temperature in (1.0, 0.5):
        sections = {
            "model": {"path": str(base)},
            "generation": {"temperature": temperature},
            "rejection": {"source": "demonstrations", "threshold": 0.0},
            "sft": {"steps": 3, "batch_size": 8},
            "validation": {"every": 0},
        }
        config = build_from_dict(settings(tmp_path / str(temperature)) | sections, TrainRejectionConfig)
        learned.append(weights(train_rejection.train(config).folder))
    assert all(torch.equal(learned[0][name], learned[1][name]) for name in learned[0])


def test_star_imitates_with_the_model_it_began_with(tmp_path: Path, base: Path) -> None:
    """At a round's first update the weights and the optimizer are those of the run's start, the texts the last
    round's; without `restart` the run goes on."""
    begun = LanguagePolicy.from_pretrained(base).state_dict()
    for restart in (True, False):
        config = small_rejection(tmp_path / str(restart), base)
        config = replace(config, rejection=replace(config.rejection, restart=restart, accumulate=False))
        seen: list[bool] = []
        original = train_rejection.supervised_step

        def step(policy: LanguagePolicy, optimizer: Any, *rest: Any, **named: Any) -> Any:
            same = all(torch.equal(value, begun[name]) for name, value in policy.state_dict().items())
            seen.append(same and not optimizer.state)  # noqa: B023
            return original(policy, optimizer, *rest, **named)  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_rejection, "supervised_step", step)
            found = rows(train_rejection.train(config).folder)
        assert seen == [True, False, restart, False, restart, False]
        assert found[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
        assert found[2]["objective/kl"] > 1e-3  # the second round was drawn from a model that had learned
    with pytest.raises(UserError, match=r"rejection\.restart is of rounds"):
        build_from_dict({"rejection": {"source": "demonstrations", "restart": True}}, TrainRejectionConfig)


def test_cut_answers_and_broken_rules_are_not_kept(tmp_path: Path, base: Path) -> None:
    """With room for one token only what is empty ends: dropped, the others cannot be kept."""
    config = small_rejection(tmp_path / "cut", base)
    short = replace(config, generation=replace(config.generation, max_new_tokens=1))
    whole = rows(train_rejection.train(short).folder)[0]
    dropping = replace(
        short, run=replace(config.run, folder=str(tmp_path / "drop")), shaping=ShapingConfig(cut="drop")
    )
    dropped = rows(train_rejection.train(dropping).folder)[0]
    assert 0 < dropped["rejection/kept"] <= 14 < whole["rejection/kept"]  # an empty text for a prompt at most
    assert dropped["objective/scores"] == whole["objective/scores"]
    (tmp_path / "rules.py").write_text("def never(prompt, completion):\n    return True\n")
    ruled = replace(config, run=replace(config.run, folder=str(tmp_path / "ruled")))
    with pytest.raises(UserError, match="no completion reached"):
        train_rejection.train(replace(ruled, safety=SafetyConfig(rules=(f"{tmp_path}/rules.py:never",))))
    with pytest.raises(UserError, match=r"shaping\.scale is of policy gradients"):
        build_from_dict({"shaping": {"scale": "batch"}}, TrainRejectionConfig)


def test_nothing_good_enough_is_said(tmp_path: Path, base: Path) -> None:
    config = small_rejection(tmp_path / "run", base)
    config = replace(config, rejection=replace(config.rejection, threshold=1.5))
    with pytest.raises(UserError, match=r"no completion reached 1\.5"):
        train_rejection.train(config)


def test_reinforcement_learning_needs_a_model(tmp_path: Path) -> None:
    config = replace(TrainPPOConfig(), run=RunConfig(folder=str(tmp_path / "run")))
    with pytest.raises(UserError, match=r"model\.path"):
        train_ppo.train(config)
    missing = replace(config, model=ModelConfig(path=str(tmp_path / "none")))
    with pytest.raises(UserError, match="does not exist"):
        train_ppo.train(missing)


def test_dry_run_does_one_update(tmp_path: Path, base: Path) -> None:
    config = small_grpo(tmp_path / "run", base)
    result = train_grpo.train(replace(config, run=replace(config.run, dry_run=True)))
    assert result.metrics["global_step"] == 1


def test_own_reward_function_and_its_failure(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text("def short(prompts, completions):\n    return [-len(text) for text in completions]\n")
    config = replace(small_grpo(tmp_path / "run", base, 1), rewards={f"{file}:short": 1.0})
    assert train_grpo.train(config).metrics["objective/scores"] < 0
    file.write_text("def short(prompts, completions):\n    return [float('nan') for _ in completions]\n")
    config = replace(small_grpo(tmp_path / "bad", base, 1), rewards={f"{file}:short": 1.0})
    with pytest.raises(UserError, match=r"reward\.py:short: it returned nan"):
        train_grpo.train(config)


def test_prompts_alone_are_judged_by_the_runs_rewards(tmp_path: Path, base: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{c},"}) + "\n" for c in "abcdefghij"))
    (tmp_path / "own.py").write_text("def quarter(prompts, completions):\n    return [0.25] * len(completions)\n")
    config = small_ppo(tmp_path / "run", base, updates=2)
    task = {"name": "rows", "data": str(tmp_path / "rows.jsonl"), "rows": {"validation": 0.2, "max_new_tokens": 4}}
    config = replace(config, task=build_from_dict(task, TaskConfig), rewards={f"{tmp_path}/own.py:quarter": 2.0})
    folder = train_ppo.train(config).folder
    assert rows(folder)[-1]["eval/sampled"] == 0.5
    found = evaluate_run(folder, EvaluateConfig(samples=2))["test"]
    assert found["sampled"] == found["greedy"] == 0.5
    assert "rewards" not in found
    assert evaluate_run(folder, EvaluateConfig(own_rewards=False, samples=2))["test"]["sampled"] == 0.5


def test_checkpoints_hold_good_answers_only_where_they_are_learned(tmp_path: Path, base: Path) -> None:
    plain = replace(small_ppo(tmp_path / "plain", base, updates=1), self_imitation=SelfImitationConfig())
    remembering = replace(
        small_ppo(tmp_path / "remembering", base, updates=1), self_imitation=SelfImitationConfig(coef=0.1)
    )
    for config, kept in ((plain, False), (remembering, True)):
        state = load_checkpoint(train_ppo.train(config).folder / "checkpoints" / "last").state
        assert (state["good_answers"] is not None) == kept


def test_a_diverged_run_stops_with_one_line(tmp_path: Path, base: Path) -> None:
    config = small_grpo(tmp_path / "run", base, 3)
    config = replace(config, ppo=replace(config.ppo, learning_rate=1e30, max_grad_norm=1e30))
    with pytest.raises(UserError, match=r"lower (learning rate|ppo\.learning_rate)"):
        train_grpo.train(config)


def test_evaluate_run_writes_eval_json(tmp_path: Path, base: Path) -> None:
    folder = train_grpo.train(small_grpo(tmp_path / "run", base, 2)).folder
    results = evaluate_run(folder, EvaluateConfig(samples=4))
    assert set(results) == {"prompted", "test"}
    for result in results.values():
        names = {"greedy", "sampled", "sampled_interval", "pass@4", "pass@4_interval", "entropy", "kl"}
        assert names <= set(result)
        low, high = result["sampled_interval"]
        assert low <= result["sampled"] <= high
        assert 0 <= result["sampled"] <= result["pass@4"] + 1.0
    written = json.loads((folder / "eval.json").read_text())
    assert written["splits"] == results
    assert results == evaluate_run(folder, EvaluateConfig(samples=4))
    with pytest.raises(UserError, match="no 'nothing'"):
        evaluate_run(folder, EvaluateConfig(splits=("nothing",)))
    with pytest.raises(UserError):
        evaluate_run(tmp_path)


def test_what_the_policy_writes_is_kept_as_a_table(tmp_path: Path, base: Path) -> None:
    result = train_ppo.train(small_ppo(tmp_path / "run", base, updates=2))
    (path,) = (result.folder / "tables" / "completions").glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "completion", "optimality"}] * 16
    assert all(len(row["prompt"]) == 1 for row in rows), "a walk's prompt is its first node"
    assert all(0.0 <= row["optimality"] <= 1.0 for row in rows)


def test_micro_batches_change_no_number(tmp_path: Path, base: Path) -> None:
    """One optimizer step in pieces of 3 rows, KL term included, has the whole's gradient and metrics."""
    whole: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for size, found in ((None, whole), (3, parts)):
        ppo = small_ppo(tmp_path / f"ppo-{size}", base, 2)
        ppo = replace(
            ppo,
            kl=replace(ppo.kl, placement="loss", estimator="k2", target=None),
            ppo=replace(ppo.ppo, minibatch_size=16, epochs=1, critic_warmup=0, micro_batch_size=size),
        )
        grpo = small_grpo(tmp_path / f"grpo-{size}", base, 2)
        grpo = replace(grpo, ppo=replace(grpo.ppo, minibatch_size=16, micro_batch_size=size))
        found += [rows(train_ppo.train(ppo).folder)[0], rows(train_grpo.train(grpo).folder)[0]]
    for one, other in zip(whole, parts, strict=True):
        assert one["policy/grad_norm"] > 0
        for name in ("policy/grad_norm", "loss/policy_avg", "policy/approxkl_avg", "policy/clipfrac_avg"):
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    assert parts[0]["loss/value_avg"] == pytest.approx(whole[0]["loss/value_avg"], rel=1e-5)


@pytest.mark.parametrize(("placement", "estimator"), [("reward", "k1"), ("loss", "k2")])
def test_the_adaptive_kl_ends_at_its_target(tmp_path: Path, base: Path, placement: str, estimator: str) -> None:
    """A reward that half of the letters earn takes the policy far past a target of one nat a completion; the
    controller brings it back, and holds it within a fifth."""
    file = tmp_path / "own.py"
    file.write_text(
        "def liked(prompts, completions):\n"
        "    return [float(sum(letter in 'acegikmoqs' for letter in text)) for text in completions]\n"
    )
    sections = {
        "model": {"path": str(base)},
        "rewards": {f"{file}:liked": 1.0},
        "generation": {"max_new_tokens": 4},
        "sampling": {"updates": 110, "prompts": 14, "samples_per_prompt": 8},
        "ppo": {"minibatch_size": 112, "learning_rate": 3e-3, "epochs": 2},
        "kl": {"coef": 0.5, "target": 1.0, "horizon": 400.0, "placement": placement, "estimator": estimator},
        "validation": {"every": 0},
    }
    config = build_from_dict(settings(tmp_path / "run") | sections, TrainPPOConfig)
    logged = rows(train_ppo.train(config).folder)
    spent = [row["objective/kl"] for row in logged]
    assert abs(spent[0]) < 1e-4
    assert max(spent) > 1.8
    assert sum(spent[-40:]) / 40 == pytest.approx(1.0, rel=0.2)
    learned = [row for row in logged if "loss/policy_avg" in row]  # while the critic warms up, nothing moves
    for before, after in itertools.pairwise(learned):  # Ziegler's rule, in nats a completion
        error = min(max(before["objective/kl"] / 1.0 - 1.0, -0.2), 0.2)
        factor = 1.0 + error * 112 / 400
        assert after["objective/kl_coef"] == pytest.approx(before["objective/kl_coef"] * factor, rel=1e-5)


def test_sampling_s_log_probs_are_compared_with_training_s(tmp_path: Path, base: Path) -> None:
    made: list[tuple[Recipe, Any]] = [
        (train_ppo.train, small_ppo(tmp_path / "ppo", base, 4)),
        (train_grpo.train, small_grpo(tmp_path / "grpo", base, 4)),
    ]
    for recipe, config in made:
        config = replace(config, sampling=replace(config.sampling, logprob_gap_every=2))
        found = [row.get("sampling/logprob_gap") for row in rows(recipe(config).folder)]
        assert [gap is not None for gap in found] == [False, True, False, True]
        assert all(0 <= gap <= 1e-5 for gap in found if gap is not None)


def test_in_bfloat16_the_same_run_but_for_rounding(tmp_path: Path, base: Path) -> None:
    """Sampling and update compute alike there: ratios begin at about 1. Weights and optimizer stay float32, and the
    first rollout is judged as in float32."""
    made: list[tuple[Recipe, Any]] = [
        (train_ppo.train, small_ppo(tmp_path / "ppo", base, 4)),
        (train_grpo.train, small_grpo(tmp_path / "grpo", base, 4)),
    ]
    for recipe, config in made:
        config = replace(config, sampling=replace(config.sampling, logprob_gap_every=1))
        exact = rows(recipe(config).folder)
        folder = Path(f"{config.run.folder}-bf16")
        narrow = replace(config, precision="bf16", run=replace(config.run, folder=str(folder)))
        found = rows(recipe(narrow).folder)
        assert max(row["sampling/logprob_gap"] for row in found) < 0.05
        assert found[0]["objective/entropy"] == pytest.approx(exact[0]["objective/entropy"], rel=0.02)
        assert found[0]["objective/entropy"] != exact[0]["objective/entropy"]
        kept = LanguagePolicy.from_pretrained(folder).state_dict()
        assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


def test_bf16_resumes_to_the_bit(tmp_path: Path, base: Path) -> None:
    def narrow(folder: Path, updates: int) -> TrainGRPOConfig:
        return replace(small_grpo(folder, base, updates), precision="bf16")

    resumed(train_grpo.train, narrow, tmp_path)


def test_penalties_and_scales_of_a_run(tmp_path: Path, base: Path) -> None:
    """The reported score is the task's own; what is learned from is logged beside; the running scale resumes."""

    def make(folder: Path, updates: int) -> TrainPPOConfig:
        config = small_ppo(folder, base, updates)
        shaping = ShapingConfig(missing_eos_penalty=1.0, scale="running")
        return replace(config, shaping=shaping, generation=replace(config.generation, max_new_tokens=3))

    resumed(train_ppo.train, make, tmp_path)
    logged = rows(tmp_path / "whole")
    assert all(row["objective/score_deviation"] > 0 for row in logged)
    assert 0 < logged[0]["completions/finished"] < 1
    assert logged[0]["objective/scores"] == pytest.approx(logged[0]["rewards/optimality/mean"])


def test_a_reward_function_that_hangs_ends_the_run_with_one_line(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import threading\ndef hangs(prompts, completions):\n    threading.Event().wait()\n")
    made: list[tuple[Recipe, Any]] = [
        (train_ppo.train, small_ppo(tmp_path / "ppo", base)),
        (train_grpo.train, small_grpo(tmp_path / "grpo", base)),
        (train_rejection.train, small_rejection(tmp_path / "rejection", base)),
    ]
    for recipe, config in made:
        config = replace(config, rewards={f"{file}:hangs": 1.0}, rewards_timeout=0.05)
        with pytest.raises(UserError, match=r"own\.py:hangs: no answer within 0\.05 seconds \(rewards_timeout\)$"):
            recipe(config)
