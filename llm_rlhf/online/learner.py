"""What the recipes' runs have in common: building what learns, looking at validation prompts, checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf.data.texts import Batches
from llm_rlhf.evaluate import START, EvaluateConfig, evaluate_policy, numbers
from llm_rlhf.models.causal import LanguagePolicy, build_policy, frozen_copy
from llm_rlhf.models.generation import GenerationConfig, Samples
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.online.critic import FOLDER, CriticConfig, ValueModel, build_critic
from llm_rlhf.online.experience import Sampler, Shaper, build_sampler
from llm_rlhf.online.monitor import Monitor, Shown
from llm_rlhf.online.moved import Counters, Imitated, Moved
from llm_rlhf.online.pretraining_mix import PretrainingMix, PretrainingMixConfig
from llm_rlhf.online.process_term import ProcessTerm, ProcessTermConfig
from llm_rlhf.online.recording import conclude, folders_of, log_completions, texts_of
from llm_rlhf.online.self_imitation import GoodAnswers
from llm_rlhf.online.settings import AnswersConfig, OnlineConfig, ValidationConfig
from llm_rlhf.rewards.functions import Scores
from llm_rlhf.tasks.examples import Example
from llm_rlhf.tasks.room import require_room, skipping_long
from llm_rlhf.tasks.task import Task
from policy_core.kl import KLController, kl_in_unit
from policy_core.optimizer import NonFiniteLoss


@dataclass(kw_only=True)
class Learner(Moved):
    """What a run on single answers moves besides.

    good_answers    what self-imitation remembers, or None
    process     what pays every step of a completion, or None
    latest      of the last rollout, to show; not part of the state
    """

    sampler: Sampler
    good_answers: GoodAnswers | None = None
    process: ProcessTerm | None = None
    latest: tuple[Samples, Scores] | None = None

    def imitated(self) -> list[Imitated]:
        """Self-imitation and PPO-ptx, where the configuration asks for them."""
        return [*([] if self.good_answers is None else [self.good_answers]), *super().imitated()]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, which have a folder of their own."""
        answers = self.good_answers
        return {**super().state_dict(), "good_answers": None if answers is None else answers.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        super().load_state_dict(state)
        if self.good_answers is not None and state.get("good_answers") is not None:
            self.good_answers.load_state_dict(state["good_answers"])


def build_learner(
    run: Run,
    task: Task,
    config: AnswersConfig,
    *,
    prompts: int,
    critic: CriticConfig | None = None,
    process: ProcessTermConfig | None = None,
) -> Learner:
    """A learner at the run's start or, when resuming, exactly where its checkpoint left it.

    prompts     training prompts of one rollout
    critic      where values come from; None = there are none
    process     what pays single steps of an answer, besides; needs a critic

    Raises UserError if model.path or critic.init name no trained model, or rewards, texts or lengths will not do.
    """
    seed = config.run.seed
    policy, tokenizer = online_policy(run, config, task, critic)
    if config.skip_long_prompts:
        task = with_room_to_sample(task, tokenizer, policy, config.generation)
    sampler = build_sampler(
        policy,
        tokenizer,
        task,
        rewards=config.rewards,
        generation=config.generation,
        seed=seed,
        rewards_timeout=config.rewards_timeout,
        overlong=config.overlong,
        safety=config.safety,
    )
    require_room_to_sample(sampler, model=config.model, validation=config.validation)
    longest = max(len(prompt) for prompt in sampler.prompts) + sampler.max_new_tokens
    values = separate_critic(run, critic, policy, tokenizer, longest=longest, model_path=str(config.model.path))
    imitated = config.self_imitation
    learner = Learner(
        policy=policy,
        reference=frozen_reference(run, policy),
        optimizer=optimizer_of(policy, values, learning_rate=config.ppo.learning_rate),
        sampler=sampler,
        sampling=sampler.generator,
        prompts=Batches(len(task.train), prompts, seed=seed),
        shuffling=torch.Generator().manual_seed(seed + 1),
        controller=KLController(config.kl),
        counters=Counters(),
        good_answers=GoodAnswers.of(imitated, sampler, seed=seed + 2) if imitated.coef > 0 else None,
        shaper=Shaper(config.shaping, config.shaping.cut_of(config.generation)),
        monitor=Monitor(config.monitor),
        process=None if process is None else ProcessTerm.of(process, sampler),
        critic=values,
        ptx=pretraining_mix(config.ptx, tokenizer, context=policy.context, seed=seed + 3),
    )
    if run.checkpoint is not None:
        learner.load_state_dict(run.checkpoint.state)
    return learner


def online_policy(
    run: Run, config: OnlineConfig, task: Task, critic: CriticConfig | None
) -> tuple[LanguagePolicy, PreTrainedTokenizerBase]:
    """The policy that learns, as the configuration or the checkpoint has it, and its tokenizer."""
    policy, tokenizer = build_policy(
        checkpoint_policy(run, config.model),
        alphabet=task.alphabet,
        temperature=config.generation.temperature,
        value_head=critic is not None and critic.model == "shared",
    )
    policy.precision = config.precision
    return policy, tokenizer


def optimizer_of(
    policy: LanguagePolicy, critic: ValueModel | None, *, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW on the policy's parameters and, in a group of their own, the separate value model's."""
    learned = [{"params": list(module.parameters())} for module in (policy, critic) if module is not None]
    return torch.optim.AdamW(learned, lr=learning_rate, weight_decay=0.0, fused=True)


def separate_critic(
    run: Run,
    config: CriticConfig | None,
    policy: LanguagePolicy,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    model_path: str,
) -> ValueModel | None:
    """The value model of its own that the configuration asks for: as the checkpoint has it, or new.

    longest     tokens of the longest prompt and completion
    """
    if config is None or config.model == "shared":
        return None
    if run.checkpoint is not None:
        critic = ValueModel.from_pretrained(run.checkpoint.folder / FOLDER)
    else:
        critic = build_critic(config, model_path=model_path, tokenizer=tokenizer, longest=longest)
    critic.precision = policy.precision
    return critic.to(policy.device)


def pretraining_mix(
    config: PretrainingMixConfig, tokenizer: PreTrainedTokenizerBase, *, context: int, seed: int
) -> PretrainingMix | None:
    """The texts of PPO-ptx, where the configuration asks for them; tells what they are."""
    if config.coef == 0:
        return None
    mix = PretrainingMix(config, tokenizer, context=context, seed=seed)
    announce_line(mix.note)
    return mix


@contextlib.contextmanager
def stopping_on_nan(run: Run, setting: str) -> Iterator[None]:
    """Turn a NaN or infinity in an update into one line for the user; the weights were not spoiled."""
    try:
        yield
    except NonFiniteLoss as error:
        raise UserError(f"run {run.folder}: {error}; its checkpoints are kept; try a lower {setting}") from error


def record(
    run: Run,
    learner: Learner,
    metrics: Mapping[str, float],
    *,
    validation: ValidationConfig,
    global_step: int,
    last: bool,
    log_every: int,
) -> None:
    """Log an update, look at the validation prompts when that is due, save when that is due; the last always."""
    sampler = learner.sampler
    looked = validate(
        learner.policy,
        sampler.tokenizer,
        sampler.task,
        validation,
        due=last or global_step % max(validation.every, 1) == 0,
        max_new_tokens=sampler.max_new_tokens,
        rewards_timeout=sampler.rewards.timeout,
        reference=learner.reference,
    )
    shown = None
    if looked and learner.latest is not None:
        shown = Shown(*texts_of(learner.latest[0], sampler.tokenizer))
        log_completions(run, sampler, *learner.latest, global_step=global_step)
    conclude(
        run,
        learner,
        metrics,
        looked,
        shown=shown,
        global_step=global_step,
        last=last,
        log_every=log_every,
        folders=folders_of(learner, sampler.tokenizer),
    )


def steer_kl(controller: KLController, samples: Samples, ref_log_probs: Tensor) -> None:
    """Move the KL's coefficient by what was spent on all that was drawn, whatever of it is learned from.

    ref_log_probs   [B, T], of the drawn tokens under the reference
    """
    episode = torch.where(samples.attention_mask.bool(), 0, -1)
    spent = kl_in_unit(
        samples.log_probs - ref_log_probs, mask=samples.mask, episode=episode, unit=controller.config.unit
    )
    controller.update(spent, episodes=len(samples.finished))


def require_trained(model: ModelConfig) -> None:
    """Reinforcement learning starts from a trained model. Raises UserError where none is named."""
    if model.path is None:
        raise UserError(
            "model.path: reinforcement learning starts from a trained model; run an llm/sft config first and give "
            "its run folder, such as model.path=runs/NAME"
        )


def frozen_reference(run: Run, policy: LanguagePolicy) -> LanguagePolicy:
    """The policy as it was when the run began; kept in RUN/reference, so that a resumed run has the same one."""
    if run.checkpoint is not None:
        return kept_start(run.folder / START, policy)
    reference = frozen_copy(policy)
    reference.save_pretrained(run.folder / START)
    return reference


def kept_start(folder: Path, policy: LanguagePolicy) -> LanguagePolicy:
    """What a run began with, frozen, from where it was kept; it draws and computes as `policy` does, and where."""
    start = LanguagePolicy.from_pretrained(folder, temperature=policy.temperature).to(policy.device)
    start.precision = policy.precision
    return start.requires_grad_(False).eval()


def checkpoint_policy(run: Run, config: ModelConfig) -> ModelConfig:
    """Where the policy is loaded from: the checkpoint when resuming, else the configuration's own path."""
    if run.checkpoint is None:
        return config
    return replace(config, path=str(run.checkpoint.folder / "policy"))


def validate(
    policy: LanguagePolicy,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: ValidationConfig,
    *,
    due: bool,
    max_new_tokens: int | None = None,
    rewards_timeout: float | None = None,
    reference: LanguagePolicy | Path | None = None,
) -> dict[str, float]:
    """Validation metrics when they are due, else nothing. Draws from a generator of its own.

    reference   what eval/kl (nats a completion) is measured to, or the folder where it is kept; None = no eval/kl
    """
    if config.every == 0 or not due:
        return {}
    if isinstance(reference, Path):
        reference = kept_start(reference, policy)
    few = replace(task, splits={"validation": task.splits["validation"][: config.prompts]})
    result = evaluate_policy(
        policy,
        tokenizer,
        few,
        split="validation",
        config=EvaluateConfig(samples=config.samples),
        max_new_tokens=max_new_tokens,
        reference=reference,
        rewards_timeout=rewards_timeout,
    )
    return numbers(result, prefix="eval")


def with_room_to_sample(
    task: Task, tokenizer: PreTrainedTokenizerBase, policy: LanguagePolicy, generation: GenerationConfig
) -> Task:
    """The task without the prompts, of training and of validation, that leave no room for an answer; says how many
    those are. Where none is left they stay, for `require_room_to_sample` to name one."""
    limit = generation.max_new_tokens or task.max_new_tokens
    train, validation = (
        skipping_long(examples, tokenizer, context=policy.context, max_new_tokens=limit, what=what)
        for what, examples in (("training", task.train), ("validation", task.splits["validation"]))
    )
    return replace(task, train=train, splits={**task.splits, "validation": validation})


def require_room_to_sample(
    sampler: Sampler, *, model: ModelConfig, validation: ValidationConfig, training: bool = True
) -> None:
    """Before anything is trained: raises UserError where a prompt that will be answered, of validation's or (with
    `training`) of training's, leaves no room for its answer in the model's context."""
    require_room(
        [*(sampler.task.train if training else ()), *validation_prompts(sampler.task, validation)],
        sampler.tokenizer,
        context=sampler.policy.context,
        max_new_tokens=sampler.max_new_tokens,
        limited_by="generation.max_new_tokens",
        new_model=model.path is None,
        known=sampler.prompts if training else (),
    )


def validation_prompts(task: Task, validation: ValidationConfig) -> Sequence[Example]:
    """The prompts that validation looks at, none where it is switched off. Raises UserError where there is none."""
    if validation.every == 0:
        return ()
    if not task.splits["validation"]:
        raise UserError(
            "validation.every: no prompts of the task are held out to validate on; keep some (the task's section, "
            "validation), or set validation.every=0"
        )
    return task.splits["validation"][: validation.prompts]


def announce(task: Task) -> None:
    """Say what the data is, one line each."""
    for note in task.notes:
        announce_line(note)


def announce_line(note: str) -> None:
    """Say one thing about the data."""
    print(note, flush=True)
