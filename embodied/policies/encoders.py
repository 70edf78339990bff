"""How the vision-language-action policy reads an instruction and looks at images with it in mind."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied.policies.words import PADDING
from policy_core.networks import MLP

HEADS = 4
"""Parts of an instruction's features, each of which attends to words of its own."""


class InstructionEncoder(nn.Module):
    """Words int64 [N, L] -> features [N, width].

    Every word is read together with its neighbours ("on the green" is not "the green cube") and its position, and
    each of HEADS parts of the features is a mean over the words that this head attends to. In a comparison on the
    table's sentences a self-attention layer under a plain mean needed twice the updates to tell what goes on what.
    """

    def __init__(self, vocabulary: int, *, length: int, width: int, embedding: int = 32, hidden: int = 64) -> None:
        """width: a multiple of HEADS."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PADDING)
        self.positions = nn.Parameter(torch.randn(length, embedding) * 0.5)
        self.near = nn.Linear(3 * embedding, hidden)
        self.scores = nn.Linear(hidden, HEADS)
        self.values = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, words: Tensor) -> Tensor:
        """Padding changes nothing; an instruction of nothing but padding is the same as any other such."""
        present = (words != PADDING).unsqueeze(-1)  # [N, L, 1]
        each = F.pad((self.embedding(words) + self.positions) * present, (0, 0, 1, 1))
        hidden = F.relu(self.near(torch.cat([each[:, :-2], each[:, 1:-1], each[:, 2:]], -1)))  # [N, L, hidden]
        scores = self.scores(hidden).masked_fill(~present, torch.finfo(hidden.dtype).min)
        weights = scores.softmax(1).transpose(1, 2).unsqueeze(2)  # [N, HEADS, 1, L]
        values = self.values(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # [N, HEADS, L, -1]
        return self.norm((weights @ values).flatten(1))


class Conv(nn.Conv2d):
    """A convolution that computes in its input's precision, whatever its weights are kept in."""

    def reset_parameters(self) -> None:
        """He initialisation: torch's own start shrinks the signal by a factor of 2.4 at every layer."""
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W'], channels last in memory."""
        weight = self.weight.to(inputs.dtype, memory_format=torch.channels_last)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return F.conv2d(inputs, weight, bias, self.stride, self.padding)


class ImageEncoder(nn.Module):
    """uint8 images [N, H, W, 3] -> features of their places [N, P, C], float32.

    Two strided convolutions (to a quarter of the size), then residual ones, all in `dtype`. No word is read here,
    so that one pass serves every sentence about a picture.
    """

    def __init__(self, *, channels: Sequence[int], blocks: int, dtype: torch.dtype) -> None:
        super().__init__()
        first, last = channels
        self.first = Conv(3, first, 5, stride=2, padding=2)
        self.second = Conv(first, last, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Conv(last, last, 3, padding=1) for _ in range(blocks))
        self._dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """Pixels are taken to [-1, 1) exactly, also in bfloat16."""
        pixels = images.permute(0, 3, 1, 2).to(self._dtype).sub_(128.0).mul_(1 / 128)  # in channels-last order
        hidden = F.relu(self.second(F.relu(self.first(pixels))))
        for block in self.blocks:
            hidden = hidden + F.relu(block(hidden))
        return hidden.permute(0, 2, 3, 1).flatten(1, 2).float()


class Perception(nn.Module):
    """What an instruction asks for and where that is: images, words and proprioception -> a percept of n numbers.

    Attention: each of `queries`, made from the instruction, looks for one thing in each image, and all that comes
    out is where it is. With the features found there too, it learnt the recorded scenes by heart: the squared error
    of positions in new ones was 1.6 times as large. Proprioception tells where a thing in the hand is.
    """

    grid: Tensor

    def __init__(
        self,
        vocabulary: int,
        *,
        cameras: int,
        image_size: int,
        proprio: int,
        percept: int,
        length: int,
        width: int,
        channels: Sequence[int],
        blocks: int,
        queries: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.instruction = InstructionEncoder(vocabulary, length=length, width=width)
        self.vision = ImageEncoder(channels=channels, blocks=blocks, dtype=dtype)
        self.queries = nn.Linear(width, cameras * queries * channels[-1])
        nn.init.normal_(self.queries.weight, std=1 / math.sqrt(width))  # sharp enough to learn from
        self.head = MLP((2 * cameras * queries + width + proprio, 128, percept), activation="relu", output_gain=0.1)
        side = -(-image_size // 4)
        self.register_buffer("grid", coordinates(side, side), persistent=False)

    def forward(self, images: Sequence[Tensor], words: Tensor, proprio: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] of each camera, int64 [N, S, L] (S sentences about each picture), normalised [N, P]
        -> [N, S, n]."""
        pictures, sentences = words.shape[:2]
        instruction = self.instruction(words.flatten(0, 1)).view(pictures, sentences, -1)
        places = self.vision(images[0] if len(images) == 1 else torch.cat(list(images)))
        places = places.view(len(images), pictures, *places.shape[1:]).transpose(0, 1)  # [N, cameras, P, C]
        queries = self.queries(instruction).view(pictures, sentences, len(images), -1, places.shape[-1])
        queries = queries.transpose(1, 2).flatten(2, 3)  # [N, cameras, S * Q, C]
        found = look(places.flatten(0, 1), queries.flatten(0, 1), self.grid)
        found = found.view(pictures, len(images), sentences, -1).transpose(1, 2).flatten(2)
        body = proprio.unsqueeze(1).expand(-1, sentences, -1)
        return self.head(torch.cat([found, instruction, body], -1))


def coordinates(height: int, width: int) -> Tensor:
    """[height * width, 2]: x (rightwards) and y (downwards) of each place, row by row, from -1 to 1."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1)


def look(places: Tensor, queries: Tensor, grid: Tensor) -> Tensor:
    """Spatial softmax (Levine 2016, 1504.00702) with given queries.

    places [N, P, C], queries [N, Q, C], grid [P, 2] -> [N, Q, 2], the expected coordinates under softmax over
    places of the product with each query.
    """
    return (queries @ places.transpose(1, 2)).softmax(-1) @ grid
