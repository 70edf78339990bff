import numpy as np
import pytest

from envs.randomization import Delay
from envs.randomization.sensing import UNTOUCHED, changed_picture, noisy_vector


@pytest.mark.parametrize(
    "steps, seen", [(0, [1, 2, 3, 4]), (1, [0, 1, 2, 3]), (2, [0, 0, 1, 2]), (5, [0, 0, 0, 0])]
)
def test_what_comes_out_is_of_so_many_steps_ago(steps: int, seen: list[int]) -> None:
    delay = Delay(steps)
    assert delay.reset(0) == 0
    assert [delay.push(value) for value in (1, 2, 3, 4)] == seen


def test_actions_are_neutral_until_the_first_comes_through() -> None:
    delay, neutral = Delay(2), np.zeros(2)
    delay.reset(neutral)
    neutral[:] = 9.0
    executed = [delay.push(np.full(2, float(number))) for number in (1, 2, 3, 4)]
    assert np.array(executed)[:, 0].tolist() == [0, 0, 1, 2]


def test_a_buffer_written_over_later_stays_stale() -> None:
    """Simulators hand out views of the present; a queue of these would not delay anything."""
    present = {"proprio": np.zeros(3), "instruction": "push"}
    delay = Delay(1)
    delay.reset(present)
    for step in range(1, 4):
        present["proprio"][:] = step  # type: ignore[index]
        assert delay.push(present)["proprio"].tolist() == [step - 1] * 3


def test_what_came_out_is_not_shared() -> None:
    delay = Delay(2)
    delay.reset(np.zeros(1))
    delay.push(np.ones(1))[:] = 7
    assert delay.push(np.ones(1)).tolist() == [0]


def test_each_episode_starts_anew() -> None:
    delay = Delay(2)
    delay.reset("a")
    delay.push("b")
    delay.reset("c")
    assert [delay.push(value) for value in "def"] == ["c", "c", "d"]


def test_reset_comes_first() -> None:
    for steps in (0, 2):
        with pytest.raises(ValueError, match=r"reset\(first\)"):
            Delay(steps).push(1)


def test_noise_on_vectors() -> None:
    vector = np.arange(4, dtype=np.float32)
    noisy = np.array([noisy_vector(vector, 0.1, np.random.default_rng(seed)) for seed in range(2000)])
    assert noisy.dtype == np.float32
    assert np.allclose(noisy.mean(axis=0), vector, atol=0.01)
    assert np.allclose(noisy.std(axis=0), 0.1, atol=0.01)
    assert abs(np.corrcoef(noisy[:, 0], noisy[:, 1])[0, 1]) < 0.1
    assert noisy_vector(vector, 0.0, np.random.default_rng(0)) is vector


def picture(**changes: float) -> np.ndarray:
    values = np.array([[[0, 64, 128], [200, 250, 255]]], np.uint8)
    return changed_picture(values, {**UNTOUCHED, **changes}, np.random.default_rng(0))


def test_brightness_and_contrast() -> None:
    assert picture().tolist() == [[[0, 64, 128], [200, 250, 255]]]
    # + 0.1 * 255 = 25.5, rounded to even, cut at 255
    assert picture(image_brightness=0.1).tolist() == [[[26, 90, 154], [226, 255, 255]]]
    # 127.5 + (x - 127.5) / 2
    assert picture(image_contrast=0.5).tolist() == [[[64, 96, 128], [164, 189, 191]]]
    # contrast first: 127.5 + 2 * (x - 127.5) - 51
    both = picture(image_contrast=2.0, image_brightness=-0.2)
    assert both.tolist() == [[[0, 0, 78], [222, 255, 255]]]
    assert both.dtype == np.uint8


def test_noise_on_pictures() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    rng = np.random.default_rng(0)
    noisy = changed_picture(grey, {**UNTOUCHED, "image_noise": 0.04}, rng)
    assert noisy.dtype == np.uint8
    assert noisy.astype(float).mean() == pytest.approx(128, abs=0.5)
    assert noisy.astype(float).std() == pytest.approx(10.2, abs=0.3)
    assert not np.array_equal(noisy, changed_picture(grey, {**UNTOUCHED, "image_noise": 0.04}, rng))


def test_only_bytes_are_pictures() -> None:
    with pytest.raises(ValueError, match="a picture is uint8, got float32"):
        changed_picture(np.zeros((2, 2, 3), np.float32), UNTOUCHED, np.random.default_rng(0))
