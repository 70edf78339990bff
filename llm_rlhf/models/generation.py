"""Sampling completions in batches with a key-value cache, and what becomes of them: a `Rollout`.

Prompts are left-padded, so all completions start at the same column. A prompt with several samples is run through
the model once and its cache expanded. Rows that have ended leave the batch. Randomness comes from the caller's
generator only, so a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.decoding import PlainGPT2, roomy_cache
from llm_rlhf.models.drawing import chances, draw
from llm_rlhf.models.precision import autocast, outside_autocast
from policy_core.returns import next_values_of
from policy_core.rollout import Rollout


@dataclass(frozen=True)
class GenerationConfig:
    """How completions are drawn.

    max_new_tokens  longest completion, EOS included; None takes the task's own
    temperature     logits are divided by it, in sampling and in policy gradients; texts are imitated at 1
    cut_is_end      True: a completion without EOS ends at its last token (terminated); False: it is cut there
                    and its value is bootstrapped (truncated)
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    cut_is_end: bool = True

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"generation.temperature must be positive, got {self.temperature}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"generation.max_new_tokens must be at least 1, got {self.max_new_tokens}")


@contextlib.contextmanager
def at_temperature(policy: LanguagePolicy, temperature: float) -> Iterator[None]:
    """Within it, the policy draws and judges at this temperature."""
    before, policy.temperature = policy.temperature, temperature
    try:
        yield
    finally:
        policy.temperature = before


@dataclass(frozen=True)
class Samples:
    """Completions beside their prompts; B = prompts x samples, T = prompt columns + new columns.

    input_ids, attention_mask   [B, T] int; 1 = a real token
    mask                        [B, T] bool; True where the policy drew the token, EOS included
    finished                    [B] bool; a token that ends a completion was drawn
    log_probs, values           [B, T], of the drawn tokens, 0 elsewhere; values None without a value head
    entropy                     [B, T] nats, of the distributions the tokens were drawn from
    prompt                      [B] int; which prompt each row belongs to
    final_values                [B]; of what rows that were cut would have gone on from, 0 elsewhere; None without a
                                value head or where nobody asked
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    finished: Tensor
    log_probs: Tensor
    entropy: Tensor
    values: Tensor | None
    prompt: Tensor
    final_values: Tensor | None = None

    def to(self, device: str) -> Samples:
        """The same elsewhere."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def observations(self) -> dict[str, Tensor]:
        """What `LanguagePolicy.evaluate` takes beside the tokens."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "decisions": self.mask,
        }

    def completions(self) -> list[list[int]]:
        """Token ids of each completion, its ending token included."""
        return [ids[drawn].tolist() for ids, drawn in zip(self.input_ids, self.mask, strict=True)]


def left_pad(prompts: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Token lists -> input_ids and attention_mask, [B, P] int, the last token of every row in the last column.

    Raises ValueError for an empty prompt: there would be nothing to predict the first token from.
    """
    width = max((len(prompt) for prompt in prompts), default=0)
    if min((len(prompt) for prompt in prompts), default=0) == 0:
        raise ValueError("a prompt has no tokens; begin it with the tokenizer's bos token")
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def generate(
    policy: LanguagePolicy,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    ends: Collection[int],
    pad: int,
    generator: torch.Generator | None,
    bootstrap: bool = False,
) -> Samples:
    """Draw `samples_per_prompt` completions of each prompt; a prompt's rows are neighbours.

    ends        tokens that end a completion (`tokenizer.end_ids`)
    generator   source of all randomness; None decodes greedily
    bootstrap   compute final_values

    Raises ValueError if prompt and completion would not fit the model's context.
    """
    prompt_ids, prompt_mask = left_pad(prompts, pad=pad)
    start = prompt_ids.shape[1]
    if start + max_new_tokens > policy.context:
        raise ValueError(
            f"a prompt of {start} tokens and {max_new_tokens} new ones do not fit the model's context of "
            f"{policy.context}; lower max_new_tokens or build the model with a longer context"
        )
    with torch.no_grad(), autocast(policy, policy.precision, keep_casts=True):
        return _decode(
            policy,
            prompt_ids.to(policy.device),
            prompt_mask.to(policy.device),
            samples_per_prompt=samples_per_prompt,
            max_new_tokens=max_new_tokens,
            ends=torch.tensor(sorted(ends), device=policy.device),
            pad=pad,
            generator=generator,
            bootstrap=bootstrap,
        ).to("cpu")


class _Front:
    """The rows that are still being written, and what the model says of their next tokens.

    alive               [A] int; which of all rows these are
    logits, hidden      [A, V], [A, D]; behind their last token
    """

    def __init__(
        self, policy: LanguagePolicy, prompt_ids: Tensor, prompt_mask: Tensor, *, samples_per_prompt: int, room: int
    ) -> None:
        """Run the prompts [P, T] through the model, each once, and go on with `samples_per_prompt` rows of each.

        room    new tokens that the cache should have place for
        """
        self.policy = policy
        cache = roomy_cache(policy.model.config, prompt_ids.shape[1] + room)
        self.plain = None if cache is None else PlainGPT2.of(policy.model, policy.precision)
        logits, hidden, self.cache = policy.step(prompt_ids, prompt_mask, cache=cache, use_cache=True, keep=1)
        if samples_per_prompt > 1:
            self.cache.batch_repeat_interleave(samples_per_prompt)
        self.logits, self.hidden, self.mask = (
            tensor.repeat_interleave(samples_per_prompt, dim=0)
            for tensor in (logits[:, -1], hidden[:, -1], prompt_mask)
        )
        self.alive = torch.arange(len(self.mask), device=prompt_ids.device)

    def values(self) -> Tensor:
        """[A]; by the policy's value head."""
        assert self.policy.value_head is not None
        return self.policy.value_head(self.hidden).squeeze(-1)

    def go_on(self, token: Tensor, kept: Tensor) -> None:
        """Drop the rows that are not `kept` [A] bool, and run each other's `token` [A] through the model."""
        if not bool(kept.all()):
            rows = kept.nonzero().squeeze(1)
            self.cache.batch_select_indices(rows)
            self.alive, token, self.mask = self.alive[rows], token[rows], self.mask[rows]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        if self.plain is not None:
            logits, hidden = self.plain.step(token, self.mask, self.cache)
        else:
            logits, hidden, self.cache = self.policy.step(
                token.unsqueeze(1), self.mask, cache=self.cache, use_cache=True, keep=1
            )
        self.logits, self.hidden = logits[:, -1], hidden[:, -1]


def _decode(
    policy: LanguagePolicy,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    ends: Tensor,
    pad: int,
    generator: torch.Generator | None,
    bootstrap: bool,
) -> Samples:
    """`generate` for prompts [P, T] as tokens; ends [E] int."""
    device = prompt_ids.device
    rows = len(prompt_ids) * samples_per_prompt
    front = _Front(policy, prompt_ids, prompt_mask, samples_per_prompt=samples_per_prompt, room=max_new_tokens)
    new_ids = torch.full((rows, max_new_tokens), pad, device=device)
    drawn = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
    log_probs = torch.zeros(rows, max_new_tokens, device=device)
    entropy = torch.zeros(rows, max_new_tokens, device=device)
    has_values = policy.value_head is not None
    values = torch.zeros(rows, max_new_tokens, device=device) if has_values else None
    final_values = torch.zeros(rows, device=device) if has_values and bootstrap else None
    finished = torch.zeros(rows, dtype=torch.bool, device=device)

    for column in range(max_new_tokens):
        alive = front.alive
        with outside_autocast(device):  # heads are float32's, as in `LanguagePolicy.evaluate`
            offered = policy.decoding_logits(front.logits, front.hidden)
            if values is not None:
                values[alive, column] = front.values()
        chance = None if generator is None else chances(len(alive), generator)
        token, log_probs[alive, column], entropy[alive, column] = draw(offered, chance)
        new_ids[alive, column] = token
        drawn[alive, column] = True
        ended = (token.unsqueeze(1) == ends).any(1)
        finished[alive[ended]] = True
        if bool(ended.all()):
            break
        if column < max_new_tokens - 1:
            front.go_on(token, ~ended)
        elif final_values is not None:  # of what the rows that are cut here would have gone on from
            front.go_on(token, ~ended)
            with outside_autocast(device):
                final_values[front.alive] = front.values()

    def beside_prompt(columns: Tensor) -> Tensor:
        return torch.cat([columns.new_zeros(rows, prompt_ids.shape[1]), columns], dim=1)

    per_sample = [tensor.repeat_interleave(samples_per_prompt, dim=0) for tensor in (prompt_ids, prompt_mask)]
    return Samples(
        input_ids=torch.cat([per_sample[0], new_ids], dim=1),
        attention_mask=torch.cat([per_sample[1], drawn.long()], dim=1),
        mask=beside_prompt(drawn),
        finished=finished,
        log_probs=beside_prompt(log_probs),
        entropy=beside_prompt(entropy),
        values=None if values is None else beside_prompt(values),
        prompt=torch.arange(len(prompt_ids), device=device).repeat_interleave(samples_per_prompt),
        final_values=final_values,
    )


def to_rollout(
    samples: Samples,
    rewards: Tensor,
    *,
    scored: Tensor,
    token_rewards: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    cut_is_end: bool = True,
    gamma: float = 1.0,
) -> Rollout:
    """Completions, or episodes of several turns, with their rewards as decisions of a policy.

    rewards         [B], given at the last token that the policy drew
    scored          [B] bool; a row without a reward is masked out whole
    token_rewards   [B, T] given beside it, at tokens that the policy drew; not to rows without a reward
    cut_is_end      see GenerationConfig

    Raises ValueError if a row is cut, has values, and nobody asked for `final_values`.
    """
    mask = samples.mask & scored.unsqueeze(1)
    last = _is_last(mask)
    per_token = torch.where(last, rewards.unsqueeze(1), 0.0)
    if token_rewards is not None:
        per_token = per_token + torch.where(mask, token_rewards, 0.0)
    ends = last & (samples.finished | cut_is_end).unsqueeze(1)
    episode = torch.where(samples.attention_mask.bool(), 0, -1)
    next_values = None
    if samples.values is not None:
        final = samples.final_values
        next_values = next_values_of(
            values=samples.values,
            mask=mask,
            episode=episode,
            terminated=ends,
            final_values=None if final is None else final.unsqueeze(1).expand_as(samples.values),
        )
    return Rollout(
        observations=samples.observations(),
        actions=samples.input_ids,
        rewards=per_token,
        terminated=ends,
        truncated=last & ~ends,
        mask=mask,
        discount=torch.full_like(per_token, gamma),
        old_log_probs=samples.log_probs,
        episode=episode,
        ref_log_probs=ref_log_probs,
        values=samples.values,
        next_values=next_values,
        group=samples.prompt.unsqueeze(1).expand_as(samples.input_ids),
    )


def _is_last(mask: Tensor) -> Tensor:
    """[B, T] bool -> [B, T] bool: the last True of each row."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)
