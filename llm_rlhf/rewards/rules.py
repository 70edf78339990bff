"""A user's rules about texts: `file.py:function` (prompt, completion) -> whether it is broken; None = cannot say.

    def tells_addresses(prompt: str, completion: str) -> bool | None:
        return "@" in completion

The same function constrains training (`safety.rules`), probes it (`monitor.probes`) and judges attacks (red teams).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from envs.own import is_own, load_own
from experiment.errors import UserError, user_errors
from llm_rlhf.rewards.calls import told_when_late

Rule = Callable[[str, str], bool | None]


def load_rule(name: str, setting: str) -> Rule:
    """`file.py:function` -> the function. setting: what the user would look for, as "monitor.probes".

    Raises UserError where there is no such file or function.
    """
    if not is_own(name):
        raise UserError(f"{setting}: {name!r} is no rule; give it as path/to/file.py:function")
    with user_errors(setting):
        rule: Rule = load_own(name)
    if not callable(rule):
        raise UserError(f"{setting}: {name}: a function is needed, got {type(rule).__name__}")
    return rule


def judge(rule: Rule, name: str, prompt: str, completion: str) -> bool | None:
    """What a rule says of one completion; a late one is waited for and told of.

    Raises UserError if it raises, or says something else than a bool.
    """
    try:
        with told_when_late(lambda: name):
            said = rule(prompt, completion)
    except Exception as error:  # whatever the user's function raises
        reason = " ".join(str(error).split()) or "no message"
        raise UserError(f"{name}: it raised {type(error).__name__}: {reason}") from error
    if said is not None and not isinstance(said, bool):
        raise UserError(f"{name}: it returned {said!r} for {completion!r}; return True, False or None")
    return said


def rate_of(rule: Rule, name: str, prompts: Sequence[str], completions: Sequence[str]) -> tuple[int, int]:
    """Of how many completions a rule is true, and how many it judged. Raises UserError as `judge`."""
    said = [judge(rule, name, prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
    return sum(verdict is True for verdict in said), sum(verdict is not None for verdict in said)
