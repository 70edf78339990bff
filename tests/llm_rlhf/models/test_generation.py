from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.generation import GenerationConfig, Samples, generate, left_pad, to_rollout
from llm_rlhf.models.loading import ModelConfig
from policy_core.grpo import GRPOConfig, group_advantages
from policy_core.ppo import PPOConfig, update
from policy_core.returns import gae

EOS, PAD = 2, 0
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


@pytest.fixture
def policy() -> LanguagePolicy:
    torch.manual_seed(1)
    model, _ = build_policy(
        ModelConfig(layers=2, width=16, heads=2, context=24), alphabet="0123456789+-*/=", value_head=True
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def draw(
    policy: LanguagePolicy, prompts: list[list[int]] = PROMPTS, *, k: int = 1, seed: int | None = 0
) -> Samples:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return generate(
        policy, prompts, samples_per_prompt=k, max_new_tokens=6, ends={EOS}, pad=PAD, generator=generator
    )


def test_left_pad() -> None:
    ids, mask = left_pad(PROMPTS, pad=PAD)
    assert ids.tolist() == [[5, 6, 7, 8], [0, 0, 9, 10], [0, 11, 12, 13]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]
    with pytest.raises(ValueError, match="no tokens"):
        left_pad([[1], []], pad=PAD)


def naive_greedy(policy: LanguagePolicy, prompt: list[int], limit: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(limit):
        ids = torch.tensor([tokens])
        tokens.append(int(policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


@torch.no_grad()
def test_greedy_with_cache_equals_full_forward_passes(policy: LanguagePolicy) -> None:
    samples = draw(policy, seed=None)
    found = [
        [token for token, drawn in zip(ids, mask, strict=True) if drawn]
        for ids, mask in zip(samples.input_ids.tolist(), samples.mask.tolist(), strict=True)
    ]
    assert found == [naive_greedy(policy, prompt, 6) for prompt in PROMPTS]


def test_every_one_of_several_ends_ends_a_completion(policy: LanguagePolicy) -> None:
    free = draw(policy, seed=None).completions()
    other = free[0][2]
    samples = generate(
        policy, PROMPTS, samples_per_prompt=1, max_new_tokens=6, ends={EOS, other}, pad=PAD, generator=None
    )

    def until(tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(other) + 1] if other in tokens else tokens

    assert samples.completions() == [until(tokens) for tokens in free]
    assert samples.finished.tolist() == [tokens[-1] in (EOS, other) for tokens in map(until, free)]


def test_sampling_log_probs_and_values_equal_the_training_forward(policy: LanguagePolicy) -> None:
    """What is kept from sampling may serve as old_log_probs: the gap is within 1e-5."""
    samples = draw(policy, PROMPTS * 8, k=4)
    assert samples.finished.any()
    assert not samples.finished.all()
    with torch.no_grad():
        evaluation = policy.evaluate(samples.observations(), samples.input_ids)
    assert samples.values is not None
    assert evaluation.values is not None
    for kept, recomputed in (
        (samples.log_probs, evaluation.log_probs),
        (samples.values, evaluation.values),
        (samples.entropy, evaluation.entropy),
    ):
        assert (kept - recomputed)[samples.mask].abs().max() <= 1e-5
    assert samples.log_probs[samples.mask].std() > 0.05


def test_shared_prefill_equals_independent_prefill(policy: LanguagePolicy) -> None:
    shared = draw(policy, PROMPTS, k=4)
    repeated = draw(policy, [prompt for prompt in PROMPTS for _ in range(4)], k=1)
    assert torch.equal(shared.input_ids, repeated.input_ids)
    assert torch.equal(shared.mask, repeated.mask)
    torch.testing.assert_close(shared.log_probs, repeated.log_probs, atol=1e-5, rtol=0)
    assert shared.prompt.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_what_comes_after_the_end_is_masked(policy: LanguagePolicy) -> None:
    samples = draw(policy, PROMPTS * 16)
    start = 4
    for ids, mask, attention, finished in zip(
        samples.input_ids.tolist(),
        samples.mask.tolist(),
        samples.attention_mask.tolist(),
        samples.finished.tolist(),
        strict=True,
    ):
        new = ids[start:]
        length = new.index(EOS) + 1 if EOS in new else len(new)
        assert finished == (EOS in new)
        assert mask == [False] * start + [True] * length + [False] * (len(new) - length)
        assert attention[start:] == [1] * length + [0] * (len(new) - length)
        assert new[length:] == [PAD] * (len(new) - length)


def test_same_generator_same_samples_and_other_seed_others(policy: LanguagePolicy) -> None:
    torch.manual_seed(5)
    first = draw(policy, k=8)
    torch.manual_seed(6)  # the global generator plays no part
    assert torch.equal(first.input_ids, draw(policy, k=8).input_ids)
    assert not torch.equal(first.input_ids, draw(policy, k=8, seed=1).input_ids)


def test_rows_that_ended_do_not_change_the_others(policy: LanguagePolicy) -> None:
    """Greedy completions alone and in a batch whose other rows end earlier are the same."""
    together = draw(policy, PROMPTS * 4, seed=None)
    for row, prompt in enumerate(PROMPTS * 4):
        alone = draw(policy, [prompt], seed=None)
        new = int(alone.mask.sum())
        assert together.input_ids[row, 4 : 4 + new].tolist() == alone.input_ids[0, len(prompt) :][:new].tolist()
        assert int(together.mask[row].sum()) == new


def test_frequencies_follow_the_temperature(policy: LanguagePolicy) -> None:
    policy.temperature = 0.5
    prompt = PROMPTS[0]
    samples = generate(
        policy,
        [prompt],
        samples_per_prompt=20_000,
        max_new_tokens=1,
        ends={EOS},
        pad=PAD,
        generator=torch.Generator().manual_seed(0),
    )
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    expected = torch.softmax(logits / 0.5, -1)
    found = torch.bincount(samples.input_ids[:, -1], minlength=len(expected)) / 20_000
    assert (found - expected).abs().max() < 0.015  # four standard errors


def test_context_overflow_is_refused(policy: LanguagePolicy) -> None:
    with pytest.raises(ValueError, match="context of 24"):
        generate(policy, [[5] * 20], samples_per_prompt=1, max_new_tokens=5, ends={EOS}, pad=PAD, generator=None)
    with pytest.raises(ValueError, match="temperature"):
        GenerationConfig(temperature=0.0)


def hand_made() -> Samples:
    """Two prompts of 2 and 1 tokens; the first ends with EOS, the second is cut after 3 tokens."""
    return Samples(
        input_ids=torch.tensor([[5, 6, 7, EOS, PAD], [PAD, 8, 9, 9, 9]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]),
        mask=torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool(),
        finished=torch.tensor([True, False]),
        log_probs=-torch.tensor([[0, 0, 1.0, 2.0, 0], [0, 0, 3.0, 4.0, 5.0]]),
        entropy=torch.zeros(2, 5),
        values=torch.tensor([[0, 0, 0.1, 0.2, 0], [0, 0, 0.3, 0.4, 0.5]]),
        prompt=torch.tensor([0, 1]),
    )


def test_rollout_by_hand() -> None:
    both = torch.tensor([True, True])
    rollout = to_rollout(hand_made(), torch.tensor([1.0, 2.0]), scored=both)
    rollout.validate()
    assert rollout.rewards.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 2]]
    assert rollout.terminated.tolist() == [[False] * 3 + [True, False], [False] * 4 + [True]]
    assert not rollout.truncated.any()
    assert rollout.episode.tolist() == [[0, 0, 0, 0, -1], [-1, 0, 0, 0, 0]]
    assert rollout.next_values is not None
    expected = torch.tensor([[0, 0, 0.2, 0, 0], [0, 0, 0.4, 0.5, 0]])
    assert torch.equal(torch.where(rollout.mask, rollout.next_values, 0.0), expected)
    advantages, _ = gae(rollout, gae_lambda=1.0)
    torch.testing.assert_close(advantages[0], torch.tensor([0, 0, 0.9, 0.8, 0]))


def test_a_cut_completion_may_bootstrap_instead() -> None:
    both = torch.tensor([True, True])
    known = replace(hand_made(), final_values=torch.tensor([0.0, 0.8]))
    rollout = to_rollout(known, torch.tensor([1.0, 2.0]), scored=both, cut_is_end=False)
    rollout.validate()
    assert rollout.truncated.tolist() == [[False] * 5, [False] * 4 + [True]]
    assert rollout.next_values is not None
    assert float(rollout.next_values[1, 4]) == pytest.approx(0.8)
    advantages, _ = gae(rollout, gae_lambda=1.0)
    assert float(advantages[1, 4]) == pytest.approx(2.0 + 0.8 - 0.5)
    with pytest.raises(ValueError, match="row 1, column 4: an episode is cut here and final_values is not given"):
        to_rollout(hand_made(), torch.tensor([1.0, 2.0]), scored=both, cut_is_end=False)


@torch.no_grad()
def test_final_values_are_those_of_the_whole_text(policy: LanguagePolicy) -> None:
    """0 for what has ended; the batch drops rows on the way, and those that are cut keep their places."""
    samples = generate(
        policy,
        PROMPTS * 16,
        samples_per_prompt=2,
        max_new_tokens=6,
        ends={EOS, 5, 9},
        pad=PAD,
        generator=torch.Generator().manual_seed(0),
        bootstrap=True,
    )
    assert samples.final_values is not None
    assert samples.finished.any()
    assert (~samples.finished).sum() > 10
    assert policy.value_head is not None
    expected = torch.zeros(len(samples.finished))
    for row in (~samples.finished).nonzero().flatten().tolist():
        ids = samples.input_ids[row][samples.attention_mask[row].bool()].unsqueeze(0)
        _, hidden, _ = policy.step(ids, torch.ones_like(ids))
        expected[row] = policy.value_head(hidden[0, -1])
    torch.testing.assert_close(samples.final_values, expected, atol=1e-5, rtol=0)
    assert draw(policy, PROMPTS).final_values is None


def test_unscored_rows_count_for_nothing() -> None:
    rollout = to_rollout(hand_made(), torch.tensor([1.0, 2.0]), scored=torch.tensor([True, False]))
    rollout.validate()
    assert rollout.mask[0].any()
    assert not rollout.mask[1].any()
    assert rollout.rewards[1].eq(0).all()
    assert not rollout.terminated[1].any()


def test_ratio_is_one_on_the_first_pass(policy: LanguagePolicy) -> None:
    """With the log-probs kept from sampling, the first update's ratio is 1 and nothing is clipped."""
    samples = draw(policy, PROMPTS * 4, k=2)
    rewards = torch.arange(24.0) % 3
    rollout = to_rollout(samples, rewards, scored=torch.ones(24, dtype=torch.bool))
    advantages, _ = group_advantages(rollout, config=GRPOConfig(group_size=2))
    statistics = update(
        policy=policy,
        optimizer=torch.optim.SGD(policy.parameters(), lr=0.0),
        rollout=rollout,
        advantages=advantages,
        returns=None,
        config=PPOConfig(epochs=1, minibatch_size=24, clip_range=1e-4, learning_rate=0.0),
        generator=torch.Generator().manual_seed(0),
    )
    assert abs(statistics["approx_kl"]) < 1e-9
    assert statistics["clip_fraction"] == 0.0


def test_padding_changes_no_gradient(policy: LanguagePolicy) -> None:
    """A rollout with three more padding columns on the left gives the same update."""
    samples = draw(policy, PROMPTS * 2, k=2)
    rewards = torch.tensor([1.0, 0.0] * 6)
    scored = torch.ones(12, dtype=torch.bool)
    gradients: list[Tensor] = []
    for extra in (0, 3):
        pad = torch.nn.functional.pad
        wide = Samples(
            input_ids=pad(samples.input_ids, (extra, 0)),
            attention_mask=pad(samples.attention_mask, (extra, 0)),
            mask=pad(samples.mask, (extra, 0)),
            finished=samples.finished,
            log_probs=pad(samples.log_probs, (extra, 0)),
            entropy=pad(samples.entropy, (extra, 0)),
            values=None if samples.values is None else pad(samples.values, (extra, 0)),
            prompt=samples.prompt,
        )
        rollout = to_rollout(wide, rewards, scored=scored)
        advantages, returns = gae(rollout, gae_lambda=0.95)
        update(
            policy=policy,
            optimizer=torch.optim.SGD(policy.parameters(), lr=0.0),
            rollout=rollout,
            advantages=advantages,
            returns=returns,
            config=PPOConfig(epochs=1, minibatch_size=12, max_grad_norm=1e9, learning_rate=0.0),
            generator=torch.Generator().manual_seed(0),
        )
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)
    assert gradients[0].abs().max() > 1e-4
