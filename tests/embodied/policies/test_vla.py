"""The vision-language-action policy: shapes, masks, one path for acting and judging, floors, files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from embodied.policies.encoders import ImageEncoder, InstructionEncoder, coordinates, look
from embodied.policies.vla import VLAConfig, VLAPolicy, VLASpaces
from embodied.policies.words import Words
from experiment.errors import UserError

SPACES = VLASpaces(image_size=16, cameras=("front",), proprio_size=3, state_size=8, action_size=2)
CONFIG = VLAConfig(
    chunk=4, channels=(4, 8), queries=3, words=8, length=6, hidden=(16,), critic_hidden=(16,), percept=5
)
WORDS = Words(["bar", "cube", "green", "on", "red", "stack"])


def make(config: VLAConfig = CONFIG, spaces: VLASpaces = SPACES) -> VLAPolicy:
    torch.manual_seed(0)
    policy = VLAPolicy(spaces, config, WORDS)
    with torch.no_grad():
        policy.actor.last.weight.mul_(100)  # the start's small actions would hide differences
    return policy


def observe(*leading: int, seed: int = 0, spaces: VLASpaces = SPACES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = spaces.image_size
    seen = {
        "proprio": torch.randn(*leading, spaces.proprio_size, generator=generator),
        "state": torch.randn(*leading, spaces.state_size, generator=generator),
        "words": torch.randint(1, len(WORDS), (*leading, 6), generator=generator),
    }
    for camera in spaces.cameras:
        key = "image" if camera == "front" else f"{camera}_image"
        seen[key] = torch.randint(0, 256, (*leading, size, size, 3), generator=generator, dtype=torch.uint8)
    return seen


def test_a_query_gives_the_coordinates_of_what_answers_it() -> None:
    grid = coordinates(3, 5)
    assert grid[0].tolist() == [-1.0, -1.0]
    assert grid[1 * 5 + 3].tolist() == [0.5, 0.0]
    places = torch.zeros(1, 15, 2)
    places[0, 8, 0] = 100.0
    places[0, [0, 4], 1] = 50.0
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    found = look(places, queries, grid)  # one place; two alike: between them; no matter: the middle
    torch.testing.assert_close(found[0], torch.tensor([[0.5, 0.0], [0.0, -1.0], [0.0, 0.0]]))


def test_a_pictures_places_come_row_by_row_and_the_blocks_are_residual() -> None:
    torch.manual_seed(0)
    plain = ImageEncoder(channels=(4, 3), blocks=0, dtype=torch.float32)
    encoder = ImageEncoder(channels=(4, 3), blocks=1, dtype=torch.float32)
    encoder.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        encoder.blocks.get_parameter("0.weight").zero_()
        encoder.blocks.get_parameter("0.bias").copy_(torch.tensor([0.25, -0.25, 0.5]))
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    pixels = (images.permute(0, 3, 1, 2).float() - 128) / 128
    hidden = plain.second(plain.first(pixels).relu()).relu()  # [2, 3, 4, 4]
    places = encoder(images)
    assert places.shape == (2, 16, 3)
    for row, column in [(0, 0), (1, 3), (3, 2)]:
        expected = hidden[:, :, row, column] + torch.tensor([0.25, 0.0, 0.5])
        torch.testing.assert_close(places[:, 4 * row + column], expected)


def test_padding_changes_nothing_and_order_does() -> None:
    torch.manual_seed(0)
    encoder = InstructionEncoder(len(WORDS), length=8, width=8)
    text = WORDS.encode("stack red cube on green bar", 8)
    with torch.no_grad():
        encoder.embedding.weight[0] = 5.0
        twin = InstructionEncoder(len(WORDS), length=8, width=8)
        twin.load_state_dict(encoder.state_dict())
        twin.positions[6:] += 3.0
        twin.embedding.weight[0] = -7.0
        features = encoder(
            torch.stack([text, WORDS.encode("stack green bar on red cube", 8), torch.zeros_like(text)])
        )
        assert twin(text[None]).equal(encoder(text[None]))
    assert float((features[0] - features[1]).abs().max().detach()) > 0.1
    assert features.isfinite().all()


def test_pixels_reach_the_convolutions_exactly_in_bfloat16() -> None:
    encoder = ImageEncoder(channels=(4, 8), blocks=1, dtype=torch.bfloat16)
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    captured: list[Tensor] = []
    encoder.first.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    encoder(images)
    assert captured[0][0, 0].flatten().tolist() == [(value - 128) / 128 for value in range(256)]


def test_shapes_with_any_leading_dimensions() -> None:
    policy = make()
    for leading in [(5,), (2, 3), (2, 1, 2)]:
        observations = observe(*leading)
        actions, log_probs = policy.act(observations, None)
        assert actions.shape == (*leading, 4, 2)
        assert log_probs.shape == (*leading, 4)
        evaluation = policy.evaluate(observations, actions)
        assert evaluation.log_probs.shape == evaluation.entropy.shape == (*leading, 4)
        assert evaluation.values is not None
        assert evaluation.values.shape == leading
        assert policy.perceive(observations).shape == (*leading, 5)
        torch.testing.assert_close(policy.values({"state": observations["state"]}), evaluation.values)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_log_probs_of_acting_are_those_of_judging_in_other_batches(precision: str) -> None:
    policy = make(replace(CONFIG, precision=precision))  # type: ignore[arg-type]
    observations = observe(37)
    noise = torch.randn(37, 4, 2, generator=torch.Generator().manual_seed(1))
    parts = [
        policy.act({name: tensor[i : i + 1] for name, tensor in observations.items()}, noise[i : i + 1])
        for i in range(37)
    ]
    actions, log_probs = (torch.cat(column) for column in zip(*parts, strict=True))
    together, judged = policy.act(observations, noise)
    torch.testing.assert_close(actions, together, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_probs, judged, rtol=1e-6, atol=1e-6)
    evaluation = policy.evaluate(
        {name: tensor.unsqueeze(1) for name, tensor in observations.items()}, actions[:, None]
    )
    torch.testing.assert_close(evaluation.log_probs.squeeze(1), log_probs, rtol=0, atol=1e-5)


def test_log_probs_and_entropy_by_hand() -> None:
    policy = make()
    observations = observe(2)
    actions, log_probs = policy.act(observations, None)
    constant = 2 * (1.5 - 0.5 * math.log(2 * math.pi))  # two dimensions at their means, log std -1.5
    torch.testing.assert_close(log_probs, torch.full((2, 4), constant))
    noise = torch.ones(2, 4, 2)
    noisy, lower = policy.act(observations, noise)
    torch.testing.assert_close(noisy - actions, torch.full((2, 4, 2), math.exp(-1.5)))
    torch.testing.assert_close(lower, torch.full((2, 4), constant - 1.0))
    entropy = policy.evaluate(observations, actions).entropy
    torch.testing.assert_close(entropy, torch.full((2, 4), 2 * (-1.5 + 0.5 + 0.5 * math.log(2 * math.pi))))


def test_a_deviation_beyond_its_bounds_counts_as_the_bound_and_can_come_back() -> None:
    policy = make()
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor([-9.0, 4.0]))
    distribution = policy.distribution(observe(3))
    assert distribution.log_std.tolist() == [-3.0, 0.0]
    distribution.entropy().sum().backward()
    assert policy.log_std.grad is not None
    assert policy.log_std.grad.tolist() == [12.0, 12.0]  # 3 decisions of 4 steps


def test_what_is_perceived_by_hand() -> None:
    """Where each query's thing is in each picture, camera by camera, then the words, then the body."""
    spaces = replace(SPACES, cameras=("front", "wrist"))
    policy, seen = make(replace(CONFIG, precision="float32"), spaces=spaces), observe(3, spaces=spaces)
    policy.learn_normalization(proprio=5 * torch.randn(40, 3) + 2, state=torch.randn(40, 8))
    eyes = policy.perception
    instruction = eyes.instruction(seen["words"])
    queries = eyes.queries(instruction).view(3, 2, 3, 8)  # [N, cameras, queries, channels]
    found = [
        look(eyes.vision(seen[key]), queries[:, i], eyes.grid) for i, key in enumerate(("image", "wrist_image"))
    ]
    body = policy.proprio_normalizer(seen["proprio"])
    expected = eyes.head(torch.cat([found[0].flatten(1), found[1].flatten(1), instruction, body], -1))
    torch.testing.assert_close(policy.perceive(seen), expected)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_many_sentences_about_a_picture_are_each_read_as_if_alone(precision: str) -> None:
    spaces = replace(SPACES, cameras=("front", "wrist"))
    policy = make(replace(CONFIG, precision=precision), spaces=spaces)  # type: ignore[arg-type]
    seen = observe(7, spaces=spaces)
    words = torch.stack([observe(7, seed=seed)["words"] for seed in (1, 2, 3)], 1)
    together = policy.perceive_each({**seen, "words": words})
    assert together.shape == (7, 3, 5)
    for index in range(3):
        alone = policy.perceive({**seen, "words": words[:, index]})
        torch.testing.assert_close(together[:, index], alone, rtol=0, atol=1e-6)
    assert float((together[:, 0] - together[:, 1]).abs().max().detach()) > 1e-3


def test_neither_the_eyes_nor_the_hand_sees_the_state_and_the_critic_nothing_else() -> None:
    policy = make()
    critic = list(policy.critic_parameters())
    parts = [*critic, *policy.actor_parameters(), *policy.perception.parameters()]
    assert sorted(map(id, parts)) == sorted(map(id, policy.parameters()))
    observations = observe(3)
    blind = {name: tensor for name, tensor in observations.items() if name != "state"}
    actions, _ = policy.act(blind, None)
    assert actions.equal(policy.act(observations, None)[0])
    assert policy.perceive(blind).equal(policy.perceive(observations))
    evaluation = policy.evaluate(observations, actions)
    assert evaluation.values is not None
    evaluation.values.sum().backward()
    assert all((p.grad is not None) == any(p is c for c in critic) for p in policy.parameters())


def learning(policy: VLAPolicy) -> set[str]:
    """First parts of the names of what has a gradient."""
    return {name.split(".")[0] for name, parameter in policy.named_parameters() if parameter.grad is not None}


def test_the_hand_and_the_eyes_have_no_gradient_for_each_other() -> None:
    policy, observations = make(), observe(3)
    policy.evaluate(observations, torch.zeros(3, 4, 2)).log_probs.sum().backward()
    assert learning(policy) == {"actor", "log_std"}
    policy.zero_grad()
    percept = policy.perceive(observations)
    policy.evaluate({**observations, "percept": percept}, torch.zeros(3, 4, 2)).log_probs.sum().backward()
    assert learning(policy) == {"actor", "log_std"}  # also where the percept comes with its gradient
    policy.zero_grad()
    percept.square().sum().backward()
    assert learning(policy) == {"perception"}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.perception.head.parameters())


def test_a_percept_among_the_observations_is_read_instead_of_images_and_words() -> None:
    policy, observations, noise = make(), observe(3), torch.randn(3, 4, 2)
    percept = policy.perceive(observations).detach()
    expected = policy.act(observations, noise)
    told = {"proprio": observations["proprio"], "percept": percept}
    for found, wanted in zip(policy.act(told, noise), expected, strict=True):
        assert found.equal(wanted)
    others = {**observe(3, seed=1), **told}
    assert policy.act(others, noise)[0].equal(expected[0])
    assert not policy.act({**told, "percept": percept + 0.1}, noise)[0].equal(expected[0])
    evaluation = policy.evaluate({**told, "state": observations["state"]}, expected[0])
    torch.testing.assert_close(evaluation.log_probs, expected[1])


@pytest.mark.parametrize("ablate, blind", [("none", None), ("image", "image"), ("words", "words")])
def test_floors_do_not_see_their_input(ablate: str, blind: str | None, tmp_path: Path) -> None:
    make(replace(CONFIG, ablate=ablate)).save_pretrained(tmp_path)  # type: ignore[arg-type]
    policy = VLAPolicy.from_pretrained(tmp_path)  # the floor travels with the policy
    observations, others = observe(3), observe(3, seed=1)
    before, _ = policy.act(observations, None)
    for name in ("image", "words", "proprio"):
        after, _ = policy.act({**observations, name: others[name]}, None)
        assert after.equal(before) == (name == blind)


def test_two_cameras_are_both_seen() -> None:
    spaces = replace(SPACES, cameras=("front", "wrist"))
    policy, observations = make(spaces=spaces), observe(3, spaces=spaces)
    before, _ = policy.act(observations, None)
    for name in ("image", "wrist_image"):
        after, _ = policy.act({**observations, name: 255 - observations[name]}, None)
        assert not after.equal(before)


def test_the_eyes_feel_the_hand() -> None:
    policy, observations = make(), observe(3)
    moved = {**observations, "proprio": observations["proprio"] + 1.0}
    assert float((policy.perceive(moved) - policy.perceive(observations)).abs().min().detach()) > 0.0


def test_it_comes_back_from_its_folder_to_the_bit(tmp_path: Path) -> None:
    policy = make()
    observations = observe(20)
    policy.learn_normalization(proprio=observations["proprio"] * 3 + 1, state=observations["state"] * 2)
    policy.save_pretrained(tmp_path / "policy")
    again = VLAPolicy.from_pretrained(tmp_path / "policy")
    assert (again.spaces, again.config, again.words.vocabulary) == (SPACES, CONFIG, WORDS.vocabulary)
    assert again.act(observations, None)[0].equal(policy.act(observations, None)[0])
    assert again.values(observations).equal(policy.values(observations))


def test_folders_that_hold_no_such_policy_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"policy\.json is missing"):
        VLAPolicy.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    for wrong in [
        {**description, "policy": "state_mlp"},
        {**description, "vocabulary": ["red"]},
        {**description, "config": {**description["config"], "colour": 1}},
        {**description, "spaces": {**description["spaces"], "proprio_size": 4}},
    ]:
        (tmp_path / "policy.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="not a vision-language-action policy, or a damaged one"):
            VLAPolicy.from_pretrained(tmp_path)
    (tmp_path / "policy.safetensors").unlink()
    with pytest.raises(UserError, match=r"policy\.safetensors is missing"):
        VLAPolicy.from_pretrained(tmp_path)


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"policy\.chunk must be at least 1"):
        VLAConfig(chunk=0)
    with pytest.raises(ValueError, match=r"policy\.log_std must be within"):
        VLAConfig(log_std=-4.0)
    with pytest.raises(ValueError, match=r"policy\.words must be a multiple of 4, got 6"):
        VLAConfig(words=6)
    with pytest.raises(ValueError, match=r"policy\.percept must be at least 1, got 0"):
        VLAConfig(percept=0)
    with pytest.raises(UserError, match=r"policy\.percept is 9, but the state has 8"):
        VLAPolicy(SPACES, replace(CONFIG, percept=9), WORDS)
