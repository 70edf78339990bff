"""Where a tokenizer begins its texts with bos, every prompt begins with it, once, in training as in sampling."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from llm_rlhf.data.chat import ASSISTANT, Chat
from llm_rlhf.data.packing import pack
from llm_rlhf.data.pairs import tokenize_pairs
from llm_rlhf.data.records import Comparison
from llm_rlhf.data.texts import Encoded, adds_bos, encode, encode_prompts, fit, keep_end, tokenize
from llm_rlhf.evaluation.subject import Decoding, Subject
from llm_rlhf.logged.texts import tokenize_logged
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.loading import ModelConfig, new_language_model
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.rewards.reward_model import RewardModel, Scorer, build_reward_model
from llm_rlhf.rewards.trunks import positions_of
from llm_rlhf.tasks.examples import Example, Piece
from tandem.chat import ChatConfig, Conversation

BOS, EOS, PAD = 0, 1, 2
LETTERS = {letter: number for number, letter in enumerate("abcdefgh: \nusrit", start=3)}
A, B, C, D, E = (LETTERS[letter] for letter in "abcde")
WRITES_BOS = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
WRITES_NONE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tokenizer(*, template: str | None = None, **settings: Any) -> PreTrainedTokenizerFast:
    """One token a letter; as Llama's, it begins every text with bos."""
    backend = Tokenizer(models.WordLevel({"<s>": BOS, "</s>": EOS, "<pad>": PAD, **LETTERS}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **settings}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **marks)
    made.chat_template = template
    return made


def asked(content: str) -> Chat:
    return Chat.prompt([{"role": "user", "content": content}])


def test_only_what_the_tokenizer_itself_does_is_done() -> None:
    plain = character_tokenizer("abc")
    assert adds_bos(tokenizer())
    assert not adds_bos(plain)
    a = plain.encode("a", add_special_tokens=False)
    assert encode_prompts(plain, ["a", ""]) == [a, [plain.bos_token_id]]
    assert encode_prompts(tokenizer(), ["ab", "", "<s>c"]) == [[BOS, A, B], [BOS], [BOS, C]]
    assert encode(tokenizer(), "a", "bc") == Encoded([BOS, A], [B, C, EOS], [True] * 3, BOS)
    assert encode(tokenizer(), "", "bc").prompt == [BOS]


@pytest.mark.parametrize(("template", "lead"), [(WRITES_BOS, [BOS]), (WRITES_NONE, [])])
def test_whether_a_conversation_begins_with_bos_its_template_says(template: str, lead: list[int]) -> None:
    """As transformers' own apply_chat_template has it."""
    words = tokenizer(template=template)
    answer = Chat.completion([{"role": ASSISTANT, "content": "cd"}])
    text = encode(words, asked("ab"), answer)
    assert text == Encoded([*lead, A, B], [C, D, EOS], [True] * 3, BOS)
    assert encode_prompts(words, [asked("ab")]) == [text.prompt]
    theirs: Any = words.apply_chat_template(list(asked("ab").messages), add_generation_prompt=True)
    assert list(theirs["input_ids"]) == text.prompt


def test_a_prompt_that_is_cut_keeps_its_bos() -> None:
    assert keep_end([BOS, A, B, C], 3, bos=BOS) == [BOS, B, C]
    assert keep_end([BOS, A, B, C], 1, bos=BOS) == [BOS]
    assert keep_end([A, B, C], 2, bos=BOS) == [B, C]
    assert keep_end([A, B], 2, bos=None) == [A, B]
    text = encode(tokenizer(), "abcd", "e")
    (short,), cut, _ = fit([text], context=9, max_prompt=3)
    assert (short.prompt, cut) == ([BOS, C, D], True)
    assert fit([short], context=9, max_prompt=2)[0][0].prompt == [BOS, D]


def test_every_kind_of_text_begins_with_bos_and_learns_the_completion_alone() -> None:
    words = tokenizer()
    texts = tokenize([Example("ab", "c"), Example("", "de")], words, context=9, pad=PAD)
    assert texts.input_ids.tolist() == [[BOS, A, B, C, EOS, PAD], [PAD, PAD, BOS, D, E, EOS]]
    assert texts.mask.int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    packed = pack([encode(words, "ab", "c"), encode(words, "", "d")], context=9, pad=PAD, width=9)
    assert packed.input_ids.tolist() == [[BOS, A, B, C, EOS, BOS, D, EOS]]
    assert packed.mask.int().tolist() == [[0, 0, 0, 1, 1, 0, 1, 1]]
    pairs, _ = tokenize_pairs([Comparison("a", "b", "c")], words, context=9, pad=PAD)
    assert pairs.chosen.input_ids.tolist() == [[BOS, A, B, EOS]]
    assert pairs.rejected.mask.int().tolist() == [[0, 0, 1, 1]]
    logged = tokenize_logged([(Piece("a", None), Piece("b", 1.0))], words, context=9, pad=PAD, gamma=1.0)
    assert logged.input_ids.tolist() == [[BOS, A, B, EOS]]
    assert logged.mask.int().tolist() == [[0, 0, 1, 1]]


def subject() -> Subject:
    torch.manual_seed(0)
    words = tokenizer()
    model = new_language_model(ModelConfig(layers=1, width=16, heads=2, context=8), words)
    return Subject(LanguagePolicy(model).eval(), words)


def test_evaluation_and_chat_ask_with_the_same_tokens_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, seen = subject(), []
    outputs = judge.policy._outputs

    def listen(input_ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        seen.append(input_ids.tolist())
        return outputs(input_ids, *rest, **named)

    monkeypatch.setattr(judge.policy, "_outputs", listen)
    judge.likelihoods([("ab", "c")])
    judge.likelihoods([("abcdefgh", "c")])
    assert seen == [[[BOS, A, B]], [[BOS, *(LETTERS[letter] for letter in "cdefgh")]]]
    assert len(judge.complete(["abcdefgh"], Decoding(max_new_tokens=2))) == 1
    talk = Conversation(judge, ChatConfig(plain=True, max_new_tokens=4))
    talk.messages = [{"role": "user", "content": "abcdefgh"}]
    assert talk._prompt() == [BOS, *(LETTERS[letter] for letter in "fgh")]
    talk.messages = [{"role": "user", "content": "ab"}]
    assert talk._prompt() == encode_prompts(judge.tokenizer, ["ab"])[0]


@pytest.mark.parametrize("pooling", ["mean", "completion", "last"])
def test_an_encoder_whose_cls_is_its_bos_gets_one(tmp_path: Path, pooling: Any) -> None:
    """As RoBERTa's: the text begins with bos, so the reward model puts no cls before it."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(str(tmp_path))
    tokenizer(cls_token="<s>", sep_token="</s>", model_max_length=32).save_pretrained(str(tmp_path))
    model, words = build_reward_model(ModelConfig(path=str(tmp_path)), alphabet="", objectives=("reward",), heads=1)
    assert model.start == BOS
    assert positions_of(model.trunk) == 40 - PAD - 1
    model.trunk(input_ids=torch.full((1, 40 - PAD - 1), A))  # as many as there are positions
    model.pooling = pooling
    bare = RewardModel(model.trunk, heads=1)
    bare.pooling = pooling
    bare.heads.load_state_dict(model.heads.state_dict())
    texts = Scorer(model, words).encode(["ab", "a"], ["c", "cde"])
    assert [text.prompt for text in texts] == [[BOS, A, B], [BOS, A]]
    scores, lengths = Scorer(model, words).scores(["ab", "a"], ["c", "cde"])
    expected, _ = Scorer(bare, words).scores(["ab", "a"], ["c", "cde"])
    torch.testing.assert_close(scores, expected)
    assert lengths.tolist() == [2, 4]
    # Beside a text that begins otherwise, which gets its cls, nothing changes.
    rows = torch.tensor([[BOS, A, C, EOS, PAD], [A, C, C, EOS, PAD]])
    mask, completion = (rows != PAD).long(), torch.tensor([[False, False, True, True, False]] * 2)
    both = model.score(rows, mask, completion)
    led = torch.tensor([[BOS, A, C, C, EOS]])
    inside = torch.tensor([[False, False, False, True, True]])
    torch.testing.assert_close(both[:1], bare.score(rows[:1], mask[:1], completion[:1]))
    torch.testing.assert_close(both[1:], bare.score(led, torch.ones_like(led), inside))
