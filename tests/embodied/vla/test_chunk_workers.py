"""Workers at the table: chunks end with their episodes, the number of workers changes nothing, states continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embodied.vla.chunk_rollout import ChunkCollector, ChunkExperience
from embodied.vla.chunk_workers import export_weights, floats_of, load_weights
from embodied.vla.seats import Seat, Seats, TableConfig, make_table
from envs.stepper import episode_seed
from envs.table.env import TIME_LIMIT, TableEnv
from envs.table.language import held_out, parse, phrases
from envs.table.observations import PROPRIO
from experiment.errors import UserError
from experiment.state import load_state, save_state
from tests.embodied.tables import tiny_policy

ELAPSED = 38  # of the privileged state: share of the time limit
TENSORS = ("actions", "log_probs", "rewards", "executed", "terminated", "truncated", "next_states")


def table(**changes: Any) -> TableConfig:
    return TableConfig(**{"count": 2, "workers": 0, **changes})


def assert_same(mine: ChunkExperience, other: ChunkExperience, **tolerance: float) -> None:
    exact: dict[str, Any] = {"rtol": 0.0, "atol": 0.0, **tolerance}
    for name in TENSORS:
        torch.testing.assert_close(getattr(other, name), getattr(mine, name), **exact, msg=name)
    for name, seen in mine.observations.items():
        if name != "image" or not tolerance:
            torch.testing.assert_close(other.observations[name], seen, **exact, msg=name)
    finals = [
        {(row, column): state for row, column, state in experience.final_states} for experience in (mine, other)
    ]
    assert finals[0].keys() == finals[1].keys()
    for place, state in finals[0].items():
        np.testing.assert_allclose(finals[1][place], state, **exact)
    assert {(e.record.seed, e.record.length, e.goal, e.instruction) for e in mine.episodes} == {
        (e.record.seed, e.record.length, e.goal, e.instruction) for e in other.episodes
    }


# ------------------------------------------------------------------ one chunk, by hand


class Scripted:
    """Answers steps from a list of (reward, terminated, success)."""

    judged, instruction, goal = True, "reach the red cube", parse("reach the red cube")

    def __init__(self, script: list[tuple[float, bool, bool]]) -> None:
        self.script, self.swapped = script, False
        self.actions: list[float] = []

    def reset(self, *, seed: int, options: dict[str, Any] | None) -> None:
        self.actions = []

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.actions.append(float(action[0]))
        reward, terminated, success = self.script[len(self.actions) - 1]
        info = {"success": success, "is_success": success}
        if self.swapped:
            info["success_of_original"] = len(self.actions) == 2
        return {}, reward, terminated, False, info


CHUNK = np.array([[0.1], [0.2], [0.3], [0.4]])


def test_a_chunk_stops_where_its_episode_ends() -> None:
    env: Any = Scripted([(1.0, False, False)] * 4 + [(2.0, False, True), (4.0, True, False), (8.0, False, False)])
    seat = Seat(env)
    seat.begin(11)
    rewards = np.zeros((2, 4), np.float32)
    assert seat.execute(CHUNK, rewards[0]) == (4, False, False)
    assert seat.execute(CHUNK, rewards[1]) == (2, True, False)
    assert rewards.tolist() == [[1.0, 1.0, 1.0, 1.0], [2.0, 4.0, 0.0, 0.0]]
    assert env.actions == [0.1, 0.2, 0.3, 0.4, 0.1, 0.2]
    record, task, goal, instruction, original = seat.episode(True, False)
    assert record == (10.0, 6, True, False, True, False, 0, 11)
    assert (task, goal, instruction, original) == ("reach", "reach red cube", "reach the red cube", None)
    seat.begin(12)
    assert seat.episode(False, False).record == (0.0, 0, False, False, False, False, 1, 12)


def test_the_time_limit_cuts_inside_a_chunk() -> None:
    env: Any = Scripted([(0.0, False, False)] * 70)
    seat = Seat(env)
    seat.begin(0)
    chunk, rewards = np.zeros((5, 1)), np.zeros(5, np.float32)
    played = [seat.execute(chunk, rewards) for _ in range(13)]
    assert played == [(5, False, False)] * 12 + [(4, False, True)]
    assert seat.length == TIME_LIMIT == 64


def test_what_was_not_asked_for_and_what_cannot_be_judged() -> None:
    env: Any = Scripted([(0.0, False, True)] * 4)
    env.swapped, env.judged = True, False
    seat = Seat(env)
    seat.begin(0)
    seat.execute(CHUNK, np.zeros(4, np.float32))
    episode = seat.episode(False, True)
    assert episode.success_of_original is True  # once is enough
    assert (episode.record.success_once, episode.record.success_at_end) == (None, None)


# ------------------------------------------------------------------ weights


def test_weights_travel_as_one_vector_with_the_normalizers() -> None:
    mine, other = tiny_policy(0), tiny_policy(1)
    mine.proprio_normalizer.update(torch.randn(50, PROPRIO) * 3 + 1)
    weights = np.zeros(sum(tensor.numel() for tensor in floats_of(mine)), np.float32)
    export_weights(mine, weights)
    load_weights(other, weights)
    observations = {
        "image": torch.randint(0, 255, (3, 32, 32, 3), dtype=torch.uint8),
        "proprio": torch.randn(3, PROPRIO),
        "words": torch.randint(0, 20, (3, 16)),
    }
    for found, expected in zip(other.act(observations, None), mine.act(observations, None), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(other.perceive(observations), mine.perceive(observations))


# ------------------------------------------------------------------ whole rollouts


def test_the_number_of_workers_changes_nothing() -> None:
    policy = tiny_policy()
    seen = []
    for workers in (0, 2):
        with ChunkCollector(table(count=3, workers=workers), policy, chunks=10, seed=5) as collector:
            collected = [collector.collect(policy) for _ in range(2)]
            played = collector.evaluate(policy, [(seed, None) for seed in (7, 8, 9)], deterministic=False)
        seen.append((collected, played))
    for mine, other in zip(seen[0][0], seen[1][0], strict=True):
        assert mine.control_steps == other.control_steps > 100
        assert_same(mine, other, rtol=1e-3, atol=1e-3)
    assert [e.record.seed for e in seen[0][1]] == [e.record.seed for e in seen[1][1]]
    np.testing.assert_allclose(
        [e.record.episode_return for e in seen[0][1]], [e.record.episode_return for e in seen[1][1]], atol=1e-2
    )


def test_what_is_seen_at_the_time_limit() -> None:
    """Chunks of 5: the 13th has 4 steps, its true last state is at the limit, the next chunk sees a new episode."""
    policy = tiny_policy(chunk=5)
    with ChunkCollector(table(tasks=("stack",)), policy, chunks=14, seed=1) as collector:
        experience = collector.collect(policy)
        following = collector.collect(policy)
    assert experience.executed.tolist() == [[5] * 12 + [4, 5]] * 2
    assert experience.truncated.nonzero().tolist() == [[0, 12], [1, 12]]
    assert not experience.terminated.any()
    assert not experience.rewards[:, 12, 4:].any()
    elapsed = experience.observations["state"][..., ELAPSED]
    expected = torch.tensor([*range(0, 64, 5), 0]) / 64
    torch.testing.assert_close(elapsed, expected.expand(2, 14))
    assert [(row, column) for row, column, _ in experience.final_states] == [(0, 12), (1, 12)]
    assert [float(state[ELAPSED]) for _, _, state in experience.final_states] == [1.0, 1.0]
    torch.testing.assert_close(experience.next_states, following.observations["state"][:, 0])
    assert experience.next_states[:, ELAPSED].tolist() == pytest.approx([5 / 64] * 2)
    for row, episode in enumerate(experience.episodes):
        assert episode.record.length == 64
        assert episode.record.seed == episode_seed(1000 + row, 0)
        assert episode.record.episode_return == pytest.approx(float(experience.rewards[row, :13].sum()), abs=1e-5)
        assert episode.task == "stack"
    words = experience.observations["words"]
    assert torch.equal(words[:, 0], words[:, 12])
    assert torch.equal(words[0, 0], policy.words.encode(experience.episodes[0].instruction))


def test_pictures_are_of_the_moment_before_the_chunk() -> None:
    policy = tiny_policy()
    with ChunkCollector(table(count=1), policy, chunks=2, seed=3) as collector:
        experience = collector.collect(policy)
    env = TableEnv(observe=("image",), image_size=32)
    first, _ = env.reset(seed=episode_seed(3000, 0))
    np.testing.assert_array_equal(experience.observations["image"][0, 0].numpy(), first["image"])
    for action in experience.actions[0, 0].numpy():
        seen = env.step(np.clip(action, -1, 1))[0]
    np.testing.assert_array_equal(experience.observations["image"][0, 1].numpy(), seen["image"])


def test_states_are_of_the_moment_before_each_control_step() -> None:
    policy = tiny_policy()
    with ChunkCollector(table(count=1), policy, chunks=2, seed=3, step_states=True) as collector:
        experience = collector.collect(policy)
    env = TableEnv(observe=("state",))
    seen = env.reset(seed=episode_seed(3000, 0))[0]["state"]
    for chunk in range(2):
        for step, action in enumerate(experience.actions[0, chunk].numpy()):
            np.testing.assert_array_equal(experience.step_states[0, chunk, step].numpy(), seen)
            seen = env.step(np.clip(action, -1, 1))[0]["state"]
    np.testing.assert_array_equal(experience.next_states[0].numpy(), seen)


def test_what_the_table_complains_of_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be drawn, in training too; while a mistake of the policy's own keeps its traceback."""
    policy = tiny_policy()

    def refuse(*arguments: object) -> None:
        raise ValueError("cannot draw with MUJOCO_GL='none'")

    with monkeypatch.context() as patch:
        patch.setattr("envs.table.camera.picture", refuse)
        with pytest.raises(UserError, match=r"^environment: cannot draw"):
            ChunkCollector(table(), policy, chunks=1, seed=0)
    with ChunkCollector(table(), policy, chunks=1, seed=0) as collector:
        with torch.no_grad():
            policy.actor.last.bias.fill_(torch.nan)
        with pytest.raises(UserError, match=r"^environment: .*not finite"):
            collector.collect(policy)


def test_an_evaluation_play_is_as_in_a_new_table(tmp_path: Path) -> None:
    """Also of what is drawn once at a table's start: whatever was played at a seat before."""
    rules = tmp_path / "heavy.yaml"
    rules.write_text("- {field: mass, names: object0, operation: scale, range: [0.5, 2.0], when: start}\n")
    seats = Seats(table(randomization=str(rules)), tiny_policy(), 2)
    masses = []
    for index, seeds in enumerate(((7,), (1, 2, 7))):
        for seed in seeds:
            seats.begin(index, seed, first=True)
        model = seats.seats[index].env.world.model
        masses.append(float(model.body("object0").mass[0]))
        seats.begin(index, 8)  # within one training, what was drawn at the start stays
        assert float(model.body("object0").mass[0]) == masses[-1]
    seats.close()
    assert masses[0] == masses[1]


def test_what_the_eyes_said_is_kept_and_is_what_the_hand_went_by() -> None:
    policy = tiny_policy()
    with ChunkCollector(table(count=3), policy, chunks=4, seed=8) as collector:
        experience = collector.collect(policy)
    with torch.no_grad():
        percept = policy.perceive(experience.observations)
    torch.testing.assert_close(experience.observations["percept"], percept, rtol=0.0, atol=1e-6)
    told = {name: experience.observations[name] for name in ("percept", "proprio")}
    log_probs = policy.distribution(told).log_prob(experience.actions).sum(-1)
    torch.testing.assert_close(log_probs, experience.log_probs, rtol=0.0, atol=1e-4)


def test_a_group_plays_the_same_resets_with_other_noise() -> None:
    policy = tiny_policy()
    with ChunkCollector(table(count=4), policy, chunks=17, seed=2, group_size=2) as collector:
        experiences = [collector.collect(policy, episodes=1) for _ in range(2)]
    for experience, number in zip(experiences, (0, 1), strict=True):
        state = experience.observations["state"][:, 0]
        assert torch.equal(state[0], state[1])
        assert torch.equal(state[2], state[3])
        assert not torch.equal(state[0], state[2])
        assert not torch.equal(experience.actions[0], experience.actions[1])
        assert sorted(e.record.number for e in experience.episodes) == [number] * 4
        ended = experience.terminated | experience.truncated
        assert ended.sum(1).tolist() == [1] * 4  # one whole episode a row, and nothing after it
        last = ended.long().argmax(1, keepdim=True)
        after = torch.arange(17) > last
        assert (experience.executed[after] == 0).all()
        assert (experience.executed[~after] > 0).all()
        assert not experience.rewards[after].any()
        assert not experience.log_probs[after].any()
        assert not experience.observations["percept"][after].any()
        assert experience.observations["percept"][~after].any(-1).all()


def test_the_newest_weights_act() -> None:
    policy = tiny_policy(min_log_std=-9.0)
    with ChunkCollector(table(count=1), policy, chunks=2, seed=0) as collector:
        with torch.no_grad():
            policy.actor.last.weight.zero_()
            policy.actor.last.bias.fill_(0.5)
            policy.log_std.fill_(-9.0)
        actions = collector.collect(policy).actions
    torch.testing.assert_close(actions, torch.full_like(actions, 0.5), rtol=0.0, atol=1e-3)


# ------------------------------------------------------------------ evaluation


def test_plays_come_in_their_order_with_what_was_asked() -> None:
    policy = tiny_policy()
    plays: list[tuple[int, dict[str, Any] | None]] = [
        (100, {"task": "push"}),
        (101, {"goal": parse("pick up the red cube")}),
        (102, None),
    ]
    with ChunkCollector(table(tasks=("reach",)), policy, chunks=1, seed=0) as collector:
        played = collector.evaluate(policy, plays)
        assert [e.record.seed for e in played] == [episode_seed(seed, 0) for seed, _ in plays]
        assert [e.task for e in played] == ["push", "pick", "reach"]
        assert played[1].goal == "pick red cube"
        assert [e.goal for e in collector.evaluate(policy, plays[:1])] == [played[0].goal]
        assert collector.evaluate(policy, []) == []
        swapped = collector.evaluate(policy, [(3, {"swap": True}), (3, None)])
        assert [e.success_of_original for e in swapped] == [False, None]
        assert swapped[0].goal != swapped[1].goal


def test_the_same_plays_are_the_same_episodes_also_at_another_table() -> None:
    policy = tiny_policy()
    other = table(tasks=("stack",), phrasing="synonyms", combinations="held_out")
    with ChunkCollector(table(), policy, chunks=1, seed=0) as collector:
        for environment in (None, other):
            played = collector.evaluate(policy, [(1, None), (2, None)], environment=environment)
            assert collector.evaluate(policy, [(1, None), (2, None)], environment=environment) == played
    for episode in played:
        goal = parse(episode.instruction)
        assert goal is not None
        assert held_out(goal)
        assert (episode.task, episode.goal) == ("stack", goal.key)
        assert episode.instruction in phrases(goal, "synonyms")


def test_evaluation_does_not_touch_training() -> None:
    policy = tiny_policy()
    with (
        ChunkCollector(table(), policy, chunks=2, seed=0) as disturbed,
        ChunkCollector(table(), policy, chunks=2, seed=0) as calm,
    ):
        for _ in range(2):
            assert_same(disturbed.collect(policy), calm.collect(policy))
            disturbed.evaluate(policy, [(1, None)], deterministic=False)


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("randomization", [None, "full"])
def test_it_continues_bit_for_bit(randomization: str | None, tmp_path: Path) -> None:
    policy = tiny_policy()
    config = table(randomization=randomization)
    with ChunkCollector(config, policy, chunks=9, seed=3) as collector:
        assert collector.workers.capture_obstacle() is None
        for _ in range(2):
            collector.collect(policy)
        save_state(tmp_path, collector.workers.state())
        expected = collector.collect(policy)
    assert expected.observations["state"][0, 0, ELAPSED] == 8 / 64  # in the middle of an episode
    with ChunkCollector(config, policy, chunks=9, seed=99) as collector:
        collector.workers.set_state(load_state(tmp_path))
        found = collector.collect(policy)
        assert_same(expected, found)
        assert found.episodes == expected.episodes


# ------------------------------------------------------------------ the configuration


def test_mistakes_in_the_configuration() -> None:
    with pytest.raises(ValueError, match=r"workers must be 0\.\.count, got 3 for 2"):
        table(workers=3)
    with pytest.raises(UserError, match=r"^environment: there is no task 'pusch'.*did you mean 'push'\?$"):
        make_table(table(tasks=("pusch",)), 32)
