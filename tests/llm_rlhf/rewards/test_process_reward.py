"""Process reward models: where steps end, what they are paid, and that training finds the wrong ones."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf import train_process_reward
from llm_rlhf.evaluate_process_reward import EvaluateConfig, evaluate_run
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.rewards.process_reward import (
    StepsConfig,
    StepScorer,
    dense_rewards,
    paid,
    read_solutions,
    step_ends,
    step_loss,
    token_scores,
    tokenize_steps,
)
from llm_rlhf.rewards.reward_model import Scorer, build_reward_model, named_reward
from llm_rlhf.train_process_reward import TrainProcessRewardConfig

CHARACTERS = character_tokenizer("abc:\n")


def tokens(text: str, *, eos: bool = True) -> list[int]:
    return [*CHARACTERS.encode(text, add_special_tokens=False), *([int(CHARACTERS.eos_token_id)] if eos else [])]


def pieces(*vocabulary: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are exactly these texts, and EOS."""
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<eos>", *vocabulary])}, unk_token="<eos>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("|", behavior="removed")
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    fast.decode = lambda ids, **_: "".join(vocabulary[i - 1] for i in ids if i)  # type: ignore[method-assign]
    return fast


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("ab\nc\n", [2, 4]),
        ("ab\nc", [2, 3]),
        ("\n\nab\n\nc\n\n", [4, 7]),  # empty steps are none
        ("abc", [2]),
        ("", []),
        ("\n", []),
    ],
)
def test_steps_end_with_their_separator_or_before_eos(text: str, ends: list[int]) -> None:
    assert step_ends(tokens(text), CHARACTERS, "\n") == ends
    assert step_ends(tokens(text, eos=False), CHARACTERS, "\n") == ends


def test_separators_within_and_across_tokens() -> None:
    tokenizer = pieces("a.\nb", ".", "\n", "c", "c\na\n", ";", " ;")
    assert step_ends([1, 3, 4, 0], tokenizer, "\n") == [0, 1, 2]  # "a.", "b", "c"
    assert step_ends([5, 4], tokenizer, "\n") == [0, 0, 1]  # one token ends two steps
    assert step_ends([4, 6, 3, 4], tokenizer, ";\n") == [2, 3]  # a separator of two tokens ends with the second


# ---------------------------------------------------------------- pay


def test_pay_by_hand() -> None:
    logits = [math.log(3.0), -math.log(3.0), 0.0]
    assert paid(logits, form="probability") == pytest.approx([0.75, 0.25, 0.5])
    assert paid(logits, form="log_odds") == logits
    assert paid(logits, form="change") == pytest.approx([0.25, -0.5, 0.25])
    assert sum(paid([0.3, -2.0, 1.1], form="change")) == pytest.approx(1 / (1 + math.exp(-1.1)) - 0.5)
    assert paid([], form="change") == []


def scorer(alphabet: str = "abc:\n", context: int = 24) -> StepScorer:
    torch.manual_seed(0)
    config = ModelConfig(layers=1, width=16, heads=2, context=context)
    model, tokenizer = build_reward_model(config, alphabet=alphabet, objectives=("step",), heads=1)
    return StepScorer(Scorer(model, tokenizer, batch_size=2), "\n")


def batch(prompts: list[str], completions: list[str]) -> tuple[Tensor, Tensor]:
    """Left-padded prompts, right-padded completions with EOS where they end with ".": as a policy writes them."""
    left, right = max(map(len, prompts)), max(map(len, completions)) + 2
    ids, mask = torch.zeros(len(prompts), left + right, dtype=torch.long), torch.zeros(len(prompts), left + right)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        drawn = tokens(completion)
        ids[row, left - len(prompt) : left] = torch.tensor(tokens(prompt, eos=False))
        ids[row, left : left + len(drawn)] = torch.tensor(drawn)
        mask[row, left : left + len(drawn)] = 1
    return ids, mask.bool()


def logits_of(model: StepScorer, prompts: list[str], completions: list[str]) -> list[list[float]]:
    """`step_logits` of completions whose steps are all found."""
    rows = [row for row in model.step_logits(prompts, completions) if row is not None]
    assert len(rows) == len(prompts)
    return rows


def test_dense_rewards_lie_on_each_steps_last_token() -> None:
    model = scorer()
    prompts, completions = ["a:", "bbc:", "c:"], ["ab\nc\nb", "c", ""]
    ids, mask = batch(prompts, completions)
    logits = logits_of(model, prompts, completions)
    assert [len(row) for row in logits] == [3, 1, 0]
    expected = torch.zeros(mask.shape)
    for row, columns in enumerate(([6, 8, 9], [4], [])):
        for column, value in zip(columns, paid(logits[row], form="probability"), strict=True):
            expected[row, column] = value
    found, known = dense_rewards(
        model, prompts=prompts, input_ids=ids, mask=mask, tokenizer=CHARACTERS, form="probability"
    )
    assert known.tolist() == [True, True, True]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert not found[~mask].any()


def test_a_steps_logit_is_the_heads_after_its_last_token_and_knows_nothing_later() -> None:
    model = scorer()
    (first, second), (alone,), (same, other) = logits_of(model, ["a:"] * 3, ["ab\nc", "ab\n", "ab\nbb"])
    assert first == pytest.approx(alone, abs=1e-5) == pytest.approx(same, abs=1e-5)
    assert second != pytest.approx(other, abs=1e-3)
    ids = torch.tensor([tokens("a:ab\n", eos=False)])
    with torch.no_grad():
        hidden = model.scorer.model.trunk(input_ids=ids).last_hidden_state[0, -1]
        assert first == pytest.approx(float(model.scorer.model.heads(hidden)), abs=1e-5)


def test_padding_does_not_move_token_scores() -> None:
    model = scorer().scorer.model
    ids, ones = torch.tensor([[5, 6, 4]]), torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad():
        plain = token_scores(model, ids, ones)
        for before, after in ((3, 0), (0, 3), (2, 2)):
            padded = torch.nn.functional.pad(ids, (before, after), value=2)
            mask = torch.nn.functional.pad(ones, (before, after))
            found = token_scores(model, padded, mask)
            torch.testing.assert_close(found[:, before : before + 3], plain, atol=1e-6, rtol=0)
            assert not found[mask == 0].any()


def test_the_policys_tokenizer_may_be_another() -> None:
    """Steps are found in the text, so rewards land on the policy's own tokens."""
    model, policy = scorer(), pieces("ab\n", "c", "\nb")
    ids, mask = torch.tensor([[1, 2, 3, 0]]), torch.tensor([[False, True, True, True]])
    ids[0, 1:] = torch.tensor([1, 2, 3])  # ab\n | c | \nb
    found, _ = dense_rewards(model, prompts=["a:"], input_ids=ids, mask=mask, tokenizer=policy, form="log_odds")
    (logits,) = logits_of(model, ["a:"], ["ab\nc\nb"])
    assert found[0].tolist() == pytest.approx([0.0, logits[0], 0.0, logits[1] + logits[2]], abs=1e-6)


def test_completions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="a completion of 3 steps does not fit the model's context of 8 tokens"):
        scorer(context=8).step_logits(["a:"], ["abab\nabab\nab"])


def test_steps_that_the_tokenizer_loses_are_not_paid() -> None:
    """It knows no newline, so two steps are one to it; nine tokens fit its context, and rows beside are paid."""
    model, prompts, completions = scorer(alphabet="abc:", context=24), ["a:"] * 3, ["a\nb\nc", "abc", "ab\n"]
    lost, whole, ended = model.step_logits(prompts, completions)
    assert lost is None
    assert whole is not None
    assert ended is not None  # the separator behind the last step is no loss
    ids, mask = batch(prompts, completions)
    found, known = dense_rewards(
        model, prompts=prompts, input_ids=ids, mask=mask, tokenizer=CHARACTERS, form="log_odds"
    )
    assert known.tolist() == [False, True, True]
    assert not found[0].any()
    assert found[1, 4].item() == pytest.approx(whole[0], abs=1e-6)
    assert found[2, 4].item() == pytest.approx(ended[0], abs=1e-6)


def test_room_is_asked_for_as_texts_are_cut() -> None:
    """Of a context of 12 a prompt keeps 6 tokens at least, and as many as the completion leaves."""
    model = scorer(context=12)
    for prompt, completion in ((20, 6), (1, 11), (4, 8)):
        model.require_room(prompt=prompt, completion=completion, setting="process.model")
    with pytest.raises(
        UserError,
        match=r"^process\.model: the process reward model reads at most 12 tokens; a completion may have 7, "
        r"behind 6 of its prompt$",
    ):
        model.require_room(prompt=6, completion=7, setting="process.model")
    model.scorer.model.max_prompt = 2
    model.require_room(prompt=20, completion=10, setting="process.model")


# ---------------------------------------------------------------- loss and data


def test_the_loss_by_hand() -> None:
    labels = torch.tensor([[1.0, math.nan], [0.25, 0.0]])
    logits = torch.tensor([[2.0, 9.0], [-1.0, 0.0]], requires_grad=True)
    loss = step_loss(logits=logits, labels=labels, weights=torch.full((2, 2), 1 / 3))
    soft = 0.25 * math.log1p(math.exp(1.0)) + 0.75 * math.log1p(math.exp(-1.0))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-2.0)) + soft + math.log(2)) / 3, abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0


GOOD = {"prompt": "a", "steps": ["b", "c"], "labels": [1, None]}


def solutions(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 3}, r":1: column 'prompt' is int, not text"),
        ({"steps": []}, r":1: column 'steps' must be a list that is not empty"),
        ({"labels": [1]}, r":1: there are 2 'steps' and 1 'labels'"),
        ({"steps": ["b", " "]}, r"step 2 is ' ', not a text"),
        ({"steps": ["b\nb", "c"]}, r"step 1 holds the separator '\\n'"),
        ({"labels": [1, 2]}, r"label 2 is 2; it must be 0 to 1, or null"),
        ({"labels": [None, None]}, r"has nothing but null"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = solutions(tmp_path / "rows.jsonl", [{**GOOD, **change}])
    with pytest.raises(UserError, match=message):
        read_solutions(StepsConfig(path=path))


def test_labels_lie_on_the_last_tokens(tmp_path: Path) -> None:
    rows = [{**GOOD, "prompt": prompt} for prompt in "abcd"]
    data = read_solutions(StepsConfig(path=solutions(tmp_path / "r.jsonl", rows), validation=0.25, test=0.25))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [2, 1, 1]
    assert data.alphabet == "\nabcd"
    steps = tokenize_steps(data.train, scorer("abcd\n").scorer, "\n")
    assert steps.input_ids.shape == (2, 5)  # a prompt, "b", the separator, "c", EOS
    assert steps.labels[0].tolist()[2] == 1.0
    assert steps.labels.isnan().sum() == 8
    with pytest.raises(UserError, match=r"r\.jsonl:\d: 2 steps became 1 in tokens"):
        tokenize_steps(data.train, scorer("abcd\n", context=3).scorer, "\n")
    with pytest.raises(UserError, match=r"steps\.path"):
        read_solutions(StepsConfig())


# ---------------------------------------------------------------- the recipe


def counting(path: Path) -> str:
    """Steps count up; in half of the solutions one is skipped, and everything from there on is wrong."""
    rows = []
    for start in "abcdefgh":
        for end in "mnop":
            letters = [chr(ord(start) + i) for i in range(3)]
            rows.append({"prompt": f"{start}{end}:", "steps": letters, "labels": [1, 1, 1]})
            rows.append({"prompt": f"{start}{end}:", "steps": [letters[0], "z", "y"], "labels": [1, 0, 0]})
    return solutions(path, rows)


def small(folder: Path, path: str, *, steps: int = 6, **sections: Any) -> TrainProcessRewardConfig:
    settings = {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 3, "seed": 5},
        "steps": {"path": path, "validation": 0.1, "test": 0.1},
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
        "validation": {"every": 2},
        "log_every": 1,
        **sections,
    }
    rates = {"learning_rate": 3e-3, "head_learning_rate": 1e-2}
    learning = {"steps": steps, "batch_size": 16, "micro_batch_size": 6, **rates, **sections.get("learning", {})}
    return build_from_dict({**settings, "learning": learning}, TrainProcessRewardConfig)


def rows_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def test_it_learns_which_steps_are_wrong(tmp_path: Path) -> None:
    folder = train_process_reward.train(small(tmp_path / "run", counting(tmp_path / "rows.jsonl"), steps=25)).folder
    result = evaluate_run(folder, EvaluateConfig())["test"]
    assert result["accuracy"] > 0.95
    assert result["first_error"] > 0.95
    assert result["accuracy_wrong_low"] < result["accuracy_wrong"]
    assert json.loads((folder / "eval.json").read_text())["splits"]["test"] == result
    right, wrong = logits_of(StepScorer.from_pretrained(folder), ["am:"] * 2, ["a\nb\nc", "a\nz\ny"])
    assert min(right) > 0 > max(wrong[1:])
    inner = folder / "checkpoints" / "best" / "process_reward_model"
    with pytest.raises(UserError, match="a process reward model scores steps"):
        named_reward(str(inner))
    with pytest.raises(UserError, match="there is no process reward model here"):
        StepScorer.from_pretrained(tmp_path)


def test_it_resumes_to_the_bit_and_micro_batches_change_nothing(tmp_path: Path) -> None:
    class InterruptError(Exception):
        pass

    original = Run.log

    def log(self: Any, metrics: Any, *, global_step: int) -> None:
        if global_step == 5:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    path = counting(tmp_path / "rows.jsonl")
    whole = train_process_reward.train(small(tmp_path / "whole", path)).folder
    config = small(tmp_path / "broken", path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(InterruptError):
            train_process_reward.train(config)
    torch.manual_seed(12345)  # a new process would not have the old one's global generator
    train_process_reward.train(config, resume=tmp_path / "broken")
    assert rows_of(tmp_path / "broken") == rows_of(whole)
    texts = (["am:"], ["a\nb\nz"])
    assert StepScorer.from_pretrained(tmp_path / "broken").step_logits(*texts) == StepScorer.from_pretrained(
        whole
    ).step_logits(*texts)
    one = train_process_reward.train(small(tmp_path / "one", path, steps=1, learning={"micro_batch_size": None}))
    assert one.metrics["loss/steps"] == pytest.approx(rows_of(whole)[0]["loss/steps"], abs=1e-5)
    assert one.metrics["policy/grad_norm"] == pytest.approx(rows_of(whole)[0]["policy/grad_norm"], abs=1e-4)


def test_nothing_need_be_held_out(tmp_path: Path) -> None:
    path = counting(tmp_path / "rows.jsonl")
    config = small(tmp_path / "run", path, steps=2)
    config = replace(config, steps=replace(config.steps, validation=0.0, test=0.0))
    folder = train_process_reward.train(config).folder
    assert not any("eval/loss" in row for row in rows_of(folder))
    with pytest.raises(UserError, match=r"steps\.test is 0"):
        evaluate_run(folder, EvaluateConfig(checkpoint="last"))


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config_of_trunk = BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config_of_trunk).save_pretrained(str(tmp_path / "bert"))
    character_tokenizer("abc").save_pretrained(str(tmp_path / "bert"))
    config = small(tmp_path / "run", counting(tmp_path / "rows.jsonl"), model={"path": str(tmp_path / "bert")})
    with pytest.raises(UserError, match="needs a causal language model; this is an encoder"):
        train_process_reward.train(config)


def test_bad_settings_are_refused() -> None:
    for bad in ({"separator": ""}, {"validation": 0.5, "test": 0.5}):
        with pytest.raises(ValueError, match="steps"):
            StepsConfig(**bad)
    lora = {"model": {"path": "x", "lora": {"rank": 2}}}
    with pytest.raises(UserError, match=r"model\.lora: a reward model learns all weights"):
        build_from_dict(lora, TrainProcessRewardConfig)
