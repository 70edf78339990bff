import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.models.drawing import chances, draw, pick


def test_frequencies_follow_the_distribution() -> None:
    scores = torch.tensor([0.0, -torch.inf, 1.5, -1.0, -torch.inf]).expand(40_000, 5)
    chance = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chance[:2] = torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64)
    tokens, log_probs, entropy = draw(scores, chance)
    expected = torch.softmax(scores[0], -1)
    found = torch.bincount(tokens, minlength=5) / 40_000
    assert (found - expected).abs().max() < 0.01  # four standard errors
    assert (found[[1, 4]] == 0).all()
    assert int(tokens[0]) == 0
    assert int(tokens[1]) == 3
    torch.testing.assert_close(log_probs, expected.log()[tokens])
    torch.testing.assert_close(entropy[0], -(expected[expected > 0] * expected[expected > 0].log()).sum())
    assert (draw(scores, None)[0] == 2).all()
    with pytest.raises(UserError, match="NaN"):
        draw(torch.full((1, 3), torch.nan), None)


def test_indices_are_drawn_with_their_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = pick(probabilities.repeat(20_000, 1), chances(20_000, torch.Generator().manual_seed(0)))
    shares = torch.bincount(drawn, minlength=6) / 20_000
    assert shares[probabilities == 0].tolist() == [0.0, 0.0, 0.0]
    # three standard errors of the largest share
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=3 * (0.25 / 20_000) ** 0.5)


def test_an_unlikely_index_among_many_is_drawn() -> None:
    probabilities = torch.full((1, 50_000), 1e-9)
    probabilities[0, 0] = 1.0
    probabilities[0, -1] = 1.0
    drawn = pick(probabilities.repeat(64, 1), chances(64, torch.Generator().manual_seed(0)))
    assert set(drawn.tolist()) == {0, 49_999}
