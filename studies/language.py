"""What the language studies share: an arm is a shipped configuration with a few overrides, trained and judged."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.cells import RUNS, Figures

if TYPE_CHECKING:
    from torch import Tensor

    from llm_rlhf.tasks.task import Task
    from tandem.recipes import Plan

CONFIGS = Path(__file__).parent.parent / "configs" / "llm_rlhf"


@dataclass(frozen=True)
class Arm:
    """A configuration under configs/llm_rlhf and what is changed in it."""

    config: str
    overrides: tuple[str, ...] = ()


def plan_arm(arm: Arm, folder: Path, overrides: Sequence[str]) -> Plan:
    """What `tandem train` would make of an arm that is to be trained into `folder`."""
    from tandem.recipes import read_plan

    common = [f"run.folder={folder}", "run.wandb=disabled", "run.checkpoint_every=100000", "validation.every=0"]
    return read_plan(CONFIGS / f"{arm.config}.yaml", [*common, *arm.overrides, *overrides])


def train_arm(arm: Arm, folder: Path, overrides: Sequence[str]) -> Path:
    """Train one arm into `folder`, as `tandem train` would; returns the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    plan = plan_arm(arm, folder, overrides)
    plan.module.train(plan.config)
    return folder


def judge_arm(
    folder: Path,
    splits: Sequence[str],
    samples: int,
    *,
    beta: float | None = None,
    reference: Path | None = None,
    seed: int = 10_000,
) -> Figures:
    """Test figures of a trained arm, with what it cost. beta, reference, seed: see `EvaluateConfig`."""
    from experiment.metrics import read_metrics
    from llm_rlhf.evaluate import EvaluateConfig, evaluate_run

    config = EvaluateConfig(
        splits=tuple(splits),
        samples=samples,
        seed=seed,
        beta=beta,
        reference=None if reference is None else str(reference),
    )
    judged = evaluate_run(folder, config)
    last = read_metrics(folder / "metrics.jsonl")[-1]
    cost = {name: last[name] for name in ("samples", "tokens", "global_step", "time/elapsed") if name in last}
    return {"judged": judged, "cost": cost}


def judge_model(model: Path, task: Task, splits: Sequence[str], samples: int, *, reference: Path) -> Figures:
    """Test figures of a plain transformers folder, whoever trained it: what `judge_arm` measures of a run."""
    from llm_rlhf.evaluate import EvaluateConfig, evaluate_policy
    from llm_rlhf.models.causal import LanguagePolicy
    from llm_rlhf.models.tokenizer import load_tokenizer

    policy, tokenizer = LanguagePolicy.from_pretrained(model).eval(), load_tokenizer(model)
    start = LanguagePolicy.from_pretrained(reference).eval()
    config = EvaluateConfig(samples=samples)
    return {
        split: evaluate_policy(policy, tokenizer, task, split=split, config=config, reference=start)
        for split in splits
    }


def run_arms(
    study: str,
    cell: str,
    *,
    base: Arm,
    arms: Mapping[str, Arm],
    common: Sequence[str],
    splits: Sequence[str],
    samples: int,
) -> Figures:
    """The base model, then every arm from it (an arm whose overrides say model.path= starts from nothing)."""
    import torch

    torch.set_num_threads(1)
    start = train_arm(base, RUNS / f"{study}-{cell}-base", common)
    figures: Figures = {"base": judge_arm(start, splits, samples)}
    for name, arm in arms.items():
        fresh = "fresh" in name
        folder = RUNS / f"{study}-{cell}-{'-'.join(re.findall('[a-z0-9]+', name.lower()))}"
        train_arm(arm, folder, [*common, *([] if fresh else [f"model.path={start}"])])
        figures[name] = judge_arm(folder, splits, samples)
    return figures


def column(results: Mapping[str, Figures], arm: str, split: str, name: str) -> list[float]:
    """One figure of one arm over all cells that have it."""
    found: list[Any] = [cell[arm]["judged"][split].get(name) for cell in results.values() if arm in cell]
    return [float(value) for value in found if value is not None]


@dataclass(frozen=True)
class Drawn:
    """N completions of each of P prompts. rewards, likelihoods (nats): [P, N]."""

    prompts: list[str]
    completions: list[list[str]]
    rewards: Tensor
    likelihoods: Tensor


def draw(base: Path, task: Task, each: int, *, seed: int, block: int = 256) -> Drawn:
    """Completions of the task's training prompts by the base model, scored by the task's own reward."""
    import torch

    from llm_rlhf.models.causal import build_policy
    from llm_rlhf.models.generation import GenerationConfig
    from llm_rlhf.models.loading import ModelConfig
    from llm_rlhf.online.experience import build_sampler
    from llm_rlhf.online.recording import texts_of

    policy, tokenizer = build_policy(ModelConfig(path=str(base)), alphabet=task.alphabet)
    sampler = build_sampler(policy, tokenizer, task, rewards={}, generation=GenerationConfig(), seed=seed)
    completions: list[list[str]] = []
    rewards, likelihoods = [], []
    for begin in range(0, len(task.train), block):
        rows = range(begin, min(begin + block, len(task.train)))
        samples, scores = sampler.draw(rows, samples_per_prompt=each, drawn_before=begin * each)
        texts = texts_of(samples, tokenizer)[1]
        completions += [texts[first : first + each] for first in range(0, len(texts), each)]
        rewards.append(scores.total.view(-1, each))
        likelihoods.append(samples.log_probs.sum(1).view(-1, each))
    prompts = [example.prompt for example in task.train]
    return Drawn(prompts, completions, torch.cat(rewards), torch.cat(likelihoods))


def require_trl(python: str | None) -> str:
    """The interpreter, if TRL 1.16 is there: found out before a cell has spent minutes."""
    if python is None:
        raise SystemExit("--trl: give the python of an environment with TRL 1.16.0")
    asked = [python, "-c", "import importlib.metadata as m; print(m.version('trl'))"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError as error:
        raise SystemExit(f"--trl: {python} cannot be run ({error.strerror})") from error
    if not told.startswith("1.16."):
        raise SystemExit(f"--trl: {python} has {f'TRL {told}' if told else 'no TRL'}; 1.16.0 is needed")
    return python


@contextmanager
def peer_process(
    python: str, settings: Figures, folder: Path
) -> Iterator[tuple[Callable[[], Figures], Callable[[list[Any]], None]]]:
    """`studies.peers.trl_methods` in TRL's environment: what it says next, and how it is answered.

    What it prints is in FOLDER/peer.log.
    """
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    program, log = Path(__file__).parent / "peers" / "trl_methods.py", folder / "peer.log"
    with log.open("w") as printed:
        process = subprocess.Popen(
            [python, str(program), str(folder / "settings.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert process.stdin is not None
    assert process.stdout is not None
    told, heard = process.stdin, process.stdout

    def hear() -> Figures:
        line = heard.readline()
        if not line:
            raise SystemExit(f"TRL ended before its time; its own message is in {log}")
        message: Figures = json.loads(line)
        return message

    def tell(answer: list[Any]) -> None:
        told.write(json.dumps(answer) + "\n")
        told.flush()

    try:
        yield hear, tell
    finally:
        process.kill()
        process.wait()
