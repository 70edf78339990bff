"""Asking a model: completions and likelihoods are the model's own, whatever stands beside them in the batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from experiment.errors import UserError
from llm_rlhf.evaluation.subject import Decoding, Subject, cut_at, decoded_behind, load_subject

Make = Callable[..., Subject]


def naive(subject: Subject, prompt: str, completion: str) -> float:
    """Nats of a completion, one prefix at a time through transformers."""
    ids = subject.tokenizer.encode(prompt, add_special_tokens=False)
    total = 0.0
    for token in subject.tokenizer.encode(completion, add_special_tokens=False):
        logits = subject.policy.model(input_ids=torch.tensor([ids])).logits[0, -1]
        total += float(torch.log_softmax(logits.detach().double(), -1)[token])
        ids = [*ids, token]
    return total


def test_likelihoods_are_the_models_own_in_any_batch(make_subject: Make) -> None:
    pairs = [("2+2=", "4"), ("a much longer prompt: ", "yes, it is"), ("2+2=", "22"), ("x", "y")]
    alone, together = make_subject(batch_size=1), make_subject(batch_size=4)
    together.policy.temperature = 0.5  # of training; likelihoods are at 1, and it comes back
    found = together.likelihoods(pairs)
    assert together.policy.temperature == 0.5
    for pair, one, other in zip(pairs, found, alone.likelihoods(pairs), strict=True):
        assert one.log_prob == pytest.approx(naive(alone, *pair), abs=1e-4)
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
    assert [one.tokens for one in found] == [1, 10, 2, 1]
    assert found[1].per_byte == pytest.approx(found[1].log_prob / 10)


def test_greedy_completions_do_not_depend_on_the_batch(make_subject: Make) -> None:
    prompts = ["hello ", "a", "something longer here: "]
    decoding = Decoding(max_new_tokens=8)
    expected = []
    for prompt in prompts:
        subject = make_subject()
        ids = subject.tokenizer.encode(prompt, add_special_tokens=False)
        for _ in range(8):
            token = int(subject.policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == subject.tokenizer.eos_token_id:
                break
            ids = [*ids, token]
        expected.append([subject.tokenizer.decode(ids, skip_special_tokens=True)[len(prompt) :]])
    for size in (1, 3):
        assert make_subject(batch_size=size).complete(prompts, decoding) == expected


def test_samples_follow_the_seed(make_subject: Make) -> None:
    subject = make_subject()
    drawn = [
        subject.complete(["a", "b"], Decoding(max_new_tokens=6, temperature=1.0, samples=3, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(texts) for texts in drawn[0]] == [3, 3]


def test_what_is_too_long_keeps_its_end_and_is_counted(make_subject: Make) -> None:
    subject = make_subject(context=20)
    assert subject.notes() == []
    short = subject.complete(["0123456789"], Decoding(max_new_tokens=10))
    assert subject.cut == 0
    assert subject.complete(["other text 0123456789"], Decoding(max_new_tokens=10)) == short
    assert subject.likelihoods([("x" * 30 + "abcde", "f" * 15)])[0].log_prob == pytest.approx(
        naive(subject, "abcde", "f" * 15), abs=1e-4
    )
    assert subject.notes() == ["2 prompts were too long for the context of 20 tokens: they kept their end"]
    with pytest.raises(UserError, match="--max-new-tokens: 20 leave no room"):
        subject.complete(["a"], Decoding(max_new_tokens=20))
    with pytest.raises(UserError, match="has 20 tokens"):
        subject.likelihoods([("a", "b" * 20)])
    with pytest.raises(UserError, match="has 0 tokens"):
        subject.likelihoods([("a", "")])


def test_conversations(make_subject: Make) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "oh"},
        {"role": "user", "content": "?"},
    ]
    plain, chat = make_subject(), make_subject(chat=True)
    for subject, prompt, given in (
        (plain, "hi", "hi"),
        (chat, "hi", "user: hi\nassistant: "),
        (plain, messages, "user: hi\nassistant: oh\nuser: ?\nassistant: "),
        (chat, messages, "user: hi\nassistant: oh<eos>\nuser: ?\nassistant: "),
    ):
        (likelihood,) = subject.likelihoods([(prompt, "yes")])
        assert likelihood.log_prob == pytest.approx(naive(subject, given, "yes"), abs=1e-4)


def test_a_turn_ends_where_the_models_own_settings_end_it(make_subject: Make) -> None:
    subject = make_subject()
    (whole,) = subject.complete(["hello "], Decoding(max_new_tokens=8))
    ids = subject.tokenizer.encode(whole[0], add_special_tokens=False)
    subject.tokenizer.add_tokens([str(subject.tokenizer.decode([ids[3]]))], special_tokens=True)
    subject.policy.model.generation_config.eos_token_id = [subject.tokenizer.eos_token_id, ids[3]]
    (cut,) = subject.complete(["hello "], Decoding(max_new_tokens=8))
    assert cut == [subject.tokenizer.decode(ids[: ids.index(ids[3])])]


def test_a_completion_keeps_the_space_that_its_tokenizer_drops_at_a_texts_beginning() -> None:
    """As Llama 2's: a space is "\u2581", and the first one of a text is taken for the mark of its beginning."""
    words = {"<s>": 0, "</s>": 1, "\u2581\u2581\u2581\u2581": 2, "\u2581": 3, "return": 4, ":": 5, "\n": 6}
    inner = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    replace = decoders.Replace("\u2581", " ")
    inner.decoder = decoders.Sequence([replace, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    assert tokenizer.decode([2, 4]) == "   return"
    assert decoded_behind(tokenizer, [0, 4, 5, 6], [2, 4]) == "    return"
    assert decoded_behind(tokenizer, [0], [4]) == "return"


def test_stop_texts() -> None:
    assert cut_at("abc\ndef\nQuestion: x", ("\nQuestion:", "zzz")) == "abc\ndef"
    assert cut_at("one two three", ("three", "two")) == "one "
    assert cut_at("abc", ()) == "abc"


def test_loading(make_subject: Make, tmp_path: Path) -> None:
    subject = make_subject()
    folder = tmp_path / "run" / "checkpoints" / "last" / "policy"
    subject.policy.save_pretrained(folder)
    subject.tokenizer.save_pretrained(str(folder))
    pairs = [("a", "bc")]
    for path in (folder, tmp_path / "run"):
        assert load_subject(path).likelihoods(pairs) == subject.likelihoods(pairs)
    (tmp_path / "judge" / "checkpoints" / "last" / "reward_model").mkdir(parents=True)
    with pytest.raises(UserError, match="this run has no policy that writes, only reward_model"):
        load_subject(tmp_path / "judge")
    with pytest.raises(UserError, match="there is no checkpoint 'best'"):
        load_subject(tmp_path / "run", checkpoint="best")


def test_bad_decoding() -> None:
    for bad in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"samples": 2}):
        with pytest.raises(ValueError, match="decoding"):
            Decoding(**bad)
