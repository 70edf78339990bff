"""Causal language models as policies: one token is one decision.

Column convention of a rollout: column t is the decision that produced token t, so its log-probability comes from
the logits at t - 1 and its value from the hidden state at t - 1. Column 0 has neither and reads 0.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from experiment.device import find_device
from experiment.errors import UserError
from llm_rlhf.models.loading import ModelConfig, load_language_model, model_folder, new_language_model, quietly
from llm_rlhf.models.lora import add_lora, base_of, is_adapted, merge, require_same
from llm_rlhf.models.precision import Precision, autocast, widened
from llm_rlhf.models.tokenizer import character_tokenizer, load_tokenizer, require_known_tokens
from policy_core.policy import Evaluation
from policy_core.rollout import Nested

VALUE_HEAD = "value_head.safetensors"


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that ignore left padding; [B, T] -> [B, T]."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Columns:
    """What a model says of the tokens in columns `first` to `last` - 1 of a batch, from what stands before them.

    logits [B, last - first, V], not divided by the temperature; hidden [B, last - first, D]
    """

    first: int
    last: int
    logits: Tensor
    hidden: Tensor


Steering = Callable[[Tensor, Tensor], Tensor]
"""Logits [..., V] and hidden states [..., D] -> the logits that tokens are drawn from."""


class LanguagePolicy(nn.Module):
    """A causal language model with a temperature and, for PPO, a value head on its last hidden state.

    `steering`, where it is set, moves the logits that tokens are drawn from and judged by; it is not saved.
    `precision`: of the model's matrix products, in sampling and in judging; logits and values come in float32.
    `write_merged`: checkpoints are to hold the model with its adapter merged into the weights, too.

    The value head starts at zero, so that the first advantages are the rewards themselves.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float = 1.0, value_head: bool = False) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.model = model
        self.temperature = temperature
        self.value_head: nn.Linear | None = None
        self.steering: Steering | None = None
        self.precision: Precision = "float32"
        if value_head:
            self.value_head = nn.Linear(hidden_width(model), 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.gradient_checkpointing = False
        self.write_merged = False
        self._head_is_linear = _head_is_linear(model)

    def checkpoint_gradients(self) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again there.

        Raises UserError if transformers cannot do that with this model.
        """
        if not self.model.supports_gradient_checkpointing:
            raise UserError(f"model.gradient_checkpointing: {type(self.model).__name__} does not support it")
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.model.eval()
        self.gradient_checkpointing = True

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Around a forward pass without a cache: transformers checkpoints gradients in training mode only, in which
        no layer would use a cache, as generation does."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            yield
            return
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    @property
    def device(self) -> torch.device:
        """Where it computes. Tokens are brought there and numbers of single tokens back, by whatever takes both."""
        return self.model.device

    @property
    def context(self) -> int:
        """The longest text in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 2**31))

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """The value head's; the trunk that it shares belongs to the policy too, so a warm-up leaves it alone."""
        return iter(()) if self.value_head is None else self.value_head.parameters()

    def forward(self, observations: Nested, actions: Nested) -> Evaluation:
        """`evaluate`, under the name by which distributed wrappers call a module."""
        return self.evaluate(observations, actions)

    def decoding_logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """What tokens are drawn from: the model's logits [..., V], steered where it is, over the temperature."""
        return self.tempered(logits if self.steering is None else self.steering(logits, hidden))

    def tempered(self, logits: Tensor) -> Tensor:
        """Logits [..., V] over the temperature, as they are at 1: a copy of the vocabulary is not for nothing."""
        return logits if self.temperature == 1.0 else logits / self.temperature

    def columns(self, observations: Nested) -> Columns | None:
        """Logits and hidden states of the columns that hold decisions; None where there is no decision.

        observations    as `evaluate` takes them, on any device; what is returned is on the model's
        """
        assert isinstance(observations, Mapping), "observations must be named tensors"
        input_ids, attention_mask = observations["input_ids"], observations["attention_mask"]
        first, last = column_range(observations.get("decisions"), input_ids.shape[1])
        if last <= first:
            return None
        lead = leading_padding(attention_mask, limit=first - 1)
        input_ids, attention_mask = (
            tensor[:, lead : last - 1].to(self.device) for tensor in (input_ids, attention_mask)
        )
        logits, hidden = self._outputs(input_ids, attention_mask, prefix=first - lead)
        return Columns(first, last, logits, hidden)

    def evaluate(self, observations: Nested, actions: Nested) -> Evaluation:
        """Judge tokens that are there.

        observations    input_ids, attention_mask [B, T] (1 = a real token) and, optionally, decisions [B, T] bool:
                        only columns from the first decision of the batch to the last are computed
        actions         [B, T] int, the tokens

        Returns log_probs [B, T] of the tokens, entropy [B, T] in nats and values [B, T] (None without a value
        head), on the actions' device; columns that were not computed are 0. Logits are divided by the temperature.
        """
        assert isinstance(actions, Tensor)
        columns = self.columns(observations)
        if columns is None:
            zeros = torch.zeros(actions.shape, device=actions.device)
            return Evaluation(zeros, zeros, None if self.value_head is None else zeros)
        log_probs, log_softmax = self._judged(columns, actions)
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        values = None if self.value_head is None else self.value_head(columns.hidden).squeeze(-1)
        padding = (columns.first, actions.shape[1] - columns.last)

        def widen(columns: Tensor) -> Tensor:
            return nn.functional.pad(columns.to(actions.device), padding)

        return Evaluation(widen(log_probs), widen(entropy), None if values is None else widen(values))

    def log_probs(self, observations: Nested, actions: Tensor) -> Tensor:
        """`evaluate`'s log_probs alone, for a reference that nothing else is asked of."""
        columns = self.columns(observations)
        if columns is None:
            return torch.zeros(actions.shape, device=actions.device)
        log_probs, _ = self._judged(columns, actions)
        return nn.functional.pad(log_probs.to(actions.device), (columns.first, actions.shape[1] - columns.last))

    def _judged(self, columns: Columns, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs [B, N] of the tokens in these columns, and of the whole vocabulary [B, N, V]."""
        logits = self.decoding_logits(columns.logits, columns.hidden)
        log_softmax = torch.log_softmax(logits, dim=-1)
        taken = actions[:, columns.first : columns.last].unsqueeze(-1).to(self.device)
        return log_softmax.gather(-1, taken).squeeze(-1), log_softmax

    def packed_log_probs(self, input_ids: Tensor, position_ids: Tensor, decisions: Tensor) -> Tensor:
        """Log-probs [B, T] of the decisions, 0 elsewhere, where a row holds several texts one after another.

        position_ids    [B, T] int; every text begins at 0, by which transformers keeps them apart in attention
        decisions       [B, T] bool; never a text's first token

        All on any device, and the result on theirs.
        """
        home = decisions.device
        input_ids, position_ids, decisions = (t.to(self.device) for t in (input_ids, position_ids, decisions))
        arguments = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        before = decisions.roll(-1, dims=1)
        with self.learning(), autocast(self, self.precision):
            if self._head_is_linear:
                logits = self.model.get_output_embeddings()(self.model.base_model(**arguments)[0][before])
            else:
                logits = self.model(**arguments).logits[before]
        log_softmax = torch.log_softmax(self.tempered(widened(logits)), dim=-1)
        taken = log_softmax.gather(-1, input_ids[decisions].unsqueeze(-1)).squeeze(-1)
        return taken.new_zeros(decisions.shape).masked_scatter(decisions, taken).to(home)

    def _outputs(self, input_ids: Tensor, attention_mask: Tensor, *, prefix: int) -> tuple[Tensor, Tensor]:
        """Logits [B, T - prefix + 1, V] and hidden states of the columns from prefix - 1 on.

        Where rows share their first `prefix` tokens (a prompt's samples), those are computed once, and their keys
        and values are handed to every row: with 8 samples a prompt this halves the work of an update.
        """
        rows, width = input_ids.shape
        keep = width - prefix + 1
        if self.gradient_checkpointing and torch.is_grad_enabled():
            with self.learning():
                logits, hidden, _ = self.step(input_ids, attention_mask, keep=keep)
            return logits, hidden
        start = torch.where(attention_mask[:, :prefix].bool(), input_ids[:, :prefix], -1)
        unique, inverse = torch.unique(start, dim=0, return_inverse=True)
        if keep == 1 or 2 * len(unique) > rows:
            logits, hidden, _ = self.step(input_ids, attention_mask, keep=keep)
            return logits, hidden
        known = unique.ge(0)
        last_logits, last_hidden, cache = self.step(unique.clamp(min=0), known.long(), use_cache=True, keep=1)
        if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):  # a state that is no keys and values
            logits, hidden, _ = self.step(input_ids, attention_mask, keep=keep)
            return logits, hidden
        for layer in cache.layers:  # index_select: its backward is much cheaper than that of indexing
            layer.keys = layer.keys.index_select(0, inverse)
            layer.values = layer.values.index_select(0, inverse)
        logits, hidden, _ = self.step(
            input_ids[:, prefix:], attention_mask, cache=cache, use_cache=True, keep=keep - 1
        )
        return (
            torch.cat([last_logits.index_select(0, inverse), logits], dim=1),
            torch.cat([last_hidden.index_select(0, inverse), hidden], dim=1),
        )

    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        cache: Any = None,
        use_cache: bool = False,
        keep: int = 1,
    ) -> tuple[Tensor, Tensor, Any]:
        """One forward pass over new tokens.

        input_ids       [B, N], the tokens that are new
        attention_mask  [B, past + N], over what is cached and what is new
        keep            how many of the last columns to compute logits for

        Returns logits [B, keep, V] (not divided by the temperature) and hidden states [B, keep, D], both in float32
        whatever the precision, and the cache. Padding on the right needs no mask: nothing that counts comes after
        it, and attention is causal.
        """
        new = input_ids.shape[1]
        padded = not bool(attention_mask[:, 0].all())
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask if padded else torch.ones_like(attention_mask),
            "position_ids": position_ids(attention_mask)[:, -new:] if padded else None,
            "past_key_values": cache,
            "use_cache": use_cache,
        }
        with autocast(self, self.precision):
            if self._head_is_linear:
                output = self.model.base_model(**arguments)
                hidden = output.last_hidden_state[:, -keep:]
                logits = self.model.get_output_embeddings()(hidden)
            else:
                output = self.model(**arguments, output_hidden_states=True, logits_to_keep=keep)
                logits, hidden = output.logits, output.hidden_states[-1][:, -keep:]
        return widened(logits), widened(hidden), output.past_key_values

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain transformers folder (of a model with an adapter: peft's), and the value head beside it."""
        with quietly():
            self.model.save_pretrained(str(folder))
        if self.value_head is not None:
            state = {name: tensor.detach().contiguous() for name, tensor in self.value_head.state_dict().items()}
            save_file(state, str(Path(folder) / VALUE_HEAD))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, temperature: float = 1.0, value_head: bool = False
    ) -> LanguagePolicy:
        """Load what `save_pretrained` (or transformers) wrote; a value head that was not saved starts at zero."""
        policy = cls(load_language_model(path), temperature=temperature, value_head=value_head)
        saved = Path(model_folder(path)) / VALUE_HEAD
        if policy.value_head is not None and saved.is_file():
            policy.value_head.load_state_dict(load_file(str(saved)))
        return policy


def frozen_copy(policy: LanguagePolicy) -> LanguagePolicy:
    """A reference that never changes, without a value head."""
    reference = LanguagePolicy(copy.deepcopy(policy.model), temperature=policy.temperature)
    reference.precision = policy.precision
    return reference.requires_grad_(False).eval()


def build_policy(
    config: ModelConfig, *, alphabet: str, temperature: float = 1.0, value_head: bool = False
) -> tuple[LanguagePolicy, PreTrainedTokenizerBase]:
    """A recipe's policy on its device, and its tokenizer: loaded from `config.path`, or new over `alphabet`."""
    if config.path is None:
        tokenizer: PreTrainedTokenizerBase = character_tokenizer(alphabet)
        model = new_language_model(config, tokenizer)
        policy = LanguagePolicy(model, temperature=temperature, value_head=value_head)
    else:
        folder = model_folder(config.path)
        tokenizer = tokenizer_of(folder)
        policy = LanguagePolicy.from_pretrained(config.path, temperature=temperature, value_head=value_head)
        require_known_tokens(tokenizer, policy.model, path=config.path)
        if is_adapted(policy.model):
            if config.lora is None:
                merge(policy.model)
            else:
                require_same(config.lora, policy.model, path=folder)
        elif config.lora is not None:
            add_lora(policy.model, config.lora, base=folder)
    policy.to(find_device(config.device, setting="model.device"))
    if config.gradient_checkpointing:
        policy.checkpoint_gradients()
    policy.write_merged = config.lora is not None and config.lora.merged
    return policy, tokenizer


def tokenizer_of(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder or hub name; of an adapter without one, its base model's."""
    base = base_of(folder)
    own = base is None or (Path(folder) / "tokenizer_config.json").is_file()
    return load_tokenizer(folder if own else str(base))


def hidden_width(model: PreTrainedModel) -> int:
    """Size of the last hidden state."""
    weight = (model.get_output_embeddings() or model.get_input_embeddings()).weight
    assert isinstance(weight, Tensor)
    return weight.shape[-1]


@torch.no_grad()
def _head_is_linear(model: PreTrainedModel) -> bool:
    """Whether the logits are the output embedding of the last hidden state, with no cap or scale after it.

    Then only the columns that are asked for go through the head, and the hidden states come for nothing.
    """
    head = model.get_output_embeddings()
    if head is None:
        return False
    probe = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    mask = torch.ones_like(probe)
    hidden = model.base_model(input_ids=probe, attention_mask=mask).last_hidden_state
    logits = model(input_ids=probe, attention_mask=mask).logits
    return bool(torch.allclose(head(hidden), logits, atol=1e-5))


def column_range(decisions: Tensor | None, width: int) -> tuple[int, int]:
    """First decision column and one past the last, over the whole batch."""
    if decisions is None:
        return 1, width
    columns = decisions.any(0).nonzero()
    if columns.numel() == 0:
        return 1, 1
    return max(int(columns[0]), 1), int(columns[-1]) + 1


def leading_padding(attention_mask: Tensor, *, limit: int) -> int:
    """How many first columns are padding in every row, at most `limit`."""
    columns = attention_mask.any(0).nonzero()
    return min(int(columns[0]) if columns.numel() else 0, limit)
