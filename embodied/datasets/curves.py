"""An episode without pictures to look at: its observations, actions and rewards as curves over the steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from embodied.datasets.recorded import OBSERVATION, RecordedEpisode
from experiment.figures import save_figure

_MOST_CURVES = 20
"""In one panel; the legend would cover more."""


def draw_curves(episode: RecordedEpisode, path: Path) -> None:
    """Write a PNG: a panel for every vector, the actions, the rewards. UserError when it cannot be written."""
    from matplotlib.figure import Figure

    panels = {name.removeprefix(OBSERVATION): values for name, values in episode.vectors.items()}
    panels["actions"] = episode.actions
    if episode.rewards is not None:
        panels["rewards"] = episode.rewards[:, None]
    figure = Figure(figsize=(9, 1 + 2 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(grid, panels.items(), strict=True):
        marker = "." if len(episode) == 1 else ""
        for number in range(min(values.shape[1], _MOST_CURVES)):
            axes.plot(np.arange(len(episode)), values[:, number], marker=marker, linewidth=1, label=str(number))
        shown = f"{name} [{values.shape[1]}]"
        shown += f", the first {_MOST_CURVES}" if values.shape[1] > _MOST_CURVES else ""
        axes.set_title(shown, loc="left")
        axes.margins(x=0)
        if 1 < values.shape[1] <= _MOST_CURVES:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="x-small", ncols=2)
    how = "terminated" if episode.terminated else "truncated"
    ended = how if episode.success is None else f"{how}, {'success' if episode.success else 'failure'}"
    words = f"“{episode.instruction}”; " if episode.instruction else ""
    figure.suptitle(f"{Path(episode.name).name}\n{words}{len(episode)} steps, {ended}", fontsize="medium")
    grid[-1].set_xlabel("step")
    save_figure(figure, path, dpi=100)
