"""Episodes of several turns as data: with whom they are played, what is kept of them, and the rollout they become.

`llm_rlhf/turns/decoding.py` plays them. The environment's tokens are observations: mask False in the rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiment.errors import UserError
from llm_rlhf.models.generation import Samples
from llm_rlhf.models.tokenizer import decode_completions, end_ids
from llm_rlhf.turns.environments import Referee, Reply, own_environment
from llm_rlhf.turns.tools import ANSWER_FORMAT, Calculator, ToolEnvironment, load_tools


@dataclass(frozen=True)
class TurnsConfig:
    """How episodes are played, and with whom.

    tools           names of tools: calculator, or your own as file.py:NAME (see llm_rlhf/turns/tools.py)
    environment     your own instead, file.py:NAME (see llm_rlhf/turns/environments.py)
    stop            texts that end a turn wherever they occur in it, besides EOS and complete tool calls
    stop_tokens     tokens of the vocabulary that do
    max_turns       turns that the policy may write; after the last one it gets no answer
    max_turn_tokens longest turn, EOS included; one that is longer ends the episode; None = no limit of its own
    time_limit      seconds that the environment may take for an answer
    workers         answers that are asked for at a time; above 1 your code must bear threads
    failure_text    what the policy reads where your code raises, hangs or returns no text; None = the run stops
    answer_format   what is put around the answer ({}) of tools that are plain functions
    """

    tools: tuple[str, ...] = ()
    environment: str | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    max_turns: int = 8
    max_turn_tokens: int | None = None
    time_limit: float = 10.0
    workers: int = 1
    failure_text: str | None = None
    answer_format: str = ANSWER_FORMAT

    def __post_init__(self) -> None:
        if self.tools and self.environment is not None:
            raise ValueError(
                "turns.tools and turns.environment: give one of them; an environment has its own tools"
            )
        if min(self.max_turns, self.workers, 1 if self.max_turn_tokens is None else self.max_turn_tokens) < 1:
            raise ValueError("turns.max_turns, turns.max_turn_tokens and turns.workers must be at least 1")
        if not self.time_limit > 0:
            raise ValueError(f"turns.time_limit must be positive, got {self.time_limit}")
        if "" in self.stop:
            raise ValueError("turns.stop: an empty text would end every turn at once")
        if self.answer_format.count("{}") != 1:
            raise ValueError("turns.answer_format must hold {} once, where the answer goes")


def make_referee(config: TurnsConfig) -> Referee:
    """Who makes and asks the configured environment. Raises UserError where none is named or it cannot be used."""
    limits: dict[str, Any] = {
        "time_limit": config.time_limit,
        "workers": config.workers,
        "failure_text": config.failure_text,
    }
    if config.environment is not None:
        name = f"turns.environment {config.environment}"
        return Referee(name, own_environment(config.environment), **limits)
    if not config.tools:
        raise UserError(
            "turns: nobody would answer; name tools, such as turns.tools=[calculator], or "
            "turns.environment=FILE.py:NAME"
        )
    tools = load_tools(config.tools, answer_format=config.answer_format)
    if all(isinstance(tool, Calculator) for tool in tools):
        limits["time_limit"] = None  # it always returns, and threads cost more than it does
    return Referee("turns.tools", lambda: ToolEnvironment(tools), **limits)


def stop_ids(config: TurnsConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end a turn: the model's own ends (`tokenizer.end_ids`) and the configured ones.

    Raises UserError for one that the tokenizer has not.
    """
    vocabulary = tokenizer.get_vocab()
    for token in config.stop_tokens:
        if token not in vocabulary:
            raise UserError(f"turns.stop_tokens: the tokenizer has no token {token!r}; give a text as turns.stop")
    return end_ids(tokenizer, model).union(vocabulary[token] for token in config.stop_tokens)


@dataclass(frozen=True)
class Turn:
    """What the policy wrote, without special tokens, and the reply; None where the turn was cut before its end."""

    text: str
    reply: Reply | None


@dataclass(frozen=True)
class Episodes:
    """What was played; B episodes, T = prompt columns + new columns.

    samples         tokens; `mask` is True where the policy drew one, `finished` where the environment said so, and
                    `final_values` are at the true next observations, the last answer included
    turn_rewards    [B, T] float; what the environment gave, on the last token of the turn that earned it
    turns           of each episode
    """

    samples: Samples
    turn_rewards: Tensor
    turns: list[list[Turn]]

    def completions(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """All that follows the prompt, the environment's answers included, without special tokens."""
        start = int(self.samples.mask.any(0).nonzero()[0])
        ids, real = self.samples.input_ids[:, start:], self.samples.attention_mask[:, start:].bool()
        return decode_completions(tokenizer, [row[keep].tolist() for row, keep in zip(ids, real, strict=True)])

    def metrics(self) -> dict[str, float]:
        """Turns and tool calls an episode, the share of calls that made no sense (TRL's names), and what share of
        the completions' tokens somebody else wrote."""
        replies = [turn.reply for turns in self.turns for turn in turns if turn.reply is not None]
        calls = [reply for reply in replies if reply.tool]
        start = int(self.samples.mask.any(0).nonzero()[0])
        tokens = int(self.samples.attention_mask[:, start:].sum())
        return {
            "turns/mean": sum(map(len, self.turns)) / len(self.turns),
            "turns/masked_share": 1.0 - int(self.samples.mask.sum()) / tokens,
            "tools/call_frequency": len(calls) / len(self.turns),
            "tools/failure_frequency": sum(reply.failed for reply in calls) / max(len(calls), 1),
        }
