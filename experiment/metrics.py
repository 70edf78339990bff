"""Where metrics go: `metrics.jsonl`, always; Weights & Biases, if it works.

A line of metrics.jsonl is one JSON object with `global_step` and the metrics of one `Run.log`. NaN and
infinities are written as the text "NaN", "Infinity" and "-Infinity", because JSON has no numbers for them;
`read_metrics` turns them back. Keys that begin with `time/` depend on the machine's mood and are left out of
comparisons (`without_time`).
"""

from __future__ import annotations

import json
import math
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from experiment.errors import UserError, storage_errors

COUNTERS = ("global_step", "env_steps", "episodes", "tokens", "samples")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


# ---------------------------------------------------------------- metrics.jsonl


class MetricsFile:
    """Append-only JSON lines. A line is in the file, whole, when `write` returns."""

    def __init__(self, path: Path, *, keep_bytes: int | None = None) -> None:
        """Open for appending.

        Args:
            path: the file; made if it is not there.
            keep_bytes: cut the file back to this size first (a checkpoint's offset); None keeps every whole line.
        """
        self.path = path
        with storage_errors(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self._descriptor).st_size
            content = os.pread(self._descriptor, size if keep_bytes is None else min(size, keep_bytes), 0)
            # A killed writer may have left part of a line; appending to it would spoil the next one too.
            self.offset = content.rfind(b"\n") + 1
            os.ftruncate(self._descriptor, self.offset)

    def write(self, row: Mapping[str, float]) -> None:
        """Append one line.

        Raises:
            UserError: the disk is full; the file then ends with the last whole line.
        """
        line = (json.dumps({key: to_json(value) for key, value in row.items()}) + "\n").encode()
        with storage_errors(self.path):
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
            except BaseException:
                os.ftruncate(self._descriptor, self.offset)
                raise
        self.offset += len(line)

    def sync(self) -> int:
        """Force the file onto the disk; returns its size in bytes, the offset a checkpoint stores."""
        with storage_errors(self.path):
            os.fsync(self._descriptor)
        return self.offset

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, oldest first; a torn last line is left out.

    Raises:
        UserError: the file is missing, or a line before the last is damaged.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read the metrics ({(error.strerror or '').lower()})") from error
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append({key: _NON_FINITE.get(value, value) for key, value in json.loads(line).items()})
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{path}:{number}: damaged line; delete it to read the rest") from error
    return rows


def without_time(row: Mapping[str, float]) -> dict[str, float]:
    """A row without its `time/*` keys: what two runs must have in common to be the same."""
    return {key: value for key, value in row.items() if not key.startswith("time/")}


def to_number(key: str, value: Any) -> float:
    """A python int or float from a number, a bool, a 0-d tensor or a numpy scalar.

    Raises:
        TypeError: it is none of these.
    """
    if type(value) in (int, float):
        number: float = value
        return number
    item = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if isinstance(item, bool | int):
        return int(item)
    if isinstance(item, float):
        return item
    raise TypeError(f"metric {key}: expected a number, got a {type(value).__name__}")


def to_json(value: Any) -> Any:
    """The value itself, or the text that stands for a float JSON has no number for."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


# ---------------------------------------------------------------- Weights & Biases


class WandbSink:
    """A wandb run that can never stop ours: after any failure it warns once and falls silent.

    Every row carries the newest value of each counter (global_step, env_steps, episodes, tokens, samples), so
    that every metric can be plotted over any of them; global_step is the default axis. `step=` is never passed:
    wandb drops rows whose step runs backwards.

    Resuming: the same id with `resume="allow"`. Online that continues the run on the server. Offline, wandb 0.31
    starts a second folder `wandb/offline-run-DATE-ID` whose run record carries the same id and `resume: true`;
    `wandb sync --yes RUN/wandb` replays the folders of one id in the order they were started. Rows logged between
    the last checkpoint and a kill are in wandb twice, with the same global_step; metrics.jsonl has them once.
    """

    def __init__(
        self,
        *,
        mode: str,
        folder: Path,
        project: str,
        group: str | None,
        name: str,
        identity: str,
        resumed: bool,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._run: Any = None
        self._counters: dict[str, float] = {}
        mode = resolve_mode(mode)
        if mode == "disabled":
            return

        def start() -> None:
            import wandb

            self._wandb = wandb
            settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, finish_timeout=120.0)
            self._run = wandb.init(
                mode="online" if mode == "online" else "offline",
                dir=str(folder),
                project=project,
                group=group,
                name=name,
                id=identity,
                resume="allow" if resumed else None,
                config=dict(config),
                settings=settings,
            )
            for counter in COUNTERS:
                self._run.define_metric(counter, hidden=True)
            self._run.define_metric("*", step_metric="global_step")

        self._try("init", start)

    @property
    def active(self) -> bool:
        """Whether anything is still being sent."""
        return self._run is not None

    def log(self, row: Mapping[str, Any]) -> None:
        """Send one row of scalars."""
        self._counters.update({key: row[key] for key in COUNTERS if key in row})
        self._try("log", lambda: self._run.log({**self._counters, **row}))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Send a table."""
        self._media(name, step, lambda: self._wandb.Table(columns=list(columns), data=[list(r) for r in rows]))

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Send an image file."""
        self._media(name, step, lambda: self._wandb.Image(str(path)))

    def log_video(self, name: str, path: Path, step: int) -> None:
        """Send an mp4 file."""
        self._media(name, step, lambda: self._wandb.Video(str(path), format="mp4"))

    def _media(self, name: str, step: int, make: Callable[[], Any]) -> None:
        self._counters["global_step"] = step
        self._try("log", lambda: self._run.log({**self._counters, name: make()}))

    def finish(self, exit_code: int) -> None:
        """Close the wandb run."""
        self._try("finish", lambda: self._run.finish(exit_code=exit_code))
        self._run = None

    def _try(self, what: str, action: Callable[[], None]) -> None:
        if self._run is None and what != "init":
            return
        try:
            action()
        except Exception as error:  # the run matters more than its dashboard, whatever went wrong there
            self._run = None
            self._warn(f"warning: wandb {what} failed, the run goes on without it: {error}")


def resolve_mode(mode: str) -> str:
    """What "auto" means here: WANDB_MODE if set, else online if a key is there, else offline."""
    if mode != "auto":
        return mode
    chosen = os.environ.get("WANDB_MODE", "")
    if chosen in ("online", "offline", "disabled"):
        return chosen
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_entry() else "offline"


def _has_netrc_entry() -> bool:
    """Whether `wandb login` has left an entry for the server in use."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
