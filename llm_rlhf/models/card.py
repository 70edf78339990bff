"""The model card of a checkpoint: README.md in the hub's format, with all that is needed to repeat the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from experiment.config import to_dict, to_yaml
from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf.models.loading import model_folder
from llm_rlhf.models.lora import ADAPTER

CARD = "README.md"
CARDED = ("policy", "merged", "reward_model", "process_reward_model")
"""Folders of a checkpoint that others than the run itself read."""

Writers = Mapping[str, Callable[[Path], None]]

TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")"""
SCORER = """\
from llm_rlhf.rewards.reward_model import Scorer

# [texts, heads, objectives]
scores, lengths = Scorer.from_pretrained("THIS_FOLDER").scores(["a prompt"], ["an answer"])"""
STEP_SCORER = """\
from llm_rlhf.rewards.process_reward import StepScorer

logits = StepScorer.from_pretrained("THIS_FOLDER").step_logits(["a prompt"], ["a step\\nand another"])"""


def with_cards(run: Run, folders: Writers) -> dict[str, Callable[[Path], None]]:
    """A checkpoint's writers, of which those of `CARDED` folders leave a card beside the model.

    The evaluation is the last one that the run has logged before the checkpoint.
    """

    def carded(write: Callable[[Path], None]) -> Callable[[Path], None]:
        def write_both(folder: Path) -> None:
            write(folder)
            (folder / CARD).write_text(model_card(run, folder), encoding="utf-8")

        return write_both

    return {name: carded(write) if name in CARDED else write for name, write in folders.items()}


def model_card(run: Run, folder: Path) -> str:
    """The card of the model in a checkpoint's folder."""
    config = to_dict(run.config)
    start = (config.get("model") or {}).get("path")
    kind = run.recipe.rpartition("/")[2]
    about: dict[str, Any] = {"library_name": "transformers", "tags": ["tandem", kind]}
    base = base_model(start)
    if base is not None:
        about["base_model"] = base
    example, what = _use_of(folder)
    if example is TRANSFORMERS:
        about["pipeline_tag"] = "text-generation"
    named = list(dict.fromkeys(data_names(config)))
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---",
        f"# {run.folder.name}",
        f"{what}, trained with Tandem's recipe `{run.recipe}`"
        + (f" from `{start}`." if start else ", from a new model."),
        f"Data: {', '.join(f'`{name}`' for name in named)}." if named else "",
        f"## How to load it\n\n{_fenced(example, 'python')}",
        _evaluation(run.folder / "metrics.jsonl"),
        f"## Configuration\n\n{_fenced(to_yaml(run.config, run.recipe), 'yaml')}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_model(path: str | None) -> str | None:
    """The hub name that a model.path means, or that the card of its folder gives; None where there is none.

    The hub takes no folder's name here. A start that is gone by now says nothing, either.
    """
    if path is None:
        return None
    try:
        source = model_folder(path)
    except UserError:
        return None
    if not Path(source).exists():
        return source
    found = front_matter(Path(source) / CARD).get("base_model")
    return found if isinstance(found, str) else None


def front_matter(card: Path) -> dict[str, Any]:
    """What stands at a card's beginning as YAML; nothing where there is no card, or none that can be read."""
    try:
        _, between, _ = card.read_text(encoding="utf-8").split("---\n", maxsplit=2)
        found = yaml.safe_load(between)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def data_names(config: Mapping[str, Any]) -> Iterator[str]:
    """Names of the data files that a configuration mentions, and of a task that makes its own data."""
    task = config.get("task") or {}
    if task.get("data"):
        yield Path(task["data"]).name
    elif task:
        yield f"{task['name']} (generated)"
    for section, values in config.items():
        if section == "model" or not isinstance(values, Mapping):
            continue
        for name, value in values.items():
            if (name == "path" or name.endswith("_path")) and isinstance(value, str) and value:
                yield Path(value).name


def _use_of(folder: Path) -> tuple[str, str]:
    """How a folder's model is loaded, and what it is."""
    if (folder / "process.json").is_file():
        return STEP_SCORER, "A process reward model (a score for every step of an answer)"
    if (folder / "reward.json").is_file():
        return SCORER, "A reward model"
    if (folder / ADAPTER).is_file():
        return TRANSFORMERS, "A low-rank adapter (peft) of a causal language model"
    return TRANSFORMERS, "A causal language model"


def _evaluation(metrics: Path) -> str:
    """The last evaluation in a run's metrics, as a table; "" where there is none."""
    lines = reversed(metrics.read_text(encoding="utf-8").splitlines())
    row: dict[str, Any] = next((json.loads(line) for line in lines if '"eval/' in line), {})
    found = [f"| {name[5:]} | {float(value):.6g} |" for name, value in row.items() if name.startswith("eval/")]
    if not found:
        return ""
    return "\n".join([f"## Evaluation at step {row['global_step']}", "", "| metric | value |", "|---|---|", *found])


def _fenced(text: str, language: str) -> str:
    """A block of code, between more backticks than it holds."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
