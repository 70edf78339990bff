"""Which language model: its configuration, a new one, or one that is loaded from a transformers folder or a hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import transformers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from experiment.errors import UserError, first_line
from llm_rlhf.models.lora import ADAPTER, LoRAConfig, base_of, load_adapted
from llm_rlhf.models.reading import MALFORMED, read_causal


@dataclass(frozen=True)
class ModelConfig:
    """Which causal language model.

    path        a transformers folder, a run folder (its last checkpoint) or a hub name; None builds a new GPT-2
    layers, width, heads, context    of a new model; context is the longest text in tokens
    activation  of a new model; relu was faster and better on the calculator, gelu_pytorch_tanh is GPT-2's
    lora        learn a low-rank adapter, not the weights; one that `path` already has goes on, and without this
                section it is merged into the weights
    gradient_checkpointing  compute activations twice instead of keeping them: less memory, about a third more work
    device      where it computes: "auto" (a CUDA card if there is one), "cpu", "cuda", "cuda:1"
    """

    path: str | None = None
    layers: int = 2
    width: int = 64
    heads: int = 4
    context: int = 64
    activation: Literal["relu", "gelu_pytorch_tanh"] = "relu"
    lora: LoRAConfig | None = None
    gradient_checkpointing: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.lora is not None and self.path is None:
            raise ValueError("model.lora: an adapter needs a trained model to adapt; name one in model.path")
        if min(self.layers, self.width, self.heads, self.context) < 1:
            raise ValueError("model: layers, width, heads and context must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} must be a multiple of model.heads {self.heads}")


def new_language_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """A small GPT-2 without dropout, initialised from torch's global generator."""
    settings = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=config.context,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        activation_function=config.activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(settings)


def model_folder(path: str | Path) -> str:
    """The transformers folder (or hub name) that `path` means; a run folder means its last checkpoint.

    Raises UserError for a folder without a model, or a path that looks local and does not exist.
    """
    folder = Path(path)
    if not folder.exists():
        if len(folder.parts) == 2 and folder.parts[0] not in (".", "..", "runs", "/"):
            return str(path)  # OWNER/NAME: a hub name
        raise UserError(f"model.path: {path} does not exist; train it first, or give a folder or a hub name")
    for inner in (folder, folder / "policy", folder / "checkpoints" / "last" / "policy"):
        if (inner / "config.json").is_file() or (inner / ADAPTER).is_file():
            return str(inner)
    raise UserError(
        f"model.path: {path} holds no config.json, so it is no transformers model; "
        "give a folder written by save_pretrained or by a run"
    )


def load_language_model(path: str | Path) -> PreTrainedModel:
    """Any transformers causal language model in float32, dropout off.

    Raises UserError if it cannot be read, or weights are missing in it.

    A folder with an adapter (peft) gives its base model with the adapter beside the weights, not merged into them.
    """
    source = model_folder(path)
    try:
        with quietly():
            model: PreTrainedModel
            if base_of(source) is None:
                model = read_causal(source)
            else:
                model = load_adapted(source)
    except MALFORMED as error:
        raise UserError(
            f"model.path: {path} could not be loaded as a causal language model: {first_line(error)}"
        ) from error
    without_dropout(model)
    for parameter in model.parameters():
        # Loaded tensors may lie unaligned in a mapped file; kernels then may round otherwise than in the run that
        # saved them, and a resumed run would not be the same to the last bit.
        parameter.data = parameter.data.clone()
    return model


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bar, which would write over a run's own."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()


def without_dropout(model: nn.Module) -> None:
    """Switch off every dropout, so that train and eval mode compute the same; configurations say 0 from then on.

    A probability is a module's or its configuration's float with "drop" in its name (attn_pdrop, hidden_dropout,
    layerdrop), or p of a dropout layer; so is the noise on a router's input (jitter).
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if isinstance(value, float) and ("drop" in name or "jitter" in name):
                    setattr(holder, name, 0.0)
