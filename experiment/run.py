"""One run: its folder, seeds, metrics, checkpoints and display, in one object that knows no algorithm.

    with Run.start(config, recipe="embodied/ppo", resume=resume) as run:
        policy, optimizer = ...                     # built or loaded; may draw random numbers
        first = 1
        if run.checkpoint is not None:
            policy.load_state_dict(run.checkpoint.state["policy"])
            first = run.checkpoint.step + 1
        run.begin_loop(config.steps)                # the global generators continue where the checkpoint left them
        for step in range(first, config.steps + 1):
            ...
            run.log({"train/loss": loss, "env_steps": count}, global_step=step)
            if run.should_save(step):
                run.save({"policy": policy.state_dict()}, global_step=step, folders={})
        return run.finish()

Log a step before saving it: a resumed run cuts metrics.jsonl back to where it stood at the save.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, NamedTuple, Self

from experiment.allocator import keep_freed_memory
from experiment.checkpoint import Checkpoint, Checkpoints, load_checkpoint, write_atomically
from experiment.config import to_dict, to_yaml
from experiment.errors import NonFiniteMetric, UserError, storage_errors
from experiment.metrics import MetricsFile, WandbSink, read_metrics, to_json, to_number
from experiment.progress import Progress, format_seconds
from experiment.seeding import restore_rng_state, rng_state, seed_everything


@dataclass(frozen=True)
class RunConfig:
    """What every recipe's configuration says about the run itself.

    Attributes:
        folder: where the run lives; None means runs/NAME-DATE-TIME.
        name: a short name for folders, panels and wandb.
        seed: of python, numpy and torch.
        threads: torch's; a run is only reproducible with the same number.
        checkpoint_every: in global_steps; cloning and offline learning keep one with every evaluation instead.
        keep: how many of the newest checkpoints stay; the best stays besides.
        wandb: "auto" means WANDB_MODE if set, else online if a key is there, else offline.
        wandb_project: project in wandb.
        wandb_group: group in wandb.
        dry_run: try everything out briefly; wandb stays off.
    """

    folder: str | None = None
    name: str = "run"
    seed: int = 0
    threads: int = 1
    checkpoint_every: int = 10
    keep: int = 2
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    wandb_project: str = "tandem"
    wandb_group: str | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("threads", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads > 1024:
            raise ValueError(f"threads must be at most 1024, got {self.threads}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {self.seed}")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name must be letters, digits, '.', '-' and '_' only, got {self.name!r}")


class Metric(NamedTuple):
    """What `best` is chosen by; higher is better. One of a higher rank beats all of a lower one: where it becomes
    known on the way what to judge by, the first checkpoint that is judged by it is better than all before."""

    value: float
    rank: int = 0


@dataclass(frozen=True)
class RunResult:
    """What a recipe returns.

    Attributes:
        folder: the run folder.
        metrics: the last logged value of every metric, plus best/metric and best/step if a metric was saved.
    """

    folder: Path
    metrics: dict[str, float]


class Run:
    """A run under way; make one with `Run.start` and use it as a context manager.

    Attributes:
        folder: the run folder.
        config: the recipe's configuration.
        checkpoint: what to continue from, or None.
    """

    def __init__(self, config: Any, recipe: str, folder: Path, checkpoint: Checkpoint | None, lock: int) -> None:
        self.config = config
        self.recipe = recipe
        self.folder = folder
        self.checkpoint = checkpoint
        self._settings: RunConfig = config.run
        self._checkpoints = Checkpoints(folder / "checkpoints", self._settings.keep)
        meta = checkpoint.meta if checkpoint else {}
        self._best: dict[str, float] | None = meta.get("best")
        self._elapsed_before: float = meta.get("elapsed", 0.0)
        self._begun = time.monotonic()
        self._step = checkpoint.step if checkpoint else 0
        self._lock = lock
        self._metrics = MetricsFile(folder / "metrics.jsonl", keep_bytes=meta.get("metrics_offset", 0))
        self._last: dict[str, float] = {}
        for row in read_metrics(self._metrics.path):
            self._last.update(row)
        self._progress = Progress(folder.name)
        self._wandb: WandbSink | None = None
        self._old_handler: Any = None
        self._open = True
        self._new = False
        self._there: frozenset[str] = frozenset()  # what was in the folder before the run
        self._in_loop = False

    # ------------------------------------------------------------ beginning

    @classmethod
    def start(cls, config: Any, *, recipe: str, resume: Path | None = None) -> Self:
        """Begin a run in a new folder, or continue the one in the folder `resume`.

        A run that was killed before its first checkpoint begins again, in the same folder, with empty metrics.

        Raises:
            UserError: the new folder is not empty; `resume` is not a run folder, or another process is using it;
                the checkpoint is damaged; the disk is full.
        """
        import torch

        folder = _new_folder(config.run) if resume is None else _existing_folder(Path(resume))
        there = frozenset(path.name for path in folder.iterdir())
        lock = _lock(folder)
        try:
            checkpoints = Checkpoints(folder / "checkpoints", config.run.keep)
            checkpoints.recover()
            newest = checkpoints.newest()
            checkpoint = load_checkpoint(newest) if newest else None
            _write_records(config, recipe, folder)
            run = cls(config, recipe, folder, checkpoint, lock)
            run._new, run._there = resume is None, there
        except BaseException:
            os.close(lock)
            raise
        try:
            if checkpoint is not None:
                checkpoints.relink(checkpoint.step, int(run._best["step"]) if run._best else None)
            run._catch_sigterm()
            run._wandb = run._start_wandb(resumed=resume is not None)
            torch.set_num_threads(config.run.threads)
            keep_freed_memory()
            seed_everything(config.run.seed)
        except BaseException:
            run._close(exit_code=1)
            raise
        continued = f" from step {run._step}" if run.checkpoint else " from the beginning" if resume else ""
        run._progress.message(f"{recipe}: {'resuming' if resume else 'run'} {folder}{continued}")
        return run

    def begin_loop(self, total_steps: int) -> None:
        """Call when everything is built or restored, just before the loop.

        When resuming, the global generators of python, numpy and torch continue from the checkpoint here, so that
        random numbers drawn while building do no harm.
        """
        if self.checkpoint is not None:
            restore_rng_state(self.checkpoint.rng)
        self._in_loop = True
        self._progress.start(total_steps, self._step)

    # ------------------------------------------------------------ logging

    def log(self, metrics: Mapping[str, float], *, global_step: int) -> None:
        """Record numbers at `global_step` (updates so far). Counters such as env_steps are metrics like any other.

        Raises:
            NonFiniteMetric: a key that contains "loss" is NaN or infinite; the row is recorded first.
            UserError: the disk is full.
        """
        numbers = {key: to_number(key, value) for key, value in metrics.items()}
        row = {"global_step": global_step, **numbers, "time/elapsed": round(self._elapsed(), 3)}
        self._step = max(self._step, global_step)
        self._metrics.write(row)
        self._last.update(row)
        if self._wandb is not None:
            self._wandb.log(row)
        self._progress.update(global_step, row)
        for key, value in numbers.items():
            if "loss" in key and not math.isfinite(value):
                raise NonFiniteMetric(self._non_finite(key, value, global_step))

    def _non_finite(self, key: str, value: float, step: int) -> str:
        newest = self._checkpoints.newest()
        kept = f"the last kept checkpoint is {newest}" if newest else "no checkpoint was kept yet"
        return f"run {self.folder}: {key} is {value} at global_step {step}; {kept}; a lower learning rate may help"

    def log_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, global_step: int
    ) -> None:
        """Record a table: tables/NAME/STEP.jsonl, one object per row, and wandb."""
        cells = [{name: to_json(cell) for name, cell in zip(columns, row, strict=True)} for row in rows]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in cells]
        path = self.folder / "tables" / name.replace("/", "_") / f"{global_step:09d}.jsonl"
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(lines))
        if self._wandb is not None:
            self._wandb.log_table(name, columns, rows, global_step)

    def log_video(self, name: str, path: Path, *, global_step: int) -> None:
        """Show an mp4 file in wandb; the file itself stays where it is."""
        if self._wandb is not None:
            self._wandb.log_video(name, _present(path), global_step)

    def log_image(self, name: str, path: Path, *, global_step: int) -> None:
        """Show an image file in wandb; the file itself stays where it is."""
        if self._wandb is not None:
            self._wandb.log_image(name, _present(path), global_step)

    # ------------------------------------------------------------ checkpoints

    def should_save(self, global_step: int) -> bool:
        """Whether `global_step` is a multiple of `run.checkpoint_every`."""
        return global_step % self._settings.checkpoint_every == 0

    def save(
        self,
        state: dict[str, Any],
        *,
        global_step: int,
        folders: Mapping[str, Callable[[Path], None]] | None = None,
        metric: float | Metric | None = None,
    ) -> Path:
        """Write a checkpoint; nothing of it shows until all of it is on the disk.

        Args:
            state: the recipe's tree (see `experiment.state`); the global generators are added by the run.
            global_step: updates so far.
            folders: name -> writer into that sub-folder, such as {"policy": policy.save_pretrained}.
            metric: higher is better; if it beats every earlier one, `best` moves here. A `Metric` of higher rank
                beats all of a lower one.

        Returns:
            The checkpoint's folder.

        Raises:
            UserError: the disk is full; nothing half-written is left.
        """
        given = Metric(-math.inf if metric is None else metric) if not isinstance(metric, Metric) else metric
        best = self._best
        beaten = best is None or (given.rank, given.value) > (best.get("rank", 0), best["metric"])
        if beaten and given.value > -math.inf:
            best = {"step": global_step, "metric": float(given.value), "rank": given.rank}
        meta = {
            "metrics_offset": self._metrics.sync(),
            "elapsed": self._elapsed(),
            "metric": float(given.value) if math.isfinite(given.value) else None,
            "best": best,
        }
        rng = rng_state()
        path = self._checkpoints.save(global_step, state, rng, meta, folders or {})
        restore_rng_state(rng)  # a writer that drew random numbers must not change what comes next
        self._best = best
        return path

    # ------------------------------------------------------------ ending

    def finish(self) -> RunResult:
        """Close metrics and wandb and say where everything is; safe to call twice."""
        if self._open:
            self._progress.close()
            self._progress.message(f"finished after {format_seconds(self._elapsed())}: {self.folder}")
        self._close(exit_code=0)
        best = {f"best/{key}": self._best[key] for key in ("step", "metric")} if self._best else {}
        return RunResult(self.folder, {**self._last, **best})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        mistake = kind is not None and issubclass(kind, UserError) and self._new and not self._in_loop
        if kind is not None and self._open and not mistake and not self._settings.dry_run:
            self._progress.close()
            self._progress.message(
                f"stopped at step {self._step}{self._goes_back()}; continue with: tandem resume {self.folder}"
            )
        self._close(exit_code=0 if kind is None else 1)
        if mistake:  # the user mends the configuration and starts anew: there is nothing to continue
            self._remove()

    def _remove(self) -> None:
        """What this run has made, and its folder unless somebody else keeps something there."""
        for path in list(self.folder.iterdir()):
            if path.name in self._there:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if not self._there:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _close(self, exit_code: int) -> None:
        if not self._open:
            return
        self._open = False
        self._progress.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code)
        self._metrics.close()
        os.close(self._lock)
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)

    # ------------------------------------------------------------ parts

    def _goes_back(self) -> str:
        """What a stopped run should say of the steps that resuming repeats; "" where it repeats none."""
        steps = self._checkpoints.steps()
        if self._step == (steps[-1] if steps else 0):
            return ""
        if steps:
            return f", resuming goes back to step {steps[-1]} (the newest checkpoint)"
        return ", resuming begins again (no checkpoint yet)"

    def _elapsed(self) -> float:
        """Seconds of work, those before a resume included."""
        return self._elapsed_before + time.monotonic() - self._begun

    def _start_wandb(self, *, resumed: bool) -> WandbSink | None:
        settings = self._settings
        if settings.dry_run or settings.wandb == "disabled":
            return None
        return WandbSink(
            mode=settings.wandb,
            folder=self.folder,
            project=settings.wandb_project,
            group=settings.wandb_group,
            name=self.folder.name,
            identity=json.loads((self.folder / "run.json").read_text(encoding="utf-8"))["id"],
            resumed=resumed,
            config={"recipe": self.recipe, **to_dict(self.config)},
            warn=self._progress.message,
        )

    def _catch_sigterm(self) -> None:
        """Let SIGTERM unwind the stack, so that the context manager closes what is open."""
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(number: int, frame: FrameType | None) -> None:
            raise SystemExit(128 + number)

        self._old_handler = signal.signal(signal.SIGTERM, stop)


def _new_folder(settings: RunConfig) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    wanted = Path(settings.folder) if settings.folder else Path("runs") / f"{settings.name}-{stamp}"
    folder, count = wanted, 1
    with storage_errors(wanted):
        while folder.exists() and not _is_empty(folder):
            if settings.folder:
                raise UserError(
                    f"{folder}: the run folder is not empty; continue it with `tandem resume {folder}`, "
                    "or choose another run.folder"
                )
            count += 1
            folder = wanted.with_name(f"{wanted.name}-{count}")
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_empty(folder: Path) -> bool:
    """Hidden files do not count: a process killed while starting leaves some."""
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


def _existing_folder(folder: Path) -> Path:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (no config.yaml in it)")
    return folder


def _write_records(config: Any, recipe: str, folder: Path) -> None:
    """config.yaml and, once, run.json; a configuration changed on resume replaces the old one, which is kept."""
    text, path = to_yaml(config, recipe), folder / "config.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        number = len(list(folder.glob("config-before-*.yaml"))) + 1
        write_atomically(folder / f"config-before-resume-{number}.yaml", path.read_text(encoding="utf-8"))
        print(f"{path}: the configuration has changed; the old one is kept beside it", file=sys.stderr)
    write_atomically(path, text)
    record = folder / "run.json"
    if not record.exists():
        write_atomically(record, json.dumps(_surroundings(), indent=1))


def _lock(folder: Path) -> int:
    """Hold the run folder for this process; the system lets go when the process ends, however it ends."""
    with storage_errors(folder):
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise UserError(f"{folder}: another process is using this run; stop it first") from None
    except OSError as error:  # some network file systems have no locks; a run there is on its own
        print(f"{folder}: no file locks here ({error})", file=sys.stderr)
    return descriptor


def _present(path: Path) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file to log")
    return Path(path)


def _surroundings() -> dict[str, Any]:
    """What someone needs to know to repeat the run: command, versions, machine, source."""
    import numpy
    import torch

    commit = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        where = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(where, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return {
        "id": secrets.token_hex(4),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
