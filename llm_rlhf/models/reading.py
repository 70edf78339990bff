"""Reading a causal language model from a folder or a hub, whole or not at all."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from experiment.errors import UserError

MALFORMED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises of folders that hold nothing, something else, or settings that contradict each other."""


def read_causal(source: str) -> PreTrainedModel:
    """The model of a transformers folder or hub name in float32.

    Raises UserError where weights are missing, which transformers would draw at random, and what transformers
    raises where there is no model.
    """
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would print a table of what is missing; one line says it below
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    finally:
        transformers.logging.set_verbosity(level)
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model.path: {source} lacks {len(missing)} of its model's weights, such as {missing[0]}; "
            "they would be random"
        )
    _require_causal(model, source)
    if getattr(model, "_hf_peft_config_loaded", False):  # an adapter in the model's own folder: see load_adapted
        vars(model).pop("_weight_conversions", None)
    return model


@torch.no_grad()
def _require_causal(model: PreTrainedModel, source: str) -> None:
    """Raise UserError where what a token's logits are depends on what comes after it (BERT's, say)."""
    tokens = torch.tensor([[0, 0], [0, 1]])
    first = model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, 0]
    if not torch.allclose(first[0], first[1], atol=1e-4):
        raise UserError(
            f"model.path: {source} is no causal language model: what it says of a token depends on later ones"
        )
