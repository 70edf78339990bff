"""What the verbs of the command line do, once their arguments are understood."""

from __future__ import annotations

import dataclasses
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.config import build, read_tree, to_yaml
from experiment.errors import UserError
from tandem.recipes import evaluator_for, find_config, read_plan, suggest


def train(config: str, overrides: Sequence[str]) -> int:
    """Train from a YAML file, then say where the run is and what to type next."""
    plan = read_plan(find_config(config), overrides)
    result = plan.module.train(plan.config)
    say_next(result.folder)
    return 0


def dry_run(config: str, overrides: Sequence[str]) -> int:
    """Try everything once, one update long, in a temporary folder that is deleted afterwards."""
    plan = read_plan(find_config(config), overrides)
    with tempfile.TemporaryDirectory(prefix="tandem-dry-run-") as folder:
        run = dataclasses.replace(plan.config.run, dry_run=True, folder=str(Path(folder, "run")))
        plan.module.train(dataclasses.replace(plan.config, run=run))
    print("dry run passed")
    return 0


def resume(run: str) -> int:
    """Continue a run from its last checkpoint."""
    folder = find_run(run)
    plan = read_plan(folder / "config.yaml")
    plan.module.train(plan.config, resume=folder)
    say_next(folder)
    return 0


def evaluate(run: str, overrides: Sequence[str]) -> int:
    """Evaluate a run's checkpoint and print the table."""
    folder = find_run(run)
    room = evaluator_for(str(read_tree(folder / "config.yaml").pop("recipe")))
    settings = dataclasses.replace(read_tree(os.devnull, overrides), source="command line")
    results = room.evaluate_run(folder, build(settings, room.EvaluateConfig))
    getattr(room, "print_results", print_results)(results)
    print(f"written to {folder / 'eval.json'}")
    return 0


def compare(runs: Sequence[str], metrics: Sequence[str], over: str, picture: str) -> int:
    """Print what differs between runs and draw their curves."""
    from experiment.compare import compare as compare_runs

    if len(runs) < 2:
        raise UserError("tandem compare: name at least two runs, as in `tandem compare RUN RUN`")
    folders = [find_run(run) for run in runs]
    compare_runs(folders, metrics=metrics or ("*",), over=over, figure=Path(picture))
    return 0


def show_config(config: str, overrides: Sequence[str]) -> int:
    """Print the merged configuration as YAML."""
    plan = read_plan(find_config(config), overrides)
    print(to_yaml(plan.config, recipe=plan.recipe), end="")
    return 0


# ---------------------------------------------------------------- parts


def find_run(name: str) -> Path:
    """The run folder the user means: a path, or a name under runs/.

    Raises:
        UserError: there is no such folder, or no run in it; the message names the nearest one.
    """
    places = [Path(name), Path("runs") / name]
    for folder in places:
        if (folder / "config.yaml").is_file():
            return folder
    if any(folder.is_dir() for folder in places):
        raise UserError(f"{name}: not a run folder (no config.yaml in it)")
    known = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    hint = suggest(Path(name).name, known) if known else "there are no runs under runs/ here"
    raise UserError(f"{name}: no such run; {hint}")


def say_next(folder: Path) -> None:
    """Where the run is, and the commands that usually follow."""
    quoted = shlex.quote(str(folder))
    print(f"\nrun       {folder}")
    print(f"evaluate  tandem eval {quoted}")
    print(f"go on     tandem resume {quoted}")
    print(f"compare   tandem compare {quoted} OTHER_RUN")


def print_results(results: Mapping[str, Any]) -> None:
    """An evaluation as a table; `NAME_interval` stands beside NAME."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("result", "value", "95% interval", box=box.SIMPLE_HEAD)
    for name, value, interval in result_rows(results):
        table.add_row(name, value, interval)
    Console().print(table)


def result_rows(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, value, interval) of every number in a result, which may be nested by split or task.

    The 95% interval of NAME is NAME_interval (two numbers), or NAME_low and NAME_high.
    """
    bounds = {}
    for name in results:
        if f"{name}_interval" in results:
            bounds[name] = results[f"{name}_interval"]
        elif f"{name}_low" in results and f"{name}_high" in results:
            bounds[name] = (results[f"{name}_low"], results[f"{name}_high"])
    ends = {f"{name}_{end}" for name in bounds for end in ("interval", "low", "high")}
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from result_rows(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ends:
            interval = "{:.4g} to {:.4g}".format(*bounds[name]) if name in bounds else ""
            yield prefix + name, f"{value:.4g}", interval
