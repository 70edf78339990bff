"""Log-probs of pairs against a plain forward pass; nothing but the pairs changes a step; the reference on disk."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiment.errors import UserError
from experiment.statistics import wilson_interval
from llm_rlhf.data.pairs import PairData, TokenizedPairs, concatenated, tokenize_pairs
from llm_rlhf.data.records import Comparison
from llm_rlhf.data.texts import TokenizedTexts
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.loading import ModelConfig, new_language_model
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.preferences import reference_cache
from llm_rlhf.preferences.learning import (
    HeldOutConfig,
    LearningConfig,
    ReferencedPairs,
    all_log_probs,
    completion_log_probs,
    first_rows,
    judge_pairs,
    pair_loss,
    pair_step,
    tokenized_sets,
    usable_pairs,
    validate_pairs,
)
from llm_rlhf.preferences.reference_cache import (
    ReferenceSource,
    fingerprint_of_texts,
    fingerprint_of_weights,
    read_cache,
    reference_log_probs,
)
from policy_core.preference import PairLogProbs, PreferenceConfig

TOKENIZER = character_tokenizer("abcdefgh ")
CONTEXT = 24
COMPARISONS = [
    Comparison("ab", "cde", "f"),
    Comparison("abcdefgh", "a", "hgfedc"),
    Comparison("c", "bb", "aa"),
    Comparison("hh", "ab ab", "ba ba b"),
    Comparison("ab", "h", "gg"),
]


def new_policy(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> LanguagePolicy:
    """With weights large enough that log-probs differ from uniform ones."""
    torch.manual_seed(seed)
    model = new_language_model(ModelConfig(layers=2, width=16, heads=2, context=CONTEXT), TOKENIZER)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return LanguagePolicy(model).to(dtype)


def tokenized(comparisons: Sequence[Comparison] = COMPARISONS) -> TokenizedPairs:
    return tokenize_pairs(comparisons, TOKENIZER, context=CONTEXT, pad=int(TOKENIZER.pad_token_id))[0]


def plainly(policy: LanguagePolicy, prompt: str, completion: str) -> float:
    """Token after token of one unpadded text."""
    before = TOKENIZER.encode(prompt)
    after = [*TOKENIZER.encode(completion), TOKENIZER.eos_token_id]
    logits = policy.model(input_ids=torch.tensor([before + after])).logits[0]
    steps = logits[len(before) - 1 : -1].log_softmax(-1)
    return float(steps[torch.arange(len(after)), after].sum().detach())


def both_sides(pairs: TokenizedPairs) -> tuple[TokenizedTexts, TokenizedTexts]:
    return pairs.chosen, pairs.rejected


def under(policy: LanguagePolicy, pairs: TokenizedPairs) -> Tensor:
    """[2, N] with gradients, in one pass."""
    log_probs = ReferencedPairs(pairs, None).under(policy, precision="float32")
    return torch.stack([log_probs.chosen, log_probs.rejected])


def expected(policy: LanguagePolicy) -> Tensor:
    sides = [[plainly(policy, one.prompt, getattr(one, side)) for one in COMPARISONS] for side in SIDES]
    return torch.tensor(sides, dtype=torch.float64)


SIDES = ("chosen", "rejected")


def test_log_probs_are_those_of_a_plain_forward_pass() -> None:
    policy = new_policy()
    found, plain = under(policy, tokenized()), expected(policy)
    close(found, plain)
    assert plain.std() > 1.0
    for rows in (1, 2, 5):
        whole = all_log_probs(policy, both_sides(tokenized()), rows=rows)
        close(whole, plain)
    policy.temperature = 2.0
    assert (under(policy, tokenized()) - plain).abs().max() > 0.1


def test_neither_padding_nor_company_changes_a_log_prob() -> None:
    """A pair alone, and among longer ones with other tokens in the padding, EOS too."""
    policy, pairs = new_policy(), tokenized()
    for row in range(len(pairs)):
        alone = under(policy, tokenized(COMPARISONS[row : row + 1]))
        close(alone[:, 0], under(policy, pairs)[:, row])
    both = concatenated(pairs)
    for filler in (int(TOKENIZER.eos_token_id), 5):
        ids = torch.where(both.attention_mask.bool(), both.input_ids, filler)
        wide = TokenizedTexts(
            torch.nn.functional.pad(ids, (3, 2), value=filler),
            torch.nn.functional.pad(both.attention_mask, (3, 2)),
            torch.nn.functional.pad(both.mask, (3, 2)),
        )
        found = completion_log_probs(policy, wide)
        close(found.view(2, -1), expected(policy))


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal up to float32's rounding, in which log-probs come out of a model of any precision."""
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=2e-5)


def referenced(policy: LanguagePolicy) -> ReferencedPairs:
    """With a reference that is another model."""
    pairs = tokenized()
    return ReferencedPairs(pairs, all_log_probs(policy, both_sides(pairs), rows=4))


def stepped(
    micro: int | None, *, loss: str = "dpo", nll_coef: float = 0.3, margins: Sequence[float] | None = None
) -> tuple[Tensor, dict[str, float]]:
    """All weights after one step of plain gradient descent, and the step's metrics."""
    policy, data = new_policy(), referenced(new_policy(seed=1))
    if margins is not None:
        data = replace(data, pairs=replace(data.pairs, margin=torch.tensor(margins)))
    metrics = pair_step(
        policy,
        torch.optim.SGD(policy.parameters(), lr=0.5),
        data,
        torch.tensor([4, 0, 2, 1, 3]),
        preference=PreferenceConfig(loss=loss),  # type: ignore[arg-type]
        nll_coef=nll_coef,
        learning=LearningConfig(micro_batch_size=micro, batch_size=5, max_grad_norm=1e6),
        rate=0.5,
    )
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()]), metrics


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo", "tso"])
def test_micro_batches_change_no_gradient_and_no_metric(loss: str) -> None:
    whole, metrics = stepped(None, loss=loss)
    before = torch.cat([parameter.detach().flatten() for parameter in new_policy().parameters()])
    assert (whole - before).abs().max() > 1e-2
    for micro in (1, 2, 4):
        parts, found = stepped(micro, loss=loss)
        assert (whole - parts).abs().max() < 1e-5 * (whole - before).abs().max()
        assert found == pytest.approx(metrics, rel=1e-6, abs=1e-6)


def test_a_pair_without_a_margin_takes_no_other_pairs_margin_away() -> None:
    """TSO, whole and in micro-batches: the pairs' own margins, and 1 where there is none."""
    margins = (2.0, float("nan"), 0.5, 3.0, float("nan"))
    whole, metrics = stepped(None, loss="tso", margins=margins)
    same, _ = stepped(None, loss="tso", margins=(2.0, 1.0, 0.5, 3.0, 1.0))
    bare, _ = stepped(None, loss="tso")
    assert (whole - same).abs().max() < 1e-9
    assert (whole - bare).abs().max() > 1e-3
    for micro in (1, 2, 4):
        parts, found = stepped(micro, loss="tso", margins=margins)
        assert (whole - parts).abs().max() < 1e-5 * (whole - bare).abs().max()
        assert found == pytest.approx(metrics, rel=1e-6, abs=1e-6)


def test_a_step_reports_trls_names() -> None:
    _, metrics = stepped(None)
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    assert names | {"logps/rejected", "nll_loss", "loss/preference", "loss/total"} <= metrics.keys()
    assert metrics["completions/chosen_length"] == pytest.approx((4 + 2 + 3 + 6 + 2) / 5)
    assert metrics["completions/rejected_length"] == pytest.approx((2 + 7 + 3 + 8 + 3) / 5)
    assert metrics["loss/total"] == pytest.approx(metrics["loss/preference"] + 0.3 * metrics["nll_loss"])


def numbers(chosen: Sequence[float], rejected: Sequence[float], lengths: Sequence[tuple[int, int]]) -> PairLogProbs:
    zero = torch.zeros(len(chosen))
    first, second = torch.tensor(lengths, dtype=torch.float).T
    return PairLogProbs(torch.tensor(chosen), torch.tensor(rejected), first, second, zero, zero)


def test_the_likelihood_term_by_hand() -> None:
    """Means over tokens, then over pairs: -(-4 / 2 - 9 / 3) / 2 = 2.5."""
    log_probs = numbers([-4.0, -9.0], [-4.0, -9.0], [(2, 5), (3, 1)])
    weights = torch.full((2,), 0.5)
    loss, metrics = pair_loss(log_probs, preference=PreferenceConfig(), nll_coef=0.2, weights=weights)
    assert float(metrics["nll_loss"]) == pytest.approx(2.5)
    assert float(loss) == pytest.approx(math.log(2) + 0.2 * 2.5)
    loss, _ = pair_loss(log_probs, preference=PreferenceConfig(), nll_coef=0.0, weights=weights)
    assert float(loss) == pytest.approx(math.log(2))


def test_a_verdict_by_hand() -> None:
    """Three of four right; the longer answer is right twice, and length says all that is wrong."""
    log_probs = numbers([2.0, 3.0, 1.0, 0.0], [1.0, 1.0, 0.0, 4.0], [(5, 2), (4, 3), (3, 3), (1, 9)])
    found = judge_pairs(log_probs, preference=PreferenceConfig(beta=0.5))
    assert found["rewards/accuracies"] == 0.75
    assert (found["rewards/accuracies_low"], found["rewards/accuracies_high"]) == wilson_interval(3, 4)
    assert found["rewards/margins"] == pytest.approx(0.5 * (1 + 2 + 1 - 4) / 4)
    assert found["loss"] == pytest.approx(
        sum(math.log1p(math.exp(-0.5 * margin)) for margin in (1, 2, 1, -4)) / 4, rel=1e-6
    )
    assert (found["accuracies/chosen_longer"], found["accuracies/chosen_shorter"]) == (1.0, 0.0)
    assert (found["share/chosen_longer"], found["share/chosen_shorter"]) == (0.5, 0.25)


def test_validation_is_the_training_loss_on_all_pairs() -> None:
    policy, data = new_policy(), referenced(new_policy(seed=1))
    found = validate_pairs(policy, data, preference=PreferenceConfig(), learning=LearningConfig(batch_size=2))
    _, metrics = stepped(None, nll_coef=0.0)
    assert found["loss"] == pytest.approx(metrics["loss/preference"], rel=1e-6)
    assert found["rewards/margins"] == pytest.approx(metrics["rewards/margins"], rel=1e-5)
    assert len(first_rows(data, 3)) == 3
    assert len(first_rows(data, 30)) == 5


def test_bfloat16_is_near_and_losses_stay_float32() -> None:
    policy, pairs = new_policy(dtype=torch.float32), tokenized()
    exact = under(policy, pairs)
    log_probs = ReferencedPairs(pairs, None).under(policy, precision="bf16")
    assert log_probs.chosen.dtype == torch.float32
    difference = (log_probs.chosen - exact[0]).abs()
    assert 0 < difference.max() < 0.3
    # Sums of bfloat16 log-probs would be multiples of 1/16 or more here: these are not.
    assert (log_probs.chosen * 16).frac().abs().min() > 1e-4


# ---------------------------------------------------------------- which pairs


def test_pairs_that_say_nothing_are_left_out_and_counted() -> None:
    pairs, notes = usable_pairs(
        tokenized([*COMPARISONS, Comparison("a", "b", "c", tied=True), Comparison("a", "b", "b")])
    )
    assert len(pairs) == 5
    assert notes == [
        "1 of 7 pairs are ties and are left out",
        "1 of 7 pairs have one and the same answer twice and are left out",
    ]


def test_answers_that_are_all_cut_are_an_error() -> None:
    long = [Comparison("ab", "c" * 40, "d" * 40), Comparison("b", "e" * 40, "f" * 40)]
    data: PairData = PairData(long, [], [], ["read"], "")
    with pytest.raises(UserError, match=r"every answer is cut before its end, the model's context is 24 tokens"):
        tokenized_sets(data, TOKENIZER, context=CONTEXT, max_prompt=None)
    some = replace(
        data, train=[*long, Comparison("a", "b", "c")], validation=[Comparison("b", "c", "d", tied=True)]
    )
    sets, notes = tokenized_sets(some, TOKENIZER, context=CONTEXT, max_prompt=None)
    assert list(sets) == ["train"]
    assert notes[0] == "read"
    assert {"train: 2 chosen cut", "validation: 1 of 1 pairs are ties and are left out"} <= set(notes)


def test_bad_settings_are_refused() -> None:
    for bad in ({"steps": 0}, {"micro_batch_size": 0}, {"learning_rate": -1.0}, {"warmup": 1.0}):
        with pytest.raises(ValueError, match="learning"):
            LearningConfig(**bad)
    with pytest.raises(ValueError, match="validation"):
        HeldOutConfig(rows=0)


# ---------------------------------------------------------------- the reference, once


def source(file: Path, *, path: str = "nowhere", shared: bool = False) -> ReferenceSource:
    return ReferenceSource(path=path, policy=path, named=False, is_policy=True, file=file, shared=shared)


def measure(
    policy: LanguagePolicy,
    where: ReferenceSource,
    began_with: str | None = None,
    comparisons: Sequence[Comparison] = COMPARISONS,
) -> Tensor:
    sets = {"train": both_sides(tokenized(comparisons))}
    found = reference_log_probs(policy, sets, where, began_with=began_with, learning=LearningConfig(batch_size=3))
    assert found.weights == (began_with or fingerprint_of_weights(policy))
    return found.by_set["train"]


def test_the_reference_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, policy = tmp_path / "deep" / "cache.safetensors", new_policy()
    first = measure(policy, source(file))
    close(first, expected(policy))
    assert "computing those of 10 texts" in capsys.readouterr().out
    weights = fingerprint_of_weights(policy)
    moved = new_policy(seed=3)  # a resumed run's policy is no reference any more, and it is not asked
    assert torch.equal(measure(moved, source(file), weights), first)
    assert capsys.readouterr().out == ""
    assert torch.equal(measure(policy, source(file, shared=True)), first)
    assert "read from" in capsys.readouterr().out


def test_a_named_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    measure(new_policy(), source(file, shared=True))
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"reference_cache: .* belongs to another reference model"):
        measure(new_policy(seed=1), source(file, shared=True))
    hot = new_policy()
    hot.temperature = 0.5
    with pytest.raises(UserError, match=r"reference_cache: .* belongs to other texts or another precision"):
        measure(hot, source(file, shared=True))
    assert file.read_bytes() == before
    file.write_bytes(b"something else")
    with pytest.raises(UserError, match="not a file of reference log-probs"):
        measure(new_policy(), source(file, shared=True))
    assert read_cache(tmp_path / "none") is None


def test_a_lost_cache_is_made_again_from_the_same_weights_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = new_policy(dtype=torch.float32)
    policy.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(str(tmp_path / "base"))
    weights = fingerprint_of_weights(policy)
    where = source(tmp_path / "cache.safetensors", path=str(tmp_path / "base"))
    first = measure(policy, where)
    where.file.unlink()
    capsys.readouterr()
    assert torch.equal(measure(new_policy(seed=2, dtype=torch.float32), where, weights), first)
    assert "is gone or belongs to other texts" in capsys.readouterr().out
    other = measure(policy, where, weights, comparisons=[*COMPARISONS[1:], COMPARISONS[0]])
    assert "computing those of 10 texts; " in capsys.readouterr().out, "the same number of other texts"
    close(other, first.roll(-1, dims=1))
    where.file.unlink()
    new_policy(seed=4, dtype=torch.float32).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="is no longer the model that this run began with"):
        measure(policy, where, weights)


def test_fingerprints_see_one_weight_one_token_and_one_mask() -> None:
    policy, texts = new_policy(), concatenated(tokenized())
    weights, words = fingerprint_of_weights(policy), fingerprint_of_texts({"train": [texts]})
    assert weights == fingerprint_of_weights(new_policy())
    with torch.no_grad():
        next(policy.model.parameters())[0, 0] += 1e-12
    assert weights != fingerprint_of_weights(policy)
    mask = texts.mask.clone()
    mask[0, -1] = ~mask[0, -1]
    ids = texts.input_ids.clone()
    ids[3, -1] += 1
    others = [
        fingerprint_of_texts({"train": [replace(texts, mask=mask)]}),
        fingerprint_of_texts({"train": [replace(texts, input_ids=ids)]}),
        fingerprint_of_texts({"test": [texts]}),
        fingerprint_of_texts({"train": [texts]}, "bf16"),
    ]
    assert len({words, *others}) == 5


def test_another_vocabulary_is_no_reference(tmp_path: Path) -> None:
    other = character_tokenizer("xyz")
    model = new_language_model(ModelConfig(layers=1, width=8, heads=1, context=CONTEXT), other)
    LanguagePolicy(model).save_pretrained(tmp_path / "other")
    other.save_pretrained(str(tmp_path / "other"))
    where = replace(source(tmp_path / "c", path=str(tmp_path / "other")), is_policy=False, named=True)
    with pytest.raises(UserError, match=r"reference: .* has a vocabulary of 7 tokens, the policy one of 13"):
        measure(new_policy(), where)
    as_many = character_tokenizer("ABCDEFGHI")  # as TOKENIZER has, but others
    assert len(as_many) == len(TOKENIZER)
    new_policy().save_pretrained(tmp_path / "other")
    as_many.save_pretrained(str(tmp_path / "other"))
    new_policy().save_pretrained(tmp_path / "own")
    TOKENIZER.save_pretrained(str(tmp_path / "own"))
    with pytest.raises(UserError, match=r"reference: .*other has other tokens than .*own, the policy's start"):
        measure(new_policy(), replace(where, policy=str(tmp_path / "own")))
    with pytest.raises(UserError, match=r"reference: .* does not exist"):
        measure(new_policy(), replace(where, path=str(tmp_path / "none")))
    assert reference_cache.CACHE.endswith(".safetensors")
