"""The faults that `tests/mutants.py` plants in policy_core, one at a time: a literal table."""

from __future__ import annotations

from tests.fault import Fault
from tests.planted_offline_faults import OFFLINE_FAULTS
from tests.planted_preference_faults import PREFERENCE_FAULTS

FAULTS = (
    # ------------------------------------------------------------ mismatch
    Fault(
        "mismatch",
        "gap = rollout.old_log_probs - behaviour",
        "gap = behaviour - rollout.old_log_probs",
        "what was drawn too often counts even more",
    ),
    Fault(
        "mismatch",
        "return torch.where(counts, gap, 0.0).exp().clamp(max=cap)",
        "return torch.where(counts, gap, 0.0).exp()",
        "weights have no bound",
    ),
    Fault(
        "ppo",
        "        advantages = advantages if unlike is None else weighted(advantages, unlike)",
        "        advantages = advantages",
        "what another engine sampled is not weighted",
    ),
    # ------------------------------------------------------------ rollout
    Fault(
        "rollout",
        "return torch.cat([from_here_on[:, 1:], torch.full_like(here[:, :1], width)], dim=1)",
        "return torch.cat([from_here_on[:, :-1], torch.full_like(here[:, :1], width)], dim=1)",
        "off by one: a decision is its own successor",
    ),
    Fault(
        "rollout",
        "torch.where(moves, rollout.rewards, zero))",
        "torch.where(moves, rollout.rewards * rollout.discount, zero))",
        "a credited reward is discounted",
    ),
    Fault(
        "rollout",
        "moves = stray & ((rollout.rewards != 0) | rollout.terminated | rollout.truncated)",
        "moves = stray & ((rollout.rewards != 0) | rollout.terminated)",
        "a truncation on an observation column is lost",
    ),
    Fault(
        "rollout",
        "reachable = (target >= 0) & (rollout.episode.gather(1, target.clamp(min=0)) == rollout.episode)",
        "reachable = target >= 0",
        "a reward is credited to the episode before",
    ),
    Fault(
        "rollout",
        "if (inside & (next_episode != self.episode) & ~cut).any():",
        "if (inside & (next_episode != self.episode) & cut).any():",
        "an episode that never ends passes validation",
    ),
    Fault(
        "rollout",
        "index = self.mask.flatten().nonzero().squeeze(1)",
        "index = self.mask.flip(1).flatten().nonzero().squeeze(1)",
        "decisions() takes masked columns for decisions",
    ),
    # ------------------------------------------------------------ masking
    Fault(
        "masking",
        "return torch.where(mask, values, 0.0).sum()",
        "return (values * mask).sum()",
        "NaN under the mask spoils a sum",
    ),
    Fault(
        "masking",
        "return masked_sum(values, mask) / total",
        "return masked_sum(values, mask) / mask.numel()",
        "unmasked mean",
    ),
    Fault(
        "masking",
        "return (squares / (count - 1).clamp(min=1)).sqrt()",
        "return (squares / count.clamp(min=1)).sqrt()",
        "standard deviation with n",
    ),
    Fault(
        "masking",
        "keys = rows * (episode.max().clamp(min=0) + 1) + episode",
        "keys = rows * 0 + episode",
        "the same episode id in two rows is one episode",
    ),
    Fault(
        "masking",
        "counted = mask if factor_mask is None else mask.unsqueeze(-1) & factor_mask",
        "counted = mask if factor_mask is None else mask.unsqueeze(-1).expand_as(factor_mask)",
        "factor mask ignored in the weights",
    ),
    Fault(
        "masking",
        "return weights / weights.sum().clamp(min=1)",
        "return weights / weights.numel()",
        "padding enlarges the denominator",
    ),
    Fault(
        "masking",
        "return weights / (constant * max(episodes, 1))",
        "return weights / (constant * max(len(mask), 1))",
        "rows counted for episodes",
    ),
    Fault(
        "masking",
        "share[mask] = 1.0 / (lengths.clamp(min=1)[index[mask]] * max(episodes, 1))",
        "share[mask] = 1.0 / lengths.sum().clamp(min=1)",
        "the mean over episodes is not weighted by their lengths",
    ),
    # ------------------------------------------------------------ returns
    Fault(
        "returns",
        "bootstrap = torch.where(rollout.terminated, 0.0, rollout.next_values)",
        "bootstrap = torch.where(rollout.terminated | rollout.truncated, 0.0, rollout.next_values)",
        "lost bootstrap at a truncation",
    ),
    Fault(
        "returns",
        "bootstrap = torch.where(rollout.terminated, 0.0, rollout.next_values)",
        "bootstrap = rollout.next_values",
        "bootstrap at a termination",
    ),
    Fault(
        "returns",
        "going_on = ~(rollout.terminated | rollout.truncated)",
        "going_on = ~rollout.terminated",
        "lambda passes through a truncation",
    ),
    Fault(
        "returns",
        "decay = torch.where(mask, rollout.discount * gae_lambda * going_on, 1.0)",
        "decay = rollout.discount * gae_lambda * going_on",
        "observation columns are discounted",
    ),
    Fault(
        "returns",
        "decay = torch.where(mask, rollout.discount * gae_lambda * going_on, 1.0)",
        "decay = torch.where(mask, rollout.discount * gae_lambda * going_on, 0.0)",
        "observation columns stop the advantage",
    ),
    Fault(
        "returns",
        "decay = torch.where(mask, rollout.discount * gae_lambda * going_on, 1.0)",
        "decay = torch.where(mask, rollout.discount.max() * gae_lambda * going_on, 1.0)",
        "gamma for gamma**j in the scan",
    ),
    Fault(
        "returns",
        "delta = torch.where(mask, rollout.rewards + rollout.discount * bootstrap - rollout.values, 0.0)",
        "delta = torch.where(mask, rollout.rewards + bootstrap - rollout.values, 0.0)",
        "the bootstrap is not discounted",
    ),
    Fault(
        "returns",
        "return advantages, torch.where(mask, advantages + rollout.values, 0.0)",
        "return advantages, torch.where(mask, advantages - rollout.values, 0.0)",
        "wrong sign in the value target",
    ),
    Fault(
        "returns",
        "same_episode = (following < width) & (episode.gather(1, at) == episode)",
        "same_episode = following < width",
        "bootstraps from the next episode's value",
    ),
    Fault(
        "returns",
        "needs_final = mask & ~same_episode & ~terminated",
        "needs_final = mask & ~same_episode & ~terminated & (following < width)",
        "lost bootstrap at the end of the row",
    ),
    Fault(
        "returns",
        "return reward, gamma ** executed.to(rewards.dtype), step_mask",
        "return reward, torch.full_like(reward, gamma), step_mask",
        "gamma for gamma**j of a chunk",
    ),
    Fault(
        "returns",
        "powers = gamma ** steps.to(rewards.dtype)",
        "powers = gamma ** (steps + 1).to(rewards.dtype)",
        "off by one in a chunk's discounts",
    ),
    Fault(
        "returns",
        "step_mask = steps < executed.unsqueeze(-1)",
        "step_mask = steps <= executed.unsqueeze(-1)",
        "a step that was not executed counts",
    ),
    Fault(
        "returns",
        "index_add_(0, decisions, rollout.rewards[rollout.mask])",
        "index_add_(0, decisions, (rollout.rewards * rollout.discount)[rollout.mask])",
        "episode returns are discounted",
    ),
    # ------------------------------------------------------------ kl
    Fault(
        "kl",
        "return torch.expm1(-log_ratio) + log_ratio",
        "return torch.expm1(log_ratio) - log_ratio",
        "k3 of the reverse ratio",
    ),
    Fault("kl", "return 0.5 * log_ratio.square()", "return log_ratio.square()", "k2 without its half"),
    Fault("kl", "return rewards - coef * kl, kl", "return rewards + coef * kl, kl", "the KL penalty is a bonus"),
    Fault(
        "kl",
        "values = torch.where(factor_mask, values, 0.0)",
        "values = torch.where(factor_mask | True, values, 0.0)",
        "factors that were not executed are summed",
    ),
    Fault(
        "kl",
        'count = episode_index(mask, episode)[1] if unit == "episode" else int(mask.sum())',
        'count = episode_index(mask, episode)[1] if unit == "decision" else int(mask.sum())',
        "nats per decision for nats per episode",
    ),
    Fault(
        "kl",
        "error = min(max(kl / self.config.target - 1.0, -0.2), 0.2)",
        "error = min(max(1.0 - kl / self.config.target, -0.2), 0.2)",
        "the controller steers away from its target",
    ),
    # ------------------------------------------------------------ distributions
    Fault(
        "distributions",
        "return torch.addcmul(-(self.log_std + HALF_LOG_TWO_PI), standardized, standardized, value=-0.5)",
        "return torch.addcmul(self.log_std - HALF_LOG_TWO_PI, standardized, standardized, value=-0.5)",
        "wrong sign of the Gaussian's log scale",
    ),
    Fault(
        "distributions",
        "return DiagonalGaussian(self.mean, self.log_std).log_prob(raw) - log_tanh_slope(raw)",
        "return DiagonalGaussian(self.mean, self.log_std).log_prob(raw) + log_tanh_slope(raw)",
        "wrong sign of the squashing's volume",
    ),
    Fault(
        "distributions",
        "finite = log_probabilities.clamp(min=torch.finfo(log_probabilities.dtype).min)",
        "finite = log_probabilities",
        "an impossible choice makes the entropy NaN",
    ),
    # ------------------------------------------------------------ ppo: losses
    Fault(
        "ppo",
        "log_ratio = (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
        "log_ratio = (old_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
        "the ratio upside down",
    ),
    Fault(
        "ppo",
        "bound = ratio.clamp(1.0 - clip_range, 1.0 + high) * advantages",
        "bound = ratio.clamp(1.0 - high, 1.0 + clip_range) * advantages",
        "clip bounds swapped",
    ),
    Fault("ppo", "clips = bound < unclipped", "clips = bound > unclipped", "max for min in the surrogate"),
    Fault(
        "ppo",
        "sinks = (advantages < 0) & (torch.minimum(unclipped, bound) < floor)",
        "sinks = torch.minimum(unclipped, bound) < floor",
        "the dual clip touches positive advantages",
    ),
    Fault(
        "ppo",
        '"approx_kl": ((ratio - 1.0 - log_ratio) * weights).sum(),',
        '"approx_kl": ((ratio - 1.0 + log_ratio) * weights).sum(),',
        "wrong sign in the measured KL",
    ),
    Fault(
        "ppo",
        "loss = -(torch.where(clips, bound, unclipped) * weights).sum()",
        "loss = -(torch.where(clips, bound, unclipped) * weights).sum() / weights.sum()",
        "each micro-batch has its own denominator",
    ),
    Fault(
        "ppo",
        'return (torch.maximum(error, clipped_error) * weights).sum(), {"value_clip_fraction": fraction}',
        'return (torch.minimum(error, clipped_error) * weights).sum(), {"value_clip_fraction": fraction}',
        "min for max in the clipped value loss",
    ),
    Fault(
        "ppo",
        "moved = (values - old_values).clamp(-clip_range, clip_range)",
        "moved = (old_values - values).clamp(-clip_range, clip_range)",
        "wrong sign in the value clip",
    ),
    Fault(
        "ppo",
        "return tensor if keep is None else torch.where(keep, tensor, 0.0)",
        "return tensor",
        "NaN under the mask reaches the loss",
    ),
    Fault(
        "ppo",
        "loss = loss - config.entropy_coef * entropy",
        "loss = loss + config.entropy_coef * entropy",
        "entropy is punished",
    ),
    Fault(
        "ppo",
        "loss = loss + kl_coef * reference_kl",
        "loss = loss + kl.coef * reference_kl",
        "the initial KL coefficient instead of the controller's",
    ),
    Fault(
        "ppo",
        "loss = loss + config.value_coef * value",
        "loss = loss + value",
        "the value loss without its coefficient",
    ),
    Fault(
        "ppo",
        "advantages = advantages.unsqueeze(-1)",
        "advantages = advantages.unsqueeze(-1) / log_probs.shape[-1]",
        "an advantage is divided among the factors",
    ),
    # ------------------------------------------------------------ ppo: update
    Fault(
        "ppo",
        "old_log_probs = per_decision(old_log_probs, factor_mask)",
        "old_log_probs = per_decision(old_log_probs)",
        "factor mask ignored in the old log-probs",
    ),
    Fault(
        "ppo",
        "advantages = normalize(advantages, counts)",
        "advantages = normalize(advantages, torch.ones_like(counts))",
        "masked columns enter the normalisation",
    ),
    Fault(
        "ppo",
        "with contextlib.nullcontext() if train_policy else only_critic(policy):",
        "with contextlib.nullcontext():",
        "critic warm-up trains the actor",
    ),
    Fault(
        "ppo",
        "parameter.requires_grad_(True)",
        "parameter.requires_grad_(False)",
        "the actor stays frozen after the warm-up",
    ),
    Fault(
        "ppo",
        'if config.target_kl is not None and metrics["approx_kl"] > 1.5 * config.target_kl:',
        'if config.target_kl is not None and metrics["approx_kl"] > config.target_kl:',
        "the early stop comes too early",
    ),
    Fault("ppo", "if done < len(batches):", "if done < 0:", "the early stop ends one epoch only"),
    Fault(
        "ppo",
        "split_rows(shuffled, [least + (step < more) for step in range(steps)])",
        "split_rows(shuffled, config.minibatch_size)",
        "what is left over makes a step of its own",
    ),
    Fault("optimizer", "if not math.isfinite(norm):", "if math.isinf(norm):", "a NaN gradient is stepped on"),
    Fault("optimizer", "if norm > max_grad_norm:", "if norm < max_grad_norm:", "small gradients are blown up"),
    Fault(
        "masking", "torch.where(mask & ~flat,", "torch.where(mask,", "rounding is normalised to a deviation of one"
    ),
    Fault(
        "grpo", "earned = returns if scores is None else", "earned = returns if True else", "the KL makes a signal"
    ),
    # ------------------------------------------------------------ grpo, bc
    Fault(
        "grpo",
        "others = (total - returns) / (size - 1).clamp(min=1)",
        "others = total / size",
        "RLOO's baseline includes the episode itself",
    ),
    Fault(
        "grpo",
        "return (returns - total / size) / (std + 1e-4)",
        "return (returns - total / size) / ((squares / size).sqrt() + 1e-4)",
        "GRPO's deviation with n",
    ),
    Fault("grpo", "return returns - total / size", "return total / size - returns", "wrong sign in Dr.GRPO"),
    Fault(
        "grpo",
        "spread[rollout.mask] = advantages[index[rollout.mask]]",
        "spread[rollout.mask] = advantages[rollout.group[rollout.mask]]",
        "decisions get another episode's advantage",
    ),
    Fault(
        "grpo",
        "config.advantage, torch.tensor(False))",
        "config.advantage, flat)",
        "no KL in flat groups where nothing is divided",
    ),
    Fault(
        "grpo",
        "reinforce_pp(rest_of_episode(rollout), rollout.mask)",
        "reinforce_pp(returns[index], rollout.mask)",
        "REINFORCE++ charges a KL to what came after it",
    ),
    Fault("bc", "loss = -torch.where(", "loss = torch.where(", "cloning pushes away from the demonstrations"),
    Fault(
        "bc",
        "total = mask.sum().clamp(min=1) if denominator is None else denominator",
        "total = mask.sum().clamp(min=1)",
        "per-micro-batch instead of global denominator in cloning",
    ),
    # ------------------------------------------------------------ optimizer, schedules, networks, traced
    Fault("optimizer", "flat.grad = None", "gradient.zero_()", "a frozen group moves by its momentum"),
    Fault(
        "optimizer",
        "if any(member.requires_grad for member in members):",
        "if all(not member.requires_grad for member in members):",
        "the trained groups are the frozen ones",
    ),
    Fault(
        "schedules",
        "return initial * 0.5 * (1.0 - math.cos(math.pi * remaining))",
        "return initial * 0.5 * (1.0 + math.cos(math.pi * remaining))",
        "the cosine rises",
    ),
    Fault(
        "networks",
        "doubled = torch.baddbmm((bias - weight.sum(1, keepdim=True)) * 2.0, hidden, weight * 4.0)",
        "doubled = torch.baddbmm(bias * 2.0, hidden, weight * 4.0)",
        "the shift of the sigmoid is forgotten",
    ),
    Fault(
        "traced",
        "torch._foreach_add_(gradients, outputs[: len(learned)])",
        "torch._foreach_copy_(gradients, outputs[: len(learned)])",
        "a replay overwrites the micro-batches before it",
    ),
    Fault(
        "traced",
        "if float(self._scalar) != scalar:",
        "if float(self._scalar) == 0.0 != scalar:",
        "a replay keeps the first KL coefficient",
    ),
    *OFFLINE_FAULTS,
    *PREFERENCE_FAULTS,
)
