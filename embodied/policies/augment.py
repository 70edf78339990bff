"""Random changes to camera images that leave what they show the same: small shifts, light and a tint.

Colours are words of the instructions, so the tint stays small; a shift moves the whole scene against positions that
the policy is taught, so it stays within the error that it may make there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class AugmentConfig:
    """Each range is symmetric about "no change" and drawn anew for every image; 0 switches that change off.

    shift           whole pixels in each direction; the edge is repeated
    brightness      added to every pixel, as a share of the range 0..255
    contrast        factor 1 +- contrast about the image's mean
    tint            factor 1 +- tint of each colour channel
    """

    shift: int = 1
    brightness: float = 0.1
    contrast: float = 0.15
    tint: float = 0.05

    def __post_init__(self) -> None:
        if self.shift < 0 or self.brightness < 0 or not 0 <= self.contrast < 1 or not 0 <= self.tint < 1:
            raise ValueError(
                "augment: shift and brightness must not be negative, contrast and tint must be in [0, 1)"
            )


def augment(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """uint8 [N, H, W, 3] -> the same shape and type, every image changed in its own way."""
    if config.shift:
        images = random_shift(images, config.shift, generator)
    if config.brightness or config.contrast or config.tint:
        images = random_colours(images, config, generator)
    return images


def random_shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move every image by up to `most` pixels each way."""
    down, right = torch.randint(-most, most + 1, (2, len(images)), generator=generator).tolist()
    return shift(images, down, right, most)


def shift(images: Tensor, down: Sequence[int], right: Sequence[int], most: int) -> Tensor:
    """uint8 [N, H, W, 3], the images moved by whole pixels, at most `most` each way, the edges repeated."""
    height, width = images.shape[1:3]
    framed = np.pad(images.numpy(), ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    moved = np.empty_like(images.numpy())
    for index, (y, x) in enumerate(
        zip(down, right, strict=True)
    ):  # a copy of rows: a gather takes eight times as long
        moved[index] = framed[index, most - y : most - y + height, most - x : most - x + width]
    return torch.from_numpy(moved)


def random_colours(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and tint, as one factor and one offset per image and channel."""
    draws = torch.rand(5, len(images), generator=generator).mul_(2).sub_(1)
    brightness, contrast, tint = 255.0 * config.brightness * draws[0], config.contrast * draws[1], draws[2:]
    factor = (1.0 + contrast)[:, None] * (1.0 + config.tint * tint.t())  # [N, 3]
    width = images.shape[2]
    pixels = images.flatten(2).to(torch.float32)  # [N, H, 3 W]: whole rows at once are several times as fast
    offset = brightness - contrast * pixels.mean((1, 2)) + 0.5  # 0.5: the conversion to integers rounds down
    pixels.mul_(factor.repeat(1, width).unsqueeze(1)).add_(offset[:, None, None])
    return pixels.clamp_(0, 255).to(torch.uint8).view(images.shape)
