"""What a run shows while it works: a live panel on a terminal, plain lines elsewhere. Everything goes to stderr."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from experiment.metrics import COUNTERS

# Outcomes before diagnostics; within a prefix the recipe's own order stays.
_HEADLINE = ("eval/", "env/", "rollout/", "objective/", "rewards/", "train/", "loss/")
_ROWS = 14


class Progress:
    """Shows the newest metrics, the rate and the time left.

    Args:
        name: title of the panel.
        console: where to write; by default stderr.
        interval: least seconds between two plain lines.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        name: str,
        *,
        console: Console | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.console = console or Console(stderr=True)
        self.interval = interval
        self._clock = clock
        self._live: Live | None = None
        self._total = 0
        self._step = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=50)
        self._metrics: dict[str, float] = {}
        self._last_line = float("-inf")
        self._pending = False

    def start(self, total: int, step: int) -> None:
        """Begin timing at `step` of `total`."""
        self._total, self._step = total, step
        self._marks.clear()
        self._marks.append((self._clock(), step))
        if self.console.is_terminal and self._live is None:
            self._live = Live(console=self.console, refresh_per_second=4, get_renderable=self._panel)
            self._live.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of one log call."""
        if step > self._step:
            self._marks.append((self._clock(), step))
        self._step = max(step, self._step)
        self._metrics.update({k: v for k, v in metrics.items() if not k.startswith("time/") and k != "global_step"})
        self._pending = True
        if self._live is None and self._clock() - self._last_line >= self.interval:
            self._print_line()

    def message(self, text: str) -> None:
        """One line of plain text, above the panel if there is one."""
        self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Leave the last panel, or the last line, on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live, self._pending = None, False
        elif self._pending:
            self._print_line()

    @property
    def rate(self) -> float | None:
        """Steps per second over the last 50 steps logged; None before the second one."""
        if len(self._marks) < 2 or self._marks[-1][0] <= self._marks[0][0]:
            return None
        (begin, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - begin)

    @property
    def time_left(self) -> float | None:
        """Seconds until `total`, at the present rate."""
        return None if not self.rate or not self._total else max(self._total - self._step, 0) / self.rate

    def _headline(self) -> list[tuple[str, float]]:
        def rank(key: str) -> int:
            return next((i for i, prefix in enumerate(_HEADLINE) if key.startswith(prefix)), len(_HEADLINE))

        return sorted(((k, v) for k, v in self._metrics.items() if k not in COUNTERS), key=lambda kv: rank(kv[0]))

    def _timing(self) -> str:
        parts = [f"step {self._step}" + (f"/{self._total}" if self._total else "")]
        parts += [f"{key} {self._metrics[key]:,.0f}" for key in COUNTERS if key in self._metrics]
        if self.rate is not None:
            parts.append(f"{self.rate:.3g} steps/s")
        if self.time_left is not None:
            parts.append(f"{format_seconds(self.time_left)} left")
        return "  ".join(parts)

    def _print_line(self) -> None:
        shown = "  ".join(f"{key} {value:.4g}" for key, value in self._headline()[:6])
        self.console.print(Text(f"{self._timing()}  {shown}".rstrip()), soft_wrap=True)
        self._last_line, self._pending = self._clock(), False

    def _panel(self) -> Panel:
        table = Table.grid(padding=(0, 3))
        metrics = self._headline()
        for key, value in metrics[:_ROWS]:
            table.add_row(Text(key, style="cyan"), Text(f"{value:.5g}", justify="right"))
        hidden = len(metrics) - _ROWS
        bar = Table.grid()  # a bar by itself does not end its line
        bar.add_row(ProgressBar(total=max(self._total, 1), completed=self._step, width=50))
        parts: list[RenderableType] = [Text(self._timing()), bar, table]
        if hidden > 0:
            parts.append(Text(f"and {hidden} more in metrics.jsonl", style="dim"))
        return Panel(Group(*parts), title=Text(self.name), title_align="left")


def format_seconds(seconds: float) -> str:
    """`1h05m`, `2m07s` or `9s`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
