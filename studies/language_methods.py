"""PPO, GRPO, RLOO, rejection sampling, ILQL and best of n on two tasks, beside TRL's GRPO and RLOO.

    python -m studies.language_methods --trl PYTHON --data gsm8k_train.jsonl.gz [--share 1/2]

All cells are to be run from one unchanged tree: what is compared is then one and the same program. Where only one
arm's part of it has changed since, `--cell CELL --arm ARM` trains and judges that arm again and keeps the others,
provided that the base model comes out as it was.

PYTHON is that of an environment with TRL 1.16.0. Calculator with slips (six demonstrations of ten are wrong) and
random walks, five seeds each; a cell trains one base model and every method from it, on one thread. Methods that
draw may draw what the task's shipped PPO (calculator) or GRPO (walks) configuration does; ILQL draws nothing and
learns from the demonstrations and their rewards.

TRL runs in a process of its own (`studies.peers.trl_methods`): the same base model, the same prompts in the same
order, group size, updates, learning rate and its schedule, clip, gradient norm and KL coefficient as the arm that
`PEERS` names, and rewards by our own function. "GRPO, all groups" is GRPO that learns from flat groups too (their
KL term), as TRL's does; TRL's KL term (k3 times the ratio) and ours (k2) then have one and the same gradient. So
have both RLOOs, but for its size: with one step a rollout ratios are 1 and clip nothing, ours is the mean over a
rollout's tokens, TRL's sums the tokens of an answer and is the mean over answers, so it is as many times larger as
an answer has tokens in the mean. Adam does not see that, the limit of the gradient's norm does: TRL's RLOO is given
ours times the mean length of the base model's answers. TRL's checkpoints are plain transformers folders, judged as
ours are.

Reward is the mean at temperature 1, KL(policy || base) in nats an answer, both of the same samples. At equal KL:
what a run earned within a KL budget is read off its own checkpoints (`reward_within`), at the largest KL that both
runs reached and at half of it.

Best of n keeps, of n answers of the base model, the one that a reward model likes best, which was trained on the
base's answers to training prompts; or the one that the base finds likeliest. Chosen by the task's verifier it is
honest for walks, which can be tried; for sums it would ask the answer key, and stands there as a bound ("oracle").

Development used seeds from 100 on.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from studies.cells import RUNS, Figures, difference, main, mean_and_error, require, result_path
from studies.language import (
    Arm,
    Drawn,
    column,
    draw,
    judge_arm,
    judge_model,
    peer_process,
    plan_arm,
    require_trl,
    train_arm,
)
from studies.language_methods_arms import HALVES, PEERS, SAVED, Half

if TYPE_CHECKING:
    from llm_rlhf.tasks.task import Task
    from llm_rlhf.train_grpo import TrainGRPOConfig

STUDY = "language_methods"
SEEDS = range(5)
REJECTION = "rejection sampling"
LOOKS = (1, 2, 4, 8, 16, 24, 32, 40)
"""Which of the SAVED checkpoints of a run are judged: most of the KL is spent early."""
BETAS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""How strongly ILQL steers; 0 is its language model alone."""
CHOOSING = 20_000
"""Seed of the draws by which that is chosen: walks' validation prompts are those that are judged afterwards."""
SIZES, SHOWN = (1, 2, 4, 8, 16), 8
"""n of best of n, and the one that the table shows."""
BY_REWARD_MODEL, BY_LIKELIHOOD, BY_VERIFIER = "reward model", "likelihood", "verifier"
BEST_OF_N = (BY_REWARD_MODEL, BY_LIKELIHOOD, BY_VERIFIER)
VERIFIERS = {"calculator": "oracle", "walks": "verifier"}


PAIRS = (("GRPO", "TRL GRPO"), ("GRPO, all groups", "TRL GRPO"), ("RLOO", "TRL RLOO"), ("PPO", "TRL GRPO"))
CELLS = [f"{half}-{seed}" for half in HALVES for seed in SEEDS]


# ---------------------------------------------------------------- a cell


@dataclass(frozen=True)
class Cell:
    """One task and one seed: overrides of every arm, the task, and the run of the model that all start from."""

    name: str
    half: Half
    common: tuple[str, ...]
    task: Task
    base: Path

    @property
    def start(self) -> Path:
        """The base model's transformers folder."""
        return self.base / "checkpoints" / "last" / "policy"

    def folder(self, arm: str) -> Path:
        """Where an arm is trained."""
        return RUNS / f"language_methods-{self.name}-{'-'.join(re.findall('[a-z0-9]+', arm.lower()))}"

    def judge(self, model: Path, splits: Sequence[str]) -> Figures:
        """A transformers folder, ours or TRL's."""
        return judge_model(model, self.task, splits, self.half.samples, reference=self.start)


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Every method of one task and one seed, or the one that is to be trained again."""
    torch.set_num_threads(1)
    if options.arm is not None:
        return run_again(cell, options)
    python = require_trl(options.trl)
    chosen, seconds = begin(cell, options.data)
    half = chosen.half
    judged = chosen.judge(chosen.start, half.splits)
    figures: Figures = {
        "data": described(chosen.task, options.data),
        "base": {"judged": judged, "cpu_seconds": seconds},
        "best of n": best_of_n(chosen),
    }
    for arm in half.online:
        figures[arm] = train_online(chosen, arm)
    for arm in PEERS:
        figures[arm] = train_peer(chosen, arm, python, answer_length=judged[half.splits[0]]["mean_length"])
    figures[REJECTION] = train_rejection(chosen)
    figures["ILQL"] = train_ilql(chosen)
    return figures


def run_again(cell: str, options: argparse.Namespace) -> Figures:
    """The cell's figures with one arm's measured anew."""
    require(STUDY, cell)
    before = json.loads(result_path(STUDY, cell).read_text(encoding="utf-8"))
    figures: Figures = before["figures"]
    chosen, _ = begin(cell, options.data)
    arms = (*chosen.half.online, REJECTION)
    if options.arm not in arms:
        raise SystemExit(f"--arm: {options.arm} is none of {', '.join(arms)}")
    if chosen.judge(chosen.start, chosen.half.splits) != figures["base"]["judged"]:
        raise SystemExit(f"{cell}: the base model is not what it was; run the whole cell again")
    figures[options.arm] = (
        train_rejection(chosen) if options.arm == REJECTION else train_online(chosen, options.arm)
    )
    first = {name: before[name] for name in ("command", "date", "seconds")}
    return {**figures, "first": figures.get("first", first)}


def begin(cell: str, data: str | None) -> tuple[Cell, float]:
    """Train the base model; returns the cell and the processor seconds that took.

    SystemExit where the calculator's sums are not there: its task would generate others.
    """
    from llm_rlhf.tasks.task import build_task

    name, seed = cell.rsplit("-", 1)
    half = HALVES[name]
    common = (*half.common, f"run.seed={seed}", f"task.seed={seed}")
    if name == "calculator":
        if data is None or not Path(data).is_file():
            raise SystemExit(f"--data: {cell} needs GSM8K's train.jsonl or .jsonl.gz, got {data or 'nothing'}")
        common = (*common, f"task.data={data}")
    folder = RUNS / f"language_methods-{cell}-base"
    task = build_task(plan_arm(half.base, folder, common).config.task)
    seconds = timed(half.base, folder, common)
    return Cell(cell, half, (*common, f"model.path={folder}"), task, folder), seconds


def described(task: Task, data: str | None) -> Figures:
    """What a task says of its data (of the file its name, wherever it lay), and how many prompts it has."""
    notes = [note if data is None else note.replace(data, Path(data).name) for note in task.notes]
    prompts = {"train": len(task.train), **{split: len(examples) for split, examples in task.splits.items()}}
    return {"notes": notes, "prompts": prompts}


def timed(arm: Arm, folder: Path, overrides: Sequence[str]) -> float:
    """Train an arm; returns the processor seconds that took."""
    began = time.process_time()
    train_arm(arm, folder, overrides)
    return time.process_time() - began


def train_online(cell: Cell, arm: str) -> Figures:
    """An arm that draws while it learns."""
    from experiment.metrics import read_metrics

    folder = cell.folder(arm)
    seconds = timed(cell.half.online[arm], folder, cell.common)
    drawn = int(read_metrics(folder / "metrics.jsonl")[-1]["samples"])
    return {**along(cell, folder / "checkpoints", "policy"), **within_budget(cell, drawn), "cpu_seconds": seconds}


def within_budget(cell: Cell, drawn: int) -> Figures:
    """How many completions a method drew, which must be what it may."""
    if drawn != cell.half.budget:
        raise SystemExit(f"{cell.name}: {drawn} completions were drawn, not {cell.half.budget} as by the others")
    return {"drawn": drawn}


def along(cell: Cell, checkpoints: Path, inner: str) -> Figures:
    """The last checkpoint of a run on every split, and the curve of its LOOKS on the first."""
    folders = {int(n[0]): path / inner for path in checkpoints.iterdir() if (n := re.findall(r"\d+$", path.name))}
    if len(folders) != SAVED:
        raise SystemExit(f"{checkpoints}: {len(folders)} checkpoints and not {SAVED}")
    steps = [0, *(sorted(folders)[number - 1] for number in LOOKS)]
    judged: Figures = {}
    curve = []
    for step in steps:
        splits = cell.half.splits if step == steps[-1] else cell.half.splits[:1]
        judged = cell.judge(folders[step] if step else cell.start, splits)
        look = judged[splits[0]]
        curve.append({"step": step, **{name: look[name] for name in ("kl", "sampled", "greedy", "entropy")}})
    return {"judged": judged, "curve": curve}


def train_rejection(cell: Cell) -> Figures:
    """Rejection-sampling fine-tuning: as many completions a prompt and round as the budget has room for."""
    half, folder = cell.half, cell.folder("rejection")
    each = half.budget // (half.rounds * len(cell.task.train))
    drawing = f"rejection.samples_per_prompt={each}"
    seconds = timed(half.rejection, folder, [*cell.common, drawing])
    judged = judge_arm(folder, half.splits, half.samples, reference=cell.start)
    return {**judged, "drawn": each * half.rounds * len(cell.task.train), "cpu_seconds": seconds}


def train_ilql(cell: Cell) -> Figures:
    """ILQL on the demonstrations, steered as strongly as is best on validation prompts, by draws of their own."""
    half, folder = cell.half, cell.folder("ilql")
    seconds = timed(half.ilql, folder, cell.common)
    looks = {beta: judge_arm(folder, ["validation"], half.samples, beta=beta, seed=CHOOSING) for beta in BETAS}
    validation = {beta: look["judged"]["validation"]["sampled"] for beta, look in looks.items()}
    best = max(BETAS, key=lambda beta: validation[beta])
    judged = judge_arm(folder, half.splits, half.samples, beta=best, reference=cell.start)
    return {**judged, "beta": best, "validation": validation, "drawn": 0, "cpu_seconds": seconds}


# ---------------------------------------------------------------- best of n


def write_comparisons(drawn: Drawn, path: Path, *, most: int, seed: int) -> int:
    """Comparisons of different completions with different rewards, at most `most` of a prompt; returns how many."""
    rng = random.Random(f"comparisons {seed}")
    lines = []
    for prompt, texts, rewards in zip(drawn.prompts, drawn.completions, drawn.rewards.tolist(), strict=True):
        earned = dict(zip(texts, rewards, strict=True))
        pairs = [(good, bad) for good in earned for bad in earned if earned[good] > earned[bad]]
        for good, bad in rng.sample(pairs, min(most, len(pairs))):
            lines.append(json.dumps({"prompt": prompt, "chosen": good, "rejected": bad}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def best_of_n(cell: Cell) -> Figures:
    """What the best of n of the base model's completions earns, by what it is chosen by, and its KL's bound."""
    from llm_rlhf.rewards.reward_model import reward_function
    from policy_core.selection import best_of_n_kl, expected_best_of_k

    half, seed, folder = cell.half, int(cell.name.rpartition("-")[2]), cell.folder("reward model")
    pairs = cell.folder("comparisons") / "pairs.jsonl"
    each, tried = min(half.scored, half.budget // len(cell.task.train)), max(SIZES[-1], half.samples)
    began = time.process_time()
    answers = draw(cell.base, cell.task, each, seed=seed)
    compared = write_comparisons(answers, pairs, most=half.comparisons, seed=seed)
    train_arm(half.scorer, folder, [f"run.seed={seed}", f"model.path={cell.base}", f"pairs.path={pairs}"])
    seconds = time.process_time() - began
    score = reward_function(folder)
    earned: Figures = {}
    for split in half.splits:
        drawn = draw(cell.base, replace(cell.task, train=cell.task.splits[split]), tried, seed=10_000 + seed)
        asked = [prompt for prompt in drawn.prompts for _ in range(tried)]
        scores = score(asked, [text for texts in drawn.completions for text in texts])
        by_model = torch.tensor(scores, dtype=torch.float64).view_as(drawn.rewards)
        chosen_by = {BY_REWARD_MODEL: by_model, BY_LIKELIHOOD: drawn.likelihoods, BY_VERIFIER: drawn.rewards}
        earned[split] = {
            name: [float(expected_best_of_k(drawn.rewards, k=k, scores=by).mean()) for k in SIZES]
            for name, by in chosen_by.items()
        }
    return {
        "n": SIZES,
        "earned": earned,
        "kl_bound": [best_of_n_kl(k) for k in SIZES],
        "comparisons": compared,
        "drawn": each * len(cell.task.train),
        "cpu_seconds": seconds,
    }


# ---------------------------------------------------------------- TRL


def train_peer(cell: Cell, arm: str, python: str, *, answer_length: float) -> Figures:
    """TRL's trainer under our arm's settings, with our rewards and our order of prompts.

    answer_length   mean tokens of the base model's answers, EOS included: by so much TRL's RLOO gradient is larger
    """
    from llm_rlhf.data.texts import columns_of
    from llm_rlhf.rewards.functions import resolve

    trainer, ours = PEERS[arm]
    folder, train = cell.folder(arm), cell.task.train
    config = plan_arm(cell.half.online[ours], cell.folder(ours), cell.common).config
    shutil.rmtree(folder, ignore_errors=True)
    settings = peer_settings(cell, trainer, config, folder)
    if trainer == "rloo":
        settings["max_grad_norm"] *= answer_length
    columns = columns_of(train)
    rewards = resolve(cell.task.gold, own=cell.task.rewards, columns=list(columns))
    drawn = 0
    with peer_process(python, settings, folder) as (hear, tell):
        while "rows" in (message := hear()):
            rows, texts = message["rows"], message["completions"]
            given = {name: [values[row] for row in rows] for name, values in columns.items()}
            scores = rewards([train[row].prompt for row in rows], texts, given)
            pairs = zip(scores.total.tolist(), scores.scored.tolist(), strict=True)
            tell([reward if scored else None for reward, scored in pairs])
            drawn += len(texts)
    if message["updates"] != config.sampling.updates:
        raise SystemExit(f"{folder}: TRL made {message['updates']} updates, not {config.sampling.updates}")
    judged = along(cell, folder / "checkpoints", "")
    return {**judged, **within_budget(cell, drawn), **message, "max_grad_norm": settings["max_grad_norm"]}


def peer_settings(cell: Cell, trainer: str, config: TrainGRPOConfig, folder: Path) -> Figures:
    """What `studies.peers.trl_methods` reads; writes the prompts in the order in which our run draws for them."""
    from llm_rlhf.data.texts import Batches

    train = cell.task.train
    batches = Batches(len(train), config.sampling.prompts, seed=config.run.seed)
    rows = torch.cat([batches.next() for _ in range(config.sampling.updates)]).tolist()
    folder.mkdir(parents=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": train[row].prompt, "row": row}) + "\n" for row in rows))
    return {
        "trainer": trainer,
        "model": str(cell.start),
        "prompts": str(prompts),
        "output": str(folder / "checkpoints"),
        "updates": config.sampling.updates,
        "prompts_per_update": config.sampling.prompts,
        "group_size": config.grpo.group_size,
        "max_new_tokens": config.generation.max_new_tokens or cell.task.max_new_tokens,
        "temperature": config.generation.temperature,
        "learning_rate": config.ppo.learning_rate,
        "schedule": config.ppo.schedule,
        "max_grad_norm": config.ppo.max_grad_norm,
        "clip_range": config.ppo.clip_range,
        "kl_coef": config.kl.coef,
        "seed": config.run.seed,
        "save_every": config.run.checkpoint_every,
    }


# ---------------------------------------------------------------- the table


def reward_within(curve: Sequence[Mapping[str, float]], kl: float) -> float:
    """The most that a run earned within a KL budget: its checkpoints in order of their KL, joined by lines, the
    best so far at each (a run that went further may always stop earlier)."""
    points = sorted((max(look["kl"], 0.0), look["sampled"]) for look in curve)
    best = np.maximum.accumulate([reward for _, reward in points])
    return float(np.interp(kl, [spent for spent, _ in points], best))


def equal_kl(ours: Figures, theirs: Figures) -> float:
    """The largest KL that both runs reached."""
    return min(max(look["kl"] for look in run["curve"]) for run in (ours, theirs))


def differences(results: Mapping[str, Figures], ours: str, theirs: str) -> dict[str, list[float]]:
    """Ours less theirs, seed by seed: at the end, and within the same KL (all that both spent, and half of it)."""
    found: dict[str, list[float]] = {"reward": [], "kl": [], "within": [], "within_half": []}
    for cell in results.values():
        a, b = cell[ours], cell[theirs]
        shared = equal_kl(a, b)
        found["reward"].append(a["curve"][-1]["sampled"] - b["curve"][-1]["sampled"])
        found["kl"].append(a["curve"][-1]["kl"] - b["curve"][-1]["kl"])
        for name, kl in (("within", shared), ("within_half", shared / 2)):
            found[name].append(reward_within(a["curve"], kl) - reward_within(b["curve"], kl))
    return found


def table(results: Mapping[str, Figures]) -> str:
    """Every method, and the paired differences to TRL."""
    lines: list[str] = []
    for name, half in HALVES.items():
        cells = {cell: figures for cell, figures in results.items() if cell.startswith(name)}
        if cells:
            lines += [f"\n*{name}*, {len(cells)} seeds\n", *_methods(half, cells, verifier=VERIFIERS[name]), ""]
            lines += _comparisons(cells)
    return "\n".join(lines)


def _methods(half: Half, cells: Mapping[str, Figures], *, verifier: str) -> list[str]:
    headings = [f"{what}, {split}" for split in half.splits for what in ("sampled", "greedy", "KL")]
    lines = [f"| method | {' | '.join(headings)} | drawn | CPU s |", "|---" * (len(headings) + 3) + "|"]
    for arm in ("base", *half.online, *PEERS, REJECTION, "ILQL"):
        shown = []
        for split in half.splits:
            shown += [_mean(column(cells, arm, split, what), 100) for what in ("sampled", "greedy")]
            shown.append(_mean(column(cells, arm, split, "kl"), 1))
        lines.append(_row(arm, shown, [cell[arm] for cell in cells.values()]))
    found = [cell["best of n"] for cell in cells.values()]
    for chosen in BEST_OF_N:
        shown = []
        for split in half.splits:
            earned = [cell["earned"][split][chosen][SIZES.index(SHOWN)] for cell in found]
            shown += [_mean(earned, 100), "", f"at most {found[0]['kl_bound'][SIZES.index(SHOWN)]:.2f}"]
        named = verifier if chosen == BY_VERIFIER else chosen
        learned = found if chosen == BY_REWARD_MODEL else [{"drawn": 0, "cpu_seconds": 0.0}]
        lines.append(_row(f"best of {SHOWN}, {named}", shown, learned))
    return lines


def _row(name: str, shown: Sequence[str], costs: Sequence[Figures]) -> str:
    drawn = mean_and_error([cost.get("drawn", 0) for cost in costs])[0]
    seconds = mean_and_error([cost["cpu_seconds"] for cost in costs])[0]
    return f"| {name} | {' | '.join(shown)} | {drawn:,.0f} | {seconds:.0f} |"


def _comparisons(cells: Mapping[str, Figures]) -> list[str]:
    headings = ("reward at the end", "KL at the end", "reward within equal KL", "within half of it")
    lines = [f"| ours less TRL's (95% interval) | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    for ours, theirs in PAIRS:
        found = differences(cells, ours, theirs)
        shown = [
            difference(values, digits=2) if name == "kl" else difference(values, scale=100)
            for name, values in found.items()
        ]
        lines.append(f"| {ours} less {theirs} | {' | '.join(shown)} |")
    return lines


def _mean(values: Sequence[float], scale: float) -> str:
    """Mean and standard error (of one value, it alone), in percent where `scale` is 100."""
    mean, error = mean_and_error([scale * value for value in values])
    digits = 1 if scale == 100 else 2
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where GSM8K is, which is not part of the product, and TRL, which lives in its own environment."""
    parser.add_argument("--data", help="GSM8K's train.jsonl or .jsonl.gz, for the calculator's cells")
    parser.add_argument("--trl", metavar="PYTHON", help="of an environment with TRL 1.16.0")
    parser.add_argument("--arm", help="one of ours to train and judge again in a cell that has a result")


if __name__ == "__main__":
    main(STUDY, cells=CELLS, run=run, table=table, add_arguments=add_arguments)
