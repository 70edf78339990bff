"""A value model of its own: what it reads, what it starts from, and the recipe that learns with it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf import train_ppo
from llm_rlhf.models.causal import VALUE_HEAD, LanguagePolicy, build_policy
from llm_rlhf.models.generation import Samples, generate, to_rollout
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.lora import LoRAConfig
from llm_rlhf.online.critic import ActorCritic, CriticConfig, ValueModel, build_critic, with_values
from llm_rlhf.rewards.reward_model import Pooling, RewardModel, ScoringConfig, combine
from llm_rlhf.tasks.task import TaskConfig, build_task
from llm_rlhf.train_ppo import TrainPPOConfig
from policy_core.returns import gae

EOS, PAD = 2, 0
PROMPTS = [[5, 6, 7, 8], [9, 10], [11]]
EMBEDDING = "model.transformer.wte.weight"


def embedding(folder: Path) -> Tensor:
    """A language model's token embeddings."""
    return LanguagePolicy.from_pretrained(folder).state_dict()[EMBEDDING]


def shaken(module: nn.Module) -> None:
    """Away from the initial weights, with which everything is nearly 0."""
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model over the letters of random walks that has learned nothing."""
    torch.manual_seed(0)
    alphabet = build_task(TaskConfig(name="random_walks")).alphabet
    policy, tokenizer = build_policy(ModelConfig(layers=1, width=16, heads=2, context=24), alphabet=alphabet)
    shaken(policy)
    folder = tmp_path_factory.mktemp("start")
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def tokenizer(start: Path) -> PreTrainedTokenizerBase:
    return build_policy(ModelConfig(path=str(start)), alphabet="")[1]


@pytest.fixture
def critic(start: Path, tokenizer: PreTrainedTokenizerBase) -> ValueModel:
    torch.manual_seed(1)
    model = build_critic(CriticConfig(model="separate"), model_path=str(start), tokenizer=tokenizer, longest=24)
    shaken(model.head)
    return model


def drawn(policy: LanguagePolicy, *, k: int = 2) -> Samples:
    generator = torch.Generator().manual_seed(0)
    return generate(
        policy, PROMPTS, samples_per_prompt=k, max_new_tokens=5, ends={EOS}, pad=PAD, generator=generator
    )


def reward_model(
    start: Path,
    folder: Path,
    *,
    heads: int = 1,
    objectives: tuple[str, ...] = ("reward",),
    scoring: ScoringConfig | None = None,
    pooling: Pooling = "last",
) -> RewardModel:
    torch.manual_seed(2)
    policy, tokenizer = build_policy(ModelConfig(path=str(start)), alphabet="")
    trunk = cast(PreTrainedModel, policy.model.base_model)
    model = RewardModel(trunk, heads=heads, objectives=objectives, context=24)
    shaken(model)
    model.offset.copy_(0.75 + torch.arange(float(heads * len(objectives))).reshape(heads, -1))
    model.scoring, model.pooling = scoring or ScoringConfig(), pooling
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return model


@torch.no_grad()
def test_values_are_the_head_on_the_text_before_each_token(start: Path, critic: ValueModel) -> None:
    """Each row by itself, without padding and without the columns that are left out, says the same."""
    samples = drawn(LanguagePolicy.from_pretrained(start))
    values = critic.values(samples.observations())
    after = critic.after(samples.observations())
    for row in range(len(values)):
        real = samples.attention_mask[row].bool()
        ids = samples.input_ids[row][real].unsqueeze(0)
        states = critic.trunk(input_ids=ids).last_hidden_state[0]
        alone = (states @ critic.head.weight.T).squeeze(-1) + critic.head.bias
        chosen = samples.mask[row][real]
        assert torch.allclose(values[row][samples.mask[row]], alone[:-1][chosen[1:]], atol=1e-5)
        assert torch.allclose(after[row][samples.mask[row]], alone[chosen], atol=1e-5)
    few = {name: tensor[2:4] for name, tensor in samples.observations().items()}
    assert torch.allclose(critic.values(few)[samples.mask[2:4]], values[2:4][samples.mask[2:4]], atol=1e-5)
    nothing = {**samples.observations(), "decisions": torch.zeros_like(samples.mask)}
    assert not critic.values(nothing).any()


def test_a_new_head_is_zero_so_that_first_advantages_are_the_rewards(
    start: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build_critic(CriticConfig(model="separate"), model_path=str(start), tokenizer=tokenizer, longest=24)
    samples = drawn(LanguagePolicy.from_pretrained(start))
    rewards = torch.arange(6.0)
    rollout = with_values(to_rollout(samples, rewards, scored=torch.ones(6, dtype=torch.bool)), model)
    rollout.validate()
    advantages, _ = gae(rollout, gae_lambda=1.0)
    assert torch.equal(advantages, torch.where(samples.mask, rewards.unsqueeze(1), 0.0))


def test_a_cut_completion_bootstraps_from_the_value_of_its_whole_text(start: Path, critic: ValueModel) -> None:
    samples = drawn(LanguagePolicy.from_pretrained(start), k=8)
    assert 0 < int(samples.finished.sum()) < 24, "the test needs both kinds"
    scored = torch.ones(24, dtype=torch.bool)
    scored[5] = False
    rollout = with_values(to_rollout(samples, torch.ones(24), scored=scored, cut_is_end=False), critic)
    rollout.validate()
    with torch.no_grad():
        after, values = critic.after(samples.observations()), critic.values(samples.observations())
    assert rollout.values is not None
    assert rollout.next_values is not None
    assert not rollout.values.requires_grad
    for row in range(24):
        columns = rollout.mask[row].nonzero().squeeze(1)
        assert (len(columns) == 0) == (row == 5)
        assert torch.equal(rollout.values[row][columns], values[row][columns])
        if len(columns):
            following = [*values[row][columns[1:]].tolist(), float(after[row][columns[-1]])]
            if samples.finished[row]:
                following[-1] = 0.0
            assert rollout.next_values[row][columns].tolist() == pytest.approx(following)


@torch.no_grad()
@pytest.mark.parametrize("ensemble", ["mean", "min", "lower"])
@pytest.mark.parametrize(
    ("heads", "weights"),
    [(1, {"reward": 1.0}), (3, {"reward": 1.0}), (3, {"kind": 2.0, "brief": -0.5, "other": 0.0}), (2, {})],
)
def test_it_starts_as_a_reward_model_with_the_mean_of_its_heads(
    start: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    heads: int,
    weights: dict[str, float],
    ensemble: Literal["mean", "min", "lower"],
) -> None:
    """Then the value after the last token is the score: the weighted sum of the objectives' mean over heads."""
    objectives = tuple(weights) or ("kind", "brief")
    scoring = ScoringConfig(weights=weights, ensemble=ensemble)
    known = reward_model(start, tmp_path, heads=heads, objectives=objectives, scoring=scoring)
    config = CriticConfig(model="separate", init=str(tmp_path))
    model = build_critic(config, model_path=str(start), tokenizer=tokenizer, longest=24)
    samples = drawn(LanguagePolicy.from_pretrained(start))
    after = model.after(samples.observations())
    last = samples.mask & (samples.mask.flip(1).cumsum(1).flip(1) == 1)
    scores = known.score(samples.input_ids, samples.attention_mask)
    expected = scores.mean(1) @ torch.tensor(list(weights.values()) or [0.5, 0.5])
    assert scores.std(0).min() > 1e-3, "the test needs texts of different scores"
    assert torch.allclose(after[last], expected, rtol=0, atol=1e-5)
    if ensemble == "mean" or heads == 1:
        own, _ = combine(scores, samples.mask.sum(1), objectives=objectives, config=scoring)
        assert torch.allclose(after[last], own, rtol=0, atol=1e-5)
    said = (
        "its head starts as the reward model's" if heads == 1 else f"the mean of the reward model's {heads} heads"
    )
    printed = capsys.readouterr().out
    assert said in printed
    assert ("which no one head can be" in printed) is (heads > 1 and ensemble != "mean")


@torch.no_grad()
def test_a_head_that_reads_the_mean_of_the_states_is_not_taken_over(
    start: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward_model(start, tmp_path, pooling="mean")
    config = CriticConfig(model="separate", init=str(tmp_path))
    model = build_critic(config, model_path=str(start), tokenizer=tokenizer, longest=24)
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    assert not torch.equal(model.state_dict()["trunk.wte.weight"], embedding(start))
    assert "its head starts as 0 everywhere: the reward model reads the mean of its states" in (
        capsys.readouterr().out
    )


def test_what_cannot_be_a_critic_is_said(start: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def build(init: str | None, longest: int = 24) -> ValueModel:
        config = CriticConfig(model="separate", init=init)
        return build_critic(config, model_path=str(start), tokenizer=tokenizer, longest=longest)

    with pytest.raises(UserError, match=r"^critic\.init: .*nowhere does not exist"):
        build(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="reads at most 24 tokens; a prompt and its completion have 25"):
        build(None, longest=25)
    reward_model(start, tmp_path / "other")
    _, digits = build_policy(ModelConfig(layers=1, width=8, heads=2), alphabet="0123456789")
    digits.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UserError, match="reads another tokenizer's tokens than the policy"):
        build(str(tmp_path / "other"))
    encoder = BertModel(
        BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(UserError, match="sees the whole text cannot judge unfinished ones"):
        ValueModel(encoder.eval())
    for wrong in ({"init": "runs/x"}, {"learning_rate": 1e-3}):
        with pytest.raises(ValueError, match=r"set critic\.model to separate"):
            CriticConfig(**wrong)
    with pytest.raises(ValueError, match=r"critic\.learning_rate must be positive"):
        CriticConfig(model="separate", learning_rate=0.0)


def test_a_start_with_an_adapter_is_merged_so_that_all_of_the_critic_learns(
    start: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    adapted, _ = build_policy(ModelConfig(path=str(start), lora=LoRAConfig(rank=2)), alphabet="")
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(str(tmp_path))
    model = build_critic(CriticConfig(model="separate"), model_path=str(tmp_path), tokenizer=tokenizer, longest=24)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = adapted.model.base_model(input_ids=ids).last_hidden_state
        assert torch.allclose(model.trunk(input_ids=ids).last_hidden_state, expected, atol=1e-5)


def test_dropout_is_off(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Whatever the folder's configuration says, training and judging see the same values."""
    torch.manual_seed(0)
    settings = GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=16, n_layer=1, n_head=2)
    assert settings.resid_pdrop > 0
    GPT2LMHeadModel(settings).save_pretrained(tmp_path)
    tokenizer.save_pretrained(str(tmp_path))
    policy = LanguagePolicy.from_pretrained(tmp_path)
    model = build_critic(CriticConfig(model="separate"), model_path=str(tmp_path), tokenizer=tokenizer, longest=24)
    shaken(model.head)
    both = ActorCritic(policy, model).train()
    samples = drawn(policy)
    judged = [both.evaluate(samples.observations(), samples.input_ids) for _ in range(2)]
    assert judged[0].values is not None
    assert judged[1].values is not None
    assert torch.equal(judged[0].values, judged[1].values)
    assert torch.equal(judged[0].log_probs, judged[1].log_probs)


# ---------------------------------------------------------------- the recipe


def small(folder: Path, start: Path, *, updates: int = 4, **sections: Any) -> TrainPPOConfig:
    settings = {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 2, "seed": 5},
        "task": {"name": "random_walks", "random_walks": {"walks": 60}},
        "model": {"path": str(start)},
        "generation": {"max_new_tokens": 4},
        "sampling": {"updates": updates, "prompts": 8, "samples_per_prompt": 2},
        "ppo": {"minibatch_size": 8, "critic_warmup": 1, "learning_rate": 1e-3},
        "critic": {"model": "separate", "learning_rate": 1e-2},
        "validation": {"every": 0},
        **sections,
    }
    return build_from_dict(settings, TrainPPOConfig)


def weights(run: Path, folder: str) -> dict[str, Tensor]:
    path = run / "checkpoints" / "last" / folder
    if folder == "policy":
        return LanguagePolicy.from_pretrained(path).state_dict()
    return ValueModel.from_pretrained(path).state_dict()


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def test_it_learns_beside_the_policy_and_resumes_to_the_bit(tmp_path: Path, start: Path) -> None:
    class InterruptError(Exception):
        pass

    whole = train_ppo.train(small(tmp_path / "whole", start)).folder
    original = Run.log

    def log(self: Any, metrics: Any, *, global_step: int) -> None:
        if global_step == 3:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(InterruptError):
            train_ppo.train(small(tmp_path / "broken", start))
    torch.manual_seed(12345)
    train_ppo.train(small(tmp_path / "broken", start), resume=tmp_path / "broken")
    for folder in ("policy", "critic"):
        expected, found = weights(whole, folder), weights(tmp_path / "broken", folder)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert rows(whole) == rows(tmp_path / "broken")
    assert {"loss/value_avg", "val/explained_variance", "loss/policy_avg"} <= rows(whole)[-1].keys()
    assert not (whole / "checkpoints" / "last" / "policy" / VALUE_HEAD).exists()
    assert not torch.equal(weights(whole, "policy")[EMBEDDING], embedding(start))
    assert weights(whole, "critic")["head.bias"].abs() > 0


def test_warm_up_moves_the_critic_and_nothing_else(tmp_path: Path, start: Path) -> None:
    config = small(tmp_path / "run", start, updates=3)
    config = replace(config, ppo=replace(config.ppo, critic_warmup=2), run=replace(config.run, checkpoint_every=1))
    warm = train_ppo.train(config).folder / "checkpoints" / "000000002"
    after, before = (LanguagePolicy.from_pretrained(folder).state_dict() for folder in (warm / "policy", start))
    assert all(torch.equal(before[name], after[name]) for name in before)
    trunk = ValueModel.from_pretrained(warm / "critic").state_dict()
    assert not torch.equal(trunk["trunk.wte.weight"], before[EMBEDDING])


def test_its_learning_rate_is_its_own_on_the_same_schedule(tmp_path: Path, start: Path) -> None:
    """At a rate that rounds to nothing the value model stays where it began while the policy moves; and halfway
    through a linear schedule both rates are half."""
    config = small(tmp_path / "run", start, updates=2)
    config = replace(
        config,
        critic=replace(config.critic, learning_rate=1e-30),
        ppo=replace(config.ppo, critic_warmup=0, schedule="linear"),
    )
    seen: list[list[float]] = []
    original = train_ppo.update

    def update(**arguments: Any) -> dict[str, float]:
        seen.append([group["lr"] for group in arguments["optimizer"].param_groups])
        return original(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo, "update", update)
        run = train_ppo.train(config).folder
    assert seen == [[1e-3, 1e-30], [5e-4, 5e-31]]
    assert torch.equal(weights(run, "critic")["trunk.wte.weight"], embedding(start))
    assert not torch.equal(weights(run, "policy")[EMBEDDING], embedding(start))
