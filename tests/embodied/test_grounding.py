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
from embodied.control_steps import disturb
from embodied.datasets.lerobot_layout import ACTION, CAMERA, PROPRIO, STATE, demonstration_features, outcome
from embodied.datasets.lerobot_writer import LeRobotWriter
from embodied.grounding import GroundingConfig, GroundingScenes
from embodied.policies.augment import AugmentConfig
from embodied.policies.vla import VLAConfig, VLAPolicy, VLASpaces
from embodied.policies.words import Words
from embodied.train_vla_bc import TrainVLABCConfig
from envs.table.env import TableEnv
from envs.table.grounding import look
from envs.table.language import TRAINING_WORDS
from experiment.errors import UserError
from experiment.run import RunConfig
from tests.embodied.tables import tiny_policy

CONFIG = GroundingConfig(scenes=6, batch_size=10, held_out=0.3, workers=0)


@pytest.fixture(scope="module")
def scenes() -> GroundingScenes:
    return GroundingScenes.collect(CONFIG, tiny_policy(), seed=3)


def unchanged(observations: Any) -> Any:
    return observations


def assert_same_scenes(one: GroundingScenes, two: GroundingScenes) -> None:
    assert one.sentences == two.sentences
    for name in ("words", "positions"):
        assert getattr(one, name).equal(getattr(two, name))
    assert one.images["image"].equal(two.images["image"])


def test_a_row_is_a_picture_and_a_sentence_about_one_object(scenes: GroundingScenes) -> None:
    seen = look(TableEnv(observe=(), image_size=32), np.random.default_rng([3, 2]))
    rows = torch.tensor([11, 8])  # objects 3 and 0 of scene 2
    observed = scenes.observations(rows)
    assert observed.keys() == {"image", "words"}
    words = Words(TRAINING_WORDS)
    for index, thing in enumerate((3, 0)):
        np.testing.assert_array_equal(observed["image"][index], seen.images["image"])
        assert observed["words"][index].equal(words.encode(seen.sentences[thing]))
        assert scenes.sentences[rows[index]] == seen.sentences[thing]
        np.testing.assert_array_equal(scenes.positions[rows[index]], seen.positions[thing])


def test_the_number_of_workers_changes_nothing(scenes: GroundingScenes, capfd: pytest.CaptureFixture[str]) -> None:
    assert_same_scenes(GroundingScenes.collect(replace(CONFIG, workers=2), tiny_policy(), seed=3), scenes)
    assert "grounding: 6 of 6 scenes" in capfd.readouterr().err
    fewer = GroundingScenes.collect(replace(CONFIG, scenes=2), tiny_policy(), seed=3)
    assert fewer.sentences == scenes.sentences[:8]
    assert GroundingScenes.collect(replace(CONFIG, scenes=2), tiny_policy(), seed=4).sentences != fewer.sentences


def test_batches_leave_the_last_scenes_for_judging(scenes: GroundingScenes) -> None:
    assert scenes.training == 4 * (6 - 2)
    batches = [scenes.batch(index) for index in range(20)]
    assert {len(batch) for batch in batches} == {10}
    assert set(torch.cat(batches).tolist()) == set(range(16))
    assert GroundingScenes.collect(CONFIG, tiny_policy(), seed=3).batch(7).equal(batches[7])


def test_the_loss_by_hand(scenes: GroundingScenes, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rows = tiny_policy(), torch.tensor([5, 2])
    offsets = torch.tensor([[1.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 2.0, 0]])
    monkeypatch.setattr(policy, "locate", lambda seen: scenes.positions[rows] + offsets)
    loss, metrics = scenes.loss(policy, rows, unchanged)
    assert float(loss) == pytest.approx((1 + 4) / 12, rel=1e-5)
    assert metrics.keys() == {"grounding_loss"}
    assert not metrics["grounding_loss"].requires_grad
    monkeypatch.setattr(policy, "locate", lambda seen: (scenes.positions[rows] + offsets)[:, :2])
    assert float(scenes.loss(policy, rows, unchanged)[0]) == pytest.approx(1 / 4, rel=1e-5)


def test_only_perception_learns_from_it(scenes: GroundingScenes) -> None:
    policy = tiny_policy()
    loss, _ = scenes.loss(policy, scenes.batch(0), unchanged)
    loss.backward()
    learning = {name.split(".")[0] for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert learning == {"instruction", "vision", "locator"}


def test_it_finds_what_forward_finds(scenes: GroundingScenes) -> None:
    policy, seen = tiny_policy(), scenes.observations(torch.arange(6))
    with torch.no_grad():
        located = policy.locate(seen)
        assert located.shape == (6, 6)
        assert policy({**seen, "proprio": torch.randn(6, 17)})[1].equal(located)
        folded = {name: tensor.unflatten(0, (2, 3)) for name, tensor in seen.items()}
        torch.testing.assert_close(policy.locate(folded), located.view(2, 3, 6))


def test_the_changes_reach_what_is_learnt_from(scenes: GroundingScenes) -> None:
    policy, met = tiny_policy(), []

    def change(seen: Any) -> Any:
        met.append(seen)
        return {**seen, "words": torch.zeros_like(seen["words"])}

    with torch.no_grad():
        changed, _ = scenes.loss(policy, torch.arange(4), change)
        assert met[0]["words"].equal(scenes.words[:4])
        assert not changed.equal(scenes.loss(policy, torch.arange(4), unchanged)[0])


def test_the_loss_falls(scenes: GroundingScenes) -> None:
    policy = tiny_policy(precision="float32")
    optimizer = torch.optim.Adam(policy.actor_parameters(), lr=1e-2)
    rows, losses = torch.arange(8), []
    for _ in range(60):
        loss, _ = scenes.loss(policy, rows, unchanged)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_judging_by_hand(scenes: GroundingScenes, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    wrong = torch.tensor([0.0, 0.1, 0.2, 0.28, 0.32, 0.5, 0.6, 9.0])  # of the eight held-out rows, in 10 cm

    def locate(seen: dict[str, Tensor]) -> Tensor:
        assert seen["words"].equal(scenes.words[16:])
        found = scenes.positions[16:].clone()
        found[:, 0] += 0.6 * wrong
        found[:, 1] -= 0.8 * wrong
        found[:, 2] += 7.0  # heights do not count
        return found

    monkeypatch.setattr(policy, "locate", locate)
    judged = scenes.judge(policy)
    assert judged == {"grounding_within_3cm": 0.5, "grounding_error_cm": pytest.approx(2.8, abs=1e-3)}


def test_as_an_auxiliary_loss_of_ppo(scenes: GroundingScenes) -> None:
    policy, generator = tiny_policy(), torch.Generator().manual_seed(5)
    auxiliary = scenes.auxiliary(policy, coef=3.0, generator=generator, change=unchanged)
    rows = torch.randint(16, (10,), generator=torch.Generator().manual_seed(5))
    expected, _ = scenes.loss(policy, rows, unchanged)
    loss, metrics = auxiliary()
    assert loss.requires_grad
    torch.testing.assert_close(loss, 3 * expected)
    torch.testing.assert_close(metrics["grounding_loss"], expected.detach())
    assert not auxiliary()[0].equal(loss)


@pytest.mark.parametrize(
    ("spaces", "localized", "message"),
    [
        (VLASpaces(32, ("front",), 3, 49, 4), 6, "blocks: .*proprio 3.*the table has proprio 17.*leave them at 0"),
        (VLASpaces(32, ("side",), 17, 49, 4), 6, "camera 'side'; the table's are front, wrist"),
        (VLASpaces(32, ("front",), 17, 49, 4), 9, r"policy\.localized is 9: .* must be 2 to 6"),
        (VLASpaces(8, ("front",), 17, 49, 4), 6, "image_size must be from 16"),
    ],
)
@pytest.mark.parametrize("workers", [0])
def test_policies_that_are_not_for_the_table(spaces: VLASpaces, localized: int, message: str, workers: int) -> None:
    policy = VLAPolicy(spaces, VLAConfig(localized=localized), Words(["go"]))
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
        cameras={"front": (16, 16)}, fps=10, proprio=17, action=4, state=49, expert=False
    )
    folder = tmp_path_factory.mktemp("data") / "table"
    with LeRobotWriter(folder, fps=10, features=features) as writer:
        for _ in range(4):
            with writer.episode("pick up the red cube") as episode:
                for step in range(6):
                    numbers = {PROPRIO: 17, STATE: 49, ACTION: 4}
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
        dataset=str(demonstrations),
        held_out=0.25,
        updates=6,
        batch_size=8,
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
    assert [row["global_step"] for row in judged] == [3, 6]
    assert all({"eval/loss", "eval/grounding_error_cm"} < row.keys() for row in judged)
    assert [row["global_step"] for row in rows if "train/grounding_loss" in row] == [6]
    words = VLAPolicy.from_pretrained(folder / "checkpoints/best/policy").words
    assert set(words.vocabulary) == set(TRAINING_WORDS)


def test_the_weight_is_that_of_the_auxiliary_head(config: TrainVLABCConfig, rows_of: Callable[..., Any]) -> None:
    row = next(row for row in rows_of(train_vla_bc.train(config).folder) if "train/loss" in row)
    found = row["train/auxiliary_loss"] + row["train/grounding_loss"]
    assert row["train/loss"] == pytest.approx(row["train/nll"] + 30.0 * found, rel=1e-5)


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
    assert not any("eval/loss" in row for row in rows)


def test_a_dry_run_draws_few_scenes(config: TrainVLABCConfig, capsys: pytest.CaptureFixture[str]) -> None:
    many = replace(config, grounding=replace(config.grounding, scenes=40_000))
    train_vla_bc.train(replace(many, run=replace(config.run, dry_run=True)))
    assert "grounding: 8 of 8 scenes" in capsys.readouterr().err


def test_images_are_augmented_alike(scenes: GroundingScenes) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = scenes.observations(torch.arange(4))
    changed = disturb(seen, AugmentConfig(), word_dropout=0.0, generator=generator)
    assert changed.keys() == seen.keys()
    assert not changed["image"].equal(seen["image"])
