"""Calculator: what reinforcement learning adds to a small language model that has learned arithmetic from text.

    python -m studies.calculator --data gsm8k_train.jsonl.gz [--share 1/2]

Two halves, five seeds, a fresh split a seed, one thread. *slip*: six demonstrations of ten are wrong and the
verifier is exact; *correct*: all demonstrations are right. Every arm starts from the same model (40 s of supervised
training) and is given the same processor time; continued supervised training half as much again, so that it sees
at least as many tokens as any other. Development used seeds from 100 on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from studies.cells import Figures, main, mean_and_error
from studies.language import Arm, column, run_arms

SEEDS = range(5)
CELLS = [f"{half}-{seed}" for half in ("slip", "correct") for seed in SEEDS]
BASE_SECONDS, ARM_SECONDS = 40, 40

SUPERVISED = ("sft.steps=1000000",)
SAMPLED = ("sampling.updates=1000000", f"sampling.max_seconds={ARM_SECONDS}")
BASE = Arm("calculator_sft", (*SUPERVISED, f"sft.max_seconds={BASE_SECONDS}"))
ARMS = {
    "continued SFT": Arm("calculator_continued", (*SUPERVISED, f"sft.max_seconds={1.5 * ARM_SECONDS}")),
    "PPO": Arm("calculator_ppo", SAMPLED),
    "GRPO": Arm("calculator_grpo", SAMPLED),
    "best-of-8 SFT": Arm("calculator_rejection", (*SUPERVISED, f"sft.max_seconds={ARM_SECONDS}")),
    "random reward, KL": Arm("calculator_slip_random_reward", SAMPLED),
}
SLIP_ONLY = {
    "PPO, self-imitation": Arm("calculator_slip_ppo_self_imitation", SAMPLED),
    "GRPO, self-imitation": Arm("calculator_slip_grpo_self_imitation", SAMPLED),
}
SHOWN = {"greedy": "greedy", "sampled": "sampled", "pass@8": "pass@8"}


def run(cell: str, options: argparse.Namespace) -> Figures:
    """All arms of one half and one seed."""
    half, seed = cell.rsplit("-", 1)
    common = [
        f"run.seed={seed}",
        f"task.seed={seed}",
        f"task.data={options.data}",
        f"task.calculator.slip={0.6 if half == 'slip' else 0.0}",
    ]
    arms = ARMS | SLIP_ONLY if half == "slip" else ARMS
    return run_arms("calculator", cell, base=BASE, arms=arms, common=common, splits=["test"], samples=8)


def table(results: Mapping[str, Figures]) -> str:
    """Means over seeds with standard errors, in percent, and the gain over continued SFT by seed."""
    lines = []
    for half in ("slip", "correct"):
        cells = {name: figures for name, figures in results.items() if name.startswith(half)}
        if not cells:
            continue
        lines += [
            f"\n*{half}*, {len(cells)} seeds\n",
            "| arm | greedy | sampled | pass@8 | greedy over continued SFT | KL, nats | entropy | samples |",
            "|---|---|---|---|---|---|---|---|",
        ]
        control = column(cells, "continued SFT", "test", "greedy")
        for arm in ("base", *ARMS, *(SLIP_ONLY if half == "slip" else ())):
            shown = [_percent(column(cells, arm, "test", name)) for name in SHOWN.values()]
            gains = [a - b for a, b in zip(column(cells, arm, "test", "greedy"), control, strict=True)]
            kl = column(cells, arm, "test", "kl")
            entropy = mean_and_error(column(cells, arm, "test", "entropy"))[0]
            samples = mean_and_error([cell[arm]["cost"].get("samples", 0) for cell in cells.values()])[0]
            shown += [_percent(gains, sign="+"), f"{mean_and_error(kl)[0]:.2f}" if kl else "-", f"{entropy:.3f}"]
            lines.append(f"| {arm} | {' | '.join(shown)} | {samples:,.0f} |")
    return "\n".join(lines)


def _percent(values: list[float], sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{100 * mean:{sign}.1f} ± {100 * error:.1f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where GSM8K is, which is not part of the product."""
    parser.add_argument("--data", default="null", help="GSM8K's train.jsonl or .jsonl.gz; default: generated")


if __name__ == "__main__":
    main("calculator", cells=CELLS, run=run, table=table, add_arguments=add_arguments)
