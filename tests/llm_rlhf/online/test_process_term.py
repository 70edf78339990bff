"""A process reward model beside a policy that draws: whether it has room, and what it cannot read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.generation import GenerationConfig
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.tokenizer import decode_completions
from llm_rlhf.online.experience import Sampler, build_sampler
from llm_rlhf.online.process_term import ProcessTerm, ProcessTermConfig
from llm_rlhf.rewards.process_reward import StepScorer
from llm_rlhf.rewards.reward_model import Scorer, build_reward_model
from llm_rlhf.tasks.random_walks import RandomWalksConfig
from llm_rlhf.tasks.task import TaskConfig, build_task

SEPARATOR = "a"


def sampler(*, max_new_tokens: int) -> Sampler:
    """Of a policy that has learned nothing; prompts are one letter."""
    torch.manual_seed(0)
    task = build_task(TaskConfig(name="random_walks", random_walks=RandomWalksConfig(walks=60)))
    policy, tokenizer = build_policy(ModelConfig(layers=1, width=16, heads=2, context=24), alphabet=task.alphabet)
    generation = GenerationConfig(max_new_tokens=max_new_tokens)
    return build_sampler(policy, tokenizer, task, rewards={}, generation=generation, seed=0)


def term(folder: Path, drawing: Sampler, *, alphabet: str, context: int) -> ProcessTerm | None:
    config = ModelConfig(layers=1, width=16, heads=2, context=context)
    model, tokenizer = build_reward_model(config, alphabet=alphabet, objectives=("step",), heads=1)
    StepScorer(Scorer(model, tokenizer), SEPARATOR).save_pretrained(folder)
    return ProcessTerm.of(ProcessTermConfig(model=str(folder), form="log_odds", weight=2.0), drawing)


def test_a_context_without_room_is_refused_at_the_start(tmp_path: Path) -> None:
    drawing = sampler(max_new_tokens=8)
    letters = drawing.task.alphabet
    assert {len(prompt) for prompt in drawing.prompts} == {1}
    assert term(tmp_path / "enough", drawing, alphabet=letters, context=9) is not None
    with pytest.raises(
        UserError, match=r"^process\.model: .* reads at most 8 tokens; a completion may have 8, behind 1 of its"
    ):
        term(tmp_path / "short", drawing, alphabet=letters, context=8)
    # how many another tokenizer makes of a completion nobody knows yet
    assert term(tmp_path / "another", drawing, alphabet=letters + "!", context=8) is not None


def test_what_its_tokenizer_loses_is_counted_and_not_paid(tmp_path: Path) -> None:
    """The separator is unknown to it: completions of two steps are one to it."""
    drawing = sampler(max_new_tokens=8)
    rows = list(range(len(drawing.task.train)))
    samples, scores = drawing.draw(rows, samples_per_prompt=2, drawn_before=0)
    texts = decode_completions(drawing.tokenizer, samples.completions())
    steps = torch.tensor([sum(bool(step) for step in text.split(SEPARATOR)) for text in texts])
    assert (steps > 1).any(), "the test needs completions of several steps"
    assert (steps == 1).any(), "and of one"
    known = term(tmp_path / "all", drawing, alphabet=drawing.task.alphabet, context=16)
    assert known is not None
    _, metrics = known.pay(rows, samples, scores)
    assert metrics == {"rewards/process/unscored": 0.0}
    lossy = term(tmp_path / "few", drawing, alphabet=drawing.task.alphabet.replace(SEPARATOR, ""), context=16)
    assert lossy is not None
    paid, metrics = lossy.pay(rows, samples, scores)
    assert metrics["rewards/process/unscored"] == pytest.approx(float((steps > 1).float().mean()))
    assert torch.equal(paid.any(1), steps == 1)


def test_a_model_that_can_read_no_completion_says_so(tmp_path: Path) -> None:
    drawing = sampler(max_new_tokens=8)
    samples, scores = drawing.draw([0], samples_per_prompt=64, drawn_before=0)
    texts = decode_completions(drawing.tokenizer, samples.completions())
    row = next(row for row, text in enumerate(texts) if SEPARATOR in text.strip(SEPARATOR))
    one = replace(
        samples,
        input_ids=samples.input_ids[row : row + 1],
        mask=samples.mask[row : row + 1],
        prompt=samples.prompt[row : row + 1],
    )
    lossy = term(tmp_path, drawing, alphabet=drawing.task.alphabet.replace(SEPARATOR, ""), context=16)
    assert lossy is not None
    with pytest.warns(UserWarning, match=r"^process\.model: its tokenizer loses steps of each of 1 completions"):
        paid, metrics = lossy.pay([0], one, scores)
    assert not paid.any()
    assert metrics == {"rewards/process/unscored": 1.0}
