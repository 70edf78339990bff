"""`tandem watch RUN --say "push the red cube to the white pad"`: tell a robot something, and see what it does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embodied.evaluate import TEST_SEEDS
from embodied.evaluate_vla import phrasing_of, tasks_of
from embodied.policies.vla import VLAPolicy
from embodied.policies.words import split_words
from embodied.vla.judge import check_policy, unknown_words
from embodied.vla.seats import TableConfig, make_table
from embodied.vla.video import Studio, write_film
from envs.table.env import TableEnv
from experiment.config import read_tree
from experiment.errors import UserError
from tandem.verbs import find_run

MOST_SEED = 10_000_000


def watch(run: str, *, say: str | None = None, seed: int = 0, out: str | None = None) -> int:
    """Play one episode, write it as a video, print what happened.

    run     a run of a vision-language-action policy, or the folder of a saved one
    say     what the robot is told; the scene has the named things where the sentence is understood. None: one of
            training's instructions
    seed    of the scene, which is none of training's

    Raises UserError if there is no such policy, or nothing can be drawn here.
    """
    if say is not None and not split_words(say):
        raise UserError('--say: there is no word in it; say something like --say "pick up the red cube"')
    if not 0 <= seed < MOST_SEED:
        raise UserError(f"--seed must be within 0..{MOST_SEED - 1}, got {seed}")
    folder, described, videos = find_policy(run)
    policy = VLAPolicy.from_pretrained(folder)
    check_policy(policy, folder)
    table = TableConfig(tasks=tasks_of(described), phrasing=phrasing_of(described))
    env = make_table(table, policy.spaces.image_size)
    env.close()
    if say is not None:
        for note in notes(policy, say, env):
            print(f"note: {note}")
    with Studio(policy) as studio:
        film = studio.film((TEST_SEEDS + seed, None if say is None else {"instruction": say}), table=table)
    episode = film.episode
    path = Path(out) if out is not None else videos / f"watch-{slug(episode.instruction)}-{seed}.mp4"
    write_film(film, path)
    success = episode.record.success_once
    print(f"told      {episode.instruction}")
    if success is None:
        print("success   not judged")
    else:
        print(f"meant     {episode.goal}")
        print(f"success   {'yes' if success else 'no'}, {episode.record.length} control steps")
    print(f"video     {path}")
    return 0


def find_policy(run: str) -> tuple[Path, Mapping[str, Any], Path]:
    """A policy's folder, the configuration it was trained with (empty where none is there), where its videos go.

    Raises:
        UserError: there is no such run or policy, or it has no checkpoint yet.
    """
    if (Path(run) / "policy.json").is_file():
        return Path(run), {}, Path()
    folder = find_run(run)
    for name in ("best", "last"):
        policy = folder / "checkpoints" / name / "policy"
        if policy.is_dir():
            return policy, read_tree(folder / "config.yaml").values, folder / "videos"
    raise UserError(f"{folder}: there is no checkpoint with a policy to watch")


def notes(policy: VLAPolicy, say: str, table: TableEnv) -> list[str]:
    """What the user should know about a sentence before judging the robot by it."""
    found = []
    if table.understand(say) is None:
        found.append("the table does not understand the sentence: the scene is random and success is not judged")
    unknown = unknown_words(policy, [say])
    if unknown:
        found.append(f"the policy never met {', '.join(map(repr, unknown))}")
    if len(split_words(say)) > policy.config.length:
        found.append(f"the policy reads the first {policy.config.length} words only")
    return found


def slug(text: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].rstrip("-") or "said"
