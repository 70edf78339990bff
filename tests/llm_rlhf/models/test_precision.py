"""One word for bfloat16 in every configuration."""

from __future__ import annotations

from typing import Any

import pytest

from embodied.train_cql import TrainCQLConfig
from embodied.train_iql import TrainIQLConfig
from experiment.config import build_from_dict
from experiment.errors import UserError
from llm_rlhf.train_dpo import TrainDPOConfig
from llm_rlhf.train_grpo import TrainGRPOConfig
from llm_rlhf.train_iterative_dpo import TrainIterativeDPOConfig
from llm_rlhf.train_kto import TrainKTOConfig
from llm_rlhf.train_ppo import TrainPPOConfig
from llm_rlhf.train_rejection import TrainRejectionConfig
from llm_rlhf.train_reward import TrainRewardConfig
from llm_rlhf.train_sft import TrainSFTConfig
from llm_rlhf.train_turns_ppo import TrainTurnsPPOConfig
from llm_rlhf.train_turns_sft import TrainTurnsSFTConfig


@pytest.mark.parametrize(
    ("recipe", "section"),
    [
        (TrainSFTConfig, "sft"),
        (TrainTurnsSFTConfig, "sft"),
        (TrainRejectionConfig, "sft"),
        (TrainDPOConfig, "learning"),
        (TrainKTOConfig, "learning"),
        (TrainIterativeDPOConfig, "learning"),
        (TrainRewardConfig, "reward"),
        (TrainPPOConfig, None),
        (TrainGRPOConfig, None),
        (TrainTurnsPPOConfig, None),
        (TrainIQLConfig, None),
        (TrainCQLConfig, None),
    ],
)
def test_bf16_and_float32_are_what_it_is_called(recipe: type, section: str | None) -> None:
    def read(word: str) -> Any:
        found: Any = build_from_dict({section: {"precision": word}} if section else {"precision": word}, recipe)
        return (getattr(found, section) if section else found).precision

    assert [read("bf16"), read("float32")] == ["bf16", "float32"]
    with pytest.raises(UserError, match=r"precision: expected one of float32, bf16, got 'bfloat16'"):
        read("bfloat16")
