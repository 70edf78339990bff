"""Learning where words point to: rows, losses and judgements of simulated scenes, and cloning with them."""

from __future__ import annotations

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
from embodied.policies.augment import AugmentConfig
from embodied.policies.vla import VLAConfig, VLAPolicy, VLASpaces
from embodied.policies.words import UNKNOWN, Words
from embodied.train_vla_bc import PartConfig, PicturesConfig, TrainVLABCConfig
from embodied.vla.control_steps import disturb
from embodied.vla.grounding import DRY_SCENES, GroundingConfig, GroundingScenes
from embodied.vla.perceiving import percept_loss
from envs.table import observations
from envs.table.env import TableEnv
from envs.table.grounding import looks
from envs.table.language import COLOURS, TASKS, TRAINING_WORDS
from experiment.errors import UserError
from experiment.run import RunConfig
from tests.embodied.tables import tiny_policy

CONFIG = GroundingConfig(scenes=6, batch_size=10, held_out=0.3, workers=0)


@pytest.fixture(scope="module")
def scenes() -> GroundingScenes:
    return GroundingScenes.collect(CONFIG, tiny_policy(), seed=3)


def assert_same_scenes(one: GroundingScenes, two: GroundingScenes) -> None:
    assert one.sentences == two.sentences
    for name in ("words", "percepts", "proprio"):
        assert getattr(one, name).equal(getattr(two, name))
    assert one.images["image"].equal(two.images["image"])


def test_a_row_is_a_picture_with_a_sentence_about_each_object(scenes: GroundingScenes) -> None:
    seen = looks(TableEnv(observe=(), image_size=32), np.random.default_rng([3, 2]))
    rows = torch.tensor([11, 8])  # the last and the first look at scene 2
    observed = scenes.observations(rows)
    assert {name: tuple(tensor.shape) for name, tensor in observed.items()} == {
        "image": (2, 32, 32, 3),
        "proprio": (2, observations.PROPRIO),
        "words": (2, 4, 16),
    }
    words = Words(TRAINING_WORDS)
    for index, one in enumerate((seen[3], seen[0])):
        np.testing.assert_array_equal(observed["image"][index], one.images["image"])
        np.testing.assert_array_equal(observed["proprio"][index], one.proprio)
        np.testing.assert_array_equal(scenes.percepts[rows[index]], one.percepts)
        assert scenes.sentences[int(rows[index])] == one.sentences
        for thing, sentence in enumerate(one.sentences):
            assert observed["words"][index, thing].equal(words.encode(sentence))


def test_the_number_of_workers_changes_nothing(scenes: GroundingScenes, capfd: pytest.CaptureFixture[str]) -> None:
    assert_same_scenes(GroundingScenes.collect(replace(CONFIG, workers=2), tiny_policy(), seed=3), scenes)
    assert "grounding: 24 of 24 pictures" in capfd.readouterr().err
    fewer = GroundingScenes.collect(replace(CONFIG, scenes=2), tiny_policy(), seed=3)
    assert fewer.sentences == scenes.sentences[:8]
    assert GroundingScenes.collect(replace(CONFIG, scenes=2), tiny_policy(), seed=4).sentences != fewer.sentences


def test_batches_leave_the_last_scenes_for_judging(scenes: GroundingScenes) -> None:
    assert scenes.training == 4 * (6 - 2)  # whole scenes: no picture that judges is of a scene that was learnt from
    batches = [scenes.batch(index) for index in range(20)]
    assert {len(batch) for batch in batches} == {10}
    assert set(torch.cat(batches).tolist()) == set(range(16))
    assert GroundingScenes.collect(CONFIG, tiny_policy(), seed=3).batch(7).equal(batches[7])


@pytest.mark.parametrize(("held_out", "training"), [(0.01, 20), (0.25, 16), (0.5, 12), (0.99, 4)])
def test_one_scene_at_least_judges_and_one_is_learnt_from(
    scenes: GroundingScenes, held_out: float, training: int
) -> None:
    config = replace(CONFIG, held_out=held_out)
    parts = (scenes.images, scenes.proprio, scenes.words, scenes.percepts, scenes.sentences)
    assert GroundingScenes(config, *parts, seed=0).training == training


def test_rows_drawn_with_a_generator(scenes: GroundingScenes) -> None:
    generator = torch.Generator().manual_seed(5)
    drawn = [scenes.draw(generator) for _ in range(20)]
    assert {len(rows) for rows in drawn} == {10}
    assert set(torch.cat(drawn).tolist()) == set(range(16))
    generator.manual_seed(5)
    assert scenes.draw(generator).equal(drawn[0])
    assert not drawn[0].equal(drawn[1])


def test_the_loss_by_hand(scenes: GroundingScenes, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rows = tiny_policy(), torch.tensor([5, 2])
    offsets = torch.zeros(2, 4, observations.PERCEPT)
    offsets[0, 1, 0], offsets[1, 3, 16] = 1.0, 2.0
    monkeypatch.setattr(policy, "perceive_each", lambda seen: scenes.percepts[rows] + offsets)
    assert float(scenes.loss(policy, rows)) == pytest.approx((1 + 4) / (2 * 4 * 17), rel=1e-5)
    monkeypatch.setattr(policy, "perceive_each", lambda seen: (scenes.percepts[rows] + offsets)[..., :2])
    assert float(scenes.loss(policy, rows)) == pytest.approx(1 / (2 * 4 * 2), rel=1e-5)


def test_the_loss_is_that_of_each_sentence_alone(scenes: GroundingScenes) -> None:
    policy, rows = tiny_policy(), torch.tensor([0, 7, 15])
    seen = scenes.observations(rows)
    alone = [
        percept_loss(policy.perceive({**seen, "words": seen["words"][:, thing]}), scenes.percepts[rows, thing])
        for thing in range(4)
    ]
    torch.testing.assert_close(scenes.loss(policy, rows), torch.stack(alone).mean())


def test_only_perception_learns_from_it(scenes: GroundingScenes) -> None:
    policy = tiny_policy()
    scenes.loss(policy, scenes.batch(0)).backward()
    learning = {name.split(".")[0] for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert learning == {"perception"}
    assert all(parameter.grad is not None for parameter in policy.perception.parameters())


def test_the_changes_reach_what_is_learnt_from(scenes: GroundingScenes) -> None:
    policy, met = tiny_policy(), []

    def change(seen: Any) -> Any:
        met.append(seen)
        return {**seen, "words": torch.zeros_like(seen["words"])}

    with torch.no_grad():
        changed = scenes.loss(policy, torch.arange(4), change)
        assert met[0]["words"].equal(scenes.words[:4])
        assert not changed.equal(scenes.loss(policy, torch.arange(4)))


def test_the_loss_falls(scenes: GroundingScenes) -> None:
    policy = tiny_policy(precision="float32")
    optimizer = torch.optim.Adam(policy.perception.parameters(), lr=1e-2)
    rows, losses = torch.arange(4), []
    for _ in range(60):
        loss = scenes.loss(policy, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_judging_by_hand(scenes: GroundingScenes, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    # of the four sentences about each of the eight held-out pictures, in 10 cm
    wrong = torch.tensor([0.0, 0.1, 0.2, 0.28, 0.32, 0.5, 0.6, 9.0]).repeat(4).view(8, 4)

    def perceive_each(seen: dict[str, Tensor]) -> Tensor:
        assert seen["words"].equal(scenes.words[16:])
        found = scenes.percepts[16:].clone()
        found[..., 0] += 0.6 * wrong
        found[..., 1] -= 0.8 * wrong
        found[..., 2:] += 7.0  # neither heights nor anything else counts
        return found

    monkeypatch.setattr(policy, "perceive_each", perceive_each)
    judged = scenes.judge(policy)
    assert judged == {"grounding_within_3cm": 0.5, "grounding_error_cm": pytest.approx(2.8, abs=1e-3)}


def own_words(folder: Path, body: str = "return [f'{goal.task} that {goal.thing.colour} one']") -> str:
    (folder / "words.py").write_text(f"def sentences(goal):\n    {body}\n")
    return f"{folder / 'words.py'}:sentences"


def test_scenes_speak_words_of_ones_own(tmp_path: Path, scenes: GroundingScenes) -> None:
    config = replace(CONFIG, scenes=2, phrasing=own_words(tmp_path))
    words = Words.of(config.texts())
    assert set(words.vocabulary) == {*TASKS, *COLOURS, "that", "one"}
    policy = tiny_policy()
    policy.words = words
    own = GroundingScenes.collect(config, policy, seed=3)
    assert own.images["image"][0].equal(scenes.images["image"][0])  # the same scene
    told = [sentence.split() for four in own.sentences for sentence in four]
    assert all(first in TASKS and rest[0::2] == ["that", "one"] for first, *rest in told)
    assert not (own.words == UNKNOWN).any()


def test_the_words_of_the_scenes(tmp_path: Path) -> None:
    assert GroundingConfig().texts() == ()
    assert GroundingConfig(scenes=2).texts() == TRAINING_WORDS
    assert {"hoist", "brick"} <= set(Words.of(GroundingConfig(scenes=2, phrasing="synonyms").texts()).vocabulary)
    phrasing = own_words(tmp_path, "return {'push': ['shove it']}[goal.task]")
    with pytest.raises(
        UserError, match=r"^grounding: the function of .* 'reach .*' failed: KeyError: 'reach' \(.*2\)$"
    ):
        GroundingConfig(scenes=2, phrasing=phrasing).texts()
    with pytest.raises(UserError, match=r"there is no file nowhere\.py"):
        GroundingConfig(scenes=2, phrasing="nowhere.py:sentences").texts()


def test_a_dry_run_draws_few() -> None:
    many = replace(CONFIG, scenes=40_000)
    assert len(GroundingScenes.collect(many, tiny_policy(), seed=3, dry_run=True).words) == 4 * DRY_SCENES
    assert len(GroundingScenes.collect(replace(CONFIG, scenes=2), tiny_policy(), seed=3, dry_run=True).words) == 8


TABLE = VLASpaces(32, ("front",), observations.PROPRIO, observations.STATE, 4)


@pytest.mark.parametrize(
    ("spaces", "percept", "message"),
    [
        (replace(TABLE, proprio_size=3), 17, "blocks: .*proprio 3.*the table has proprio 17.*leave them at 0"),
        (replace(TABLE, cameras=("side",)), 17, "camera 'side'; the table's are front, wrist"),
        (TABLE, 18, r"policy\.percept is 18: .* must be 2 to 17"),
        (TABLE, 1, r"policy\.percept is 1: .* must be 2 to 17"),
        (replace(TABLE, image_size=8), 17, "image_size must be from 16"),
    ],
)
def test_policies_that_are_not_for_the_table(spaces: VLASpaces, percept: int, message: str) -> None:
    policy = VLAPolicy(spaces, VLAConfig(percept=percept), Words(["go"]))
    with pytest.raises(UserError, match=message) as error:
        GroundingScenes.collect(CONFIG, policy, seed=0, source="blocks")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scenes": 1}, "0 \\(off\\) or at least 2"),
        ({"batch_size": 0}, "batch_size at least 1"),
        ({"workers": -1}, "workers at least 0"),
        ({"held_out": 0.0}, "held_out"),
        ({"randomization": "ful"}, "did you mean 'full'"),
        (
            {"phrasing": "trian"},
            r"grounding\.phrasing must be train or synonyms, or file.* got 'trian'",
        ),
    ],
)
def test_impossible_numbers(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroundingConfig(**wrong)


# ---------------------------------------------------------------- cloning


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in the shape of the table's recordings, told in few words."""
    rng = np.random.default_rng(0)
    features = demonstration_features(
        cameras={"front": (16, 16)},
        fps=10,
        proprio=observations.PROPRIO,
        action=4,
        state=observations.STATE,
        expert=False,
    )
    folder = tmp_path_factory.mktemp("data") / "table"
    with LeRobotWriter(folder, fps=10, features=features) as writer:
        for _ in range(4):
            with writer.episode("pick up the red cube") as episode:
                for step in range(6):
                    numbers = {PROPRIO: observations.PROPRIO, STATE: observations.STATE, ACTION: 4}
                    frame = {name: rng.uniform(-1, 1, size).astype(np.float32) for name, size in numbers.items()}
                    frame[CAMERA + "front"] = rng.integers(0, 256, (16, 16, 3), np.uint8)
                    done = step == 5
                    episode.add(frame | outcome(reward=0.0, terminated=done, truncated=False, success=done))
                episode.save()
    return folder


@pytest.fixture
def config(tmp_path: Path, demonstrations: Path) -> TrainVLABCConfig:
    return TrainVLABCConfig(
        run=RunConfig(folder=str(tmp_path / "run"), wandb="disabled", seed=1),
        policy=VLAConfig(chunk=2, channels=(4, 8), queries=2, words=8, hidden=(8,), critic_hidden=(8,)),
        grounding=GroundingConfig(scenes=4, batch_size=6, workers=0),
        data=PicturesConfig(path=str(demonstrations)),
        held_out=0.25,
        eyes=PartConfig(updates=6, batch_size=8, learning_rate=2e-3),
        hand=PartConfig(updates=3, batch_size=8, learning_rate=2e-3),
        evaluate_every=3,
    )


def elsewhere(config: TrainVLABCConfig, folder: Path, **changes: Any) -> TrainVLABCConfig:
    return replace(config, run=replace(config.run, folder=str(folder)), **changes)


def test_cloning_reports_what_is_found_and_knows_the_words(
    config: TrainVLABCConfig, rows_of: Callable[[Path], list[dict[str, Any]]]
) -> None:
    folder = train_vla_bc.train(config).folder
    rows = rows_of(folder)
    judged = [row for row in rows if "eval/grounding_within_3cm" in row]
    assert [row["global_step"] for row in judged] == [3, 6, 9]
    assert all({"eval/nll", "eval/percept_error", "eval/grounding_error_cm"} < row.keys() for row in judged)
    assert [row["global_step"] for row in rows if "train/grounding_loss" in row] == [6]
    words = VLAPolicy.from_pretrained(folder / "checkpoints/best/policy").words
    assert set(words.vocabulary) == set(TRAINING_WORDS)


def test_a_policy_learns_the_words_of_its_scenes(config: TrainVLABCConfig, tmp_path: Path) -> None:
    grounding = replace(config.grounding, phrasing=own_words(tmp_path))
    policy, *_ = train_vla_bc.prepare(
        replace(config, grounding=grounding), None, train_vla_bc.read(config.data), []
    )
    demonstrated = {"pick", "up", "the", "red", "cube"}
    assert set(policy.words.vocabulary) == {*demonstrated, *TASKS, *COLOURS, "that", "one"}


def test_the_eyes_loss_is_of_the_demonstrations_and_the_scenes(
    config: TrainVLABCConfig, rows_of: Callable[..., Any]
) -> None:
    row = next(row for row in rows_of(train_vla_bc.train(config).folder) if "train/loss" in row)
    eyes = row["train/percept_loss"] + row["train/grounding_loss"]
    assert min(row["train/percept_loss"], row["train/grounding_loss"]) > 0
    assert row["train/loss"] == pytest.approx(eyes, rel=1e-5)
    assert "train/nll" not in row


def test_resumed_to_the_bit(
    config: TrainVLABCConfig, tmp_path: Path, rows_of: Callable[..., Any], interrupt_at: Callable[..., None]
) -> None:
    config = replace(config, word_dropout=0.2)
    whole = train_vla_bc.train(elsewhere(config, tmp_path / "whole")).folder
    broken = elsewhere(config, tmp_path / "broken")
    interrupt_at(6, train_vla_bc.train, broken)
    train_vla_bc.train(broken, resume=tmp_path / "broken")
    for file in ("policy/policy.safetensors", "state.safetensors"):
        expected, found = (folder / "checkpoints/last" / file for folder in (whole, tmp_path / "broken"))
        assert found.read_bytes() == expected.read_bytes()
    assert rows_of(tmp_path / "broken") == rows_of(whole)


def test_without_demonstrations_to_judge_by(config: TrainVLABCConfig, rows_of: Callable[..., Any]) -> None:
    rows = rows_of(train_vla_bc.train(replace(config, held_out=0.0)).folder)
    assert any("eval/grounding_error_cm" in row for row in rows)
    assert not any("eval/nll" in row for row in rows)


def test_a_dry_run_draws_few_scenes(config: TrainVLABCConfig, capsys: pytest.CaptureFixture[str]) -> None:
    many = replace(config, grounding=replace(config.grounding, scenes=40_000))
    train_vla_bc.train(replace(many, run=replace(config.run, dry_run=True)))
    assert "grounding: 32 of 32 pictures" in capsys.readouterr().err


def test_images_are_augmented_alike(scenes: GroundingScenes) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = scenes.observations(torch.arange(4))
    changed = disturb(seen, AugmentConfig(), word_dropout=0.0, generator=generator)
    assert changed.keys() == seen.keys()
    assert not changed["image"].equal(seen["image"])
