"""Win rate of one policy's answers over another's, by any judge, every pair judged in both orders.

A judge that prefers what it reads first would give half its verdicts to the order (Zheng 2023, 2306.05685, section
3.3): a pair is won only if both orders say so; verdicts that contradict each other are a tie, and a tie is half a
win. What a judge cannot say (None) in either order is left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.own import is_own, load_own
from experiment.errors import UserError, user_errors
from llm_rlhf.data.chat import Chat
from llm_rlhf.data.columns import ColumnNames, kind_of, read_demonstration
from llm_rlhf.data.files import read_rows, text_column
from llm_rlhf.evaluation.results import Measure, Result
from llm_rlhf.evaluation.subject import question_of
from llm_rlhf.rewards.calls import RewardFunction, told_when_late
from llm_rlhf.rewards.reward_model import find_folder, reward_function

PairJudge = Callable[[str, str, str], str | None]
"""(prompt, a, b) -> "a", "b", "tie" or None = cannot say: what a user's `file.py:function` is."""
Judge = Callable[[Sequence[str], Sequence[str], Sequence[str]], list[str | None]]
"""The same for lists, so that a model can judge many at once; prompts that are conversations are `Chat`."""
VERDICTS = ("a", "b", "tie", None)
FLIPPED = {"a": "b", "b": "a", "tie": "tie", None: None}
POINTS = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt: a is the judged policy's, b its opponent's.

    group   what is drawn together for the interval (turns of one conversation, say); None = the prompt
    """

    prompt: str
    a: str
    b: str
    group: str | None = None


def load_judge(name: str, *, margin: float = 0.0) -> Judge:
    """A judge by name: `file.py:function` (prompt, a, b), or the folder of a reward model.

    margin      of a reward model: scores nearer than this are a tie

    Raises UserError where there is no such thing.
    """
    if is_own(name):
        with user_errors("judge"):
            function: PairJudge = load_own(name)
        if not callable(function):
            raise UserError(f"judge: {name}: a function is needed, got {type(function).__name__}")
        return one_by_one(function, name)
    if find_folder(name) is not None:
        return by_reward(reward_function(name), margin=margin)
    raise UserError(f"judge: {name}: neither path/to/file.py:function nor the folder of a reward model")


def one_by_one(function: PairJudge, name: str) -> Judge:
    """A user's function as a judge; it is given a conversation of one question as that question's text.

    A late one is waited for and told of. The judge raises UserError if it raises or gives no verdict.
    """

    def judge(prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[str | None]:
        found: list[str | None] = []
        for prompt, first, second in zip(prompts, a, b, strict=True):
            try:
                with told_when_late(lambda: f"judge: {name}"):
                    verdict = function(question_of(prompt), first, second)
            except Exception as error:  # whatever the user's function raises
                reason = " ".join(str(error).split()) or "no message"
                raise UserError(f"judge: {name}: it raised {type(error).__name__}: {reason}") from error
            if verdict not in VERDICTS:
                raise UserError(f"judge: {name}: it returned {verdict!r}; return 'a', 'b', 'tie' or None")
            found.append(verdict)
        return found

    return judge


def by_reward(function: RewardFunction, *, margin: float = 0.0) -> Judge:
    """A reward (a model's or a rule's) as a judge: the higher one wins, a difference within `margin` is a tie.

    Raises ValueError for a negative margin.
    """
    if margin < 0:
        raise ValueError(f"judge: the margin of a tie must not be negative, got {margin}")
    known: dict[tuple[str, str], float | None] = {}

    def score(prompts: Sequence[str], texts: Sequence[str]) -> list[float | None]:
        new = [pair for pair in dict.fromkeys(zip(prompts, texts, strict=True)) if pair not in known]
        if new:
            values = function(prompts=[prompt for prompt, _ in new], completions=[text for _, text in new])
            known.update(zip(new, values, strict=True))
        return [known[pair] for pair in zip(prompts, texts, strict=True)]

    def judge(prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[str | None]:
        verdicts: list[str | None] = []
        for first, second in zip(score(prompts, a), score(prompts, b), strict=True):
            if first is None or second is None or math.isnan(first) or math.isnan(second):
                verdicts.append(None)
            elif abs(first - second) <= margin:
                verdicts.append("tie")
            else:
                verdicts.append("a" if first > second else "b")
        return verdicts

    return judge


def win_rate(pairs: Sequence[Pair], judge: Judge) -> Result:
    """Judge every pair in both orders.

    Measures, each with a bootstrap interval over groups, which are prompts (a group's pairs are averaged first):
        win_rate            a's, a tie half
        won, lost           shares of pairs with a winner in both orders
        position_bias       share of decided verdicts for the answer shown first, less that for the second: 0 is
                            fair, 1 always the first; absent where nothing was ever decided
        consistent          share of pairs judged alike in both orders
        longer_won          share of decided pairs of different length (characters) that the longer answer won

    Raises UserError if there are no pairs, or the judge could say nothing of any.
    """
    if not pairs:
        raise UserError("win rate: there are no pairs to judge")
    prompts = [pair.prompt for pair in pairs]
    first = judge(prompts, [pair.a for pair in pairs], [pair.b for pair in pairs])
    second = judge(prompts, [pair.b for pair in pairs], [pair.a for pair in pairs])
    points: dict[str, dict[str, list[float]]] = {
        name: {} for name in ("win_rate", "won", "lost", "position_bias", "consistent", "longer_won")
    }

    def add(name: str, pair: Pair, value: float) -> None:
        points[name].setdefault(pair.prompt if pair.group is None else pair.group, []).append(value)

    rows, unjudged = [], 0
    for pair, shown, swapped in zip(pairs, first, second, strict=True):
        verdict = verdict_of(shown, swapped)
        rows.append(
            {
                "prompt": question_of(pair.prompt),
                "a": pair.a,
                "b": pair.b,
                "orders": [shown, FLIPPED[swapped]],
                "verdict": verdict,
            }
        )
        if verdict is None:
            unjudged += 1
            continue
        add("win_rate", pair, POINTS[verdict])
        add("won", pair, float(verdict == "a"))
        add("lost", pair, float(verdict == "b"))
        add("consistent", pair, float(shown == FLIPPED[swapped]))
        for one in (shown, swapped):  # each in its own order: "a" is what was shown first
            if one != "tie":
                add("position_bias", pair, 1.0 if one == "a" else -1.0)
        if verdict != "tie" and len(pair.a) != len(pair.b):
            add("longer_won", pair, float((verdict == "a") == (len(pair.a) > len(pair.b))))
    if unjudged == len(pairs):
        raise UserError(f"win rate: the judge could say nothing of any of the {len(pairs)} pairs")
    measures = {
        name: Measure([sum(values) / len(values) for values in found.values()], share=name != "position_bias")
        for name, found in points.items()
        if found
    }
    counts = {
        "pairs": len(pairs),
        "groups": len(points["win_rate"]),
        "unjudged": unjudged,
        "length_a": sum(len(pair.a) for pair in pairs) / len(pairs),
        "length_b": sum(len(pair.b) for pair in pairs) / len(pairs),
    }
    return Result(measures, counts, rows=rows)


def verdict_of(shown: str | None, swapped: str | None) -> str | None:
    """What two verdicts on a pair, the second with the answers swapped, amount to, in the first one's terms."""
    back = FLIPPED[swapped]
    if shown is None or back is None:
        return None
    return shown if shown == back else "tie"


def read_answers(path: str | Path) -> dict[str, list[str]]:
    """A file of answers (any that holds rows): prompt -> its completions, as training reads them.

    Of a comparison the answer is the chosen one, of a conversation the assistant's first; rows that show nothing
    good (equal or empty answers, a thumb down) are left out. Raises UserError naming the row.
    """
    names = ColumnNames()
    found: dict[str, list[str]] = {}
    for row in read_rows(path):
        if kind_of(row.columns, names) == "language modeling" and row.columns.get(names.messages) is None:
            text_column(row.columns, names.completion, row.place)  # texts answer nothing
        example = read_demonstration(row, names)
        if not isinstance(example, str):
            answer = example.completion
            first = str(answer.messages[0]["content"]) if isinstance(answer, Chat) else answer
            found.setdefault(example.prompt, []).append(first)
    if not found:
        raise UserError(f"{path}: there are no answers in it")
    return found


def paired(a: dict[str, list[str]], b: dict[str, list[str]], *, source: str) -> list[Pair]:
    """Every prompt's answers, the first with the first and so on. source: b's, for messages.

    Raises UserError for a prompt that only one side answered, or not as often.
    """
    pairs = []
    for prompt, answers in a.items():
        others = b.get(prompt, [])
        if len(others) != len(answers):
            raise UserError(
                f"{source}: {len(others)} answers to the prompt {prompt[:40]!r}, the other side has {len(answers)}"
            )
        pairs += [Pair(prompt, one, other) for one, other in zip(answers, others, strict=True)]
    extra = [prompt for prompt in b if prompt not in a]
    if extra:
        raise UserError(f"{source}: {len(extra)} prompts that the other side did not answer, as {extra[0][:40]!r}")
    return pairs
