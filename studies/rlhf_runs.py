"""The runs of the study of RLHF, each by the recipe and the shipped configuration that a user would take."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiment.errors import UserError
from llm_rlhf.evaluate import EvaluateConfig, evaluate_policy, evaluate_run
from llm_rlhf.evaluation.frontier import best_of_n_rows, fit_bon
from llm_rlhf.evaluation.perplexity import perplexity, read_documents
from llm_rlhf.evaluation.subject import Decoding, Subject, load_subject
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.loading import ModelConfig, model_folder, new_language_model
from llm_rlhf.rewards.reward_model import reward_function
from llm_rlhf.tasks.rows import RowsConfig
from llm_rlhf.tasks.task import Task, TaskConfig, build_task
from studies.cells import RUNS, Figures, read_results
from studies.language import CONFIGS
from studies.rlhf_data import CONTEXT, REPLY_TOKENS, prepare, write_rows
from studies.rlhf_gold import gold

GOLD = Path(__file__).parent / "rlhf_gold.py"
PAIRS = 800  # comparisons, ties among them; a fifth is for validation
NOISE, TIE = 1.0, 0.3  # of the labels: standard deviation of a judged difference, and what counts as none
MODEL = ModelConfig(layers=2, width=128, heads=4, context=CONTEXT, activation="gelu_pytorch_tanh")
SIZES = (1, 2, 4, 8, 16)  # of best-of-n
ASKED = 100  # test prompts of best-of-n
DOCUMENTS = 120  # held out, of which the perplexity is taken


@dataclass(frozen=True)
class Base:
    """What the runs of one seed share; `folder` is that of its first cell."""

    folder: Path
    seed: int

    @classmethod
    def of(cls, seed: int) -> Base:
        """The base of a seed, whether it is there or yet to be made."""
        return cls(RUNS / f"rlhf-base-{seed}", seed)

    @property
    def model(self) -> Path:
        """The run of the starting policy."""
        return self.folder / "model"

    @property
    def proxy(self) -> Path:
        """The reward model's run."""
        return self.folder / "reward"

    def task(self) -> Task:
        """Prompts and the gold score, divided as the online runs divide them."""
        rows = RowsConfig(judge=f"{GOLD}:gold", validation=0.08, test=0.15, max_new_tokens=REPLY_TOKENS)
        return build_task(
            TaskConfig(name="rows", data=str(self.folder / "prompts.jsonl"), seed=self.seed, rows=rows)
        )

    def online(self) -> list[str]:
        """What a configuration with a task is told."""
        return [
            f"task.data={self.folder / 'prompts.jsonl'}",
            f"task.seed={self.seed}",
            f"task.rows.judge={GOLD}:gold",
            f"model.path={self.model}",
        ]

    def offline(self) -> list[str]:
        """What a configuration with pairs is told."""
        return [f"pairs.path={self.folder / 'pairs.jsonl'}", f"pairs.seed={self.seed}", f"model.path={self.model}"]

    def rewards(self, deviations: float = 0.0) -> str:
        """The override for the ensemble's mean, less so many of its heads' standard deviations.

        The unit is the proxy's standard deviation over the starting policy's replies, so that a KL coefficient is
        the same on every seed.
        """
        unit = 1.0 / float(self.figures()["reward_model"]["proxy_std"])
        weights = {str(self.proxy): round(unit, 4)}
        if deviations:
            weights[f"{self.proxy}:disagreement"] = round(-deviations * unit, 4)
        return f"rewards={json.dumps(weights)}"

    def figures(self) -> Figures:
        """What the seed's first cell measured. Raises UserError where it has not run."""
        found = read_results("rlhf").get(f"base-{self.seed}")
        if found is None or not (self.proxy / "checkpoints" / "last").exists():
            raise UserError(f"{self.folder}: run the cell base-{self.seed} first; this one starts from its models")
        return found


def train(config: str, folder: Path, seed: int, overrides: Sequence[str]) -> Path:
    """Run a shipped configuration into `folder`, as `tandem train` would; returns the folder."""
    from tandem.recipes import read_plan

    shutil.rmtree(folder, ignore_errors=True)
    common = [f"run.folder={folder}", f"run.seed={seed}", "run.wandb=disabled"]
    plan = read_plan(CONFIGS / f"{config}.yaml", [*common, *overrides])
    plan.module.train(plan.config)
    return folder


# ---------------------------------------------------------------- the start


def make_base(data: Path, base: Base, *overrides: str) -> Figures:
    """Texts, tokenizer and the starting policy; returns its figures. overrides: of rlhf_base."""
    shutil.rmtree(base.folder, ignore_errors=True)
    base.folder.mkdir(parents=True)
    tokenizer = prepare(data, base.folder, seed=base.seed)
    torch.manual_seed(base.seed)
    new = base.folder / "new"
    new_language_model(MODEL, tokenizer).save_pretrained(new)
    tokenizer.save_pretrained(str(new))
    pretrained = base.folder / "pretrained"
    common = [f"task.seed={base.seed}", f"task.data={base.folder / 'texts.jsonl'}", f"model.path={new}"]
    train("rlhf_base", pretrained, base.seed, [*common, *overrides])
    tuned = [f"task.seed={base.seed}", f"task.data={base.folder / 'replies.jsonl'}", f"model.path={pretrained}"]
    train("rlhf_sft", base.model, base.seed, tuned)
    subject = load_subject(base.model)
    task = base.task()
    figures = {
        split: evaluate_policy(
            subject.policy, subject.tokenizer, task, split=split, config=EvaluateConfig(splits=(split,), samples=4)
        )
        for split in ("validation", "test")
    }
    parameters = sum(parameter.numel() for parameter in subject.policy.parameters())
    before = {f"pretrained_{name}": value for name, value in language(base, pretrained).items()}
    return {"parameters": parameters, "gold": figures, **language(base, base.model), **before}


def label_pairs(base: Base) -> Figures:
    """Two replies of the starting policy to each of PAIRS training prompts, judged by a noisy reader of gold.

    He sees the difference of gold scores with normal noise, and calls it a tie where what he sees is small. Equal
    replies are left out. Returns how many comparisons there are and how often a label has gold's sign.
    """
    subject, rng = load_subject(base.model, batch_size=128), random.Random(f"labels {base.seed}")
    prompts = [str(example.prompt) for example in base.task().train]
    prompts = rng.sample(prompts, min(PAIRS, len(prompts)))
    decoding = Decoding(max_new_tokens=REPLY_TOKENS, temperature=1.0, samples=2, seed=base.seed)
    rows: list[dict[str, Any]] = []
    right = 0
    for prompt, (first, second) in zip(prompts, subject.complete(prompts, decoding), strict=True):
        if first == second or not first.strip() or not second.strip():
            continue
        one, other = gold([prompt] * 2, [first, second])
        assert one is not None
        assert other is not None
        seen = one - other + rng.gauss(0.0, NOISE)
        tie = abs(seen) < TIE
        chosen, rejected = (first, second) if seen > 0 else (second, first)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "tie": tie})
        right += not tie and (one - other) * seen > 0
    write_rows(base.folder / "pairs.jsonl", rows)
    ties = sum(row["tie"] for row in rows)
    return {"comparisons": len(rows), "ties": ties, "labels_right": right / (len(rows) - ties)}


def make_proxy(base: Base) -> Figures:
    """The reward model, and how far to trust it on replies to test prompts: it orders them as gold does how often,
    and best-of-n by it along the KL."""
    train("rlhf_reward", base.proxy, base.seed, base.offline())
    subject = load_subject(base.model, batch_size=64)
    prompts = [str(example.prompt) for example in base.task().splits["test"][:ASKED]]
    decoding = Decoding(max_new_tokens=REPLY_TOKENS, temperature=1.0, samples=max(SIZES), seed=base.seed + 1)
    replies = subject.complete(prompts, decoding)
    flat = [reply for several in replies for reply in several]
    asked = [prompt for prompt in prompts for _ in range(max(SIZES))]
    shape = (len(prompts), max(SIZES))
    truth = torch.tensor(gold(asked, flat), dtype=torch.float64).view(shape)
    score = torch.tensor(reward_function(base.proxy)(asked, flat), dtype=torch.float64).view(shape)
    apart = (truth[:, 0::2] - truth[:, 1::2]).flatten()
    judged = (score[:, 0::2] - score[:, 1::2]).flatten()
    rows = best_of_n_rows(truth, score, SIZES)
    fitted = fit_bon([row.kl for row in rows], [row.gold for row in rows if row.gold is not None], intercept=True)
    return {
        "agrees_with_gold": float(((apart * judged)[apart != 0] > 0).double().mean()),
        "gold_std": float(truth.std()),
        "proxy_std": float(score.std()),
        "best_of_n": [[row.step, row.kl, row.gold, row.proxy] for row in rows],
        "best_of_n_turning_point": fitted.turning_point,
    }


# ---------------------------------------------------------------- what came of it


def judge(run: Path) -> Figures:
    """Gold and the run's own reward on test prompts, KL, entropy, length of a finished online run."""
    found = evaluate_run(run, EvaluateConfig(splits=("test",), samples=4))["test"]
    names = ("greedy", "sampled", "sampled_interval", "kl", "entropy", "mean_length", "finished")
    return {**{name: found[name] for name in names}, "proxy": found["rewards"]["sampled"]}


def judge_checkpoints(base: Base, run: Path) -> list[list[float]]:
    """[update, KL, gold, proxy] of every checkpoint of a run, on test prompts; the KL is that to the start."""
    task, reference = base.task(), LanguagePolicy.from_pretrained(model_folder(base.model)).eval()
    found = []
    for folder in sorted(path for path in (run / "checkpoints").iterdir() if path.name.isdigit()):
        subject = load_subject(folder / "policy")
        figures = evaluate_policy(
            subject.policy,
            subject.tokenizer,
            task,
            split="test",
            config=EvaluateConfig(samples=4),
            reference=reference,
            rewards={str(base.proxy): 1.0},
        )
        row = [figures["kl"], figures["sampled"], figures["rewards"]["sampled"]]
        found.append([int(folder.name), *(round(float(number), 4) for number in row)])
    return found


def language(base: Base, run: Path) -> Figures:
    """Perplexity, a token and a byte, on documents that nothing was trained on."""
    documents = read_documents(base.folder / "held_out.jsonl")[:DOCUMENTS]
    subject: Subject = load_subject(run, batch_size=32)
    measures = perplexity(subject, documents).measures
    return {name: measures[name].value for name in ("perplexity", "byte_perplexity")}
