"""The pictures of the documentation.

`MUJOCO_GL=egl python -m docs.make_pictures` writes docs/table.png and, from results/rlhf/, over_optimisation.png.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from envs.table.env import TIME_LIMIT, TableEnv
from envs.table.expert import Expert
from envs.table.language import TASKS
from studies.cells import read_results
from studies.rlhf import ARMS, of_stage
from studies.rlhf_reading import smoothed

SIZE, CAPTION, GAP, MARGIN = 220, 44, 6, 60
SENTENCES = {
    "reach": "reach for the yellow tower",
    "push": "push the red cube to the white pad",
    "pick": "pick up the green bar",
    "place": "put the blue bar on the black mat",
    "stack": "stack the purple cube on the green box",
}
SEEDS = {"reach": 3, "push": 4, "pick": 5, "place": 6, "stack": 7}


def start_and_end(task: str) -> tuple[np.ndarray, np.ndarray]:
    """[SIZE, SIZE, 3] of a scene, before and after the scripted expert did what it was told."""
    env = TableEnv(observe=())
    env.reset(seed=SEEDS[task], options={"instruction": SENTENCES[task]})
    start, expert = env.picture("front", SIZE), Expert(env)
    for _ in range(TIME_LIMIT):
        *_, terminated, _, info = env.step(expert.act())
        if terminated:
            break
    if not info["success"]:
        raise RuntimeError(f"the expert failed at {task!r}: choose another seed")
    return start, env.picture("front", SIZE)


def table() -> Image.Image:
    """A column a task: its sentence, the scene at the start, at success."""
    width = MARGIN + len(TASKS) * (SIZE + GAP) - GAP
    sheet = Image.new("RGB", (width, CAPTION + 2 * SIZE + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, name in enumerate(("start", "end")):
        draw.text((8, CAPTION + row * (SIZE + GAP) + SIZE // 2 - 8), name, "black", font)
    for column, task in enumerate(TASKS):
        left = MARGIN + column * (SIZE + GAP)
        words = SENTENCES[task].split()
        half = (len(words) + 1) // 2
        lines = f'"{" ".join(words[:half])}\n{" ".join(words[half:])}"'
        draw.multiline_text((left + SIZE // 2, 3), lines, "black", font, anchor="ma", align="center")
        for row, picture in enumerate(start_and_end(task)):
            sheet.paste(Image.fromarray(picture), (left, CAPTION + row * (SIZE + GAP)))
    return sheet


def over_optimisation() -> Figure:
    """Gold and proxy of PPO against a learned proxy along the KL, means of the study's seeds at equal updates."""
    cells = list(of_stage(read_results("rlhf"), "ppo").values())
    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    columns = {"gold score": 2, "score of the proxy, which is climbed": 3}
    for place, (title, column) in enumerate(columns.items(), start=1):
        axes = figure.add_subplot(1, 2, place)
        for number, (arm, (_, deviations)) in enumerate(ARMS.items()):
            points = np.array([cell[arm]["curve"]["points"] for cell in cells]).mean(0)
            kl, score = smoothed(points[:, 1].tolist()), smoothed(points[:, column].tolist())
            axes.plot(kl, score, f"C{number}", label=arm, linestyle="--" if deviations else "-")
            axes.plot(kl[-1], score[-1], f"C{number}o", markersize=4)
        axes.set_xscale("function", functions=(np.sqrt, np.square))
        axes.set_xticks([0, 1, 4, 9, 16, 25, 36, 49])
        axes.set_xlabel("KL to the start, nats a reply (spaced by its root)")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.25)
    figure.axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    folder = Path(__file__).parent
    table().quantize(128).save(folder / "table.png", optimize=True)
    over_optimisation().savefig(folder / "over_optimisation.png")
    print(folder / "table.png", folder / "over_optimisation.png")
