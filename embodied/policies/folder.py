"""A policy as a folder: policy.json, which describes it, and policy.safetensors, its weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from experiment.checkpoint import find_checkpoint
from experiment.errors import UserError

DESCRIPTION, WEIGHTS = "policy.json", "policy.safetensors"


def write_policy(folder: Path | str, description: Mapping[str, Any], policy: torch.nn.Module) -> None:
    """Write both files; the folder is made where it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in policy.state_dict().items()}, folder / WEIGHTS)


def policy_folder(path: Path | str) -> Path:
    """A policy's folder as it is; of a run, its best policy, or the last where it judged none.

    UserError if a run has none.
    """
    path = Path(path)
    return find_checkpoint(path, "auto") / "policy" if (path / "checkpoints").is_dir() else path


def read_description(folder: Path) -> dict[str, Any]:
    """What policy.json says; to be called within `reading_policy`."""
    description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    return description


def read_weights(folder: Path, policy: torch.nn.Module) -> None:
    """Load policy.safetensors into the policy; to be called within `reading_policy`."""
    policy.load_state_dict(load_file(folder / WEIGHTS))


@contextlib.contextmanager
def reading_policy(folder: Path, kind: str) -> Iterator[None]:
    """Whatever is wrong with the folder of a policy ("a state policy") becomes a UserError of one line."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = WEIGHTS if (folder / DESCRIPTION).is_file() else DESCRIPTION
        raise UserError(
            f"{folder}: no policy here ({missing} is missing); give a folder that save_pretrained wrote, such as"
            " RUN/checkpoints/best/policy"
        ) from error
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: not {kind}, or a damaged one: {reason}") from error
