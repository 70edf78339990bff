"""Texts with rewards as tokens: what was written before, as decisions to learn from without writing more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from llm_rlhf.data.chat import ASSISTANT, Chat, Message, completion_tokens
from llm_rlhf.data.texts import demonstrated_columns, encode_prompts
from llm_rlhf.rewards.functions import resolve
from llm_rlhf.tasks.examples import Piece
from llm_rlhf.tasks.task import Task


@dataclass(frozen=True)
class LoggedTexts:
    """Logged texts in a rollout's columns: column t is the decision that produced token t. All are [N, T].

    input_ids, attention_mask   int; 1 = a real token. Prompts end in one column, padding is on both sides
    mask            bool; True where the token was chosen, every EOS included; prompts and others' turns are not
    rewards         float; on the last token of what earned it
    terminated      bool; the last chosen token of a text
    discount        float; of what comes after a decision
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    rewards: Tensor
    terminated: Tensor
    discount: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def episode(self) -> Tensor:
        """[N, T] int: a row is one episode, -1 is padding."""
        return torch.where(self.attention_mask.bool(), 0, -1)

    def observations(self) -> dict[str, Tensor]:
        """What `LanguagePolicy.columns` takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "decisions": self.mask}

    def select(self, rows: Tensor) -> LoggedTexts:
        """The texts `rows`, [B] int."""
        return LoggedTexts(*(tensor[rows] for tensor in self._tensors()))

    def between(self, first: int, last: int) -> LoggedTexts:
        """Columns first to last - 1 of every text."""
        return LoggedTexts(*(tensor[:, first:last] for tensor in self._tensors()))

    def to(self, device: torch.device) -> LoggedTexts:
        """The same elsewhere."""
        return LoggedTexts(*(tensor.to(device) for tensor in self._tensors()))

    def scaled(self) -> LoggedTexts:
        """With rewards divided by the standard deviation of the texts' sums, where they differ at all."""
        deviation = float(self.rewards.double().sum(1).std(correction=0))
        return replace(self, rewards=self.rewards / deviation) if deviation > 0 else self

    def _tensors(self) -> tuple[Tensor, ...]:
        return (
            self.input_ids,
            self.attention_mask,
            self.mask,
            self.rewards,
            self.terminated,
            self.discount,
        )


def logged_texts(task: Task, rewards: dict[str, float]) -> list[Sequence[Piece]]:
    """The task's texts with their rewards: those of its file, else demonstrations scored by reward functions.

    rewards     name (or file.py:function) -> weight; empty = the task's own

    Raises UserError if the file brings its rewards and others are named, or if no text has a reward.
    """
    if task.logged:
        if rewards:
            raise UserError("rewards: the file brings its own; leave this section out")
        return list(task.logged)
    examples = list(task.demonstrations)
    columns = demonstrated_columns(examples)
    score = resolve(rewards or task.gold, own=task.rewards, columns=list(columns))
    scores = score([example.prompt for example in examples], [example.completion for example in examples], columns)
    texts: list[Sequence[Piece]] = [
        (Piece(example.prompt, None), Piece(example.completion, total))
        for example, total, scored in zip(examples, scores.total.tolist(), scores.scored.tolist(), strict=True)
        if scored
    ]
    if not texts:
        raise UserError("rewards: no demonstration could be scored")
    return texts


def tokenize_logged(
    texts: Sequence[Sequence[Piece]], tokenizer: PreTrainedTokenizerBase, *, context: int, pad: int, gamma: float
) -> LoggedTexts:
    """Tokenize every piece apart, with an EOS after each that was chosen; the first of a text is its prompt.

    Conversations are rendered by the tokenizer's chat template (`llm_rlhf.data.chat`).

    Raises UserError if there is nothing, or a text does not fit the model's context.
    """
    if not texts:
        raise UserError("there are no texts to train on")
    prompts = encode_prompts(tokenizer, [text[0].text for text in texts])
    bodies = [_body(text, tokenizer) for text in texts]
    left, right = max(len(prompt) for prompt in prompts), max(len(body) for body in bodies)
    longest = max(range(len(texts)), key=lambda row: len(prompts[row]) + len(bodies[row]))
    if len(prompts[longest]) + len(bodies[longest]) > context:
        raise UserError(
            f"a prompt of {len(prompts[longest])} tokens and what follows, {len(bodies[longest])} tokens, do not "
            f"fit the model's context of {context}; shorten the texts, or set model.context for a new model"
        )
    shape = (len(texts), left + right)
    ids, attention = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    mask, terminated = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    rewards = torch.zeros(shape)
    for row, (prompt, body) in enumerate(zip(prompts, bodies, strict=True)):
        start, end = left - len(prompt), left + len(body)
        tokens, chosen, earned = zip(*body, strict=True)
        ids[row, start:end] = torch.tensor([*prompt, *tokens])
        attention[row, start:end] = 1
        mask[row, left:end] = torch.tensor(chosen)
        rewards[row, left:end] = torch.tensor(earned)
        terminated[row, left + max(i for i, own in enumerate(chosen) if own)] = True
    return LoggedTexts(ids, attention, mask, rewards, terminated, torch.full(shape, gamma))


def _body(text: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, bool, float]]:
    """(token, whether it was chosen, its reward) of everything after the prompt."""
    if isinstance(text[0].text, Chat):
        return _conversation_body(text[0].text, text[1:], tokenizer)
    body: list[tuple[int, bool, float]] = []
    for piece in text[1:]:
        tokens = list(tokenizer.encode(piece.text, add_special_tokens=False))
        if piece.reward is None:
            body += [(token, False, 0.0) for token in tokens]
        else:
            body += [(token, True, 0.0) for token in tokens]
            body.append((int(tokenizer.eos_token_id), True, piece.reward))
    return body


def _conversation_body(
    prompt: Chat, pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, bool, float]]:
    """The same of a conversation: a message's reward is on its EOS."""
    messages: list[Message] = []
    for piece in pieces:
        said = {"role": ASSISTANT, "content": piece.text}
        messages += piece.text.messages if isinstance(piece.text, Chat) else [said]
    ids, mask = completion_tokens(tokenizer, prompt, Chat.completion(messages))
    ends = [i for i, own in enumerate(mask) if own and (i + 1 == len(mask) or not mask[i + 1])]
    rewards = [piece.reward for piece in pieces if piece.reward is not None]
    if len(ends) != len(rewards):
        raise UserError(
            f"{prompt.place}: the chat template puts nothing between two messages of the assistant, so their "
            "rewards cannot be told apart; give the conversation one reward"
        )
    earned = dict(zip(ends, rewards, strict=True))
    return [(token, own, earned.get(i, 0.0)) for i, (token, own) in enumerate(zip(ids, mask, strict=True))]
