"""State trees survive exactly."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiment.state import load_state, save_state


def round_trip(folder: Path, state: Any) -> Any:
    save_state(folder, state)
    return load_state(folder)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
        torch.bool,
    ],
)  # fmt: skip
def test_every_dtype_and_shape(tmp_path: Path, same: Callable[..., None], dtype: torch.dtype) -> None:
    values = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).to(dtype)
    state = {
        "whole": values, "scalar": values[1, 2, 3].clone(), "empty": values[:0], "also empty": values[:, :0],
        "transposed": values.transpose(0, 2), "strided": values[:, ::2, 1:], "expanded": values[:1].expand(5, 3, 4),
    }  # fmt: skip
    same(round_trip(tmp_path, state), state)


def test_containers_keys_and_scalars(tmp_path: Path, same: Callable[..., None]) -> None:
    state: dict[Any, Any] = {
        "none": None, "flags": [True, False], "whole": -3, "huge": 2**127 + 1, "negative": -(2**200),
        "floats": [0.1, -0.0, 1e-320, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
        "text": "ä\n\"\u2028", "bytes": b"\x00\xff", "tuple": (1, (2, [3, ()]), {}), "list": [], "": "empty key",
        "ints": {0: "a", -5: {7: torch.ones(2)}, 2**70: "b"}, "mixed": {"1": "text", 1: "integer"},
        "dict": {"dict": [], "tensor": "t", "tuple": 1}, "a/b": torch.zeros(1), "a": {"b": torch.ones(1)},
        3: "integer key at the top",
    }  # fmt: skip
    same(round_trip(tmp_path, state), state)


@pytest.mark.parametrize("state", [None, 1, [], (), {}, torch.ones(()), (torch.ones(2), 1)])
def test_any_root(tmp_path: Path, same: Callable[..., None], state: Any) -> None:
    same(round_trip(tmp_path, state), state)


def test_arrays(tmp_path: Path, same: Callable[..., None]) -> None:
    base = np.arange(12.0).reshape(3, 4)
    state = {
        "f8": base, "fortran": np.asfortranarray(base), "strided": base[:, ::2], "big endian": base.astype(">f4"),
        "u16": base.astype(np.uint16), "bool": base > 3, "text": np.array(["ab", "ü"]), "complex": base * 1j,
        "0-d": np.array(2.5), "empty": np.zeros((0, 3)), "dates": np.array(["2024-01-01"], dtype="datetime64[D]"),
        "scalars": [np.float32(0.1), np.int64(3), np.bool_(True), np.float64("nan")],
    }  # fmt: skip
    loaded = round_trip(tmp_path, state)
    same(loaded, state)
    loaded["f8"][0, 0] = 5  # writable, like any array
    assert type(loaded["scalars"][1]) is np.int64


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_numpy_generators_continue(tmp_path: Path, same: Callable[..., None], kind: str) -> None:
    generator = np.random.Generator(getattr(np.random, kind)(3))
    generator.normal(size=5)
    generator.integers(7, dtype=np.int32)  # leaves half of a 64-bit word in the state
    state = generator.bit_generator.state
    loaded = round_trip(tmp_path, state)
    same(loaded, state)
    other = np.random.Generator(getattr(np.random, kind)(4))
    other.bit_generator.state = loaded
    assert (
        other.integers(7, dtype=np.int32, size=20).tolist()
        == generator.integers(7, dtype=np.int32, size=20).tolist()
    )


def test_python_random_continues(tmp_path: Path, same: Callable[..., None]) -> None:
    generator = random.Random(5)
    generator.gauss(0, 1)
    loaded = round_trip(tmp_path, generator.getstate())
    same(loaded, generator.getstate())
    other = random.Random()
    other.setstate(loaded)
    assert [other.gauss(0, 1) for _ in range(5)] == [generator.gauss(0, 1) for _ in range(5)]


def test_tied_tensors_are_stored_once_and_stay_one(tmp_path: Path, same: Callable[..., None]) -> None:
    embedding = torch.nn.Embedding(1000, 16)
    head = torch.nn.Linear(16, 1000, bias=False)
    head.weight = embedding.weight
    state = {"embedding": embedding.state_dict(), "head": head.state_dict(), "parameter": embedding.weight}
    loaded = round_trip(tmp_path, state)
    assert loaded["embedding"]["weight"] is loaded["head"]["weight"]
    assert loaded["parameter"] is loaded["head"]["weight"]
    assert not loaded["parameter"].requires_grad
    same(loaded["head"]["weight"], embedding.weight.data)
    assert (tmp_path / "state.safetensors").stat().st_size < 1000 * 16 * 4 + 2000


def test_overlapping_tensors_become_independent_copies(tmp_path: Path, same: Callable[..., None]) -> None:
    base = torch.arange(6.0)
    state = {
        "base": base, "first": base[:3], "same start": base[:3].view(3, 1), "last": base[3:],
        "bits": base.view(torch.int32), "conjugate": torch.complex(base, base).conj(),
        "negative": torch.complex(base, base).conj().imag, "empties": [base[:0], torch.zeros(0)],
    }  # fmt: skip
    loaded = round_trip(tmp_path, state)
    for key in ("base", "first", "same start", "last", "bits"):
        same(loaded[key], state[key])
    assert torch.equal(loaded["conjugate"], torch.complex(base, -base))
    assert torch.equal(loaded["negative"], -base)
    assert loaded["empties"][0] is not loaded["empties"][1]
    loaded["base"].zero_()
    assert loaded["first"].tolist() == [0, 1, 2]


def test_an_optimizer_continues_bit_for_bit(tmp_path: Path, same: Callable[..., None]) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2).to(torch.bfloat16)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(3, 4, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    for _ in range(3):
        step(model, optimizer)
    loaded = round_trip(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, other_optimizer = make()
    other.load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    step(model, optimizer)
    step(other, other_optimizer)
    same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    "state, message",
    [
        ({"a": {"b": deque([1])}}, "state a/b: cannot store a deque"),
        ([1, {2}], "state 1: cannot store a set"),
        ({"x": {(1, 2): 3}}, r"state x: cannot store the key \(1, 2\)"),
        ({"x": {True: 3}}, "state x: cannot store the key True"),
        ({"x": np.array([object()])}, "state x: cannot store an array of object"),
        (
            {"x": torch.zeros(2, dtype=torch.complex128)},
            "state x: cannot store a torch.strided tensor of .*complex128",
        ),
        ({"x": torch.eye(2).to_sparse()}, "state x: cannot store a torch.sparse_coo tensor"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        save_state(tmp_path, state)


def test_damage_is_noticed(tmp_path: Path) -> None:
    save_state(tmp_path, {"a": torch.ones(100)})
    with (tmp_path / "state.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="damaged state"):
        load_state(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "nowhere")
