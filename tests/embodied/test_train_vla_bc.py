"""Cloning in miniature: the action points to the square that the words name, so both must be read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embodied import train_vla_bc
from embodied.datasets.lerobot_layout import ACTION, CAMERA, PROPRIO, STATE, demonstration_features, outcome
from embodied.datasets.lerobot_writer import LeRobotWriter
from embodied.logged.advantages import AdvantageConfig
from embodied.policies.augment import AugmentConfig
from embodied.policies.vla import VLAConfig, VLAPolicy, VLASpaces
from embodied.policies.words import Words
from embodied.train_vla_bc import PartConfig, PicturesConfig, TrainVLABCConfig
from embodied.vla.control_steps import ControlSteps, Shuffled
from experiment.errors import UserError
from experiment.run import RunConfig

Rows = Callable[[Path], list[dict[str, Any]]]

SIZE = 16
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def scene(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An image with a red and a blue square, and where each is, from -1 to 1."""
    image = np.full((SIZE, SIZE, 3), 120, np.uint8)
    corners = rng.permutation(4)[:2] * 4 % 16  # four columns, never the same: the squares do not overlap
    places = {}
    for (name, colour), column in zip(COLOURS.items(), corners, strict=True):
        row = int(rng.integers(0, SIZE - 3))
        image[row : row + 4, column : column + 4] = colour
        places[name] = np.array([column + 1.5, row + 1.5], np.float32) / 7.5 - 1.0
    return image, places


def record(folder: Path, *, episodes: int, length: int, seed: int = 0, failures: int = 0) -> Path:
    """Every frame is a new scene; the first `failures` episodes fail."""
    rng = np.random.default_rng(seed)
    features = demonstration_features(
        cameras={"front": (SIZE, SIZE)}, fps=10, proprio=3, action=2, state=3, expert=False
    )
    with LeRobotWriter(folder, fps=10, features=features) as writer:
        for index in range(episodes):
            name = list(COLOURS)[index % 2]
            with writer.episode(f"go to the {name} square") as episode:
                for step in range(length):
                    image, places = scene(rng)
                    last = step == length - 1
                    success = last and index >= failures
                    frame = {
                        CAMERA + "front": image,
                        PROPRIO: rng.normal(size=3).astype(np.float32),
                        STATE: np.append(places[name], 0).astype(np.float32),
                        ACTION: places[name],
                    }
                    ended = outcome(reward=0.0, terminated=success, truncated=last and not success, success=success)
                    episode.add(frame | ended)
                episode.save()
    return folder


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "squares", episodes=24, length=40)


@pytest.fixture
def config(tmp_path: Path, squares: Path) -> TrainVLABCConfig:
    return TrainVLABCConfig(
        run=RunConfig(folder=str(tmp_path / "run"), wandb="disabled", seed=1),
        policy=VLAConfig(
            chunk=1, channels=(8, 16), blocks=1, queries=2, words=8, length=6, hidden=(32,), percept=2
        ),
        augment=AugmentConfig(shift=0),
        data=PicturesConfig(path=str(squares)),
        held_out=0.1,
        eyes=PartConfig(updates=4, batch_size=32, learning_rate=2e-3),
        hand=PartConfig(updates=5, batch_size=32, learning_rate=2e-3),
        evaluate_every=3,
    )


def elsewhere(config: TrainVLABCConfig, folder: Path, **changes: Any) -> TrainVLABCConfig:
    return replace(config, run=replace(config.run, folder=str(folder)), **changes)


def test_it_learns_to_go_where_the_words_say(config: TrainVLABCConfig, rows_of: Rows) -> None:
    part = PartConfig(updates=300, batch_size=64, learning_rate=3e-3)
    config = replace(config, eyes=part, hand=part, evaluate_every=200)
    result = train_vla_bc.train(config)
    rows = rows_of(result.folder)
    held_out = [row for row in rows if "eval/nll" in row]
    assert [row["global_step"] for row in held_out] == [200, 300, 400, 600]  # the eyes are finished at 300
    assert held_out[1]["eval/percept_error"] == held_out[-1]["eval/percept_error"]
    assert held_out[0]["eval/nll"] > held_out[1]["eval/nll"] - 0.1 > held_out[-1]["eval/nll"]
    perfect = 2 * (-1.5 + 0.5 * math.log(2 * math.pi))  # two dimensions hit exactly, at log std -1.5
    assert perfect < held_out[-1]["eval/nll"] < perfect + 0.1
    assert held_out[-1]["eval/percept_error"] < 0.1
    policy = VLAPolicy.from_pretrained(result.folder / "checkpoints" / "best" / "policy")
    image, places = scene(np.random.default_rng(77))
    for name in COLOURS:  # the same picture: only the words differ
        words = policy.words.encode(f"go to the {name} square", 6)
        seen = {"image": torch.from_numpy(image)[None], "words": words[None], "proprio": torch.zeros(1, 3)}
        action = policy.act(seen, None)[0][0, 0]
        torch.testing.assert_close(action, torch.from_numpy(places[name]), rtol=0, atol=0.2)


def test_steps_that_count_nothing_are_not_imitated(
    config: TrainVLABCConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the labels lead away from the square; an opinion of them from their state makes the difference."""
    original = train_vla_bc.ControlSteps.of

    def spoiled(*arguments: Any) -> ControlSteps:
        steps = original(*arguments)
        wrong = torch.arange(len(steps)) % 2 == 0
        return replace(steps, labels=torch.where(wrong[:, None], -steps.labels, steps.labels))

    def opinion(advantage: AdvantageConfig, states: Tensor, labels: Tensor) -> Tensor | None:
        right = (labels * states[:, :2]).sum(1) > 0
        return right.float() if advantage.critic else None

    monkeypatch.setattr(train_vla_bc.ControlSteps, "of", spoiled)
    monkeypatch.setattr(train_vla_bc, "step_weights", opinion)
    part = PartConfig(updates=200, batch_size=64, learning_rate=3e-3)
    errors = {}
    for critic in (None, "a run"):
        trained = train_vla_bc.train(
            elsewhere(
                config, tmp_path / str(critic), eyes=part, hand=part, advantage=AdvantageConfig(critic=critic)
            )
        ).folder
        policy = VLAPolicy.from_pretrained(trained / "checkpoints" / "last" / "policy")
        image, places = scene(np.random.default_rng(77))
        words = torch.stack([policy.words.encode(f"go to the {name} square", 6) for name in COLOURS])
        seen = {
            "image": torch.from_numpy(image).expand(2, -1, -1, -1),
            "words": words,
            "proprio": torch.zeros(2, 3),
        }
        wanted = torch.from_numpy(np.stack([places[name] for name in COLOURS]))
        errors[critic] = float((policy.act(seen, None)[0][:, 0] - wanted).abs().max())
    assert errors["a run"] < 0.3 < errors[None]


def test_weights_belong_to_the_steps_of_a_chunk(config: TrainVLABCConfig) -> None:
    policy, steps, _ = train_vla_bc.prepare(config, None, train_vla_bc.read(config.data), [])
    rows = torch.tensor([0, 38, 39])  # episodes are 40 steps long
    weights = torch.rand(len(steps))
    chunks = replace(steps, weights=weights).chunks(rows, 2)
    assert chunks.weights is not None
    assert chunks.executed.tolist() == [[True, True], [True, True], [True, False]]
    assert torch.equal(chunks.weights[chunks.executed], weights[[0, 1, 38, 39, 39]])
    single = replace(steps, weights=weights).chunks(rows, 1)
    percepts = torch.zeros(3, policy.config.percept)
    found, _ = train_vla_bc.imitation(policy, single, percepts)
    parts = [
        train_vla_bc.imitation(policy, steps.chunks(rows[i : i + 1], 1), percepts[i : i + 1])[0] for i in range(3)
    ]
    torch.testing.assert_close(found, (torch.stack(parts) * weights[rows]).mean())


@pytest.mark.parametrize("step", [4, 9])
def test_resumed_to_the_bit(
    config: TrainVLABCConfig, tmp_path: Path, rows_of: Rows, interrupt_at: Callable[..., None], step: int
) -> None:
    config = replace(config, augment=AugmentConfig(), word_dropout=0.2, learn_std=True)
    whole = train_vla_bc.train(elsewhere(config, tmp_path / "whole")).folder
    broken = elsewhere(config, tmp_path / "broken")
    interrupt_at(step, train_vla_bc.train, broken)  # among the eyes' updates, or the hand's
    train_vla_bc.train(broken, resume=tmp_path / "broken")
    for file in ("policy/policy.safetensors", "state.safetensors"):
        expected, found = (folder / "checkpoints/last" / file for folder in (whole, tmp_path / "broken"))
        assert found.read_bytes() == expected.read_bytes()
    assert rows_of(tmp_path / "broken") == rows_of(whole)
    assert [row["global_step"] for row in rows_of(whole)] == [3, 4, 4, 6, 9, 9]


def test_the_deviation_stays_unless_it_is_to_be_learnt(config: TrainVLABCConfig) -> None:
    fixed = train_vla_bc.train(config).folder / "checkpoints" / "last" / "policy"
    assert VLAPolicy.from_pretrained(fixed).log_std.tolist() == [-1.5, -1.5]
    learnt = train_vla_bc.train(elsewhere(config, fixed.parent / "learnt", learn_std=True)).folder
    policy = VLAPolicy.from_pretrained(learnt / "checkpoints" / "last" / "policy")
    assert all(-1.51 < value != -1.5 for value in policy.log_std.tolist())


def test_it_goes_on_from_a_policy(config: TrainVLABCConfig, tmp_path: Path) -> None:
    first = train_vla_bc.train(config).folder / "checkpoints" / "last" / "policy"
    still = PartConfig(updates=2, batch_size=32, learning_rate=0.0)
    again = elsewhere(config, tmp_path / "again", init=str(first), eyes=still, hand=still, policy=VLAConfig())
    second = train_vla_bc.train(again).folder / "checkpoints" / "last" / "policy"
    assert (first / "policy.json").read_text() == (second / "policy.json").read_text()
    assert (first / "policy.safetensors").read_bytes() == (second / "policy.safetensors").read_bytes()


def test_dry_run_does_one_update_of_each(config: TrainVLABCConfig) -> None:
    result = train_vla_bc.train(replace(config, run=replace(config.run, dry_run=True)))
    assert result.metrics["global_step"] == 2


def test_the_eyes_learn_first_and_then_the_hand_alone(config: TrainVLABCConfig, tmp_path: Path) -> None:
    def parts(folder: Path) -> dict[str, list[Tensor]]:
        policy = VLAPolicy.from_pretrained(folder / "checkpoints" / "last" / "policy")
        return {"eyes": list(policy.perception.parameters()), "hand": list(policy.actor.parameters())}

    none = replace(config.hand, updates=0)
    eyes = parts(train_vla_bc.train(elsewhere(config, tmp_path / "eyes", hand=none)).folder)
    both = parts(train_vla_bc.train(config).folder)
    longer = replace(config.hand, updates=8)
    more = parts(train_vla_bc.train(elsewhere(config, tmp_path / "more", hand=longer)).folder)
    for name, same in (("eyes", True), ("hand", False)):
        for first, second, third in zip(eyes[name], both[name], more[name], strict=True):
            assert torch.equal(first, second) == torch.equal(second, third) == same


def test_the_hand_reads_what_the_eyes_say_of_the_plain_pictures(config: TrainVLABCConfig) -> None:
    policy, steps, _ = train_vla_bc.prepare(config, None, train_vla_bc.read(config.data), [])
    loss, metrics = train_vla_bc.hand_loss(policy, steps, config)(0)
    rows = Shuffled(len(steps), 32, config.run.seed).batch(0)
    chunks = steps.chunks(rows, 1)
    log_probs = policy.distribution(chunks.observations).log_prob(chunks.actions)  # it looks itself
    torch.testing.assert_close(loss, -log_probs.sum((1, 2)).mean())
    assert metrics.keys() == {"nll"}
    loss.backward()
    assert all(parameter.grad is None for parameter in policy.perception.parameters())


def test_best_is_chosen_among_the_hands(config: TrainVLABCConfig, tmp_path: Path, rows_of: Rows) -> None:
    eyes_only = elsewhere(config, tmp_path / "eyes", hand=replace(config.hand, updates=0))
    assert not (train_vla_bc.train(eyes_only).folder / "checkpoints" / "best").exists()
    folder = train_vla_bc.train(config).folder
    judged = {row["global_step"]: row["eval/nll"] for row in rows_of(folder) if "eval/nll" in row}
    hands = {step: nll for step, nll in judged.items() if step > config.eyes.updates}
    assert len(set(hands.values())) > 1
    assert int((folder / "checkpoints" / "best").resolve().name) == min(hands, key=lambda step: hands[step])


def test_failures_are_left_out_and_episodes_held_out_whole(config: TrainVLABCConfig, tmp_path: Path) -> None:
    folder = record(tmp_path / "data", episodes=10, length=2, failures=4)
    config = replace(config, data=PicturesConfig(path=str(folder)), held_out=0.5)
    episodes = train_vla_bc.read(config.data)
    assert len(episodes) == 6
    assert len(train_vla_bc.read(replace(config.data, successes=False))) == 10
    assert len(train_vla_bc.read(replace(config.data, episodes=5))) == 1
    training, validation = train_vla_bc.divide(episodes, config)
    assert sorted(id(episode) for episode in [*training, *validation]) == sorted(map(id, episodes))
    assert (len(training), len(validation)) == (3, 3)
    _, steps, held_out_steps = train_vla_bc.prepare(config, None, training[:2], validation)
    assert held_out_steps is not None
    assert (len(steps), len(held_out_steps)) == (2 * 2, 3 * 2)
    kept, held_out = train_vla_bc.divide(episodes, replace(config, held_out=0.99))
    assert (len(kept), len(held_out)) == (1, 5)  # one episode is always left to learn from


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": PicturesConfig()}, r"data\.path=PATH"),
        ({"data": PicturesConfig(path="nowhere")}, "nowhere"),
        ({"init": "nowhere"}, r"policy\.json is missing"),
        ({"policy": VLAConfig(percept=4)}, r"policy\.percept is 4, but the state has 3"),
    ],
)
def test_what_it_cannot_use(config: TrainVLABCConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        train_vla_bc.train(replace(config, **changes))
    assert "\n" not in str(error.value)


def test_cameras_are_named(config: TrainVLABCConfig) -> None:
    with pytest.raises(UserError, match="no camera 'wrist'; the cameras are front"):
        train_vla_bc.train(replace(config, data=replace(config.data, cameras=("wrist",))))
    with pytest.raises(ValueError, match="cameras must name one at least"):
        PicturesConfig(cameras=())
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        PicturesConfig(episodes=0)


def test_failures_alone_are_no_data(config: TrainVLABCConfig, tmp_path: Path) -> None:
    folder = record(tmp_path / "data", episodes=2, length=2, failures=2)
    with pytest.raises(UserError, match="no successful episodes"):
        train_vla_bc.read(PicturesConfig(path=str(folder)))


@pytest.mark.filterwarnings("ignore:unknown word")
def test_a_policy_for_other_data_is_refused(config: TrainVLABCConfig, tmp_path: Path) -> None:
    spaces = VLASpaces(image_size=16, cameras=("front",), proprio_size=4, state_size=3, action_size=2)
    VLAPolicy(spaces, config.policy, Words(["go"])).save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match="proprio_size=4"):
        train_vla_bc.train(replace(config, init=str(tmp_path / "policy")))


@pytest.mark.parametrize("wrong", [{"held_out": 1.0}, {"word_dropout": -0.1}, {"evaluate_every": 0}])
def test_impossible_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        TrainVLABCConfig(**wrong)
    with pytest.raises(ValueError, match="must not be negative"):
        PartConfig(updates=-1, batch_size=1, learning_rate=1.0)
    nothing = PartConfig(updates=0, batch_size=1, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"eyes\.updates or hand\.updates"):
        TrainVLABCConfig(eyes=nothing, hand=nothing)
