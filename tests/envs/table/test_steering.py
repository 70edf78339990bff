import numpy as np
import pytest

from envs.table.steering import (
    BACKSPACE,
    DOWN,
    ENTER,
    ESCAPE,
    KEYPAD_ENTER,
    LEFT,
    PAGE_DOWN,
    PAGE_UP,
    RIGHT,
    SPACE,
    UP,
    Command,
    Pace,
    Steering,
)

PACE = Pace(normal=0.5, slow=0.125, pulse=0.25)


@pytest.fixture
def steering() -> Steering:
    return Steering(PACE)


@pytest.mark.parametrize(
    "keys, way",
    # Seen from the front, looking along -x: right is +y, into the picture is -x.
    [
        ((RIGHT, ord("D")), (0, 0.5, 0)),
        ((LEFT, ord("A")), (0, -0.5, 0)),
        ((UP, ord("W")), (-0.5, 0, 0)),
        ((DOWN, ord("S")), (0.5, 0, 0)),
        ((PAGE_UP, ord("R")), (0, 0, 0.5)),
        ((PAGE_DOWN, ord("F")), (0, 0, -0.5)),
    ],
)
def test_where_keys_go(keys: tuple[int, int], way: tuple[float, float, float]) -> None:
    for key in keys:
        steering = Steering(PACE)
        steering.press(key, 0.0)
        action = steering.action(0.0)
        assert action.dtype == np.float32
        assert action.tolist() == [*way, -1.0]


@pytest.mark.parametrize(
    "azimuth, way",
    # Looking along +x (0 degrees) right is -y; along +y (90) it is +x; along -y (270) it is -x.
    [
        (0, (0, -0.5)),
        (90, (0.5, 0)),
        (180, (0, 0.5)),
        (270, (-0.5, 0)),
        (-90, (-0.5, 0)),
        (220, (0, 0.5)),
        (130, (0.5, 0)),
    ],
)
def test_right_is_right_in_the_picture(steering: Steering, azimuth: float, way: tuple[float, float]) -> None:
    steering.press(RIGHT, 0.0)
    assert steering.action(0.0, azimuth)[:2].tolist() == list(way)


def test_a_key_moves_until_it_is_released(steering: Steering) -> None:
    steering.press(RIGHT, 0.0)
    assert [steering.action(now)[1] for now in (0.1, 5.0, 50.0)] == [0.5, 0.5, 0.5]
    steering.release(RIGHT)
    assert steering.action(50.1)[1] == 0.0


def test_the_shortest_tap_moves_for_one_step(steering: Steering) -> None:
    steering.press(RIGHT, 0.0)
    steering.release(RIGHT)
    assert not steering.idle
    assert [steering.action(now)[1] for now in (0.1, 0.2)] == [0.5, 0.0]


def test_without_releases_a_press_lasts_a_moment_and_repeats_extend_it(steering: Steering) -> None:
    steering.press(RIGHT, 1.0, released_later=False)
    assert [steering.action(now)[1] for now in (1.0, 1.2)] == [0.5, 0.5]
    steering.press(RIGHT, 1.2, released_later=False)
    assert [steering.action(now)[1] for now in (1.3, 1.44, 1.46)] == [0.5, 0.5, 0.0]


def test_a_pulse_that_is_over_before_it_is_seen_moves_for_one_step(steering: Steering) -> None:
    steering.press(RIGHT, 1.0, released_later=False)
    assert [steering.action(now)[1] for now in (9.0, 9.1)] == [0.5, 0.0]


def test_keys_add_and_opposite_ones_cancel(steering: Steering) -> None:
    for key in (RIGHT, ord("D"), UP, ord("R"), PAGE_DOWN):
        steering.press(key, 0.0)
    assert steering.action(0.0)[:3].tolist() == [-0.5, 0.5, 0.0]


def test_slow_and_fast(steering: Steering) -> None:
    steering.press(ord("Q"), 0.0)
    steering.press(RIGHT, 0.0)
    assert steering.action(0.0)[1] == 0.125
    steering.press(ord("Q"), 0.0)
    assert steering.action(0.0)[1] == 0.5


def test_the_gripper_toggles(steering: Steering) -> None:
    assert steering.action(0.0)[3] == -1.0
    steering.press(SPACE, 0.0)
    assert steering.action(0.0)[3] == 1.0
    assert not steering.idle
    steering.press(SPACE, 0.0)
    assert steering.action(0.0)[3] == -1.0


def test_sticks_add_to_keys_within_the_bounds(steering: Steering) -> None:
    steering.lean(0, -0.5)
    steering.lean(1, 0.25)
    steering.lean(2, 1.0)
    steering.press(ord("R"), 0.0)
    assert not steering.idle
    assert steering.action(0.0)[:3].tolist() == [-0.125, -0.25, 0.5]


def test_commands_come_in_order_and_once(steering: Steering) -> None:
    for key in (ENTER, KEYPAD_ENTER, BACKSPACE, ord("N"), ESCAPE):
        steering.press(key, 0.0)
    taken = [steering.take() for _ in range(6)]
    assert taken == [Command.SAVE, Command.SAVE, Command.AGAIN, Command.NEXT, Command.QUIT, None]
    assert steering.idle


def test_other_keys_do_nothing(steering: Steering) -> None:
    steering.press(ord("Z"), 0.0)
    assert steering.idle
    assert steering.take() is None
    steering.release(RIGHT)


def test_a_new_episode_forgets_keys_and_commands_but_not_the_pace(steering: Steering) -> None:
    for key in (RIGHT, SPACE, ENTER, ord("Q")):
        steering.press(key, 0.0)
    steering.press(LEFT, 0.0, released_later=False)
    steering.begin()
    assert steering.idle
    assert steering.slow
    assert steering.take() is None
    assert steering.action(0.1).tolist() == [0.0, 0.0, 0.0, -1.0]
    steering.release(RIGHT)
    steering.press(RIGHT, 0.2)
    assert steering.action(0.2)[1] == 0.125
