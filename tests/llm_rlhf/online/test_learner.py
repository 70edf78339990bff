"""What watches and bounds a run of reinforcement learning: hard rules, paid steps, the monitor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiment.checkpoint import load_checkpoint
from experiment.config import build_from_dict
from experiment.errors import UserError
from llm_rlhf import train_grpo, train_ppo
from llm_rlhf.evaluate import EvaluateConfig, evaluate_run
from llm_rlhf.models.causal import build_policy, frozen_copy
from llm_rlhf.models.generation import Samples
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.online import learner as learner_module
from llm_rlhf.online.learner import ValidationConfig, validate
from llm_rlhf.online.monitor import HackingSuspected
from llm_rlhf.online.recording import texts_of
from llm_rlhf.rewards.process_reward import StepScorer
from llm_rlhf.rewards.reward_model import Scorer, build_reward_model
from llm_rlhf.tasks.task import Task, TaskConfig, build_task
from llm_rlhf.train_grpo import TrainGRPOConfig
from llm_rlhf.train_ppo import TrainPPOConfig
from llm_rlhf.train_sft import TrainSFTConfig
from llm_rlhf.train_sft import train as train_sft
from policy_core.kl import KLController
from policy_core.rollout import Rollout

SPECIAL, EOS = 4, 2
TASK = {"name": "random_walks", "random_walks": {"walks": 60}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has hardly learned."""
    sections = {
        "run": {"folder": str(tmp_path_factory.mktemp("base") / "run"), "wandb": "disabled"},
        "task": TASK,
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
        "sft": {"steps": 2, "batch_size": 16},
        "validation": {"every": 0},
    }
    return train_sft(build_from_dict(sections, TrainSFTConfig)).folder


def ppo(folder: Path, base: Path, resume: Path | None = None, **sections: Any) -> list[dict[str, Any]]:
    """Four updates; returns the rows of metrics.jsonl."""
    tree: dict[str, Any] = {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 1, "keep": 10},
        "task": TASK,
        "model": {"path": str(base)},
        "sampling": {"updates": 4, "prompts": 8},
        "ppo": {"minibatch_size": 8, "critic_warmup": 0, "learning_rate": 0.01},
        "kl": {"coef": 0.0},
        "validation": {"every": 1, "samples": 2},
        **sections,
    }
    train_ppo.train(build_from_dict(tree, TrainPPOConfig), resume=resume)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_no_reward_buys_off_a_rule(tmp_path: Path, base: Path) -> None:
    (tmp_path / "rules.py").write_text("def never(prompt, completion):\n    return True\n")
    rows = ppo(tmp_path / "run", base, safety={"rules": [f"{tmp_path}/rules.py:never"], "floor": -3.0})
    assert [row["objective/scores"] for row in rows] == [-3.0] * 4
    assert [row["rewards/rules/never/mean"] for row in rows] == [0.0] * 4


def step_scorer(folder: Path) -> str:
    """A process reward model that knows nothing."""
    torch.manual_seed(0)
    model, tokenizer = build_reward_model(
        ModelConfig(layers=1, width=16, heads=2, context=32),
        alphabet=build_task(build_from_dict(TASK, TaskConfig)).alphabet,
        objectives=("reward",),
        heads=1,
    )
    StepScorer(Scorer(model, tokenizer), "a").save_pretrained(folder)
    return str(folder)


def test_every_step_is_paid(tmp_path: Path, base: Path) -> None:
    steps = step_scorer(tmp_path / "steps")
    plain = ppo(tmp_path / "plain", base)
    for weight, same in ((0.0, True), (5.0, False)):
        process = {"model": steps, "weight": weight, "form": "log_odds"}
        paid = ppo(tmp_path / f"paid-{weight}", base, process=process)
        assert [row["rewards/process/unscored"] for row in paid] == [0.0] * 4
        # the first rollout is the same, whatever is paid; what is learned from it is not
        assert paid[0]["objective/scores"] == plain[0]["objective/scores"]
        assert (paid[-1]["loss/value_avg"] == plain[-1]["loss/value_avg"]) is same


def test_no_step_of_a_completion_that_broke_a_rule_is_paid(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the process reward model says of its steps, it earns the floor; the others are paid."""
    (tmp_path / "rules.py").write_text("def long(prompt, completion):\n    return len(completion) >= 4\n")
    earned: list[tuple[Tensor, Tensor]] = []
    original = train_ppo.gae

    def gae(rollout: Rollout, *, gae_lambda: float) -> tuple[Tensor, Tensor]:
        assert isinstance(rollout.actions, Tensor)
        letters = (rollout.mask & (rollout.actions >= SPECIAL)).sum(1)
        earned.append((letters, rollout.rewards.sum(1)))
        return original(rollout, gae_lambda=gae_lambda)

    monkeypatch.setattr(train_ppo, "gae", gae)
    ppo(
        tmp_path / "run",
        base,
        safety={"rules": [f"{tmp_path}/rules.py:long"], "floor": -3.0},
        process={"model": step_scorer(tmp_path / "steps"), "weight": 50.0, "form": "probability"},
        sampling={"updates": 1, "prompts": 32},
    )
    ((letters, rewards),) = earned
    broke = letters >= 4
    assert broke.any()
    assert rewards[broke].tolist() == [-3.0] * int(broke.sum())
    assert rewards[~broke].max() > 1.0


@pytest.mark.parametrize("module", [train_ppo, train_grpo])
def test_the_kl_is_steered_by_what_was_drawn_dropped_completions_too(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    """One nat a token from the reference: nats a completion are its length, of all that was drawn."""
    fed: list[tuple[float, int]] = []
    learned: list[int] = []
    original, train = KLController.update, module.update

    def steer(self: KLController, kl: float, *, episodes: int) -> float:
        fed.append((kl, episodes))
        return original(self, kl, episodes=episodes)

    def update(**given: Any) -> dict[str, float]:
        learned.append(int(given["rollout"].mask.any(1).sum()))
        return train(**given)

    monkeypatch.setattr(KLController, "update", steer)
    monkeypatch.setattr(module, "update", update)
    monkeypatch.setattr(
        module, "reference_log_probs", lambda reference, samples: samples.log_probs - samples.mask.float()
    )
    tree = {
        "run": {"folder": str(tmp_path / "run"), "wandb": "disabled"},
        "task": TASK,
        "model": {"path": str(base)},
        "generation": {"max_new_tokens": 3},
        "shaping": {"cut": "drop"},
        "sampling": {"updates": 1, "prompts": 16},
        "kl": {"coef": 0.1, "target": 2.5, "horizon": 1000.0},
        "validation": {"every": 0},
    }
    config = TrainPPOConfig if module is train_ppo else TrainGRPOConfig
    metrics = module.train(build_from_dict(tree, config)).metrics
    ((kl, episodes),) = fed
    assert episodes == metrics["samples"]
    assert 0 < learned[0] < episodes
    assert kl == pytest.approx(metrics["completions/mean_length"], rel=1e-5)
    assert kl == pytest.approx(metrics["objective/kl"], rel=1e-5)
    assert metrics["completions/finished"] < 0.9


def test_a_frozen_policy_says_nothing_of_the_kl(tmp_path: Path, base: Path) -> None:
    """While the critic warms up the controller's coefficient stays, however far the target."""
    kl = {"coef": 0.5, "target": 1e9, "horizon": 1.0}
    rows = ppo(tmp_path / "run", base, kl=kl, ppo={"minibatch_size": 8, "critic_warmup": 2})
    coefs = [row["objective/kl_coef"] for row in rows]
    assert coefs[:4] == [0.5, 0.5, 0.5, pytest.approx(0.4)]


def test_validation_measures_the_kl_of_the_policy_that_it_judges(tmp_path: Path, base: Path) -> None:
    """Behind the update: what the evaluation of the same checkpoint on the same prompts says."""
    rows = ppo(tmp_path / "run", base)
    measured = EvaluateConfig(splits=("validation",), prompts=200, samples=2)
    for row in rows:
        last = tmp_path / "run" / "checkpoints" / "last"
        last.unlink()
        last.symlink_to(f"{row['global_step']:09d}")
        found = evaluate_run(tmp_path / "run", measured)["validation"]
        assert row["eval/kl"] == pytest.approx(found["kl"], rel=1e-6)
        assert row["eval/sampled"] == found["sampled"]
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert rows[0]["eval/kl"] > 1e-3
    shown = load_checkpoint(tmp_path / "run" / "checkpoints" / "000000004").state["monitor"]["looks"]
    assert [look["judged_kl"] for look in shown] == [row["eval/kl"] for row in rows]


@pytest.mark.parametrize("kept", [False, True])
def test_measuring_the_kl_draws_no_random_number(tmp_path: Path, base: Path, kept: bool) -> None:
    """Nor does it change what else validation says; a reference in its folder is as good as a loaded one."""
    task = build_task(build_from_dict(TASK, TaskConfig))
    policy, tokenizer = build_policy(ModelConfig(path=str(base)), alphabet=task.alphabet)
    frozen = frozen_copy(policy)
    frozen.save_pretrained(tmp_path / "reference")
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.5)
    reference = tmp_path / "reference" if kept else frozen
    few = ValidationConfig(every=1, samples=2, prompts=5)
    without = validate(policy, tokenizer, task, few, due=True)
    before = torch.get_rng_state()
    found = validate(policy, tokenizer, task, few, due=True, reference=reference)
    assert torch.equal(torch.get_rng_state(), before)
    assert abs(found.pop("eval/kl")) > 1e-3  # of ten completions, an estimate may fall below 0
    assert found == without
    assert validate(policy, tokenizer, task, few, due=False, reference=tmp_path / "nowhere") == {}


def test_a_run_says_at_its_start_what_the_monitor_cannot_judge(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ppo(tmp_path / "run", base)
    line = "monitor: looks in this run (validation.every): 4; too few to judge gap (needs 8), forecast (needs 8), "
    assert f"{line}kl_ratio (needs 9)\n" in capsys.readouterr().out
    never = {"monitor": {"stop": True, "kl_limit": 5.0}, "validation": {"every": 0}}
    tree = {"model": {"path": str(base)}, "task": TASK, "run": {"folder": str(tmp_path / "never")}, **never}
    for module, config in ((train_ppo, TrainPPOConfig), (train_grpo, TrainGRPOConfig)):
        with pytest.raises(UserError, match=r"^monitor\.stop: .*validation\.every is 0"):
            module.train(build_from_dict(tree, config))
    assert not (tmp_path / "never").exists()


def test_the_monitor_stops_a_run_and_names_the_last_good_checkpoint(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "run"
    # a limit that is passed for certain, as an estimate of the KL may be negative at first
    monitor = {"stop": True, "kl": "completions/mean_length", "kl_limit": 0.5}
    with pytest.raises(HackingSuspected, match=r"stopped by monitor\.stop: .*kl.*(last good|no checkpoint)"):
        ppo(folder, base, monitor=monitor)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) < 4
    assert logged[-1]["monitor/warnings"] >= 1.0


def test_a_resumed_run_remembers_what_the_monitor_saw(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "run"
    ppo(folder, base, sampling={"updates": 2, "prompts": 8})
    ppo(folder, base, resume=folder)
    looks = load_checkpoint(folder / "checkpoints" / "last").state["monitor"]["looks"]
    assert [look["step"] for look in looks] == [1, 2, 3, 4]


def test_what_was_cut_and_dropped_is_not_imitated(tmp_path: Path, base: Path) -> None:
    """Every answer is good enough; with `drop` those without EOS teach nothing, not by imitation either."""
    (tmp_path / "own.py").write_text("def fine(prompts, completions):\n    return [1.0] * len(completions)\n")
    for cut, imitated in (("penalise", True), ("drop", False)):
        folder = tmp_path / cut
        ppo(
            folder,
            base,
            rewards={f"{tmp_path}/own.py:fine": 1.0},
            generation={"max_new_tokens": 5},
            sampling={"updates": 1, "prompts": 64},
            shaping={"cut": cut},
            self_imitation={"coef": 1.0, "threshold": 0.5, "batch_size": 4},
        )
        kept = load_checkpoint(folder / "checkpoints" / "last").state["good_answers"]
        ids, mask = (torch.as_tensor(kept[name])[torch.as_tensor(kept["known"])] for name in ("input_ids", "mask"))
        assert len(ids) > 0
        finished = [EOS in row[drawn].tolist() for row, drawn in zip(ids, mask, strict=True)]
        assert all(finished) != imitated


def test_validation_is_on_prompts_of_its_own_and_gamma_discounts(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`best` must not be chosen by what is tested on."""
    asked: list[list[str]] = []
    discounts: list[float] = []
    evaluate, train = learner_module.evaluate_policy, train_ppo.update

    def evaluated(policy: Any, tokenizer: Any, task: Task, **given: Any) -> Any:
        asked.append([example.prompt for example in task.splits[given["split"]]])
        return evaluate(policy, tokenizer, task, **given)

    def update(**given: Any) -> dict[str, float]:
        discounts.append(float(given["rollout"].discount.unique()))
        return train(**given)

    monkeypatch.setattr(learner_module, "evaluate_policy", evaluated)
    monkeypatch.setattr(train_ppo, "update", update)
    ppo(tmp_path / "run", base, sampling={"updates": 1, "prompts": 8}, ppo={"gamma": 0.5, "minibatch_size": 8})
    own = build_task(build_from_dict(TASK, TaskConfig))
    assert asked == [[example.prompt for example in own.splits["validation"]]]
    assert not set(asked[0]) & {example.prompt for example in own.splits["test"]}
    assert discounts == [0.5]


def test_a_run_without_the_monitor_has_no_metrics_of_it(tmp_path: Path, base: Path) -> None:
    rows = ppo(tmp_path / "run", base, monitor={"enabled": False})
    assert not any(name.startswith("monitor/") for row in rows for name in row)


def test_texts_of_a_rollout() -> None:
    tokenizer = character_tokenizer("abc")
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    eos, pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
    ids = torch.tensor([[pad, a, b, eos, pad], [a, b, c, c, a]])
    drawn = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    none = torch.zeros(2, 5)
    real = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    samples = Samples(ids, real, drawn, torch.tensor([True, False]), none, none, None, torch.tensor([0, 1]))
    assert texts_of(samples, tokenizer) == (["a", "ab"], ["b", "cca"])
