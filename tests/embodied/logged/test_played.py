"""Episodes of one's own policies: cut where they ended, whole in what they say, readable as a data set."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch

from embodied import train_ppo
from embodied.datasets.formats import open_dataset, read_dataset
from embodied.datasets.staging import StagedEpisodes, staging_folder
from embodied.logged import played
from embodied.logged.played import cut, play_policies, run_to_play
from embodied.policies.numpy_actor import StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Experience
from embodied.rollouts.workers import EnvironmentConfig
from embodied.train_ppo import TrainPPOConfig
from envs.stepper import EpisodeRecord
from experiment.errors import UserError
from experiment.run import RunConfig
from policy_core.ppo import PPOConfig
from tandem import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three updates of PPO on an environment that both terminates and is cut."""
    config = TrainPPOConfig(
        run=RunConfig(
            folder=str(tmp_path_factory.mktemp("ppo") / "run"), wandb="disabled", checkpoint_every=1, keep=9
        ),
        environment=EnvironmentConfig("InvertedPendulum-v5", max_episode_steps=12, count=2, workers=0),
        policy=StatePolicyConfig(hidden=(8,), log_std=0.5),
        ppo=PPOConfig(epochs=1, minibatch_size=16),
        total_steps=3 * 2 * 16,
        horizon=16,
    )
    return train_ppo.train(config).folder


def experience(
    start: float,
    cuts: list[list[bool]],
    *,
    final: list[tuple[int, int, np.ndarray]],
    succeeded: Sequence[bool | None] = (),
) -> Experience:
    steps = torch.arange(3.0) + start
    observations = steps.view(1, 3, 1).expand(2, 3, 2) + torch.tensor([0.0, 100.0]).view(2, 1, 1)
    truncated = torch.tensor(cuts)
    return Experience(
        observations=observations.contiguous(),
        actions=torch.zeros(2, 3, 1),
        rewards=torch.ones(2, 3),
        terminated=torch.zeros_like(truncated),
        truncated=truncated,
        next_observations=torch.full((2, 2), start + 3),
        final_observations=final,
        episodes=[
            EpisodeRecord(0.0, 1, success, success, False, True, number, 0)
            for number, success in enumerate(succeeded)
        ],
    )


def test_cut_by_hand() -> None:
    no = [False] * 3
    seen = np.array([-1.0, -1.0], np.float32)
    first = experience(0.0, [[False, True, False], no], final=[(0, 1, seen)], succeeded=[None])
    second = experience(3.0, [no, no], final=[])
    episodes = cut([first, second], name="x")
    assert [len(episode) for episode in episodes] == [2, 4, 6]
    assert episodes[0].observations[:, 0].tolist() == [0.0, 1.0]
    assert episodes[0].final_observation is not None
    assert episodes[0].final_observation.tolist() == [-1.0, -1.0]
    assert episodes[1].observations[:, 0].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert episodes[1].final_observation is not None
    assert episodes[1].final_observation.tolist() == [6.0, 6.0]
    assert [episode.truncated for episode in episodes] == [True] * 3


def test_success_is_kept_with_the_episode_that_had_it() -> None:
    """Records lie in the order of the ends, which is by column; None is failure where others report success."""
    seen = np.array([-1.0, -1.0], np.float32)
    first = experience(
        0.0,
        [[False, True, False], [True, False, False]],
        final=[(1, 0, seen), (0, 1, seen)],
        succeeded=[True, False],
    )
    second = experience(
        3.0,
        [[False, False, True], [False, True, False]],
        final=[(1, 1, seen), (0, 2, seen)],
        succeeded=[None, True],
    )
    episodes = cut([first, second], name="x")
    assert [len(episode) for episode in episodes] == [2, 4, 1, 4, 1]
    assert [episode.success for episode in episodes] == [False, True, True, False, None]
    quiet = experience(0.0, [[False, True, False], [False] * 3], final=[(0, 1, seen)], succeeded=[None])
    assert [episode.success for episode in cut([quiet], name="x")] == [None] * 3


def test_what_was_played_is_what_the_environment_does(run: Path) -> None:
    environment, folders = run_to_play(run, "last")
    episodes = play_policies(folders, environment, steps=200, seed=3)
    assert 200 <= sum(map(len, episodes)) <= 8 * 25
    assert {episode.terminated for episode in episodes} == {True, False}
    made = gymnasium.make("InvertedPendulum-v5")
    made.reset()
    for episode in episodes[:5]:
        seen = np.concatenate([episode.observations, episode.final_observation[None]])  # type: ignore[index]
        for step in range(len(episode)):
            made.unwrapped.set_state(seen[step, :2].astype(float), seen[step, 2:].astype(float))  # type: ignore[attr-defined]
            following, reward, terminated, _, _ = made.step(episode.actions[step])
            np.testing.assert_allclose(following, seen[step + 1], atol=2e-3)
            assert reward == pytest.approx(float(episode.rewards[step]))
            assert terminated == (episode.terminated and step == len(episode) - 1)


def test_no_more_is_played_than_the_steps_that_were_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(played, "HORIZON", 10)
    environment, folders = run_to_play(run, "last")
    for asked, expected in (
        (12, 12),
        (21, 21),
        (23, 24),
    ):  # of each of 8; two, three and three rounds of one length
        episodes = play_policies(folders, environment, steps=8 * asked, seed=0)
        assert sum(map(len, episodes)) == 8 * expected


def test_a_few_steps_are_whole_episodes_of_fewer_environments(run: Path) -> None:
    environment, folders = run_to_play(run, "last")
    episodes = play_policies(folders, replace(environment, max_episode_steps=3), steps=13, seed=0)
    lengths = [len(episode) for episode in episodes]
    assert lengths == [3, 1] * 4  # not two steps each of eight


def test_actions_are_what_the_environment_took(run: Path, tmp_path: Path) -> None:
    environment, folders = run_to_play(run, "last")
    policy = StatePolicy.from_pretrained(folders[0])
    policy.log_std.data.fill_(2.0)
    policy.save_pretrained(tmp_path / "wild")
    actions = np.concatenate(
        [one.actions for one in play_policies([tmp_path / "wild"], environment, steps=96, seed=0)]
    )
    assert (np.abs(actions) == 3.0).mean() > 0.5
    assert np.abs(actions).max() == 3.0  # InvertedPendulum's bounds


def test_the_mode_has_no_noise(run: Path) -> None:
    environment, folders = run_to_play(run, "last")
    policy = StatePolicy.from_pretrained(folders[0])
    episode = play_policies(folders, environment, steps=8, seed=0, deterministic=True)[0]
    expected = policy(torch.from_numpy(episode.observations))[0].mode().detach().numpy()
    np.testing.assert_allclose(episode.actions, expected, atol=1e-4)


def test_the_verb_writes_what_every_checkpoint_played(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["data", "play", str(run), "--steps", "192", "--checkpoint", "all", "--to", "d3rlpy", "--out", "logged"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "by 4 policies" in out  # one before the first update
    episodes = read_dataset("logged")
    assert sum(map(len, episodes)) == 192
    assert any(episode.terminated for episode in episodes)
    assert cli.main(words) == 2  # the name is taken
    assert "logged: exists already" in capsys.readouterr().err


def test_an_interrupted_writing_goes_on_with_what_it_began(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "run", symlinks=True)
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace("max_episode_steps: 12", "max_episode_steps: 2"))
    words = ["data", "play", "run", "--steps", "96", "--out", "logged"]  # as many episodes of 2, whoever plays
    append, begun = StagedEpisodes.append, [0]

    def interrupted(self: StagedEpisodes, write: Callable[[h5py.File], None]) -> None:
        begun[0] += 1
        if begun[0] == 3:
            raise KeyboardInterrupt
        append(self, write)

    with monkeypatch.context() as patched:
        patched.setattr(StagedEpisodes, "append", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            cli.main([*words, "--seed", "0"])
    assert staging_folder(tmp_path / "logged").is_dir()
    for other in (["--seed", "1"], ["--deterministic"], ["--checkpoint", "all"]):
        assert cli.main([*words, *other]) == 2
        assert "holds what another command began" in capsys.readouterr().err
    assert cli.main([*words, "--seed", "0"]) == 0
    assert cli.main([*words[:-1], "whole", "--seed", "0"]) == 0
    for one, expected in zip(read_dataset("logged"), read_dataset("whole"), strict=True):
        assert len(one) == 2
        np.testing.assert_array_equal(one.observations, expected.observations)


@pytest.mark.parametrize("to", ["d3rlpy", "minari", "lerobot"])
def test_choices_stay_choices(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainPPOConfig(
        run=RunConfig(folder="run", wandb="disabled"),
        environment=EnvironmentConfig("CartPole-v1", max_episode_steps=12, count=2, workers=0),
        policy=StatePolicyConfig(hidden=(8,)),
        ppo=PPOConfig(epochs=1, minibatch_size=16),
        total_steps=2 * 16,
        horizon=16,
    )
    train_ppo.train(config)
    assert cli.main(["data", "play", "run", "--steps", "48", "--out", "logged", "--to", to]) == 0
    source = open_dataset("logged")
    assert (source.choices, source.choices_inferred) == (2, False)
    for episode in read_dataset("logged"):
        assert episode.actions.shape == (len(episode), 1)
        assert set(episode.actions.ravel().tolist()) <= {0.0, 1.0}
    assert cli.main(["data", "validate", "logged"]) == 0


def test_what_cannot_be_played(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoint 'best'"):
        run_to_play(run, "best")
    (tmp_path / "config.yaml").write_text("recipe: llm/sft\n")
    with pytest.raises(UserError, match="names no environment"):
        run_to_play(tmp_path, "last")


def test_minari_is_told_of_the_environment(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "play", str(run), "--steps", "48", "--out", "logged"]) == 0
    capsys.readouterr()
    told = minari.MinariDataset("logged/data")
    assert isinstance(told.action_space, gymnasium.spaces.Box)
    assert told.action_space.low.tolist() == [-3.0]
    again = told.recover_environment()
    assert again.spec is not None
    assert (again.spec.id, again.spec.max_episode_steps) == ("InvertedPendulum-v5", 12)
