"""Texts -> padded token batches whose masks say which tokens are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from llm_rlhf.data.chat import Chat, data_tokens, drawn_tokens, prompt_tokens
from llm_rlhf.tasks.examples import Example


@dataclass(frozen=True)
class TokenizedTexts:
    """Prompts and completions as tokens, left-padded so that all completions start at one column.

    input_ids, attention_mask   [N, T] int; 1 = a real token
    mask                        [N, T] bool; True on the completion and its EOS, others' turns within it left out
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def observations(self, rows: Tensor) -> dict[str, Tensor]:
        """What `LanguagePolicy.evaluate` takes, for the rows [B]."""
        return {
            "input_ids": self.input_ids[rows],
            "attention_mask": self.attention_mask[rows],
            "decisions": self.mask[rows],
        }

    def state_dict(self) -> dict[str, Tensor]:
        """All three, for texts that a run found itself."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "mask": self.mask}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> TokenizedTexts:
        """What `state_dict()` gave."""
        return cls(state["input_ids"], state["attention_mask"], state["mask"])


def concatenate(parts: Sequence[TokenizedTexts]) -> TokenizedTexts:
    """One set of texts out of several whose prompts may differ in width; completions stay aligned."""
    starts = [int(part.mask.any(0).nonzero()[0]) for part in parts]
    left = max(starts)
    right = max(part.mask.shape[1] - start for part, start in zip(parts, starts, strict=True))

    def widen(tensor: Tensor, start: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (left - start, left + right - tensor.shape[1] - (left - start)))

    pairs = list(zip(parts, starts, strict=True))
    return TokenizedTexts(
        torch.cat([widen(part.input_ids, start) for part, start in pairs]),
        torch.cat([widen(part.attention_mask, start) for part, start in pairs]),
        torch.cat([widen(part.mask, start) for part, start in pairs]),
    )


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with its bos token, as Llama's does and GPT-2's does not."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("ab")["input_ids"][:1]) == [bos]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt; an empty one becomes the bos token, so that there is something to start from.

    A conversation (`Chat`) is rendered by the tokenizer's chat template, or the plain one, which also says whether
    it begins with bos. Any other prompt begins with bos, once, where the tokenizer begins its texts so.
    """
    bos = tokenizer.bos_token_id
    start = bos if bos is not None else tokenizer.eos_token_id
    lead = [int(start)] if adds_bos(tokenizer) else []

    def ids_of(prompt: str) -> list[int]:
        if isinstance(prompt, Chat):
            return prompt_tokens(tokenizer, prompt)
        ids = list(tokenizer.encode(prompt, add_special_tokens=False))
        return ids if ids[:1] == lead else lead + ids

    return [ids_of(prompt) or [int(start)] for prompt in prompts]


def keep_end(prompt: list[int], room: int, *, bos: int | None) -> list[int]:
    """The last `room` tokens (at least 1) of a prompt; the first of them is its bos, if it begins with that."""
    if len(prompt) <= room:
        return prompt
    lead = prompt[:1] if prompt[0] == bos else []
    return lead + prompt[len(prompt) - room + len(lead) :]


@dataclass(frozen=True)
class Encoded:
    """A prompt and a completion as token ids; `mask` is True on the completion's tokens that are learned.

    bos         which token a prompt that begins with it keeps when it is cut
    in_part     whether the chat template leaves out a part of what the assistant says, such as its thoughts
    """

    prompt: list[int]
    completion: list[int]
    mask: list[bool]
    bos: int | None = None
    in_part: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Encoded:
    """Prompt and completion as generation sees them: encoded apart, with an EOS behind the completion.

    Raises UserError where the chat template shows nothing of what the assistant says.
    """
    if not isinstance(prompt, Chat):
        return encode_drawn(tokenizer, prompt, completion)
    (before,) = encode_prompts(tokenizer, [prompt])
    ids, mask, in_part = data_tokens(tokenizer, prompt, completion)
    return Encoded(before, ids, mask, tokenizer.bos_token_id, in_part)


def encode_drawn(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Encoded:
    """`encode` of a completion that a policy drew: what the chat template shows of it, be that nothing."""
    (before,) = encode_prompts(tokenizer, [prompt])
    if isinstance(prompt, Chat):
        return Encoded(before, *drawn_tokens(tokenizer, prompt, completion), tokenizer.bos_token_id)
    ids = [*tokenizer.encode(completion, add_special_tokens=False), int(tokenizer.eos_token_id)]
    return Encoded(before, ids, [True] * len(ids), tokenizer.bos_token_id)


def fit(
    answers: Sequence[Encoded], *, context: int, max_prompt: int | None = None
) -> tuple[list[Encoded], bool, list[bool]]:
    """Completions of one prompt, cut to fit `context`: prompts keep their end, completions their start.

    The prompt gives way first, down to half of the context; `max_prompt` is a limit of its own. A completion that
    is cut has no EOS any more. Returns the answers, whether the prompt was cut, and which completions were.
    """
    longest = max(len(answer.completion) for answer in answers)
    prompt = answers[0].prompt
    room = max(context - longest, context // 2, 1)
    room = room if max_prompt is None else min(room, max_prompt)
    kept = keep_end(prompt, room, bos=answers[0].bos)
    left = context - len(kept)
    fitted = [
        replace(answer, prompt=kept, completion=answer.completion[:left], mask=answer.mask[:left])
        for answer in answers
    ]
    return fitted, len(kept) < len(prompt), [len(answer.completion) > left for answer in answers]


def lay_out(texts: Sequence[Encoded], *, pad: int) -> TokenizedTexts:
    """Left-pad the prompts and right-pad the completions, so that all completions start at one column."""
    left = max(len(text.prompt) for text in texts)
    right = max(len(text.completion) for text in texts)
    ids, attention, mask = [], [], []
    for text in texts:
        before, after = left - len(text.prompt), right - len(text.completion)
        ids.append([pad] * before + text.prompt + text.completion + [pad] * after)
        attention.append([0] * before + [1] * len(text) + [0] * after)
        mask.append([False] * left + text.mask + [False] * after)
    return TokenizedTexts(torch.tensor(ids), torch.tensor(attention), torch.tensor(mask))


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, context: int, cut: bool = False
) -> tuple[list[Encoded], dict[str, int]]:
    """Demonstrations as token ids, and how many prompts and completions were cut.

    Raises UserError if there is nothing, or, unless `cut`, if a text does not fit the model's context.
    """
    if not examples:
        raise UserError("there are no texts to train on")
    texts = [encode(tokenizer, example.prompt, example.completion) for example in examples]
    if not cut:
        row = max(range(len(texts)), key=lambda row: len(texts[row]))
        longest, place = texts[row], examples[row].place
        if len(longest) > context:
            raise UserError(
                f"{f'{place}: ' if place else ''}a prompt of {len(longest.prompt)} tokens and a completion of "
                f"{len(longest.completion)} do not fit the model's context of {context}; shorten the texts "
                "(llm/sft: texts.cut=true), or set model.context for a new model"
            )
        return texts, {}
    counts = {"prompts_cut": 0, "completions_cut": 0}
    fitted = []
    for text in texts:
        (short,), prompt_cut, (completion_cut,) = fit([text], context=context)
        counts["prompts_cut"] += prompt_cut
        counts["completions_cut"] += completion_cut
        fitted.append(short)
    return fitted, counts


def tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, context: int, pad: int
) -> TokenizedTexts:
    """Tokenize prompts and completions apart (so that generation sees the same tokens), EOS at the end.

    Raises UserError if there is nothing, or a text does not fit the model's context.
    """
    return lay_out(encode_examples(examples, tokenizer, context=context)[0], pad=pad)


def columns_of(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Columns that every example has, each as a list."""
    if not examples:
        return {}
    shared = set(examples[0].columns).intersection(*(example.columns for example in examples))
    return {name: [example.columns[name] for example in examples] for name in sorted(shared)}


def demonstrated_columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """What reward functions are told of demonstrations: their columns, and those that come with completions."""
    count = len(examples)
    return {**columns_of(examples), "sample_index": list(range(count)), "finished": [True] * count}


class Batches:
    """Endless shuffled row numbers, without repeats within an epoch; its state goes into a checkpoint."""

    def __init__(self, rows: int, size: int, *, seed: int) -> None:
        self.rows, self.size = rows, size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(rows, generator=self.generator)
        self.position = 0
        self.epoch = 0

    def next(self) -> Tensor:
        """The next `size` row numbers; a batch may reach into the next epoch."""
        parts, missing = [], self.size
        while missing > 0:
            part = self.order[self.position : self.position + missing]
            parts.append(part)
            missing -= len(part)
            self.position += len(part)
            if self.position == self.rows:
                self.order = torch.randperm(self.rows, generator=self.generator)
                self.position = 0
                self.epoch += 1
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """Generator, order and position."""
        return {
            "generator": self.generator.get_state(),
            "order": self.order,
            "position": self.position,
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Raises UserError if the data has changed since."""
        if len(state["order"]) != self.rows:
            raise UserError(
                f"the data has {self.rows} rows now and had {len(state['order'])} when the run was saved"
            )
        self.generator.set_state(state["generator"])
        self.order, self.position, self.epoch = state["order"], int(state["position"]), int(state["epoch"])
