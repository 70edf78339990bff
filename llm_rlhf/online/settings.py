"""What the configurations of recipes share that learn from what their policy writes."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiment.run import RunConfig
from llm_rlhf.models.generation import GenerationConfig
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.precision import Precision
from llm_rlhf.online.experience import OverlongConfig, ShapingConfig
from llm_rlhf.online.monitor import MonitorConfig
from llm_rlhf.online.pretraining_mix import PretrainingMixConfig
from llm_rlhf.online.self_imitation import SelfImitationConfig
from llm_rlhf.rewards.safety import SafetyConfig
from llm_rlhf.tasks.task import TaskConfig
from policy_core.kl import KLConfig
from policy_core.ppo import PPOConfig


@dataclass(frozen=True)
class ValidationConfig:
    """every: updates between looks at the validation prompts (0 = never); samples, prompts: how much to draw."""

    every: int = 50
    samples: int = 4
    prompts: int = 200

    def __post_init__(self) -> None:
        if self.every < 0 or self.samples < 1 or self.prompts < 1:
            raise ValueError("validation: every must be at least 0, samples and prompts at least 1")


@dataclass(frozen=True)
class SampledConfig:
    """A run that learns from what its policy writes.

    rewards             name (or file.py:function, or a reward model's run) -> weight; empty = the task's own
    rewards_timeout     seconds that one call of a reward function may take; null = any, and what has not answered
                        for 60 s is named in a line
    safety              rules that no reward buys off
    shaping             what becomes of scores, and of texts that were cut, before anything is learned from them
    """

    run: RunConfig = field(default_factory=RunConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    rewards: dict[str, float] = field(default_factory=dict)
    rewards_timeout: float | None = None
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    log_every: int = 1


@dataclass(frozen=True)
class OnlineConfig(SampledConfig):
    """A run of PPO or GRPO, of single answers or of several turns.

    ptx         texts that are imitated beside the rewards
    precision   "bf16": the model's matrix products in bfloat16 (autocast), in sampling and in updates; log-softmax,
                losses, weights and optimizer stay float32
    """

    ppo: PPOConfig = field(default_factory=PPOConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    ptx: PretrainingMixConfig = field(default_factory=PretrainingMixConfig)
    precision: Precision = "float32"


@dataclass(frozen=True)
class AnswersConfig(OnlineConfig):
    """A run on single answers.

    skip_long_prompts   leave out, and count, the prompts that leave no room for generation.max_new_tokens; False:
                        one of them ends the run before it begins
    overlong            a reward for ending in time
    self_imitation      of answers that were good
    """

    skip_long_prompts: bool = False
    overlong: OverlongConfig | None = None
    self_imitation: SelfImitationConfig = field(default_factory=SelfImitationConfig)
