"""Texts that share a row are computed as if they were alone: losses, gradients, and the layout by hand."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from experiment.errors import UserError
from llm_rlhf.data.packing import PackedTexts, assign, pack, require_apart
from llm_rlhf.data.texts import Encoded, lay_out
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.loading import ModelConfig
from policy_core.bc import bc_loss


def texts(count: int, *, longest: int, seed: int = 0) -> list[Encoded]:
    """Random prompts and completions, some with a turn in them that is not learned."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for number in range(count):
        prompt, completion = draw(1, longest // 2), draw(1, longest // 2)
        ids = [draw(4, 19) for _ in range(prompt + completion)]
        mask = [not (number % 3 == 0 and i == 1) for i in range(completion)]
        made.append(Encoded(ids[:prompt], ids[prompt:], mask))
    return made


def gpt2() -> LanguagePolicy:
    torch.manual_seed(0)
    policy, _ = build_policy(ModelConfig(layers=2, width=16, heads=2, context=40), alphabet="0123456789+-*/=")
    return sharpened(policy)


def llama() -> LanguagePolicy:
    """Rotary positions, and two heads that share keys."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=40,
    )
    return sharpened(LanguagePolicy(LlamaForCausalLM(config)))


def sharpened(policy: LanguagePolicy) -> LanguagePolicy:
    for parameter in policy.parameters():  # the first initialisation is nearly uniform over tokens
        parameter.data += 0.3 * torch.randn_like(parameter)
    return policy


def gradient(policy: LanguagePolicy, log_probs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and its gradient, flat."""
    policy.zero_grad()
    loss, _ = bc_loss(log_probs=log_probs, mask=mask)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def test_best_fit_decreasing_by_hand() -> None:
    assert assign([3, 7, 5, 2, 4], width=10) == [[1, 0], [2, 4], [3]]
    assert assign([10, 10], width=10) == [[0], [1]]
    assert assign([6, 5, 4], width=10) == [[0, 2], [1]]
    with pytest.raises(ValueError, match="11 tokens does not fit"):
        assign([11], width=10)


def test_every_text_has_its_place() -> None:
    lengths = torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = assign(lengths, width=40)
    assert sorted(text for row in rows for text in row) == list(range(200))
    assert all(sum(lengths[text] for text in row) <= 40 for row in rows)
    assert len(rows) <= 1.05 * sum(lengths) / 40


def test_layout_by_hand() -> None:
    packed = pack([Encoded([7], [8, 9], [True, True]), Encoded([4, 5], [6], [True])], context=8, pad=0)
    assert packed.input_ids.tolist() == [[7, 8, 9, 4, 5, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert packed.mask.int().tolist() == [[0, 1, 1, 0, 0, 1]]
    wider = pack([Encoded([7], [8, 9], [True, False]), Encoded([4], [5], [True])], context=8, pad=3, width=4)
    assert wider.input_ids.tolist() == [[7, 8, 9], [4, 5, 3]]
    assert wider.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert wider.mask.int().tolist() == [[0, 1, 0], [0, 1, 0]]
    with pytest.raises(UserError, match=r"texts\.packed_length: a text has 3 tokens, more than a row of 2"):
        pack([Encoded([7], [8, 9], [True, True])], context=8, pad=0, width=2)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_and_padded_have_one_loss_and_one_gradient(make: object, checkpointing: bool) -> None:
    policy = make()  # type: ignore[operator]
    if checkpointing:
        policy.checkpoint_gradients()
    given = texts(13, longest=16)
    padded, packed = lay_out(given, pad=0), pack(given, context=40, pad=0)
    assert len(packed) < len(given) / 2
    assert int(packed.mask.sum()) == int(padded.mask.sum())
    every = torch.arange(len(padded))
    apart = policy.evaluate(padded.observations(every), padded.input_ids).log_probs
    loss, expected = gradient(policy, apart, padded.mask)
    together = packed.log_probs(policy, torch.arange(len(packed)))
    packed_loss, found = gradient(policy, together, packed.mask)
    assert loss > 1.0
    assert float(packed_loss) == pytest.approx(float(loss), abs=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert expected.abs().max() > 0.01
    assert together[~packed.mask].eq(0).all()


def test_the_order_of_texts_in_a_row_changes_nothing() -> None:
    policy, given = gpt2(), texts(3, longest=12)
    with torch.no_grad():
        forward = pack_one(given).log_probs(policy, torch.tensor([0]))[0]
        backward = pack_one(given[::-1]).log_probs(policy, torch.tensor([0]))[0]
    lengths = [len(text) for text in given]
    for part, other in zip(forward.split(lengths), reversed(backward.split(lengths[::-1])), strict=True):
        torch.testing.assert_close(part, other, atol=1e-5, rtol=0)


def pack_one(given: list[Encoded]) -> PackedTexts:
    """One row, in the order given."""
    ids = torch.tensor([[token for text in given for token in text.prompt + text.completion]])
    positions = torch.cat([torch.arange(len(text)) for text in given]).unsqueeze(0)
    mask = torch.tensor([[own for text in given for own in [False] * len(text.prompt) + text.mask]])
    return PackedTexts(ids, positions, torch.ones_like(ids), mask)


def test_a_model_that_mixes_texts_is_refused() -> None:
    policy, packed = gpt2(), pack(texts(13, longest=16), context=40, pad=0)
    require_apart(policy, packed)
    original = policy.packed_log_probs

    def leaking(input_ids: Tensor, position_ids: Tensor, decisions: Tensor) -> Tensor:
        """As a model would that knows positions only from the mask it is given."""
        return original(input_ids, torch.arange(input_ids.shape[1]).expand_as(input_ids), decisions)

    policy.packed_log_probs = leaking  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"texts\.packing: GPT2LMHeadModel does not keep texts in one row apart"):
        require_apart(policy, packed)


def test_a_model_without_positions_is_refused() -> None:
    policy, packed = gpt2(), pack(texts(13, longest=16), context=40, pad=0)
    policy.model.forward = lambda input_ids, attention_mask: None
    with pytest.raises(UserError, match=r"texts\.packing: GPT2LMHeadModel takes no positions"):
        require_apart(policy, packed)


def test_weights_that_are_not_finite_are_named_and_not_packing() -> None:
    policy, packed = gpt2(), pack(texts(13, longest=16), context=40, pad=0)
    with torch.no_grad():
        next(policy.model.parameters())[5] = float("nan")
    with pytest.raises(UserError, match=r"model\.path: GPT2LMHeadModel gives a text the probability NaN"):
        require_apart(policy, packed)
