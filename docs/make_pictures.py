"""The pictures of the documentation. `MUJOCO_GL=egl python -m docs.make_pictures` writes docs/table.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from envs.table.env import TIME_LIMIT, TableEnv
from envs.table.expert import Expert
from envs.table.language import TASKS

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


if __name__ == "__main__":
    path = Path(__file__).parent / "table.png"
    table().quantize(128).save(path, optimize=True)
    print(path)
