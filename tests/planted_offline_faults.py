"""The faults for offline and off-policy learning; see `tests/planted_faults.py`."""

from __future__ import annotations

from tests.fault import Fault

OFFLINE_FAULTS = (
    Fault(
        "critics",
        "return batch.rewards + batch.discount * torch.where(batch.terminated, 0.0, next_values)",
        "return batch.rewards + batch.discount * next_values",
        "a terminated decision is bootstrapped",
    ),
    Fault(
        "critics",
        "errors = torch.where(mask, q_values - targets.detach(), 0.0)",
        "errors = torch.where(mask, q_values - targets, 0.0)",
        "the critics' targets get a gradient",
    ),
    Fault(
        "critics",
        "torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)",
        "torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - rate)",
        "the slow critics are the fast ones",
    ),
    Fault(
        "iql",
        "weight = torch.where(error < 0, 1.0 - expectile, expectile)",
        "weight = torch.where(error < 0, expectile, 1.0 - expectile)",
        "the expectile is the other one",
    ),
    Fault(
        "iql",
        "return (advantages.detach() * inverse_temperature).exp().clamp(max=max_weight)",
        "return (advantages.detach() / inverse_temperature).exp().clamp(max=max_weight)",
        "the temperature is upside down",
    ),
    Fault(
        "iql",
        "values=values, targets=slow_q_values.amin(0), mask=mask, expectile=expectile, denominator=denominator",
        "values=values, targets=slow_q_values.amax(0), mask=mask, expectile=expectile, denominator=denominator",
        "the value follows the optimistic critic",
    ),
    Fault(
        "iql",
        "advantages=slow_q_values.amin(0) - values,",
        "advantages=slow_q_values.mean(0) - values,",
        "the policy is weighted by the critics' mean",
    ),
    Fault(
        "sac",
        "return -temperature * masked_mean(log_probs.detach() + target_entropy, mask)",
        "return temperature * masked_mean(log_probs.detach() + target_entropy, mask)",
        "the temperature runs away from its target",
    ),
    Fault(
        "sac",
        "return masked_mean(temperature.detach() * log_probs - q_values, mask)",
        "return masked_mean(log_probs - q_values, mask)",
        "the policy's entropy has no weight",
    ),
    Fault(
        "sac",
        "loss.backward(inputs=parameters)",
        "loss.backward()",
        "the critics' gradients carry the policy's",
    ),
    Fault(
        "cql",
        "soft_maximum = torch.logsumexp(q_values - log_densities, dim=1)",
        "soft_maximum = torch.logsumexp(q_values, dim=1)",
        "samples are not weighted by how likely they were",
    ),
    Fault(
        "cql",
        "return torch.maximum(policy_q_values, returns)",
        "return torch.minimum(policy_q_values, returns)",
        "calibration is a ceiling",
    ),
    Fault(
        "cql",
        "uniform = noise.uniform.new_full(noise.uniform.shape[:-1], -math.log(2.0) * logged.shape[-1])",
        "uniform = noise.uniform.new_full(noise.uniform.shape[:-1], -math.log(2.0))",
        "the uniform density is that of one dimension",
    ),
    Fault(
        "td3_bc",
        "scale = config.alpha / masked_mean(q_values.detach().abs(), mask)",
        "scale = config.alpha / masked_mean(q_values.detach(), mask)",
        "the critic is normalised by its sign",
    ),
    Fault(
        "td3_bc",
        "if number % config.policy_delay:",
        "if number % config.policy_delay == 0:",
        "the policy moves when the critics are freshest, off by one",
    ),
    Fault(
        "awac",
        "return torch.softmax(logits, dim=0) * mask.sum()",
        "return torch.softmax(logits, dim=0)",
        "the weights' mean is not one",
    ),
    Fault(
        "replay",
        "rows = torch.randint(self.held, (size,), generator=generator)",
        "rows = torch.randint(self.capacity, (size,), generator=generator)",
        "what was never put in is drawn",
    ),
    Fault(
        "replay",
        "self.returns[where] = -torch.inf",
        "self.returns[where] = 0.0",
        "a return that is not known yet counts as 0",
    ),
    Fault(
        "discrete_cql",
        "best = next_values.argmax(-1, keepdim=True)",
        "best = slow_next_values.argmax(-1, keepdim=True)",
        "the slow values choose as well",
    ),
    Fault(
        "discrete_cql",
        "return of_targets + config.weight * gap",
        "return of_targets - config.weight * gap",
        "what was never chosen is pushed up",
    ),
    Fault(
        "cql",
        "lowest(networks.target(batch.next_observations, distribution.mode()), config.sac, generator)",
        "networks.target(batch.next_observations, distribution.mode()).amin(0)",
        "CQL's targets take all critics",
    ),
)
