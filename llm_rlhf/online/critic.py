"""Where PPO's values come from: a head on the policy's own trunk, or a model of its own.

A separate value model reads a rollout in one scoring pass after the tokens were drawn, so nothing but the policy
runs while they are. The policy core sees values only: `ActorCritic` is a policy whose `evaluate` has both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiment.errors import UserError
from llm_rlhf.models.causal import VALUE_HEAD, LanguagePolicy, column_range, leading_padding, position_ids
from llm_rlhf.models.loading import load_language_model, model_folder, quietly, without_dropout
from llm_rlhf.models.lora import base_of, merge
from llm_rlhf.models.precision import Precision, autocast, widened
from llm_rlhf.rewards.reward_model import (
    RewardModel,
    combine,
    find_folder,
    load_reward_tokenizer,
    load_trunk,
    probe,
)
from policy_core.policy import Evaluation
from policy_core.returns import next_values_of
from policy_core.rollout import Nested, Rollout

FOLDER = "critic"
"""The sub-folder of a checkpoint that holds a separate value model."""


@dataclass(frozen=True)
class CriticConfig:
    """Which value model.

    model           "shared": a linear head on the policy's last hidden state; "separate": a model of its own, which
                    lies in a checkpoint's `critic` folder
    init            what a separate one starts from: a language model's folder or run (its trunk, with a head that
                    is 0 everywhere), or a reward model's (its trunk, and the weighted mean of its heads as one: the
                    first values are its scores of unfinished texts, in its units); null = model.path
    learning_rate   of a separate one, on ppo's schedule; null = ppo.learning_rate
    """

    model: Literal["shared", "separate"] = "shared"
    init: str | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("init", "learning_rate"):
            if self.model == "shared" and getattr(self, name) is not None:
                raise ValueError(f"critic.{name} is of a value model of its own: set critic.model to separate")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"critic.learning_rate must be positive, got {self.learning_rate}")


class ValueModel(nn.Module):
    """A causal trunk with a linear head that says how good the text so far is. The head begins at 0."""

    def __init__(self, trunk: PreTrainedModel) -> None:
        """Raises UserError for a trunk in which a token's state depends on what comes after it."""
        super().__init__()
        without_dropout(trunk)
        self.trunk = trunk.eval()
        width, sees_all = probe(trunk)
        if sees_all:
            raise UserError("critic.init: a model that sees the whole text cannot judge unfinished ones")
        self.precision: Precision = "float32"
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def context(self) -> int:
        """The longest text in tokens."""
        return int(getattr(self.trunk.config, "max_position_embeddings", 2**31))

    def after(self, observations: Nested) -> Tensor:
        """The value of the text up to and with each token, [B, T]; 0 in columns that no decision needs.

        observations    as `LanguagePolicy.evaluate` takes them, on any device; the values are on theirs
        """
        assert isinstance(observations, Mapping), "observations must be named tensors"
        ids, mask = observations["input_ids"], observations["attention_mask"]
        home = ids.device
        first, last = column_range(observations.get("decisions"), ids.shape[1])
        if last <= first:
            return torch.zeros(ids.shape, device=home)
        lead = leading_padding(mask, limit=first - 1)
        ids, mask = (tensor[:, lead:last].to(self.trunk.device) for tensor in (ids, mask))
        padded = not bool(mask[:, 0].all())  # on the right nothing that counts comes after it
        with autocast(self, self.precision):
            states = self.trunk(
                input_ids=ids,
                attention_mask=mask if padded else torch.ones_like(mask),
                position_ids=position_ids(mask) if padded else None,
                use_cache=False,
            ).last_hidden_state[:, first - 1 - lead :]
        right = observations["input_ids"].shape[1] - last
        return nn.functional.pad(self.head(widened(states)).squeeze(-1), (first - 1, right)).to(home)

    def values(self, observations: Nested) -> Tensor:
        """The value of what each token was decided on, [B, T]: that of the text before it; 0 in column 0."""
        return _before(self.after(observations))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trunk as a plain transformers folder, and the head beside it."""
        with quietly():
            self.trunk.save_pretrained(str(folder))
        state = {name: tensor.detach().contiguous() for name, tensor in self.head.state_dict().items()}
        save_file(state, str(Path(folder) / VALUE_HEAD))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ValueModel:
        """Load what `save_pretrained` wrote."""
        model = cls(load_trunk(folder))
        model.head.load_state_dict(load_file(str(Path(folder) / VALUE_HEAD)))
        return model


class ActorCritic(nn.Module):
    """A language policy and a value model as one policy of the core."""

    def __init__(self, policy: LanguagePolicy, critic: ValueModel) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def evaluate(self, observations: Nested, actions: Nested) -> Evaluation:
        """The policy's view of the tokens, with the value model's values."""
        return replace(self.policy.evaluate(observations, actions), values=self.critic.values(observations))

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """All of the value model's."""
        return self.critic.parameters()


def build_critic(
    config: CriticConfig, *, model_path: str, tokenizer: PreTrainedTokenizerBase, longest: int
) -> ValueModel:
    """A separate value model at a run's start.

    model_path      the policy's start, from which the value model starts where critic.init is null
    tokenizer       the policy's
    longest         tokens of the longest prompt and completion

    Tells in a line what the head starts as. Raises UserError for a folder that holds no causal model, another
    tokenizer's, or too short a context.
    """
    path = config.init or model_path
    known = find_folder(path)
    try:
        model, start = _of_reward_model(RewardModel.from_pretrained(known)) if known else _new(path)
    except UserError as error:
        if config.init is None:
            raise
        raise UserError(str(error).replace("model.path", "critic.init", 1)) from error
    if known is not None and load_reward_tokenizer(known).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"critic.init: {path} reads another tokenizer's tokens than the policy; train the reward model from "
            "the policy's own start, or leave critic.init out"
        )
    if model.context < longest:
        raise UserError(
            f"critic.init: {path} reads at most {model.context} tokens; a prompt and its completion have {longest}"
        )
    print(f"critic: from {path}; its head starts as {start}", flush=True)
    return model


def _new(path: str) -> tuple[ValueModel, str]:
    """On a language model's trunk, and what its head starts as."""
    return ValueModel(_trunk_of(path)), "0 everywhere"


def _trunk_of(path: str) -> PreTrainedModel:
    """A language model's trunk, all of whose weights learn: an adapter is merged into them."""
    if base_of(model_folder(path)) is None:
        return load_trunk(path)
    model = load_language_model(path)
    merge(model)
    return cast(PreTrainedModel, model.base_model)


@torch.no_grad()
def _of_reward_model(known: RewardModel) -> tuple[ValueModel, str]:
    """A reward model's trunk with the mean of its heads as one head, and in words what that starts as.

    Objectives are weighed and scores centred as its own score is, so after a text's last token the value is that
    score for the ensemble "mean". The ensembles "min" and "lower" are not linear in the trunk's states, nor is the
    length penalty of them: the mean stands for those, without a penalty. The head is 0 everywhere where the reward
    model's heads read other states than the last token's.
    """
    model = ValueModel(known.trunk)
    if known.pooling != "last":
        return model, f"0 everywhere: the reward model reads the mean of its states (pooling {known.pooling!r})"
    scoring = replace(known.scoring, ensemble="mean", length_penalty=0.0)

    def mean(heads: Tensor) -> Tensor:  # [N, K * M] -> [N]
        scores = heads.unflatten(1, tuple(known.offset.shape))
        return combine(scores, torch.zeros(len(heads)), objectives=known.objectives, config=scoring)[0]

    model.head.weight.copy_(mean(known.heads.weight.T).unsqueeze(0))
    model.head.bias.copy_(mean((known.heads.bias - known.offset.flatten()).unsqueeze(0)))
    heads = f"the mean of the reward model's {known.ensemble} heads" if known.ensemble > 1 else "the reward model's"
    if known.ensemble > 1 and known.scoring.ensemble != "mean":
        return model, f"{heads}; its scores are their {known.scoring.ensemble!r}, which no one head can be"
    less = " without the length penalty" if known.scoring.length_penalty > 0 else ""
    return model, f"{heads}, so the first values are its scores of unfinished texts{less}"


@torch.no_grad()
def with_values(rollout: Rollout, critic: ValueModel) -> Rollout:
    """The rollout with the value model's values; a completion that was cut bootstraps from its whole text's."""
    after = critic.after(rollout.observations)
    values = torch.where(rollout.mask, _before(after), 0.0)
    next_values = next_values_of(
        values=values,
        mask=rollout.mask,
        episode=rollout.episode,
        terminated=rollout.terminated,
        final_values=after,
    )
    return replace(rollout, values=values, next_values=next_values)


def _before(after: Tensor) -> Tensor:
    """[B, T] after each token -> before it."""
    return torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], dim=1)
