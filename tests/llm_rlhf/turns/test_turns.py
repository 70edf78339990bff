"""Episodes of several turns: who wrote which token, what sampling says of it, and what becomes of rewards."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from experiment.errors import UserError
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.tokenizer import decode_completions
from llm_rlhf.turns.decoding import _Writing, play
from llm_rlhf.turns.environments import Referee, Reply
from llm_rlhf.turns.episodes import Episodes, TurnsConfig, make_referee, stop_ids
from policy_core.ppo import PPOConfig, update
from policy_core.returns import gae
from policy_core.rollout import Rollout
from tests.contracts.several_turns import rollout_of

PROMPTS = ["abcab", "b", "cab"]
CONTEXT = 40


class Talker:
    """Ends a turn at every "a", answers with as many letters as the row says, pays 1 for each turn, stops after a
    number of turns that differs from row to row."""

    def reset(self, row: dict[str, Any]) -> None:
        self.row, self.turns = row, 0

    def ends_turn(self, text: str) -> bool:
        return text.endswith("a")

    def respond(self, text: str) -> tuple[str, float, bool]:
        self.turns += 1
        return "d" * self.row["answer"], 1.0, self.turns == self.row["turns"]


def policy_of(seed: int = 1, context: int = CONTEXT) -> tuple[LanguagePolicy, Any]:
    torch.manual_seed(seed)
    policy, tokenizer = build_policy(
        ModelConfig(layers=2, width=16, heads=2, context=context), alphabet="abcd", value_head=True
    )
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return policy, tokenizer


def rows_of(count: int) -> list[dict[str, Any]]:
    """Answers of 0 to 4 tokens, episodes of 1 to 3 turns."""
    return [{"answer": index % 5, "turns": 1 + index % 3} for index in range(count)]


def played(
    policy: LanguagePolicy,
    tokenizer: Any,
    *,
    prompts: Sequence[str] = PROMPTS,
    rows: Sequence[dict[str, Any]] | None = None,
    count: int = 4,
    make: Callable[[], Any] = Talker,
    seed: int | None = 0,
    limit: int = 30,
    bootstrap: bool = False,
    **settings: Any,
) -> Episodes:
    return play(
        policy,
        tokenizer,
        [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts],
        rows_of(len(prompts) * count) if rows is None else rows,
        referee=Referee("turns.environment talker", make),
        config=TurnsConfig(**settings),
        max_new_tokens=limit,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        bootstrap=bootstrap,
    )


def tokens_of(episodes: Episodes, row: int) -> list[int]:
    samples = episodes.samples
    return samples.input_ids[row][samples.attention_mask[row].bool()].tolist()


@pytest.fixture(scope="module")
def both() -> tuple[LanguagePolicy, Any]:
    return policy_of()


@pytest.fixture(scope="module")
def episodes(both: tuple[LanguagePolicy, Any]) -> Episodes:
    return played(*both, count=16)


# ---------------------------------------------------------------- who wrote what


def test_the_columns_are_what_was_said(both: tuple[LanguagePolicy, Any], episodes: Episodes) -> None:
    """Each row is prompt, turn, answer, turn, ... without a gap; the mask is True on turns, EOS included."""
    _, tokenizer = both

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    answered = 0
    for row, turns in enumerate(episodes.turns):
        real = episodes.samples.attention_mask[row].bool()
        (first, *_, last) = real.nonzero().flatten().tolist()
        assert real[first : last + 1].all()
        own = episodes.samples.mask[row][real].tolist()
        ids = tokens_of(episodes, row)
        prompt = PROMPTS[row // 16]
        replies = [turn.reply.text for turn in turns[:-1] if turn.reply is not None]
        assert len(replies) == len(turns) - 1
        said = "".join(turn.text + reply for turn, reply in zip(turns, [*replies, ""], strict=True))
        assert text(ids) == prompt + said
        assert text([token for token, drawn in zip(ids, own, strict=True) if drawn]) == "".join(
            turn.text for turn in turns
        )
        assert text([token for token, drawn in zip(ids, own, strict=True) if not drawn]) == prompt + "".join(
            replies
        )
        assert own[-1]
        assert not any(own[: len(prompt)])
        answered += sum(map(len, replies))
    assert answered > 20
    assert len({len(tokens_of(episodes, row)) for row in range(48)}) > 3
    assert len({len(turns) for turns in episodes.turns}) > 1
    assert 0.05 < episodes.metrics()["turns/masked_share"] < 0.9


def test_sampling_log_probs_and_values_equal_the_training_forward(
    both: tuple[LanguagePolicy, Any], episodes: Episodes
) -> None:
    """Rows at different places of the cache, some reading, some writing, some gone: the gap is within 1e-5."""
    policy, _ = both
    samples = episodes.samples
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
        assert not kept[~samples.mask].any()
    assert samples.log_probs[samples.mask].std() > 0.05


def test_decoding_equals_one_row_at_a_time_without_a_cache(both: tuple[LanguagePolicy, Any]) -> None:
    policy, tokenizer = both
    greedy = played(policy, tokenizer, seed=None)
    for row in range(12):
        ids = tokens_of(greedy, row)
        own = greedy.samples.mask[row][greedy.samples.attention_mask[row].bool()].tolist()
        with torch.no_grad():
            best = policy.model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        assert all(ids[i] == best[i - 1] for i in range(1, len(ids)) if own[i])


def test_a_row_that_ends_early_does_not_change_the_others(both: tuple[LanguagePolicy, Any]) -> None:
    """Not even what is sampled: the same row beside others that end at once, and that never end."""
    policy, tokenizer = both
    rows = rows_of(4)
    long = played(policy, tokenizer, prompts=["abcab"], rows=[{"answer": 3, "turns": 9}, *rows[1:]])
    short = played(policy, tokenizer, prompts=["abcab"], rows=[{"answer": 3, "turns": 1}, *rows[1:]])
    assert len(long.turns[0]) > len(short.turns[0]) == 1
    for row in range(1, 4):
        assert tokens_of(long, row) == tokens_of(short, row)
        assert long.turns[row] == short.turns[row]


def test_the_widest_prompt_beside_it_takes_no_room(both: tuple[LanguagePolicy, Any]) -> None:
    """A short prompt may fill the context though the batch then has more columns than the context."""
    policy, tokenizer = both
    never = [{"answer": 2, "turns": 99}] * 2
    wide = played(
        policy, tokenizer, prompts=["abcab" * 6, "b"], rows=never, limit=99, max_turns=99, stop_tokens=("<bos>",)
    )
    assert wide.samples.input_ids.shape[1] > CONTEXT
    assert len(tokens_of(wide, 1)) == CONTEXT or wide.turns[1][-1].reply is not None
    assert max(len(tokens_of(wide, row)) for row in range(2)) <= CONTEXT
    with torch.no_grad():
        evaluation = policy.evaluate(wide.samples.observations(), wide.samples.input_ids)
    assert (evaluation.log_probs - wide.samples.log_probs)[wide.samples.mask].abs().max() <= 1e-5
    alone = played(policy, tokenizer, prompts=["b"], rows=never[:1], limit=99, max_turns=99, seed=None)
    beside = played(policy, tokenizer, prompts=["b", "abcab" * 6], rows=never, limit=99, max_turns=99, seed=None)
    assert tokens_of(alone, 0) == tokens_of(beside, 0)
    with pytest.raises(UserError, match="a prompt of 40 tokens leaves no room in the model's context of 40"):
        played(policy, tokenizer, prompts=["a" * 40], count=1)


def test_same_generator_same_episodes(both: tuple[LanguagePolicy, Any], episodes: Episodes) -> None:
    torch.manual_seed(5)  # the global generator plays no part
    again = played(*both, count=16)
    assert torch.equal(again.samples.input_ids, episodes.samples.input_ids)
    assert again.turns == episodes.turns
    other = played(*both, count=16, seed=1)
    assert other.turns != episodes.turns


# ---------------------------------------------------------------- where a turn and an episode end


class Script:
    """Answers from a list, and never ends a turn by itself."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.heard: list[str] = []

    def reset(self, row: dict[str, Any]) -> None:
        self.heard = []

    def respond(self, text: str) -> Reply:
        self.heard.append(text)
        return self.replies[len(self.heard) - 1]


def one(both: tuple[LanguagePolicy, Any], script: Script, **settings: Any) -> Episodes:
    return played(*both, prompts=["ab"], rows=[{}], make=lambda: script, **settings)


def test_turns_end_at_stops_tokens_and_limits(both: tuple[LanguagePolicy, Any]) -> None:
    policy, tokenizer = both
    letters = [[4], [5], [6], [7]]
    assert [tokenizer.encode(letter) for letter in "abcd"] == letters
    scripted = Script(*[Reply("dd")] * 30)
    stopped = one(both, scripted, stop=("a", "b", "c", "d"), max_turns=3, stop_tokens=("<pad>", "<bos>", "<unk>"))
    assert len(stopped.turns[0]) == 3
    assert all(len(turn.text) <= 1 for turn in stopped.turns[0])
    assert stopped.samples.mask[0].tolist() == [False] * 2 + [True, False, False, True, False, False, True]
    assert not stopped.samples.finished[0]
    cut = one(both, Script(), max_turn_tokens=4, seed=3)
    if cut.turns[0][0].reply is None:
        assert int(cut.samples.mask.sum()) == 4
    bos = stop_ids(TurnsConfig(stop_tokens=("<bos>",)), tokenizer, policy.model)
    assert bos == {int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)}
    with pytest.raises(UserError, match=r"turns\.stop_tokens: the tokenizer has no token '<end>'"):
        stop_ids(TurnsConfig(stop_tokens=("<end>",)), tokenizer, policy.model)


EVERY = ("a", "b", "c", "d")
SPECIAL = ("<pad>", "<bos>", "<unk>")


def test_an_answer_that_leaves_no_room_ends_the_episode(both: tuple[LanguagePolicy, Any]) -> None:
    """10 tokens: one written, eight read, one written; nine read would leave nothing to write."""
    for length, columns in ((8, 10), (9, 1)):
        script = Script(*[Reply("d" * length, reward=0.5)] * 9)
        found = one(both, script, stop=EVERY, stop_tokens=SPECIAL, limit=10, max_turns=9)
        assert found.samples.input_ids.shape[1] == 2 + columns
        assert float(found.turn_rewards.sum()) == pytest.approx(0.5 if columns == 1 else 1.0)
        assert not found.samples.finished[0]


def test_done_ends_the_episode_and_its_text_is_not_read(both: tuple[LanguagePolicy, Any]) -> None:
    found = one(both, Script(Reply("dddd", 2.0, done=True)), stop=EVERY, stop_tokens=SPECIAL)
    assert found.samples.finished.tolist() == [True]
    assert found.samples.mask[0].tolist() == [False, False, True]
    assert found.turn_rewards[0].tolist() == [0, 0, 2]


def test_values_of_cut_episodes_are_those_of_their_true_next_observation(both: tuple[LanguagePolicy, Any]) -> None:
    """After the last turn the answer is not in the row, but it is what the policy would have gone on from."""
    policy, _ = both
    found = one(both, Script(*[Reply("dcb")] * 2), stop=EVERY, stop_tokens=SPECIAL, max_turns=2, bootstrap=True)
    ids = [*tokens_of(found, 0), 7, 6, 5]
    assert policy.value_head is not None
    with torch.no_grad():
        hidden = policy.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        expected = policy.value_head(hidden[0, -1])
    assert found.samples.final_values is not None
    torch.testing.assert_close(found.samples.final_values, expected, atol=1e-5, rtol=0)
    rollout = rollout_of(found, torch.zeros(1), scored=torch.tensor([True]), cut_is_end=False)
    rollout.validate()
    assert rollout.next_values is not None
    assert rollout.truncated[0].tolist() == [False] * (len(ids) - 4) + [True]
    torch.testing.assert_close(rollout.next_values[0, -1:], expected, atol=1e-5, rtol=0)
    unknown = replace(found, samples=replace(found.samples, final_values=None))
    with pytest.raises(ValueError, match="final_values is not given"):
        rollout_of(unknown, torch.zeros(1), scored=torch.tensor([True]), cut_is_end=False)


def test_an_environment_that_fails_is_named(both: tuple[LanguagePolicy, Any]) -> None:
    class Broken(Script):
        def respond(self, text: str) -> Any:
            raise RuntimeError("out of\npages")

    with pytest.raises(UserError, match=r"turns\.environment talker: respond raised RuntimeError: out of pages"):
        one(both, Broken(), stop=EVERY, stop_tokens=SPECIAL)


# ---------------------------------------------------------------- what the update reads


def gradient_of(policy: LanguagePolicy, rollout: Rollout) -> Tensor:
    advantages, returns = gae(rollout, gae_lambda=0.9)
    update(
        policy=policy,
        optimizer=torch.optim.SGD(policy.parameters(), lr=0.0),
        rollout=rollout,
        advantages=advantages,
        returns=returns,
        config=PPOConfig(
            epochs=1, minibatch_size=64, micro_batch_size=20, max_grad_norm=1e9, learning_rate=0.0, entropy_coef=0.1
        ),
        generator=torch.Generator().manual_seed(0),
    )
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def test_the_ratio_is_one_and_answers_have_no_loss(both: tuple[LanguagePolicy, Any], episodes: Episodes) -> None:
    """Rubbish in every number of the answers' columns, and the gradient stays; in one own token it does not."""
    policy, _ = both
    rewards = torch.arange(48.0) % 3
    rollout = rollout_of(episodes, rewards, scored=torch.ones(48, dtype=torch.bool), gamma=0.9)
    rollout.validate()
    answers = rollout.episode.eq(0) & ~rollout.mask
    assert answers[:, 5:].sum() > 20
    expected = gradient_of(policy, rollout)
    assert expected.abs().max() > 1e-4
    assert rollout.values is not None
    assert rollout.next_values is not None
    spoiled = replace(
        rollout,
        old_log_probs=rollout.old_log_probs.masked_fill(answers, torch.nan),
        values=rollout.values.masked_fill(answers, 50.0),
        next_values=rollout.next_values.masked_fill(answers, -50.0),
    )
    assert torch.equal(gradient_of(policy, spoiled), expected)
    own = rollout.mask & (rollout.mask.cumsum(1) == 1)
    moved = replace(rollout, old_log_probs=rollout.old_log_probs.masked_fill(own, -0.5))
    assert not torch.equal(gradient_of(policy, moved), expected)
    advantages, returns = gae(rollout, gae_lambda=0.9)
    statistics = update(
        policy=policy,
        optimizer=torch.optim.SGD(policy.parameters(), lr=0.0),
        rollout=rollout,
        advantages=advantages,
        returns=returns,
        config=PPOConfig(epochs=1, minibatch_size=48, clip_range=1e-4, learning_rate=0.0),
        generator=torch.Generator().manual_seed(0),
    )
    assert abs(statistics["approx_kl"]) < 1e-8
    assert statistics["clip_fraction"] == 0.0


# ---------------------------------------------------------------- texts of tokens


def test_texts_of_tokens_that_share_a_character() -> None:
    """A byte-level tokenizer: a character of three bytes is three tokens, none of which is a text."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<eos>", *sorted(alphabet)])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    ids = tokenizer.encode("a € b", add_special_tokens=False)
    assert len(ids) == 7
    writing = _Writing(tokenizer)
    assert [writing.text(ids[:n]) for n in (1, 2, 5, 7)] == ["a", "a ", "a €", "a € b"]
    assert "\ufffd" in writing.text(ids[:4])
    assert writing.text([*ids, int(tokenizer.eos_token_id)]) == "a € b"
    assert decode_completions(tokenizer, [ids]) == ["a € b"]


def test_configuration_is_checked() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tools": ("calculator",), "environment": "a.py:b"}, r"turns\.tools and turns\.environment: give one"),
        ({"max_turns": 0}, r"turns\.max_turns"),
        ({"max_turn_tokens": 0}, r"turns\.max_turn_tokens"),
        ({"time_limit": 0.0}, r"turns\.time_limit must be positive"),
        ({"stop": ("",)}, r"turns\.stop"),
        ({"answer_format": "x"}, r"turns\.answer_format"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            TurnsConfig(**settings)
    with pytest.raises(UserError, match="nobody would answer"):
        make_referee(TurnsConfig())
    assert make_referee(TurnsConfig(tools=("calculator",))).time_limit is None
