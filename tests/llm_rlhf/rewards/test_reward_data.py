"""Comparisons as tensors: what each weighs, what is left out; the losses on them by hand."""

import math
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from experiment.errors import UserError
from llm_rlhf.data.records import Comparison
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.rewards.reward_data import RewardData, objectives_of, reward_data
from llm_rlhf.rewards.reward_model import RewardModel
from llm_rlhf.train_reward import RewardConfig, comparison_loss

# ---------------------------------------------------------------- data


def ranked(columns: dict[str, Any] | None = None) -> list[Comparison]:
    """Three answers to one question in order, two to another."""
    pairs = [("p", "a", "b"), ("p", "a", "c"), ("p", "b", "c"), ("q", "a", "b")]
    return [Comparison(prompt, chosen, rejected, columns=columns or {}) for prompt, chosen, rejected in pairs]


def tensors(rows: list[Comparison], objectives: tuple[str, ...] = ("reward",), **settings: Any) -> RewardData:
    tokenizer = character_tokenizer("abcpq")
    return reward_data(rows, tokenizer, context=8, objectives=objectives, column="objective", **settings)[0]


def test_a_prompts_comparisons_weigh_one_together_and_each_text_is_there_once() -> None:
    data = tensors(ranked())
    assert data.share.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
    assert (data.prompts, len(data.input_ids)) == (2, 5)
    assert data.of_prompts(torch.tensor([1, 0, 1])).tolist() == [3, 0, 1, 2, 3]
    texts, chosen, rejected = data.texts_of(torch.tensor([0, 1, 2]))
    assert len(texts) == 3
    assert torch.equal(texts[chosen], data.chosen[:3])
    assert torch.equal(texts[rejected], data.rejected[:3])
    assert data.lengths.tolist() == [2] * 5


def test_equal_tokens_with_another_boundary_are_two_texts() -> None:
    data = tensors([Comparison("p", "ab", "c"), Comparison("pa", "b", "c")])
    assert len(data.input_ids) == 4


def test_objectives_are_read_from_the_column() -> None:
    assert objectives_of(ranked(), "objective") == ("reward",)
    both = [*ranked({"objective": "b"}), *ranked({"objective": "a"})]
    assert objectives_of(both, "objective") == ("a", "b")
    data = tensors(both, ("a", "b"))
    assert data.objective.tolist() == [1] * 4 + [0] * 4
    assert data.share.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0] * 2)
    with pytest.raises(UserError, match="'objective' is missing in a comparison of the prompt 'p'; name every"):
        objectives_of([*both, *ranked()], "objective")
    with pytest.raises(UserError, match="'objective' is 3, not a name"):
        objectives_of(ranked({"objective": 3}), "objective")


def test_what_is_left_out_is_counted() -> None:
    tied = [*ranked(), Comparison("p", "a", "b", tied=True)]
    tokenizer = character_tokenizer("abcpq")
    arguments: dict[str, Any] = {"context": 8, "objectives": ("reward",), "column": "objective"}
    assert reward_data(tied, tokenizer, with_ties=False, **arguments)[1] == {"ties": 1}
    assert len(reward_data(tied, tokenizer, **arguments)[0]) == 5
    with pytest.raises(UserError, match="no validation comparison is left; ties: 1"):
        reward_data(tied[-1:], tokenizer, with_ties=False, named="validation", **arguments)
    long = [Comparison("p" * 9, "a" * 3, "b")]
    data, counts = reward_data(long, tokenizer, **arguments)
    assert counts == {"prompts_cut": 1}
    assert int(data.attention_mask.sum(1).max()) == 8


# ---------------------------------------------------------------- the loss


def loss_of(config: RewardConfig, data: RewardData, difference: float, level: float = 0.0) -> float:
    """Of every comparison at one difference of scores, weighing 1 in all."""
    config_of_trunk = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = RewardModel(BertModel(config_of_trunk))
    with torch.no_grad():
        model.tie_level.fill_(level)
    count = len(data)
    chosen = torch.full((count, 1), difference)
    weights = torch.full((count, 1), 1 / count)
    rows = torch.arange(count)
    zeros = torch.zeros_like(chosen)
    return float(
        comparison_loss(model, data, rows, chosen=chosen, rejected=zeros, weights=weights, config=config).detach()
    )


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_losses_by_hand() -> None:
    data = tensors([Comparison("p", "a", "b", margin=0.5), Comparison("q", "a", "b")])
    assert loss_of(RewardConfig(margin_coef=0.0), data, 0.0) == pytest.approx(math.log(2), abs=1e-6)
    expected = (softplus(-(1.0 - 0.5 * 2)) + softplus(-1.0)) / 2
    assert loss_of(RewardConfig(margin_coef=2.0), data, 1.0) == pytest.approx(expected, abs=1e-6)
    smoothed = 0.9 * softplus(-1.0) + 0.1 * softplus(1.0)
    assert loss_of(RewardConfig(margin_coef=0.0, label_smoothing=0.1), data, 1.0) == pytest.approx(
        smoothed, abs=1e-6
    )
    centred = loss_of(RewardConfig(margin_coef=0.0, centring_coef=0.2), data, 3.0)
    assert centred == pytest.approx(softplus(-3.0) + 0.2 * 9.0, abs=1e-5)


def test_losses_of_ties_by_hand() -> None:
    tied = tensors([Comparison("p", "a", "b", tied=True)])
    won = tensors([Comparison("p", "a", "b")])
    davidson = RewardConfig(ties="davidson")
    nu, total = 2.0, 2.0 + math.exp(0.5) + math.exp(-0.5)
    assert loss_of(davidson, tied, 1.0, math.log(nu)) == pytest.approx(-math.log(nu / total), abs=1e-5)
    assert loss_of(davidson, won, 1.0, math.log(nu)) == pytest.approx(-math.log(math.exp(0.5) / total), abs=1e-5)
    rao = RewardConfig(ties="rao_kupper")
    win, lose = (1 / (1 + math.exp(-(x - 0.3))) for x in (1.0, -1.0))
    assert loss_of(rao, tied, 1.0, math.log(0.3)) == pytest.approx(-math.log(1 - win - lose), abs=1e-5)
