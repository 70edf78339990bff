"""Learning-rate schedules at points worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from policy_core.schedules import Schedule, scheduled, set_learning_rate


@pytest.mark.parametrize(
    "schedule, progress, expected",
    [
        ("constant", 0.0, 2.0),
        ("constant", 1.0, 2.0),
        ("linear", 0.0, 2.0),
        ("linear", 0.25, 1.5),
        ("linear", 1.0, 0.0),
        ("linear", 1.5, 0.0),
        ("cosine", 0.0, 2.0),
        ("cosine", 0.25, 1.0 + math.sqrt(0.5)),
        ("cosine", 0.5, 1.0),
        ("cosine", 1.0, 0.0),
        ("cosine", 1.5, 0.0),
    ],
)
def test_without_warmup(schedule: Schedule, progress: float, expected: float) -> None:
    assert scheduled(2.0, schedule=schedule, progress=progress) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "schedule, progress, expected",
    [
        ("constant", 0.0, 0.0),
        ("constant", 0.1, 1.0),
        ("constant", 0.2, 2.0),
        ("linear", 0.1, 1.0),
        ("linear", 0.2, 2.0),
        ("linear", 0.6, 1.0),  # half of what is left after the warm-up
        ("cosine", 0.6, 1.0),
        ("linear", 1.0, 0.0),
    ],
)
def test_with_warmup(schedule: Schedule, progress: float, expected: float) -> None:
    rate = scheduled(2.0, schedule=schedule, progress=progress, warmup=0.2)
    assert rate == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("progress, warmup", [(-0.1, 0.0), (0.5, 1.0), (0.5, -0.1)])
def test_errors(progress: float, warmup: float) -> None:
    with pytest.raises(ValueError, match=rf"^progress {progress} must be >= 0 and warmup {warmup} in \[0, 1\)$"):
        scheduled(1.0, schedule="constant", progress=progress, warmup=warmup)


def test_set_learning_rate_reaches_every_group() -> None:
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 2.0}])
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
