"""Value heads on a language model: which token they speak of, how they steer, and that they find the optimum."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from experiment.errors import UserError
from llm_rlhf.data.chat import Chat
from llm_rlhf.data.texts import Batches
from llm_rlhf.logged.texts import LoggedTexts, tokenize_logged
from llm_rlhf.logged.value_heads import HEADS, AdvantageSteering, ValueHeads, heads_for, loss_of
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.generation import Samples, generate
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.online.moved import Counters
from llm_rlhf.tasks.examples import Piece
from llm_rlhf.train_ilql import Learner, LearningConfig, TrainILQLConfig, update
from policy_core.ilql import ILQLConfig
from policy_core.iql import IQLConfig

ALPHABET = "abcdrs:"
TEXTS = [
    [Piece("ab", None), Piece("rrs", 0.5)],
    [Piece("a", None), Piece("s", -1.0)],
    [Piece("a:", None), Piece("rs", 0.25), Piece("b:", None), Piece("r", 2.0)],
]


def tiny(width: int = 16) -> tuple[LanguagePolicy, PreTrainedTokenizerBase, ValueHeads]:
    torch.manual_seed(0)
    policy, tokenizer = build_policy(ModelConfig(layers=1, width=width, heads=2, context=24), alphabet=ALPHABET)
    for parameter in policy.parameters():  # GPT-2's own initialisation is nearly uniform over tokens
        parameter.data += 0.2 * torch.randn_like(parameter)
    heads = heads_for(policy)
    for parameter in heads.parameters():  # a slow copy that is not the critics themselves
        parameter.data += 0.2 * torch.randn_like(parameter)
    return policy, tokenizer, heads


def tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[Piece]], gamma: float = 0.9) -> LoggedTexts:
    return tokenize_logged(texts, tokenizer, context=24, pad=0, gamma=gamma)


# ---------------------------------------------------------------- texts as decisions


def test_a_conversation_is_rendered_by_the_chat_template() -> None:
    """What the template puts around a message is given but for its EOS, on which the message's reward lies."""
    _, tokenizer, _ = tiny()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'a' if m.role == 'user' else 's' }}:{{ m.content }}"
        "{% if m.role == 'assistant' %}<eos>d{% endif %}{% endfor %}{% if add_generation_prompt %}s:{% endif %}"
    )
    text = [
        Piece(Chat.prompt([{"role": "user", "content": "b"}]), None),
        Piece("r", 0.25),
        Piece(Chat.between([{"role": "user", "content": "c"}]), None),
        Piece("rr", 2.0),
    ]
    data = tokens(tokenizer, [text])
    names = tokenizer.convert_ids_to_tokens(data.input_ids[0].tolist())
    assert names == ["a", ":", "b", "s", ":", "r", "<eos>", "d", "a", ":", "c", "s", ":", "r", "r", "<eos>"]
    assert data.mask[0].nonzero().flatten().tolist() == [5, 6, 13, 14, 15]
    assert data.rewards[0].nonzero().flatten().tolist() == [6, 15]
    assert data.rewards[0, [6, 15]].tolist() == [0.25, 2.0]
    assert data.terminated[0].nonzero().tolist() == [[15]]


def test_messages_that_touch_are_refused() -> None:
    _, tokenizer, _ = tiny()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    text = [
        Piece(Chat.prompt([{"role": "user", "content": "b"}], place="rows.jsonl:7"), None),
        Piece("r", 0.25),
        Piece(Chat.between([]), None),
        Piece("s", 2.0),
    ]
    with pytest.raises(UserError, match=r"^rows\.jsonl:7: the chat template puts nothing between two messages"):
        tokens(tokenizer, [text])


def test_columns_of_a_conversation() -> None:
    _, tokenizer, _ = tiny()
    data = tokens(tokenizer, TEXTS)
    names = tokenizer.convert_ids_to_tokens(data.input_ids[2].tolist())
    assert names == ["a", ":", "r", "s", "<eos>", "b", ":", "r", "<eos>"]
    assert data.mask[2].tolist() == [False, False, True, True, True, False, False, True, True]
    assert data.rewards[2].tolist() == [0, 0, 0, 0, 0.25, 0, 0, 0, 2.0]
    assert data.terminated[2].tolist() == [False] * 8 + [True]
    assert tokenizer.convert_ids_to_tokens(data.input_ids[1].tolist())[:4] == ["<pad>", "a", "s", "<eos>"]
    assert data.rewards[1].tolist() == [0, 0, 0, -1, 0, 0, 0, 0, 0]
    assert data.terminated[1].nonzero().tolist() == [[3]]
    assert data.episode[1].tolist() == [-1, 0, 0, 0, -1, -1, -1, -1, -1]
    sums = torch.tensor([0.5, -1.0, 2.25])
    torch.testing.assert_close(data.scaled().rewards.sum(1), sums / sums.std(correction=0))
    flat = tokens(tokenizer, [TEXTS[0], TEXTS[0]])
    assert torch.equal(flat.scaled().rewards, flat.rewards)  # all the same: there is nothing to divide by


def test_texts_that_do_not_fit_are_said() -> None:
    _, tokenizer, _ = tiny()
    long_and_short = [[Piece("a" * 18, None), Piece("r", 1.0)], [Piece("a", None), Piece("r" * 18, 1.0)]]
    assert len(tokens(tokenizer, long_and_short)) == 2  # the longest parts together would not fit
    with pytest.raises(UserError, match="do not fit the model's context of 24"):
        tokens(tokenizer, [[Piece("a", None), Piece("r" * 30, 1.0)]])
    with pytest.raises(UserError, match="no texts"):
        tokens(tokenizer, [])


# ---------------------------------------------------------------- the loss


def gradients(policy: LanguagePolicy, heads: ValueHeads) -> dict[str, Tensor]:
    found = {}
    for name, parameter in [*policy.named_parameters(), *heads.named_parameters()]:
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
            parameter.grad = None
    return found


def test_the_loss_reads_the_state_before_each_token() -> None:
    """One prefix at a time, without batches, padding or the shared prefill."""
    policy, tokenizer, heads = tiny()
    config = ILQLConfig(conservative_weight=0.0, likelihood_weight=1.0)
    data = tokens(tokenizer, TEXTS).select(torch.tensor([2]))
    _, metrics = loss_of(policy, heads, data, config)
    row, chosen = data.input_ids[0], data.mask[0].nonzero().flatten().tolist()
    values, likelihoods = [], []
    with torch.no_grad():
        for column in chosen:
            prefix = row[:column].unsqueeze(0)
            output = policy.model(input_ids=prefix, output_hidden_states=True)
            values.append(float(heads.values(output.hidden_states[-1][0, -1])))
            likelihoods.append(float(torch.log_softmax(output.logits[0, -1], -1)[row[column]]))
    assert float(metrics["values"]) == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert float(metrics["policy_loss"]) == pytest.approx(-sum(likelihoods) / len(likelihoods), abs=1e-5)


def test_padding_changes_no_gradient() -> None:
    """A text alone and beside longer ones whose padding it carries."""
    policy, tokenizer, heads = tiny()
    wide, alone = tokens(tokenizer, TEXTS).select(torch.tensor([1])), tokens(tokenizer, TEXTS[1:2])
    assert wide.input_ids.shape[1] > alone.input_ids.shape[1]
    expected, _ = loss_of(policy, heads, alone, ILQLConfig())
    expected.backward()
    of_expected = gradients(policy, heads)
    found, _ = loss_of(policy, heads, wide, ILQLConfig())
    found.backward()
    torch.testing.assert_close(found, expected)
    for name, gradient in gradients(policy, heads).items():
        torch.testing.assert_close(gradient, of_expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_what_a_given_token_earns_or_is_worth_does_not_count() -> None:
    policy, tokenizer, heads = tiny()
    data = tokens(tokenizer, TEXTS)
    expected, _ = loss_of(policy, heads, data, ILQLConfig())
    noise = torch.where(data.mask, data.rewards, 100.0)
    found, _ = loss_of(
        policy, heads, replace(data, rewards=noise, terminated=data.terminated | ~data.mask), ILQLConfig()
    )
    assert torch.equal(found, expected)


def test_micro_batches_give_the_same_gradient_and_metrics() -> None:
    policy, tokenizer, heads = tiny()
    data = tokens(tokenizer, TEXTS)
    whole, of_whole = loss_of(policy, heads, data, ILQLConfig())
    whole.backward()
    expected = gradients(policy, heads)
    count = float(data.mask.sum())
    sums = dict.fromkeys(of_whole, 0.0)
    for part in torch.arange(3).split(1):
        loss, metrics = loss_of(policy, heads, data.select(part), ILQLConfig(), denominator=count)
        loss.backward()
        for name, value in metrics.items():
            sums[name] += float(value)
    assert sums == pytest.approx({name: float(value) for name, value in of_whole.items()}, rel=1e-4)
    found = gradients(policy, heads)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_slow_critics_have_no_gradient_and_everything_else_has() -> None:
    policy, tokenizer, heads = tiny()
    loss, _ = loss_of(policy, heads, tokens(tokenizer, TEXTS), ILQLConfig())
    loss.backward()
    for name, parameter in [*policy.named_parameters(), *heads.named_parameters()]:
        assert (parameter.grad is None) == name.startswith("slow."), name


def test_new_heads_say_nearly_nothing() -> None:
    policy, _, _ = tiny()
    heads = heads_for(policy)
    hidden = torch.randn(50, 16)
    assert heads.values(hidden).abs().max() < 0.05
    assert 0 < heads.q_values(hidden).abs().max() < 0.05
    assert torch.equal(heads.q_values(hidden), heads.slow_q_values(hidden))
    assert not torch.equal(heads.q_values(hidden)[0], heads.q_values(hidden)[1])


# ---------------------------------------------------------------- the optimum of a chain

EARNS = (0.3, 0.1, 0.1, 0.1, 1.0)
"""Five states in a row: `r` goes on, EOS stops and earns what the state pays. Stopping at once looks good."""
GAMMA = 0.9


def learner_of(policy: LanguagePolicy, heads: ValueHeads, texts: int, *, model_rate: float = 0.0) -> Learner:
    groups = [{"params": [*heads.critics.parameters(), *heads.value.parameters()]}]
    if model_rate:
        groups.append({"params": list(policy.parameters())})
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    return Learner(policy, AdvantageSteering(heads, beta=0.0), optimizer, Batches(texts, texts, seed=0), Counters())


def test_values_of_a_chain_approach_the_exact_optimum() -> None:
    policy, tokenizer, _ = tiny()
    heads = heads_for(policy)
    texts = [[Piece(":", None), Piece("r" * state, reward)] for state, reward in enumerate(EARNS)]
    data = tokens(tokenizer, texts, gamma=GAMMA)
    config = TrainILQLConfig(
        learning=LearningConfig(
            steps=400, learning_rate=1e-2, model_learning_rate=1e-2, schedule="linear", max_grad_norm=10.0
        ),
        ilql=ILQLConfig(conservative_weight=0.0, iql=IQLConfig(expectile=0.99, target_rate=0.2)),
    )
    learner = learner_of(policy, heads, len(data), model_rate=1e-2)
    for step in range(1, config.learning.steps + 1):
        update(learner, data, config, step=step)
    best = [GAMMA ** (4 - state) for state in range(5)]  # go on to the end, whatever is paid on the way
    columns = policy.columns(data.select(torch.tensor([4])).observations())
    assert columns is not None
    with torch.no_grad():
        values = heads.values(columns.hidden)[0]
        q_values = heads.slow_q_values(columns.hidden)[:, 0].amin(0)
    (r,), eos = tokenizer.encode("r"), int(tokenizer.eos_token_id)
    torch.testing.assert_close(values, torch.tensor(best), atol=0.05, rtol=0)
    torch.testing.assert_close(q_values[:4, r], torch.tensor([GAMMA * v for v in best[1:]]), atol=0.05, rtol=0)
    torch.testing.assert_close(q_values[:, eos], torch.tensor(EARNS), atol=0.05, rtol=0)


def test_slow_critics_follow_and_a_frozen_model_stays() -> None:
    policy, tokenizer, heads = tiny()
    data = tokens(tokenizer, TEXTS)
    before = {name: tensor.clone() for name, tensor in [*policy.named_parameters(), *heads.named_parameters()]}
    config = TrainILQLConfig(
        learning=LearningConfig(model_learning_rate=0.0), ilql=ILQLConfig(iql=IQLConfig(target_rate=0.25))
    )
    metrics = update(learner_of(policy, heads, len(data)), data, config, step=1)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for online, slow in zip(heads.critics.named_parameters(), heads.slow.named_parameters(), strict=True):
        old, old_slow = before[f"critics.{online[0]}"], before[f"slow.{slow[0]}"]
        assert not torch.equal(online[1], old)
        torch.testing.assert_close(slow[1], old_slow + 0.25 * (online[1] - old_slow))
    assert {"loss/value", "loss/critic", "loss/conservative", "loss/policy", "val/values", "lr"} <= metrics.keys()


# ---------------------------------------------------------------- decoding


def draw(policy: LanguagePolicy, prompts: list[list[int]], *, seed: int | None) -> Samples:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return generate(policy, prompts, samples_per_prompt=3, max_new_tokens=6, ends={2}, pad=0, generator=generator)


PROMPTS = [[5, 6, 7], [8, 9], [4]]


def test_without_strength_the_model_writes_as_it_would() -> None:
    policy, _, heads = tiny()
    expected = draw(policy, PROMPTS, seed=3)
    policy.steering = AdvantageSteering(heads, beta=0.0)
    found = draw(policy, PROMPTS, seed=3)
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.log_probs, expected.log_probs)
    policy.steering = AdvantageSteering(heads, beta=20.0)
    assert not torch.equal(draw(policy, PROMPTS, seed=3).input_ids, expected.input_ids)


def test_with_great_strength_the_best_critic_decides() -> None:
    """Sampled and greedy, from the second token on through the cache."""
    policy, _, heads = tiny()
    policy.steering = AdvantageSteering(heads, beta=1e6)
    sampled = draw(policy, PROMPTS, seed=0)
    assert torch.equal(sampled.input_ids, draw(policy, PROMPTS, seed=None).input_ids)
    for row, mask in zip(sampled.input_ids, sampled.mask, strict=True):
        first = int(mask.nonzero()[0])
        start = int((row[:first] != 0).nonzero()[0])
        for column in mask.nonzero().flatten().tolist():
            output = policy.model(input_ids=row[start:column].unsqueeze(0), output_hidden_states=True)
            best = heads.slow_q_values(output.hidden_states[-1][0, -1]).amin(0).argmax()
            assert int(row[column]) == int(best)


def test_judging_agrees_with_drawing() -> None:
    """Log-probabilities and entropies under steering, top_k included, are those of `evaluate`."""
    policy, _, heads = tiny()
    policy.steering = AdvantageSteering(heads, beta=3.0, top_k=3)
    samples = draw(policy, PROMPTS, seed=1)
    assert torch.isfinite(samples.entropy).all()
    with torch.no_grad():
        judged = policy.evaluate(samples.observations(), samples.input_ids)
    torch.testing.assert_close(judged.log_probs[samples.mask], samples.log_probs[samples.mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(judged.entropy[samples.mask], samples.entropy[samples.mask], atol=1e-5, rtol=0)
    assert samples.entropy.max() <= torch.tensor(3.0).log() + 1e-5


def test_steering_is_kept_beside_a_plain_model(tmp_path: Path) -> None:
    policy, tokenizer, heads = tiny()
    policy.steering = steering = AdvantageSteering(heads, beta=2.5, top_k=4)
    expected = draw(policy, PROMPTS, seed=1)
    policy.save_pretrained(tmp_path)
    steering.save(tmp_path)
    tokenizer.save_pretrained(str(tmp_path))
    assert (tmp_path / HEADS).is_file()
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, policy.model.state_dict()[name]), name
    again = LanguagePolicy.from_pretrained(tmp_path)
    assert again.steering is None
    again.steering = kept = AdvantageSteering.load(tmp_path, again)
    assert kept is not None
    assert (kept.beta, kept.top_k) == (2.5, 4)
    assert torch.equal(draw(again, PROMPTS, seed=1).input_ids, expected.input_ids)
    (tmp_path / HEADS).unlink()
    assert AdvantageSteering.load(tmp_path, again) is None
