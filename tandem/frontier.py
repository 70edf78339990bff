"""`tandem frontier RUN RUN ... [--best-of N]`: reward against KL, best-of-n beside, and where gold turns."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiment.errors import UserError
from experiment.figures import require_png

if TYPE_CHECKING:
    from llm_rlhf.evaluation.frontier import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="runs of llm/ppo, llm/grpo or llm/iterative_dpo that validated")
    add("--best-of", type=int, default=0, metavar="N", help="draw N samples a prompt of the first run's start, too")
    add("--prompts", type=int, default=200, metavar="P", help="of so many validation prompts (200)")
    add("--seed", type=int, default=10_000, metavar="S", help="of those draws (10000)")
    add("--save", metavar="FILE", default="frontier.png", help="where the picture goes (frontier.png)")


def frontier(arguments: argparse.Namespace) -> int:
    """Print every run's course and what was fitted to it, and draw all of them.

    Raises UserError for a run that logged no KL beside its validation, or a start that the first run did not keep.
    """
    from llm_rlhf.evaluation.frontier import draw, rows_of_run
    from llm_rlhf.evaluation.frontier import frontier as fit_frontier
    from tandem.verbs import find_run

    if arguments.best_of < 0 or arguments.prompts < 1:
        raise UserError("tandem frontier: --best-of must be at least 0 and --prompts at least 1")
    picture = require_png(arguments.save, option="--save")
    folders = [find_run(run) for run in arguments.runs]
    rows: list[Row] = []
    for folder in dict.fromkeys(folders):
        rows += rows_of_run(folder)
    if arguments.best_of:
        rows += best_of_start(folders[0], arguments.best_of, prompts=arguments.prompts, seed=arguments.seed)
    found = fit_frontier(rows)
    print_rows(rows)
    for line in found.lines():
        print(line)
    draw(found, picture)
    print(f"written to {arguments.save}")
    return 0


def best_of_start(folder: Path, most: int, *, prompts: int, seed: int) -> list[Row]:
    """Best of 1, 2, 4, ... `most` of the policy that a run began with, chosen by the rewards that it climbed."""
    from llm_rlhf.evaluate import EvaluateConfig, measure_run
    from llm_rlhf.evaluation.frontier import rows_of_best_of

    sizes = tuple(dict.fromkeys([*(2**power for power in range(most.bit_length())), most]))
    config = EvaluateConfig(
        splits=("validation",), samples=most, checkpoint="start", best_of=sizes, seed=seed, prompts=prompts
    )
    return rows_of_best_of(measure_run(folder, config)[1]["validation"])


def print_rows(rows: Sequence[Row]) -> None:
    """The points as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "step or n", "KL (nats)", "gold", "climbed", box=box.SIMPLE_HEAD)
    for row in rows:
        gold, proxy = ("" if value is None else f"{value:.4g}" for value in (row.gold, row.proxy))
        table.add_row(row.label, str(row.step), f"{row.kl:.3g}", gold, proxy)
    Console().print(table)
