"""Films and sheets of recorded episodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from embodied.datasets.drawing import film, sheet
from embodied.datasets.recorded import RecordedEpisode
from experiment.errors import UserError

EPISODE = RecordedEpisode(
    images={
        "front": np.stack([np.full((8, 16, 3), 30 * step, np.uint8) for step in range(5)]),
        "wrist": np.full((5, 4, 4, 3), 200, np.uint8),
    },
    proprio=np.zeros((5, 0), np.float32),
    actions=np.zeros((5, 2), np.float32),
    terminated=True,
    truncated=False,
    instruction="push the red cube to the white pad",
    rewards=np.ones(5, np.float32),
    success=True,
    name="an episode",
)
ALONE = replace(EPISODE, images={"front": EPISODE.images["front"]})


def test_film_enlarges_and_writes_under_the_picture() -> None:
    frames = list(film(ALONE))
    assert len(frames) == 5
    height, width = frames[0].shape[:2]
    assert width == 320  # 16 pixels, 20 times
    assert height % 2 == 0
    for step, frame in enumerate(frames):
        assert (frame[:160] == 30 * step).all()
        assert (frame[160:] > 100).any()  # letters
    silent = next(film(replace(ALONE, instruction="")))
    assert silent.shape == frames[0].shape
    assert not np.array_equal(silent, frames[0])


def test_only_the_last_frame_says_how_it_ended() -> None:
    def green(frame: np.ndarray) -> bool:
        return bool(((frame[..., 1] > 200) & (frame[..., 0] < 150)).any())

    frames = list(film(ALONE))
    assert [green(frame) for frame in frames] == [False] * 4 + [True]
    assert not any(green(frame) for frame in film(replace(ALONE, success=False)))


def test_cameras_stand_side_by_side() -> None:
    assert next(film(EPISODE)).shape[1] == 320 + 320
    assert next(film(EPISODE, ("wrist",))).shape[1] == 320
    assert (next(film(EPISODE, ("wrist", "front")))[:160, :320] == 200).all()


def test_long_instructions_are_wrapped() -> None:
    long = next(film(replace(ALONE, instruction="push the red cube " * 6)))
    assert long.shape[0] > next(film(ALONE)).shape[0]
    assert long.shape[1] == 320


def test_sheet_shows_the_first_and_the_last() -> None:
    picture = sheet(ALONE, pictures=2)
    assert picture.shape[1] == 2 * 160
    assert (picture[:80, :160] == 0).all()
    assert (picture[:80, 160:] == 120).all()
    assert sheet(ALONE, pictures=9).shape[1] == 4 * 160


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(UserError, match="an episode: has no camera 'top'; it has front, wrist"):
        next(film(EPISODE, ("top",)))
    with pytest.raises(UserError, match="an episode: has no pictures to show"):
        sheet(replace(EPISODE, images={}))
