"""Gao's forms: exact on exact points, honest about noise; best-of-n by hand; rows out of runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.evaluation.frontier import (
    Frontier,
    MetricNames,
    Row,
    best_of_n_rows,
    describe,
    draw,
    fit,
    fit_bon,
    fit_rl,
    frontier,
    rows_of_run,
)
from studies.rlhf_reading import points_of

D = np.linspace(0, 4, 9)


def test_both_forms_are_recovered() -> None:
    bon = fit_bon((D**2).tolist(), (D * (1.5 - 0.25 * D)).tolist())
    assert (bon.alpha, bon.beta) == pytest.approx((1.5, 0.25))
    assert bon.turning_point == pytest.approx(1.5 / 0.5)
    assert float(bon(np.array([3.0]))[0]) == pytest.approx(3 * (1.5 - 0.75))
    logs = np.log(np.where(D > 0, D, 1))
    rl = fit_rl((D**2).tolist(), (0.7 + D * (1.2 - 0.6 * logs)).tolist(), intercept=True)
    assert (rl.alpha, rl.beta, rl.offset) == pytest.approx((1.2, 0.6, 0.7))
    assert rl.turning_point == pytest.approx(math.e)
    assert float(rl(np.array([math.e]))[0]) == pytest.approx(0.7 + 0.6 * math.e)  # beta d* above the start
    assert "a KL of 7.39 nats" in describe(rl)
    assert max(rl(np.linspace(0, 6, 500))) <= 0.7 + 0.6 * math.e + 1e-9


@pytest.mark.parametrize("form", ["bon", "rl"])
def test_standard_errors_are_those_of_repeated_fits(form: str) -> None:
    """The spread of 300 fits to fresh noise against what one fit says of itself."""
    generator = np.random.default_rng(0)
    d = np.linspace(0.2, 4, 30)
    bend = 0.3 * d if form == "bon" else 0.8 * np.log(d)
    clean = d * (1.6 - bend)
    fits = [
        fit("bon" if form == "bon" else "rl", (d**2).tolist(), (clean + generator.normal(0, 0.05, 30)).tolist())
        for _ in range(300)
    ]
    for name in ("alpha", "beta", "turning_point"):
        said = np.mean([getattr(one, f"{name}_error") for one in fits])
        assert np.std([getattr(one, name) for one in fits]) == pytest.approx(said, rel=0.15)
    assert np.mean([one.residual_std for one in fits]) == pytest.approx(0.05, rel=0.05)


def test_what_does_not_turn() -> None:
    rising = fit_bon((D**2).tolist(), (D * (1 + 0.1 * D)).tolist())
    assert rising.turning_point is None
    assert "no turning point" in describe(rising)
    straight = fit_rl((D**2).tolist(), (2 * D).tolist())
    assert straight.turning_point is None or straight.turning_point > 1e6
    with pytest.raises(ValueError, match="2 points at 1 KLs are too few to fit 2 numbers"):
        fit_rl([1.0, 1.0], [0.1, 0.2])
    with pytest.raises(ValueError, match="none of them negative"):
        fit_rl([-1.0, 1.0, 2.0], [0.1, 0.2, 0.3])


def test_best_of_n_by_hand() -> None:
    """Of 1, 2, 3, 4 the best of two is 2, 3, 4 with chances 1/6, 2/6, 3/6; gold by a proxy that is its opposite."""
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    one, two = best_of_n_rows(-scores, scores, (1, 2))
    assert (one.kl, one.proxy, one.gold) == pytest.approx((0.0, 2.5, -2.5))
    assert (two.kl, two.proxy, two.gold) == pytest.approx((math.log(2) - 0.5, 20 / 6, -20 / 6))
    assert best_of_n_rows([[-1, -2, -3, -4]], scores.tolist(), (1, 2)) == [one, two]
    with pytest.raises(ValueError, match="best of k"):
        best_of_n_rows(scores, scores, (5,))


def test_rows_of_runs(tmp_path: Path) -> None:
    lines = [
        {"global_step": 1, "objective/kl": -0.01, "objective/scores": 0.1, "eval/sampled": 0.2},
        {"global_step": 2, "objective/kl": 0.5, "objective/scores": 0.3},
        {"global_step": 2, "objective/kl": 0.5, "objective/scores": 0.3, "eval/sampled": "NaN"},
        {"global_step": 3, "objective/kl": 1.0, "objective/scores": 0.5, "eval/sampled": 0.4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(row.step, row.kl, row.gold, row.proxy) for row in rows_of_run(tmp_path)] == [
        (1, 0.0, 0.2, 0.1),
        (3, 1.0, 0.4, 0.5),
    ]
    rounds = [
        {"global_step": 1, "objective/kl": 0.5, "objective/scores": 0.3},
        {"global_step": 4, "eval/sampled": 0.1},
        {"global_step": 5, "objective/kl": 0.75, "objective/scores": "NaN"},
        {"global_step": 8, "eval/sampled": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))
    assert [(row.step, row.kl, row.gold, row.proxy) for row in rows_of_run(tmp_path)] == [
        (4, 0.5, 0.1, 0.3),
        (8, 0.75, 0.2, 0.3),
    ]
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 1, "eval/sampled": 0.2}\n')
    with pytest.raises(UserError, match="no step has both objective/kl and eval/sampled"):
        rows_of_run(tmp_path)
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        rows_of_run(tmp_path / "nowhere")


def test_gold_goes_with_the_kl_of_the_policy_that_it_judges(tmp_path: Path) -> None:
    """Behind the update, where a run logs that; gold of before the update goes with the KL of before it."""
    lines = [
        {"global_step": 1, "objective/kl": 0.0, "objective/scores": 0.3, "rewards/rm/mean": 7.0},
        {"global_step": 4, "objective/kl": 0.25, "rewards/rm/mean": 8.0, "eval/sampled": 0.1},
        {"global_step": 8, "objective/kl": 0.5, "rewards/rm/mean": 9.0, "eval/sampled": 0.2, "eval/kl": 1.5},
        {"global_step": 9, "objective/kl": 0.75, "rewards/rm/mean": 9.5, "eval/sampled": 0.3, "eval/kl": -0.01},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(row.step, row.kl, row.gold) for row in rows_of_run(tmp_path)] == [
        (4, 0.25, 0.1),  # as all rows of a run that logged none
        (8, 1.5, 0.2),
        (9, 0.0, 0.3),
    ]
    before = rows_of_run(tmp_path, MetricNames(gold="rewards/rm/mean"))
    assert [row.kl for row in before] == [0.0, 0.25, 0.5, 0.75]
    assert [(point.kl, point.proxy) for point in points_of(tmp_path, proxy="rm")] == [
        (0.25, 8.0),
        (1.5, 9.0),
        (0.0, 9.5),
    ]


def test_the_picture(tmp_path: Path) -> None:
    rows = [
        Row("run", step, float(d**2), float(d * (1 - 0.5 * math.log(d + 1e-9))), 1.5 * float(d))
        for step, d in enumerate(D)
    ]
    rows += best_of_n_rows(torch.randn(5, 16), torch.randn(5, 16), (1, 2, 4, 8, 16))
    found = frontier([*rows, Row("few", 0, 1.0, 0.5), Row("few", 1, 2.0, None)])
    assert {label: one.form for label, one in found.fits.items()} == {"run": "rl", "best of n": "bon"}
    assert found.lines()[0].startswith("run: d (alpha - beta log d), alpha 1 +-")
    draw(found, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        draw(Frontier(rows[:1]), tmp_path / "file" / "frontier.png")
