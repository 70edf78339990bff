"""Counting what a policy did at the table: rates by task, instruction, shape and colour; a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from embodied.vla.seats import TableEpisode
from experiment.statistics import bootstrap_interval, wilson_interval


def rate(won: Sequence[bool], name: str) -> dict[str, Any]:
    """{NAME: share, NAME_interval: its 95% Wilson interval}."""
    low, high = wilson_interval(sum(won), len(won))
    return {name: sum(won) / len(won), f"{name}_interval": [low, high]}


def once(episodes: Sequence[TableEpisode]) -> list[bool]:
    """Whether the goal was met at any time, episode by episode."""
    return [bool(episode.record.success_once) for episode in episodes]


def outcome(episodes: Sequence[TableEpisode]) -> dict[str, Any]:
    """episodes, successes, success_once with its interval."""
    won = once(episodes)
    return {"episodes": len(won), "successes": sum(won), **rate(won, "success_once")}


def figures(episodes: Sequence[TableEpisode], *, at_end: bool = False) -> dict[str, Any]:
    """All figures of some episodes.

    success_once            share whose goal was met; success_at_end: and still at the time limit, with `at_end`
    success_of_original     for swapped words: share that did what the scene's first words asked for
    lost                    ended without success because a named object left the table's useful part
    mean_length             control steps, with a bootstrap interval
    """
    lengths = [episode.record.length for episode in episodes]
    at_the_end = [bool(episode.record.success_at_end) for episode in episodes]
    found = outcome(episodes)
    if at_end:
        found |= rate(at_the_end, "success_at_end")
    original = [episode.success_of_original for episode in episodes]
    if any(did is not None for did in original):
        found |= rate([bool(did) for did in original], "success_of_original")
    lost = [
        episode.record.terminated and not success for episode, success in zip(episodes, at_the_end, strict=True)
    ]
    return found | {
        "lost": sum(lost),
        "mean_length": float(np.mean(lengths)),
        "mean_length_interval": list(bootstrap_interval(lengths)),
    }


def suite_figures(episodes: Sequence[TableEpisode], *, at_end: bool = False) -> dict[str, Any]:
    """Figures over all episodes and by task; success by instruction (goal), shape and colour of the named object.

    outcomes: task -> "1" or "0" for each initial state in turn, to compare two policies state by state.
    """
    tasks = _groups(episodes, lambda episode: episode.task)

    def by(name: Callable[[str], str]) -> dict[str, Any]:
        groups = _groups(episodes, lambda episode: name(episode.goal))
        return {key: outcome(groups[key]) for key in sorted(groups)}

    return {
        **figures(episodes, at_end=at_end),
        "tasks": {task: figures(played, at_end=at_end) for task, played in tasks.items()},
        "goals": by(lambda goal: goal),
        "shapes": by(lambda goal: goal.split()[2]),  # "TASK COLOUR SHAPE ..."
        "colours": by(lambda goal: goal.split()[1]),
        "outcomes": {task: "".join(str(int(won)) for won in once(played)) for task, played in tasks.items()},
    }


def _groups(episodes: Sequence[TableEpisode], name: Callable[[TableEpisode], str]) -> dict[str, list[TableEpisode]]:
    groups: dict[str, list[TableEpisode]] = {}
    for episode in episodes:
        groups.setdefault(name(episode), []).append(episode)
    return groups


def table(report: Mapping[str, Any]) -> str:
    """Success by task and suite as text, "83% [76, 88]" in each cell: share and 95% interval."""
    columns: list[tuple[str, dict[str, str]]] = []
    for suite, found in report["suites"].items():
        for name, title in (
            ("success_once", suite),
            ("success_at_end", f"{suite}, at end"),
            ("success_of_original", f"{suite}, original"),
        ):
            if name in found:
                groups = {**found["tasks"], "all": found}
                columns.append((title, {row: _cell(numbers, name) for row, numbers in groups.items()}))
    rows = list(dict.fromkeys(row for _, cells in columns for row in cells))
    widths = [max(len(title), *map(len, cells.values())) for title, cells in columns]
    first = max(map(len, ["task", *rows]))
    lines = [
        "task".ljust(first) + "".join(f"  {title:>{w}}" for (title, _), w in zip(columns, widths, strict=True))
    ]
    for row in rows:
        cells = (f"  {cells.get(row, ''):>{w}}" for (_, cells), w in zip(columns, widths, strict=True))
        lines.append(row.ljust(first) + "".join(cells))
    return "\n".join(lines)


def describe(report: Mapping[str, Any]) -> str:
    """What was judged, the table, and what a reader must know about it."""
    config, policy = report["config"], report["policy"]
    floor = "" if policy["ablate"] == "none" else f", a floor: {policy['ablate']} replaced by zeros"
    lines = [
        f"policy    {policy['folder']}{floor}",
        f"played    {config['episodes']} episodes of each task, initial states from {report['first_seed']} on, "
        + ("the policy's mode" if config["deterministic"] else "sampled actions"),
    ]
    if "randomized" in report["suites"]:
        lines.append(f"          randomized: preset {config['randomization']!r}")
    if report["unknown_words"]:
        lines.append(f"          words that the policy never met: {', '.join(report['unknown_words'])}")
    return "\n".join([*lines, "", table(report)])


def _cell(numbers: Mapping[str, Any], name: str) -> str:
    low, high = numbers[f"{name}_interval"]
    return f"{100 * numbers[name]:.0f}% [{100 * low:.0f}, {100 * high:.0f}]"
