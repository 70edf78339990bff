"""What a batch of control steps holds, number by number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from embodied.datasets.recorded import RecordedEpisode
from embodied.policies.augment import AugmentConfig
from embodied.policies.vla import VLASpaces
from embodied.policies.words import Words
from embodied.vla.control_steps import ControlSteps, Shuffled, disturb
from experiment.errors import UserError

UNCHANGED = AugmentConfig(shift=0, brightness=0.0, contrast=0.0, tint=0.0)
WORDS = Words(["cube", "red"])


def episode(length: int, first: int, instruction: str) -> RecordedEpisode:
    """Every number of step t is first + t; the teacher's are 100 more."""
    rows = np.arange(first, first + length, dtype=np.float32)[:, None]
    images = {name: np.full((length, 4, 4, 3), first, np.uint8) for name in ("front", "wrist")}
    return RecordedEpisode(
        images, rows, rows.repeat(2, 1), True, False, instruction, rows.repeat(3, 1), rows.repeat(2, 1) + 100
    )


EPISODES = [episode(3, 0, "red cube"), episode(2, 10, "cube")]


def steps() -> ControlSteps:
    return ControlSteps.of(EPISODES, ["front", "wrist"], WORDS, 3)


def test_a_chunk_has_the_labels_from_there_to_the_end_of_its_episode() -> None:
    data = steps()
    assert len(data) == 5
    chunks = data.chunks(torch.tensor([1, 3]), 3)
    assert chunks.executed.tolist() == [[True, True, False], [True, True, False]]
    assert chunks.actions[0, :2].tolist() == [[101, 101], [102, 102]]
    assert chunks.actions[1, :2].tolist() == [[110, 110], [111, 111]]
    assert data.chunks(torch.tensor([2, 4]), 2).executed.tolist() == [[True, False], [True, False]]
    seen = chunks.observations
    assert seen.keys() == {"image", "wrist_image", "proprio", "state", "words"}
    assert seen["proprio"].tolist() == [[1], [10]]
    assert seen["state"].tolist() == [[1, 1, 1], [10, 10, 10]]
    assert seen["words"].tolist() == [[3, 2, 0], [2, 0, 0]]
    assert seen["image"].shape == (2, 4, 4, 3)
    assert seen["wrist_image"].flatten(1).unique(dim=1).tolist() == [[0], [10]]


def test_without_a_teacher_the_executed_actions_are_the_labels() -> None:
    data = ControlSteps.of([replace(EPISODES[0], expert_actions=None)], ["front"], WORDS, 3)
    assert data.labels.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_the_spaces_are_those_of_the_data() -> None:
    assert steps().spaces() == VLASpaces(4, ("front", "wrist"), 1, 3, 2)
    wide = replace(EPISODES[0], images={"front": np.zeros((3, 4, 6, 3), np.uint8)})
    with pytest.raises(UserError, match="6x4: the policy takes square ones"):
        ControlSteps.of([wide], ["front"], WORDS, 3).spaces()


def test_a_recording_without_a_state_is_refused() -> None:
    with pytest.raises(UserError, match="door 3: no environment state was recorded"):
        ControlSteps.of([replace(EPISODES[0], state=None, name="door 3")], ["front"], WORDS, 3)


def test_word_dropout_makes_words_unknown_but_no_padding() -> None:
    data = steps()
    chunks = data.chunks(torch.zeros(4000, dtype=torch.int64), 2)
    seen = chunks.observations
    disturbed = disturb(seen, UNCHANGED, word_dropout=0.25, generator=torch.Generator().manual_seed(0))
    changed = disturbed["words"]
    assert set(changed[:, 0].tolist()) == {1, 3}
    assert set(changed[:, 1].tolist()) == {1, 2}
    assert (changed[:, 2] == 0).all()
    assert float((changed[:, :2] == 1).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert disturbed["proprio"] is seen["proprio"]
    assert data.words.tolist() == [[3, 2, 0], [2, 0, 0]]


def test_only_images_are_augmented() -> None:
    seen = steps().chunks(torch.tensor([3, 4]), 2).observations
    bright = replace(UNCHANGED, brightness=0.5)
    changed = disturb(seen, bright, word_dropout=0.0, generator=torch.Generator().manual_seed(0))
    assert changed.keys() == seen.keys()
    assert {name for name in seen if changed[name].equal(seen[name])} == {"proprio", "state", "words"}


def test_every_row_once_an_epoch_whatever_came_before() -> None:
    shuffled = Shuffled(10, 3, seed=5)
    batches = [shuffled.batch(index) for index in range(6)]
    for epoch in (batches[:3], batches[3:]):
        rows = torch.cat(epoch).tolist()
        assert len(set(rows)) == 9
        assert set(rows) < set(range(10))
    assert torch.cat(batches[:3]).tolist() != torch.cat(batches[3:]).tolist()
    assert Shuffled(10, 3, seed=5).batch(4).equal(batches[4])  # as after a resume
    assert not Shuffled(10, 3, seed=6).batch(0).equal(batches[0])
    assert sorted(Shuffled(2, 8, seed=0).batch(7).tolist()) == [0, 1]  # fewer rows than a batch
