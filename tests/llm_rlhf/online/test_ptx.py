"""PPO-ptx: which tokens of which texts are learned, how the loss is made, and that a run keeps what it learned."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf import train_grpo, train_ppo
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.online.pretraining_mix import PretrainingMix, PretrainingMixConfig
from llm_rlhf.tasks.task import TaskConfig, build_task
from llm_rlhf.train_grpo import TrainGRPOConfig
from llm_rlhf.train_ppo import TrainPPOConfig

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def made() -> tuple[LanguagePolicy, PreTrainedTokenizerBase]:
    """At a temperature, which texts that nobody drew know nothing of."""
    torch.manual_seed(0)
    model = ModelConfig(layers=1, width=16, heads=2, context=12)
    policy, tokenizer = build_policy(model, alphabet="abcdefghij \n", temperature=0.5)
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return policy, tokenizer


def mix(file: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PretrainingMix:
    config = PretrainingMixConfig(**{"coef": 0.5, "path": str(file), **settings})
    return PretrainingMix(config, tokenizer, context=12, seed=0)


def texts(data: PretrainingMix) -> list[tuple[list[int], list[int]]]:
    """(tokens, those that are learned) of every text."""
    observations, mask = data.batch(torch.arange(len(data)))
    real = observations["attention_mask"].bool()
    return [
        (ids[inside].tolist(), ids[learned].tolist())
        for ids, inside, learned in zip(observations["input_ids"], real, mask, strict=True)
    ]


def test_every_token_of_a_long_text_is_learned_once(
    tmp_path: Path, made: tuple[LanguagePolicy, PreTrainedTokenizerBase]
) -> None:
    """Pieces overlap by the token that the next one starts from; the document begins with BOS and ends with EOS."""
    tokenizer = made[1]
    file = tmp_path / "texts.txt"
    file.write_text("abcdefghij\nab\n\n\ncd\n")
    ids = tokenizer.encode("abcdefghij\nab", add_special_tokens=False)
    found = texts(mix(file, tokenizer, length=6))
    assert [tokens for tokens, _ in found] == [
        [BOS, *ids[:5]],
        ids[4:10],
        [*ids[9:], EOS],
        [BOS, *tokenizer.encode("cd", add_special_tokens=False), EOS],
    ]
    assert [learned for _, learned in found] == [tokens[1:] for tokens, _ in found]


def test_of_a_demonstration_the_completion_is_learned(
    tmp_path: Path, made: tuple[LanguagePolicy, PreTrainedTokenizerBase]
) -> None:
    tokenizer = made[1]
    file = tmp_path / "texts.jsonl.gz"
    lines = [{"prompt": "ab", "completion": "cd"}, {"text": "efg"}, {"text": ""}]
    with gzip.open(file, "wt") as out:
        out.write("\n".join(json.dumps(line) for line in lines))
    a, b, c, d, e, f, g = tokenizer.encode("abcdefg", add_special_tokens=False)
    table = tmp_path / "texts.parquet"
    parquet.write_table(
        pyarrow.table({name: [line.get(name) for line in lines] for name in ("prompt", "completion", "text")}),
        table,
    )
    for path in (file, table):
        assert texts(mix(path, tokenizer)) == [
            ([a, b, c, d, EOS], [c, d, EOS]),
            ([BOS, e, f, g, EOS], [e, f, g, EOS]),
        ]


def test_unknown_characters_are_read_and_not_learned(
    tmp_path: Path, made: tuple[LanguagePolicy, PreTrainedTokenizerBase]
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("a?b")
    data = mix(file, made[1])
    a, unknown, b = made[1].encode("a?b", add_special_tokens=False)
    assert texts(data) == [([BOS, a, unknown, b, EOS], [a, b, EOS])]
    assert data.note == f"ptx: {file}: 1 texts, 5 tokens, 1 of them unknown to the tokenizer and not learned"
    _, other = build_policy(ModelConfig(layers=1, width=8, heads=2), alphabet="ab")
    other.unk_token = other.eos_token  # as GPT-2's tokenizer has it: EOS must be learned none the less
    file.write_text("ab")
    assert texts(mix(file, other))[0][1] == [*other.encode("ab", add_special_tokens=False), EOS]


def test_loss_is_the_mean_over_tokens_at_temperature_1(
    tmp_path: Path, made: tuple[LanguagePolicy, PreTrainedTokenizerBase]
) -> None:
    policy, tokenizer = made
    file = tmp_path / "texts.jsonl"
    file.write_text('{"prompt": "abc", "completion": "de"}\n{"text": "fghij"}\n')
    data = mix(file, tokenizer, coef=0.5, batch_size=2)
    loss, metrics = data.loss(policy)
    total, count = 0.0, 0
    for tokens, learned in texts(data):  # each by itself, without padding
        ids = torch.tensor([tokens])
        with torch.no_grad():
            log_probs = torch.log_softmax(policy.model(input_ids=ids).logits[0], -1)
        for at in range(len(tokens) - len(learned), len(tokens)):
            total -= float(log_probs[at - 1, tokens[at]])
            count += 1
    assert count == 3 + 6
    assert float(metrics["ptx"]) == pytest.approx(total / count, abs=1e-5)
    assert float(loss.detach()) == pytest.approx(0.5 * total / count, abs=1e-5)
    policy.zero_grad()
    loss.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    policy.zero_grad()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", r"a\.txt: there is no text in it \(ptx\.path\)"),
        ("a.txt", "\n \n", "there is no text in it"),
        ("a.txt", "\n\nab\n\xff", r"a\.txt:4: not UTF-8 text"),
        ("a.txt", "???", None),
        (
            "a.jsonl",
            '{"text": "ab"}\n{"words": "ab"}\n',
            r"a\.jsonl:2: there is neither a column 'text' nor 'prompt'",
        ),
        ("a.jsonl", '{"prompt": "ab"}\n', r"a\.jsonl:1: column 'completion' is missing"),
        ("a.jsonl", '{"text": 3}\n', r"a\.jsonl:1: column 'text' is int, not text"),
        ("a.jsonl", "{", r"a\.jsonl:1: not valid JSON"),
        (
            "a.jsonl",
            '{"text": "ab"}\n{"prompt": "abcdef", "completion": "abcdefgh"}\n',
            r"a\.jsonl:2: a prompt of 6 tokens and a completion of 9 do not fit 12",
        ),
    ],
)
def test_bad_files_are_told_by_line(
    tmp_path: Path,
    made: tuple[LanguagePolicy, PreTrainedTokenizerBase],
    name: str,
    content: str,
    message: str | None,
) -> None:
    file = tmp_path / name
    file.write_bytes(content.encode("latin-1"))
    if message is None:  # EOS is all that is left to learn
        assert texts(mix(file, made[1]))[0][1] == [EOS]
        return
    with pytest.raises(UserError, match=message) as caught:
        mix(file, made[1])
    assert "\n" not in str(caught.value)


def test_bad_settings_are_refused(tmp_path: Path, made: tuple[LanguagePolicy, PreTrainedTokenizerBase]) -> None:
    with pytest.raises(UserError, match=r"ptx\.path: .*none\.txt cannot be read"):
        mix(tmp_path / "none.txt", made[1])
    for settings, message in (
        ({"coef": -1.0}, "coef must not be negative"),
        ({"coef": 1.0}, r"ptx\.path: give the file"),
        ({"length": 1}, r"ptx\.length must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            PretrainingMixConfig(**settings)


# ---------------------------------------------------------------- the recipes


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    alphabet = build_task(TaskConfig(name="random_walks")).alphabet
    policy, tokenizer = build_policy(ModelConfig(layers=1, width=16, heads=2, context=16), alphabet=alphabet)
    folder = tmp_path_factory.mktemp("start")
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ptx") / "texts.txt"
    path.write_text("\n\n".join(["abcdefgh" * 3, "hgfedcba" * 2, "aabbccdd"]))
    return path


def settings(folder: Path, start: Path, file: Path, *, updates: int = 4) -> dict[str, Any]:
    return {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 2, "seed": 5},
        "task": {"name": "random_walks", "random_walks": {"walks": 60}},
        "model": {"path": str(start)},
        "generation": {"max_new_tokens": 4},
        "rewards": {"random": 1.0},
        "sampling": {"updates": updates, "prompts": 4},
        "ptx": {"coef": 2.0, "path": str(file), "batch_size": 3},
        "self_imitation": {"coef": 0.5, "threshold": 1.0, "batch_size": 2},
        "validation": {"every": 0},
    }


def ppo(folder: Path, start: Path, file: Path) -> TrainPPOConfig:
    ours = {"ppo": {"minibatch_size": 4, "critic_warmup": 1, "learning_rate": 1e-2}}
    return build_from_dict({**settings(folder, start, file), **ours}, TrainPPOConfig)


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def weights(run: Path) -> dict[str, Tensor]:
    return LanguagePolicy.from_pretrained(run, value_head=True).state_dict()


def test_ppo_learns_the_texts_beside_and_resumes_to_the_bit(tmp_path: Path, start: Path, file: Path) -> None:
    class InterruptError(Exception):
        pass

    whole = train_ppo.train(ppo(tmp_path / "whole", start, file)).folder
    original = Run.log

    def log(self: Any, metrics: Any, *, global_step: int) -> None:
        if global_step == 3:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(InterruptError):
            train_ppo.train(ppo(tmp_path / "broken", start, file))
    torch.manual_seed(12345)
    train_ppo.train(ppo(tmp_path / "broken", start, file), resume=tmp_path / "broken")
    logged = rows(whole)
    assert rows(tmp_path / "broken") == logged
    expected, found = weights(whole), weights(tmp_path / "broken")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "loss/ptx" not in logged[0]  # critic warm-up
    assert logged[-1]["loss/ptx"] < logged[1]["loss/ptx"] - 0.3
    assert "policy/self_imitation_nll" in logged[-1]


def test_a_run_that_began_without_texts_can_go_on_with_them(tmp_path: Path, start: Path, file: Path) -> None:
    config = ppo(tmp_path / "run", start, file)
    without = replace(config, ptx=PretrainingMixConfig(), sampling=replace(config.sampling, updates=2))
    run = train_ppo.train(without).folder
    assert "loss/ptx" not in rows(run)[-1]
    train_ppo.train(config, resume=run)
    assert [("loss/ptx" in row) for row in rows(run)] == [False, False, True, True]


def test_grpo_has_it_too(tmp_path: Path, start: Path, file: Path) -> None:
    ours = {"ppo": {"minibatch_size": 16}, "grpo": {"group_size": 4}}
    config = build_from_dict({**settings(tmp_path / "run", start, file, updates=1), **ours}, TrainGRPOConfig)
    assert "loss/ptx" in train_grpo.train(config).metrics


def test_coef_weighs_the_gradient_and_nothing_else(start: Path, file: Path) -> None:
    policy = LanguagePolicy.from_pretrained(start)
    tokenizer = build_policy(ModelConfig(path=str(start)), alphabet="")[1]
    config = PretrainingMixConfig(coef=1.0, path=str(file), batch_size=3)
    gradients, reported = [], []
    for coef in (1.0, 3.0):
        data = PretrainingMix(replace(config, coef=coef), tokenizer, context=16, seed=0)
        policy.zero_grad()
        loss, metrics = data.loss(policy)
        loss.backward()
        reported.append(float(metrics["ptx"]))
        gradients.append(nn.utils.parameters_to_vector([p.grad for p in policy.parameters() if p.grad is not None]))
    assert reported[0] == reported[1]
    assert torch.allclose(gradients[1], 3.0 * gradients[0], rtol=1e-4, atol=1e-7)
