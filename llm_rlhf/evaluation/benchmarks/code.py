"""HumanEval (Chen 2021, 2107.03374): complete a function; unit tests say whether it is right.

The completions are programs that are run: `evaluation.sandbox` says what that is protected from, and what not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from experiment.errors import UserError
from llm_rlhf.data.files import read_rows, text_column
from llm_rlhf.evaluation.results import Measure, Result
from llm_rlhf.evaluation.sandbox import LIMITS, Limits, Ran, protection, run_program

STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nimport ", "\nfrom ", "\n```")
"""What can only stand behind the function's body (after the paper's section 2.2), for models asked to complete."""
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?\S.*?)(?:\n```|\Z)", re.DOTALL)
"""A block with something in it: a fence behind which there is nothing closes what stands before it."""
COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


@dataclass(frozen=True)
class CodeItem:
    """HumanEval's columns: prompt is a signature with docstring, test defines check(candidate)."""

    task_id: str
    prompt: str
    canonical_solution: str
    test: str
    entry_point: str


def read_humaneval(path: str | Path) -> list[CodeItem]:
    """HumanEval's jsonl (or jsonl.gz). Raises UserError naming the line and the column."""
    items = [CodeItem(*(text_column(row.columns, name, row.place) for name in COLUMNS)) for row in read_rows(path)]
    if not items:
        raise UserError(f"{path}: there are no problems in it")
    return items


def program_of(item: CodeItem, completion: str) -> str:
    """The program that passes if the completion is right.

    A completion is the rest of the function, or, from a model that was asked in a conversation, text with a fenced
    block of Python; a block that defines the function replaces the prompt's, whose imports and helpers stay.
    """
    fenced = FENCE.search(completion)
    body = fenced.group(1) if fenced else completion.split("\n```", 1)[0]
    if re.search(rf"^def {re.escape(item.entry_point)}\b", body, re.MULTILINE):
        written = f"{item.prompt.rstrip()}\n    pass\n\n\n{body}"
    else:
        written = item.prompt + body
    return f"{written}\n\n{item.test}\n\ncheck({item.entry_point})\n"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that some of k samples passes, unbiased (2107.03374, equation 1).

    Raises ValueError unless 1 <= k <= samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, there are {samples}")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def require_allowed(allowed: bool) -> None:
    """Programs that a model wrote run only if the user wants that. Raises UserError where not."""
    if not allowed:
        raise UserError(
            "this benchmark runs programs that a model wrote; say --allow-code-execution if that is what you want "
            "(docs/language_evaluation.md says what they are kept from, and what not)"
        )


def run_all(
    items: Sequence[CodeItem],
    completions: Sequence[Sequence[str]],
    *,
    allowed: bool,
    limits: Limits = LIMITS,
    workers: int = 1,
) -> list[list[Ran]]:
    """Run every completion of every item. Raises UserError unless the user has `allowed` it, or if nothing runs."""
    require_allowed(allowed)
    canary = run_program("pass", limits)
    if canary.outcome != "passed":
        raise UserError(f"programs cannot be run here: an empty one {canary.outcome}: {canary.said}")
    programs = [program_of(item, text) for item, texts in zip(items, completions, strict=True) for text in texts]
    with ThreadPoolExecutor(max_workers=workers) as pool:
        ran = iter(list(pool.map(lambda program: run_program(program, limits), programs)))
    return [[next(ran) for _ in texts] for texts in completions]


def score_humaneval(
    items: Sequence[CodeItem],
    completions: Sequence[Sequence[str]],
    ran: Sequence[Sequence[Ran]],
    *,
    ks: Sequence[int] = (1, 10, 100),
) -> Result:
    """pass@k for every k that there are samples for; intervals by bootstrap (k = 1 of one sample: Wilson)."""
    samples = min(len(outcomes) for outcomes in ran)
    passed = [sum(one.outcome == "passed" for one in outcomes) for outcomes in ran]
    measures = {
        f"pass@{k}": Measure([pass_at_k(len(one), right, k) for one, right in zip(ran, passed, strict=True)])
        for k in ks
        if k <= samples
    }
    flat = [one for outcomes in ran for one in outcomes]
    rows = [
        {
            "task_id": item.task_id,
            "completions": list(texts),
            "outcomes": [one.outcome for one in outcomes],
            "said": [one.said for one in outcomes],
        }
        for item, texts, outcomes in zip(items, completions, ran, strict=True)
    ]
    counts = {"problems": len(items), "samples": samples, "timeouts": sum(one.outcome == "timeout" for one in flat)}
    broken = [one.said for one in flat if one.outcome == "broken"]
    if broken:
        raise UserError(f"{len(broken)} programs could not be started, the first: {broken[0]}")
    return Result(measures, counts, notes=[protection().line()], rows=rows)
