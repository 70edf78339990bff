"""The rules of `Rollout` and `Transitions`, each broken once, and what moves decisions about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from policy_core.rollout import (
    Rollout,
    Transitions,
    credit_decisions,
    last_decision,
    leaves,
    map_nested,
    next_decision,
    split_rows,
)
from tests.policy_core.helpers import NAN, TinyPolicy, close, flags, make_rollout, sampled_rollout


def test_leaves_come_in_key_order_and_map_keeps_the_structure() -> None:
    nested = {"image": torch.ones(2, 3), "state": {"joints": torch.zeros(2, 3, 4)}}
    assert [tuple(leaf.shape) for leaf in leaves(nested)] == [(2, 3), (2, 3, 4)]
    doubled = map_nested(lambda leaf: leaf * 2, nested)
    assert isinstance(doubled, dict)
    close(doubled["image"], torch.full((2, 3), 2.0))
    assert list(doubled["state"]) == ["joints"]


def test_split_rows_cuts_every_leaf_alike() -> None:
    nested = {"a": torch.arange(5), "b": {"c": torch.arange(10).view(5, 2)}}
    parts = split_rows(nested, 2)
    assert [part["a"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part["b"]["c"].tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]


def test_next_and_last_decision() -> None:
    mask = flags("01101", "00000", "10000")
    assert next_decision(mask).tolist() == [[1, 2, 4, 4, 5], [5, 5, 5, 5, 5], [5, 5, 5, 5, 5]]
    assert last_decision(mask).tolist() == [[-1, 1, 2, 2, 4], [-1] * 5, [0] * 5]


# ---------------------------------------------------------------- validate


def valid() -> Rollout:
    """Row 0: episode 0 terminates at column 1, episode 1 follows. Row 1: an observation column, then padding."""
    return make_rollout(
        torch.zeros(2, 3),
        terminated=flags("010", "000"),
        mask=flags("111", "100"),
        episode=[[0, 0, 1], [0, 0, -1]],
    )


def test_a_valid_rollout_passes() -> None:
    valid().validate()
    sampled_rollout(TinyPolicy()).validate()


Change = Callable[[], dict[str, Any]]


def wrong_shape(name: str) -> Change:
    return lambda: {name: torch.zeros(2, 2, dtype=torch.bool)}


def wrong_type(name: str) -> Change:
    return lambda: {name: torch.zeros(2, 3)}


INVALID: dict[str, tuple[Change, str]] = {
    "rewards_3d": (lambda: {"rewards": torch.zeros(2, 3, 1)}, r"rewards must be \[B, T\], got \(2, 3, 1\)"),
    "observations": (
        lambda: {"observations": {"image": torch.zeros(2, 3), "state": torch.zeros(2, 4)}},
        r"observations must lead with \(2, 3\), got \(2, 4\)",
    ),
    "actions": (lambda: {"actions": torch.zeros(3, 3)}, r"actions must lead with \(2, 3\), got \(3, 3\)"),
    **{
        name: (wrong_shape(name), rf"{name} must be \(2, 3\), got \(2, 2\)")
        for name in ("terminated", "truncated", "mask", "discount", "episode", "values", "next_values", "group")
    },
    **{
        f"{name}_type": (wrong_type(name), f"{name} must be bool, got torch.float64")
        for name in ("terminated", "truncated", "mask")
    },
    "old_log_probs": (
        lambda: {"old_log_probs": torch.zeros(2, 4)},
        r"old_log_probs must be \[B, T\] or \[B, T, F\], got \(2, 4\)",
    ),
    "old_log_probs_4d": (
        lambda: {"old_log_probs": torch.zeros(2, 3, 4, 5)},
        r"old_log_probs must be \[B, T\] or \[B, T, F\], got \(2, 3, 4, 5\)",
    ),
    "factor_mask": (
        lambda: {"factor_mask": torch.ones(2, 3, 4, dtype=torch.bool)},
        r"factor_mask must be \(2, 3\), got \(2, 3, 4\)",
    ),
    "ref_log_probs": (
        lambda: {"old_log_probs": torch.zeros(2, 3, 4), "ref_log_probs": torch.zeros(2, 3)},
        r"ref_log_probs must be \(2, 3, 4\), got \(2, 3\)",
    ),
    "behaviour_log_probs": (
        lambda: {"behaviour_log_probs": torch.zeros(2, 3, 4)},
        r"behaviour_log_probs must be \(2, 3\), got \(2, 3, 4\)",
    ),
    "padding": (
        lambda: {"mask": flags("111", "101")},
        r"mask is True on padding \(episode -1\)",
    ),
    "cut_on_masked": (
        lambda: {"truncated": flags("000", "010")},
        "a cut lies on a masked column: call credit_decisions first",
    ),
    "not_ended": (
        lambda: {"terminated": flags("000", "000")},
        "an episode is followed by another one without being terminated or truncated",
    ),
    "goes_on": (
        lambda: {"truncated": flags("100", "000")},
        "an episode goes on after it was terminated or truncated",
    ),
}


@pytest.mark.parametrize("name", list(INVALID))
def test_validate_names_the_broken_rule(name: str) -> None:
    change, message = INVALID[name]
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(valid(), **change()).validate()


def test_validate_looks_past_masked_columns_for_the_next_episode() -> None:
    # episode 0 ends (uncut) at column 0; column 1 is an observation of episode 1, whose decision is at column 2
    rollout = make_rollout(torch.zeros(1, 3), mask=flags("101"), episode=[[0, 1, 1]])
    with pytest.raises(ValueError, match="followed by another one"):
        rollout.validate()
    replace(rollout, truncated=flags("100")).validate()


def test_an_episode_that_reaches_the_end_of_the_row_needs_no_cut() -> None:
    make_rollout(torch.zeros(1, 3), mask=flags("110"), episode=[[4, 4, -1]]).validate()


# ---------------------------------------------------------------- select, decisions


def test_select_takes_rows_of_every_field() -> None:
    rollout = replace(sampled_rollout(TinyPolicy()), group=torch.arange(6).unsqueeze(1).expand(6, 5))
    chosen = rollout.select(torch.tensor([4, 0, 4]))
    assert chosen.shape == (3, 5)
    assert chosen.group is not None
    assert chosen.group[:, 0].tolist() == [4, 0, 4]
    close(chosen.rewards[0], rollout.rewards[4])
    close(leaves(chosen.observations)[0][1], leaves(rollout.observations)[0][0])
    assert chosen.ref_log_probs is None


def test_decisions_are_the_counted_columns_row_by_row() -> None:
    rollout = make_rollout([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], mask=flags("101", "001"))
    flat = rollout.decisions()
    assert flat.shape == (3, 1)
    assert flat.rewards.flatten().tolist() == [1.0, 3.0, 6.0]
    assert leaves(flat.observations)[0].tolist() == [[[1.0]], [[3.0]], [[6.0]]]
    assert bool(flat.mask.all())


def test_decisions_of_a_full_rollout_keep_the_same_order() -> None:
    flat = make_rollout([[1.0, 2.0], [3.0, 4.0]]).decisions()
    assert flat.shape == (4, 1)
    assert flat.rewards.flatten().tolist() == [1.0, 2.0, 3.0, 4.0]


def test_to_moves_every_field() -> None:
    moved = make_rollout([[1.0]], values=[[0.5]]).to("meta")
    assert moved.rewards.device.type == moved.mask.device.type == "meta"
    assert moved.values is not None
    assert moved.values.device.type == "meta"
    assert leaves(moved.observations)[0].device.type == "meta"


# ---------------------------------------------------------------- credit_decisions


def test_credit_moves_rewards_and_cuts_to_the_decision_before_undiscounted() -> None:
    # gamma 0.5 must not matter. Row 0: decisions at 0 and 3; what falls on 1 and 2 (2.0 + 4.0) goes to 0, the
    # termination and the 16.0 of column 4 to column 3. Row 1: two episodes, the first is cut on its masked column.
    rollout = make_rollout(
        [[1.0, 2.0, 4.0, 8.0, 16.0], [1.0, 2.0, 4.0, 8.0, 32.0]],
        discount=0.5,
        mask=flags("10010", "10100"),
        terminated=flags("00001", "00000"),
        truncated=flags("00000", "01010"),
        episode=[[0, 0, 0, 0, 0], [0, 0, 1, 1, -1]],
    )
    credited = credit_decisions(rollout)
    close(credited.rewards, [[7.0, 0.0, 0.0, 24.0, 0.0], [3.0, 0.0, 12.0, 0.0, 0.0]])
    assert credited.terminated.tolist() == flags("00010", "00000").tolist()
    assert credited.truncated.tolist() == flags("00000", "10100").tolist()
    credited.validate()
    close(rollout.rewards[0], [1.0, 2.0, 4.0, 8.0, 16.0])  # the input is left as it was


def test_credit_changes_nothing_where_every_column_is_a_decision() -> None:
    rollout = make_rollout([[1.0, 2.0, 3.0]], terminated=flags("010"), episode=[[0, 0, 1]])
    credited = credit_decisions(rollout)
    close(credited.rewards, rollout.rewards, atol=0.0)
    assert credited.terminated.tolist() == rollout.terminated.tolist()


def test_credit_clears_padding_even_of_nan() -> None:
    rollout = make_rollout(
        [[1.0, NAN, 7.0]],
        mask=flags("100"),
        terminated=flags("001"),
        episode=[[0, -1, -1]],
    )
    credited = credit_decisions(rollout)
    close(credited.rewards, [[1.0, 0.0, 0.0]])
    assert not credited.terminated.any()


@pytest.mark.parametrize(
    "what", [{"rewards": [[0.0, 0.0, 3.0]]}, {"terminated": flags("001")}, {"truncated": flags("001")}]
)
def test_credit_refuses_what_no_decision_of_the_episode_precedes(what: dict[str, Any]) -> None:
    # the decision at column 0 belongs to another episode
    rewards = what.pop("rewards", [[0.0, 0.0, 0.0]])
    rollout = make_rollout(rewards, mask=flags("100"), episode=[[0, 1, 1]], **what)
    with pytest.raises(ValueError, match=r"^row 0, column 2: a reward or a cut has no decision of its"):
        credit_decisions(rollout)


def test_credit_lets_silent_columns_before_the_first_decision_be() -> None:
    credited = credit_decisions(make_rollout([[0.0, 0.0, 5.0]], mask=flags("001")))
    close(credited.rewards, [[0.0, 0.0, 5.0]])


# ---------------------------------------------------------------- Transitions


def transitions(**changes: Any) -> Transitions:
    fields: dict[str, Any] = {
        "observations": {"state": torch.arange(6.0).view(3, 2)},
        "actions": torch.tensor([0, 1, 2]),
        "rewards": torch.tensor([1.0, 2.0, 3.0]),
        "next_observations": {"state": torch.arange(6.0).view(3, 2) + 1},
        "terminated": torch.tensor([False, False, True]),
        "discount": torch.full((3,), 0.9),
        "mask": torch.ones(3, dtype=torch.bool),
    }
    return Transitions(**{**fields, **changes})


def test_transitions_select_and_length() -> None:
    chosen = transitions().select(torch.tensor([2, 0]))
    assert len(transitions()) == 3
    assert len(chosen) == 2
    assert leaves(chosen.next_observations)[0].tolist() == [[5.0, 6.0], [1.0, 2.0]]
    assert chosen.terminated.tolist() == [True, False]
    chosen.validate()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"actions": torch.zeros(2)}, "actions holds 2 transitions, rewards 3"),
        ({"next_observations": {"state": torch.zeros(4, 2)}}, "next_observations holds 4 transitions, rewards 3"),
        ({"terminated": torch.zeros(3)}, "terminated must be bool, got torch.float32"),
        ({"mask": torch.ones(3, dtype=torch.long)}, "mask must be bool, got torch.int64"),
        ({"rewards": torch.tensor([1.0, NAN, 0.0])}, "rewards holds NaN or infinity"),
        ({"discount": torch.tensor([1.0, float("inf"), 0.0])}, "discount holds NaN or infinity"),
    ],
)
def test_transitions_validate(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        transitions(**changes).validate()
