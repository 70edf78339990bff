"""Parts of a pretrained trunk: which layers a reward model keeps and learns, how many positions it has."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from experiment.errors import UserError


def layers_of(trunk: PreTrainedModel, *, wanted: int, setting: str) -> nn.ModuleList:
    """A trunk's layers, the lowest first.

    Raises UserError naming `setting` where there are fewer than `wanted`, or they share their weights.
    """
    count = int(trunk.config.get_text_config().num_hidden_layers)
    lists = (part for part in trunk.modules() if isinstance(part, nn.ModuleList))
    stack = next((part for part in lists if len(part) == count), None)
    if stack is None or wanted > count:
        has = f"{count} layers" if stack is not None else "layers that are not told apart"
        raise UserError(f"{setting}: {wanted} of a {type(trunk).__name__} with {has}")
    return stack


def shorten(trunk: PreTrainedModel, layers: int) -> None:
    """Keep the embeddings, the `layers` lowest layers and what stands behind the layers.

    The middle of a pretrained model says more about a text than its end, which serves what it was trained for
    (Tenney 2019, 1905.05950). Raises UserError where there are fewer.
    """
    stack = layers_of(trunk, wanted=layers, setting="reward.layers")
    del stack[layers:]
    config = trunk.config.get_text_config()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:  # of models whose layers are of several kinds
        config.layer_types = config.layer_types[:layers]


def lowest(trunk: PreTrainedModel, count: int) -> list[nn.Parameter]:
    """The parameters of a trunk's embeddings and of its `count` lowest layers; none for 0.

    Raises UserError where the trunk has fewer layers.
    """
    if count == 0:
        return []
    stack = layers_of(trunk, wanted=count, setting="reward.frozen_layers")
    inside, above = ({id(parameter) for parameter in part.parameters()} for part in (stack, stack[count:]))
    every = list(trunk.parameters())
    end = max(place for place, parameter in enumerate(every) if id(parameter) in inside)
    return [parameter for parameter in every[: end + 1] if id(parameter) not in above]


def positions_of(trunk: PreTrainedModel) -> int:
    """Tokens that its positions suffice for. RoBERTa and its kin count positions from behind the padding's id."""
    positions = int(getattr(trunk.config, "max_position_embeddings", 2**31))
    embedding = getattr(getattr(trunk, "embeddings", None), "position_embeddings", None)
    padding = getattr(embedding, "padding_idx", None)
    return positions if padding is None else positions - padding - 1
