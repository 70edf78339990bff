"""Direct preference recipes in miniature: ln 2 at first, every loss learns, it resumes to the bit."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf import train_dpo
from llm_rlhf.evaluate_preference import EvaluateConfig, evaluate_run
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.loading import ModelConfig, new_language_model
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.preferences import reference_cache
from llm_rlhf.preferences.reference_cache import CACHE
from llm_rlhf.train_dpo import TrainDPOConfig
from policy_core.preference import NEEDS_REFERENCE, PREFERENCE_LOSSES

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 :"


def write_pairs(path: Path, *, count: int = 50, margins: bool = True, sign: float = 1.0) -> str:
    """The answer whose first letter is right wins, be it longer or shorter."""
    rows = []
    for i in range(count):
        good, bad = ("yes", "no") if i % 3 else ("yo", "nope")
        row = {"prompt": f"q{i} ok: ", "chosen": good, "rejected": bad}
        rows.append(row | ({"margin": sign * (1.0 + i % 4)} if margins else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new model, and the pairs beside it."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = character_tokenizer(LETTERS)
    torch.manual_seed(0)
    model = new_language_model(ModelConfig(layers=1, width=16, heads=2, context=24), tokenizer)
    LanguagePolicy(model).save_pretrained(folder / "model")
    tokenizer.save_pretrained(str(folder / "model"))
    write_pairs(folder / "pairs.jsonl")
    return folder


def small(base: Path, folder: Path, *, loss: str = "dpo", steps: int = 6, **sections: Any) -> TrainDPOConfig:
    settings: dict[str, Any] = {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 3, "seed": 5},
        "pairs": {"path": str(base / "pairs.jsonl"), "validation": 0.2, "test": 0.2},
        "model": {"path": str(base / "model")},
        "preference": {"loss": loss},
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
    return build_from_dict(settings, TrainDPOConfig)


def weights(folder: Path) -> dict[str, Tensor]:
    return LanguagePolicy.from_pretrained(folder / "checkpoints" / "last" / "policy").state_dict()


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_dpo.train(small(base, tmp_path_factory.mktemp("dpo") / "run")).folder


def test_the_first_loss_is_ln_2(trained: Path) -> None:
    """The reference's log-probs come from another pass than the policy's, in other company: rounding is all."""
    first = rows(trained)[0]
    assert first["global_step"] == 1
    assert first["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert rows(trained)[-1]["loss/total"] < math.log(2) - 0.02


def test_it_reports_and_keeps_a_plain_model(trained: Path) -> None:
    last = rows(trained)[-1]
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
    assert names | {f"eval/{name}" for name in names} <= last.keys()
    assert {"eval/loss", "eval/rewards/accuracies_low", "eval/accuracies/chosen_shorter", "lr"} <= last.keys()
    assert last["eval/pairs"] == 10
    assert (last["samples"], last["epoch"]) == (48, 1)
    assert (trained / "checkpoints" / "best").exists()
    assert not (trained / "reference").exists(), "no copy of the reference is kept"
    plain = AutoModelForCausalLM.from_pretrained(str(trained / "checkpoints" / "last" / "policy"))
    assert plain.config.vocab_size == len(LETTERS) + 4


@pytest.mark.parametrize("loss", sorted(PREFERENCE_LOSSES))
def test_every_loss_learns_what_is_preferred(tmp_path: Path, base: Path, loss: str) -> None:
    """On prompts that it never saw, whether the better answer is the longer or the shorter one."""
    beta = {"simpo": 2.0, "orpo": 1.0}.get(loss, 0.3)
    config = small(
        base,
        tmp_path / "run",
        loss=loss,
        steps=25,
        preference={"beta": beta},
        learning={"learning_rate": 1e-2, "micro_batch_size": None, "batch_size": 16},
        validation={"every": 25},
    )
    last = rows(train_dpo.train(config).folder)[-1]
    assert last["eval/accuracies/chosen_longer"] == last["eval/accuracies/chosen_shorter"] == 1.0
    assert last["eval/rewards/margins"] > 0
    assert (tmp_path / "run" / CACHE).exists() == (loss in NEEDS_REFERENCE)


class InterruptError(Exception):
    """What a kill is in these tests."""


def broken_at(step: int, config: TrainDPOConfig) -> Path:
    """The folder of a run that was killed before it logged `step`."""
    original = Run.log

    def log(self: Run, metrics: Mapping[str, float], *, global_step: int) -> None:
        if global_step == step:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(InterruptError):
            train_dpo.train(config)
    torch.manual_seed(12345)  # a new process would not have the old one's global generator
    return Path(str(config.run.folder))


def same_run(expected: Path, found: Path) -> None:
    left, right = weights(expected), weights(found)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert rows(found) == rows(expected)


def test_it_resumes_to_the_bit_without_looking_at_the_reference(
    tmp_path: Path, base: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(base, tmp_path / "run")
    folder = broken_at(5, config)

    def refuse(*arguments: Any) -> LanguagePolicy:
        raise AssertionError("the reference was loaded although its log-probs are there")

    monkeypatch.setattr(reference_cache, "_load_reference", refuse)
    train_dpo.train(config, resume=folder)
    same_run(trained, folder)


def test_it_resumes_to_the_bit_after_its_cache_was_lost(
    tmp_path: Path, base: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(base, tmp_path / "run")
    folder = broken_at(5, config)
    (folder / CACHE).unlink()
    train_dpo.train(config, resume=folder)
    assert "is gone or belongs to other texts" in capsys.readouterr().out
    same_run(trained, folder)


def test_a_cache_beside_the_data_serves_other_runs(
    tmp_path: Path, base: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache: dict[str, Any] = {"reference_cache": str(tmp_path / "shared.safetensors")}
    first = train_dpo.train(small(base, tmp_path / "one", **cache)).folder
    assert not (first / CACHE).exists()
    capsys.readouterr()
    second = train_dpo.train(small(base, tmp_path / "two", **cache)).folder
    assert "reference log-probs: read from" in capsys.readouterr().out
    same_run(trained, first)
    same_run(first, second)
    with pytest.raises(UserError, match=r"reference_cache: .* belongs to another reference model"):
        train_dpo.train(small(base, tmp_path / "three", model={"path": str(first)}, **cache))


def test_another_model_can_be_the_reference(tmp_path: Path, base: Path, trained: Path) -> None:
    """Going on from a run with its own beginning as the anchor: the rewards begin where that run left off."""
    config = small(base, tmp_path / "run", steps=1, model={"path": str(trained)}, reference=str(base / "model"))
    found = rows(train_dpo.train(config).folder)
    assert found[0]["rewards/margins"] > 0.02
    assert evaluate_run(tmp_path / "run")["test"]["pairs"] == 10


def test_bfloat16_learns_near_float32_and_keeps_float32_weights(tmp_path: Path, base: Path, trained: Path) -> None:
    config = small(base, tmp_path / "run", learning={"precision": "bf16"})
    found = rows(train_dpo.train(config).folder)
    assert found[0]["loss/total"] == pytest.approx(math.log(2), abs=0.02)
    assert found[-1]["eval/loss"] == pytest.approx(rows(trained)[-1]["eval/loss"], abs=0.02)
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}


def test_evaluation_reads_what_the_run_kept(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> LanguagePolicy:
        raise AssertionError("the reference was loaded although its log-probs are there")

    monkeypatch.setattr(reference_cache, "_load_reference", refuse)
    results = evaluate_run(trained, EvaluateConfig(splits=("validation", "test")))
    last = rows(trained)[-1]
    for name in ("loss", "rewards/accuracies", "rewards/accuracies_low", "rewards/margins"):
        assert results["validation"][name] == pytest.approx(last[f"eval/{name}"], abs=1e-6)
    test = results["test"]
    assert test["rewards/accuracies_low"] <= test["rewards/accuracies"] <= test["rewards/accuracies_high"]
    assert json.loads((trained / "eval.json").read_text())["splits"] == results


def test_dry_run_does_one_update(tmp_path: Path, base: Path) -> None:
    config = small(base, tmp_path / "run")
    result = train_dpo.train(replace(config, run=replace(config.run, dry_run=True)))
    assert result.metrics["global_step"] == 1


def test_an_adapter_begins_at_its_reference(tmp_path: Path, base: Path) -> None:
    """The base model under a new adapter is the reference, and its weights do not move."""
    config = small(base, tmp_path / "run", model={"lora": {"rank": 2}}, learning={"learning_rate": 3e-2})
    found = rows(train_dpo.train(config).folder)
    assert found[0]["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1]["loss/total"] < math.log(2) - 0.01
    assert evaluate_run(tmp_path / "run")["test"]["loss"] < math.log(2)


# ---------------------------------------------------------------- what cannot be done


def test_what_is_wrong_with_the_data_is_said_in_one_line(tmp_path: Path, base: Path) -> None:
    bare, few = write_pairs(tmp_path / "bare.jsonl", margins=False), write_pairs(tmp_path / "few.jsonl", count=10)
    against = write_pairs(tmp_path / "against.jsonl", sign=-1.0)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"learning": {"batch_size": 31}}, r"30 pairs to train on are fewer than learning\.batch_size 31"),
        ({"pairs": {"path": few}}, r"6 pairs to train on are fewer than learning\.batch_size 8"),
        ({"loss": "odpo", "pairs": {"path": bare}}, r"pairs\.margin: .* 50 of 50 pairs have no number above 0"),
        ({"loss": "tso", "pairs": {"path": against}}, r"pairs\.margin: .* 50 of 50 pairs have a number below 0"),
        ({"pairs": {"path": str(tmp_path / "none.jsonl")}}, "none.jsonl"),
        ({"pairs": {"path": ""}}, r"pairs\.path: "),
        ({"model": {"path": None}}, r"model\.path: "),
        ({"reference": str(tmp_path / "none")}, "reference: .* does not exist"),
        (
            {"learning": {"learning_rate": 1e30, "max_grad_norm": 1e30}},
            r"lower (learning rate|learning\.learning_rate)",
        ),
    ]
    for number, (sections, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            train_dpo.train(small(base, tmp_path / f"run{number}", **sections))


def test_no_held_out_pairs_are_said_unless_they_are_not_wanted(tmp_path: Path, base: Path) -> None:
    own = write_pairs(tmp_path / "own.jsonl", count=3)
    ties = tmp_path / "ties.jsonl"
    ties.write_text(json.dumps({"prompt": "q: ", "chosen": "yes", "rejected": "no", "tie": True}) + "\n")
    pairs = {"validation_path": str(ties), "test_path": own}
    with pytest.raises(UserError, match=r"pairs\.validation: no pairs are held out to validate on"):
        train_dpo.train(small(base, tmp_path / "one", pairs=pairs))
    config = small(base, tmp_path / "two", steps=1, pairs=pairs, validation={"every": 0})
    assert train_dpo.train(config).metrics["global_step"] == 1
    with pytest.raises(UserError, match=r"evaluation\.splits: no rows are held out in 'validation'"):
        evaluate_run(tmp_path / "two", EvaluateConfig(splits=("validation",)))


def test_bad_settings_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nll_coef must not be negative"):
        small(base, tmp_path / "run", nll_coef=-1.0)
    with pytest.raises(UserError, match=r"preference\.loss 'simpo' has no reference"):
        small(base, tmp_path / "run", loss="simpo", reference_cache="c.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("recipe: llm/dpo\n")
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate_run(tmp_path / "empty")
