"""Judging a policy that follows instructions: what is played, how it is counted, what is told to the user."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from embodied import evaluate_vla
from embodied.evaluate import TEST_SEEDS
from embodied.evaluate_vla import (
    EvaluateVLAConfig,
    asked,
    evaluate_policy,
    phrasing_of,
    suite_plays,
    suite_table,
)
from embodied.policies.vla import VLAConfig, VLAPolicy, VLASpaces
from embodied.policies.words import Words
from embodied.rollouts.processes import SharedArrays
from embodied.vla.chunk_workers import Player, layout_of
from embodied.vla.judge import Judge
from embodied.vla.report import describe, figures, suite_figures, table
from embodied.vla.seats import Play, Seats, TableConfig, TableEpisode, make_table
from embodied.vla.video import Film, caption, contact_sheet, wrap
from envs.stepper import EpisodeRecord, episode_seed
from envs.table.expert import Expert
from envs.table.language import TASKS, held_out, phrases
from envs.table.observations import PERCEPT, PROPRIO, STATE
from experiment.errors import UserError
from experiment.statistics import wilson_interval
from tandem import cli

SPACES = VLASpaces(image_size=16, cameras=("front",), proprio_size=PROPRIO, state_size=STATE, action_size=4)


def tiny(spaces: VLASpaces = SPACES, *, chunk: int = 8, **config: Any) -> VLAPolicy:
    """Untrained, but it moves."""
    torch.manual_seed(0)
    sizes = VLAConfig(
        chunk=chunk, channels=(4, 8), blocks=1, queries=2, words=8, hidden=(8,), critic_hidden=(8,), **config
    )
    policy = VLAPolicy(spaces, sizes, Words(["cube", "red", "the"]))
    with torch.no_grad():
        policy.actor.last.weight.mul_(100)
    return policy


def episode(
    *,
    won: bool,
    goal: str = "reach red cube",
    length: int = 10,
    at_end: bool | None = None,
    original: bool | None = None,
) -> TableEpisode:
    success_at_end = won if at_end is None else at_end
    record = EpisodeRecord(
        episode_return=0.0,
        length=length,
        success_once=won,
        success_at_end=success_at_end,
        terminated=length < 64,
        truncated=length == 64,
        number=0,
        seed=0,
    )
    return TableEpisode(record, goal.split()[0], goal, goal, original)


# ---------------------------------------------------------------- counting


def test_figures_by_hand() -> None:
    played = [
        episode(won=True, length=10),
        episode(won=True, length=20),
        episode(won=True, length=64, at_end=False),  # dropped again
        episode(won=False, length=6),  # out of reach
    ]
    found = figures(played, at_end=True)
    assert (found["episodes"], found["successes"], found["lost"]) == (4, 3, 1)
    assert (found["success_once"], found["success_at_end"]) == (0.75, 0.5)
    # Wilson, z = 1.95996: centre (0.75 + z2/8) / (1 + z2/4), half z / (1 + z2/4) sqrt(0.1875/4 + z2/64)
    assert found["success_once_interval"] == pytest.approx([0.300642, 0.954413], abs=1e-6)
    assert found["mean_length"] == 25.0
    low, high = found["mean_length_interval"]
    assert 6 <= low < 25 < high <= 64
    assert "success_of_original" not in found
    assert "success_at_end" not in figures(played)


def test_swapped_words_by_hand() -> None:
    played = [
        episode(won=True, original=False),
        episode(won=False, original=True, length=64),
        episode(won=False, original=True, length=64),
        episode(won=True, original=True),
        episode(won=False, original=False, length=64),
    ]
    found = figures(played)
    assert (found["success_once"], found["success_of_original"]) == (0.4, 0.6)
    assert found["success_of_original_interval"] == list(wilson_interval(3, 5))


def test_groups_by_task_instruction_shape_and_colour() -> None:
    played = [
        episode(won=True, goal="reach red cube"),
        episode(won=False, goal="reach red cube", length=64),
        episode(won=True, goal="reach blue tower"),
        episode(won=False, goal="push red tower to white", length=64),
    ]
    found = suite_figures(played)
    assert found["success_once"] == 0.5
    assert {task: numbers["success_once"] for task, numbers in found["tasks"].items()} == {
        "reach": 2 / 3,
        "push": 0,
    }
    assert found["goals"]["reach red cube"] == {
        "episodes": 2,
        "successes": 1,
        "success_once": 0.5,
        "success_once_interval": list(wilson_interval(1, 2)),
    }
    assert {name: (n["successes"], n["episodes"]) for name, n in found["shapes"].items()} == {
        "cube": (1, 2),
        "tower": (1, 2),
    }
    assert {name: (n["successes"], n["episodes"]) for name, n in found["colours"].items()} == {
        "blue": (1, 1),
        "red": (1, 3),
    }
    assert found["outcomes"] == {"reach": "101", "push": "0"}


def test_the_table_shows_every_suite_and_what_is_to_be_known() -> None:
    suites = {
        "normal": suite_figures([episode(won=True)] * 4),
        "swapped": suite_figures([episode(won=False, original=True, length=64)] * 4),
    }
    report = {
        "policy": {"folder": "runs/a", "ablate": "words"},
        "config": {"episodes": 4, "deterministic": True, "randomization": "full"},
        "first_seed": TEST_SEEDS,
        "unknown_words": ["shove"],
        "suites": suites,
    }
    lines = table(report).splitlines()
    assert [part.strip() for part in lines[0].split("  ") if part] == [
        "task",
        "normal",
        "swapped",
        "swapped, original",
    ]
    assert lines[1].split() == ["reach", "100%", "[51,", "100]", "0%", "[0,", "49]", "100%", "[51,", "100]"]
    assert lines[2].startswith("all ")
    text = describe(report)
    assert "a floor: words replaced by zeros" in text
    assert "never met: shove" in text


# ---------------------------------------------------------------- what is played


def test_normal_and_swapped_have_the_same_scenes_and_other_words() -> None:
    config = EvaluateVLAConfig()
    plain = make_table(suite_table("normal", TASKS, "train", config), 16)
    swapped = make_table(suite_table("swapped", TASKS, "train", config), 16)
    normal_plays, swapped_plays = (suite_plays(suite, TASKS, 2) for suite in ("normal", "swapped"))
    assert [seed for seed, _ in normal_plays] == [TEST_SEEDS, TEST_SEEDS + 1] * 5
    for (seed, options), (same_seed, swap) in zip(normal_plays, swapped_plays, strict=True):
        assert seed == same_seed
        plain.reset(seed=seed, options=options)
        swapped.reset(seed=same_seed, options=swap)
        np.testing.assert_array_equal(plain.world.data.qpos, swapped.world.data.qpos)
        assert plain.world.things == swapped.world.things
        assert plain.goal.task == swapped.goal.task
        assert plain.goal.thing != swapped.goal.thing
        assert swapped.other == plain.goal


def test_suites_keep_what_they_promise() -> None:
    config = EvaluateVLAConfig()
    for suite in ("normal", "held_out", "synonyms"):
        env = make_table(suite_table(suite, TASKS, "train", config), 16)
        for seed, options in suite_plays(suite, TASKS, 3):
            env.reset(seed=seed, options=options)
            assert held_out(env.goal) == (suite == "held_out")
            assert (env.instruction in phrases(env.goal, "train")) == (suite != "synonyms")
    assert make_table(suite_table("randomized", TASKS, "train", config), 16).randomizer is not None
    whole = suite_table("normal", TASKS, "train", EvaluateVLAConfig(until_time_limit=True))
    assert whole.end_on_success is False


def test_what_an_evaluation_asks_for_comes_before_what_its_run_did() -> None:
    assert asked(EvaluateVLAConfig(), TASKS, "mine.py:say") == (TASKS, "mine.py:say")
    assert asked(EvaluateVLAConfig(phrasing="train"), TASKS, "mine.py:say") == (TASKS, "train")
    twice = EvaluateVLAConfig(tasks=("push", "reach", "push"))  # as training weighs them; judged once
    assert asked(twice, TASKS, "train") == (("push", "reach"), "train")
    assert phrasing_of({"environment": {"phrasing": "mine.py:say"}}) == "mine.py:say"
    assert phrasing_of({"environment": {}}) == phrasing_of({}) == "train"


def test_the_number_of_workers_does_not_change_the_outcome() -> None:
    policy, plays = tiny(), suite_plays("swapped", ("reach", "push"), 3)
    played = []
    for workers in (0, 2):  # one in this process, two of their own
        with Judge(policy, workers=workers, count=4) as judge:
            found = judge.evaluate(
                policy, plays, environment=suite_table("swapped", ("reach",), "train", EvaluateVLAConfig())
            )
            played.append(
                [(e.record.seed, e.record.length, e.goal, e.instruction, e.record.success_once) for e in found]
            )
    assert played[0] == played[1]
    assert [seed for seed, *_ in played[0]] == [episode_seed(seed, 0) for seed, _ in plays]


# ---------------------------------------------------------------- true positives: the expert in the policy's place


class ExpertSeats(Seats):
    """Decides with the scripted expert, which looks into the environment."""

    deaf = False

    def act(self, active: Sequence[int], noise: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        actions = []
        for index in active:
            env = self.seats[index].env
            meant = env.slots
            if self.deaf and env._other_slots is not None:
                env.slots = env._other_slots
            actions.append(Expert(env).act())
            env.slots = meant
        log_probs, percept = (np.zeros((len(active), size), np.float32) for size in (1, PERCEPT))
        return np.stack(actions)[:, None], log_probs, percept


class DeafSeats(ExpertSeats):
    """Does what the scene's first words asked for, whatever it is told."""

    deaf = True


def expert_judge(kind: type[ExpertSeats]) -> Callable[..., Any]:
    class Worker(Player):
        def _evaluation_seats(self, environment: TableConfig, plays: int) -> Seats:
            table = super()._evaluation_seats(environment, plays)
            table.__class__ = kind
            return table

    class ExpertJudge:
        def __init__(self, policy: VLAPolicy, *, workers: int, count: int) -> None:
            with tempfile.TemporaryDirectory() as folder:
                policy.save_pretrained(folder)
                arrays = SharedArrays(layout_of(policy, count, 1))
                self.worker = Worker(range(count), TableConfig(count=count, workers=0), Path(folder), arrays)

        def evaluate(
            self, policy: VLAPolicy, plays: Sequence[Play], *, environment: TableConfig, deterministic: bool
        ) -> list[TableEpisode]:
            return self.worker.evaluate(plays, environment, deterministic)

        def __enter__(self) -> ExpertJudge:
            return self

        def __exit__(self, *exception: object) -> None:
            self.worker.close()

    return ExpertJudge


@pytest.mark.parametrize(("kind", "new", "original"), [(ExpertSeats, 1.0, 0.0), (DeafSeats, 0.0, 1.0)])
def test_swapped_words_tell_who_listens(
    kind: type[ExpertSeats], new: float, original: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_vla, "Judge", expert_judge(kind))
    config = EvaluateVLAConfig(episodes=3, suites=("normal", "swapped"), tasks=("reach", "pick"), count=4)
    report = evaluate_policy(tiny(chunk=1), config)
    assert report["suites"]["normal"]["success_once"] == 1.0
    assert report["suites"]["swapped"]["success_once"] == new
    assert report["suites"]["swapped"]["success_of_original"] == original


def test_played_to_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_vla, "Judge", expert_judge(ExpertSeats))
    config = EvaluateVLAConfig(episodes=2, suites=("normal",), tasks=("pick",), count=2, until_time_limit=True)
    found = evaluate_policy(tiny(chunk=1), config)["suites"]["normal"]
    assert (found["success_once"], found["success_at_end"], found["mean_length"]) == (1.0, 1.0, 64.0)


# ---------------------------------------------------------------- runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one task with an untrained policy as its best checkpoint."""
    folder = tmp_path / "run"
    tiny(ablate="words").save_pretrained(folder / "checkpoints" / "000000003" / "policy")
    (folder / "checkpoints" / "best").symlink_to("000000003")
    (folder / "config.yaml").write_text("recipe: embodied/vla_ppo\nenvironment:\n  tasks: [reach]\n")
    return folder


def test_a_run_is_evaluated_and_filmed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["episodes=2", "workers=0", "count=2", "videos=2", "suites=[normal,randomized,swapped]"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # words that the policy never met are told of in the report, once
        assert cli.main(["eval", str(run), *words]) == 0
    out = capsys.readouterr().out
    assert "a floor: words replaced by zeros" in out
    assert out.count("never met") == 1
    assert f"written to {run / 'eval.json'}" in out
    report = json.loads((run / "eval.json").read_text())
    assert (report["recipe"], report["checkpoint"], report["first_seed"]) == (
        "embodied/vla_ppo",
        "000000003",
        TEST_SEEDS,
    )
    assert report["policy"]["ablate"] == "words"
    assert report["config"]["tasks"] == ["reach"]
    assert list(report["suites"]) == ["normal", "randomized", "swapped"]
    for found in report["suites"].values():
        assert (found["episodes"], list(found["tasks"])) == (2, ["reach"])
    assert sorted(path.name for path in (run / "videos").iterdir()) == [
        "eval-reach-0.mp4",
        "eval-reach-1.mp4",
        "eval.png",
    ]


def test_the_policy_is_judged_by_the_mode_or_by_samples() -> None:
    policy, plays = tiny(log_std=0.0), suite_plays("normal", ("push",), 2)
    with Judge(policy, workers=0, count=1) as judge:
        returns = [
            [episode.record.episode_return for episode in judge.evaluate(policy, plays, deterministic=mode)]
            for mode in (True, True, False, False)
        ]
    assert returns[0] == returns[1] != returns[2] == returns[3]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint=last", "there is no checkpoint 'last' to evaluate"),
        ("suites=[normal,swaped]", "one of normal, held_out, .*'swaped'"),
        ("tasks=[rech]", "there is no task 'rech': .*did you mean 'reach'"),
        ("suites=[randomized] randomization=ful", "did you mean 'full'"),
        ("episodes=0", "episodes"),
        ("workers=9 count=4", "workers 0..count"),
    ],
)
def test_mistakes_are_one_line(run: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(run), "workers=0", *override.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)
    assert not (run / "eval.json").exists()


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        (
            VLASpaces(16, ("front",), PROPRIO, STATE, 7),
            f"actions of 7; the table has proprio {PROPRIO}, state {STATE}, actions of 4",
        ),
        (VLASpaces(16, ("front", "side"), PROPRIO, STATE, 4), "a camera 'side'; the table's are front, wrist"),
        (VLASpaces(8, ("front",), PROPRIO, STATE, 4), "image_size"),
    ],
)
def test_a_policy_for_another_robot(spaces: VLASpaces, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_policy(tiny(spaces), EvaluateVLAConfig(episodes=1, workers=0))


def test_where_nothing_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError("cannot draw with MUJOCO_GL='none'")

    monkeypatch.setattr("envs.table.camera.picture", refuse)
    with pytest.raises(UserError, match="cannot draw"):
        evaluate_policy(tiny(), EvaluateVLAConfig(episodes=1, workers=0))


def test_a_policy_of_nan() -> None:
    policy = tiny()
    with torch.no_grad():
        policy.actor.last.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate_policy(policy, EvaluateVLAConfig(episodes=1, workers=0, tasks=("reach",)))


# ---------------------------------------------------------------- pictures


def test_long_instructions_take_two_lines() -> None:
    assert wrap("push the cube", len, 20) == ["push the cube"]
    assert wrap("push the red cube to the pad", len, 17) == ["push the red cube", "to the pad"]
    assert wrap("push the red cube to the white pad now", len, 17) == ["push the red cube", "to the white p..."]


def test_captions_are_in_the_picture_and_the_rest_is_left() -> None:
    frame = np.full((256, 256, 3), 100, np.uint8)
    written = caption(frame, "pick up the red cube", "pick", "success", (120, 240, 140))
    assert written.shape == frame.shape
    assert written[:20].max() > 200
    assert written[236:].max() > 200
    np.testing.assert_array_equal(written[40:220], frame[40:220])
    np.testing.assert_array_equal(frame, 100)


def test_the_sheet_has_three_pictures_of_each_film(tmp_path: Path) -> None:
    frames = [np.full((256, 256, 3), 50 * index, np.uint8) for index in range(5)]
    film = Film(episode(won=True), frames, [False] * 4 + [True])
    sheet = np.asarray(Image.open(contact_sheet([film], tmp_path / "sheet.png")))
    assert [int(sheet[128, column, 0]) for column in (128, 128 + 259, 128 + 2 * 259)] == [0, 100, 200]
