"""The bodies on which every contract runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.contracts.bodies import BODIES, CATEGORICAL, Body, double_precision
from tests.contracts.several_turns import several_turns

EVERY_BODY = {**BODIES, "several_turns": several_turns}


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with double_precision():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=list(EVERY_BODY))
def body(request: pytest.FixtureRequest) -> Body:
    return EVERY_BODY[request.param]()


@pytest.fixture(params=[*CATEGORICAL, "several_turns"])
def categorical_body(request: pytest.FixtureRequest) -> Body:
    return EVERY_BODY[request.param]()
