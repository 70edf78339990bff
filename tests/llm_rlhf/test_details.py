"""Details that decide whether a language recipe is right, and that no other file here looks at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast

from experiment.config import build_from_dict
from llm_rlhf import (
    train_grpo,
    train_ilql,
    train_iterative_dpo,
    train_ppo,
    train_process_reward,
    train_rejection,
    train_reward,
    train_sft,
    train_turns_grpo,
    train_turns_ppo,
)
from llm_rlhf.data.pairs import TokenizedPairs
from llm_rlhf.data.texts import TokenizedTexts
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.generation import Samples, generate, to_rollout
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.preferences.learning import LearningConfig, ReferencedPairs, pair_step
from llm_rlhf.preferences.learning import make_optimizer as make_preference_optimizer
from llm_rlhf.rewards.reward_model import RewardModel
from llm_rlhf.tasks.task import TaskConfig, build_task
from llm_rlhf.train_sft import SupervisedConfig, make_optimizer
from policy_core.ppo import PPOConfig, update
from policy_core.preference import PreferenceConfig
from policy_core.returns import gae

EOS, PAD = 2, 0


def random_policy() -> LanguagePolicy:
    torch.manual_seed(1)
    policy, _ = build_policy(
        ModelConfig(layers=1, width=16, heads=2, context=24), alphabet="0123456789", value_head=True
    )
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return policy


# ---------------------------------------------------------------- the reference's temperature


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is sure of some things."""
    tree = {
        "run": {"folder": str(tmp_path_factory.mktemp("base") / "run"), "wandb": "disabled"},
        "task": {"name": "random_walks", "random_walks": {"walks": 60}},
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
        "sft": {"steps": 40, "batch_size": 16},
        "validation": {"every": 0},
    }
    return train_sft.train(build_from_dict(tree, train_sft.TrainSFTConfig)).folder


@pytest.mark.parametrize(
    ("train", "recipe"),
    [(train_ppo.train, train_ppo.TrainPPOConfig), (train_grpo.train, train_grpo.TrainGRPOConfig)],
)
def test_the_reference_is_read_at_the_policys_temperature(
    tmp_path: Path, walker: Path, train: Callable[..., Any], recipe: type
) -> None:
    """A policy that does not move has no KL, at the start and when the reference comes back from its folder."""
    tree = {
        "run": {"folder": str(tmp_path / "run"), "wandb": "disabled", "checkpoint_every": 1},
        "task": {"name": "random_walks", "random_walks": {"walks": 60}},
        "model": {"path": str(walker)},
        "generation": {"temperature": 0.5},
        "sampling": {"updates": 1, "prompts": 8},
        "ppo": {"learning_rate": 0.0, "minibatch_size": 64},
        "validation": {"every": 0},
    }
    config: Any = build_from_dict(tree, recipe)
    first = train(config).metrics
    more = replace(config, sampling=replace(config.sampling, updates=2))
    for metrics in (first, train(more, resume=tmp_path / "run").metrics):
        assert abs(metrics["objective/kl"]) < 1e-4
        assert metrics["objective/entropy"] > 0.1
    cold = LanguagePolicy.from_pretrained(tmp_path / "run" / "reference", temperature=0.5)
    warm = LanguagePolicy.from_pretrained(tmp_path / "run" / "reference")
    ids = torch.arange(5, 15).unsqueeze(0)
    seen = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert (cold.evaluate(seen, ids).log_probs - warm.evaluate(seen, ids).log_probs).abs().max() > 0.1


# ---------------------------------------------------------------- the first ratio in bf16


@pytest.mark.parametrize("module", [train_ppo, train_grpo])
def test_in_bfloat16_the_first_ratio_is_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Of long completions sampling's log-probs differ from the training forward's there, so an update does not
    start from them, and weighs what it learns by the difference. In the update's own shuffled minibatches, too,
    where they are not of a few rows."""
    torch.manual_seed(0)
    alphabet = build_task(TaskConfig(name="random_walks")).alphabet
    policy, tokenizer = build_policy(ModelConfig(layers=2, width=32, heads=4, context=64), alphabet=alphabet)
    for parameter in policy.parameters():
        parameter.data *= 2
    policy.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(str(tmp_path / "start"))
    gaps: list[float] = []
    original = module.update

    def update(**given: Any) -> dict[str, float]:
        rollout = given["rollout"]
        assert not torch.equal(rollout.behaviour_log_probs, rollout.old_log_probs)
        assert len(rollout.mask) == 64
        for rows in [torch.arange(64), *torch.randperm(64).split(32)]:
            part = rollout.select(rows)
            with torch.no_grad():
                log_probs = given["policy"].evaluate(part.observations, part.actions).log_probs
            ratio = (log_probs - part.old_log_probs)[part.mask].exp()
            gaps.append(float((ratio - 1).abs().max()))
        return original(**given)

    monkeypatch.setattr(module, "update", update)
    tree = {
        "run": {"folder": str(tmp_path / "run"), "wandb": "disabled"},
        "task": {"name": "random_walks", "random_walks": {"walks": 60}},
        "model": {"path": str(tmp_path / "start")},
        "generation": {"max_new_tokens": 40},
        "sampling": {"updates": 2, "prompts": 8} | ({"samples_per_prompt": 8} if module is train_ppo else {}),
        "precision": "bf16",
        "validation": {"every": 0},
    }
    config = "TrainPPOConfig" if module is train_ppo else "TrainGRPOConfig"
    metrics = module.train(build_from_dict(tree, getattr(module, config))).metrics
    assert 1e-4 < metrics["sampling/logprob_gap"] < 0.1
    assert len(gaps) == 6
    assert max(gaps) < 1e-5


# ---------------------------------------------------------------- padding that is EOS


def test_eos_as_padding_changes_nothing() -> None:
    """Drawn with EOS as padding: the same masks, with EOS among the decisions, and the same step."""
    policy = random_policy()

    def drawn(pad: int) -> Samples:
        return generate(
            policy,
            [[5, 6, 7], [8], [9, 10]],
            samples_per_prompt=8,
            max_new_tokens=6,
            ends={EOS},
            pad=pad,
            generator=torch.Generator().manual_seed(0),
        )

    def stepped(samples: Samples) -> Tensor:
        moved = random_policy()
        rollout = to_rollout(samples, torch.arange(24.0) % 5, scored=torch.ones(24, dtype=torch.bool))
        advantages, returns = gae(rollout, gae_lambda=0.9)
        update(
            policy=moved,
            optimizer=torch.optim.SGD(moved.parameters(), lr=0.1),
            rollout=rollout,
            advantages=advantages,
            returns=returns,
            config=PPOConfig(epochs=1, minibatch_size=24, entropy_coef=0.1),
            generator=torch.Generator().manual_seed(0),
        )
        return torch.cat([parameter.detach().flatten() for parameter in moved.parameters()])

    plain, ends = drawn(PAD), drawn(EOS)
    real = plain.attention_mask.bool()
    assert plain.finished.any()
    assert (ends.input_ids[ends.mask] == EOS).sum() == plain.finished.sum()
    assert (ends.input_ids[~real] == EOS).all()
    for name in ("attention_mask", "mask", "finished"):
        assert torch.equal(getattr(ends, name), getattr(plain, name)), name
    assert torch.equal(ends.input_ids[real], plain.input_ids[real])
    torch.testing.assert_close(ends.log_probs, plain.log_probs, atol=1e-6, rtol=0)
    torch.testing.assert_close(stepped(ends), stepped(plain), atol=1e-6, rtol=0)


# ---------------------------------------------------------------- tokens in, tokens out

A, B, AB = 1, 2, 3


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model over a tokenizer that writes "ab" as one token, and has no padding; it draws a and b apart, too."""
    folder = tmp_path_factory.mktemp("speller")
    backend = Tokenizer(models.BPE(vocab={"<eos>": 0, "a": A, "b": B, "ab": AB}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert tokenizer.encode("aabb", add_special_tokens=False) == [A, AB, B]
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=4, n_positions=16, n_embd=8, n_layer=1, n_head=2)).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    rows = [{"prompt": "ab" * i + "a", "completion": "b"} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(
        "def count(prompts, completions):\n    return [text.count('a') for text in completions]\n\n"
        "class Echo:\n    def reset(self, row):\n        pass\n\n"
        "    def respond(self, text):\n        return 'ab', 0.0, False\n"
    )
    return folder


def apart(ids: Tensor, mask: Tensor) -> bool:
    """Whether a row of [B, T] holds a and b as two tokens, which no text has when it is tokenised."""
    return bool(((ids[:, :-1] == A) & (ids[:, 1:] == B) & mask[:, :-1] & mask[:, 1:]).any())


def texts_of(texts: TokenizedTexts) -> bool:
    return apart(texts.input_ids, texts.mask)


@pytest.mark.parametrize(
    ("module", "recipe", "step", "found"),
    [
        (
            train_ppo,
            "TrainPPOConfig",
            "update",
            lambda _, given: apart(given["rollout"].actions, given["rollout"].mask),
        ),
        (
            train_grpo,
            "TrainGRPOConfig",
            "update",
            lambda _, given: apart(given["rollout"].actions, given["rollout"].mask),
        ),
        *[
            (module, recipe, "update", lambda _, given: apart(given["rollout"].actions, given["rollout"].mask))
            for module, recipe in (
                (train_turns_ppo, "TrainTurnsPPOConfig"),
                (train_turns_grpo, "TrainTurnsGRPOConfig"),
            )
        ],
        (train_rejection, "TrainRejectionConfig", "supervised_step", lambda args, _: texts_of(args[2])),
        (
            train_iterative_dpo,
            "TrainIterativeDPOConfig",
            "pair_step",
            lambda args, _: texts_of(args[2].pairs.chosen) or texts_of(args[2].pairs.rejected),
        ),
    ],
)
def test_what_was_drawn_is_what_is_learned(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    speller: Path,
    module: Any,
    recipe: str,
    step: str,
    found: Callable[[Any, Any], bool],
) -> None:
    """Never the tokens that a completion's text would have."""
    seen: list[bool] = []
    original = getattr(module, step)

    def watched(*args: Any, **given: Any) -> Any:
        seen.append(found(args, given))
        return original(*args, **given)

    monkeypatch.setattr(module, step, watched)
    rows = {"validation": 0.0, "test": 0.2, "max_new_tokens": 6}
    sections: dict[str, Any] = {
        "TrainPPOConfig": {"sampling": {"updates": 1, "prompts": 16}},
        "TrainGRPOConfig": {"sampling": {"updates": 1, "prompts": 16}},
        **{
            name: {
                "sampling": {"updates": 1, "prompts": 16},
                "turns": {"environment": f"{speller}/own.py:Echo", "max_turns": 2, "max_turn_tokens": 4},
                "generation": {"max_new_tokens": 10},
            }
            for name in ("TrainTurnsPPOConfig", "TrainTurnsGRPOConfig")
        },
        "TrainRejectionConfig": {"sft": {"steps": 1, "batch_size": 4}, "rejection": {"threshold": 0.0, "keep": 4}},
        "TrainIterativeDPOConfig": {"learning": {"steps": 1, "batch_size": 4}},
    }
    tree = {
        "run": {"folder": str(tmp_path / "run"), "wandb": "disabled"},
        "task": {"name": "rows", "data": str(speller / "rows.jsonl"), "rows": rows},
        "model": {"path": str(speller)},
        "rewards": {f"{speller}/own.py:count": 1.0},
        "validation": {"every": 0},
        **sections[recipe],
    }
    module.train(build_from_dict(tree, getattr(module, recipe)))
    assert seen == [True]


# ---------------------------------------------------------------- dropout, one pass, epsilon


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_reward_model_has_no_dropout(kind: str) -> None:
    """Whatever its configuration says, and in training mode."""
    torch.manual_seed(0)
    trunk: Any
    if kind == "decoder":
        trunk = GPT2Model(GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5))
    else:
        settings = BertConfig(
            vocab_size=8,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            hidden_dropout_prob=0.5,
        )
        trunk = BertModel(settings)
    model = RewardModel(trunk).train()
    ids = torch.tensor([[1, 2, 3, 4]])
    mask = torch.ones_like(ids)
    scores = [model.score(ids, mask) for _ in range(2)]
    assert scores[0].abs().max() > 0
    assert torch.equal(*scores)


def test_chosen_and_rejected_go_through_the_policy_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward pass a micro-batch, over both sides of its pairs."""
    policy = random_policy()
    ids = torch.randint(4, 14, (4, 6))
    mask = torch.tensor([[False, False, True, True, True, True]]).expand(4, 6)
    chosen, rejected = (
        TokenizedTexts(torch.cat([ids[:, :2], answers], 1), torch.ones(4, 6, dtype=torch.long), mask)
        for answers in torch.randint(4, 14, (2, 4, 4))
    )
    nothing, tied = torch.full((4,), torch.nan), torch.zeros(4, dtype=torch.bool)
    pairs = TokenizedPairs(chosen, rejected, nothing, tied, torch.arange(4))
    passes: list[int] = []
    columns = LanguagePolicy.columns

    def counted(self: LanguagePolicy, observations: Any) -> Any:
        passes.append(len(observations["input_ids"]))
        return columns(self, observations)

    monkeypatch.setattr(LanguagePolicy, "columns", counted)
    learning = LearningConfig(batch_size=4, micro_batch_size=2)
    pair_step(
        policy,
        make_preference_optimizer(policy, learning),
        ReferencedPairs(pairs, torch.zeros(2, 4)),
        torch.arange(4),
        preference=PreferenceConfig(),
        nll_coef=0.0,
        learning=learning,
        rate=1e-6,
    )
    assert passes == [4, 4]


RECIPES_WITH_ADAM: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "ppo": (train_ppo, "TrainPPOConfig", {"sampling": {"updates": 1, "prompts": 4}}),
    "separate critic": (
        train_ppo,
        "TrainPPOConfig",
        {"sampling": {"updates": 1, "prompts": 4}, "critic": {"model": "separate"}},
    ),
    "grpo": (train_grpo, "TrainGRPOConfig", {"sampling": {"updates": 1, "prompts": 4}}),
    "turns": (
        train_turns_ppo,
        "TrainTurnsPPOConfig",
        {"sampling": {"updates": 1, "prompts": 4}, "turns": {"environment": "echo.py:respond"}},
    ),
    "ilql": (train_ilql, "TrainILQLConfig", {"learning": {"steps": 1, "batch_size": 4, "weight_decay": 0.0}}),
    "reward model": (
        train_reward,
        "TrainRewardConfig",
        {
            "learning": {"steps": 1, "batch_size": 2, "weight_decay": 0.0, "learning_rate": 1e-3, "warmup": 0.0},
            "pairs": {"path": "pairs.jsonl"},
        },
    ),
    "process reward model": (
        train_process_reward,
        "TrainProcessRewardConfig",
        {
            "learning": {"steps": 1, "batch_size": 2, "weight_decay": 0.0, "learning_rate": 1e-3, "warmup": 0.0},
            "steps": {"path": "steps.jsonl", "separator": "c"},
        },
    ),
}


class StepTakenError(Exception):
    """An optimizer has made its first step."""


@pytest.mark.parametrize("name", list(RECIPES_WITH_ADAM))
def test_adams_epsilon_in_the_recipes(
    tmp_path: Path, walker: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As below, of the optimizer that a run makes: its first step, on a gradient of 1e-6 everywhere."""
    checked: list[int] = []
    step = torch.optim.AdamW.step

    def first(self: torch.optim.AdamW, closure: Any = None) -> Any:
        learned = [
            (parameter, float(group["lr"]))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        before = [parameter.detach().clone() for parameter, _ in learned]
        for parameter, _ in learned:
            parameter.grad.fill_(1e-6)
        step(self, closure)
        for (parameter, rate), old in zip(learned, before, strict=True):
            moved = old - parameter.detach()
            torch.testing.assert_close(moved, torch.full_like(moved, rate / 1.01), rtol=1e-3, atol=1e-7)
        checked.append(sum(parameter.numel() for parameter, rate in learned if rate > 1e-5))
        raise StepTakenError

    monkeypatch.setattr(torch.optim.AdamW, "step", first)
    monkeypatch.chdir(tmp_path)
    Path("echo.py").write_text("def respond(row, turns):\n    return 'a', 1.0, True\n")
    rows = [{"prompt": letter, "chosen": "ab", "rejected": "ba"} for letter in "abcdefghijklmnopqrst"]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    solved = [{"prompt": letter, "steps": ["a", "b"], "labels": [1, 0]} for letter in "abcdefghijklmnopqrst"]
    Path("steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in solved))
    module, recipe, sections = RECIPES_WITH_ADAM[name]
    tree: dict[str, Any] = {
        "run": {"folder": str(tmp_path / "run"), "wandb": "disabled"},
        "model": {"path": str(walker)},
        "validation": {"every": 0},
        **sections,
    }
    if "reward model" not in name:
        tree["task"] = {"name": "random_walks", "random_walks": {"walks": 60}}
    with pytest.raises(StepTakenError):
        module.train(build_from_dict(tree, getattr(module, recipe)))
    assert checked[0] > 1000


def test_adams_epsilon_is_added_to_the_corrected_deviation() -> None:
    """A first step on a gradient g is rate * g / (|g| + 1e-8). TensorFlow's is a quarter smaller where |g| is 1e-6:
    it adds epsilon to sqrt((1 - beta_2) g^2) (Kingma 2014, the remark at the end of section 2)."""
    makers: list[Callable[[LanguagePolicy], torch.optim.Optimizer]] = [
        lambda policy: make_optimizer(policy, SupervisedConfig(learning_rate=1e-3, weight_decay=0.0)),
        lambda policy: make_preference_optimizer(policy, LearningConfig(learning_rate=1e-3)),
    ]
    for make in makers:
        policy = random_policy().double()
        optimizer = make(policy)
        weight = policy.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        before = weight.detach().clone()
        for parameter in policy.parameters():
            parameter.grad = torch.full_like(parameter, 1e-6)
        optimizer.step()
        moved = before - weight.detach()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3 / 1.01), rtol=1e-6, atol=0)
