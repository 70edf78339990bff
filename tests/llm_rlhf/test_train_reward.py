"""The recipe in miniature: what a comparison weighs, ensembles, ties, objectives, centring, resuming to the bit."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel, BertTokenizer

from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf import train_reward
from llm_rlhf.data.pairs import read_pairs
from llm_rlhf.rewards.reward_model import HEADS, RewardModel, Scorer
from llm_rlhf.train_reward import RewardConfig, RewardLearningConfig, TrainRewardConfig

MODEL = {"layers": 1, "width": 16, "heads": 2, "context": 24}
QUESTIONS = [f"{first}{second}" for first in "pqrstu" for second in "vwxyz"]


def comparisons(path: Path, *, objectives: bool = False, ties: bool = False) -> str:
    """Answers "yes", "so", "no" in this order for every question; with `objectives`, shorter is better for one."""
    rows: list[dict[str, Any]] = []
    for number, question in enumerate(QUESTIONS):
        for chosen, rejected in (("yes", "so"), ("yes", "no"), ("so", "no")):
            rows.append({"prompt": question, "chosen": chosen, "rejected": rejected})
        if ties:
            rows.append({"prompt": question, "chosen": "so", "rejected": "no", "tie": True})
        if objectives:
            for row in rows[-3 - ties :]:
                row["objective"] = "helpful"
            rows.append({"prompt": question, "chosen": "no", "rejected": "yes", "objective": "short"})
        if number % 2:
            rows[-1]["margin"] = 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return comparisons(tmp_path_factory.mktemp("pairs") / "rows.jsonl")


def small(folder: Path, path: str, *, steps: int = 6, **sections: Any) -> TrainRewardConfig:
    settings = {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 3, "seed": 5},
        "pairs": {"path": path, "validation": 0.1, "test": 0.1},
        "model": MODEL,
        "validation": {"every": 2},
        "log_every": 1,
        **sections,
    }
    learning = {"batch_size": 6, "micro_batch_size": 4, "learning_rate": 3e-3, "head_learning_rate": 1e-2}
    settings["learning"] = {"steps": steps, **learning, **sections.get("learning", {})}
    return build_from_dict(settings, TrainRewardConfig)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    config = small(tmp_path_factory.mktemp("reward") / "run", data, reward={"heads": 3})
    return train_reward.train(config).folder


def model_folder(run: Path, checkpoint: str = "last") -> Path:
    return run / "checkpoints" / checkpoint / "reward_model"


def weights(run: Path) -> dict[str, Tensor]:
    return {
        **AutoModel.from_pretrained(str(model_folder(run))).state_dict(),
        **load_file(model_folder(run) / HEADS),
    }


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


# ---------------------------------------------------------------- the recipe


def test_it_learns_and_says_so(trained: Path) -> None:
    logged = rows(trained)
    assert {"loss/reward", "rewards/chosen", "rewards/accuracies", "lr", "tokens", "epoch"} <= logged[-1].keys()
    assert {"eval/loss", "eval/accuracy_low", "eval/margin", "eval/temperature"} <= logged[-1].keys()
    assert logged[-1]["eval/loss"] < logged[1]["eval/loss"] - 0.05
    assert logged[-1]["rewards/margins"] == pytest.approx(
        logged[-1]["rewards/chosen"] - logged[-1]["rewards/rejected"], abs=1e-5
    )
    assert logged[0]["loss/reward"] == pytest.approx(math.log(2), abs=0.3)  # a mean over heads, not a sum
    assert logged[-1]["samples"] == 6 * 6 * 3
    assert logged[-1]["rewards/disagreement"] > 0
    scores, _ = Scorer.from_pretrained(trained).scores(["pv"] * 3, ["yes", "so", "no"])
    assert scores[0].mean() > scores[2].mean()


def test_the_best_checkpoint_has_the_lowest_validation_loss(trained: Path) -> None:
    losses = {row["global_step"]: row["eval/loss"] for row in rows(trained) if "eval/loss" in row}
    best = json.loads((trained / "checkpoints" / "best" / "checkpoint.json").read_text())
    assert best["step"] == min(losses, key=lambda step: losses[step])
    assert best["metric"] == pytest.approx(-min(losses.values()))


def test_saved_scores_of_training_texts_have_mean_zero(trained: Path, data: str) -> None:
    """For each head; there are fewer texts than are looked at."""
    pairs = read_pairs(
        build_from_dict({"path": data, "validation": 0.1, "test": 0.1}, type(small(trained, data).pairs))
    )
    texts = sorted({(c.prompt, text) for c in pairs.train for text in (c.chosen, c.rejected)})
    scores, _ = Scorer.from_pretrained(model_folder(trained)).scores(*map(list, zip(*texts, strict=True)))
    torch.testing.assert_close(scores.mean(0), torch.zeros(3, 1), atol=1e-5, rtol=0)
    assert scores.std() > 0.05


def test_it_resumes_to_the_bit(tmp_path: Path, trained: Path, data: str) -> None:
    """Interrupted after the checkpoint at four, as a kill would, against six steps at a stretch."""

    class InterruptError(Exception):
        pass

    original = Run.log

    def log(self: Any, metrics: Any, *, global_step: int) -> None:
        if global_step == 5:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    config = small(tmp_path / "broken", data, reward={"heads": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(InterruptError):
            train_reward.train(config)
    torch.manual_seed(12345)  # a new process would not have the old one's global generator
    train_reward.train(config, resume=tmp_path / "broken")
    expected, found = weights(trained), weights(tmp_path / "broken")
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert rows(tmp_path / "broken") == rows(trained)
    settings = [(model_folder(run) / "reward.json").read_text() for run in (trained, tmp_path / "broken")]
    assert settings[0] == settings[1]


def test_micro_batches_change_nothing(tmp_path: Path, data: str) -> None:
    states = []
    for number, size in enumerate((None, 1, 4)):
        reward = {"heads": 2, "centring_coef": 0.1}
        config = small(tmp_path / str(number), data, steps=1, reward=reward, learning={"micro_batch_size": size})
        states.append((weights(train_reward.train(config).folder), rows(tmp_path / str(number))[0]))
    for state, row in states[1:]:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, states[0][0][name], atol=1e-4, rtol=0)
        for name, value in row.items():
            assert value == pytest.approx(states[0][1][name], abs=1e-4), name


def test_a_completion_is_read_once_a_batch(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six prompts with three comparisons of three answers: eighteen texts, not thirty-six."""
    seen: list[int] = []
    original = RewardModel.features

    def features(self: RewardModel, input_ids: Tensor, *masks: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(len(input_ids))
        return original(self, input_ids, *masks)

    monkeypatch.setattr(RewardModel, "features", features)
    train_reward.train(small(tmp_path / "run", data, steps=1, learning={"micro_batch_size": None}))
    assert seen == [18]


def test_heads_see_bootstraps_of_their_own(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learners: list[Any] = []
    original = train_reward.update

    def update(learner: Any, *arguments: Any, **named: Any) -> dict[str, float]:
        learners.append(learner)
        return original(learner, *arguments, **named)

    monkeypatch.setattr(train_reward, "update", update)
    for name, reward in (("three", {"heads": 3}), ("all", {"heads": 3, "bootstrap": False}), ("one", {})):
        train_reward.train(small(tmp_path / name, data, steps=1, reward=reward))
    three, everything, one = (learner.resampled for learner in learners)
    assert three.sum(1).tolist() == [24.0] * 3  # as many draws as there are prompts to train on
    assert not torch.equal(three[0], three[1])
    assert (three == 0).any(1).all()
    assert everything.unique().tolist() == [1.0]
    assert one.tolist() == [[1.0] * 24]


def test_the_best_loss_is_remembered(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run does not take its first look for the best."""
    learners: list[Any] = []
    original = train_reward.build_learner

    def build(*arguments: Any) -> Any:
        learners.append(original(*arguments))
        return learners[-1]

    monkeypatch.setattr(train_reward, "build_learner", build)
    config = small(tmp_path / "run", data, steps=2)
    best = -train_reward.train(config).metrics["best/metric"]
    longer = replace(config, learning=replace(config.learning, steps=3))
    train_reward.train(longer, resume=tmp_path / "run")
    assert learners[1].best == min(best, rows(tmp_path / "run")[-1]["eval/loss"])
    state = learners[1].state_dict()
    learners[1].best = math.inf
    learners[1].load_state_dict(state)
    assert learners[1].best == state["best"] < math.inf


def test_a_head_whose_bootstrap_lacks_every_prompt_stays(tmp_path: Path, data: str) -> None:
    """Weights of zero are no gradient: AdamW without decay leaves that head where it was."""
    original, before = train_reward.build_learner, list[Tensor]()

    def build(*arguments: Any) -> Any:
        learner = original(*arguments)
        learner.resampled[1] = 0.0
        before.append(learner.model.heads.weight.detach().clone())
        return learner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_reward, "build_learner", build)
        config = small(tmp_path / "run", data, steps=2, reward={"heads": 2}, learning={"weight_decay": 0.0})
        after = weights(train_reward.train(config).folder)["heads.weight"]
    assert torch.equal(after[1], before[0][1])
    assert not torch.equal(after[0], before[0][0])


def test_a_frozen_trunk_keeps_its_weights(tmp_path: Path, trained: Path, data: str) -> None:
    config = small(
        tmp_path / "run", data, steps=3, model={"path": str(trained)}, reward={"heads": 3, "freeze_trunk": True}
    )
    before, after = weights(model_folder(trained, "best").parents[2]), weights(train_reward.train(config).folder)
    start = AutoModel.from_pretrained(str(model_folder(trained, "best"))).state_dict()
    for name, tensor in start.items():
        assert torch.equal(tensor, after[name]), name
    assert not torch.equal(before["heads.weight"], after["heads.weight"])
    logged = rows(tmp_path / "run")
    assert logged[-1]["eval/loss"] < rows(trained)[1]["eval/loss"]  # the heads were taken over, and go on


def test_the_lowest_layers_can_stay_as_they_are(tmp_path: Path, data: str) -> None:
    """Embeddings and the first of the two layers that are kept; what is above them learns."""
    original, before = train_reward.build_learner, dict[str, Tensor]()

    def build(*arguments: Any) -> Any:
        learner = original(*arguments)
        before.update({name: part.clone() for name, part in learner.model.trunk.state_dict().items()})
        return learner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_reward, "build_learner", build)
        kept = {"layers": 2, "frozen_layers": 1}
        config = small(tmp_path / "run", data, steps=2, model={**MODEL, "layers": 3}, reward=kept)
        after = weights(train_reward.train(config).folder)
    stayed = {name for name, part in before.items() if torch.equal(part, after[name])}
    assert stayed == {name for name in before if name.startswith(("wte.", "wpe.", "h.0."))}
    assert {name.split(".")[1] for name in before if name.startswith("h.")} == {"0", "1"}
    reward = replace(config.reward, frozen_layers=3)
    config = replace(config, reward=reward, run=replace(config.run, folder=str(tmp_path / "deep")))
    with pytest.raises(UserError, match=r"reward\.frozen_layers: 3 of a GPT2Model with 2 layers"):
        train_reward.train(config)


def test_what_heads_read_of_completions_is_saved_and_scored_the_same(tmp_path: Path, data: str) -> None:
    """Training's mean score of its texts is what was subtracted; another way of reading would miss it."""
    config = small(tmp_path / "run", data, steps=2, reward={"pooling": "completion"})
    folder = train_reward.train(config).folder
    scorer = Scorer.from_pretrained(model_folder(folder))
    assert scorer.model.pooling == "completion"
    pairs = read_pairs(config.pairs)
    texts = sorted({(c.prompt, text) for c in pairs.train for text in (c.chosen, c.rejected)})
    columns = [list(column) for column in zip(*texts, strict=True)]
    scores, _ = scorer.scores(*columns)
    torch.testing.assert_close(scores.mean(0), torch.zeros(1, 1), atol=1e-5, rtol=0)
    scorer.model.pooling = "mean"
    assert scorer.scores(*columns)[0].mean().abs() > 1e-3


def test_objectives_have_heads_of_their_own(tmp_path: Path) -> None:
    """They want opposite things; a comparison moves the head that it is about."""
    path = comparisons(tmp_path / "rows.jsonl", objectives=True)
    scoring = {"weights": {"short": 1.0}}
    config = small(tmp_path / "run", path, steps=25, scoring=scoring, learning={"learning_rate": 1e-2})
    folder = train_reward.train(config).folder
    scorer = Scorer.from_pretrained(folder)
    assert scorer.model.objectives == ("helpful", "short")
    assert scorer.model.scoring.weights == {"short": 1.0}
    scores, _ = scorer.scores(["pv"] * 2, ["yes", "no"])
    assert scores[0, 0, 0] > scores[1, 0, 0] + 0.5
    assert scores[1, 0, 1] > scores[0, 0, 1] + 0.5
    assert {"eval/accuracy/helpful", "eval/accuracy/short_low"} <= rows(folder)[-1].keys()
    unknown = replace(config, scoring=replace(config.scoring, weights={"long": 1.0}))
    unknown = replace(unknown, run=replace(unknown.run, folder=str(tmp_path / "unknown")))
    with pytest.raises(UserError, match=r"scoring\.weights: there is no objective 'long'; there is helpful, short"):
        train_reward.train(unknown)


@pytest.mark.parametrize("ties", ["rao_kupper", "davidson"])
def test_ties_teach_their_own_parameter(tmp_path: Path, ties: str) -> None:
    path = comparisons(tmp_path / "rows.jsonl", ties=True)
    folder = train_reward.train(small(tmp_path / "run", path, steps=4, reward={"ties": ties})).folder
    level = weights(folder)["tie_level"]
    assert level.shape == (1,)
    assert not math.isclose(level.item(), math.log(0.5), abs_tol=1e-4)
    assert rows(folder)[-1]["loss/reward"] < rows(folder)[0]["loss/reward"]


def test_the_centring_loss_pulls_scores_to_zero(tmp_path: Path, data: str) -> None:
    sizes = []
    for name, coef in (("free", 0.0), ("pulled", 1.0)):
        reward = {"centring_coef": coef, "shift": False}
        config = small(tmp_path / name, data, steps=12, reward=reward)
        folder = train_reward.train(config).folder
        scores, _ = Scorer.from_pretrained(model_folder(folder)).scores(["pv", "qw"] * 2, ["yes"] * 2 + ["no"] * 2)
        assert not RewardModel.from_pretrained(folder).offset.any()
        sizes.append(abs(float(scores.mean())))
    assert sizes[1] < 0.5 * sizes[0]


def test_bfloat16_is_close_and_its_weights_are_float32(tmp_path: Path, data: str) -> None:
    losses = []
    for precision in ("float32", "bf16"):
        folder = train_reward.train(
            small(tmp_path / precision, data, steps=2, reward={"precision": precision})
        ).folder
        assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}
        losses.append(rows(folder)[0]["loss/reward"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_an_encoder_learns_too(tmp_path: Path, data: str) -> None:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "so", "no"]
    letters = [*"pqrstuvwxyz", *(f"##{letter}" for letter in "pqrstuvwxyz")]
    (tmp_path / "vocab.txt").write_text("\n".join([*vocabulary, *letters]) + "\n")
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    BertModel(bert).save_pretrained(str(tmp_path / "bert"))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(str(tmp_path / "bert"))
    config = small(
        tmp_path / "run", data, steps=12, model={"path": str(tmp_path / "bert")}, learning={"learning_rate": 1e-2}
    )
    folder = train_reward.train(config).folder
    model = RewardModel.from_pretrained(folder)
    assert (model.pooling, model.start, model.context) == ("mean", 2, 15)
    assert rows(folder)[-1]["eval/loss"] < 0.5


# ---------------------------------------------------------------- what can go wrong


def test_dry_run_does_one_update(tmp_path: Path, data: str) -> None:
    config = small(tmp_path / "run", data)
    result = train_reward.train(replace(config, run=replace(config.run, dry_run=True)))
    assert result.metrics["global_step"] == 1


def test_an_epoch_is_as_many_updates_as_the_prompts_need(tmp_path: Path, data: str) -> None:
    config = small(tmp_path / "run", data, learning={"steps": None, "epochs": 0.5, "batch_size": 5})
    assert train_reward.train(config).metrics["global_step"] == 3  # half of 24 prompts, five at a time


def test_a_diverged_run_stops_with_one_line(tmp_path: Path, data: str) -> None:
    learning = {"learning_rate": 1e30, "head_learning_rate": 1e30, "max_grad_norm": 1e30}
    with pytest.raises(UserError, match=r"lower (learning rate|learning\.learning_rate)"):
        train_reward.train(small(tmp_path / "run", data, learning=learning))


def test_models_that_cannot_be_used(tmp_path: Path, data: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model\.path: .* holds no config\.json"):
        train_reward.train(small(tmp_path / "run", data, model={"path": str(tmp_path / "empty")}))
    with pytest.raises(UserError, match=r"pairs\.path"):
        train_reward.train(small(tmp_path / "other", ""))


def test_bad_settings_are_refused() -> None:
    for bad in (
        {"heads": 0},
        {"frozen_layers": -1},
        {"layers": 0},
        {"label_smoothing": 0.5},
        {"tie_strength": 0.0},
        {"centring_coef": -1.0},
        {"ties": "davidson", "label_smoothing": 0.1},
    ):
        with pytest.raises(ValueError, match="reward"):
            RewardConfig(**bad)
    for bad in ({"steps": 0}, {"batch_size": 0}, {"micro_batch_size": -1}, {"epochs": 0.0}, {"learning_rate": 0.0}):
        with pytest.raises(ValueError, match="learning"):
            RewardLearningConfig(**bad)
