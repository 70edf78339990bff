"""From scores to what is learned: cut completions, penalties, scales; sampling's log-probs; dense rewards."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.generation import GenerationConfig, Samples, generate, to_rollout
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.online import experience
from llm_rlhf.online.experience import (
    OverlongConfig,
    Sampler,
    Shaper,
    ShapingConfig,
    Spread,
    build_sampler,
    joined,
    joined_scores,
    recomputed_log_probs,
    settled_log_probs,
    with_behaviour,
    with_dense_rewards,
)
from llm_rlhf.rewards.functions import RewardSet, Scores, resolve
from llm_rlhf.tasks.task import TaskConfig, build_task
from policy_core.returns import gae

EOS, PAD = 2, 0


@pytest.fixture(scope="module")
def policy() -> LanguagePolicy:
    torch.manual_seed(0)
    model = ModelConfig(layers=2, width=16, heads=2, context=24)
    made, _ = build_policy(model, alphabet="0123456789", temperature=0.7, value_head=True)
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made


def drawn(policy: LanguagePolicy, prompts: list[list[int]], *, k: int = 1, seed: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return generate(
        policy, prompts, samples_per_prompt=k, max_new_tokens=5, ends={EOS}, pad=PAD, generator=generator
    )


def hand_made() -> Samples:
    """One prompt token each; the first ended by itself after 2 tokens, the others were cut after 3."""
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1]]).bool()
    return Samples(
        input_ids=torch.tensor([[5, 6, 2, 0], [5, 7, 8, 9], [5, 7, 7, 7]]),
        attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
        mask=mask,
        finished=torch.tensor([True, False, False]),
        log_probs=torch.zeros(3, 4),
        entropy=torch.zeros(3, 4),
        values=torch.where(mask, torch.tensor([0.0, 1.0, 2.0, 3.0]), 0.0),
        prompt=torch.arange(3),
        final_values=torch.tensor([0.0, -2.0, 7.0]),
    )


def scores_of(total: list[float], scored: list[bool]) -> Scores:
    return Scores(total=torch.tensor(total), scored=torch.tensor(scored), by_name={})


SCORES = scores_of([1.0, 1.5, 0.0], [True, True, False])


def shaper(config: ShapingConfig, generation: GenerationConfig | None = None) -> Shaper:
    return Shaper(config, config.cut_of(generation or GenerationConfig()))


def test_penalise_subtracts_from_what_has_no_eos_and_ends_it() -> None:
    made = shaper(ShapingConfig(missing_eos_penalty=0.5))
    judged = made.judged(hand_made(), SCORES)
    assert judged.total.tolist() == [1.0, 1.0, 0.0]
    assert judged.scored.tolist() == [True, True, False]
    rollout = to_rollout(hand_made(), judged.total, scored=judged.scored, cut_is_end=made.cut_is_end)
    assert rollout.rewards.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert rollout.terminated.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_drop_leaves_the_whole_row_out() -> None:
    made = shaper(ShapingConfig(cut="drop"))
    judged = made.judged(hand_made(), SCORES)
    assert judged.scored.tolist() == [True, False, False]
    rollout = to_rollout(hand_made(), judged.total, scored=judged.scored, cut_is_end=made.cut_is_end)
    assert rollout.mask.any(1).tolist() == [True, False, False]
    assert rollout.rewards.sum() == 1.0


def test_bootstrap_gives_a_cut_completion_a_future() -> None:
    for made in (
        shaper(ShapingConfig(cut="bootstrap")),
        shaper(ShapingConfig(), GenerationConfig(cut_is_end=False)),
        shaper(ShapingConfig(cut="bootstrap"), GenerationConfig(cut_is_end=False)),
    ):
        rollout = to_rollout(hand_made(), SCORES.total, scored=SCORES.scored, cut_is_end=made.cut_is_end)
        assert rollout.truncated.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
        advantages, _ = gae(rollout, gae_lambda=1.0)
        # 1.5 and the value -2 of what it would have gone on from, less the value 1 of the first
        assert float(advantages[1, 1]) == pytest.approx(1.5 - 2.0 - 1.0)
        assert float(advantages[0, 1]) == pytest.approx(1.0 - 1.0)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shaping\.missing_eos_penalty is of shaping\.cut penalise, not of drop"):
        ShapingConfig(cut="drop", missing_eos_penalty=1.0)
    with pytest.raises(ValueError, match=r"missing_eos_penalty must not be negative"):
        ShapingConfig(missing_eos_penalty=-1.0)
    for config in (ShapingConfig(cut="drop"), ShapingConfig(missing_eos_penalty=1.0)):
        with pytest.raises(ValueError, match=r"contradicts generation\.cut_is_end false"):
            config.cut_of(GenerationConfig(cut_is_end=False))
    assert ShapingConfig().cut_of(GenerationConfig()) == "penalise"
    with pytest.raises(ValueError, match=r"overlong\.buffer must be at least 1"):
        OverlongConfig(buffer=0)
    with pytest.raises(ValueError, match=r"at most overlong\.max_new_tokens"):
        OverlongConfig(buffer=5, max_new_tokens=4)


def test_scores_are_divided_by_the_batch_s_deviation_and_nothing_is_subtracted() -> None:
    made = shaper(ShapingConfig(scale="batch"))
    scaled, metrics = made.scaled(scores_of([1.0, 3.0, 0.0, 5.0], [True, True, False, True]))
    deviation = math.sqrt(8 / 3)
    assert metrics == {"objective/score_deviation": pytest.approx(deviation)}
    assert scaled.total.tolist() == pytest.approx([1 / deviation, 3 / deviation, 0.0, 5 / deviation])
    equal, metrics = made.scaled(scores_of([0.7, 0.7], [True, True]))  # no spread: as they are
    assert equal.total.tolist() == pytest.approx([0.7, 0.7])
    assert metrics["objective/score_deviation"] == pytest.approx(0.0, abs=1e-9)


def test_the_running_deviation_is_that_of_every_score_so_far_and_resumes() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(size) * 3 + 100 for size in (5, 1, 64)]
    made = shaper(ShapingConfig(scale="running"))
    for number, batch in enumerate(batches):
        scaled, _ = made.scaled(scores_of(batch.tolist(), [True] * len(batch)))
        deviation = float(torch.cat(batches[: number + 1]).double().std(correction=0))
        assert made.spread.deviation == pytest.approx(deviation, rel=1e-9)
        assert torch.allclose(scaled.total, batch / deviation, rtol=1e-5)
        state, made = made.state_dict(), Shaper(made.config, made.cut)  # a new process, with nothing but the state
        made.load_state_dict(state)
    assert Spread().deviation == 0.0


@pytest.fixture(scope="module")
def sampler(policy: LanguagePolicy) -> Sampler:
    torch.manual_seed(0)
    task = build_task(TaskConfig(name="random_walks"))
    made, tokenizer = build_policy(ModelConfig(layers=1, width=8, heads=2, context=16), alphabet=task.alphabet)
    return build_sampler(
        made,
        tokenizer,
        task,
        rewards={},
        generation=GenerationConfig(max_new_tokens=4),
        seed=0,
        overlong=OverlongConfig(buffer=2, weight=3.0),
    )


def test_the_reward_for_ending_in_time_is_a_reward_among_the_others(sampler: Sampler) -> None:
    """At most 4 tokens, of which the last 2 are punished, in halves, three times over."""
    samples, scores = sampler.draw(list(range(12)), samples_per_prompt=8, drawn_before=0)
    lengths = samples.mask.sum(1)
    assert set(lengths.tolist()) >= {2, 3, 4}
    expected = [{1: 0.0, 2: 0.0, 3: -0.5, 4: -1.0}[length] for length in lengths.tolist()]
    assert scores.by_name["overlong"].tolist() == expected
    task = scores.by_name["optimality"]
    assert torch.allclose(scores.total, task + 3.0 * scores.by_name["overlong"])
    assert "rewards/overlong/mean" in scores.metrics()


def test_rewards_are_told_what_ended_and_how_much_came_before(sampler: Sampler) -> None:
    def told(
        prompts: list[str], completions: list[str], finished: list[bool], sample_index: list[int]
    ) -> list[float]:
        return [index + 0.5 * end for index, end in zip(sample_index, finished, strict=True)]

    telling = replace(sampler, rewards=resolve({"told": 1.0}, own={"told": told}, columns=[]), overlong=None)
    samples, scores = telling.draw(list(range(12)), samples_per_prompt=8, drawn_before=1000)
    assert 5 < int(samples.finished.sum()) < 91
    assert scores.total.tolist() == [1000 + i + 0.5 * end for i, end in enumerate(samples.finished.tolist())]


def test_sampler_settings_are_checked(sampler: Sampler) -> None:
    for changes, message in (
        ({"overlong": OverlongConfig(buffer=5)}, r"overlong\.buffer 5 is more than the 4 tokens"),
        ({"rewards_timeout": 0.0}, "rewards_timeout must be positive seconds"),
    ):
        with pytest.raises(UserError, match=message):
            build_sampler(
                sampler.policy,
                sampler.tokenizer,
                sampler.task,
                rewards={},
                generation=sampler.generation,
                seed=0,
                **changes,
            )


def test_rewards_that_score_nothing_are_told(sampler: Sampler) -> None:
    def mute(prompts: list[str], completions: list[str]) -> list[None]:
        return [None] * len(completions)

    muted = replace(sampler, rewards=RewardSet({"mute": mute}, {"mute": 1.0}), overlong=None)
    with pytest.warns(UserWarning, match=r"no reward function scored any of 4 completions \(they answered None\)"):
        _, scores = muted.draw([0, 1], samples_per_prompt=2, drawn_before=0)
    assert not scores.scored.any()


def test_sampling_and_training_agree_on_log_probs(policy: LanguagePolicy) -> None:
    """With a cache and without, at a temperature, from prompts of unequal length: the first ratio is 1."""
    samples = drawn(policy, [[5, 6, 7, 8], [9, 10], [11]], k=4)
    again = recomputed_log_probs(policy, samples)
    assert float((again - samples.log_probs).abs().max()) <= 1e-5
    assert not again[~samples.mask].any()
    kept, metrics = settled_log_probs(policy, samples)
    assert kept is samples
    assert metrics == {}
    kept, metrics = settled_log_probs(policy, samples, compare=True)
    assert kept is samples
    assert 0 <= metrics["sampling/logprob_gap"] <= 1e-5
    other = replace(samples, log_probs=torch.where(samples.mask, samples.log_probs - 0.25, 0.0))
    _, metrics = settled_log_probs(policy, other, compare=True)
    assert metrics["sampling/logprob_gap"] == pytest.approx(0.25, abs=1e-5)


def test_what_was_drawn_is_judged_in_passes_of_whole_prompts(
    policy: LanguagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = drawn(policy, [[5, 6, 7, 8], [9, 10], [11], [12, 13]], k=3)
    whole = recomputed_log_probs(policy, samples)
    passes: list[int] = []
    judge = policy.log_probs

    def counting(observations: Any, actions: torch.Tensor) -> torch.Tensor:
        passes.append(len(actions))
        return judge(observations, actions)

    monkeypatch.setattr(policy, "log_probs", counting)
    one_row = (samples.mask.shape[1] - 4) * policy.model.config.vocab_size
    for room, expected in ((12, [12]), (7, [6, 6]), (3, [3] * 4), (1, [3] * 4)):
        monkeypatch.setattr(experience, "AT_ONCE", room * one_row)
        passes.clear()
        torch.testing.assert_close(recomputed_log_probs(policy, samples), whole, rtol=0, atol=1e-5)
        assert passes == expected
    nothing = replace(samples, mask=torch.zeros_like(samples.mask))
    assert not recomputed_log_probs(policy, nothing).any()


def test_in_bfloat16_the_training_forward_has_the_last_word() -> None:
    torch.manual_seed(0)
    narrow, _ = build_policy(ModelConfig(layers=2, width=32, heads=4, context=64), alphabet="0123456789")
    for parameter in narrow.parameters():
        parameter.data *= 2
    narrow.precision = "bf16"
    samples = generate(
        narrow,
        [[5, 6, 7, 8], [9, 10], [11]] * 8,
        samples_per_prompt=1,
        max_new_tokens=40,
        ends={EOS},
        pad=PAD,
        generator=torch.Generator().manual_seed(0),
    )
    settled, metrics = settled_log_probs(narrow, samples)
    assert torch.equal(settled.log_probs, recomputed_log_probs(narrow, samples))
    difference = float((settled.log_probs - samples.log_probs).abs().max())
    assert metrics["sampling/logprob_gap"] == difference
    mean = float((samples.log_probs - settled.log_probs).sum() / samples.mask.sum())
    assert metrics["sampling/mismatch_kl"] == pytest.approx(mean)
    scored = torch.ones(len(samples.finished), dtype=torch.bool)
    rollout = to_rollout(settled, torch.zeros(len(scored)), scored=scored)
    assert with_behaviour(rollout, settled) is rollout
    behaviour = with_behaviour(rollout, samples).behaviour_log_probs
    assert behaviour is samples.log_probs
    assert 1e-4 < difference < 0.2
    assert settled.input_ids is samples.input_ids


def test_draws_with_prompts_of_unequal_length_become_one(policy: LanguagePolicy) -> None:
    parts = [drawn(policy, [[5, 6, 7, 8], [9, 10]], k=2), drawn(policy, [[11]], k=2, seed=1)]
    whole = joined(parts, pad=PAD)
    assert whole.prompt.tolist() == [0, 0, 1, 1, 2, 2]
    assert whole.completions() == [text for part in parts for text in part.completions()]
    assert whole.finished.tolist() == [end for part in parts for end in part.finished.tolist()]
    assert torch.allclose(recomputed_log_probs(policy, whole), whole.log_probs, atol=1e-5)
    assert whole.values is not None
    assert parts[1].values is not None
    assert torch.equal(whole.values[4:][whole.mask[4:]], parts[1].values[parts[1].mask])
    assert joined(parts[:1], pad=PAD) is parts[0]
    first, second = (Scores(torch.ones(n), torch.ones(n).bool(), {"a": torch.arange(float(n))}) for n in (2, 1))
    both = joined_scores([first, second])
    assert both.by_name["a"].tolist() == [0.0, 1.0, 0.0]
    assert both.broken is None
    ruled = [replace(part, broken=torch.arange(len(part.total)) == 1) for part in (first, second)]
    assert joined_scores(ruled).broken.tolist() == [False, True, False]  # type: ignore[union-attr]
    assert len(both.total) == len(both.scored) == 3


def test_dense_rewards_are_added_where_tokens_were_chosen() -> None:
    rollout = to_rollout(hand_made(), SCORES.total, scored=SCORES.scored)
    dense = torch.tensor([[0, 0.5, 0.25, 0], [0, -1, 0, 0], [0, 9.0, 9, 9]])
    found = with_dense_rewards(rollout, dense)
    assert found.rewards.tolist() == [[0, 0.5, 1.25, 0], [0, -1, 0, 1.5], [0, 0, 0, 0]]
    for wrong, message in (
        (dense[:, :3], r"must be \(3, 4\), got \(3, 3\)"),
        (dense / 0, "must be finite"),
        (dense + torch.tensor([1.0, 0, 0, 0]), "row 0, column 0: a dense reward lies on a token that"),
    ):
        with pytest.raises(ValueError, match=message):
            with_dense_rewards(rollout, wrong)
