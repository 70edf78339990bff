"""Random patterns on textures, and the way of changed textures to the graphics card."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable

import mujoco
import numpy as np

from envs.randomization.physics import Names, Writer, named
from envs.randomization.spec import Operation, Randomization, combine, sample

_ROLES = (int(mujoco.mjtTextureRole.mjTEXROLE_RGB), int(mujoco.mjtTextureRole.mjTEXROLE_RGBA))
_COLOURS = 6  # two colours
_PATTERNS = 5
_FINEST = 8  # periods across the texture


def texture_pixels(model: mujoco.MjModel, texture: int) -> np.ndarray:
    """The pixels [H, W, C] uint8 of a texture, a view of the model's."""
    height, width = int(model.tex_height[texture]), int(model.tex_width[texture])
    channels = int(model.tex_nchannel[texture])
    first = int(model.tex_adr[texture])
    return model.tex_data[first : first + height * width * channels].reshape(height, width, channels)


def _textures(model: mujoco.MjModel) -> Names:
    """Material -> index of its colour texture."""
    found: Names = {}
    for name, material in named(model, "material", model.nmat).items():
        ids = [int(model.mat_texid[material, role]) for role in _ROLES]
        used = next((texture for texture in ids if texture >= 0), -1)
        if used >= 0 and model.tex_nchannel[used] >= 3:
            found[name] = used
    return found


def _draw(spec: Randomization, rows: int, numbers: int, rng: np.random.Generator) -> np.ndarray:
    """Two colours, then the pattern, its periods, its direction in radians and the seed of its noise."""
    form = np.stack(
        [
            rng.integers(_PATTERNS, size=rows),
            rng.integers(2, _FINEST, size=rows, endpoint=True),
            rng.uniform(0, 2 * np.pi, size=rows),
            rng.integers(2**31, size=rows),
        ],
        axis=1,
    )
    return np.concatenate([sample(spec, (rows, _COLOURS), rng), form], axis=1)


def pattern(shape: tuple[int, int], kind: int, periods: int, direction: float, seed: int) -> np.ndarray:
    """How much of the second colour each pixel has, [H, W] in 0..1: flat, gradient, stripes, checks or blotches."""
    rows, columns = np.meshgrid(*(np.arange(size) / size for size in shape), indexing="ij")
    along = np.cos(direction) * columns + np.sin(direction) * rows
    across = -np.sin(direction) * columns + np.cos(direction) * rows
    match kind:
        case 0:
            return np.zeros(shape)
        case 1:
            return np.asarray((along - along.min()) / (np.ptp(along) or 1.0))
        case 2:
            return (np.floor(2 * periods * along) % 2).astype(np.float64)
        case 3:
            return ((np.floor(2 * periods * along) + np.floor(2 * periods * across)) % 2).astype(np.float64)
        case _:
            return _blotches(
                rows * periods, columns * periods, np.random.default_rng(seed).uniform(size=(periods + 2,) * 2)
            )


def _blotches(rows: np.ndarray, columns: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """`grid` read at fractional rows and columns, bilinearly."""
    top, left = rows.astype(int), columns.astype(int)
    down, right = rows - top, columns - left
    upper = grid[top, left] * (1 - right) + grid[top, left + 1] * right
    lower = grid[top + 1, left] * (1 - right) + grid[top + 1, left + 1] * right
    return np.asarray(upper * (1 - down) + lower * down)


def _paint(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    for texture, row in zip(ids, drawn, strict=True):
        pixels = texture_pixels(model, int(texture))
        kind, periods, direction, seed = row[_COLOURS:]
        mixed = pattern(pixels.shape[:2], int(kind), int(periods), float(direction), int(seed))[..., None]
        values = row[:3] * (1 - mixed) + row[3:_COLOURS] * mixed
        painted = combine(pixels[..., :3] / 255, operation, values)
        pixels[..., :3] = np.rint(255 * np.clip(painted, 0, 1))


TEXTURE = Writer(("texture",), _textures, _paint, numbers=_COLOURS + 4, draw=_draw)


# What each graphics context holds, as texture -> checksum. Kept here and not in an environment: a context is no
# part of an environment's state, and a restored environment draws with the context it has.
_UPLOADED: weakref.WeakKeyDictionary[mujoco.MjrContext, dict[int, int]] = weakref.WeakKeyDictionary()


def upload_textures(
    renderer: mujoco.Renderer, model: mujoco.MjModel, textures: Iterable[int] | None = None
) -> tuple[int, ...]:
    """Send those of the model's textures (all, or the named) that the graphics context does not hold; returns them.

    A renderer that draws several models of one scene needs this before each picture of any of them: the textures
    in its context are those of the model that was drawn last. Raises ValueError where the renderer is closed.
    """
    context, current = renderer._mjr_context, renderer._gl_context
    if context is None:
        raise ValueError("textures cannot be uploaded: the renderer is closed")
    held = _UPLOADED.setdefault(context, {})
    stale = []
    for texture in range(model.ntex) if textures is None else textures:
        checksum = zlib.crc32(texture_pixels(model, texture).tobytes())
        if held.get(texture) != checksum:
            held[texture] = checksum
            stale.append(texture)
    if stale and current is not None:
        current.make_current()
    for texture in stale:
        mujoco.mjr_uploadTexture(model, context, texture)
    return tuple(stale)
