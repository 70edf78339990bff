"""Changes to images, pixel by pixel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from embodied.policies.augment import AugmentConfig, augment, random_colours, random_shift, shift

NOTHING = AugmentConfig(shift=0, brightness=0.0, contrast=0.0, tint=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int = 6, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator(9))


def test_a_shift_moves_pixels_and_repeats_the_edge() -> None:
    image = torch.arange(9, dtype=torch.uint8).view(1, 3, 3, 1).expand(1, 3, 3, 3)
    moved = shift(image, [1], [-1], 1)[0, :, :, 0]  # one down, one to the left
    assert moved.tolist() == [[1, 2, 2], [1, 2, 2], [4, 5, 5]]


def test_random_shifts_stay_within_their_bound_and_differ() -> None:
    images = noise(200)
    moved = random_shift(images, 2, generator())
    candidates = torch.stack([shift(images, [y] * 200, [x] * 200, 2) for y in range(-2, 3) for x in range(-2, 3)])
    matches = (candidates == moved).flatten(2).all(-1)  # [25, 200]
    assert matches.any(0).all()
    assert matches.any(1).all()  # every one of the 25 shifts occurs


def test_brightness_contrast_and_tint_by_hand() -> None:
    images = torch.tensor([100, 140], dtype=torch.uint8).view(1, 1, 2, 1).expand(1, 1, 2, 3)  # mean 120
    draws = torch.rand(5, 1, generator=generator(3)).mul(2).sub(1)[:, 0]
    brightness = random_colours(images, AugmentConfig(0, 0.1, 0.0, 0.0), generator(3)).float()
    assert brightness.equal((images + 25.5 * draws[0]).round())
    contrast = random_colours(images, AugmentConfig(0, 0.0, 0.5, 0.0), generator(3)).float()
    assert contrast.equal((120 + (images.float() - 120) * (1 + 0.5 * draws[1])).round())
    tint = random_colours(images, AugmentConfig(0, 0.0, 0.0, 0.2), generator(3)).float()
    assert tint.equal((images * (1 + 0.2 * draws[2:])).round())


def test_colours_stay_in_range() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(64, 4, 2, 3)
    changed = random_colours(ends, AugmentConfig(0, 0.5, 0.5, 0.0), generator()).int()
    assert changed.min() == 0  # a wrap around would leave none at the ends in place
    assert changed.max() == 255
    assert (changed[:, :, 1] >= changed[:, :, 0]).all()


def test_the_same_generator_gives_the_same_images() -> None:
    images = noise()
    kept = images.clone()
    first, second = (augment(images, AugmentConfig(), generator(4)) for _ in range(2))
    assert first.equal(second)
    assert not first.equal(augment(images, AugmentConfig(), generator(5)))
    assert first.dtype == torch.uint8
    assert images.equal(kept)  # the data set is not touched


def test_colour_words_keep_their_meaning() -> None:
    """The strongest default change of light leaves the nearest colour what it was."""
    palette = torch.tensor([[210, 40, 40], [40, 180, 60], [50, 70, 210], [220, 200, 50], [150, 50, 170]])
    images = palette.to(torch.uint8).view(5, 1, 1, 3).repeat_interleave(200, 0).expand(1000, 4, 4, 3).clone()
    changed = random_colours(images, AugmentConfig(), generator())[:, 0, 0].float()
    names = torch.cdist(changed, palette.float()).argmin(-1)
    assert names.equal(torch.arange(5).repeat_interleave(200))


def test_nothing_to_change_changes_nothing() -> None:
    images = noise()
    assert augment(images, NOTHING, generator()) is images


@pytest.mark.parametrize("wrong", [{"shift": -1}, {"brightness": -0.1}, {"contrast": 1.0}, {"tint": -0.1}])
def test_impossible_ranges_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="augment"):
        AugmentConfig(**wrong)  # type: ignore[arg-type]
