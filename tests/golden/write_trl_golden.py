"""Writes what TRL itself computes, for tests/policy_core/test_trl_parity.py, in environments of TRL's own:

    python3.11 -m venv trl16 && trl16/bin/pip install torch==2.13.0 && trl16/bin/pip install trl==1.16.0
    trl16/bin/python tests/golden/write_trl_golden.py         writes tests/golden/trl_1.16.0.json

    python3.11 -m venv trl12 && trl12/bin/pip install torch==2.13.0 && trl12/bin/pip install trl==1.12.0
    trl12/bin/python tests/golden/write_trl_golden.py         writes tests/golden/trl_1.12.0.json

1.16.0 gives the preference, reward and GRPO losses; 1.12.0 is the last with a PPO trainer. The numbers in the files
are what came out with torch 2.13.0 on a CPU; "versions" in each names the rest.

Nothing of TRL is written again here. A trainer's method runs on a trainer that was made without its constructor and
has the settings that the method reads; the model is a stand-in that answers with numbers drawn here, in float64.
PPO's losses have no method of their own: in trl_ppo.py a real `PPOTrainer` trains a tiny model, and what it has in
hand when it calls backward is written down.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
Case = dict[str, dict[str, Any]]

PROMPT = (2, 1, 3)  # tokens of the prompts of three pairs
CHOSEN, REJECTED = (4, 1, 3), (2, 5, 3)  # tokens of their completions
WIDTH = 8


class Alone:
    """An accelerator of one process on the CPU."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_for_metrics(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


class Answers:
    """A model that answers with what is kept for the batch's first token, whatever else it is asked."""

    training = True

    def __init__(self, by_first_token: dict[int, dict[str, Tensor]]) -> None:
        self.by_first_token = by_first_token

    def __call__(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(**self.by_first_token[int(input_ids[0, 0])])


def bare(trainer: type, **settings: Any) -> Any:
    """A trainer that never ran its constructor, with what every one of these methods reads, and `settings`."""
    made: Any = object.__new__(trainer)
    common = {
        "accelerator": Alone(),
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in {**common, **settings}.items():
        setattr(made, name, value)
    return made


def draw(*shape: int, seed: int, low: float = -3.0, high: float = -0.05) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def plain(value: Any) -> Any:
    """Tensors and tensors in mappings as lists and numbers that JSON keeps to the last bit."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value.detach().tolist() if isinstance(value, Tensor) else value


def last_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """What the trainer would log, less what it says of the stand-in's entropy, logits and tokens."""
    kept = ("rewards/", "logps/", "kl", "clip_ratio/", "accuracy", "margin", "mean_reward", "nll_loss", "log_odds")
    last = {name: value[-1] if isinstance(value, list) else value for name, value in metrics.items()}
    return {name: value for name, value in last.items() if name.startswith(kept)}


def completion_mask(
    prompts: tuple[int, ...], lengths: tuple[int, ...], width: int = WIDTH
) -> tuple[Tensor, Tensor]:
    """Right-padded rows: completion tokens, and tokens that are no padding, [N, width] int each."""
    columns = torch.arange(width)
    begin, end = torch.tensor(prompts).unsqueeze(1), (torch.tensor(prompts) + torch.tensor(lengths)).unsqueeze(1)
    return ((columns >= begin) & (columns < end)).long(), (columns < end).long()


def per_token(log_probs: Tensor) -> dict[str, Tensor]:
    """What TRL's fused head returns: log-probs [N, T - 1], 0 where there is no label, and statistics."""
    nothing = torch.zeros_like(log_probs)
    return {
        "log_probs": log_probs,
        "entropy": nothing,
        "mean_logits": nothing,
        "is_top1": nothing.bool(),
    }


# ---------------------------------------------------------------- 1.16.0: DPO and KTO


def dpo_case(loss_type: str, *, beta: float, label_smoothing: float = 0.0, at_reference: bool = False) -> Case:
    from trl import DPOTrainer

    mask, attention = completion_mask(PROMPT * 2, CHOSEN + REJECTED)
    scored = mask[:, 1:]
    log_probs = draw(6, WIDTH - 1, seed=1).requires_grad_()
    ref = (log_probs.detach() if at_reference else draw(6, WIDTH - 1, seed=2)) * scored
    trainer = bare(
        DPOTrainer,
        args=SimpleNamespace(),
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        use_weighting=False,
    )
    sums = ref.sum(1)
    batch = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": attention,
        "completion_mask": mask,
        "ref_chosen_logps": sums[:3],
        "ref_rejected_logps": sums[3:],
    }
    loss = trainer._compute_loss(Answers({1: per_token(log_probs * scored)}), batch, return_outputs=False)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return {
        "settings": {"beta": beta, "label_smoothing": label_smoothing},
        "inputs": {"log_probs": log_probs, "ref_log_probs": ref, "mask": scored},
        "outputs": {"loss": loss, "gradient": gradient, "metrics": last_metrics(trainer._metrics["train"])},
    }


def kto_case(*, beta: float, desirable_weight: float, undesirable_weight: float, ref_shift: float) -> Case:
    """`ref_shift` nats a token decide whether the KL of the mismatched pairs is above or below 0."""
    from trl import KTOTrainer

    mask, attention = completion_mask((2, 1, 3, 2), (4, 6, 3, 2))
    other_mask, other_attention = completion_mask((2, 1, 3, 2), (2, 4, 5, 3))
    scored, other_scored = mask[:, 1:], other_mask[:, 1:]
    log_probs = draw(4, WIDTH - 1, seed=3).requires_grad_()
    other = draw(4, WIDTH - 1, seed=5) * other_scored
    ref, other_ref = draw(4, WIDTH - 1, seed=4) * scored, (draw(4, WIDTH - 1, seed=6) + ref_shift) * other_scored
    desirable = torch.tensor([True, False, True, True])
    trainer = bare(
        KTOTrainer,
        args=SimpleNamespace(),
        beta=beta,
        loss_type="kto",
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        calculate_KL=True,
        precompute_ref_logps=True,
    )
    batch = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": attention,
        "completion_mask": mask,
        "KL_input_ids": torch.full_like(other_mask, 2),
        "KL_attention_mask": other_attention,
        "KL_completion_mask": other_mask,
        "label": desirable,
        "ref_logps": ref.sum(1),
        "ref_KL_logps": other_ref.sum(1),
    }
    model = Answers({1: per_token(log_probs * scored), 2: per_token(other)})
    loss = trainer._compute_loss(model, batch, return_outputs=False)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return {
        "settings": {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight},
        "inputs": {
            "log_probs": log_probs,
            "ref_log_probs": ref,
            "mask": scored,
            "other_log_probs": other,
            "other_ref_log_probs": other_ref,
            "desirable": desirable,
        },
        "outputs": {"loss": loss, "gradient": gradient, "metrics": last_metrics(trainer._metrics["train"])},
    }


# ---------------------------------------------------------------- 1.16.0: SimPO and ORPO, from logits


def labelled(prompts: tuple[int, ...], lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Token ids, attention mask and labels (-100 but for the completion) of right-padded rows."""
    mask, attention = completion_mask(prompts, lengths)
    ids = torch.randint(1, 5, mask.shape, generator=torch.Generator().manual_seed(sum(lengths)))
    ids[:, 0] = 1
    return {"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(mask == 0, -100)}


def from_logits(trainer: Any, prompts: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> Case:
    """Run a CPO or ORPO trainer from logits to metrics."""
    sides = {"chosen": labelled(prompts, chosen), "rejected": labelled(prompts, rejected)}
    batch = {f"{side}_{name}": value for side, columns in sides.items() for name, value in columns.items()}
    rows = 2 * len(prompts)
    logits = draw(rows, WIDTH, 5, seed=7, low=-2.0, high=2.0)
    loss, metrics = trainer.get_batch_loss_metrics(Answers({1: {"logits": logits}}), batch)
    ids = torch.cat([sides["chosen"]["input_ids"], sides["rejected"]["input_ids"]])
    labels = torch.cat([sides["chosen"]["labels"], sides["rejected"]["labels"]])
    attention = torch.cat([sides["chosen"]["attention_mask"], sides["rejected"]["attention_mask"]])
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return {
        "settings": {},
        "inputs": {
            "log_probs": log_probs,
            "mask": (labels[:, 1:] != -100).long(),
            "attention_mask": attention[:, 1:],
        },
        "outputs": {"loss": loss, "metrics": last_metrics(metrics)},
    }


def simpo_case(*, beta: float, gamma: float, label_smoothing: float = 0.0) -> Case:
    from trl.experimental.cpo import CPOTrainer

    trainer = bare(
        CPOTrainer,
        loss_type="simpo",
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=label_smoothing,
        alpha=0.0,
        cpo_alpha=0.0,
        is_encoder_decoder=False,
        pad_token_id=0,
    )
    case = from_logits(trainer, PROMPT, CHOSEN, REJECTED)
    return {**case, "settings": {"beta": beta, "gamma": gamma, "label_smoothing": label_smoothing}}


def orpo_case(*, beta: float, with_prompts: bool) -> Case:
    """Without prompts (but a first token) and with completions of one length, there is one mean to take only."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = bare(ORPOTrainer, beta=beta, is_encoder_decoder=False, padding_value=0)
    lengths = (CHOSEN, REJECTED) if with_prompts else ((5, 5, 5), REJECTED)
    case = from_logits(trainer, PROMPT if with_prompts else (1, 1, 1), *lengths)
    return {**case, "settings": {"beta": beta}}


# ---------------------------------------------------------------- 1.16.0: reward model, GRPO, overlong answers


def reward_case(*, with_margin: bool, centring: float | None) -> Case:
    from trl import RewardTrainer

    scores = draw(8, 1, seed=8, low=-2.0, high=2.0).requires_grad_()
    margin = draw(4, seed=9, low=0.0, high=1.5)
    batch = {"input_ids": torch.ones(8, 3), "attention_mask": torch.ones(8, 3)}
    trainer = bare(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=centring))
    batch = {**batch, "margin": margin} if with_margin else batch
    loss = trainer.compute_loss(Answers({1: {"logits": scores}}), batch)
    (gradient,) = torch.autograd.grad(loss, scores)
    return {
        "settings": {"centring": centring, "with_margin": with_margin},
        "inputs": {"scores": scores, "margin": margin},
        "outputs": {"loss": loss, "gradient": gradient, "metrics": last_metrics(trainer._metrics["train"])},
    }


LENGTHS = (5, 2, 4, 1)


def grpo_trainer(loss_type: str, log_probs: Tensor, *, beta: float, delta: float | None, parts: int) -> Any:
    from trl import GRPOTrainer

    return bare(
        GRPOTrainer,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=delta, steps_per_generation=parts),
        loss_type=loss_type,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.3,
        max_completion_length=6,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=parts,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None),
    )


def grpo_case(loss_type: str, *, beta: float, delta: float | None = None, parts: int = 1) -> Case:
    """The loss of four answers of up to five tokens, in `parts` accumulated micro-batches, added up."""
    mask = (torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    log_probs = draw(4, 5, seed=10).requires_grad_()
    old, ref = log_probs.detach() + draw(4, 5, seed=11, low=-0.6, high=0.6), draw(4, 5, seed=12)
    old[3, 0] = log_probs.detach()[3, 0] + 0.8  # a ratio of 0.45: clipped below
    if delta is not None:
        old[1, 0] = log_probs.detach()[1, 0] - 2.0  # a ratio of 7 where the advantage is negative
    advantages = torch.tensor([1.2, -0.7, 0.4, -1.1], dtype=torch.float64)
    total, metrics = torch.zeros((), dtype=torch.float64), {}
    for rows in torch.arange(4).chunk(parts):
        batch = {
            "prompt_ids": torch.ones(len(rows), 2, dtype=torch.long),
            "prompt_mask": torch.ones(len(rows), 2, dtype=torch.long),
            "completion_ids": torch.ones(len(rows), 5, dtype=torch.long),
            "completion_mask": mask[rows],
            "advantages": advantages[rows],
            "old_per_token_logps": old[rows],
            "ref_per_token_logps": ref[rows],
            "num_items_in_batch": mask.sum(),
        }
        trainer = grpo_trainer(loss_type, log_probs[rows], beta=beta, delta=delta, parts=parts)
        total = total + trainer._compute_loss(SimpleNamespace(), batch)
        metrics = last_metrics(trainer._metrics["train"])
    (gradient,) = torch.autograd.grad(total, log_probs)
    return {
        "settings": {"beta": beta, "delta": delta, "clip_low": 0.2, "clip_high": 0.3, "longest": 6, "parts": parts},
        "inputs": {
            "log_probs": log_probs,
            "old_log_probs": old,
            "ref_log_probs": ref,
            "advantages": advantages,
            "mask": mask,
        },
        "outputs": {"loss": total, "gradient": gradient, "metrics": metrics if parts == 1 else {}},
    }


def overlong_case(*, longest: int, cache: int) -> Case:
    from trl.rewards import get_soft_overlong_punishment

    lengths = [1, longest - cache, longest - cache + 1, longest - 1, longest, longest + 1, 3 * longest]
    rewards = get_soft_overlong_punishment(longest, cache)([[0] * length for length in lengths])
    return {
        "settings": {"longest": longest, "cache": cache},
        "inputs": {"lengths": lengths},
        "outputs": {"rewards": rewards},
    }


def losses_of_1_16() -> dict[str, Case]:
    return {
        "dpo": dpo_case("sigmoid", beta=0.3),
        "dpo_at_reference": dpo_case("sigmoid", beta=0.3, at_reference=True),
        "dpo_label_smoothing": dpo_case("sigmoid", beta=0.3, label_smoothing=0.2),
        "ipo": dpo_case("ipo", beta=0.3),
        "kto": kto_case(beta=0.3, desirable_weight=1.0, undesirable_weight=1.0, ref_shift=-1.0),
        "kto_weighted": kto_case(beta=0.1, desirable_weight=1.3, undesirable_weight=0.6, ref_shift=-1.0),
        "kto_clamped": kto_case(beta=0.3, desirable_weight=1.0, undesirable_weight=1.0, ref_shift=1.0),
        "simpo": simpo_case(beta=2.0, gamma=1.0),
        "simpo_label_smoothing": simpo_case(beta=2.0, gamma=1.0, label_smoothing=0.1),
        "orpo": orpo_case(beta=0.2, with_prompts=True),
        "orpo_without_prompts": orpo_case(beta=0.2, with_prompts=False),
        "reward": reward_case(with_margin=False, centring=None),
        "reward_margin": reward_case(with_margin=True, centring=None),
        "reward_margin_centring": reward_case(with_margin=True, centring=0.01),
        "grpo": grpo_case("grpo", beta=0.0),
        "grpo_kl": grpo_case("grpo", beta=0.1),
        "grpo_delta": grpo_case("grpo", beta=0.1, delta=2.0),
        "bnpo": grpo_case("bnpo", beta=0.1),
        "dr_grpo": grpo_case("dr_grpo", beta=0.1),
        "dapo": grpo_case("dapo", beta=0.1),
        "grpo_two_parts": grpo_case("grpo", beta=0.1, parts=2),
        "bnpo_two_parts": grpo_case("bnpo", beta=0.1, parts=2),
        "dr_grpo_two_parts": grpo_case("dr_grpo", beta=0.1, parts=2),
        "dapo_two_parts": grpo_case("dapo", beta=0.1, parts=2),
        "overlong": overlong_case(longest=12, cache=4),
    }


def losses_of_1_12() -> dict[str, Case]:
    from trl_ppo import ppo_case  # beside this script

    return {
        "ppo": ppo_case(micro_batch=4, mini_batches=1),
        "ppo_two_parts": ppo_case(micro_batch=2, mini_batches=1),
        "ppo_two_minibatches": ppo_case(micro_batch=2, mini_batches=2),
    }


BY_VERSION: dict[str, Callable[[], dict[str, Case]]] = {"1.16.0": losses_of_1_16, "1.12.0": losses_of_1_12}


def main() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")}
    if versions["trl"] not in BY_VERSION:
        raise SystemExit(f"TRL {' or '.join(BY_VERSION)} is wanted here, not {versions['trl']}")
    cases = BY_VERSION[versions["trl"]]()
    path = FOLDER / f"trl_{versions['trl']}.json"
    lines = [f'  "{name}": {json.dumps(plain(case))}' for name, case in cases.items()]
    text = f'{{\n "versions": {json.dumps(versions)},\n "cases": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    path.write_text(text)
    print(f"{path}: {len(cases)} cases, {len(text)} bytes")


if __name__ == "__main__":
    main()
