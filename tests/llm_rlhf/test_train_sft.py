"""Supervised fine-tuning with packing, adapters, conversations and bfloat16: it learns, resumes to the bit, says
what it cannot do. The recipe's plain form is tested with the other recipes."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf import train_sft
from llm_rlhf.data.chat import PLAIN
from llm_rlhf.data.texts import Batches, Encoded, encode, lay_out
from llm_rlhf.evaluate import EvaluateConfig, evaluate_run
from llm_rlhf.models import precision
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.lora import ADAPTER, WEIGHTS
from llm_rlhf.models.precision import require_precision
from llm_rlhf.models.tokenizer import load_tokenizer
from llm_rlhf.online.moved import Counters
from llm_rlhf.tasks.task import build_task
from llm_rlhf.train_sft import (
    SupervisedConfig,
    TextsConfig,
    TrainSFTConfig,
    make_optimizer,
    supervised_step,
)

WALKS = {"name": "random_walks", "random_walks": {"walks": 60}}
MODEL = {"layers": 1, "width": 16, "heads": 2, "context": 48}
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def small(folder: Path, **sections: Any) -> TrainSFTConfig:
    settings = {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 3, "seed": 5},
        "task": WALKS,
        "model": MODEL,
        "validation": {"every": 0},
        "log_every": 1,
        **sections,
    }
    settings["sft"] = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, **sections.get("sft", {})}
    return build_from_dict(settings, TrainSFTConfig)


def policy_folder(run: Path) -> Path:
    return run / "checkpoints" / "last" / "policy"


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def resumed(make: Callable[[Path], TrainSFTConfig], folder: Path) -> Path:
    """Interrupted after the checkpoint at three against six steps at a stretch: equal to the last bit."""

    class InterruptError(Exception):
        pass

    whole = train_sft.train(make(folder / "whole")).folder
    original = Run.log

    def log(self: Any, metrics: Any, *, global_step: int) -> None:
        if global_step == 5:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    config = make(folder / "broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(InterruptError):
            train_sft.train(config)
    torch.manual_seed(12345)  # a new process would not have the old one's global generator
    train_sft.train(config, resume=folder / "broken")
    expected, found = (LanguagePolicy.from_pretrained(run).state_dict() for run in (whole, folder / "broken"))
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert rows(folder / "broken") == rows(whole)
    return whole


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    return train_sft.train(small(folder, sft={"steps": 20, "batch_size": 32})).folder


def test_packing_resumes_to_the_bit_and_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = resumed(lambda folder: small(folder, texts={"packing": True}), tmp_path)
    logged = rows(run)
    assert logged[-1]["loss/sft"] < logged[0]["loss/sft"] - 0.3
    assert "rows of 48 tokens" in capsys.readouterr().out
    # A row holds several walks, so as many updates have seen more than as many texts have tokens.
    assert logged[-1]["tokens"] > 6 * 4 * 30


def test_lora_resumes_to_the_bit_and_its_folders_load(tmp_path: Path, base: Path) -> None:
    lora = {"path": str(base), "lora": {"rank": 4, "alpha": 8.0, "merged": True}}
    run = resumed(lambda folder: small(folder, model=lora, texts={"packing": True}), tmp_path)
    assert (policy_folder(run) / ADAPTER).is_file()
    assert not (policy_folder(run) / "config.json").exists()
    assert all("lora_" in name for name in load_file(str(policy_folder(run) / WEIGHTS)))
    merged = str(run / "checkpoints" / "last" / "merged")
    plain, ours = AutoModelForCausalLM.from_pretrained(merged), LanguagePolicy.from_pretrained(run)
    ids = torch.tensor([AutoTokenizer.from_pretrained(merged).encode("bcd")])
    with torch.no_grad():
        found = ours.model(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, found, atol=1e-5, rtol=0)
        before = LanguagePolicy.from_pretrained(base).model(input_ids=ids).logits
    assert (found - before).abs().max() > 0.05
    assert set(evaluate_run(run, EvaluateConfig(samples=1))) == {"prompted", "test"}
    further = {"path": str(run), "lora": {"rank": 4, "alpha": 8.0}}
    again = train_sft.train(
        small(tmp_path / "again", model=further, sft={"steps": 1, "learning_rate": 1e-5})
    ).folder
    old, new = (load_file(str(policy_folder(one) / WEIGHTS)) for one in (run, again))
    assert all(0 < (old[name] - new[name]).abs().max() < 1e-4 for name in old)


def conversations(path: Path) -> str:
    """Questions about letters in two turns, of which the first answer is always the same."""
    lines = []
    for number in range(40):
        letter = "abcdefgh"[number % 8]
        contents = (f"{letter}{number}", "ok", letter, letter.upper())
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return str(path)


def test_conversations_learn_what_the_assistant_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"name": "rows", "data": conversations(tmp_path / "chats.jsonl"), "rows": {"max_new_tokens": 8}}
    config = small(
        tmp_path / "run",
        task=task,
        model={**MODEL, "context": 96, "width": 32},
        texts={"packing": True},
        sft={"steps": 60, "batch_size": 8},
        validation={"every": 60, "samples": 1},
    )
    run = train_sft.train(config).folder
    assert "the tokenizer has no chat template" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(str(policy_folder(run)))
    assert tokenizer.chat_template == PLAIN
    logged = rows(run)[-1]
    assert logged["eval/greedy"] == 1.0  # the first answer, "ok", and then its EOS
    assert logged["eval/finished"] == 1.0
    assert logged["loss/sft"] < 0.5  # the users' turns hold random letters, which nobody could foretell


def test_texts_that_are_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"prompt": f"q{i}", "completion": "a" * (60 if i == 3 else 3)}) for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    shares = {"test": 0.05, "validation": 0.05}
    task = {"name": "rows", "seed": 1, "data": str(tmp_path / "rows.jsonl"), "rows": shares}
    with pytest.raises(
        UserError,
        match=r"rows\.jsonl:4: a prompt of 2 tokens and a completion of 61 do not fit the model's context of 48",
    ):
        train_sft.train(small(tmp_path / "run", task=task, sft={"steps": 1}))
    train_sft.train(small(tmp_path / "run", task=task, texts={"cut": True}, sft={"steps": 1}))
    assert "1 of 26 completions cut to the context of 48" in capsys.readouterr().out


@pytest.mark.parametrize(("packing", "passes"), [(False, None), (False, 3), (True, 1)])
def test_the_held_out_loss_is_plain_transformers(tmp_path: Path, packing: bool, passes: int | None) -> None:
    """Of both of the assistant's turns: "ok", a letter and an EOS behind each are 5 tokens of a conversation."""
    config = small(
        tmp_path / "run",
        task={
            "name": "rows",
            "data": conversations(tmp_path / "chats.jsonl"),
            "rows": {"max_new_tokens": 8, "validation": 0.25},
        },
        model={**MODEL, "context": 96},
        texts={"packing": packing},
        sft={"micro_batch_size": passes},
        validation={"every": 3, "samples": 1, "prompts": 7},
    )
    run = train_sft.train(config).folder
    logged = [row.get("eval/loss") for row in rows(run)]
    assert [value is not None for value in logged] == [False, False, True, False, False, True]
    tokenizer = load_tokenizer(str(policy_folder(run)))
    model = AutoModelForCausalLM.from_pretrained(str(policy_folder(run)))
    nats = []
    for example in build_task(config.task).splits["validation"][:7]:
        text = encode(tokenizer, example.prompt, example.completion)
        with torch.no_grad():
            judged = model(torch.tensor([text.prompt + text.completion])).logits[0].log_softmax(-1)
        whole = enumerate(zip(text.completion, text.mask, strict=True), start=len(text.prompt))
        nats += [-float(judged[place - 1, token]) for place, (token, learned) in whole if learned]
    assert len(nats) == 7 * 5
    assert logged[-1] == pytest.approx(sum(nats) / 35, abs=1e-5)


def test_the_held_out_loss_moves_nothing_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """The same weights with and without validation, and the same numbers after a break."""
    task = {"name": "rows", "data": conversations(tmp_path / "chats.jsonl"), "rows": {"max_new_tokens": 8}}

    def make(folder: Path, every: int = 2) -> TrainSFTConfig:
        return small(
            folder,
            task=task,
            model={**MODEL, "context": 96},
            texts={"packing": True},
            validation={"every": every, "samples": 1},
        )

    whole = resumed(make, tmp_path)
    assert sum("eval/loss" in row for row in rows(whole)) == 3
    blind = train_sft.train(make(tmp_path / "blind", 0)).folder
    assert not any("eval/loss" in row for row in rows(blind))
    expected, found = (LanguagePolicy.from_pretrained(run).state_dict() for run in (blind, whole))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("packing", [False, True])
def test_a_held_out_text_that_is_too_long_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], packing: bool
) -> None:
    """And one that is longer than the training texts' packed rows gets a longer row; without an answer to the
    prompts there is no loss."""
    path = tmp_path / "rows.jsonl"

    def task(lengths: dict[str, int]) -> dict[str, Any]:
        lines = [json.dumps({"prompt": f"q{i}", "completion": "a" * lengths.get(f"q{i}", 3)}) for i in range(30)]
        path.write_text("\n".join(lines))
        return {"name": "rows", "data": str(path), "rows": {"test": 0.05, "validation": 0.1, "max_new_tokens": 4}}

    texts = {"packing": packing, "packed_length": 8 if packing else None}
    settings = {"texts": texts, "sft": {"steps": 1}, "validation": {"every": 1, "samples": 1}}
    config = small(tmp_path / "run", task=task({}), **settings)
    held_out = [example.prompt for example in build_task(config.task).splits["validation"]]
    task({held_out[0]: 60, held_out[1]: 20})
    assert rows(train_sft.train(config).folder)[0]["eval/loss"] > 0
    assert "1 of 3 validation completions cut to the context of 48" in capsys.readouterr().out
    task(dict.fromkeys(held_out, 0))
    silent = train_sft.train(replace(config, run=replace(config.run, folder=str(tmp_path / "silent")))).folder
    assert "eval/greedy" in rows(silent)[0]
    assert "eval/loss" not in rows(silent)[0]


def test_empty_completions_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"prompt": f"q{i}", "completion": "a" if i % 3 else ""}) for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    task = {"name": "rows", "data": str(tmp_path / "rows.jsonl"), "rows": {"test": 0.05, "validation": 0.05}}
    train_sft.train(small(tmp_path / "run", task=task, sft={"steps": 1}))
    said = capsys.readouterr().out
    count = re.search(r"(\d+) of 26 completions are empty: there the model learns to say nothing", said)
    assert count is not None
    assert 10 - 4 <= int(count[1]) <= 10  # of 30 rows ten are empty, and four are held out


def test_only_adapters_are_in_the_optimizer(base: Path) -> None:
    lora = build_from_dict({"path": str(base), "lora": {"rank": 2}}, ModelConfig)
    policy, _ = build_policy(lora, alphabet="")
    (group,) = make_optimizer(policy, SupervisedConfig()).param_groups
    assert len(group["params"]) == 8
    assert sum(parameter.numel() for parameter in group["params"]) < sum(p.numel() for p in policy.parameters()) / 4


def one_step(
    precision: str, *, checkpointing: bool = False, micro_batch_size: int | None = None
) -> tuple[float, Tensor]:
    """Loss of one small update, and the weights after it."""
    torch.manual_seed(0)
    model = ModelConfig(layers=2, width=32, heads=2, context=48, gradient_checkpointing=checkpointing)
    policy, _ = build_policy(model, alphabet="abcdefgh")
    texts = [Encoded([4 + i], [5, *[6 + i] * i, 2], [True] * (i + 2)) for i in range(5)]
    config = SupervisedConfig(
        batch_size=5,
        micro_batch_size=micro_batch_size,
        learning_rate=1e-2,
        precision=precision,  # type: ignore[arg-type]
    )
    data, batches = lay_out(texts, pad=0), Batches(5, 5, seed=0)
    optimizer = make_optimizer(policy, config)
    counters = Counters()
    losses = [
        supervised_step(policy, optimizer, data, batches, config, step=step, counters=counters)["loss/sft"]
        for step in (1, 2)
    ]
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())
    return losses[1], torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


@pytest.mark.skipif(not BFLOAT16, reason="this processor has no bfloat16")
def test_bfloat16_is_near_float32_and_is_not_it() -> None:
    (loss, weights), (other, others) = one_step("float32"), one_step("bf16")
    assert loss != other
    assert loss == pytest.approx(other, rel=0.02)
    assert torch.nn.functional.cosine_similarity(weights, others, dim=0) > 0.99


def test_gradient_checkpointing_trains_the_same() -> None:
    (loss, weights), (other, others) = one_step("float32"), one_step("float32", checkpointing=True)
    assert loss == pytest.approx(other, abs=1e-6)
    torch.testing.assert_close(weights, others, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_micro_batches_change_nothing(size: int) -> None:
    """Texts of different lengths: each part's share is of all that the step learns, not of its own."""
    (loss, weights), (other, others) = one_step("float32"), one_step("float32", micro_batch_size=size)
    assert loss == pytest.approx(other, abs=1e-6)
    torch.testing.assert_close(weights, others, atol=1e-5, rtol=0)


def test_bad_settings_and_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"texts\.packed_length must be at least 2"):
        TextsConfig(packed_length=1)
    require_precision("float32", setting="sft.precision")
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    with pytest.raises(UserError, match=r"sft\.precision: this processor has no bfloat16"):
        require_precision("bf16", setting="sft.precision")


def test_a_tokenizer_without_eos_is_refused_and_without_pad_is_not(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "model"
    policy, tokenizer = build_policy(ModelConfig(path=str(base)), alphabet="")
    policy.save_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(str(folder))
    run = train_sft.train(small(tmp_path / "run", model={"path": str(folder)})).folder
    with_pad = train_sft.train(small(tmp_path / "other", model={"path": str(base)})).folder
    for name, tensor in LanguagePolicy.from_pretrained(run).state_dict().items():
        torch.testing.assert_close(tensor, LanguagePolicy.from_pretrained(with_pad).state_dict()[name])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(str(folder))
    with pytest.raises(UserError, match="the tokenizer has no eos token; set one and save it again"):
        train_sft.train(replace(small(tmp_path / "no"), model=ModelConfig(path=str(folder))))
