"""The shape of a task, and the configuration that picks one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llm_rlhf.rewards.functions import RewardFunction
from llm_rlhf.tasks import calculator, random_walks, rows, scored, tool_calculator
from llm_rlhf.tasks.calculator import CalculatorConfig
from llm_rlhf.tasks.examples import Example, Piece
from llm_rlhf.tasks.random_walks import RandomWalksConfig
from llm_rlhf.tasks.rows import RowsConfig
from llm_rlhf.tasks.scored import ScoredConfig
from llm_rlhf.tasks.tool_calculator import ToolCalculatorConfig


@dataclass(frozen=True)
class TaskConfig:
    """Which task, on which data.

    name    calculator, random_walks, tool_calculator (word problems solved with a calculator tool), rows (your own
            prompts and completions), or scored (with rewards)
    data    calculator: GSM8K's train file (jsonl or jsonl.gz), None = generated expressions;
            tool_calculator: the same file, None = generated problems
            rows: a file with `prompt`, `completion` and any further columns
            scored: a file with `prompt`, `completion` (or chat `messages`) and `reward`
    seed    of the split, of what is generated and of planted mistakes
    """

    name: Literal["calculator", "random_walks", "tool_calculator", "rows", "scored"] = "calculator"
    data: str | None = None
    seed: int = 0
    calculator: CalculatorConfig = field(default_factory=CalculatorConfig)
    random_walks: RandomWalksConfig = field(default_factory=RandomWalksConfig)
    tool_calculator: ToolCalculatorConfig = field(default_factory=ToolCalculatorConfig)
    rows: RowsConfig = field(default_factory=RowsConfig)
    scored: ScoredConfig = field(default_factory=ScoredConfig)


@dataclass(frozen=True)
class Task:
    """A task, ready to be trained on.

    demonstrations      texts for supervised training, mistakes included
    train               prompts for reinforcement learning, with the columns that rewards may ask for
    splits              named prompts for evaluation; recipes look at "validation" only, never at "test"
    rewards             the task's own reward functions by name
    gold                reward -> weight: what says whether an answer is good; evaluation reports it
    max_new_tokens      longest completion in tokens, EOS included
    limited_by          the setting that decides that; "" where the task's form does
    alphabet            characters of a tokenizer made for this task
    notes               what a run should say about its data, one line each
    logged              training texts that came with rewards, for offline learning; empty = demonstrations are
                        scored by the task's rewards
    """

    demonstrations: Sequence[Example]
    train: Sequence[Example]
    splits: dict[str, Sequence[Example]]
    rewards: dict[str, RewardFunction]
    gold: Mapping[str, float]
    max_new_tokens: int
    alphabet: str
    limited_by: str = ""
    notes: Sequence[str] = ()
    logged: Sequence[Sequence[Piece]] = ()


def build_task(config: TaskConfig, *, rewards: Mapping[str, float] | None = None) -> Task:
    """Make the task of a configuration. Raises UserError for data that cannot be read.

    rewards     reward -> weight, of the run, if it has its own: rows that nothing else can judge are judged by them
    """
    parts: dict[str, Any]
    if config.name == "calculator":
        parts = calculator.build(config.calculator, data=config.data, seed=config.seed)
    elif config.name == "random_walks":
        parts = random_walks.build(config.random_walks, seed=config.seed)
    elif config.name == "tool_calculator":
        parts = tool_calculator.build(config.tool_calculator, data=config.data, seed=config.seed)
    elif config.name == "rows":
        parts = rows.build(config.rows, data=config.data, seed=config.seed, rewards=rewards or {})
    else:
        parts = scored.build(config.scored, data=config.data, seed=config.seed)
    return Task(**parts)
