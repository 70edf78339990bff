"""KTO in miniature: the mismatched texts, one half at the start, it learns, resumes, says what is wrong."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import Run
from experiment.statistics import wilson_interval
from llm_rlhf import train_kto
from llm_rlhf.data.texts import Encoded, TokenizedTexts, lay_out
from llm_rlhf.evaluate_preference import EvaluateConfig, evaluate_run
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.loading import ModelConfig, new_language_model
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.train_kto import TrainKTOConfig, Verdicts, auc, baseline_of, mismatched_texts

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 :"


def write_thumbs(path: Path, *, count: int = 60, bad: int = 2) -> str:
    """One thumb a prompt; every `bad`-th is down."""
    lines = []
    for i in range(count):
        down = i % bad == 0
        lines.append({"prompt": f"q{i} ok: ", "completion": "no" if down else "yes", "label": not down})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = character_tokenizer(LETTERS)
    torch.manual_seed(0)
    model = new_language_model(ModelConfig(layers=1, width=16, heads=2, context=24), tokenizer)
    LanguagePolicy(model).save_pretrained(folder / "model")
    tokenizer.save_pretrained(str(folder / "model"))
    write_thumbs(folder / "thumbs.jsonl")
    return folder


def small(base: Path, folder: Path, *, steps: int = 6, **sections: Any) -> TrainKTOConfig:
    settings: dict[str, Any] = {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 3, "seed": 5},
        "pairs": {"path": str(base / "thumbs.jsonl"), "validation": 0.2, "test": 0.2},
        "model": {"path": str(base / "model")},
        "learning": {
            "steps": steps,
            "batch_size": 8,
            "micro_batch_size": 3,
            "learning_rate": 3e-3,
            "warmup": 0.0,
        },
        "validation": {"every": 2},
    }
    for name, section in sections.items():
        known = settings.get(name)
        settings[name] = {**known, **section} if isinstance(known, dict) else section
    return build_from_dict(settings, TrainKTOConfig)


def weights(folder: Path) -> dict[str, Tensor]:
    return LanguagePolicy.from_pretrained(folder / "checkpoints" / "last" / "policy").state_dict()


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_kto.train(small(base, tmp_path_factory.mktemp("kto") / "run")).folder


# ---------------------------------------------------------------- mismatched texts


def laid_out(prompts: list[list[int]], completions: list[list[int]]) -> TokenizedTexts:
    texts = [Encoded(p, c, [True] * len(c)) for p, c in zip(prompts, completions, strict=True)]
    return lay_out(texts, pad=0)


def parts(texts: TokenizedTexts, row: int) -> tuple[list[int], list[int]]:
    """Prompt and completion of a row, as tokens."""
    ids, real, mask = texts.input_ids[row], texts.attention_mask[row].bool(), texts.mask[row]
    return ids[real & ~mask].tolist(), ids[mask].tolist()


def test_every_prompt_meets_an_answer_to_another_and_every_answer_is_used_once() -> None:
    number = torch.tensor([0, 1, 0, 2, 1, 3, 0, 4])
    prompts = [[10 + int(n)] * (1 + int(n) % 3) for n in number]
    completions = [[50 + row] * (1 + row % 4) for row in range(8)]
    mixed, comparable = mismatched_texts(laid_out(prompts, completions), number, context=20, seed=3)
    assert comparable.all()
    used = []
    for row in range(8):
        prompt, completion = parts(mixed, row)
        assert prompt == prompts[row]
        used.append(completions.index(completion))
        assert number[used[-1]] != number[row]
    assert sorted(used) == list(range(8))


def test_a_prompt_with_most_of_the_rows_is_left_out_where_it_meets_itself() -> None:
    number = torch.tensor([0, 0, 0, 0, 1])
    texts = laid_out([[7]] * 4 + [[8]], [[20 + row] for row in range(5)])
    mixed, comparable = mismatched_texts(texts, number, context=20, seed=0)
    assert comparable.sum() == 2
    for row in comparable.nonzero().flatten().tolist():
        assert (parts(mixed, row)[1] == [24]) == (row != 4)


def test_a_mixture_is_cut_at_the_context() -> None:
    texts = laid_out([[1] * 5, [2]], [[3], [4] * 5])
    mixed, comparable = mismatched_texts(texts, torch.tensor([0, 1]), context=6, seed=0)
    assert parts(mixed, 0) == ([1] * 5, [4])
    assert parts(mixed, 1) == ([2], [3])
    assert int(mixed.attention_mask.sum(1).max()) == 6
    assert comparable.all()


def test_the_baseline_is_one_for_the_whole_step() -> None:
    """Micro-batches of any size give the mean over all rows, never below 0."""
    torch.manual_seed(1)
    tokenizer = character_tokenizer("abc")
    policy = LanguagePolicy(new_language_model(ModelConfig(layers=1, width=8, heads=1, context=16), tokenizer))
    policy = policy.double()
    texts = laid_out([[4], [5, 6], [6]], [[4, 2], [5, 5, 2], [2]])
    mixed, comparable = mismatched_texts(texts, torch.tensor([0, 1, 2]), context=16, seed=0)
    own = torch.stack([policy_log_prob(policy, mixed, row) for row in range(3)])
    for reference, expected in ((own - torch.tensor([3.0, -1.0, 1.0]), 1.0), (own + 5.0, 0.0)):
        data = Verdicts(texts, torch.ones(3).bool(), mixed, comparable, own, reference)
        for size in (1, 2, 3):
            learning = train_kto.LearningConfig(batch_size=3, micro_batch_size=size)
            found = baseline_of(policy, data, torch.tensor([2, 0, 1]), learning=learning)
            assert float(found) == pytest.approx(expected, abs=1e-5)
    alone = replace(data, comparable=torch.zeros(3).bool())
    assert float(baseline_of(policy, alone, torch.tensor([0, 1]), learning=train_kto.LearningConfig())) == 0.0


def policy_log_prob(policy: LanguagePolicy, texts: TokenizedTexts, row: int) -> Tensor:
    prompt, completion = parts(texts, row)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(completion)), completion].sum()


# ---------------------------------------------------------------- the recipe


def test_the_first_loss_is_one_half(trained: Path) -> None:
    """Policy and reference are one: rewards and baseline are 0, the sigmoid one half."""
    first, last = rows(trained)[0], rows(trained)[-1]
    assert first["loss/total"] == pytest.approx(0.5, abs=1e-6)
    assert first["kl"] == pytest.approx(0.0, abs=1e-5)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "share/chosen"} <= last.keys()
    assert last["loss/total"] < 0.5 - 0.005
    assert (last["samples"], last["epoch"]) == (48, 1)


def test_it_learns_from_thumbs(tmp_path: Path, base: Path) -> None:
    learning = {"learning_rate": 1e-2, "micro_batch_size": None, "batch_size": 16}
    config = small(base, tmp_path / "run", steps=30, learning=learning, validation={"every": 30})
    folder = train_kto.train(config).folder
    last = rows(folder)[-1]
    assert last["eval/rewards/auc"] == 1.0
    assert last["eval/rewards/chosen"] > 0.1 > -0.1 > last["eval/rewards/rejected"]
    results = evaluate_run(folder, EvaluateConfig(splits=("validation", "test")))
    assert results["validation"]["rewards/margins"] == pytest.approx(last["eval/rewards/margins"], rel=1e-5)
    test = results["test"]
    right = round(test["rewards/accuracies"] * test["texts"])
    assert (test["rewards/accuracies_low"], test["rewards/accuracies_high"]) == wilson_interval(right, 12)
    assert test["rewards/auc"] == 1.0


def test_it_resumes_to_the_bit(tmp_path: Path, base: Path, trained: Path) -> None:
    class InterruptError(Exception):
        pass

    original = Run.log

    def log(self: Run, metrics: Mapping[str, float], *, global_step: int) -> None:
        if global_step == 5:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    config = small(base, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(InterruptError):
            train_kto.train(config)
    torch.manual_seed(12345)
    train_kto.train(config, resume=tmp_path / "run")
    expected, found = weights(trained), weights(tmp_path / "run")
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert rows(tmp_path / "run") == rows(trained)


def test_micro_batches_change_nothing(tmp_path: Path, base: Path, trained: Path) -> None:
    config = small(base, tmp_path / "run", learning={"micro_batch_size": None})
    found = rows(train_kto.train(config).folder)
    for ours, theirs in zip(found, rows(trained), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_the_balance_of_the_two_kinds_is_said(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_thumbs(tmp_path / "few.jsonl", bad=6)
    train_kto.train(small(base, tmp_path / "run", steps=1, pairs={"path": path}))
    said = capsys.readouterr().out
    good, bad = (int(said.split(f" {word}")[0].split()[-1]) for word in ("desirable", "undesirable"))
    assert good + bad == 36
    assert f"kto.undesirable_weight={good / bad:.3g} gives 1" in said
    weighed = small(base, tmp_path / "two", steps=1, pairs={"path": path}, kto={"undesirable_weight": good / bad})
    train_kto.train(weighed)
    assert "the paper advises" not in capsys.readouterr().out


def test_auc_by_hand() -> None:
    """Of six comparisons three are won and one is a tie."""
    assert auc(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 1.0, 4.0])) == pytest.approx((3 + 0.5) / 6)


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, base: Path) -> None:
    def write(name: str, lines: list[dict[str, Any]]) -> dict[str, str]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"path": str(path)}

    praise = write("praise", [{"prompt": f"q{i}", "completion": "yes", "label": True} for i in range(40)])
    held_out = write("held", [{"prompt": f"h{i}", "completion": "yes", "label": True} for i in range(4)])["path"]
    one = [{"prompt": "q", "completion": f"yes {i}", "label": i % 2 == 0} for i in range(40)]
    single = {**write("one", one), "validation_path": held_out, "test_path": held_out}
    long = [{"prompt": f"q{i}", "completion": "yes" * 20, "label": i % 2 == 0} for i in range(40)]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"learning": {"batch_size": 37}}, r"36 texts to train on are fewer than learning\.batch_size 37"),
        ({"pairs": praise}, r"none of the 24 texts to train on is undesirable \(column 'label'\)"),
        ({"pairs": single}, "all texts answer one prompt"),
        ({"pairs": write("long", long)}, "every answer is cut before its end"),
        ({"model": {"path": None}}, r"model\.path: "),
    ]
    for number, (sections, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            train_kto.train(small(base, tmp_path / f"run{number}", **sections))
