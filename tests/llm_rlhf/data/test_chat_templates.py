"""Chat templates: what is rendered, which tokens are the assistant's, and templates that cannot be told apart."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from experiment.errors import UserError
from llm_rlhf.data.chat import PLAIN, Chat, completion_tokens, ensure_template, prompt_tokens, segments, template_of
from llm_rlhf.data.texts import encode, encode_drawn, encode_prompts, fit
from llm_rlhf.models.tokenizer import character_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's does: what the assistant thought is shown in its last message only.
FORGETFUL = (
    "{% for message in messages %}{{ message['role'] }}:"
    "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
USER, ASSISTANT = "user", "assistant"


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": (USER, ASSISTANT)[i % 2], "content": content} for i, content in enumerate(contents)]


def chatml() -> PreTrainedTokenizerFast:
    """Bytes, and three special tokens; pad is eos, as in many models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def pair(*contents: str) -> tuple[Chat, Chat]:
    messages = turns(*contents)
    return Chat.prompt(messages[:1]), Chat.completion(messages[1:])


def learned(tokenizer: PreTrainedTokenizerFast, ids: list[int], mask: list[bool]) -> str:
    """The text with what is learned in brackets."""
    text, inside = "", False
    for token, own in zip(ids, mask, strict=True):
        if own != inside:
            text, inside = text + ("[" if own else "]"), own
        text += str(tokenizer.decode([token]))
    return text + ("]" if inside else "")


def test_the_plain_template_and_the_text_agree() -> None:
    tokenizer = character_tokenizer("user: assistant\nHiHowareyu?Fine.I")
    assert template_of(tokenizer) is None
    prompt, completion = pair("Hi", "How are you?", "Fine.", "I see")
    assert prompt == "user: Hi\nassistant: "
    assert completion == "How are you?\nuser: Fine.\nassistant: I see"
    assert tokenizer.decode(prompt_tokens(tokenizer, prompt)) == prompt
    ids, mask = completion_tokens(tokenizer, prompt, completion)
    assert learned(tokenizer, ids, mask) == "[How are you?<eos>]\nuser: Fine.\nassistant: [I see<eos>]"


def test_a_templates_own_marks_are_learned_up_to_eos() -> None:
    """The line break behind <|im_end|> is never generated, so it is given between turns and dropped at the end."""
    tokenizer = chatml()
    prompt, completion = pair("a", "b", "c", "d")
    assert (
        tokenizer.decode(prompt_tokens(tokenizer, prompt))
        == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
    ids, mask = completion_tokens(tokenizer, prompt, completion)
    assert learned(tokenizer, ids, mask) == (
        "[b<|im_end|>]\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[d<|im_end|>]"
    )
    assert ids.count(tokenizer.eos_token_id) == 3
    whole = tokenizer.apply_chat_template(turns("a", "b", "c", "d"), tokenize=True, return_dict=False)
    assert prompt_tokens(tokenizer, prompt) + ids == whole[:-1]  # all but the last line break


def test_only_the_completion_is_learned_even_if_the_prompt_has_answers() -> None:
    tokenizer = chatml()
    messages = turns("a", "b", "c", "d")
    prompt, completion = Chat.prompt(messages[:3]), Chat.completion(messages[3:])
    ids, mask = completion_tokens(tokenizer, prompt, completion)
    assert learned(tokenizer, ids, mask) == "[d<|im_end|>]"
    assert completion_tokens(tokenizer, prompt, "d") == (ids, mask)  # a plain text is one message


def test_texts_become_tokens_through_the_template_wherever_they_go() -> None:
    tokenizer = chatml()
    prompt, completion = pair("a", "b")
    encoded = encode(tokenizer, prompt, completion)
    assert [encoded.prompt] == encode_prompts(tokenizer, [prompt])
    assert str(tokenizer.decode(encoded.prompt + encoded.completion)).endswith("<|im_start|>assistant\nb<|im_end|>")
    assert tokenizer.decode(encode(tokenizer, str(prompt), "b").prompt) == "user: a\nassistant: "


def test_a_template_that_forgets_is_refused() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = FORGETFUL
    assert [own for _, own in segments(tokenizer, turns("a", "b"), given=1)] == [False, True]
    with pytest.raises(
        UserError, match=r"f:4: the chat template renders the first messages .* \(message 4: '<think>"
    ):
        segments(tokenizer, turns("a", "b", "c", "d"), given=1, place="f:4")


def test_a_template_that_leaves_out_what_was_said_is_refused() -> None:
    """As those of models that see pictures: a content is a list of parts there, a text has none."""
    tokenizer = chatml()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    asked = Chat.prompt(turns("a"), place="f:4")
    with pytest.raises(UserError, match=r"f:4: the chat template leaves out what the assistant says in message 2"):
        completion_tokens(tokenizer, asked, "b")
    eos = tokenizer.eos_token_id
    assert completion_tokens(tokenizer, asked, "") == ([eos], [True])  # nothing was said
    assert encode_drawn(tokenizer, asked, "b").completion == [eos]
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ part.text }}", "").replace(
        "<|im_end|>", "{{ m.content | trim }}<|im_end|>"
    )
    assert segments(tokenizer, turns("a", " b\n"), given=1)[1] == ("b<|im_end|>\n", True)
    assert not encode(tokenizer, asked, " b\n").in_part


def test_thoughts_that_a_template_leaves_out_are_told() -> None:
    """However long the answer behind them is; one that has nothing behind them is refused, unless it was drawn."""
    tokenizer = chatml()
    tokenizer.chat_template = CHATML.replace("['content'] }}<", "['content'].split('</think>')[-1] }}<")
    asked = Chat.prompt(turns("a"), place="f:4")
    for answer in ("hello", "a whole sentence of more than twenty characters"):
        shown = encode(tokenizer, asked, answer)
        assert not shown.in_part
        thought = encode(tokenizer, asked, f"think</think>{answer}")
        assert thought.in_part
        assert (thought.completion, thought.mask) == (shown.completion, shown.mask)
        assert encode_drawn(tokenizer, asked, f"think</think>{answer}").completion == shown.completion
    (short,), _, _ = fit([encode(tokenizer, asked, "think</think>hello")], context=4)
    assert short.in_part
    with pytest.raises(UserError, match=r"f:4: the chat template leaves out what the assistant says in message 2"):
        encode(tokenizer, asked, "think</think>")
    assert encode_drawn(tokenizer, asked, "think</think>").completion == [tokenizer.eos_token_id]
    talk = Chat.completion(turns("a", "b", "c", "think</think>d")[1:])
    assert encode(tokenizer, asked, talk).in_part
    talk = Chat.completion(turns("a", "think</think>", "c", "d")[1:])
    with pytest.raises(UserError, match="says in message 2"):
        encode(tokenizer, asked, talk)


def test_what_a_template_refuses_is_said() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    prompt = Chat.prompt(turns("a"), place="rows.jsonl:3")
    with pytest.raises(
        UserError, match=r"rows\.jsonl:3: the chat template refuses a conversation of user: roles must"
    ):
        prompt_tokens(tokenizer, prompt)
    with pytest.raises(UserError, match="no message has the role 'assistant'"):
        segments(chatml(), turns("a"), given=0)


def test_the_plain_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("user: assistant\n")
    assert ensure_template(tokenizer)
    assert not ensure_template(tokenizer)
    tokenizer.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again.chat_template == PLAIN
    assert again.apply_chat_template(turns("as", "at"), tokenize=False) == "user: as\nassistant: at<eos>"
    assert not ensure_template(chatml())


def test_the_first_conversation_gives_a_tokenizer_its_template_whatever_the_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = character_tokenizer("user: assistant\nhi")
    prompt = Chat.prompt([{"role": "user", "content": "hi"}])
    for _ in range(2):
        assert tokenizer.decode(prompt_tokens(tokenizer, prompt)) == "user: hi\nassistant: "
    assert template_of(tokenizer) == PLAIN
    assert capsys.readouterr().err.count("the tokenizer has no chat template") == 1


def test_several_templates_mean_the_default_one() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ 1 }}"}
    assert template_of(tokenizer) == CHATML


def test_a_chat_is_text_for_whoever_wants_text() -> None:
    prompt, completion = pair("a", "b")
    assert json.dumps({"prompt": prompt, "completion": completion}) == (
        '{"prompt": "user: a\\nassistant: ", "completion": "b"}'
    )
    assert len({prompt, str(prompt)}) == 1
