"""Workers: the number of processes changes nothing, ends of episodes are told truly, nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embodied.policies.numpy_actor import Spaces
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.processes import ProcessWorker
from embodied.rollouts.rollout import Collector, Experience
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from envs.stepper import episode_seed
from experiment.errors import UserError
from experiment.state import load_state, save_state

Make = Callable[..., StatePolicy]
ODD = "tests.embodied.odd_environments:Odd-v0"


def policy_for(environment: EnvironmentConfig, make_policy: Make) -> StatePolicy:
    spec = environment_spec(environment)
    return make_policy(Spaces(spec.observation_dim, spec.action_dim, spec.discrete))


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(alive, pids)):
        time.sleep(0.02)
    return [pid for pid in pids if alive(pid)]


def pids_of(collector: Collector) -> list[int]:
    return [worker.pid for worker in collector.workers.members if isinstance(worker, ProcessWorker)]


def by_place(experience: Experience) -> dict[tuple[int, int], list[float]]:
    return {(row, column): seen.tolist() for row, column, seen in experience.final_observations}


# ------------------------------------------------------------------ the same experience


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_the_number_of_workers_changes_nothing(env_id: str, make_policy: Make) -> None:
    collected: list[list[Experience]] = []
    played: list[Any] = []
    for workers in (0, 1, 2):
        environment = EnvironmentConfig(env_id, max_episode_steps=12, count=3, workers=workers)
        policy = policy_for(environment, make_policy)
        with Collector(environment, policy, steps=20, seed=5) as collector:
            assert len(pids_of(collector)) == workers
            collected.append([collector.collect(policy) for _ in range(2)])
            played.append(collector.evaluate(policy, [7, 8, 9, 10, 11], deterministic=False))
    exact: dict[str, Any] = {"rtol": 0.0, "atol": 0.0} if env_id == "CartPole-v1" else {"rtol": 1e-3, "atol": 1e-4}
    for others in collected[1:]:
        for mine, other in zip(collected[0], others, strict=True):
            for name in ("observations", "actions", "rewards", "terminated", "truncated", "next_observations"):
                torch.testing.assert_close(getattr(other, name), getattr(mine, name), **exact, msg=name)
            assert by_place(mine).keys() == by_place(other).keys()
            for place, seen in by_place(mine).items():
                np.testing.assert_allclose(by_place(other)[place], seen, **exact)
            assert sorted((e.seed, e.number, e.length) for e in mine.episodes) == sorted(
                (e.seed, e.number, e.length) for e in other.episodes
            )
    for others in played[1:]:
        assert [(e.seed, e.length) for e in others] == [(e.seed, e.length) for e in played[0]]
        np.testing.assert_allclose(
            [e.episode_return for e in others], [e.episode_return for e in played[0]], rtol=1e-3
        )


def test_another_seed_is_another_experience(make_policy: Make) -> None:
    environment = EnvironmentConfig("Pendulum-v1", count=2, workers=0)
    policy = policy_for(environment, make_policy)
    seen = []
    for seed in (5, 5, 6):
        with Collector(environment, policy, steps=4, seed=seed) as collector:
            seen.append(collector.collect(policy))
    assert torch.equal(seen[0].observations, seen[1].observations)
    assert not torch.equal(seen[0].observations, seen[2].observations)
    assert not torch.equal(seen[0].observations[0], seen[0].observations[1])
    assert not torch.equal(seen[0].actions[0] - seen[0].actions[1], torch.zeros(4, 1))


@pytest.mark.parametrize("seed", [9_999, 10_000, 123_456, 2**32 - 1])
def test_no_training_episode_begins_where_an_evaluated_one_does(seed: int, make_policy: Make) -> None:
    from embodied.evaluate import TEST_SEEDS, VALIDATION_SEEDS

    environment = EnvironmentConfig(ODD, count=3, workers=0)
    policy = policy_for(environment, make_policy)
    with Collector(environment, policy, steps=1, seed=seed) as collector:
        seeds = collector.workers.state()["workers"][0]["stepper"]["seeds"]
    assert len(set(seeds)) == 3
    assert max(seeds) < VALIDATION_SEEDS < TEST_SEEDS


def test_what_is_seen_at_time_limits_and_ends(make_policy: Make) -> None:
    """Odd-v0 shows its own clock: limit 5, and with terminate_at 3 it ends there."""
    for options, last, flag in (({}, 5, "truncated"), ({"terminate_at": 3}, 3, "terminated")):
        environment = EnvironmentConfig(ODD, options=dict(options), count=2, workers=1)
        policy = policy_for(environment, make_policy)
        with Collector(environment, policy, steps=12, seed=1) as collector:
            experience = collector.collect(policy)
        clock = [step % last for step in range(12)]
        assert experience.observations[..., 0].tolist() == [clock, clock]
        assert experience.rewards.tolist() == [[time + 1.0 for time in clock]] * 2
        ends = [column for column in range(12) if clock[column] == last - 1]
        expected = torch.zeros(2, 12, dtype=torch.bool)
        expected[:, ends] = True
        other = "terminated" if flag == "truncated" else "truncated"
        assert torch.equal(getattr(experience, flag), expected)
        assert not getattr(experience, other).any()
        tags = {row: [float(episode_seed(1000 + row, k) % 1000) for k in range(5)] for row in range(2)}
        assert by_place(experience) == {
            (row, column): [float(last), tags[row][number]]
            for row in range(2)
            for number, column in enumerate(ends)
        }
        assert experience.next_observations.tolist() == [[12 % last, tags[row][len(ends)]] for row in range(2)]
        assert [e.length for e in experience.episodes] == [last] * len(ends) * 2


def test_the_caller_owns_the_tensors(make_policy: Make) -> None:
    environment = EnvironmentConfig("Pendulum-v1", count=2, workers=0)
    policy = policy_for(environment, make_policy)
    with Collector(environment, policy, steps=4, seed=0) as collector:
        first = collector.collect(policy)
        copies = (first.observations.clone(), first.next_observations.clone())
        collector.collect(policy)
    assert torch.equal(first.observations, copies[0])
    assert torch.equal(first.next_observations, copies[1])


def test_the_newest_weights_act(make_policy: Make) -> None:
    environment = EnvironmentConfig(ODD, count=2, workers=1)
    policy = policy_for(environment, make_policy)
    with Collector(environment, policy, steps=3, seed=0) as collector:
        with torch.no_grad():
            policy.actor.weight.zero_()
            policy.actor.bias.fill_(0.75)
            policy.log_std.fill_(-30.0)
        assert collector.collect(policy).actions.flatten().tolist() == pytest.approx([0.75] * 6)


# ------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("episodes", [1, 2, 5])
def test_episodes_come_in_the_order_of_their_seeds(episodes: int, make_policy: Make) -> None:
    """Also when there are fewer of them than workers."""
    environment = EnvironmentConfig("CartPole-v1", max_episode_steps=30, count=4, workers=2)
    policy = policy_for(environment, make_policy)
    with Collector(environment, policy, steps=1, seed=0) as collector:
        records = collector.evaluate(policy, list(range(100, 100 + episodes)))
        again = collector.evaluate(policy, list(range(100, 100 + episodes)))
    assert [record.seed for record in records] == [episode_seed(100 + i, 0) for i in range(episodes)]
    assert records == again


def test_evaluation_does_not_touch_training(make_policy: Make) -> None:
    environment = EnvironmentConfig("Pendulum-v1", max_episode_steps=9, count=2, workers=0)
    policy = policy_for(environment, make_policy)
    with (
        Collector(environment, policy, steps=5, seed=0) as disturbed,
        Collector(environment, policy, steps=5, seed=0) as calm,
    ):
        for _ in range(3):
            assert torch.equal(disturbed.collect(policy).observations, calm.collect(policy).observations)
            disturbed.evaluate(policy, [1, 2, 3], deterministic=False)


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("workers", [0, 2])
def test_it_continues_bit_for_bit(workers: int, make_policy: Make, tmp_path: Path) -> None:
    environment = EnvironmentConfig("Hopper-v5", max_episode_steps=15, count=3, workers=workers)
    policy = policy_for(environment, make_policy)
    with Collector(environment, policy, steps=10, seed=3) as collector:
        assert collector.workers.capture_obstacle() is None
        for _ in range(2):
            collector.collect(policy)
        save_state(tmp_path, collector.workers.state())
        expected = collector.collect(policy)
        assert expected.episodes
    with Collector(environment, policy, steps=10, seed=99) as collector:
        collector.workers.set_state(load_state(tmp_path))
        found = collector.collect(policy)
    for name in ("observations", "actions", "rewards", "terminated", "truncated", "next_observations"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert by_place(found) == by_place(expected)
    assert found.episodes == expected.episodes


def test_a_state_of_other_workers_is_refused(make_policy: Make) -> None:
    environment = EnvironmentConfig("CartPole-v1", count=2, workers=0)
    policy = policy_for(environment, make_policy)
    with Collector(environment, policy, steps=1, seed=0) as collector:
        state = collector.workers.state()
        with pytest.raises(UserError, match="of 2 rollout workers, there are 1"):
            collector.workers.set_state({"workers": state["workers"] * 2})


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("fault", "message"),
    [("raise", r"worker failed:[\s\S]*gripper's cable"), ("die", r"worker died \(exit code 7\)")],
)
def test_a_worker_that_fails_says_so_and_leaves_nobody(fault: str, message: str, make_policy: Make) -> None:
    environment = EnvironmentConfig(ODD, options={"fault": fault, "at": 6}, count=2, workers=2)
    policy = policy_for(environment, make_policy)
    with Collector(environment, policy, steps=4, seed=0) as collector:
        collector.collect(policy)
        pids = pids_of(collector)
        with pytest.raises(RuntimeError, match=message):
            collector.collect(policy)
    assert wait_until_gone(pids, 10) == []


def test_an_environment_that_only_fails_in_the_worker(make_policy: Make) -> None:
    environment = EnvironmentConfig(
        "tests.embodied.odd_environments:Broken-v0", options={"pid": os.getpid()}, count=2, workers=2
    )
    policy = policy_for(environment, make_policy)
    before = set(children())
    with pytest.raises(RuntimeError, match="no such serial port"):
        Collector(environment, policy, steps=4, seed=0)
    assert wait_until_gone([pid for pid in children() if pid not in before], 10) == []


def test_nobody_is_left_after_close(make_policy: Make) -> None:
    environment = EnvironmentConfig("CartPole-v1", count=2, workers=2)
    policy = policy_for(environment, make_policy)
    with Collector(environment, policy, steps=4, seed=0) as collector:
        pids = pids_of(collector)
        assert len(pids) == 2
        assert all(map(alive, pids))
    assert wait_until_gone(pids, 5) == []
    assert os.environ["OMP_NUM_THREADS"]


ENDLESS = """
import sys
from embodied.policies.numpy_actor import Spaces, StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector
from embodied.rollouts.workers import EnvironmentConfig

if __name__ == "__main__":
    policy = StatePolicy(Spaces(3, 1), StatePolicyConfig())
    collector = Collector(EnvironmentConfig("Pendulum-v1", count=2, workers=2), policy, steps=500, seed=0)
    print(*[worker.pid for worker in collector.workers.members], flush=True)
    while sys.argv[1] == "busy":
        collector.collect(policy)
    sys.stdin.read()
"""


@pytest.mark.parametrize("what", ["busy", "idle"])
def test_nobody_is_left_after_the_parent_is_killed(what: str, tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, str(script), what],
        env={**os.environ, "PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.2)
    assert all(map(alive, pids))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_until_gone(pids, 10) == []
    assert "Traceback" not in parent.communicate()[1]


def children() -> list[int]:
    tasks = Path("/proc/self/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


# ------------------------------------------------------------------ the configuration


def test_workers_must_fit_the_environments() -> None:
    with pytest.raises(ValueError, match=r"workers must be 0\.\.count, got 3 for 2"):
        EnvironmentConfig(count=2, workers=3)
    with pytest.raises(ValueError, match="workers"):
        EnvironmentConfig(count=0, workers=0)


def test_an_environment_that_cannot_be_made_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match=r"environment\.id: .*did you mean 'HalfCheetah-v5'"):
        environment_spec(EnvironmentConfig("HalfCheeta-v5"))
    with pytest.raises(UserError, match="does not accept its options"):
        environment_spec(EnvironmentConfig("Pendulum-v1", options={"colour": "red"}))
