"""`tandem data`: look at data sets, check them, watch them, record them; `data_files` converts them."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.errors import UserError
from tandem import data_files, data_text
from tandem.data_files import told

if TYPE_CHECKING:
    from embodied.datasets.lerobot import LeRobotDataset
    from embodied.datasets.lerobot_stats import Stats
    from embodied.datasets.source import Source
    from embodied.recording.record import RecordReport

_MOST_TASKS = 20
_MOST_PROBLEMS = 100


# ---------------------------------------------------------------- arguments


def _folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a data set of any format, or the id of a local Minari one")


def _validate_arguments(parser: argparse.ArgumentParser) -> None:
    _folder(parser)
    data_text.arguments(parser)


def view_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tandem data view`."""
    _folder(parser)
    parser.add_argument("--episode", type=int, default=0, metavar="N", help="which one, from 0 (0)")
    parser.add_argument("--camera", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    parser.add_argument("--sheet", action="store_true", help="one picture instead of a video")
    parser.add_argument("--out", metavar="FILE", help="PATH_episode_N.mp4, or .png, in this folder")


def record_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tandem data record`."""
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--expert", action="store_true", help="the scripted expert acts")
    who.add_argument("--teleop", action="store_true", help="you steer, in a window")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder, or one to go on with")
    parser.add_argument(
        "--episodes", type=int, metavar="N", help="how many it holds in the end (200; by hand: until you end)"
    )
    parser.add_argument(
        "--tasks", default="", metavar="A,B", help="reach, push, pick, place, stack (all); your own: FILE.py:NAME"
    )
    parser.add_argument("--seed", type=int, help="the same seed, the same scenes (0; by hand: new ones every time)")
    parser.add_argument("--image-size", type=int, default=64, metavar="PIXELS", help="above 128: videos (64)")
    parser.add_argument("--cameras", default="front", metavar="A,B", help="front, wrist (front)")
    parser.add_argument("--combinations", default="train", help="of colours and shapes: train, held_out, all")
    parser.add_argument("--phrasing", default="train", help="train, synonyms; your own: FILE.py:NAME")
    parser.add_argument(
        "--randomization", metavar="PRESET", help="none, mild, full, reality (none); your own: FILE.yaml"
    )
    expert = parser.add_argument_group("of the expert")
    expert.add_argument("--noise", type=float, help="highest level of noise in an episode, 0 to 0.5 (0.2)")
    expert.add_argument("--keep-failures", action="store_true", help="do not play again what failed")
    expert.add_argument("--workers", type=int, metavar="N", help="processes that play (2)")
    hand = parser.add_argument_group("by hand")
    hand.add_argument("--device", choices=("keyboard", "gamepad"), help="to steer with (keyboard)")
    hand.add_argument("--time-limit", type=int, metavar="STEPS", help="of an episode; 10 are a second (300)")


# ---------------------------------------------------------------- what the verbs do


def inspect(arguments: argparse.Namespace) -> int:
    """Counts, features, instructions, success rate, ranges of the actions."""
    from embodied.datasets.formats import open_dataset
    from embodied.datasets.lerobot_source import LeRobotSource

    source = told(lambda: open_dataset(arguments.path))
    return _inspect_lerobot(source.dataset) if isinstance(source, LeRobotSource) else _inspect_any(source)


def _inspect_lerobot(dataset: LeRobotDataset) -> int:
    """Describe a LeRobot data set from its `meta/` alone."""
    from embodied.datasets.lerobot_layout import DONE, REWARD, TRUNCATED

    lengths = [entry.length for entry in dataset.episodes]
    minutes = sum(lengths) / dataset.fps / 60
    spread = f"; {min(lengths)} to {max(lengths)} frames" if lengths else ""
    print(f"data set   {dataset.folder}" + (f" (robot {dataset.robot_type})" if dataset.robot_type else ""))
    print(f"episodes   {len(lengths):,} ({sum(lengths):,} frames, {minutes:.1f} min at {dataset.fps} fps{spread})")
    ended = dataset.statistic(DONE, "max")
    if None not in ended:
        known = TRUNCATED in dataset.features
        cut = dataset.statistic(TRUNCATED, "max") if known else [not one for one in dataset.successes()]
        truncated = [not done or bool(short) for done, short in zip(ended, cut, strict=True)]
        _print_ends(len(lengths) - sum(truncated), sum(truncated), sum(compress(dataset.final_known(), truncated)))
    means = dataset.statistic(REWARD, "mean")
    _print_returns([mean * length for mean, length in zip(means, lengths, strict=True) if mean is not None])
    print(f"success    {_success(dataset.successes())}")
    features = [(name, one.dtype, one.shape) for name, one in dataset.features.items()]
    _print_features(features, dataset.stats)
    _print_tasks([task for entry in dataset.episodes for task in entry.tasks])
    return 0


def _inspect_any(source: Source) -> int:
    """Describe a data set by reading every episode, one at a time; the pictures of the first only."""
    from embodied.datasets.overview import overview

    found = overview(source)
    spread = f"; {min(source.lengths)} to {max(source.lengths)} steps" if len(source) else ""
    print(f"data set   {source.path} ({source.kind})")
    print(f"episodes   {len(source):,} ({sum(source.lengths):,} steps{spread})")
    _print_ends(found.terminated, found.truncated, found.final)
    _print_returns(found.returns)
    print(f"success    {_success(found.successes)}")
    _print_features(found.features, found.stats)
    if any(found.instructions):
        _print_tasks(found.instructions)
    return 0


def _print_ends(terminated: int, truncated: int, final: int) -> None:
    """final: how many of the truncated episodes have their final observation."""
    print(f"ends       {terminated:,} terminated, {truncated:,} truncated")
    if truncated:
        print(f"           {final:,} of these say what was seen after the last action")


def _print_returns(returns: Sequence[float]) -> None:
    if returns:
        low, high = min(returns), max(returns)
        print(f"returns    {sum(returns) / len(returns):.4g} on average, {low:.4g} to {high:.4g}")


def validate(arguments: argparse.Namespace) -> int:
    """Every problem on a line; exit code 1 if there is one."""
    if data_text.is_text(arguments.path):
        return data_text.validate(arguments)
    from embodied.datasets.check import problems

    said, looked_at = time.monotonic(), 0

    def progress(index: int) -> None:
        nonlocal said, looked_at
        looked_at = index + 1
        if time.monotonic() - said > 5:
            said = time.monotonic()
            print(f"{looked_at} episodes checked", file=sys.stderr)

    found = 0
    for problem in problems(arguments.path, progress):
        found += 1
        if found <= _MOST_PROBLEMS:
            print(problem)
    if found > _MOST_PROBLEMS:
        print(f"and {found - _MOST_PROBLEMS} more")
    print(f"{looked_at} episodes checked: {found or 'no'} problem{'' if found == 1 else 's'}")
    return 1 if found else 0


def view(arguments: argparse.Namespace) -> int:
    """Write an episode as a video, or as one picture, and say where."""
    from PIL import Image

    from embodied.datasets.curves import draw_curves
    from embodied.datasets.drawing import film, sheet
    from embodied.datasets.formats import open_dataset
    from embodied.datasets.lerobot_target import FPS
    from experiment.errors import storage_errors
    from experiment.video import write_mp4

    kind = Path(arguments.out).suffix if arguments.out else (".png" if arguments.sheet else "")
    if kind not in (".mp4", ".png", "") or (arguments.out and not kind) or (kind == ".mp4" and arguments.sheet):
        raise UserError(f"--out {arguments.out}: a video ends in .mp4, a sheet (--sheet) in .png")
    source = told(lambda: open_dataset(arguments.path))
    episode = source.read(arguments.episode)
    cameras = tuple(arguments.camera)
    seen = bool(episode.images or cameras)
    kind = kind or (".mp4" if seen else ".png")
    path = Path(arguments.out or f"{source.path.resolve().stem}_episode_{arguments.episode:03d}{kind}")
    if not seen and kind == ".mp4":
        raise UserError(f"--out {arguments.out}: {episode.name} has no pictures; its curves go to a .png")
    if not seen:
        draw_curves(episode, path)
    elif kind == ".mp4":
        write_mp4(film(episode, cameras), path, source.fps or FPS)
    else:
        picture = sheet(episode, cameras)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    words = f"{episode.instruction!r}, " if episode.instruction else ""
    print(f"{words}{len(episode)} {'frames' if seen else 'steps'}")
    print(path)
    return 0


def record(arguments: argparse.Namespace) -> int:
    """Record demonstrations; the same command goes on where it was interrupted."""
    if not (arguments.expert or arguments.teleop):
        raise UserError("tandem data record: say who acts: --expert or --teleop")
    of_others = ("device", "time_limit") if arguments.expert else ("noise", "keep_failures", "workers")
    for name in of_others:
        given = getattr(arguments, name)
        if given is not None and given is not False:
            actor, other = ("--expert", "--teleop") if arguments.expert else ("--teleop", "--expert")
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"tandem data record: {option} is for {other}; leave it out with {actor}")
    return _record_expert(arguments) if arguments.expert else _record_by_hand(arguments)


def _record_settings(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What both ways to record take, and `names`; what was not given keeps the configuration's default."""
    from envs.table.language import TASKS

    if arguments.seed is not None and arguments.seed < 0:
        raise UserError(f"tandem data record: --seed must not be negative, got {arguments.seed}")
    names = ("episodes", "seed", "image_size", "combinations", "phrasing", "randomization", *names)
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return given | {"tasks": tuple(_listed(arguments.tasks)) or TASKS, "cameras": tuple(_listed(arguments.cameras))}


def _record_by_hand(arguments: argparse.Namespace) -> int:
    from embodied.recording.teleop import TeleopConfig, record_by_hand

    config = TeleopConfig(arguments.out, **_record_settings(arguments, "device", "time_limit"))
    if record_by_hand(config):
        print(f"look at them: tandem data inspect {arguments.out}; tandem data view {arguments.out}")
    return 0


def _record_expert(arguments: argparse.Namespace) -> int:
    from embodied.recording.record import RecordConfig, record_expert

    config = RecordConfig(**_record_settings(arguments, "noise", "keep_failures", "workers"))
    began = said = time.monotonic()

    def progress(held: int, report: RecordReport) -> None:
        nonlocal said
        if time.monotonic() - said > 5:
            said = time.monotonic()
            left = (config.episodes - held) * (said - began) / report.written
            print(f"{held} of {config.episodes} episodes, {left / 60:.1f} min left", file=sys.stderr)

    report = record_expert(arguments.out, config, progress)
    if report.written:
        _print_played(report)
        seconds = time.monotonic() - began
        print(f"wrote {report.written} episodes ({report.frames:,} frames) in {seconds:.0f} s")
    else:
        print(f"{arguments.out} holds {config.episodes} episodes or more already; --episodes asks for more")
    print(f"look at them: tandem data inspect {arguments.out}; tandem data view {arguments.out}")
    return 0


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": inspect,
    "validate": validate,
    "view": view,
    "record": record,
    "convert": data_files.convert,
    "split": data_files.split,
    "merge": data_files.merge,
    "play": data_files.play,
}
ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "inspect": _folder,
    "validate": _validate_arguments,
    "view": view_arguments,
    "record": record_arguments,
    "convert": data_files.convert_arguments,
    "split": data_files.split_arguments,
    "merge": data_files.merge_arguments,
    "play": data_files.play_arguments,
}


# ---------------------------------------------------------------- parts


def _listed(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def _rate(successes: int, attempts: int) -> str:
    from experiment.statistics import wilson_interval

    low, high = wilson_interval(successes, attempts)
    return f"{successes} of {attempts} ({successes / attempts:.1%}, 95% interval {low:.1%} to {high:.1%})"


def _success(successes: Sequence[bool | None]) -> str:
    known = [success for success in successes if success is not None]
    return _rate(sum(known), len(known)) if known else "not recorded"


def _show(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _print_features(features: Sequence[tuple[str, str, tuple[int, ...]]], found: Stats) -> None:
    rows: list[tuple[str, ...]] = []
    for name, dtype, shape in features:
        stats = found.get(name, {})
        known = {"min", "max"} <= stats.keys()
        span = f"{stats['min'].min():.3g} to {stats['max'].max():.3g}" if known else ""
        rows.append((name, dtype, "x".join(map(str, shape)), span))
    _show(("feature", "type", "shape", "range"), rows)
    stats, keys = found.get("action", {}), ("min", "max", "mean", "std")
    if stats.keys() >= set(keys):
        columns = [stats[key].ravel() for key in keys]
        rows = [
            (str(number), *(f"{value:.3f}" for value in row))
            for number, row in enumerate(zip(*columns, strict=True))
        ]
        _show(("action", *keys), rows)


def _print_tasks(tasks: Sequence[str]) -> None:
    counts = Counter(tasks)
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [(task, str(count)) for task, count in most[:_MOST_TASKS]]
    _show(("instruction", "episodes"), rows)
    if len(most) > _MOST_TASKS:
        print(f"and {len(most) - _MOST_TASKS} more instructions")


def _print_played(report: RecordReport) -> None:
    rows = [
        (task, _rate(report.successes.get(task, 0), attempts)) for task, attempts in sorted(report.attempts.items())
    ]
    if len(rows) > 1:
        rows.append(("all", _rate(sum(report.successes.values()), sum(report.attempts.values()))))
    _show(("task", "the expert's success"), rows)
