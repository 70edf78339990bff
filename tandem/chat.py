"""`tandem chat MODEL`: talk with a policy in a terminal.

The conversation goes through the tokenizer's chat template (lines "role: content" where it has none). What the
model writes is shown as it is drawn. With --plain every line is a prompt of its own, as it stands. `/reset`
forgets, `/quit` or the end of the input ends; it reads piped input as well, a line a turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch

from experiment.errors import UserError, user_errors
from llm_rlhf.data.chat import Chat, Message
from llm_rlhf.data.texts import encode_prompts, keep_end
from llm_rlhf.evaluation.subject import Subject, load_subject
from llm_rlhf.models.drawing import chances, pick
from llm_rlhf.models.tokenizer import end_ids
from tandem.benchmark import find_model

PROMPT = "> "
HELP = "/reset forgets the conversation, /quit ends; everything else is said to the model"
REPLACEMENT = "�"
LONGEST = 256  # tokens of an answer where --max-new-tokens says nothing


@dataclass(frozen=True)
class ChatConfig:
    """temperature: 0 is greedy; max_new_tokens: longest answer, None = 256 or what the model's context leaves;
    seed: of the draws; system: what is said first; plain: no template and no memory, for models that know no
    conversations."""

    temperature: float = 0.7
    max_new_tokens: int | None = None
    seed: int = 0
    system: str | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"--temperature must not be negative, got {self.temperature}")
        if not (self.temperature == 0 or 1e-4 <= self.temperature < float("inf")):
            raise ValueError(f"--temperature must be 0, or a number from 0.0001 on, got {self.temperature}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2**63 - 1, got {self.seed}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if self.plain and self.system is not None:
            raise ValueError("--system: there is no conversation with --plain for it to stand before")

    def kept_free(self, context: int) -> int:
        """Tokens of the context that what was said may not take: the answer's, or at most half where it has no
        length of its own."""
        return self.max_new_tokens or min(LONGEST, max(context // 2, 1))

    def longest_answer(self, prompt: int, context: int) -> int:
        """Tokens that the answer to a prompt of `prompt` tokens may have."""
        return self.max_new_tokens or min(LONGEST, context - prompt)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run folder (or its name under runs/), a model's folder, or a hub name")
    add("--checkpoint", choices=("last", "best"), default="last", help="which one of a run (last)")
    add("--temperature", type=float, default=0.7, metavar="T", help="0 is greedy (0.7)")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (256, or what fits)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    add("--system", metavar="TEXT", help="what stands before the conversation")
    add("--plain", action="store_true", help="no chat template: every line is a prompt of its own")


def chat(arguments: argparse.Namespace) -> int:
    """Load the model and talk until the input ends. Raises UserError where there is no such model."""
    with user_errors():
        config = ChatConfig(
            temperature=arguments.temperature,
            max_new_tokens=arguments.max_new_tokens,
            seed=arguments.seed,
            system=arguments.system,
            plain=arguments.plain,
        )
    subject = load_subject(find_model(arguments.model), checkpoint=arguments.checkpoint)
    talk(Conversation(subject, config), source=sys.stdin, out=sys.stdout)
    return 0


def talk(conversation: Conversation, *, source: TextIO, out: TextIO) -> None:
    """One turn a line, until the input ends or /quit."""
    asking = source.isatty()
    if asking:
        print(HELP, file=out)
    while True:
        if asking:
            out.write(PROMPT)
            out.flush()
        try:
            line = source.readline()
        except UnicodeDecodeError as error:
            raise UserError(f"the input is not UTF-8 ({error.reason} at byte {error.start} of it)") from error
        said = line.strip()
        if not line or said == "/quit":
            if asking and not line:
                print(file=out)
            return
        if said == "/reset":
            conversation.reset()
            print("(forgotten)", file=out)
        elif said.startswith("/"):
            print(f"(unknown command {said.split()[0]}; {HELP})", file=out)
        elif said:
            for piece in conversation.say(said):
                out.write(piece)
                out.flush()
            print(file=out)
            for note in conversation.news():
                print(f"({note})", file=out)


@dataclass
class Conversation:
    """A model and what was said so far.

    messages    the system's, then user and assistant in turn
    dropped     how many turns were forgotten because the context is full
    """

    subject: Subject
    config: ChatConfig
    messages: list[Message] = field(default_factory=list)
    dropped: int = 0
    _notes: list[str] = field(default_factory=list)
    _told: bool = False

    def __post_init__(self) -> None:
        """Raises UserError if the answer alone would fill the model's context."""
        free, context = self.config.kept_free(self.subject.policy.context), self.subject.policy.context
        if free >= context:
            raise UserError(
                f"--max-new-tokens: {free} leave no room for what you say in the model's context of {context} "
                "tokens; lower it"
            )
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system's message; the draws go on."""
        self.messages = [] if self.config.system is None else [{"role": "system", "content": self.config.system}]
        self.dropped, self._told, self._notes = 0, False, []

    def news(self) -> list[str]:
        """What the user should know since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def say(self, text: str) -> Iterator[str]:
        """The user's turn; yields the answer in pieces as they are drawn, and remembers both."""
        self.messages.append({"role": "user", "content": text})
        ids = self._prompt()
        pieces = []
        for piece in stream(self.subject, ids, self.config, self.generator):
            pieces.append(piece)
            yield piece
        self.messages.append({"role": "assistant", "content": "".join(pieces).strip()})

    def _prompt(self) -> list[int]:
        """The conversation's tokens, the oldest turns dropped until the answer fits behind them."""
        room = self.subject.policy.context - self.config.kept_free(self.subject.policy.context)
        first = 0 if self.config.system is None else 1
        while True:
            if self.config.plain:
                self.messages = self.messages[-1:]
                text = self.messages[0]["content"]
            else:
                text = Chat.prompt(self.messages)
            (ids,) = encode_prompts(self.subject.tokenizer, [text])
            if len(ids) <= room:
                return ids
            if len(self.messages) <= first + 1:
                self._notes.append(f"what you said is longer than the {room} tokens there are; its end was used")
                return keep_end(ids, room, bos=self.subject.tokenizer.bos_token_id)
            del self.messages[first : first + 2]
            self.dropped += 1
            if not self._told:
                self._told = True
                self._notes.append(
                    f"the model's context of {self.subject.policy.context} tokens is full: the oldest turns are "
                    "forgotten from here on; /reset starts anew"
                )


@torch.no_grad()
def stream(subject: Subject, ids: list[int], config: ChatConfig, generator: torch.Generator) -> Iterator[str]:
    """Draw an answer token by token; yields text as soon as it is whole.

    A character of several tokens is held back until its last one has come. The draws are those of
    `generation.generate` with the same generator.
    """
    policy, tokenizer = subject.policy, subject.tokenizer
    new = torch.tensor([ids], device=policy.device)
    mask = torch.ones_like(new)
    cache: Any = None
    drawn: list[int] = []
    shown = ""
    ends = end_ids(tokenizer, policy.model)
    for _ in range(config.longest_answer(len(ids), policy.context)):
        logits, hidden, cache = policy.step(new, mask, cache=cache, use_cache=True, keep=1)
        offered = policy.decoding_logits(logits[:, -1], hidden[:, -1])
        if bool(offered.isnan().any()):
            raise UserError("the model's logits are NaN: its training has diverged")
        if config.temperature == 0:
            token = offered.argmax(-1)
        else:
            token = pick(torch.softmax(offered / config.temperature, dim=-1), chances(1, generator))
        if int(token) in ends:
            break
        drawn.append(int(token))
        text = str(tokenizer.decode(drawn, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if not text.endswith(REPLACEMENT):
            yield text[len(shown) :]
            shown = text
        new = token.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
    rest = str(tokenizer.decode(drawn, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    if len(rest) > len(shown):
        yield rest[len(shown) :]
