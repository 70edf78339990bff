"""The ring: what it holds, what it forgets, and that it comes back from a checkpoint."""

from __future__ import annotations

import pytest
import torch

from policy_core.replay import Replay
from tests.policy_core.test_critics import transitions


def test_the_oldest_make_way() -> None:
    replay = Replay(5)
    first, second = transitions(3), transitions(4)
    assert replay.add(first).tolist() == [0, 1, 2]
    assert len(replay) == 3
    assert replay.add(second).tolist() == [3, 4, 0, 1]
    assert len(replay) == 5
    assert replay.columns is not None
    expected = torch.stack([second.rewards[2], second.rewards[3], first.rewards[2], *second.rewards[:2]])
    torch.testing.assert_close(replay.columns.rewards, expected)


def test_only_what_is_held_is_drawn() -> None:
    replay, generator = Replay(1000), torch.Generator().manual_seed(0)
    held = transitions(3)
    replay.add(held)
    batch, returns = replay.draw(200, generator)
    assert set(batch.rewards.tolist()) == set(held.rewards.tolist())
    assert returns.tolist() == [-torch.inf] * 200
    for name in ("observations", "actions", "next_observations"):
        row = held.rewards.tolist().index(float(batch.rewards[7]))
        assert torch.equal(getattr(batch, name)[7], getattr(held, name)[row])


def test_returns_are_forgotten_with_their_transition() -> None:
    replay = Replay(2)
    where = replay.add(transitions(2))
    assert replay.returns is not None
    replay.returns[where] = torch.tensor([1.0, 2.0])
    replay.add(transitions(1))
    assert replay.returns.tolist() == [-torch.inf, 2.0]


@pytest.mark.parametrize("added", [(), (3,), (4, 4)])
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(added: tuple[int, ...]) -> None:
    replay = Replay(6)
    for count in added:
        where = replay.add(transitions(count))
        assert replay.returns is not None
        replay.returns[where] = torch.randn(count)
    again = Replay(6)
    again.load_state_dict(replay.state_dict())
    more = transitions(2)
    assert torch.equal(replay.add(more), again.add(more))
    first, second = (r.draw(50, torch.Generator().manual_seed(1)) for r in (replay, again))
    assert torch.equal(first[0].rewards, second[0].rewards)
    assert torch.equal(first[1], second[1])


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        Replay(0)
    with pytest.raises(ValueError, match="3 transitions do not fit into a replay of 2"):
        Replay(2).add(transitions(3))
    with pytest.raises(ValueError, match="the replay is empty"):
        Replay(2).draw(1, torch.Generator())
