"""What `tandem data validate` says of formats other than LeRobot v3, and an overview of any source."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from embodied.datasets.check import problems
from embodied.datasets.finite import shown
from embodied.datasets.formats import open_dataset, read_dataset
from embodied.datasets.overview import overview
from experiment.errors import UserError

Make = Callable[..., Path]
V21 = Path(__file__).parents[2] / "fixtures" / "lerobot_v21"


@pytest.mark.parametrize("kind", ["robomimic", "libero", "d4rl", "d3rlpy", "minari", "lerobot"])
def test_good_sets_are_well(make: Make, kind: str) -> None:
    seen: list[int] = []
    assert list(problems(make(kind), seen.append)) == []
    assert seen == [0, 1, 2]


def test_an_overview_refuses_shapes_that_change(make: Make) -> None:
    path = make("robomimic")
    with h5py.File(path, "a") as file:
        steps = len(file["data/demo_1/actions"])
        del file["data/demo_1/actions"]
        file["data/demo_1/actions"] = np.zeros((steps, 5))
    with pytest.raises(UserError, match=r"data/demo_1: the action is \[5\], that of .*data/demo_0 \[2\]$"):
        overview(open_dataset(path))


def test_demonstrations_without_rewards_can_be_looked_at_and_cloned(make: Make) -> None:
    path = make("robomimic")
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            del demo["rewards"]
    assert list(problems(path)) == []
    assert overview(open_dataset(path)).returns == []
    assert not read_dataset(path, need_rewards=False)[0].rewards.any()
    with pytest.raises(UserError, match="has no rewards, which learning from values needs"):
        read_dataset(path)


def test_a_long_row_is_told_by_what_is_not_finite(make: Make) -> None:
    assert shown(np.array([1.0, np.nan])) == "[1.0, nan]"
    row = np.zeros(39, np.float32)
    row[7] = np.inf
    assert shown(row) == "inf at 7, of 39 numbers"
    row[[9, 11]] = np.nan
    assert shown(row) == "inf at 7 and 2 more, of 39 numbers"


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_an_older_lerobot_is_well(kind: str) -> None:
    assert list(problems(V21 / kind)) == []


def test_every_problem_has_its_line(make: Make) -> None:
    path = make("robomimic")
    with h5py.File(path, "a") as file:
        file["data/demo_1/actions"][1, 1] = np.inf
        del file["data/demo_2/rewards"]
    assert list(problems(path)) == [
        f"{path}: data/demo_1: actions row 1 is not finite: [0.125, inf]",
        f"{path}: data/demo_2: the reward is absent, that of {path}: data/demo_0 []",
    ]


def test_a_missing_video(tmp_path: Path) -> None:
    folder = shutil.copytree(V21 / "videos", tmp_path / "set")
    path = folder / "videos/chunk-000/observation.images.front/episode_000001.mp4"
    path.unlink()
    assert list(problems(folder)) == [f"{path}: no such file; `tandem data validate` lists what is missing"]


def test_what_is_assumed_is_told(make: Make) -> None:
    path = make("d4rl", timeouts=False)
    (line,) = problems(path)
    assert "has neither timeouts nor next_observations: only terminals separate its episodes" in line


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    assert list(problems(tmp_path)) == [
        f"{tmp_path}: this folder is no data set that Tandem reads "
        "(LeRobot v2.1 and v3, Minari, robomimic, LIBERO, D4RL, d3rlpy)"
    ]


def test_an_overview_by_hand(make: Make) -> None:
    found = overview(open_dataset(make("minari")))
    assert (found.terminated, found.truncated, found.final) == (2, 1, 1)
    assert found.returns == [1.5, 5 + 2.5, 2.0]
    assert found.successes == [True, False, True]
    assert found.features == [
        ("observation.state", "float32", (3,)),
        ("action", "float32", (2,)),
        ("next.reward", "float32", (1,)),
    ]
    assert found.stats["action"]["count"].tolist() == [10]
    assert found.stats["observation.state"]["max"].tolist() == [20.0, 4.0, 0.0]


def test_an_overview_lists_cameras(make: Make) -> None:
    found = overview(open_dataset(make("libero")))
    assert found.features[:2] == [
        ("observation.images.agentview_rgb", "image", (8, 8, 3)),
        ("observation.images.eye_in_hand_rgb", "image", (8, 8, 3)),
    ]
