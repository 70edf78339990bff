"""The recipes in miniature: texts with calls, episodes with a tool, resuming, and a user's own game."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import Run, RunResult
from llm_rlhf import train_turns_grpo, train_turns_ppo, train_turns_sft
from llm_rlhf.evaluate_turns import EvaluateConfig, evaluate_player, evaluate_run
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.online.experience import Shaper, ShapingConfig
from llm_rlhf.rewards.functions import Scores
from llm_rlhf.tasks.examples import Example
from llm_rlhf.tasks.task import TaskConfig, build_task
from llm_rlhf.tasks.tool_calculator import (
    ToolCalculatorConfig,
)
from llm_rlhf.train_turns_grpo import TrainTurnsGRPOConfig
from llm_rlhf.train_turns_ppo import TrainTurnsPPOConfig
from llm_rlhf.train_turns_sft import TrainTurnsSFTConfig
from llm_rlhf.turns.episodes import TurnsConfig
from llm_rlhf.turns.learner import as_learned
from llm_rlhf.turns.playing import Judge, Played, build_player
from policy_core.rollout import Rollout
from tests.llm_rlhf.turns.test_turn_rollouts import two_turns

DATA = Path(os.environ.get("TANDEM_DATA", Path(__file__).parents[3] / "shared" / "data"))
GSM8K = DATA / "gsm8k_train.jsonl.gz"
SMALL = {"problems": 120, "steps": 1, "by_heart": 0.5, "validation": 10, "test": 12}
TASK = {"name": "tool_calculator", "tool_calculator": SMALL}
TURNS = {"tools": ["calculator"], "max_turns": 3}


def settings(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 3, "seed": 5},
        "task": TASK,
        "turns": TURNS,
        "validation": {"every": 2, "samples": 2, "prompts": 6},
        "log_every": 1,
        **sections,
    }


def small_sft(folder: Path, steps: int = 6) -> TrainTurnsSFTConfig:
    model = {"layers": 1, "width": 32, "heads": 2, "context": 112}
    sft = {"steps": steps, "batch_size": 16, "learning_rate": 1e-2}
    return build_from_dict(settings(folder, model=model, sft=sft), TrainTurnsSFTConfig)


def small_ppo(folder: Path, base: Path, updates: int = 6, **sections: Any) -> TrainTurnsPPOConfig:
    defaults = {
        "model": {"path": str(base)},
        "generation": {"max_new_tokens": 24},
        "sampling": {"updates": updates, "prompts": 6, "samples_per_prompt": 2},
        "ppo": {"minibatch_size": 6, "critic_warmup": 1},
        "kl": {"coef": 0.05, "target": 1.0, "horizon": 100.0},
    }
    return build_from_dict(settings(folder, **{**defaults, **sections}), TrainTurnsPPOConfig)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to open a call, at times."""
    return train_turns_sft.train(small_sft(tmp_path_factory.mktemp("base") / "run", steps=30)).folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return LanguagePolicy.from_pretrained(folder, value_head=True).state_dict()


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def resumed(train: Callable[..., RunResult], make: Callable[[Path], Any], folder: Path) -> None:
    """Interrupted after the checkpoint at three, as a kill would, against six updates at a stretch."""

    class InterruptError(Exception):
        pass

    whole = train(make(folder / "whole")).folder
    original = Run.log

    def log(self: Any, metrics: Any, *, global_step: int) -> None:
        if global_step == 5:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    config = make(folder / "broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(InterruptError):
            train(config)
    torch.manual_seed(12345)  # a new process would not have the old one's global generator
    train(config, resume=folder / "broken")
    expected, found = weights(whole), weights(folder / "broken")
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert logged(folder / "broken") == logged(whole)


def test_sft_resumes_to_the_bit(tmp_path: Path) -> None:
    resumed(train_turns_sft.train, small_sft, tmp_path)


def test_ppo_resumes_to_the_bit(tmp_path: Path, base: Path) -> None:
    resumed(train_turns_ppo.train, lambda folder: small_ppo(folder, base), tmp_path)


def test_the_kl_steers_its_coefficient(tmp_path: Path, base: Path) -> None:
    rows = logged(train_turns_ppo.train(small_ppo(tmp_path / "run", base, 4)).folder)
    assert rows[0]["objective/kl_coef"] == 0.05
    assert rows[-1]["objective/kl_coef"] < 0.05  # the target, 1 nat, is far above what four updates spend


@pytest.mark.parametrize(("cut", "bootstrapped"), [("penalise", False), ("bootstrap", True)])
def test_episodes_that_were_cut_end_as_was_asked(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, cut: str, bootstrapped: bool
) -> None:
    seen: list[Rollout] = []
    update = train_turns_ppo.update

    def spy(**given: Any) -> Any:
        seen.append(given["rollout"])
        return update(**given)

    monkeypatch.setattr(train_turns_ppo, "update", spy)
    config = small_ppo(tmp_path / "run", base, 1, shaping={"cut": cut})
    metrics = train_turns_ppo.train(config).metrics
    unfinished = round((1 - metrics["completions/finished"]) * 12)
    assert unfinished > 0
    assert int(seen[0].truncated.sum()) == (unfinished if bootstrapped else 0)


def test_one_update_runs_and_says_what_happened(tmp_path: Path, base: Path) -> None:
    folder = train_turns_ppo.train(small_ppo(tmp_path / "run", base, 2)).folder
    rows = logged(folder)
    names = {
        "objective/kl",
        "objective/scores",
        "objective/rlhf_reward",
        "rewards/final_answer/mean",
        "turns/mean",
        "turns/masked_share",
        "tools/call_frequency",
        "tools/failure_frequency",
        "policy/approxkl_avg",
        "val/explained_variance",
        "completions/finished",
        "eval/greedy",
        "eval/pass@2",
        "eval/turns",
        "eval/calls",
        "samples",
        "tokens",
    }
    assert names <= rows[-1].keys()
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert rows[-1]["samples"] == 24
    assert "loss/policy_avg" not in rows[0]  # critic warm-up
    assert "loss/policy_avg" in rows[1]
    before, after = weights(base), weights(folder)
    assert not torch.equal(before["model.transformer.wte.weight"], after["model.transformer.wte.weight"])
    (table,) = (folder / "tables" / "completions").glob("*.jsonl")
    first = json.loads(table.read_text().splitlines()[0])
    assert set(first) == {"prompt", "completion", "final_answer"}
    assert first["prompt"].startswith("There are ")


def test_it_is_evaluated_with_its_tools(base: Path) -> None:
    found = evaluate_run(base, EvaluateConfig(samples=2))
    assert set(found) == {"test"}
    assert found["test"]["prompts"] == 12
    assert {"greedy", "greedy_interval", "sampled", "pass@2", "turns", "calls", "finished"} <= found["test"].keys()
    assert found["test"]["calls"] > 0
    assert json.loads((base / "eval.json").read_text())["splits"] == found
    assert evaluate_run(base, EvaluateConfig(samples=2)) == found
    with pytest.raises(UserError, match="no 'nothing'"):
        evaluate_run(base, EvaluateConfig(splits=("nothing",)))


# ---------------------------------------------------------------- somebody's own environment

GAME = """
class Count:
    '''Pays 1 for a turn that says the letter wanted, and asks again, three times.'''
    def reset(self, row):
        self.row, self.turns = row, 0
    def ends_turn(self, text):
        return len(text) >= 1
    def respond(self, text):
        self.turns += 1
        return "b", float(text.startswith(self.row["answer"])), self.turns == 3

def tell(prompts, completions, turns, replies, answer):
    assert all("".join(x + y for x, y in zip(t, r + [""])) for t, r in zip(turns, replies))
    return [float(len(t) == 3) for t in turns]
"""


def letters(tmp_path: Path) -> dict[str, Any]:
    lines = [{"prompt": "abcd" * (1 + i % 3) + "abcd"[i % 4] + str(i), "completion": "a"} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": "rows", "data": str(data), "rows": {"validation": 0.2, "test": 0.2, "max_new_tokens": 12}}


def test_a_game_of_ones_own_teaches_by_turn(tmp_path: Path) -> None:
    """Rewards come from the environment, a turn at a time; the letter that pays becomes likelier."""
    game = tmp_path / "game.py"
    game.write_text(GAME)
    task = letters(tmp_path)
    model = {"layers": 1, "width": 16, "heads": 2, "context": 40}
    sft = small_sft(tmp_path / "sft", steps=1)
    sft = build_from_dict(
        settings(tmp_path / "sft", task=task, model=model, sft={"steps": 1, "learning_rate": 1e-6}), type(sft)
    )
    start = train_turns_sft.train(replace(sft, turns=TurnsConfig(environment=f"{game}:Count"))).folder
    sections: dict[str, Any] = {
        "task": task,
        "turns": {"environment": f"{game}:Count", "max_turns": 5},
        "generation": {"cut_is_end": False},
        "sampling": {"updates": 12, "prompts": 24},
        "ppo": {"minibatch_size": 24, "learning_rate": 2e-2, "critic_warmup": 0, "gamma": 0.9},
        "kl": {"coef": 0.0},
        "validation": {"every": 0},
    }
    folder = train_turns_ppo.train(small_ppo(tmp_path / "run", start, **sections)).folder
    rows = logged(folder)
    assert rows[0]["objective/scores"] < 1.0
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 1.0
    assert rows[-1]["rewards/environment/mean"] == pytest.approx(rows[-1]["objective/scores"])
    rewards = {"environment": 0.5, f"{game}:tell": 2.0}
    both: dict[str, Any] = {**sections, "rewards": rewards, "sampling": {"updates": 1}}
    last = train_turns_ppo.train(small_ppo(tmp_path / "both", folder, **both)).metrics
    expected = 0.5 * last["rewards/environment/mean"] + 2.0 * last[f"rewards/{game}:tell/mean"]
    assert last["objective/scores"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("recipe", ["ppo", "grpo"])
def test_rows_of_ones_own_environment_need_no_completion(recipe: str, tmp_path: Path, base: Path) -> None:
    game = tmp_path / "game.py"
    game.write_text(GAME)
    lines = [{"prompt": "12+34="[: 3 + i % 3] + str(i), "answer": "1"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {"validation": 0.2, "test": 0.2, "max_new_tokens": 12}
    sections: dict[str, Any] = {
        "task": {"name": "rows", "data": str(tmp_path / "rows.jsonl"), "rows": rows},
        "turns": {"environment": f"{game}:Count", "max_turns": 5},
    }
    if recipe == "ppo":
        folder = train_turns_ppo.train(small_ppo(tmp_path / "run", base, 1, **sections)).folder
    else:
        folder = train_turns_grpo.train(small_grpo(tmp_path / "run", base, 1, **sections)).folder
    found = evaluate_run(folder, EvaluateConfig(samples=2))["test"]
    assert found["prompts"] == 8
    assert "rewards" not in found
    assert 0.0 <= found["sampled"] <= 3.0


def test_validation_and_evaluation_are_by_the_tasks_own_reward(tmp_path: Path, base: Path) -> None:
    """What is climbed may be hacked, and stands beside."""
    (tmp_path / "own.py").write_text("def hacked(prompts, completions):\n    return [5.0] * len(completions)\n")
    own = {f"{tmp_path}/own.py:hacked": 2.0}
    folder = train_turns_ppo.train(small_ppo(tmp_path / "run", base, 2, rewards=own)).folder
    last = logged(folder)[-1]
    assert last["objective/scores"] == 10.0
    assert 0.0 <= last["eval/sampled"] <= 1.0
    found = evaluate_run(folder, EvaluateConfig(samples=2))["test"]
    assert 0.0 <= found["sampled"] <= 1.0
    assert found["rewards"]["sampled"] == found["rewards"]["greedy"] == 10.0
    assert "rewards" not in evaluate_run(folder, EvaluateConfig(samples=2, own_rewards=False))["test"]


def test_mistakes_are_one_line(tmp_path: Path, base: Path) -> None:
    for turns, message in (
        ({}, "nobody would answer"),
        ({"tools": ["abacus"]}, "abacus: unknown"),
        ({"environment": "game.py:Nobody"}, "there is no file game.py"),
    ):
        with pytest.raises(UserError, match=message):
            train_turns_ppo.train(small_ppo(tmp_path / "run", base, turns=turns))
    with pytest.raises(UserError, match=r"model\.path"):
        train_turns_ppo.train(replace(small_ppo(tmp_path / "run", base), model=ModelConfig()))
    config = small_ppo(tmp_path / "wild", base, 3)
    with pytest.raises(UserError, match=r"lower (learning rate|ppo\.learning_rate)"):
        train_turns_ppo.train(replace(config, ppo=replace(config.ppo, learning_rate=1e30, max_grad_norm=1e30)))
    with pytest.raises(UserError, match="do not fit the model's context of 8"):
        train_turns_sft.train(replace(small_sft(tmp_path / "sft"), model=ModelConfig(context=8)))


def test_a_reward_function_that_hangs_ends_the_run_with_one_line(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import threading\ndef hangs(prompts, completions):\n    threading.Event().wait()\n")
    config = small_ppo(tmp_path / "run", base, rewards={f"{file}:hangs": 1.0}, rewards_timeout=0.05)
    with pytest.raises(UserError, match=r"own\.py:hangs: no answer within 0\.05 seconds \(rewards_timeout\)$"):
        train_turns_ppo.train(config)


def test_in_bfloat16_the_first_ratio_is_1(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios: list[torch.Tensor] = []
    original = train_turns_ppo.update

    def update(**given: Any) -> dict[str, float]:
        rollout = given["rollout"]
        with torch.no_grad():
            log_probs = given["policy"].evaluate(rollout.observations, rollout.actions).log_probs
        ratios.append((log_probs - rollout.old_log_probs)[rollout.mask].exp())
        assert not torch.equal(rollout.behaviour_log_probs, rollout.old_log_probs)
        return original(**given)

    monkeypatch.setattr(train_turns_ppo, "update", update)
    rows = logged(train_turns_ppo.train(replace(small_ppo(tmp_path / "run", base, 2), precision="bf16")).folder)
    assert all(row["sampling/logprob_gap"] > 1e-5 for row in rows)
    assert max(float((ratio - 1).abs().max()) for ratio in ratios) < 1e-5


# ---------------------------------------------------------------- groups instead of a value model


def small_grpo(folder: Path, base: Path, updates: int = 6, **sections: Any) -> TrainTurnsGRPOConfig:
    defaults = {
        "model": {"path": str(base)},
        "generation": {"max_new_tokens": 24},
        "sampling": {"updates": updates, "prompts": 4, "skip_flat_groups": False},
        "grpo": {"group_size": 3},
        "ppo": {"minibatch_size": 6},
    }
    return build_from_dict(settings(folder, **{**defaults, **sections}), TrainTurnsGRPOConfig)


def test_grpo_resumes_to_the_bit(tmp_path: Path, base: Path) -> None:
    resumed(train_turns_grpo.train, lambda folder: small_grpo(folder, base), tmp_path)
    (first, *_, last) = logged(tmp_path / "whole")
    assert {"objective/frac_reward_zero_std", "loss/policy_avg", "turns/mean", "eval/pass@2"} <= last.keys()
    assert first["samples"] == 12
    assert "val/explained_variance" not in last
    with pytest.raises(UserError, match=r"shaping\.cut bootstrap needs a critic"):
        small_grpo(tmp_path / "no", base, generation={"cut_is_end": False})


def test_an_episodes_advantage_is_of_all_its_turns(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token that the policy wrote, of whatever turn, has the advantage of all that its episode earned."""
    game = tmp_path / "game.py"
    game.write_text(
        "class Sum:\n    def reset(self, row):\n        self.turns = 0\n"
        "    def ends_turn(self, text):\n        return len(text) >= 2\n"
        "    def respond(self, text):\n        self.turns += 1\n"
        "        return 'b', float(sum(map(ord, text)) % 7), self.turns == 3\n"
    )
    seen: list[dict[str, Any]] = []
    original = train_turns_grpo.update

    def update(**given: Any) -> dict[str, float]:
        seen.append(given)
        return original(**given)

    monkeypatch.setattr(train_turns_grpo, "update", update)
    turns = {"environment": f"{game}:Sum", "max_turns": 4}
    train_turns_grpo.train(small_grpo(tmp_path / "run", base, 1, turns=turns, validation={"every": 0}))
    rollout, advantages = seen[0]["rollout"], seen[0]["advantages"]
    earned = rollout.rewards.sum(1).view(4, 3)
    expected = (earned - earned.mean(1, keepdim=True)) / (earned.std(1, keepdim=True) + 1e-4)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(
        advantages, torch.where(rollout.mask, expected.view(-1, 1), 0.0), atol=1e-5, rtol=1e-5
    )


# ---------------------------------------------------------------- what it shares with single answers


def test_a_separate_critic_texts_beside_and_the_monitor_resume_to_the_bit(tmp_path: Path, base: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "There are 12 boxes."}\n' * 4)
    sections: dict[str, Any] = {
        "critic": {"model": "separate", "learning_rate": 1e-3},
        "ptx": {"coef": 0.5, "path": str(tmp_path / "texts.jsonl"), "batch_size": 2},
        "shaping": {"cut": "penalise", "missing_eos_penalty": 0.5, "scale": "running"},
        "monitor": {"kl_limit": 1e-4},
    }
    resumed(train_turns_ppo.train, lambda folder: small_ppo(folder, base, **sections), tmp_path)
    rows = logged(tmp_path / "whole")
    assert {"loss/ptx", "objective/score_deviation", "monitor/warnings"} <= rows[-1].keys()
    assert (tmp_path / "whole" / "checkpoints" / "last" / "critic").is_dir()
    with pytest.raises(UserError, match="has not read the answer behind the last turn"):
        small_ppo(tmp_path / "no", base, critic={"model": "separate"}, generation={"cut_is_end": False})


def hand_played() -> Played:
    """Two episodes, the second of which nobody ended; the environment gives by turn, functions 10 and 20."""
    episodes = two_turns()
    final = torch.tensor([10.0, 20.0])
    total = final + episodes.turn_rewards.sum(1)
    return Played(episodes, Scores(total, torch.tensor([True, True]), {}), final, [], [])


def test_shaping_of_episodes_by_hand() -> None:
    played = hand_played()
    samples = played.episodes.samples
    penalised = Shaper(ShapingConfig(missing_eos_penalty=3.0), "penalise")
    rollout, metrics = as_learned(played, samples, penalised, turn_weight=1.0, gamma=1.0)
    assert metrics == {}
    assert rollout.rewards.tolist() == [[0, 0, 0, 1, 0, 0, 12], [0, 0, 17.5, 0, 0, 0, 0]]
    assert not rollout.truncated.any()
    rollout, _ = as_learned(played, samples, Shaper(ShapingConfig(cut="drop"), "drop"), turn_weight=1.0, gamma=1.0)
    assert rollout.mask.any(1).tolist() == [True, False]
    assert rollout.rewards[1].tolist() == [0.0] * 7
    scaled = Shaper(ShapingConfig(scale="batch"), "penalise")
    rollout, metrics = as_learned(played, samples, scaled, turn_weight=1.0, gamma=1.0)
    assert metrics["objective/score_deviation"] == pytest.approx((20.5 - 13.0) / 2)  # of totals 13 and 20.5
    torch.testing.assert_close(rollout.rewards.sum(1), torch.tensor([13.0, 20.5]) / 3.75)


@pytest.mark.parametrize("family", ["ppo", "grpo"])
def test_a_run_of_several_turns_is_under_its_rules(tmp_path: Path, base: Path, family: str) -> None:
    (tmp_path / "rules.py").write_text("def ever(prompt, completion):\n    return True\n")
    safety = {"rules": [f"{tmp_path}/rules.py:ever"], "floor": -3.0}
    if family == "ppo":
        folder = train_turns_ppo.train(small_ppo(tmp_path / "run", base, 2, safety=safety)).folder
    else:
        folder = train_turns_grpo.train(small_grpo(tmp_path / "run", base, 2, safety=safety)).folder
    assert [row["objective/scores"] for row in logged(folder)] == [-3.0, -3.0]


def test_rules_see_what_the_policy_wrote_and_no_reward_buys_them_off() -> None:
    """The second episode wrote a c and nothing else; the answer "bb" of the first one breaks no rule."""
    episodes = two_turns()
    shown: list[str] = []

    def no_b(prompt: str, text: str) -> bool:
        assert prompt == "p"
        shown.append(text)
        return "b" in text or text == "c"

    judge = Judge(None, 1.0, {"no_b": no_b}, floor=-4.0)
    rows = [Example("p", "c", {})] * 2
    scores, final = judge(episodes, rows, ["", ""], first_index=0)
    assert shown == ["cd\nc", "c"]
    assert scores.total.tolist() == [3.0, -4.0]
    assert final.tolist() == [0.0, -4.5]  # with the half that its turn earned, the floor
    assert scores.by_name["rules/no_b"].tolist() == [1.0, 0.0]


def test_episodes_that_nobody_can_judge_do_not_count(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def mute(prompts, completions):\n    return [None] * len(completions)\n")
    task = build_task(
        TaskConfig(name="tool_calculator", tool_calculator=ToolCalculatorConfig(problems=60, validation=5, test=6))
    )
    policy, tokenizer = build_policy(ModelConfig(path=str(base)), alphabet=task.alphabet)
    player = build_player(
        policy, tokenizer, task, TurnsConfig(tools=("calculator",)), rewards={f"{file}:mute": 1.0}, max_new_tokens=8
    )
    found = evaluate_player(player, task.splits["test"], EvaluateConfig(samples=2), reference=policy)
    assert (found["sampled"], found["sampled_unscored"], found["greedy_unscored"]) == (None, 1.0, 1.0)
    assert found["kl"] == pytest.approx(0.0, abs=1e-4)
