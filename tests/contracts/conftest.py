"""The bodies on which every contract runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.contracts.bodies import BODIES, CATEGORICAL, Body, double_precision


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with double_precision():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=list(BODIES))
def body(request: pytest.FixtureRequest) -> Body:
    return BODIES[request.param]()


@pytest.fixture(params=CATEGORICAL)
def categorical_body(request: pytest.FixtureRequest) -> Body:
    return BODIES[request.param]()
