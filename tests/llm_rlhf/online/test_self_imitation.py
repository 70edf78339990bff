import pytest
import torch

from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.generation import Samples
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.online.moved import Counters, progress_of
from llm_rlhf.online.self_imitation import GoodAnswers, SelfImitationConfig
from llm_rlhf.rewards.functions import Scores


def samples(ids: list[list[int]], attention: list[list[int]], mask: list[list[int]]) -> Samples:
    tokens = torch.tensor(ids)
    zeros = torch.zeros(tokens.shape)
    rows = len(ids)
    return Samples(
        input_ids=tokens,
        attention_mask=torch.tensor(attention),
        mask=torch.tensor(mask).bool(),
        finished=torch.ones(rows, dtype=torch.bool),
        log_probs=zeros,
        entropy=zeros,
        values=None,
        prompt=torch.arange(rows),
    )


def scores(total: list[float], scored: list[bool] | None = None) -> Scores:
    known = torch.tensor(scored if scored is not None else [True] * len(total))
    return Scores(total=torch.tensor(total), scored=known, by_name={})


def memory() -> GoodAnswers:
    config = SelfImitationConfig(coef=0.5, batch_size=8)
    return GoodAnswers(config, prompts=3, left=3, right=2, seed=0)


@pytest.fixture
def policy() -> LanguagePolicy:
    torch.manual_seed(0)
    return build_policy(ModelConfig(layers=1, width=16, heads=2, context=8), alphabet="0123456789")[0]


def test_good_answers_are_kept_where_their_prompt_is() -> None:
    kept = memory()
    # Prompts of two columns here, of three in the memory: everything moves one column to the right.
    drawn = samples(
        [[5, 6, 7, 2], [0, 8, 9, 2], [5, 6, 4, 2]], [[1] * 4, [0, 1, 1, 1], [1] * 4], [[0, 0, 1, 1]] * 3
    )
    kept.remember(torch.tensor([2, 0, 1]), drawn, scores([1.0, 0.5, 1.0], [True, True, False]))
    assert kept.known.tolist() == [False, False, True]
    assert kept.input_ids[2].tolist() == [0, 5, 6, 7, 2]
    assert kept.attention_mask[2].tolist() == [0, 1, 1, 1, 1]
    assert kept.mask[2].tolist() == [False, False, False, True, True]
    # A shorter answer replaces the old one whole.
    again = samples([[5, 6, 2]], [[1, 1, 1]], [[0, 0, 1]])
    kept.remember(torch.tensor([2]), again, scores([1.0]))
    assert kept.input_ids[2].tolist() == [0, 5, 6, 2, 0]
    assert kept.mask[2].tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_loss_is_the_weighted_likelihood_of_what_is_kept(policy: LanguagePolicy, temperature: float) -> None:
    """At temperature 1, whatever the sampling's."""
    policy.temperature = temperature
    kept = memory()
    nothing, metrics = kept.loss(policy)
    assert float(nothing.detach()) == 0.0
    assert metrics == {}
    kept.remember(torch.tensor([1]), samples([[5, 6, 7, 2]], [[1] * 4], [[0, 0, 1, 1]]), scores([1.0]))
    loss, metrics = kept.loss(policy)
    tokens = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        logits = policy.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    log_probs = torch.log_softmax(logits, -1)
    expected = -(log_probs[0, 1, 7] + log_probs[0, 2, 2]) / 2
    assert float(loss.detach()) == pytest.approx(0.5 * float(expected), abs=1e-5)
    assert float(metrics["self_imitation_nll"]) == pytest.approx(float(expected), abs=1e-5)
    assert policy.temperature == temperature
    loss.backward()
    assert next(policy.parameters()).grad is not None


def test_memory_resumes(policy: LanguagePolicy) -> None:
    kept = memory()
    drawn = samples([[5, 6, 7, 2], [5, 8, 4, 2]], [[1] * 4] * 2, [[0, 0, 1, 1]] * 2)
    kept.remember(torch.tensor([0, 2]), drawn, scores([1.0, 1.0]))
    kept.loss(policy)
    state = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in kept.state_dict().items()
    }
    expected = [float(kept.loss(policy)[0].detach()) for _ in range(4)]
    again = memory()
    again.load_state_dict(state)
    assert [float(again.loss(policy)[0].detach()) for _ in range(4)] == expected


def test_progress_is_by_updates_or_by_time() -> None:
    assert progress_of(1, 10, Counters(), None) == 0.0
    assert progress_of(6, 10, Counters(seconds=3.0), None) == 0.5
    assert progress_of(6, 1000, Counters(seconds=3.0), 4.0) == 0.75
    assert progress_of(6, 1000, Counters(seconds=5.0), 4.0) == 1.0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="coef"):
        SelfImitationConfig(coef=-1.0)
