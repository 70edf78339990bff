"""A model under test: it completes prompts and says how likely it finds given completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from experiment.checkpoint import Which, find_checkpoint
from experiment.errors import UserError
from llm_rlhf.data.chat import Chat
from llm_rlhf.data.texts import encode_prompts, keep_end
from llm_rlhf.logged.value_heads import AdvantageSteering
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.generation import at_temperature, generate
from llm_rlhf.models.loading import ModelConfig, model_folder
from llm_rlhf.models.tokenizer import decode_completions, end_ids, pad_id

Message = dict[str, Any]
Prompt = str | list[Message]
"""A text or `Chat`, or the messages of a conversation whose next one is the assistant's."""


TAIL = 8
"""Tokens of a prompt that decide how what follows them is decoded."""


@dataclass(frozen=True)
class Decoding:
    """max_new_tokens: longest completion, EOS included; temperature 0 is greedy; samples: of each prompt; stop: a
    completion ends before the first of these texts; seed: of the draws."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    samples: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.samples < 1 or self.temperature < 0:
            raise ValueError(
                "decoding: max_new_tokens and samples must be at least 1, temperature must not be negative"
            )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("decoding: several samples at temperature 0 are all the same; raise it")


@dataclass(frozen=True)
class Likelihood:
    """Of a completion after its prompt: log_prob in nats, tokens, and the completion's bytes (UTF-8)."""

    log_prob: float
    tokens: int
    size: int

    @property
    def per_byte(self) -> float:
        """Nats a byte: comparable between completions of different lengths, and between tokenizers."""
        return self.log_prob / max(self.size, 1)


def decoded_behind(tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int]) -> str:
    """The completion's text as it continues the prompt's: decoded alone, as behind an empty prompt, some tokenizers
    drop its first space."""
    tail = prompt[-TAIL:]
    before, whole = decode_completions(tokenizer, [tail, [*tail, *completion]])
    return whole[len(before) :] if whole.startswith(before) else decode_completions(tokenizer, [completion])[0]


@dataclass
class Subject:
    """A policy with its tokenizer.

    chat        ask texts through the tokenizer's chat template (a plain one where it has none), else as they are;
                conversations go through it either way, as in training
    batch_size  prompts at once
    cut         how many prompts were too long for the context: those keep their end
    """

    policy: LanguagePolicy
    tokenizer: PreTrainedTokenizerBase
    chat: bool = False
    batch_size: int = 16
    cut: int = field(default=0, init=False)

    def _given(self, prompt: Prompt) -> str:
        """A text, or a conversation (`Chat`) for the template, which also says whether it begins with bos."""
        if isinstance(prompt, str):
            return self.asked(prompt)
        return Chat.prompt(prompt) if self.chat else str(Chat.prompt(prompt))

    def asked(self, prompt: str) -> str:
        """What whoever judges the answer must be given.

        A conversation (`Chat`) where the model is asked through its chat template: a reward model has its own.
        """
        if isinstance(prompt, Chat) or not self.chat:
            return prompt
        return Chat.prompt([{"role": "user", "content": prompt}])

    def complete(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[list[str]]:
        """`decoding.samples` texts for each prompt. Raises UserError if none fits the model's context."""
        room = self.policy.context - decoding.max_new_tokens
        if room < 1:
            raise UserError(
                f"--max-new-tokens: {decoding.max_new_tokens} leave no room for a prompt in the model's context of "
                f"{self.policy.context} tokens; lower it"
            )
        given = [self._given(prompt) for prompt in prompts]
        ids = [self._fitting(one, room) for one in encode_prompts(self.tokenizer, given)]
        generator = torch.Generator().manual_seed(decoding.seed) if decoding.temperature > 0 else None
        ends = end_ids(self.tokenizer, self.policy.model)
        texts: list[str] = []
        with at_temperature(self.policy, decoding.temperature or 1.0):
            for start in range(0, len(ids), self.batch_size):
                samples = generate(
                    self.policy,
                    ids[start : start + self.batch_size],
                    samples_per_prompt=decoding.samples,
                    max_new_tokens=decoding.max_new_tokens,
                    ends=ends,
                    pad=pad_id(self.tokenizer),
                    generator=generator,
                )
                for row, tokens in enumerate(samples.completions()):
                    prompt = start + row // decoding.samples
                    before = [] if isinstance(given[prompt], Chat) else ids[prompt]
                    texts.append(decoded_behind(self.tokenizer, before, tokens))
        stopped = [cut_at(text, decoding.stop) for text in texts]
        return [stopped[row : row + decoding.samples] for row in range(0, len(stopped), decoding.samples)]

    @torch.no_grad()
    def likelihoods(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Likelihood]:
        """Of each (prompt, completion), at temperature 1; prompt and completion are tokenized apart.

        Raises UserError for a completion that is empty or fills the context.
        """
        prompts = encode_prompts(self.tokenizer, [self._given(prompt) for prompt, _ in pairs])
        ends = [list(self.tokenizer.encode(text, add_special_tokens=False)) for _, text in pairs]
        found: list[Likelihood] = []
        with at_temperature(self.policy, 1.0):
            for start in range(0, len(pairs), self.batch_size):
                rows = range(start, min(start + self.batch_size, len(pairs)))
                right = max(len(ends[row]) for row in rows)
                for row in rows:
                    if not ends[row] or len(ends[row]) >= self.policy.context:
                        raise UserError(
                            f"the completion {pairs[row][1][:40]!r} has {len(ends[row])} tokens; it needs at least "
                            f"one and fewer than the model's context of {self.policy.context}"
                        )
                starts = [self._fitting(prompts[row], self.policy.context - right) for row in rows]
                left = max(len(ids) for ids in starts)
                fill, ids, mask, decided = pad_id(self.tokenizer), [], [], []
                for row, prompt in zip(rows, starts, strict=True):
                    lead, trail = left - len(prompt), right - len(ends[row])
                    ids.append([fill] * lead + prompt + ends[row] + [fill] * trail)
                    mask.append([0] * lead + [1] * (len(prompt) + len(ends[row])) + [0] * trail)
                    decided.append([False] * left + [True] * len(ends[row]) + [False] * trail)
                tokens, decisions = torch.tensor(ids), torch.tensor(decided)
                observations = {
                    "input_ids": tokens,
                    "attention_mask": torch.tensor(mask),
                    "decisions": decisions,
                }
                log_probs = self.policy.log_probs(observations, tokens)
                sums = torch.where(decisions, log_probs, 0.0).double().sum(1).tolist()
                for row, value in zip(rows, sums, strict=True):
                    found.append(Likelihood(value, len(ends[row]), len(pairs[row][1].encode())))
        return found

    def _fitting(self, ids: list[int], room: int) -> list[int]:
        if len(ids) <= room:
            return ids
        self.cut += 1
        return keep_end(ids, room, bos=self.tokenizer.bos_token_id)

    def notes(self) -> list[str]:
        """What the reader of a result must know of the asking."""
        if not self.cut:
            return []
        return [
            f"{self.cut} prompts were too long for the context of {self.policy.context} tokens: they kept their end"
        ]


def question_of(prompt: str) -> str:
    """What a function or a person is given of a prompt: of a conversation that is one question, that question."""
    if isinstance(prompt, Chat) and len(prompt.messages) == 1:
        return str(prompt.messages[0]["content"])
    return prompt


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    places = [place for mark in stop if (place := text.find(mark)) >= 0]
    return text[: min(places)] if places else text


def _parts(checkpoint: Path) -> list[str]:
    return sorted(part.name for part in checkpoint.iterdir() if part.is_dir() and part.name != "rng")


def load_subject(
    path: str | Path, *, checkpoint: Which = "last", chat: bool = False, batch_size: int = 16
) -> Subject:
    """A run folder's checkpoint, a model's folder or a hub name.

    A low-rank adapter is merged into the weights; value heads (llm/ilql) steer as their run was configured.

    Raises UserError where there is no such model.
    """
    is_run = (Path(path) / "checkpoints").is_dir()
    inside = find_checkpoint(path, checkpoint) if is_run else None
    if inside is not None and not (inside / "policy").is_dir():
        raise UserError(
            f"{path}: this run has no policy that writes, only {', '.join(_parts(inside)) or 'nothing'}"
        )
    source = model_folder(path if inside is None else inside / "policy")
    policy, tokenizer = build_policy(ModelConfig(path=source), alphabet="")
    policy.eval().steering = AdvantageSteering.load(Path(source), policy)
    return Subject(policy, tokenizer, chat=chat, batch_size=batch_size)
