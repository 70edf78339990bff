"""Sampling completions in batches with a key-value cache, and what becomes of them: a `Rollout`.

Prompts are left-padded, so all completions start at the same column. A prompt with several samples is run through
the model once and its cache expanded. Rows that have ended leave the batch. Randomness comes from the caller's
generator only, so a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from experiment.errors import UserError
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.decoding import PlainGPT2, roomy_cache
from llm_rlhf.models.precision import autocast, outside_autocast
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
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    finished: Tensor
    log_probs: Tensor
    entropy: Tensor
    values: Tensor | None
    prompt: Tensor

    def to(self, device: str) -> Samples:
        """The same elsewhere."""
        values = None if self.values is None else self.values.to(device)
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "values"}
        return Samples(**tensors, values=values)

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
) -> Samples:
    """Draw `samples_per_prompt` completions of each prompt; a prompt's rows are neighbours.

    ends        tokens that end a completion (`tokenizer.end_ids`)
    generator   source of all randomness; None decodes greedily

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
        ).to("cpu")


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
) -> Samples:
    """`generate` for prompts [P, T] as tokens; ends [E] int."""
    prompts, start = prompt_ids.shape
    device = prompt_ids.device
    cache = roomy_cache(policy.model.config, start + max_new_tokens)
    plain = None if cache is None else PlainGPT2.of(policy.model, policy.precision)
    logits, hidden, cache = policy.step(prompt_ids, prompt_mask, cache=cache, use_cache=True, keep=1)
    if samples_per_prompt > 1:
        cache.batch_repeat_interleave(samples_per_prompt)

    def per_sample(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(samples_per_prompt, dim=0)

    rows = prompts * samples_per_prompt
    new_ids = torch.full((rows, max_new_tokens), pad, device=device)
    drawn = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
    log_probs = torch.zeros(rows, max_new_tokens, device=device)
    entropy = torch.zeros(rows, max_new_tokens, device=device)
    values = None if policy.value_head is None else torch.zeros(rows, max_new_tokens, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)
    logits, hidden, mask = per_sample(logits), per_sample(hidden), per_sample(prompt_mask)

    for column in range(max_new_tokens):
        with outside_autocast(device):  # heads are float32's, as in `LanguagePolicy.evaluate`
            offered = policy.decoding_logits(logits[:, -1], hidden[:, -1])
            if values is not None and policy.value_head is not None:
                values[alive, column] = policy.value_head(hidden[:, -1]).squeeze(-1)
        token, token_log_probs, token_entropy = _draw(offered, generator)
        new_ids[alive, column] = token
        drawn[alive, column] = True
        log_probs[alive, column] = token_log_probs
        entropy[alive, column] = token_entropy
        ended = (token.unsqueeze(1) == ends).any(1)
        finished[alive[ended]] = True
        if column == max_new_tokens - 1 or bool(ended.all()):
            break
        if bool(ended.any()):
            going_on = (~ended).nonzero().squeeze(1)
            cache.batch_select_indices(going_on)
            alive, token, mask = alive[going_on], token[going_on], mask[going_on]
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        if plain is not None:
            logits, hidden = plain.step(token, mask, cache)
        else:
            logits, hidden, cache = policy.step(token.unsqueeze(1), mask, cache=cache, use_cache=True, keep=1)

    def beside_prompt(columns: Tensor) -> Tensor:
        return torch.cat([columns.new_zeros(rows, start), columns], dim=1)

    return Samples(
        input_ids=torch.cat([per_sample(prompt_ids), new_ids], dim=1),
        attention_mask=torch.cat([per_sample(prompt_mask), drawn.long()], dim=1),
        mask=beside_prompt(drawn),
        finished=finished,
        log_probs=beside_prompt(log_probs),
        entropy=beside_prompt(entropy),
        values=None if values is None else beside_prompt(values),
        prompt=torch.arange(prompts, device=device).repeat_interleave(samples_per_prompt),
    )


def _draw(logits: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row from its logits [B, V]; returns tokens, their log-probs and the entropies, [B].

    Raises UserError if the logits are NaN.
    """
    log_softmax = torch.log_softmax(logits, dim=-1)
    if bool(log_softmax.isnan().any()):
        raise UserError("the model's logits are NaN, training has diverged: try a lower learning rate")
    probabilities = log_softmax.exp()
    if generator is None:
        token = logits.argmax(-1)
    else:
        token = draw_index(probabilities, generator)
    log_probs = log_softmax.gather(1, token.unsqueeze(1)).squeeze(1)
    return token, log_probs, -(probabilities * log_softmax).sum(-1)


def draw_index(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One index a row of probabilities [B, V], [B] int: where a uniform number falls in their running sum. The
    generator is the processor's, so that a seed draws the same numbers for every device.

    One number a row, where torch.multinomial draws V of them; in float64, so that no index of positive probability
    is out of reach.
    """
    total = probabilities.double().cumsum(-1)
    numbers = torch.rand(len(total), 1, generator=generator, dtype=total.dtype).to(total.device)
    return torch.searchsorted(total, numbers * total[:, -1:], right=True).squeeze(1)


def to_rollout(
    samples: Samples,
    rewards: Tensor,
    *,
    scored: Tensor,
    ref_log_probs: Tensor | None = None,
    cut_is_end: bool = True,
    gamma: float = 1.0,
) -> Rollout:
    """Completions with their rewards as decisions of a policy.

    rewards     [B], one for each completion, given at its last token
    scored      [B] bool; a row without a reward is masked out whole
    cut_is_end  see GenerationConfig

    Values, where the policy has a value head, bootstrap from the next token's; a completion that was cut
    bootstraps from the value of its own last state, the nearest that was computed.
    """
    mask = samples.mask & scored.unsqueeze(1)
    last = _is_last(samples.mask)
    per_token = torch.where(last & mask, rewards.unsqueeze(1), 0.0)
    ends = last & mask & (samples.finished | cut_is_end).unsqueeze(1)
    cuts = last & mask & ~ends
    values = samples.values
    next_values = None
    if values is not None:
        following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        next_values = torch.where(cuts, values, torch.where(ends, 0.0, following))
    episode = torch.where(samples.attention_mask.bool(), 0, -1)
    return Rollout(
        observations=samples.observations(),
        actions=samples.input_ids,
        rewards=per_token,
        terminated=ends,
        truncated=cuts,
        mask=mask,
        discount=torch.full_like(per_token, gamma),
        old_log_probs=samples.log_probs,
        episode=episode,
        ref_log_probs=ref_log_probs,
        values=values,
        next_values=next_values,
        group=samples.prompt.unsqueeze(1).expand_as(samples.input_ids),
    )


def _is_last(mask: Tensor) -> Tensor:
    """[B, T] bool -> [B, T] bool: the last True of each row."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)
