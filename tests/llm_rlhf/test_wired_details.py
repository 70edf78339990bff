"""Details that losses get right and a recipe may still wire wrongly: masks where padding is EOS, one temperature,
where the KL is charged, what becomes of cut answers and scaled scores, and denominators over micro-batches."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch

from experiment.config import build_from_dict
from llm_rlhf import train_grpo, train_ppo, train_sft
from llm_rlhf.data.packing import pack
from llm_rlhf.data.texts import Encoded
from llm_rlhf.evaluate_turns import EvaluateConfig, evaluate_player
from llm_rlhf.logged.texts import tokenize_logged
from llm_rlhf.models.causal import build_policy, frozen_copy
from llm_rlhf.models.generation import at_temperature, to_rollout
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.online.experience import with_kl_rewards
from llm_rlhf.online.learner import steer_kl
from llm_rlhf.online.pretraining_mix import PretrainingMix, PretrainingMixConfig
from llm_rlhf.tasks.examples import Piece
from llm_rlhf.tasks.task import TaskConfig, build_task
from llm_rlhf.tasks.tool_calculator import ToolCalculatorConfig
from llm_rlhf.train_ilql import LearningConfig, TrainILQLConfig
from llm_rlhf.train_ilql import update as ilql_update
from llm_rlhf.turns.episodes import TurnsConfig
from llm_rlhf.turns.playing import build_player
from policy_core import ppo
from policy_core.kl import KLConfig, KLController
from policy_core.rollout import Rollout
from tests.llm_rlhf.logged.test_ilql import TEXTS, learner_of, tiny, tokens
from tests.llm_rlhf.online.test_experience import SCORES, hand_made
from tests.llm_rlhf.turns.test_turns import played, policy_of

EOS = 2
TASK = {"name": "random_walks", "random_walks": {"walks": 60}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = {
        "run": {"folder": str(tmp_path_factory.mktemp("base") / "run"), "wandb": "disabled"},
        "task": TASK,
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
        "sft": {"steps": 2, "batch_size": 16},
        "validation": {"every": 0},
    }
    return train_sft.train(build_from_dict(tree, train_sft.TrainSFTConfig)).folder


def updated(
    folder: Path, base: Path, recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, **sections: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """What the one update of a run was given, and the run's metrics."""
    seen: list[dict[str, Any]] = []
    update = recipe.update

    def spy(**given: Any) -> Any:
        seen.append(given)
        return update(**given)

    monkeypatch.setattr(recipe, "update", spy)
    tree = {
        "run": {"folder": str(folder), "wandb": "disabled"},
        "task": TASK,
        "model": {"path": str(base)},
        "generation": {"max_new_tokens": 4},
        "sampling": {"updates": 1, "prompts": 16},
        "kl": {"coef": 0.0},
        "validation": {"every": 0},
        **sections,
    }
    config = train_ppo.TrainPPOConfig if recipe is train_ppo else train_grpo.TrainGRPOConfig
    metrics = recipe.train(build_from_dict(tree, config)).metrics
    return seen[0], metrics


# ---------------------------------------------------------------- masks where padding is EOS


def test_packed_texts_whose_padding_is_eos() -> None:
    texts = [Encoded([7], [8, EOS], [True, True]), Encoded([4], [EOS], [True])]
    packed = pack(texts, context=8, pad=EOS, width=4)
    assert packed.mask.int().tolist() == [[0, 1, 1], [0, 1, 0]]
    assert packed.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_logged_texts_whose_padding_is_eos() -> None:
    tokenizer = character_tokenizer("ab")
    texts = [[Piece("a", None), Piece("b", 1.0)], [Piece("aa", None), Piece("bb", 2.0)]]
    pads = (int(tokenizer.pad_token_id), int(tokenizer.eos_token_id))
    plain, ends = (tokenize_logged(texts, tokenizer, context=9, pad=pad, gamma=1.0) for pad in pads)
    assert torch.equal(plain.mask, ends.mask)
    assert torch.equal(plain.attention_mask, ends.attention_mask)


def test_mixed_in_texts_whose_padding_is_eos(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("ab")
    tokenizer.pad_token = None
    (tmp_path / "texts.txt").write_text("ab\n\naabb\n")
    config = PretrainingMixConfig(coef=1.0, path=str(tmp_path / "texts.txt"))
    observations, mask = PretrainingMix(config, tokenizer, context=12, seed=0).batch(torch.arange(2))
    assert mask.sum(1).tolist() == [3, 5]  # the letters and EOS
    assert observations["attention_mask"].sum(1).tolist() == [4, 6]  # and what they begin with


# ---------------------------------------------------------------- one temperature


def test_turns_are_drawn_and_judged_at_one_temperature() -> None:
    policy, tokenizer = policy_of()
    with at_temperature(policy, 0.5):
        samples = played(policy, tokenizer, count=8).samples
        with torch.no_grad():
            judged = policy.evaluate(samples.observations(), samples.input_ids)
    assert judged.entropy is not None
    assert samples.entropy is not None
    assert (judged.log_probs - samples.log_probs)[samples.mask].abs().max() <= 1e-5
    assert (judged.entropy - samples.entropy)[samples.mask].abs().max() <= 1e-5


def test_the_kl_of_turns_to_the_same_model_is_zero_at_any_temperature() -> None:
    calculator = ToolCalculatorConfig(problems=60, validation=5, test=6)
    task = build_task(TaskConfig(name="tool_calculator", tool_calculator=calculator))
    torch.manual_seed(0)
    policy, tokenizer = build_policy(ModelConfig(layers=1, width=16, heads=2, context=112), alphabet=task.alphabet)
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    turns = TurnsConfig(tools=("calculator",))
    player = build_player(policy, tokenizer, task, turns, rewards={}, max_new_tokens=8)
    reference = copy.deepcopy(policy)
    config = EvaluateConfig(samples=2, temperature=0.5)
    found = evaluate_player(player, task.splits["test"], config, reference=reference)
    assert found["kl"] == pytest.approx(0.0, abs=1e-4)


# ---------------------------------------------------------------- the KL


@pytest.mark.parametrize(("placement", "estimator", "taken"), [("reward", "k1", 0.05), ("loss", "k2", 0.0)])
def test_the_kl_is_charged_in_one_place(
    placement: Literal["reward", "loss"], estimator: Literal["k1", "k2"], taken: float
) -> None:
    """Half a nat a token at 0.1 a nat."""
    samples = hand_made()
    ref_log_probs = torch.where(samples.mask, -0.5, 0.0)
    rollout = to_rollout(samples, SCORES.total, scored=SCORES.scored, ref_log_probs=ref_log_probs)
    config = KLConfig(coef=0.1, placement=placement, estimator=estimator)
    shaped, _ = with_kl_rewards(rollout, config=config, coef=0.1)
    found = (rollout.rewards - shaped.rewards)[rollout.mask]
    torch.testing.assert_close(found, torch.full_like(found, taken))


@pytest.mark.parametrize(("unit", "nats"), [("episode", 0.5 * 8 / 3), ("decision", 0.5)])
def test_the_controller_is_told_the_kl_in_its_unit(
    unit: Literal["episode", "decision"], nats: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three answers of eight tokens in all, half a nat each."""
    told: list[tuple[float, int]] = []
    monkeypatch.setattr(KLController, "update", lambda self, kl, *, episodes: told.append((kl, episodes)))
    samples = hand_made()
    controller = KLController(KLConfig(coef=0.1, target=1.0, unit=unit))
    steer_kl(controller, samples, torch.where(samples.mask, -0.5, 0.0))
    ((kl, episodes),) = told
    assert kl == pytest.approx(nats)
    assert episodes == 3


def test_the_reference_computes_as_the_policy_does() -> None:
    policy, _ = build_policy(ModelConfig(layers=1, width=16, heads=2), alphabet="ab", temperature=0.7)
    policy.precision = "bf16"
    reference = frozen_copy(policy)
    assert reference.precision == "bf16"
    assert reference.temperature == 0.7


# ---------------------------------------------------------------- what an update is given


@pytest.mark.parametrize(("cut", "bootstrapped"), [("penalise", False), ("bootstrap", True)])
def test_answers_that_were_cut_end_as_was_asked(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, cut: str, bootstrapped: bool
) -> None:
    given, metrics = updated(tmp_path / "run", base, train_ppo, monkeypatch, shaping={"cut": cut})
    rollout: Rollout = given["rollout"]
    unfinished = round((1 - metrics["completions/finished"]) * 16)
    assert unfinished > 0
    assert int(rollout.truncated.sum()) == (unfinished if bootstrapped else 0)
    assert int(rollout.terminated.sum()) == 16 - int(rollout.truncated.sum())


@pytest.mark.parametrize("recipe", [train_ppo, train_grpo])
def test_what_is_learned_are_the_scaled_scores(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, recipe: ModuleType
) -> None:
    (tmp_path / "own.py").write_text(
        "def length(prompts, completions):\n    return [5.0 + 3 * len(text) for text in completions]\n"
    )
    rewards = {f"{tmp_path}/own.py:length": 1.0}
    given, metrics = updated(
        tmp_path / "run", base, recipe, monkeypatch, shaping={"scale": "batch"}, rewards=rewards
    )
    earned = given["rollout"].rewards.sum(1)
    assert float(earned.std(correction=0)) == pytest.approx(1.0, rel=1e-4)
    mean = metrics["objective/scores"] / metrics["objective/score_deviation"]
    assert float(earned.mean()) == pytest.approx(mean, rel=1e-4)


def test_advantages_of_groups_are_not_normalised_again(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[torch.Tensor] = []
    make_batches = ppo.make_batches

    def spy(rollout: Rollout, **given: Any) -> Any:
        used.append(given["advantages"])
        return make_batches(rollout, **given)

    monkeypatch.setattr(ppo, "make_batches", spy)
    sections = {"grpo": {"advantage": "dr_grpo"}, "rewards": {"random": 1.0}}
    given, _ = updated(tmp_path / "run", base, train_grpo, monkeypatch, **sections)
    assert torch.equal(used[0], given["advantages"])


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_step_of_ilql_does_not_depend_on_micro_batches(micro_batch_size: int) -> None:
    moved = []
    for size in (None, micro_batch_size):
        policy, tokenizer, heads = tiny()
        data = tokens(tokenizer, TEXTS)
        learner = learner_of(policy, heads, len(data), model_rate=1e-2)
        of_heads = [*heads.critics.parameters(), *heads.value.parameters()]
        groups = [{"params": of_heads}, {"params": list(policy.parameters())}]
        learner.optimizer = torch.optim.SGD(groups, lr=0.1)  # which sees the size of a gradient, as Adam does not
        learning = LearningConfig(
            learning_rate=0.1, model_learning_rate=0.1, max_grad_norm=1e9, micro_batch_size=size
        )
        config = TrainILQLConfig(learning=learning)
        metrics = ilql_update(learner, data, config, step=1)
        weights = [parameter.detach().flatten() for parameter in (*policy.parameters(), *heads.parameters())]
        moved.append((torch.cat(weights), metrics["loss/total"]))
    torch.testing.assert_close(moved[0][0], moved[1][0], atol=1e-6, rtol=0.0)
    assert moved[0][1] == pytest.approx(moved[1][1], rel=1e-5)
