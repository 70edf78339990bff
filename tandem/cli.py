"""The command line: `tandem VERB ...`.

Nothing heavy is imported until a verb needs it, so that `tandem --help` answers at once. Mistakes and failures of
the surroundings are one line and exit code 2; bugs keep their traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from envs.graphics import choose_backend
from experiment.errors import UserError
from tandem import __version__
from tandem.failures import explain
from tandem.recipes import suggest

USER_ERROR, INTERRUPTED = 2, 130
_PYTHONS = warnings.formatwarning


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are a `UserError` like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Attributes:
        usage: its arguments, as the help shows them.
        help: one line.
        more: what `tandem VERB --help` says besides.
        arguments: adds the arguments to a parser.
        act: does it; returns the exit code.
    """

    usage: str
    help: str
    more: str
    arguments: Callable[[argparse.ArgumentParser], None]
    act: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    warnings.formatwarning = _one_line
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone; Python must not complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return USER_ERROR


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning for users without the place in the program; others (of deprecated calls) with it."""
    if category is UserWarning:
        return f"warning: {' '.join(str(message).split())}\n"
    return _PYTHONS(message, category, filename, lineno, line)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"tandem {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if any(verb.startswith(f"{name} ") for verb in VERBS):  # a family of verbs, as `tandem data ...`
        if not rest or rest[0] in ("-h", "--help"):
            print(_overview(f"{name} "))
            return 0
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in VERBS:
        known = ("--help", "--version") if name.startswith("-") else tuple(VERBS)
        raise UserError(f"unknown {'option' if name.startswith('-') else 'verb'} {name!r}; {suggest(name, known)}")
    verb = VERBS[name]
    parser = _Parser(
        prog=f"tandem {name}",
        usage=f"tandem {name} {verb.usage}".rstrip(),
        description=f"{verb.help}\n\n{verb.more}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.arguments(parser)
    try:
        arguments, unknown = parser.parse_known_intermixed_args(rest)
    except SystemExit as done:  # --help
        return int(done.code or 0)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        hint = suggest(unknown[0], options) if unknown[0].startswith("-") else f"see `tandem {name} --help`"
        raise UserError(f"tandem {name}: unknown argument {unknown[0]!r}; {hint}")
    choose_backend()  # before a verb imports MuJoCo, which reads it then
    return verb.act(arguments)


def _overview(family: str = "") -> str:
    verbs = {name: verb for name, verb in VERBS.items() if name.startswith(family)}
    width = max(len(f"{name} {verb.usage}") for name, verb in verbs.items()) + 3
    lines = [f"  {f'{name} {verb.usage}'.ljust(width)}{verb.help}" for name, verb in verbs.items()]
    return "\n".join(
        [
            "Tandem trains robots and language models with one policy-optimization core.",
            "",
            f"usage: tandem {family}VERB ...",
            "",
            *lines,
            "",
            "`tandem VERB --help` says more; key=value overrides a value of the configuration, as in ppo.epochs=4.",
        ]
    )


# ---------------------------------------------------------------- the verbs


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one that comes with Tandem")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="override a value: ppo.epochs=4"
    )


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="one update in a temporary folder, then delete it")


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", metavar="show", help="print the merged configuration")
    _config_arguments(parser)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="one update of everything: does it work here?")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, or its name under runs/")


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="a setting: checkpoint=best")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or their names under runs/")
    parser.add_argument("--metric", action="append", default=[], help="a name or pattern: 'eval/*'; repeatable")
    parser.add_argument(
        "--over", default="global_step", help="horizontal axis: global_step, env_steps, tokens, ..."
    )
    parser.add_argument("--save", metavar="FILE", default="compare.png", help="where the curves go (compare.png)")


def _watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, its name under runs/, or a saved policy's folder")
    parser.add_argument("--say", metavar="TEXT", help="the instruction; left out, one of training's is drawn")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another scene (0)")
    parser.add_argument("--out", metavar="FILE.mp4", help="where the video goes (RUN/videos)")


def _doctor(arguments: argparse.Namespace) -> int:
    from tandem.doctor import examine

    del arguments
    return examine()


def _demo(arguments: argparse.Namespace) -> int:
    from tandem.demo import run_demo

    return run_demo(dry_run=arguments.dry_run)


def _train(arguments: argparse.Namespace) -> int:
    from tandem import verbs

    act = verbs.dry_run if arguments.dry_run else verbs.train
    return act(arguments.config, arguments.overrides)


def _resume(arguments: argparse.Namespace) -> int:
    from tandem.verbs import resume

    return resume(arguments.run)


def _eval(arguments: argparse.Namespace) -> int:
    from tandem.verbs import evaluate

    return evaluate(arguments.run, arguments.overrides)


def _watch(arguments: argparse.Namespace) -> int:
    from tandem.watch import watch

    return watch(arguments.run, say=arguments.say, seed=arguments.seed, out=arguments.out)


def _compare(arguments: argparse.Namespace) -> int:
    from tandem.verbs import compare

    return compare(arguments.runs, arguments.metric, arguments.over, arguments.save)


def _data_arguments(action: str) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        from tandem import data

        data.ARGUMENTS[action](parser)

    return add


def _data(action: str) -> Callable[[argparse.Namespace], int]:
    def act(arguments: argparse.Namespace) -> int:
        from tandem import data

        return data.ACTIONS[action](arguments)

    return act


def _module_arguments(name: str) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        importlib.import_module(f"tandem.{name}").add_arguments(parser)

    return add


def _benchmark(arguments: argparse.Namespace) -> int:
    from tandem.benchmark import benchmark

    return benchmark(arguments)


def _chat(arguments: argparse.Namespace) -> int:
    from tandem.chat import chat

    return chat(arguments)


def _frontier(arguments: argparse.Namespace) -> int:
    from tandem.frontier import frontier

    return frontier(arguments)


def _config(arguments: argparse.Namespace) -> int:
    from tandem.verbs import show_config

    if arguments.action != "show":
        raise UserError(f"tandem config: unknown verb {arguments.action!r}; did you mean show?")
    return show_config(arguments.config, arguments.overrides)


VERBS: dict[str, Verb] = {
    "doctor": Verb(
        "",
        "check this machine; one remedy for each problem",
        "Looks at versions, PyTorch, rendering, wandb, cores and disk. Exit code 1 if anything must be mended.",
        _no_arguments,
        _doctor,
    ),
    "demo": Verb(
        "[--dry-run]",
        "train a robot and two small language models in about ten minutes",
        "Imitation, then PPO; the robot sees pictures and is told in words. Ends with before and after, and\n"
        "what to type next.",
        _demo_arguments,
        _demo,
    ),
    "train": Verb(
        "CONFIG [key=value ...] [--dry-run]",
        "start a run",
        "The run folder is runs/NAME-DATE-TIME unless run.folder says otherwise.",
        _train_arguments,
        _train,
    ),
    "resume": Verb("RUN", "continue a run from its last checkpoint", "", _run_arguments, _resume),
    "eval": Verb(
        "RUN [key=value ...]",
        "evaluate a run's checkpoint, with intervals",
        "The settings are those of the recipe's EvaluateConfig, such as checkpoint=last. Writes RUN/eval.json.",
        _eval_arguments,
        _eval,
    ),
    "watch": Verb(
        "RUN [--say TEXT] [--seed N] [--out FILE.mp4]",
        "tell a robot something and film what it does",
        "The scene has the things that TEXT names, where it is understood. For vision-language-action policies.",
        _watch_arguments,
        _watch,
    ),
    "chat": Verb(
        "MODEL",
        "talk with a language policy",
        "A run, or a model's folder. /reset begins anew, /quit ends; a pipe is read line by line.",
        _module_arguments("chat"),
        _chat,
    ),
    "benchmark": Verb(
        "MODEL --suite NAME --data FILE",
        "a benchmark on your own files, with intervals",
        "docs/language_evaluation.md says which suites there are and what their files hold.",
        _module_arguments("benchmark"),
        _benchmark,
    ),
    "compare": Verb(
        "RUN RUN ... [--metric PATTERN]",
        "what differs between runs: configurations, results, curves",
        "",
        _compare_arguments,
        _compare,
    ),
    "frontier": Verb(
        "RUN RUN ... [--best-of N]",
        "reward against KL of language runs: where gold turns",
        "Gold is the task's own reward on validation prompts, climbed what the run was trained on. --best-of\n"
        "draws best-of-n of the policy that the first run began with beside them, which costs no training.",
        _module_arguments("frontier"),
        _frontier,
    ),
    "data inspect": Verb(
        "PATH",
        "a data set: counts, features, ends, instructions, success, actions",
        "Of LeRobot's data sets meta/ is read, which answers at once; of others every episode, without pictures.",
        _data_arguments("inspect"),
        _data("inspect"),
    ),
    "data validate": Verb(
        "PATH",
        "check a data set; a line for every problem",
        "Opens every file, decodes every picture, and computes every statistic that LeRobot v3 keeps.\n"
        "Exit code 1 if something is wrong.",
        _data_arguments("validate"),
        _data("validate"),
    ),
    "data view": Verb(
        "PATH [--episode N]",
        "write an episode as a video or a picture; without cameras, as curves",
        "",
        _data_arguments("view"),
        _data("view"),
    ),
    "data convert": Verb(
        "SRC DST --to lerobot|minari|d3rlpy",
        "write a data set in another format",
        "Reads LeRobot v2.1 and v3, Minari, robomimic, LIBERO, D4RL and d3rlpy; docs/data.md says more.\n"
        "DST appears when it is whole; the same command goes on where it was interrupted.",
        _data_arguments("convert"),
        _data("convert"),
    ),
    "data split": Verb(
        "SRC --out A B --fractions 0.9 0.1",
        "draw the episodes of a data set into several",
        "By whole episodes; the same seed, the same parts.",
        _data_arguments("split"),
        _data("split"),
    ),
    "data merge": Verb(
        "SRC SRC ... --out DST",
        "write several data sets as one",
        "They need the same observations and actions; their formats may differ.",
        _data_arguments("merge"),
        _data("merge"),
    ),
    "data play": Verb(
        "RUN --steps N --out DST",
        "log what a run's policy does, as a data set",
        "For runs that learned from states. With --checkpoint all, every checkpoint plays its share.",
        _data_arguments("play"),
        _data("play"),
    ),
    "data record": Verb(
        "--expert|--teleop --out FOLDER",
        "record demonstrations at the table: a scripted expert, or you",
        "Every finished episode is on the disk at once; the same command goes on where it was interrupted.\n"
        "--teleop opens a window, prints which key does what, and needs a screen (on macOS type\n"
        "`mjpython -m tandem` instead of `tandem`). --device gamepad reads, on Linux, pads of Xbox's layout\n"
        "and those of PlayStation 4 and 5.",
        _data_arguments("record"),
        _data("record"),
    ),
    "config": Verb(
        "show CONFIG [key=value ...]",
        "print the merged configuration",
        "Every default is spelled out; the output is a valid CONFIG.",
        _show_arguments,
        _config,
    ),
}
