"""Low-rank adapters (LoRA, 2106.09685) beside a frozen language model, through peft.

The adapter sits inside the transformers model, so whatever reads `LanguagePolicy.model` goes on as before. Saved,
it is a peft folder that names its base model. The reference of a later run is base and adapter as they were, never
the base alone: `frozen_copy` copies both.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiment.errors import UserError, first_line
from llm_rlhf.models.reading import read_causal

ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NAME = "default"


@dataclass(frozen=True)
class LoRAConfig:
    """An update of rank `rank` of every target, scaled by alpha / rank (2106.09685, section 4.1).

    targets     names of the linear layers that are adapted, such as q_proj; empty = all but the output layer
                (2305.14314, section 4)
    merged      also write each checkpoint's `merged` folder: a plain model with the adapter added to its weights

    There is no dropout: train and eval mode compute the same here.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()
    merged: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha must be positive, got {self.alpha}")


def add_lora(model: PreTrainedModel, config: LoRAConfig, *, base: str) -> None:
    """Freeze `model` and put an adapter into it, which changes nothing at first; drawn from torch's generator.

    base    the folder or hub name that `model` came from, which the adapter's folder will name

    Raises UserError if the model has no such layers.
    """
    from peft import LoraConfig

    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by the rank, so a fraction will do
        lora_dropout=0.0,
        target_modules=list(config.targets) if config.targets else "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        with _without_warnings():
            model.add_adapter(settings, NAME)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})
        raise UserError(
            f"model.lora.targets: {', '.join(config.targets)} cannot be adapted; this model's linear layers are "
            f"{', '.join(linear)}"
        ) from error
    settings.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    model.eval()


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether there is an adapter inside."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def base_of(folder: str | Path) -> str | None:
    """The model that a folder's adapter belongs to; None for a folder (or hub name) that is no adapter.

    Raises UserError for an adapter that names none.
    """
    file = Path(folder) / ADAPTER
    if not file.is_file() or (Path(folder) / "config.json").is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: not a JSON object ({error})") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{file}: base_model_name_or_path is missing, so the adapter's model is not known")
    return base


def load_adapted(folder: str | Path) -> PreTrainedModel:
    """The base model of an adapter's folder, in float32, with the adapter in it, ready to learn on.

    Raises UserError if the base model is gone or the adapter does not belong to it.
    """
    base = base_of(folder)
    assert base is not None, f"{folder} holds no adapter"
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(
            f"{folder}: its base model {base} is not there; put it back, or correct base_model_name_or_path in "
            f"{ADAPTER}"
        )
    if not (Path(folder) / WEIGHTS).is_file():
        raise UserError(f"{folder}: {WEIGHTS} is missing")
    model = read_causal(base)
    names = vars(model).get("_weight_conversions")
    try:
        with _without_warnings():
            found = model.load_adapter(str(folder), NAME, is_trainable=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: the adapter does not fit its base model {base}: {first_line(error)}") from error
    strange = sorted(found.missing_keys) or sorted(found.unexpected_keys)
    if strange:
        raise UserError(f"{folder}: the adapter does not fit its base model {base} ({strange[0]})")
    model.peft_config[NAME].base_model_name_or_path = base
    # transformers saves weights under the names that they had in the file it read last. Of the adapter's file those
    # are peft's, under which nobody would look for the weights of a merged model.
    vars(model)["_weight_conversions"] = names
    return model


def require_same(config: LoRAConfig, model: PreTrainedModel, *, path: str) -> None:
    """Raises UserError if the adapter that goes on is not the one that the configuration describes."""
    known: Any = model.peft_config[NAME]
    there = {"rank": getattr(known, "r", None), "alpha": getattr(known, "lora_alpha", None)}
    asked: dict[str, Any] = {"rank": config.rank, "alpha": config.alpha}
    if config.targets:
        there["targets"], asked["targets"] = set(known.target_modules), set(config.targets)
    for name, value in asked.items():
        if there[name] != value:
            shown, wanted = (sorted(v) if isinstance(v, set) else v for v in (there[name], value))
            raise UserError(
                f"model.lora.{name}: the adapter in {path} goes on, and it has {shown}, not {wanted}; "
                "say the same, or start from a merged model"
            )


def merge(model: PreTrainedModel) -> None:
    """Add the adapter to the weights and take it out; every weight learns then. The model computes what it did."""
    for name, module in list(model.named_modules()):
        layer: Any = module
        if hasattr(module, "unload_and_optionally_merge_module"):
            plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=[NAME])
        elif hasattr(module, "base_layer") and hasattr(module, "merge"):
            layer.merge(safe_merge=True, adapter_names=[NAME])
            plain = layer.get_base_layer()
        else:
            continue
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], plain)
    model._hf_peft_config_loaded = False
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)


def merged_writer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, asked: bool
) -> dict[str, Callable[[Path], None]]:
    """The checkpoint's `merged` folder, where it is asked for."""
    if not asked:
        return {}

    def write(folder: Path) -> None:
        whole = copy.deepcopy(model)
        merge(whole)
        whole.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))

    return {"merged": write}


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


@contextmanager
def _without_warnings() -> Iterator[None]:
    """peft warns that it transposes GPT-2's layers, which it does rightly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
