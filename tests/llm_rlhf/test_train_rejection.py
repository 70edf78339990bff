"""Rejection-sampling fine-tuning: which texts a round keeps and hands on, and at which learning rates it learns.
The recipe's plain form is tested with the other recipes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.checkpoint import load_checkpoint
from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf import train_rejection, train_sft
from llm_rlhf.data.texts import Batches, TokenizedTexts
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.loading import model_folder
from llm_rlhf.models.tokenizer import load_tokenizer
from llm_rlhf.online.moved import Counters
from llm_rlhf.rewards.functions import Scores
from llm_rlhf.train_rejection import (
    Kept,
    RejectionConfig,
    TrainRejectionConfig,
    gathered,
    keys_of,
    reaching,
    schedule_progress,
)
from llm_rlhf.train_sft import TrainSFTConfig

TASK = {"name": "random_walks", "random_walks": {"walks": 60}}


def run_section(folder: Path) -> dict[str, Any]:
    return {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 4, "seed": 5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen a few walks."""
    sections = {
        "run": run_section(tmp_path_factory.mktemp("base") / "run"),
        "task": TASK,
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
        "sft": {"steps": 40, "batch_size": 16},
        "validation": {"every": 0},
    }
    return train_sft.train(build_from_dict(sections, TrainSFTConfig)).folder


def small(folder: Path, base: Path, **sections: Any) -> TrainRejectionConfig:
    settings = {
        "run": run_section(folder),
        "task": TASK,
        "model": {"path": str(base)},
        "validation": {"every": 0},
        "log_every": 1,
        **sections,
        "sft": {"steps": 6, "batch_size": 8, **sections.get("sft", {})},
    }
    rejection = {"samples_per_prompt": 4, "threshold": 0.0, "steps_per_round": 2}
    settings["rejection"] = {**rejection, **sections.get("rejection", {})}
    return build_from_dict(settings, TrainRejectionConfig)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def learned(folder: Path) -> TokenizedTexts:
    """The texts that a run's last round learned from."""
    state = load_checkpoint(folder / "checkpoints" / "last").state
    return TokenizedTexts.from_state(state["kept"]["texts"])


def completions(folder: Path) -> list[str]:
    texts, tokenizer = learned(folder), load_tokenizer(model_folder(folder))
    return [
        str(tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True))
        for ids, mask in zip(texts.input_ids, texts.mask, strict=True)
    ]


# ---------------------------------------------------------------- the schedule


LINEAR = {"schedule": "linear", "warmup": 0.25, "learning_rate": 0.01}


def test_every_restarted_round_has_the_whole_schedule(tmp_path: Path, base: Path) -> None:
    """Rounds of 3, 3 and 2 updates. A quarter is warm-up; before the second update of three a third is done, and of
    the falling part (1/3 - 1/4) / (3/4) = 1/9."""
    config = small(
        tmp_path / "run", base, sft={"steps": 8, **LINEAR}, rejection={"steps_per_round": 3, "restart": True}
    )
    rates = [row["lr"] for row in rows(train_rejection.train(config).folder)]
    shares = [0, 8 / 9, 4 / 9, 0, 8 / 9, 4 / 9, 0, 2 / 3]
    assert rates == pytest.approx([0.01 * share for share in shares], rel=1e-9)


def test_rounds_that_go_on_share_the_run_s_schedule(tmp_path: Path, base: Path) -> None:
    config = small(tmp_path / "run", base, sft={"steps": 8, **LINEAR}, rejection={"steps_per_round": 4})
    rates = [row["lr"] for row in rows(train_rejection.train(config).folder)]
    shares = [0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates == pytest.approx([0.01 * share for share in shares], rel=1e-9)


def test_a_restarted_round_ends_its_schedule_at_the_time_limit() -> None:
    """A round that began after 4 of 10 seconds is halfway after 7, whatever of its 100 updates is done."""
    settings = {
        "sft": {"steps": 300, "max_seconds": 10.0},
        "rejection": {"steps_per_round": 100, "restart": True},
    }
    config = build_from_dict(settings, TrainRejectionConfig)
    one = TokenizedTexts(torch.tensor([[1]]), torch.tensor([[1]]), torch.tensor([[True]]))
    kept = Kept(one, Batches(1, 1, seed=0), begun=4.0)
    assert schedule_progress(config, kept, Counters(seconds=7.0), step=111) == pytest.approx(0.5, abs=1e-12)
    assert schedule_progress(config, kept, Counters(seconds=4.0), step=111) == pytest.approx(0.1, abs=1e-12)
    kept.begun = 11.0  # resumed after the limit, at a round's beginning
    assert schedule_progress(config, kept, Counters(seconds=11.0), step=101) == 0.0
    assert Kept.from_state(kept.state_dict(), batch_size=1).begun == 11.0


def test_restarts_resume_to_the_bit_within_a_round(tmp_path: Path, base: Path) -> None:
    """Interrupted after the checkpoint at 4, in the middle of the round of updates 4 to 6."""

    class InterruptError(Exception):
        pass

    def make(name: str) -> TrainRejectionConfig:
        return small(tmp_path / name, base, sft=LINEAR, rejection={"steps_per_round": 3, "restart": True})

    whole = train_rejection.train(make("whole")).folder
    original = Run.log

    def log(self: Any, metrics: Any, *, global_step: int) -> None:
        if global_step == 5:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(InterruptError):
            train_rejection.train(make("broken"))
    torch.manual_seed(12345)
    train_rejection.train(make("broken"), resume=tmp_path / "broken")
    expected, found = (LanguagePolicy.from_pretrained(run).state_dict() for run in (whole, tmp_path / "broken"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert rows(tmp_path / "broken") == rows(whole)


# ---------------------------------------------------------------- what is kept


def test_what_may_be_kept() -> None:
    """The second is unscored and the fourth breaks a rule: no threshold lets these through."""
    scores = Scores(
        total=torch.tensor([-3.0, 0.0, 0.7, 5.0]),
        scored=torch.tensor([True, False, True, True]),
        by_name={},
        broken=torch.tensor([False, False, False, True]),
    )
    for threshold, expected in (
        (None, [True, False, True, False]),
        (-math.inf, [True, False, True, False]),
        (0.7, [False, False, True, False]),
        (0.71, [False, False, False, False]),
    ):
        assert reaching(scores, RejectionConfig(threshold=threshold)).tolist() == expected


@pytest.mark.parametrize("threshold", [None, -math.inf])
def test_without_a_threshold_all_that_was_scored_may_be_kept(
    tmp_path: Path, base: Path, threshold: float | None
) -> None:
    """A reward model's scores are anything: here they are far below 0, and half of the answers have none."""
    file = tmp_path / "own.py"
    file.write_text(
        "def odd(prompts, completions):\n"
        "    return [-50.0 - len(text) if len(text) % 2 else None for text in completions]\n"
    )
    rejection = {"threshold": threshold, "keep": 4, "accumulate": False}
    config = small(tmp_path / "run", base, rewards={f"{file}:odd": 1.0}, rejection=rejection, sft={"steps": 1})
    found = completions(train_rejection.train(config).folder)
    assert len(found) > 10
    assert all(len(text) % 2 for text in found)


def test_nothing_scored_is_said(tmp_path: Path, base: Path) -> None:
    (tmp_path / "own.py").write_text("def none(prompts, completions):\n    return [None for _ in completions]\n")
    config = small(tmp_path / "run", base, rewards={f"{tmp_path}/own.py:none": 1.0}, rejection={"threshold": None})
    with (
        pytest.warns(UserWarning, match="no reward function scored any"),
        pytest.raises(
            UserError, match=r"^rejection: no completion was scored without breaking a rule; ask for less"
        ),
    ):
        train_rejection.train(config)


def test_a_text_of_several_rounds_is_learned_once(tmp_path: Path, base: Path) -> None:
    """The model does not move and has room for one token: every round draws much of the same."""
    config = small(
        tmp_path / "run",
        base,
        sft={"steps": 3, "learning_rate": 0.0},
        generation={"max_new_tokens": 1},
        rejection={"steps_per_round": 1, "keep": 4, "threshold": None},
    )
    folder = train_rejection.train(config).folder
    found = keys_of(learned(folder))
    assert len(found) == len(set(found))
    assert rows(folder)[0]["rejection/kept"] < len(found) < sum(row["rejection/kept"] for row in rows(folder))


def test_texts_are_the_same_wherever_they_stand() -> None:
    """Of the new round's three texts the first is known, from a wider row, and the third is another one: the same
    tokens, of which another part is learned."""
    earlier = TokenizedTexts(
        torch.tensor([[0, 5, 6, 2, 0]]),
        torch.tensor([[0, 1, 1, 1, 0]]),
        torch.tensor([[False, False, True, True, False]]),
    )
    found = TokenizedTexts(
        torch.tensor([[0, 5, 6, 2], [0, 5, 7, 2], [5, 6, 2, 0]]),
        torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]]),
        torch.tensor([[False, False, True, True], [False, False, True, True], [False, False, True, False]]),
    )
    texts = gathered(earlier, found, RejectionConfig(), step=3)
    assert keys_of(texts) == [
        ((5, 6, 2), (False, True, True)),
        ((5, 7, 2), (False, True, True)),
        ((5, 6, 2), (False, False, True)),
    ]
    again = TokenizedTexts(found.input_ids[:1], found.attention_mask[:1], found.mask[:1])
    assert gathered(earlier, again, RejectionConfig(), step=3) is earlier


def test_a_later_round_without_a_good_text_goes_on_with_the_earlier(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the first round's completions earn anything; without accumulation there is nothing left then."""
    file = tmp_path / "own.py"
    file.write_text(
        "def early(prompts, completions, sample_index):\n    return [float(index < 20) for index in sample_index]\n"
    )
    given: dict[str, Any] = {"rewards": {f"{file}:early": 1.0}, "sft": {"steps": 4}}
    folder = train_rejection.train(small(tmp_path / "run", base, rejection={"threshold": 0.5}, **given)).folder
    kept = [row["rejection/kept"] for row in rows(folder) if "rejection/kept" in row]
    assert kept == [5.0, 0.0]  # 20 completions of 4 a prompt, of each prompt the best
    assert len(learned(folder)) == 5
    said = "update 3: rejection.threshold: no completion reached 0.5; this round learns the 5 texts of those before"
    assert said in capsys.readouterr().out
    alone = small(tmp_path / "alone", base, rejection={"threshold": 0.5, "accumulate": False}, **given)
    with pytest.raises(UserError, match=r"no completion reached 0\.5; ask for less, or draw more samples"):
        train_rejection.train(alone)
