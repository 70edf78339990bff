"""`tandem data convert | split | merge | play`: episodes from one data set into others, or from a run's policy."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from experiment.errors import UserError

if TYPE_CHECKING:
    from embodied.datasets.source import Source

WRITTEN = ("lerobot", "minari", "d3rlpy")
"""`embodied.datasets.writing.WRITTEN`, known without importing anything heavy."""
_Opened = TypeVar("_Opened")


# ---------------------------------------------------------------- arguments


def _how(parser: argparse.ArgumentParser, *, default: str) -> None:
    parser.add_argument("--to", choices=WRITTEN, help=f"the format that is written{default}")
    parser.add_argument("--fps", type=int, metavar="N", help="LeRobot's steps a second (the source's; else 20)")


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tandem data convert`."""
    parser.add_argument("source", metavar="SRC", help="a data set of any format, or the id of a local Minari one")
    parser.add_argument("target", metavar="DST", help="a new folder; for d3rlpy a new file")
    parser.add_argument("--subset", metavar="NAME", help="only a filter key of robomimic's or a split of LeRobot's")
    parser.add_argument(
        "--done-means",
        choices=("truncated", "terminated"),
        help="how robomimic's episodes ended, which its files do not say (truncated)",
    )
    _how(parser, default="")


def split_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tandem data split`."""
    parser.add_argument("source", metavar="SRC", help="a data set of any format, or the id of a local Minari one")
    parser.add_argument("--out", nargs="+", required=True, metavar="DST", help="a new name for every part")
    parser.add_argument(
        "--fractions", nargs="+", type=float, required=True, metavar="F", help="of the episodes, for every part"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another draw (0)")
    _how(parser, default=" (the source's, where it is one of these; else lerobot)")


def merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tandem data merge`."""
    parser.add_argument("sources", nargs="+", metavar="SRC", help="data sets of any formats")
    parser.add_argument("--out", required=True, metavar="DST", help="a new name")
    _how(parser, default=" (the first source's, where it is one of these; else lerobot)")


def play_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tandem data play`."""
    parser.add_argument("run", metavar="RUN", help="the folder of a robot run that learned from states")
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="environment steps, about")
    parser.add_argument("--out", required=True, metavar="DST", help="a new folder; for d3rlpy a new file")
    parser.add_argument(
        "--checkpoint", choices=("last", "best", "all"), default="last", help="all: each plays its share (last)"
    )
    parser.add_argument("--deterministic", action="store_true", help="the policy's mode instead of samples")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other episodes (0)")
    _how(parser, default=" (minari)")


# ---------------------------------------------------------------- what the verbs do


def convert(arguments: argparse.Namespace) -> int:
    """Write a data set in another format; the same command goes on where it was interrupted."""
    from embodied.datasets.formats import open_dataset

    if arguments.to is None:
        raise UserError(f"tandem data convert: say --to which format: {', '.join(WRITTEN)}")
    source = told(lambda: open_dataset(arguments.source, subset=arguments.subset, done_means=arguments.done_means))
    _write(source, arguments.target, arguments.to, arguments.fps)
    return 0


def split(arguments: argparse.Namespace) -> int:
    """Draw the episodes of a data set into several."""
    from embodied.datasets.formats import open_dataset
    from embodied.datasets.selecting import Selection, split_indices

    if len(arguments.out) != len(arguments.fractions):
        raise UserError(
            f"tandem data split: {len(arguments.out)} names after --out and {len(arguments.fractions)} fractions: "
            "give one for every name"
        )
    if len(set(arguments.out)) < len(arguments.out):
        raise UserError("tandem data split: the parts need different names after --out")
    source = told(lambda: open_dataset(arguments.source))
    parts = split_indices(len(source), arguments.fractions, arguments.seed)
    to = arguments.to or _own(source)
    selections = {target: Selection(source, indices) for target, indices in zip(arguments.out, parts, strict=True)}
    for target in arguments.out:
        _fits(target, to)
    there = [target for target, part in selections.items() if Path(target).exists() and _holds(target, part)]
    interrupted = len(there) < len(parts)
    for target in arguments.out:
        if not (interrupted and target in there):
            _absent(target)
    for target, part in selections.items():
        if target in there:
            print(f"{target}: is there already, with these {len(part)} episodes")
        else:
            _write(part, target, to, arguments.fps)
    left = len(source) - sum(map(len, parts))
    if left:
        print(f"{left} of {len(source)} episodes are in no part: the fractions say so")
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Write several data sets as one, in their order."""
    from embodied.datasets.formats import open_dataset
    from embodied.datasets.selecting import Joined

    sources = [told(partial(open_dataset, path)) for path in arguments.sources]
    _write(Joined(sources), arguments.out, arguments.to or _own(sources[0]), arguments.fps)
    return 0


def play(arguments: argparse.Namespace) -> int:
    """Log what a run's policy does, or what every checkpoint of it did."""
    from embodied.logged.played import PlayedSource, play_policies, run_to_play, told_of
    from embodied.rollouts.workers import environment_spec

    if arguments.steps < 1 or arguments.seed < 0:
        raise UserError("tandem data play: --steps must be at least 1, --seed not negative")
    to = arguments.to or "minari"
    _absent(arguments.out)
    _fits(arguments.out, to)
    run = Path(arguments.run)
    environment, folders = run_to_play(run, arguments.checkpoint)
    episodes = play_policies(
        folders, environment, steps=arguments.steps, seed=arguments.seed, deterministic=arguments.deterministic
    )
    returns = [float(episode.rewards.sum()) for episode in episodes]
    print(f"{len(episodes)} episodes by {len(folders)} policies, mean return {sum(returns) / len(returns):.1f}")
    spec = environment_spec(environment)
    choices = spec.action_dim if spec.discrete else None
    _write(PlayedSource(episodes, run, told_of(environment), choices=choices), arguments.out, to, arguments.fps)
    return 0


# ---------------------------------------------------------------- parts


def told(open_it: Callable[[], _Opened]) -> _Opened:
    """What `open_it` opens; warnings become lines on stderr that do not say where in the source they came from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = open_it()
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return opened


def _own(source: Source) -> str:
    return source.kind if source.kind in WRITTEN else "lerobot"


def _absent(target: str) -> None:
    """Refuse a name that is taken before any part is written, not after the first one."""
    if Path(target).exists():
        raise UserError(f"{target}: exists already; choose another name")


def _holds(target: str, part: Source) -> bool:
    """Whether a data set is what an interrupted split has written already: as many episodes, each as long."""
    from embodied.datasets.formats import open_dataset

    try:
        return open_dataset(target).lengths == part.lengths
    except UserError:
        return False


def _fits(target: str, to: str) -> None:
    """A name that says HDF5 is d3rlpy's, the one format here that is a file."""
    if to != "d3rlpy" and Path(target).suffix in (".h5", ".hdf5"):
        raise UserError(f"{target}: {to} is a folder; say --to d3rlpy for such a file, or choose another name")


def _write(source: Source, target: str, to: str, fps: int | None) -> None:
    from embodied.datasets.lerobot_target import FPS
    from embodied.datasets.writing import write_dataset

    if fps is not None and fps < 1:
        raise UserError(f"--fps {fps}: must be at least 1")
    _fits(target, to)
    if to == "lerobot" and fps is None and source.fps is None:
        print(f"{source.path}: does not say its steps a second; {FPS} are assumed (--fps)", file=sys.stderr)
    said = time.monotonic()

    def progress(done: int) -> None:
        nonlocal said
        if time.monotonic() - said > 5:
            said = time.monotonic()
            print(f"{done} of {len(source)} episodes", file=sys.stderr)

    report = write_dataset(source, target, to, fps=fps, on_episode=progress)
    print(f"{target}: {report.episodes} episodes ({report.steps:,} steps) as {to}")
    if report.left_out:
        print(f"left out, because {to} has no place for them: {', '.join(report.left_out)}")
    if report.not_bootstrapped:
        print(
            f"{report.not_bootstrapped} truncated episodes do not say what was seen after their last action: "
            "that step cannot be bootstrapped"
        )
