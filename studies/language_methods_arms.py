"""What the study of language methods compares: two tasks, the arms of each, and TRL's settings among them."""

from __future__ import annotations

from dataclasses import dataclass

from studies.language import Arm

SAVED = 40
"""Checkpoints that are kept of a run."""


@dataclass(frozen=True)
class Half:
    """One of the two tasks.

    common          of every arm
    budget          completions that a method may draw in training
    online          arms that draw while they learn
    rejection       rejection-sampling fine-tuning of `rounds` draws, each for every training prompt
    ilql            it draws nothing; how strongly it steers is chosen from BETAS
    scorer          the reward model of best of n, on comparisons (at most `comparisons` a prompt) of `scored`
                    completions of every training prompt
    splits          judged; along a run only the first, which is what "equal KL" is about
    samples         of every prompt, in judging
    """

    base: Arm
    common: tuple[str, ...]
    budget: int
    online: dict[str, Arm]
    rejection: Arm
    rounds: int
    ilql: Arm
    scorer: Arm
    scored: int
    comparisons: int
    splits: tuple[str, ...]
    samples: int


def online(config: str, updates: int, *more: str) -> Arm:
    """An arm of which SAVED checkpoints are kept."""
    looking = (f"run.checkpoint_every={updates // SAVED}", f"run.keep={SAVED}")
    return Arm(config, (f"sampling.updates={updates}", *looking, *more))


def scorer(steps: int, prompts: int) -> Arm:
    """A reward model that starts from the base model, `prompts` an update."""
    size = (f"learning.steps={steps}", f"learning.batch_size={prompts}", "learning.micro_batch_size=null")
    rates = ("learning.learning_rate=1e-3", "learning.head_learning_rate=1e-3")
    return Arm("reward", ("reward.heads=1", "pairs.validation=0", "pairs.test=0", *size, *rates))


BEST_WALKS = (
    *("rejection.source=samples", "rejection.threshold=0.01", "rejection.keep=1", "rejection.accumulate=false"),
    *("sft.steps=200", "rejection.steps_per_round=25", "sft.learning_rate=1e-3", "sft.schedule=linear"),
)
"""Of each start its best walk, if it arrives, of the last draw only: early ones are long. More different ones would
differ by what they do at the goal, which earns nothing."""
HALVES = {
    "calculator": Half(
        base=Arm("calculator_slip_sft"),
        common=("task.name=calculator", "task.calculator.slip=0.6"),
        budget=800 * 256,
        online={
            "PPO": online("calculator_slip_ppo", 800),
            "GRPO": online("calculator_slip_grpo", 400),
            "GRPO, all groups": online("calculator_slip_grpo", 400, "sampling.skip_flat_groups=false"),
            "RLOO": online("calculator_slip_rloo", 400),
        },
        rejection=Arm("calculator_slip_rejection", ("sft.steps=3000", "rejection.steps_per_round=1000")),
        rounds=3,
        ilql=Arm("walks_ilql", ("learning.steps=3200",)),
        scorer=scorer(1500, 64),
        scored=32,
        comparisons=4,
        splits=("test",),
        samples=8,
    ),
    "walks": Half(
        base=Arm("random_walks_sft"),
        common=("task.name=random_walks",),
        budget=160 * 14 * 16,
        online={
            "PPO": online("random_walks_ppo", 160),
            "GRPO": online("random_walks_grpo", 160),
            "GRPO, all groups": online("random_walks_grpo", 160, "sampling.skip_flat_groups=false"),
            "RLOO": online("random_walks_rloo", 160),
        },
        rejection=Arm("random_walks_filtered", BEST_WALKS),
        rounds=8,
        ilql=Arm("walks_ilql"),
        scorer=scorer(150, 14),
        scored=1024,
        comparisons=200,
        splits=("prompted", "test"),
        samples=100,
    ),
}
PEERS = {"TRL GRPO": ("grpo", "GRPO, all groups"), "TRL RLOO": ("rloo", "RLOO")}
"""TRL's trainers, and the arm of ours whose settings they are given."""
