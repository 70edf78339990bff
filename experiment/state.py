"""Trees of tensors, arrays and scalars to `state.safetensors` + `state.json` and back, exactly. No pickle.

A tree may hold dicts (text or integer keys), lists, tuples, None, bools, integers of any size, floats (NaN
and infinities too), text, bytes, tensors, numpy arrays and numpy scalars. Types, dtypes, shapes, key order
and tuple-ness survive; tensors come back on the CPU, contiguous and without gradients. Tensors that were one
and the same (tied weights) are stored once and come back as one object; tensors that merely overlap come back
as separate copies.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_TENSORS, _TREE = "state.safetensors", "state.json"


def save_state(folder: Path, state: Any) -> None:
    """Write a tree into an existing folder.

    Raises:
        TypeError: something in the tree cannot be stored; the message names its place.
        OSError, SafetensorError: the disk is full, for instance.
    """
    from safetensors.torch import save_file

    writer = _Writer()
    tree = writer.encode(state, ())
    save_file(writer.tensors, folder / _TENSORS)
    (folder / _TREE).write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")


def load_state(folder: Path) -> Any:
    """Read back what `save_state` wrote.

    Raises:
        FileNotFoundError: the folder holds no state.
        ValueError: the files are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tree = json.loads((folder / _TREE).read_text(encoding="utf-8"))
        tensors = load_file(folder / _TENSORS)
        return _decode(tree, tensors)
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{folder}: damaged state: {error}") from error


class _Writer:
    """Collects tensors under readable names while the rest of the tree becomes JSON."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        import torch

        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if type(value) is bytes:
            return {"bytes": value.hex()}
        if isinstance(value, dict):
            return {"dict": [[self._key(k, path), self.encode(v, (*path, str(k)))] for k, v in value.items()]}
        if type(value) in (list, tuple):
            items = [self.encode(item, (*path, str(index))) for index, item in enumerate(value)]
            return items if type(value) is list else {"tuple": items}
        if isinstance(value, torch.Tensor):
            return {"tensor": self._tensor(value, path)}
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value, path)
        raise TypeError(f"state {'/'.join(path)}: cannot store a {type(value).__name__}")

    def _key(self, key: Any, path: tuple[str, ...]) -> Any:
        if type(key) not in (str, int):
            raise TypeError(f"state {'/'.join(path)}: cannot store the key {key!r}; use text or an integer")
        return key

    def _tensor(self, tensor: torch.Tensor, path: tuple[str, ...]) -> str:
        import torch

        if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype == torch.complex128:
            raise TypeError(f"state {'/'.join(path)}: cannot store a {tensor.layout} tensor of {tensor.dtype}")
        tensor = tensor.detach()
        identity: tuple[Any, ...] = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and not tensor.is_conj() and not tensor.is_neg():
            if identity in self._names:
                return self._names[identity]
        else:
            identity = (len(self.tensors),)
        data = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        if data.untyped_storage().data_ptr() in self._storages:
            data = data.clone()
        self._storages.add(data.untyped_storage().data_ptr())
        self._names[identity] = self._add(data, path)
        return self._names[identity]

    def _array(self, array: np.ndarray | np.generic, path: tuple[str, ...]) -> dict[str, Any]:
        """Any plain dtype, byte order included, as bytes: numpy has more dtypes than safetensors."""
        import torch

        data = np.array(array, order="C", subok=False)
        if data.dtype.hasobject or data.dtype.names:
            raise TypeError(f"state {'/'.join(path)}: cannot store an array of {data.dtype}")
        name = self._add(torch.from_numpy(np.frombuffer(bytearray(data.tobytes()), dtype=np.uint8)), path)
        kind = "scalar" if isinstance(array, np.generic) else "array"
        return {kind: name, "dtype": data.dtype.str, "shape": list(data.shape)}

    def _add(self, data: torch.Tensor, path: tuple[str, ...]) -> str:
        name = base = "/".join(path) or "state"
        count = 1
        while name in self.tensors:
            count += 1
            name = f"{base}#{count}"
        self.tensors[name] = data
        return name


def _decode(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind, value = next(iter(tree.items()))
    match kind:
        case "dict":
            return {key: _decode(inner, tensors) for key, inner in value}
        case "tuple":
            return tuple(_decode(item, tensors) for item in value)
        case "float":
            return float(value)
        case "bytes":
            return bytes.fromhex(value)
        case "tensor":
            return tensors[value]
        case "array" | "scalar":
            raw = np.frombuffer(tensors[value].numpy().tobytes(), dtype=np.dtype(tree["dtype"]))
            array = raw.reshape(tree["shape"]).copy()
            return array if kind == "array" else array[()]
    raise ValueError(f"unknown entry {kind!r}")
