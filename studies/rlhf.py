"""RLHF on one small model: over-optimisation of a learned proxy, what holds it back, what it costs, who notices.

    python -m studies.rlhf --data FOLDER [--share 1/2]

FOLDER holds hh_harmless_pairs.jsonl.gz and gsm8k_train.jsonl.gz. A small language model is trained on their text;
a noisy reader of the gold score (studies/rlhf_gold.py) compares a few hundred pairs of its replies; an ensemble of
reward heads learns from them, and policies climb that. All cells are to be run from one unchanged tree: later ones
start from the models of earlier ones. A cell is a stage of a seed:

    base    the language model, the pairs, the reward model, best-of-n
    ppo     PPO against the ensemble's mean at several KL coefficients, and against mean - deviations
    direct  DPO and IPO on the same pairs, iterative DPO against the ensemble's mean
    tax     PPO-ptx, adaptive KL beside a fixed coefficient as long, and every run's perplexity on held-out text

Later ones start from the first one's runs in runs/studies. Seed 100 is the development seed: the monitor's
thresholds, the KL coefficients and the target were fixed on it, and it is left out of every mean.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from experiment.config import build_from_dict, read_tree
from experiment.errors import UserError
from llm_rlhf.online.monitor import MonitorConfig
from studies.cells import RUNS, Figures, main, mean_and_error, read_results, require
from studies.rlhf_data import GSM8K, HH
from studies.rlhf_reading import (
    BLOCK,
    alarms,
    last_third,
    lead,
    points_of,
    read_curve,
    turn_within,
    verdict,
)
from studies.rlhf_runs import (
    GOLD,
    Base,
    judge,
    judge_checkpoints,
    label_pairs,
    language,
    make_base,
    make_proxy,
    train,
)

DEVELOPMENT = 100
SEEDS = (DEVELOPMENT, 0, 1, 2, 3, 4)
STAGES = ("base", "ppo", "direct", "tax")
# two seeds side by side, so that each half of the queue (--share 1/2) finds the stages of its seeds in order
CELLS = [f"{stage}-{seed}" for two in (SEEDS[:2], SEEDS[2:4], SEEDS[4:]) for stage in STAGES for seed in two]

COEFFICIENTS = (0.0, 0.03, 0.1, 0.3)
DEVIATIONS = 2.0
ARMS: dict[str, tuple[float, float]] = {
    **{f"kl {coef:g}": (coef, 0.0) for coef in COEFFICIENTS},
    **{f"ensemble, kl {coef:g}": (coef, DEVIATIONS) for coef in (0.0, 0.03)},
}
"""PPO's arms: KL coefficient, and how many deviations of the heads are taken off their mean."""
FIXED = "kl 0.1"
"""The arm whose KL on the development seed is the target of the adaptive coefficient."""
ADAPTIVE = {"adaptive from 0.03": 0.03, "adaptive from 0.3": 0.3}
STEERED = ("kl.horizon=512", "sampling.updates=200", "validation.every=5")
"""Longer than the other runs: the KL starts at 0, so the coefficient falls first, and the KL overshoots. At a
horizon of 256 it went to four times the target on the development seed, and came back after 85 updates."""
LONGER = {"kl 0.1, 200 updates": 0.1}
UNSTEERED = STEERED[1:]
"""What the adaptive coefficient is compared with: the fixed one in a run as long, and read off the same updates."""
PTX = {"ptx, kl 0": ("kl 0", 0.0), "ptx, kl 0.1": ("kl 0.1", 0.1)}
"""PPO-ptx's arms: the arm of PPO that each stands beside, and its coefficient."""


def run(cell: str, options: argparse.Namespace) -> Figures:
    """One stage of one seed."""
    import torch

    torch.set_num_threads(1)
    stage, _, number = cell.partition("-")
    base = Base.of(int(number))
    if stage == "base":
        figures = make_base(Path(options.data), base)
        return {**figures, "labels": label_pairs(base), "reward_model": make_proxy(base)}
    stages: dict[str, Callable[[Base], Figures]] = {"ppo": ppo, "direct": direct, "tax": tax}
    return stages[stage](base)


def folder_of(arm: str, seed: int) -> Path:
    """The run of an arm."""
    name = arm.replace(", ", "-").replace(" ", "-")
    return RUNS / f"rlhf-{name}-{seed}"


def train_ppo(base: Base, arm: str, overrides: Sequence[str], *, deviations: float = 0.0) -> Figures:
    """One PPO run, what its gold did, when the monitor fired, and its figures on test prompts."""
    folder = folder_of(arm, base.seed)
    probes = f'monitor.probes={{"{GOLD}:stammers": 0.4}}'
    train("rlhf_ppo", folder, base.seed, [*base.online(), base.rewards(deviations), probes, *overrides])
    start = base.figures()["gold"]["validation"]["sampled"]
    curve = read_curve(points_of(folder, proxy=str(base.proxy)), start=start)
    return {
        "curve": curve,
        "alarms": alarms(folder, monitor_of(folder)),
        **last_third(folder),
        "test": judge(folder),
    }


def monitor_of(run: Path) -> MonitorConfig:
    """The monitor's configuration of a run."""
    return build_from_dict(read_tree(run / "config.yaml").values["monitor"], MonitorConfig, str(run))


def ppo(base: Base) -> Figures:
    """PPO's arms."""
    return {
        arm: train_ppo(base, arm, [f"kl.coef={coef}"], deviations=deviations)
        for arm, (coef, deviations) in ARMS.items()
    }


def direct(base: Base) -> Figures:
    """DPO, IPO and iterative DPO: gold and proxy along their checkpoints."""
    figures: Figures = {}
    arms = {"dpo": base.offline(), "ipo": base.offline(), "iterative_dpo": [*base.online(), base.rewards()]}
    for name, overrides in arms.items():
        folder = train(f"rlhf_{name}", folder_of(name, base.seed), base.seed, overrides)
        figures[name] = judge_checkpoints(base, folder)
        shutil.rmtree(folder)  # ten checkpoints, which nothing needs any more
    return figures


def tax(base: Base) -> Figures:
    """PPO-ptx beside PPO, the adaptive coefficient beside a fixed one, and what every run costs in perplexity."""
    wanted = target()
    require("rlhf", f"ppo-{base.seed}")
    figures: Figures = {}
    for arm, (_, coef) in PTX.items():
        texts = [f"ptx.path={base.folder / 'documents.jsonl'}", "ptx.coef=1.0", "ptx.batch_size=8"]
        figures[arm] = train_ppo(base, arm, [f"kl.coef={coef}", *texts])
    for arm, coef in ADAPTIVE.items():
        steered = [f"kl.coef={coef}", f"kl.target={wanted}", *STEERED]
        figures[arm] = {**train_ppo(base, arm, steered), "target": wanted}
    for arm, coef in LONGER.items():
        figures[arm] = train_ppo(base, arm, [f"kl.coef={coef}", *UNSTEERED])
    for arm in (*ARMS, *PTX, *ADAPTIVE, *LONGER):
        figures.setdefault(arm, {}).update(language(base, folder_of(arm, base.seed)))
    return figures


def target() -> float:
    """Nats a reply: what FIXED's coefficient came to on the development seed.

    Raises UserError where that was not run yet.
    """
    found = read_results("rlhf").get(f"ppo-{DEVELOPMENT}")
    if found is None:
        raise UserError(f"run the cell ppo-{DEVELOPMENT} first; its KL is the adaptive coefficient's target")
    return round(float(found[FIXED]["kl_of_last_third"]), 1)


# ---------------------------------------------------------------- the tables


def table(results: Mapping[str, Figures]) -> str:
    """Over-optimisation, the monitor, direct methods, the tax and the KL's target; means over the five seeds."""
    parts = [over_optimisation(results), monitor(results), best_of_n(results), direct_table(results)]
    return "\n\n".join(part for part in [*parts, tax_table(results), target_table(results)] if part)


def of_stage(results: Mapping[str, Figures], stage: str) -> dict[int, Figures]:
    """The cells of a stage by seed, without the development seed's."""
    seeds = [seed for seed in SEEDS if seed != DEVELOPMENT]
    return {seed: results[f"{stage}-{seed}"] for seed in seeds if f"{stage}-{seed}" in results}


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard error."""
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range."""
    if not values:
        return "-"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def over_optimisation(results: Mapping[str, Figures]) -> str:
    """Of every PPO arm: gold at its highest and at the end, the KL of both, and how many runs turned; where Gao's
    fit turns, of the runs that went so far."""
    cells = list(of_stage(results, "ppo").values())
    if not cells:
        return ""
    start = shown([cell["kl 0"]["curve"]["start"] for cell in cells])
    lines = [
        f"PPO against the proxy, {len(cells)} seeds; gold at the start, on all validation prompts, {start}\n",
        "| arm | turned | highest gold | at a KL of | gold at the end | proxy at the end | KL at the end "
        "| Gao's turn d*², where it was reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        curves = [cell[arm]["curve"] for cell in cells]
        turns = [turn for turn in map(turn_within, curves) if turn is not None]
        columns = [shown([curve[name] for curve in curves]) for name in ("peak", "kl", "last")]
        columns += [
            shown([curve["proxy"][-1] for curve in curves]),
            shown([curve["last_kl"] for curve in curves], 1),
        ]
        columns.append(f"{shown(turns, 1)} ({len(turns)} of {len(curves)})")
        lines.append(f"| {arm} | {sum(c['turned'] for c in curves)} of {len(curves)} | {' | '.join(columns)} |")
    changes = []
    for arm in [arm for arm in ARMS if arm != "kl 0"]:
        gains = [cell[arm]["curve"]["last"] - cell["kl 0"]["curve"]["last"] for cell in cells]
        changes.append(f"{arm}: {shown(gains)}")
    return "\n".join([*lines, "", f"Gold at the end over kl 0, by seed: {'; '.join(changes)}"])


def monitor(results: Mapping[str, Figures]) -> str:
    """When the monitor fired, with the gold score and by the rules that need none; how long before gold turned.

    The runs of the target's table are left out: an adaptive coefficient pulls the KL back and gold with it, and all
    of them look less often than the runs that the thresholds were fixed on.
    """
    cells = [cell for stage in ("ppo", "tax") for cell in of_stage(results, stage).values()]
    runs = [cell[arm] for cell in cells for arm in (*ARMS, *PTX) if "alarms" in cell.get(arm, {})]
    if not runs:
        return ""
    turned = sum(found["curve"]["turned"] for found in runs)
    kinds = ("before", "after", "late", "missed", "quiet", "false")
    lines = [
        f"The monitor on {len(runs)} PPO runs, of which {turned} turned\n",
        "| rules | before the turn | before the fall shows | late | missed | quiet, did not turn | false alarm "
        "| first alarm to the turn, updates, median (range) | the same in nats |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, with_gold in (("all", True), ("those without gold", False)):
        verdicts = [verdict(found["curve"], found["alarms"], with_gold=with_gold) for found in runs]
        leads = [lead(found["curve"], found["alarms"], with_gold=with_gold) for found in runs]
        columns = [str(verdicts.count(kind)) for kind in kinds]
        columns += [spread([one[0] for one in leads if one is not None], 0)]
        columns += [spread([one[1] for one in leads if one is not None], 1)]
        lines.append(f"| {label} | {' | '.join(columns)} |")
    rules = sorted({rule for found in runs for rule in found["alarms"]})
    fired = {rule: [found["curve"]["turned"] for found in runs if rule in found["alarms"]] for rule in rules}
    said = "; ".join(f"{rule} {sum(runs)} and {len(runs) - sum(runs)}" for rule, runs in fired.items())
    return "\n".join([*lines, "", f"Rules that fired, in runs that turned and in others: {said}"])


def best_of_n(results: Mapping[str, Figures]) -> str:
    """Gold and proxy of best-of-n by the proxy."""
    cells = [cell["reward_model"] for cell in of_stage(results, "base").values()]
    if not cells:
        return ""
    lines = [
        f"The proxy orders replies as gold does in {shown([100 * c['agrees_with_gold'] for c in cells], 1)}%\n",
        "| best of n by the proxy | KL | gold | proxy |",
        "|---|---|---|---|",
    ]
    for number, (size, kl, _, _) in enumerate(cells[0]["best_of_n"]):
        columns = [shown([cell["best_of_n"][number][at] for cell in cells]) for at in (2, 3)]
        lines.append(f"| {size} | {kl:.2f} | {' | '.join(columns)} |")
    return "\n".join(lines)


def direct_table(results: Mapping[str, Figures]) -> str:
    """Direct methods: gold, proxy and KL at every checkpoint."""
    cells = list(of_stage(results, "direct").values())
    if not cells:
        return ""
    lines = ["| method | updates | KL | gold | proxy |", "|---|---|---|---|---|"]
    for name in cells[0]:
        for number, row in enumerate(cells[0][name]):
            columns = [shown([cell[name][number][at] for cell in cells]) for at in (1, 2, 3)]
            lines.append(f"| {name} | {row[0]} | {' | '.join(columns)} |")
    return "\n".join(lines)


def tax_table(results: Mapping[str, Figures]) -> str:
    """Perplexity on held-out text after each arm, and what pretraining's texts in the loss save of it."""
    beside = of_stage(results, "ppo")
    start = {seed: cell["perplexity"] for seed, cell in of_stage(results, "base").items()}
    cells = {s: cell for s, cell in of_stage(results, "tax").items() if s in beside and s in start}
    if not cells:
        return ""
    lines = [
        f"Perplexity a token on held-out text; at the start {shown([start[s] for s in cells], 1)}\n",
        "| arm | perplexity | times the start's | gold at the end |",
        "|---|---|---|---|",
    ]
    for arm in (*ARMS, *PTX):
        found = {seed: cell[arm] for seed, cell in cells.items()}
        curves = [(beside if arm in ARMS else cells)[seed][arm]["curve"] for seed in cells]
        columns = [
            shown([figures["perplexity"] for figures in found.values()], 1),
            shown([figures["perplexity"] / start[seed] for seed, figures in found.items()]),
            shown([curve["last"] for curve in curves]),
        ]
        lines.append(f"| {arm} | {' | '.join(columns)} |")
    for arm, (plain, _) in PTX.items():
        saved = [cell[arm]["perplexity"] - cell[plain]["perplexity"] for cell in cells.values()]
        lines += ["", f"{arm} less {plain}, by seed: {shown(saved, 1)}"]
    return "\n".join(lines)


def target_table(results: Mapping[str, Figures]) -> str:
    """KL over the last third of updates against the target, fixed coefficient and adaptive: its mean, and how much
    of the time it was near, by blocks of updates."""
    cells = of_stage(results, "tax")
    if not cells:
        return ""
    wanted = next(iter(cells.values()))[next(iter(ADAPTIVE))]["target"]
    lines = [
        f"KL over the last third of the run; the target is {wanted:g} nats a reply\n",
        f"| coefficient | updates | KL | mean within 20% of the target | blocks of {BLOCK} updates within 20% |",
        "|---|---|---|---|---|",
    ]
    for arm in (*[arm for arm, (coef, off) in ARMS.items() if coef and not off], *LONGER, *ADAPTIVE):
        found = [results.get(f"ppo-{seed}", {}) if arm in ARMS else cell for seed, cell in cells.items()]
        runs = [cell[arm] for cell in found if arm in cell]
        if not runs:
            continue
        held = sum(near(run["kl_of_last_third"], wanted) for run in runs)
        blocks = [fmean(near(kl, wanted) for kl in run["kl_of_blocks"]) for run in runs]
        first, last = runs[0]["kl_updates"]
        kls = shown([run["kl_of_last_third"] for run in runs])
        share = shown([100 * block for block in blocks], 0)
        lines.append(f"| {arm} | {first} to {last} | {kls} | {held} of {len(runs)} | {share}% |")
    return "\n".join(lines)


def near(kl: float, wanted: float) -> bool:
    """Within 20% of the target."""
    return abs(kl / wanted - 1) <= 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the texts are, which are not part of the product."""
    parser.add_argument("--data", default=".", help=f"the folder that holds {HH} and {GSM8K}")


if __name__ == "__main__":
    main("rlhf", cells=CELLS, run=run, table=table, add_arguments=add_arguments)
