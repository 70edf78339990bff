"""What becomes of a ValueError whose caller is the user."""

from __future__ import annotations

import pytest

from experiment.errors import UserError, user_errors


@pytest.mark.parametrize(("what", "told"), [("task.data", "task.data: no such row"), ("", "no such row")])
def test_a_refusal_is_told_with_what_was_asked_for(what: str, told: str) -> None:
    refusal = ValueError("no such row")
    with pytest.raises(UserError) as caught, user_errors(what):
        raise refusal
    assert str(caught.value) == told
    assert caught.value.__cause__ is refusal


def test_bugs_and_what_was_told_already_pass() -> None:
    for error in (TypeError("a bug"), UserError("environment: told already"), KeyError("x")):
        with pytest.raises(type(error)) as caught, user_errors("grounding"):
            raise error
        assert caught.value is error
