"""Conversations: their messages, their text, their tokens, and which of these the assistant wrote.

A conversation is rendered by the tokenizer's own chat template, or by `PLAIN` where it has none. Which tokens are
the assistant's is found by rendering up to before and up to behind each of its messages, never from token ids.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from experiment.errors import UserError, first_line

if TYPE_CHECKING:  # importing transformers takes seconds, and reading rows does not need it
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"

# Lines "role: content"; what the assistant wrote ends with EOS.
PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

Message = dict[str, Any]


class Chat(str):
    """Part of a conversation: a text in lines "role: content" which remembers the messages that it is made of.

    A prompt ends where the assistant is to go on ("user: hi\\nassistant: "); a completion is what follows there, so
    one that is a single message is that message's content. It is text wherever text will do; what turns texts into
    tokens (`texts.encode_prompts`) renders the messages with the tokenizer's chat template instead.
    """

    messages: tuple[Message, ...]
    place: str

    @classmethod
    def prompt(cls, messages: Sequence[Message], *, place: str = "") -> Chat:
        """What the assistant answers; `place` is where it was read, for messages to the user."""
        lines = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return cls._of(lines + f"{ASSISTANT}: ", messages, place)

    @classmethod
    def completion(cls, messages: Sequence[Message], *, place: str = "") -> Chat:
        """What follows a prompt; begins with an assistant's message."""
        first, *rest = messages
        lines = "".join(f"\n{message['role']}: {message['content']}" for message in rest)
        return cls._of(first["content"] + lines, messages, place)

    @classmethod
    def between(cls, messages: Sequence[Message], *, place: str = "") -> Chat:
        """What stands between two of the assistant's messages."""
        lines = "".join(f"\n{message['role']}: {message['content']}" for message in messages)
        return cls._of(f"{lines}\n{ASSISTANT}: ", messages, place)

    @classmethod
    def _of(cls, text: str, messages: Sequence[Message], place: str) -> Chat:
        chat = cls(text)
        chat.messages, chat.place = tuple(messages), place
        return chat


def is_conversation(value: Any) -> bool:
    """Whether a column holds messages, well-formed or not."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(message, Mapping) for message in value)


def read_messages(value: Any, name: str, place: str) -> list[Message]:
    """The messages of a column. Content made of parts is joined where all of them are text.

    Raises UserError naming `place`, the column and the message that has no `role` or no text as `content`.
    """
    if not is_conversation(value):
        kind = "an empty list" if value == [] else type(value).__name__
        raise UserError(f"{place}: column {name!r} is {kind}, not a list of messages with `role` and `content`")
    messages = []
    for number, message in enumerate(value, start=1):
        known = {key: inner for key, inner in message.items() if inner is not None}  # parquet fills up with nulls
        if "content" in known:
            known["content"] = _joined(known["content"])
        for key in ("role", "content"):
            if not isinstance(known.get(key), str):
                what = f"is {type(message[key]).__name__}, not text" if key in message else "is missing"
                raise UserError(f"{place}: column {name!r}: message {number}: {key!r} {what}")
            _require_whole(known[key], f"{place}: column {name!r}: message {number}: {key!r}")
        messages.append(known)
    return messages


def _joined(content: Any) -> Any:
    """Text out of [{"type": "text", "text": ...}, ...]; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
    ]
    return "".join(text for text in texts if isinstance(text, str)) if None not in texts else content


def _require_whole(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place} holds half of a character (a lone surrogate)") from None


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's own chat template; of several that it names, the default one."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def ensure_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template the plain one, which is saved with it; True if it had none."""
    if template_of(tokenizer) is not None:
        return False
    tokenizer.chat_template = PLAIN
    return True


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer: bool, place: str = ""
) -> str:
    """The text of messages; `answer`: with what stands before the assistant's next message.

    A tokenizer without a chat template gets the plain one, which is saved with it from then on, and says so.

    Raises UserError naming `place` if the template refuses them.
    """
    if ensure_template(tokenizer):
        print("the tokenizer has no chat template; conversations are lines 'role: content'", file=sys.stderr)
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template_of(tokenizer),
            tokenize=False,
            add_generation_prompt=answer,
        )
    except (jinja2.TemplateError, TypeError, LookupError, ValueError, AttributeError, ArithmeticError) as error:
        roles = ", ".join(message["role"] for message in messages)
        problem = f"the chat template refuses a conversation of {roles}: {first_line(error)}"
        raise UserError(_at(place, problem)) from error
    return str(text)


def _at(place: str, problem: str) -> str:
    return f"{place}: {problem}" if place else problem


def segments(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, given: int, place: str = ""
) -> list[tuple[str, bool]]:
    """(text, whether the assistant wrote it) in turn, the last one the assistant's.

    given   how many first messages are the prompt; assistant messages among them are not to be learned

    What follows the assistant's last message is left out. Raises UserError if there is no assistant message to
    learn, or the template renders a part of the conversation otherwise than within the whole.
    """
    found: list[tuple[str, bool]] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT or number < given:
            continue
        before = render(tokenizer, messages[:number], answer=True, place=place)
        after = render(tokenizer, messages[: number + 1], answer=False, place=place)
        for whole, part in ((before, done), (after, before)):
            if not whole.startswith(part):
                same = next((i for i, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), len(whole))
                problem = (
                    "the chat template renders the first messages of a conversation otherwise than within the "
                    f"whole (message {number + 1}: {part[same : same + 30]!r} became "
                    f"{whole[same : same + 30]!r}), so what the assistant wrote cannot be told apart; use a "
                    "template that does not"
                )
                raise UserError(_at(place, problem))
        found += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    if not found:
        raise UserError(_at(place, f"no message has the role {ASSISTANT!r}; there is nothing to learn from"))
    return found


def shown_in_part(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    parts: Sequence[tuple[str, bool]],
    *,
    given: int,
    place: str = "",
) -> bool:
    """Whether the template leaves out a part of what the assistant says, such as its thoughts; blanks do not count.

    parts   what `segments` returns of the messages

    Raises UserError where it shows nothing of a message: templates do so that look for parts of a content and find
    text.
    """
    numbers = iter([i for i, message in enumerate(messages) if message["role"] == ASSISTANT and i >= given])
    in_part, whole = False, ""
    for text, learned in parts:
        whole += text
        if not learned:
            continue
        number = next(numbers)
        if _solid(messages[number]["content"]) in _solid(text):
            continue
        in_part = True
        silent = [*messages[:number], {**messages[number], "content": " "}]  # some templates refuse an empty one
        if _solid(whole) == _solid(render(tokenizer, silent, answer=False, place=place)):
            problem = (
                f"the chat template leaves out what the assistant says in message {number + 1}; use one that shows "
                "contents that are text"
            )
            raise UserError(_at(place, problem))
    return in_part


def _solid(text: str) -> str:
    """Without blanks: templates strip what they show, and put line breaks around it."""
    return "".join(text.split())


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    """Token ids of everything before the assistant's answer."""
    text = render(tokenizer, chat.messages, answer=True, place=chat.place)
    return list(tokenizer.encode(text, add_special_tokens=False))


def completion_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Chat, completion: str
) -> tuple[list[int], list[bool]]:
    """Token ids that follow `prompt_tokens`, and which of them the assistant wrote, its EOS included.

    A template's closing mark of a message is learned up to its EOS; what stands behind that (a line break, say) is
    given, since generation stops at EOS. The last message gets an EOS where the template gives it none. Raises
    UserError where the template shows nothing of what the assistant says.
    """
    ids, mask, _ = data_tokens(tokenizer, prompt, completion)
    return ids, mask


def data_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Chat, completion: str
) -> tuple[list[int], list[bool], bool]:
    """`completion_tokens`, and whether the template leaves out a part of what the assistant says."""
    messages, given = [*prompt.messages, *_reply(completion)], len(prompt.messages)
    parts = segments(tokenizer, messages, given=given, place=prompt.place)
    in_part = shown_in_part(tokenizer, messages, parts, given=given, place=prompt.place)
    return *_tokens(tokenizer, parts), in_part


def drawn_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Chat, completion: str) -> tuple[list[int], list[bool]]:
    """`completion_tokens` of what a policy drew: what the template shows of it, be that nothing."""
    messages = [*prompt.messages, *_reply(completion)]
    return _tokens(tokenizer, segments(tokenizer, messages, given=len(prompt.messages), place=prompt.place))


def _reply(completion: str) -> Sequence[Message]:
    if isinstance(completion, Chat):
        return completion.messages
    return [{"role": ASSISTANT, "content": str(completion)}]


def _tokens(tokenizer: PreTrainedTokenizerBase, parts: Sequence[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Token ids of all `segments` but the first, which is the prompt, and which of them are learned."""
    eos = int(tokenizer.eos_token_id)
    ids: list[int] = []
    mask: list[bool] = []
    for number, (text, learned) in enumerate(parts):
        if number == 0:
            continue  # the prompt
        tokens = list(tokenizer.encode(text, add_special_tokens=False))
        last = number == len(parts) - 1
        own = 0
        if learned:
            ends = [i for i, token in enumerate(tokens) if token == eos]
            own = ends[-1] + 1 if ends else len(tokens)
            if last:
                tokens = tokens[:own] if ends else [*tokens, eos]
                own = len(tokens)
        ids += tokens
        mask += [True] * own + [False] * (len(tokens) - own)
    return ids, mask
