"""Every recipe computes the same on another device: tokens go there, numbers come back, nothing is mixed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.device import find_device
from experiment.errors import UserError
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.loading import ModelConfig

ROOT = Path(__file__).parents[2]
RECIPES = ["sft", "ppo", "ppo_separate", "grpo", "rejection", "ilql", "dpo", "kto", "reward"]
RECIPES += ["turns_sft", "turns_ppo", "turns_grpo", "vla_bc", "vla_ppo", "evaluate"]
MIXES = """
import torch
from tests.devices.pretend_card import NAME, pretend_card
with pretend_card():
    there = torch.ones(2, 3).to(NAME)
    print(float((there * 2.0).sum().cpu()), there.device.type)
    there + torch.ones(2, 3)
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Recipe -> what it measured in the processor and on the card, and how many operations ran there."""
    done = python("-m", "tests.devices.on_a_card", str(tmp_path_factory.mktemp("devices")))
    assert done.returncode == 0, done.stderr[-2000:]
    results: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_every_recipe_was_tried(measured: dict[str, list[Any]]) -> None:
    assert sorted(measured) == sorted(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_computes_the_same_on_another_device(recipe: str, measured: dict[str, list[Any]]) -> None:
    here, there, operations = measured[recipe]
    assert isinstance(here, dict), here
    assert isinstance(there, dict), there
    assert here
    assert there == pytest.approx(here, rel=1e-4, abs=1e-5)
    assert operations > 100


def test_the_pretended_card_refuses_to_mix() -> None:
    done = python("-c", MIXES)
    assert done.stdout.split() == ["12.0", "card"]
    assert "expected all tensors to be on the same device, found card and cpu" in done.stderr


def test_auto_is_what_is_there() -> None:
    assert find_device("auto", setting="model.device").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpu:x"])
def test_a_device_that_is_not_here_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"model.device: {name} cannot be used here"):
        find_device(name, setting="model.device")


def test_the_setting_is_of_every_model() -> None:
    with pytest.raises(UserError, match=r"model\.device: gpu cannot be used here"):
        build_policy(ModelConfig(device="gpu"), alphabet="ab")
