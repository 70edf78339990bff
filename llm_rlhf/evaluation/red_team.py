"""Red teaming: how often prompts make a policy break a rule, and a reward that teaches to write such prompts.

Perez 2022 (2202.03286) trains a red-team model by RL against a frozen target: what it writes is the target's
prompt, and its reward is whether the target's answer breaks a rule. `attacker_reward` is that reward; a file of a
few lines names it in the configuration of any recipe (docs/language_evaluation.md). Left alone such a policy finds
one attack and repeats it; the diversity bonus takes from an attack what is like the others of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiment.errors import UserError
from llm_rlhf.data.columns import (
    ColumnNames,
    kind_of,
    read_comparison,
    read_demonstration,
    read_feedback_row,
    read_prompt,
)
from llm_rlhf.data.files import Row, read_rows
from llm_rlhf.data.records import Comparison, Feedback
from llm_rlhf.evaluation.diversity import Unit, pieces, self_bleu
from llm_rlhf.evaluation.results import Measure, Result
from llm_rlhf.evaluation.subject import Decoding, Subject, load_subject, question_of
from llm_rlhf.rewards.functions import RewardFunction
from llm_rlhf.rewards.rules import Rule, judge, load_rule
from llm_rlhf.tasks.examples import Example

Target = Callable[[Sequence[str]], list[str]]
"""Prompts -> one answer each; the target of an attack."""
SHORT = Decoding(max_new_tokens=64)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file of rows, texts or conversations (`Chat`), as training reads them.

    Rows are prompts with or without completions, comparisons, thumbs, or `messages`, whose prompt ends before the
    assistant's first answer. Comparisons and thumbs that training leaves out (equal or empty answers) are left out.
    Raises UserError naming the row.
    """
    prompts = [record.prompt for row in read_rows(path) if not isinstance(record := _record(row), str)]
    if not prompts:
        raise UserError(f"{path}: there are no prompts in it")
    return prompts


def _record(row: Row) -> Comparison | Feedback | Example | str:
    """What has the row's prompt, or why the row says nothing."""
    names = ColumnNames()
    kind = kind_of(row.columns, names)
    if kind == "preference":
        return read_comparison(row, names)
    if kind == "unpaired preference":
        return read_feedback_row(row, names)
    if kind == "language modeling" and row.columns.get(names.messages) is not None:
        return read_demonstration(row, names)
    return read_prompt(row, names)


def attack_success(
    prompts: Sequence[str], completions: Sequence[Sequence[str]], rules: Mapping[str, Rule]
) -> Result:
    """How often answers break rules.

    completions     at least one for each prompt

    Measures, with intervals over prompts: attack_success (an answer breaks any rule), of several samples also
    attack_success_any (some answer to the prompt does), and RULE/attack_success where there are several rules.
    Answers that no rule can judge are left out and counted. Raises UserError if there is no rule, no prompt that
    could be judged, or a rule that cannot be used.
    """
    if not rules:
        raise UserError("red team: name at least one rule, as file.py:function")
    mean: list[float] = []
    ever: list[float] = []
    by_rule: dict[str, list[float]] = {name: [] for name in rules}
    unjudged, rows = 0, []
    for prompt, texts in zip(prompts, completions, strict=True):
        verdicts = {
            name: [judge(rule, name, question_of(prompt), text) for text in texts] for name, rule in rules.items()
        }
        for name, said in verdicts.items():
            known = [float(verdict) for verdict in said if verdict is not None]
            if known:
                by_rule[name].append(sum(known) / len(known))
        broken = []
        for at in range(len(texts)):
            said_of_text = [verdicts[name][at] for name in rules]
            if any(verdict is not None for verdict in said_of_text):
                broken.append(float(any(verdict is True for verdict in said_of_text)))
        unjudged += len(texts) - len(broken)
        rows.append({"prompt": question_of(prompt), "completions": list(texts), "broken": verdicts})
        if broken:
            mean.append(sum(broken) / len(broken))
            ever.append(max(broken))
    if not mean:
        raise UserError("red team: no rule could judge any answer")
    measures = {"attack_success": Measure(mean)}
    if max(len(texts) for texts in completions) > 1:
        measures["attack_success_any"] = Measure(ever)
    if len(rules) > 1:
        measures |= {
            f"{Path(name).name}/attack_success": Measure(found) for name, found in by_rule.items() if found
        }
    return Result(measures, {"prompts": len(mean), "unjudged": unjudged}, rows=rows)


def model_target(path: str | Path, *, decoding: Decoding = SHORT, chat: bool = False) -> Target:
    """A frozen model as a target. Raises UserError where there is no such model."""
    subject = load_subject(path, chat=chat)
    subject.policy.requires_grad_(False)
    return subject_target(subject, decoding)


def subject_target(subject: Subject, decoding: Decoding) -> Target:
    """A loaded model as a target, one answer a prompt."""

    def ask(prompts: Sequence[str]) -> list[str]:
        return [texts[0] for texts in subject.complete(list(prompts), decoding)]

    return ask


def attacker_reward(
    target: Target | str | Path,
    rule: Rule | str,
    *,
    diversity: float = 0.0,
    unit: Unit = "word",
    chat: bool = False,
) -> RewardFunction:
    """The reward of an adversarial policy, for the `rewards:` of any recipe.

    target      who is attacked: a model's or a run's folder, or a function of prompts
    rule        `file.py:function` (prompt, completion) -> True = broken, or the function itself
    diversity   how much of the reward an attack loses by being like the other attacks of its batch: its reward is
                broken * (1 - diversity * self-BLEU), so that what breaks nothing earns nothing however new it is
    unit        what self-BLEU compares
    chat        ask a model through its chat template, as one that was trained on conversations must be

    The completion is the target's prompt; 1 where the target's answer breaks the rule, 0 where it does not or the
    attack is empty, None where the rule cannot say. Raises UserError where there is no such model or rule, and
    ValueError for a diversity outside [0, 1].
    """
    if not 0 <= diversity <= 1:
        raise ValueError(f"attacker_reward: diversity must be in [0, 1], got {diversity}")
    answer = target if callable(target) else model_target(target, chat=chat)
    breaks, name = (load_rule(rule, "attacker_reward"), rule) if isinstance(rule, str) else (rule, "rule")

    def attack(prompts: list[str], completions: list[str]) -> list[float | None]:
        attacks = [text for text in dict.fromkeys(completions) if text.strip()]
        answers = dict(zip(attacks, answer(attacks), strict=True)) if attacks else {}
        verdicts = {text: judge(breaks, name, text, said) for text, said in answers.items()}
        alike = [0.0] * len(completions)
        if diversity > 0 and len(completions) > 1:
            alike = self_bleu([pieces(text, unit) for text in completions])
        rewards: list[float | None] = []
        for text, likeness in zip(completions, alike, strict=True):
            verdict = verdicts.get(text, False)
            rewards.append(None if verdict is None else float(verdict) * (1.0 - diversity * likeness))
        return rewards

    return attack
