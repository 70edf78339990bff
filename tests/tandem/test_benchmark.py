"""`tandem benchmark`: every suite on a small file in its true format, by a tiny model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.evaluation.suites import SUITES
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.loading import ModelConfig
from tandem.benchmark import add_arguments, benchmark, find_model

ALPHABET = "".join(map(chr, range(32, 127))) + "\n"


def save(folder: Path, *, seed: int) -> Path:
    """A run folder with an untrained model as its last checkpoint."""
    torch.manual_seed(seed)
    policy, tokenizer = build_policy(ModelConfig(layers=1, width=8, heads=1, context=160), alphabet=ALPHABET)
    checkpoint = folder / "checkpoints" / "000000001" / "policy"
    policy.save_pretrained(checkpoint)
    tokenizer.save_pretrained(str(checkpoint))
    (folder / "checkpoints" / "last").symlink_to("000000001")
    (folder / "config.yaml").write_text("recipe: llm/sft\n")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, and a file for every suite."""
    folder = tmp_path_factory.mktemp("benchmark")
    save(folder / "run", seed=0)
    save(folder / "old", seed=1)

    def lines(name: str, *rows: dict[str, Any]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    (folder / "mmlu_test.csv").write_text("1+1?,1,2,3,4,B\n2*3?,6,5,4,1,A\n")
    (folder / "mmlu_dev.csv").write_text("0+1?,0,1,2,3,B\n")
    targets = {"no": 1, "yes": 0}
    (folder / "mc_task.json").write_text(
        json.dumps([{"question": "q", "mc1_targets": targets, "mc2_targets": targets}])
    )
    lines("gsm8k.jsonl", {"question": "1+1?", "answer": "#### 2"}, {"question": "2+2?", "answer": "#### 4"})
    code = {"task_id": "T/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f"}
    lines("humaneval.jsonl", {**code, "test": "def check(candidate):\n    assert candidate() == 1\n"})
    (folder / "alpaca.json").write_text(json.dumps([{"instruction": "hi", "output": "ho", "generator": "g"}]))
    lines("question.jsonl", {"question_id": 1, "category": "a", "turns": ["x", "y"]})
    lines("model_answer.jsonl", {"question_id": 1, "choices": [{"index": 0, "turns": ["p", "q"]}]})
    lines("prompts.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"})
    said = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    lines("chats.jsonl", {"messages": said[0] + said[1]})
    lines(
        "pairs.jsonl", {"prompt": said[0], "chosen": said[1], "rejected": [{"role": "assistant", "content": "c"}]}
    )
    (folder / "text.txt").write_text("some text. " * 30)
    (folder / "own.py").write_text(
        "def judge(prompt, a, b):\n    return 'a' if len(a) > len(b) else 'tie'\n\n\n"
        "def broken(prompt, completion):\n    return len(completion) > 3\n"
    )
    return folder


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return benchmark(parser.parse_args(["--max-new-tokens", "6", *words]))


CASES = {
    "alpaca_eval": ("alpaca.json", ["--judge", "own.py:judge"], "win_rate"),
    "arena_hard": ("question.jsonl", ["--judge", "own.py:judge", "--reference", "model_answer.jsonl"], "win_rate"),
    "diversity": ("prompts.jsonl", ["--samples", "3", "--temperature", "1"], "self_bleu"),
    "gsm8k": ("gsm8k.jsonl", ["--shots", "1", "--shots-from", "gsm8k.jsonl"], "accuracy"),
    "humaneval": ("humaneval.jsonl", ["--allow-code-execution"], "pass@1"),
    "mmlu": ("mmlu_test.csv", ["--shots", "1", "--shots-from", "mmlu_dev.csv"], "accuracy"),
    "mt_bench": ("question.jsonl", ["--judge", "own.py:judge", "--reference", "model_answer.jsonl"], "win_rate"),
    "perplexity": ("text.txt", ["--stride", "40"], "perplexity"),
    "red_team": ("prompts.jsonl", ["--rule", "own.py:broken"], "attack_success"),
    "truthfulqa": ("mc_task.json", [], "mc1"),
    "win_rate": ("prompts.jsonl", ["--judge", "own.py:judge"], "win_rate"),
}


def test_every_suite_has_a_case() -> None:
    assert CASES.keys() == SUITES.keys()


@pytest.mark.parametrize("suite", CASES)
def test_every_suite_measures_and_writes(
    suite: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    data, options, figure = CASES[suite]
    assert run("run", "--suite", suite, "--data", data, *options) == 0
    report = json.loads(Path("run", "benchmarks", f"{suite}.json").read_text())
    assert report["suite"] == suite
    low, high = report["figures"][f"{figure}_interval"]
    assert low <= report["figures"][figure] <= high
    assert Path("run", "benchmarks", f"{suite}.items.jsonl").read_text()
    printed = capsys.readouterr().out
    assert figure in printed
    assert f"written to run/benchmarks/{suite}.json" in printed


@pytest.mark.parametrize("data", ["chats.jsonl", "pairs.jsonl"])
@pytest.mark.parametrize("suite", ["win_rate", "red_team", "diversity"])
def test_prompt_suites_read_conversations(
    suite: str, data: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    for more in ([], ["--chat"]):
        out = str(tmp_path / "report.json")
        assert run("run", "--suite", suite, "--data", data, *CASES[suite][1], *more, "--out", out) == 0
        rows = (tmp_path / "report.items.jsonl").read_text().splitlines()
        assert [json.loads(row)["prompt"] for row in rows] == ["a"] * (3 if suite == "diversity" else 1)


def test_before_and_after(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(files)
    assert run("run", "--suite", "perplexity", "--data", "text.txt", "--before", "old", "--out", "tax.json") == 0
    report = json.loads(Path("tax.json").read_text())
    change = report["change"]
    assert change["perplexity/after"] == report["figures"]["perplexity"]
    assert change["perplexity/change"] == pytest.approx(change["perplexity/after"] - change["perplexity/before"])
    assert change["perplexity/change"] != 0
    assert report["before"] == "old"
    assert "perplexity/change" in capsys.readouterr().out
    same = run("run", "--suite", "gsm8k", "--data", "gsm8k.jsonl", "--before", "run", "--out", "same.json")
    assert same == 0
    assert json.loads(Path("same.json").read_text())["change"]["accuracy/change_interval"] == [0.0, 0.0]


def test_two_models_play_each_other(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against itself a policy ties, whoever judges."""
    monkeypatch.chdir(files)
    words = ["--suite", "win_rate", "--data", "prompts.jsonl", "--judge", "own.py:judge", "--out", "w.json"]
    assert run("run", *words, "--reference", "run") == 0
    assert json.loads(Path("w.json").read_text())["figures"]["win_rate"] == 0.5
    assert run("run", *words, "--reference", "prompts.jsonl", "--limit", "1") == 0
    assert json.loads(Path("w.json").read_text())["figures"]["pairs"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "gsm8", "--data", "gsm8k.jsonl"], r"--suite: unknown suite 'gsm8'; did you mean gsm8k\?"),
        (["--suite", "gsm8k", "--data", "none.jsonl"], "--data: none.jsonl: no such file"),
        (["--suite", "gsm8k", "--data", "prompts.jsonl"], "prompts.jsonl:1: column 'question' is missing"),
        (["--suite", "humaneval", "--data", "humaneval.jsonl"], "--allow-code-execution"),
        (["--suite", "win_rate", "--data", "prompts.jsonl"], "--judge: say who judges"),
        (["--suite", "mt_bench", "--data", "question.jsonl"], "--reference: give the reference"),
        (["--suite", "red_team", "--data", "prompts.jsonl"], "--rule: name at least one"),
        (["--suite", "gsm8k", "--data", "gsm8k.jsonl", "--shots", "1"], "--shots: say with --shots-from"),
        (["--suite", "gsm8k", "--data", "gsm8k.jsonl", "--limit", "0"], "--limit must be at least 1"),
        (["--suite", "gsm8k", "--data", "gsm8k.jsonl", "--samples", "2"], "temperature 0 are all the same"),
        (["--suite", "gsm8k", "--data", "gsm8k.jsonl", "--batch-size", "0"], "--batch-size must be"),
        (["--suite", "perplexity", "--data", "text.txt", "--stride", "160"], "--stride must be between 1 and 159"),
    ],
)
def test_benchmark_mistakes(words: list[str], message: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(UserError, match=message):
        run("run", *words)


def test_models_are_found(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("")
    assert find_model("mine") == Path("runs/mine")
    assert find_model(str(files / "run")) == files / "run"
    assert find_model("someone/model-2b") == "someone/model-2b"
    with pytest.raises(UserError, match=r"minr: no such run or model; did you mean mine\?"):
        find_model("minr")
    with pytest.raises(UserError, match="no such run or model"):
        find_model("runs/other")
    assert LanguagePolicy.from_pretrained(files / "run").context == 160
