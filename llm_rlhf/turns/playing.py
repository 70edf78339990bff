"""Playing the rows of a task in turns: prompts, who answers, what episodes earn; and demonstrations with calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from llm_rlhf.data.chat import Chat
from llm_rlhf.data.texts import Encoded, TokenizedTexts, columns_of, encode, encode_prompts, lay_out
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.tokenizer import pad_id
from llm_rlhf.rewards.functions import RewardSet, Scores, resolve
from llm_rlhf.rewards.rules import Rule
from llm_rlhf.rewards.safety import SafetyConfig, load_rules, under_rules
from llm_rlhf.tasks.examples import Example, Piece
from llm_rlhf.tasks.task import Task
from llm_rlhf.turns.decoding import play
from llm_rlhf.turns.environments import Referee
from llm_rlhf.turns.episodes import Episodes, TurnsConfig, make_referee
from llm_rlhf.turns.tools import load_tools, split_calls

ENVIRONMENT = "environment"
"""The name under which a configuration weights what the environment gives, beside reward functions."""


@dataclass(frozen=True)
class Judge:
    """functions: of whole completions, or None; environment: the weight of what the environment gives by turn;
    rules: what the policy's own turns must not break, whatever they earn (`rewards/safety.py`); floor: the most
    that an episode earns which breaks one."""

    functions: RewardSet | None
    environment: float
    rules: Mapping[str, Rule] = field(default_factory=dict)
    floor: float = 0.0

    def __call__(
        self, episodes: Episodes, examples: Sequence[Example], completions: list[str], *, first_index: int
    ) -> tuple[Scores, Tensor]:
        """Scores of episodes played on `examples`, and what of their totals comes at the very end, [B].

        first_index     sample_index of the first episode
        """
        count = len(examples)
        given = episodes.turn_rewards.sum(1).cpu()
        nothing = torch.zeros(count)
        scores = Scores(nothing, torch.zeros(count, dtype=torch.bool), {})
        if self.functions is not None:
            columns: dict[str, list[Any]] = {
                **columns_of(examples),
                "sample_index": list(range(first_index, first_index + count)),
                "finished": episodes.samples.finished.tolist(),
                "turns": [[turn.text for turn in turns] for turns in episodes.turns],
                "replies": [[turn.reply.text for turn in turns if turn.reply] for turns in episodes.turns],
            }
            scores = self.functions([example.prompt for example in examples], completions, columns)
        if self.environment != 0:
            everyone = torch.ones(count, dtype=torch.bool)
            total = scores.total + self.environment * given
            scores = Scores(total, everyone, {**scores.by_name, ENVIRONMENT: given})
        prompts = [example.prompt for example in examples]
        scores = under_rules(scores, self.rules, prompts, written(episodes), floor=self.floor)
        return scores, scores.total - self.environment * given


def written(episodes: Episodes) -> list[str]:
    """What the policy wrote in each episode, a line a turn; answers are left out."""
    return ["\n".join(turn.text for turn in turns) for turns in episodes.turns]


def judging(rewards: Mapping[str, float], turns: TurnsConfig) -> Mapping[str, float]:
    """What judges a run's episodes (name -> weight): its rewards or, where it names none, its environment."""
    return rewards or ({} if turns.environment is None else {ENVIRONMENT: 1.0})


def build_judge(
    weights: Mapping[str, float],
    task: Task,
    turns: TurnsConfig,
    *,
    rewards_timeout: float | None = None,
    safety: SafetyConfig | None = None,
) -> Judge:
    """The rewards of a configuration (name -> weight); empty = the environment's own or, with tools, the task's.

    rewards_timeout     seconds that one call of a reward function may take; None = any

    Reward functions may ask for the policy's `turns` and the environment's `replies`, a list of texts an episode.
    Raises UserError for rewards that cannot be used.
    """
    weights = judging(weights, turns) or task.gold
    functions = {name: weight for name, weight in weights.items() if name != ENVIRONMENT}
    columns = [*columns_of(task.train), "turns", "replies"]
    environment = weights.get(ENVIRONMENT, 0.0)
    found = None
    if functions:
        found = resolve(functions, own=task.rewards, columns=columns, timeout=rewards_timeout)
    rules = safety or SafetyConfig()
    return Judge(found, environment, load_rules(rules.rules), rules.floor)


@dataclass(frozen=True)
class Played:
    """Episodes and what they earned. scores: all of it; final: [B], the part given at the very end; examples,
    completions: the row and the text behind the prompt, of each."""

    episodes: Episodes
    scores: Scores
    final: Tensor
    examples: list[Example]
    completions: list[str]


@dataclass(frozen=True)
class Player:
    """Everything that turns rows of a task into scored episodes."""

    policy: LanguagePolicy
    tokenizer: PreTrainedTokenizerBase
    referee: Referee
    turns: TurnsConfig
    judge: Judge
    max_new_tokens: int

    def play(
        self,
        examples: Sequence[Example],
        *,
        samples_per_prompt: int,
        generator: torch.Generator | None,
        first_index: int,
        bootstrap: bool = False,
    ) -> Played:
        """Play `samples_per_prompt` episodes on each row.

        generator   None plays greedily
        first_index how many episodes were played before: sample_index of the first one
        bootstrap   see `decoding.play`
        """
        played = [example for example in examples for _ in range(samples_per_prompt)]
        rows = [
            {**example.columns, "prompt": example.prompt, "sample_index": first_index + index}
            for index, example in enumerate(played)
        ]
        episodes = play(
            self.policy,
            self.tokenizer,
            encode_prompts(self.tokenizer, [example.prompt for example in examples]),
            rows,
            referee=self.referee,
            config=self.turns,
            max_new_tokens=self.max_new_tokens,
            generator=generator,
            bootstrap=bootstrap,
        )
        completions = episodes.completions(self.tokenizer)
        scores, final = self.judge(episodes, played, completions, first_index=first_index)
        return Played(episodes, scores, final, played, completions)


def build_player(
    policy: LanguagePolicy,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    turns: TurnsConfig,
    *,
    rewards: Mapping[str, float],
    max_new_tokens: int | None,
    rewards_timeout: float | None = None,
    safety: SafetyConfig | None = None,
) -> Player:
    """A player of the task. max_new_tokens: None = the task's. Raises UserError for what cannot be used."""
    judge = build_judge(rewards, task, turns, rewards_timeout=rewards_timeout, safety=safety)
    limit = max_new_tokens or task.max_new_tokens
    return Player(policy, tokenizer, make_referee(turns), turns, judge, limit)


def tokenize_demonstrations(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, turns: TurnsConfig, *, context: int
) -> tuple[TokenizedTexts, list[str]]:
    """Demonstrations as episodes would have them: what a tool answers is masked, and tokenised apart; and notes.

    Texts with an answer that the tool would not give are left out. Raises UserError where nothing is left, a text
    does not fit the model's context, or a tool fails.
    """
    notes: list[str] = []
    texts: list[Encoded] = []
    plain = [example for example in examples if not isinstance(example.prompt, Chat)]
    if turns.environment is not None or len(plain) < len(examples):  # turns of a conversation are masked there
        texts = [encode(tokenizer, example.prompt, example.completion) for example in examples]
    else:
        tools = load_tools(turns.tools, answer_format=turns.answer_format)
        pieces = split_calls([example.completion for example in plain], tools, make_referee(turns))
        kept = [(example, parts) for example, parts in zip(plain, pieces, strict=True) if parts is not None]
        prompts = encode_prompts(tokenizer, [example.prompt for example, _ in kept])
        texts = [_encoded(tokenizer, ids, parts) for ids, (_, parts) in zip(prompts, kept, strict=True)]
        calls = sum(len(parts) // 2 for _, parts in kept)
        notes.append(
            f"demonstrations: {len(kept)} texts with {calls} tool calls, {len(plain) - len(kept)} left out whose "
            "answers are not the tool's"
        )
    if not texts:
        raise UserError("there are no texts to train on: " + ("; ".join(notes) or "the task has no demonstrations"))
    longest = max(texts, key=len)
    if len(longest) > context:
        raise UserError(
            f"a prompt of {len(longest.prompt)} tokens and a completion of {len(longest.completion)} do not fit "
            f"the model's context of {context}; shorten the texts, or set model.context for a new model"
        )
    return lay_out(texts, pad=pad_id(tokenizer)), notes


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: list[int], pieces: Sequence[Piece]) -> Encoded:
    """Pieces one after the other, EOS behind the last one."""
    ids: list[int] = []
    mask: list[bool] = []
    for piece in pieces:
        tokens = tokenizer.encode(piece.text, add_special_tokens=False)
        ids += tokens
        mask += [piece.reward is not None] * len(tokens)
    return Encoded(prompt, [*ids, int(tokenizer.eos_token_id)], [*mask, True])
