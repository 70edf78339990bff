"""Reward models: what the heads read, how scores are combined, folders, and rewards by name."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from experiment.errors import UserError
from llm_rlhf.data.chat import Chat
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.lora import LoRAConfig
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.rewards.functions import resolve
from llm_rlhf.rewards.reward_model import (
    HEADS,
    SETTINGS,
    RewardModel,
    Scorer,
    ScoringConfig,
    build_reward_model,
    combine,
    load_reward_tokenizer,
    load_trunk,
    named_reward,
    reward_function,
    reward_writer,
)

LETTERS = "abcdefgh "


def decoder(seed: int = 0) -> GPT2Model:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=16, n_positions=24, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    return GPT2Model(config).eval()


def encoder(seed: int = 0, *, is_decoder: bool = False) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
        is_decoder=is_decoder,
    )
    return BertModel(config).eval()


def embeddings(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def folder_of(tmp_path: Path) -> Path:
    """A new reward model's folder with two objectives and three heads."""
    torch.manual_seed(1)
    config = ModelConfig(layers=1, width=16, heads=2, context=24)
    model, tokenizer = build_reward_model(config, alphabet=LETTERS, objectives=("harmless", "helpful"), heads=3)
    with torch.no_grad():
        model.offset.normal_()
    model.temperature = 1.7
    reward_writer(model, tokenizer)["reward_model"](tmp_path)
    return tmp_path


# ---------------------------------------------------------------- combining


SCORES = torch.tensor([[[1.0, 4.0], [3.0, 0.0]]])  # one text, two heads, objectives (a, b)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({}, 2.0),  # heads (2.5, 1.5)
        ({"weights": {"a": 1.0}}, 2.0),  # heads (1, 3)
        ({"weights": {"a": 2.0, "b": -1.0}, "ensemble": "min"}, -2.0),  # heads (-2, 6)
        ({"weights": {"b": 1.0}, "ensemble": "lower", "deviations": 0.5}, 2.0 - 0.5 * math.sqrt(8.0)),  # (4, 0)
        ({"length_penalty": 0.1, "length_free": 4}, 2.0 - 0.3),
        ({"length_penalty": 0.1, "length_free": 9}, 2.0),
    ],
)
def test_scores_are_combined_by_hand(settings: dict[str, object], value: float) -> None:
    config = ScoringConfig(**settings)  # type: ignore[arg-type]
    values, spread = combine(SCORES, torch.tensor([7]), objectives=("a", "b"), config=config)
    assert values.item() == pytest.approx(value, abs=1e-6)
    weights = torch.tensor([config.weights.get("a", 0.0), config.weights.get("b", 0.0)])
    heads = SCORES[0] @ (weights if config.weights else torch.tensor([0.5, 0.5]))
    assert spread.item() == pytest.approx(abs(float(heads[0] - heads[1])) / math.sqrt(2), abs=1e-6)


def test_one_head_does_not_disagree() -> None:
    for ensemble in ("mean", "min", "lower"):
        values, spread = combine(
            SCORES[:, :1], torch.tensor([1]), objectives=("a", "b"), config=ScoringConfig(ensemble=ensemble)
        )
        assert (values.item(), spread.item()) == (2.5, 0.0)
    with pytest.raises(UserError, match=r"scoring.weights: there is no objective 'c'; there is a, b"):
        combine(SCORES, torch.tensor([1]), objectives=("a", "b"), config=ScoringConfig(weights={"c": 1.0}))
    for bad in ({"weights": {"a": math.nan}}, {"deviations": -1.0}, {"length_penalty": -0.1}):
        with pytest.raises(ValueError, match="scoring"):
            ScoringConfig(**bad)


# ---------------------------------------------------------------- reading texts


def laid_out(text: list[int], before: int, after: int, pad: int, hole: int | None = None) -> tuple[Tensor, Tensor]:
    ids = [pad] * before + text + [pad] * after
    mask = [0] * before + [1] * len(text) + [0] * after
    if hole is not None:
        ids.insert(before + hole, pad)
        mask.insert(before + hole, 0)
    return torch.tensor([ids]), torch.tensor([mask])


def test_what_a_policy_drew_is_read_as_the_template_shows_it() -> None:
    """Thoughts that the template leaves out change nothing, and thoughts alone are an empty answer."""
    torch.manual_seed(0)
    config = ModelConfig(layers=1, width=16, heads=2, context=24)
    model, tokenizer = build_reward_model(config, alphabet="think</>user: a", objectives=("reward",), heads=1)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    asked = Chat.prompt([{"role": "user", "content": "hi"}])
    thought, bare, alone, empty = Scorer(model, tokenizer).encode(
        [asked] * 4, ["think</think>hei", "hei", "think</think>", ""]
    )
    assert (thought.completion, thought.mask) == (bare.completion, bare.mask)
    assert len(bare.completion) == 4  # three letters and EOS
    assert alone.completion == empty.completion == [tokenizer.eos_token_id]


def test_a_causal_trunk_is_read_at_the_last_real_token_wherever_the_padding_is() -> None:
    """Also where the padding is the token that ends texts, and in a batch with a longer row."""
    trunk = decoder()
    model = RewardModel(trunk, heads=2, context=24)
    assert model.pooling == "last"
    text = [3, 5, 2, 7, 1]
    with torch.no_grad():
        expected = trunk(input_ids=torch.tensor([text])).last_hidden_state[0, -1] @ model.heads.weight.T
        other = model.score(*laid_out([4] * 9, 0, 0, 1))
        for layout in (
            laid_out(text, 4, 0, 1),
            laid_out(text, 0, 4, 1),
            laid_out(text, 2, 2, 7),
            laid_out(text, 1, 2, 0, 2),
        ):
            torch.testing.assert_close(model.score(*layout)[0, :, 0], expected, atol=1e-6, rtol=0)
            ids, mask = layout
            batch = torch.cat([ids, torch.full((1, 9), 4)]), torch.cat([mask, torch.ones(1, 9, dtype=torch.long)])
            found = model.score(*batch)
            torch.testing.assert_close(found[0, :, 0], expected, atol=1e-6, rtol=0)
            torch.testing.assert_close(found[1], other[0], atol=1e-6, rtol=0)


def test_an_encoder_is_read_by_the_mean_of_its_tokens() -> None:
    trunk = encoder()
    model = RewardModel(trunk, start=9, context=23)
    assert model.pooling == "mean"
    text = [3, 5, 2, 7]
    with torch.no_grad():
        states = trunk(input_ids=torch.tensor([[9, *text]])).last_hidden_state[0]
        expected = states.mean(0) @ model.heads.weight.T
        for layout in (laid_out(text, 3, 0, 7), laid_out(text, 0, 5, 7), laid_out(text, 1, 3, 7, 2)):
            ids, mask = layout
            batch = torch.cat([ids, torch.full_like(ids, 4)]), torch.cat([mask, torch.ones_like(mask)])
            torch.testing.assert_close(model.score(*batch)[0, :, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("start", [None, 9])
def test_completions_can_be_read_without_their_prompt(start: int | None) -> None:
    """Of an encoder and of a causal trunk: the mean over [2, 7], which have seen what stands before them."""
    for trunk in (encoder(), decoder()):
        model = RewardModel(trunk, start=start, context=23)
        model.pooling = "completion"
        before = [] if start is None else [start]
        with torch.no_grad():
            states = trunk(input_ids=torch.tensor([[*before, 3, 5, 2, 7]])).last_hidden_state[0]
            expected = states[-2:].mean(0) @ model.heads.weight.T
            for layout in (laid_out([3, 5, 2, 7], 3, 0, 7), laid_out([3, 5, 2, 7], 1, 4, 7, 2)):
                ids, mask = layout
                own = torch.zeros_like(ids, dtype=torch.bool)
                own[0, mask[0].nonzero().squeeze(1)[2:]] = True
                own[0, -1] = True  # padding at the end is no completion, whatever is said of it
                both = ((ids, ids), (mask, torch.ones_like(mask)), (own, ~own))
                batch = [torch.cat(rows) for rows in both]
                found = model.score(*batch)
                torch.testing.assert_close(found[0, :, 0], expected, atol=1e-6, rtol=0)
                assert not torch.allclose(found[1], found[0], atol=1e-3)


def test_reading_completions_needs_to_know_where_they_are(tmp_path: Path) -> None:
    model = RewardModel(encoder())
    model.pooling = "completion"
    ids = torch.tensor([[3, 5, 2], [2, 2, 4]])
    with pytest.raises(ValueError, match="where they are"):
        model.score(ids, torch.ones_like(ids))
    with pytest.raises(ValueError, match="a token of one in every text"):
        model.score(ids, torch.ones_like(ids), torch.tensor([[False, True, True], [False] * 3]))
    folder = folder_of(tmp_path)
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({**settings, "pooling": "completion"}))
    assert RewardModel.from_pretrained(folder).pooling == "completion"
    (folder / SETTINGS).write_text(json.dumps({**settings, "pooling": "median"}))
    with pytest.raises(UserError, match=r"a damaged reward model \(no pooling 'median'"):
        RewardModel.from_pretrained(folder)


def test_gradients_do_not_see_the_padding() -> None:
    gradients = []
    for layout in (laid_out([3, 5, 2], 0, 0, 1), laid_out([3, 5, 2], 4, 3, 6)):
        model = RewardModel(decoder(), heads=1)
        model.heads.weight.data.fill_(0.1)
        model.score(*layout).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


def test_what_reads_ahead_is_found_by_looking() -> None:
    """A BERT that was made a decoder is causal, whatever its name."""
    assert RewardModel(encoder(is_decoder=True)).pooling == "last"
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="encoder-decoder"):
        RewardModel(T5Model(config))


def test_heads_begin_small_and_differ() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=255, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = RewardModel(BertModel(config), heads=50)
    assert model.heads.weight.std().item() == pytest.approx(1 / 16, rel=0.03)
    assert not model.heads.bias.any()
    assert not torch.equal(model.heads.weight[0], model.heads.weight[1])


def test_checkpointed_gradients_are_the_same() -> None:
    gradients = []
    for checkpointed in (False, True):
        for trunk in (decoder(), encoder()):
            torch.manual_seed(3)
            model = RewardModel(trunk)
            if checkpointed:
                model.checkpoint_gradients()
            model.score(*laid_out([3, 5, 2], 2, 0, 1)).sum().backward()
            assert trunk.training is checkpointed
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            with torch.no_grad():
                model.score(*laid_out([3, 5, 2], 2, 0, 1))
            assert not trunk.training
    for plain, again in zip(gradients[:2], gradients[2:], strict=True):
        torch.testing.assert_close(plain, again, atol=1e-7, rtol=1e-6)


def test_rows_without_tokens_or_too_long_are_refused() -> None:
    model = RewardModel(decoder(), context=4)
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        model.score(torch.ones(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        model.score(torch.ones(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.long))


# ---------------------------------------------------------------- folders


def test_a_folder_is_a_plain_model_with_heads_beside_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    model = RewardModel.from_pretrained(folder)
    assert model.trained
    assert (model.temperature, model.ensemble, model.objectives) == (1.7, 3, ("harmless", "helpful"))
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = AutoModel.from_pretrained(str(folder))
    with torch.no_grad():
        hidden = plain(input_ids=ids).last_hidden_state[:, -1]
        expected = model.heads(hidden).view(1, 3, 2) - model.offset
        assert torch.equal(model.score(ids, torch.ones_like(ids)), expected)
    settings = json.loads((folder / SETTINGS).read_text())
    assert settings["pooling"] == "last"
    assert settings["offset"] == model.offset.tolist()


def test_heads_are_kept_only_for_the_same_objectives(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    config = ModelConfig(path=str(folder))
    saved = RewardModel.from_pretrained(folder)
    same, _ = build_reward_model(config, alphabet="", objectives=("harmless", "helpful"), heads=3)
    assert same.trained
    assert torch.equal(same.heads.weight, saved.heads.weight)
    other, _ = build_reward_model(config, alphabet="", objectives=("reward",), heads=1)
    assert not other.trained
    assert torch.equal(embeddings(other.trunk), embeddings(saved.trunk))


def test_folders_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model\.path: .*holds no config\.json"):
        load_trunk(tmp_path / "empty")
    with pytest.raises(UserError, match="there is no reward model here"):
        RewardModel.from_pretrained(tmp_path / "empty")
    broken = tmp_path / "broken"
    broken.mkdir()
    folder_of(broken)
    (broken / HEADS).write_bytes(b"nothing")
    with pytest.raises(UserError, match="a damaged reward model"):
        RewardModel.from_pretrained(broken)
    (broken / SETTINGS).write_text("{")
    with pytest.raises(UserError, match="a damaged reward model"):
        RewardModel.from_pretrained(broken)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    decoder().save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    with pytest.raises(UserError, match=r"lacks \d+ of its model's weights, such as h\.2\."):
        load_trunk(tmp_path)


def test_a_language_models_folder_is_a_trunk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    language = GPT2LMHeadModel(decoder().config)
    language.save_pretrained(str(tmp_path))
    trunk = load_trunk(tmp_path)
    assert torch.equal(embeddings(trunk), embeddings(language))
    assert any(module.p for module in trunk.modules() if isinstance(module, torch.nn.Dropout))
    RewardModel(trunk)
    assert not any(module.p for module in trunk.modules() if isinstance(module, torch.nn.Dropout))


def test_an_adapter_is_merged_into_the_trunk(tmp_path: Path) -> None:
    """The trunk reads as base and adapter together do; the base alone would give other states."""
    torch.manual_seed(0)
    language = GPT2LMHeadModel(decoder().config).eval()
    config = saved(tmp_path / "base", language, words(eos_token="<eos>"))
    policy, tokenizer = build_policy(replace(config, lora=LoRAConfig(rank=2)), alphabet="")
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    policy.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(str(tmp_path / "adapter"))
    adapted = ModelConfig(path=str(tmp_path / "adapter"))
    model, _ = build_reward_model(adapted, alphabet="", objectives=("reward",), heads=1)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = policy.model.base_model(input_ids=ids).last_hidden_state
        found = model.trunk(input_ids=ids).last_hidden_state
        base = language.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - base).abs().max() > 0.1
    reward_writer(model, tokenizer)["reward_model"](tmp_path / "written")
    again = RewardModel.from_pretrained(tmp_path / "written")
    with torch.no_grad():
        torch.testing.assert_close(again.trunk(input_ids=ids).last_hidden_state, found, atol=1e-6, rtol=0)


def words(**special: str) -> PreTrainedTokenizerFast:
    """A word tokenizer with the special tokens that are named."""
    vocabulary = {word: i for i, word in enumerate(["?", *special.values(), "good", "bad", "yes", "no"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", **special)


def saved(folder: Path, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> ModelConfig:
    trunk.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return ModelConfig(path=str(folder))


def test_tokenizers_without_padding_or_eos(tmp_path: Path) -> None:
    """A decoder's tokenizer without a pad token scores batches; an encoder's ends texts with its sep token."""
    decoding = saved(tmp_path / "decoder", decoder(), words(eos_token="<eos>"))
    model, tokenizer = build_reward_model(decoding, alphabet="", objectives=("reward",), heads=1)
    assert tokenizer.pad_token_id is None
    together, lengths = Scorer(model, tokenizer).scores(["yes", "no"], ["good", "good bad good"])
    assert lengths.tolist() == [2, 4]
    alone, _ = Scorer(model, tokenizer).scores(["yes"], ["good"])
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=0)
    encoding = saved(tmp_path / "encoder", encoder(), words(sep_token="<sep>", cls_token="<cls>"))
    model, tokenizer = build_reward_model(encoding, alphabet="", objectives=("reward",), heads=1)
    assert tokenizer.eos_token_id == tokenizer.sep_token_id == 1
    assert (model.start, model.context, model.pooling) == (2, 23, "mean")
    reward_writer(model, tokenizer)["reward_model"](tmp_path / "encoder")
    again = Scorer.from_pretrained(tmp_path / "encoder")
    assert torch.equal(again.scores(["yes"], ["bad"])[0], Scorer(model, tokenizer).scores(["yes"], ["bad"])[0])
    saved(tmp_path / "none", decoder(), words())
    with pytest.raises(UserError, match="neither an eos nor a sep token"):
        load_reward_tokenizer(tmp_path / "none")


# ---------------------------------------------------------------- texts and names


def test_texts_are_scored_as_their_tokens_whatever_stands_beside_them(tmp_path: Path) -> None:
    scorer = Scorer.from_pretrained(folder_of(tmp_path))
    prompts, completions = ["ab", "c", "", "abcd"], ["dd", "efgh h", "a", "b"]
    scores, lengths = scorer.scores(prompts, completions)
    assert lengths.tolist() == [3, 7, 2, 2]
    assert scores.shape == (4, 3, 2)
    for row in range(4):
        alone, _ = scorer.scores([prompts[row]], [completions[row]])
        torch.testing.assert_close(scores[row], alone[0], atol=1e-5, rtol=0)
    small = Scorer(scorer.model, scorer.tokenizer, batch_size=1)
    torch.testing.assert_close(small.scores(prompts, completions)[0], scores, atol=1e-5, rtol=0)


def test_texts_that_do_not_fit_keep_the_prompts_end(tmp_path: Path) -> None:
    scorer = Scorer.from_pretrained(folder_of(tmp_path))
    long, _ = scorer.scores(["a" * 50 + "bc"], ["de"])
    short, _ = scorer.scores(["a" * 19 + "bc"], ["de"])  # 21 + 2 and EOS: the context of 24
    assert torch.equal(long, short)


def test_a_run_is_a_reward_by_its_name(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "rm"
    inner = run / "checkpoints" / "best" / "reward_model"
    inner.mkdir(parents=True)
    folder_of(inner)
    prompts, completions = ["ab", "c"], ["dd", "ef"]
    scores, lengths = Scorer.from_pretrained(run).scores(prompts, completions)
    weights = {str(run): 2.0, f"{run}:helpful": 1.0, f"{run}:disagreement": 0.0}
    found = resolve(weights, own={}, columns=[])(prompts, completions, {"sample_index": [0, 1]})
    helpful, even = scores[..., 1].mean(1), scores.mean((1, 2))
    torch.testing.assert_close(found.total, 2 * even + helpful, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.by_name[f"{run}:disagreement"], scores.mean(2).std(1), atol=1e-5, rtol=0)
    assert lengths.tolist() == [3, 3]
    with pytest.raises(UserError, match="no objective 'polite'; there is harmless, helpful, disagreement"):
        named_reward(f"{run}:polite")
    assert named_reward("exact_match") is None
    with pytest.raises(UserError, match="or the folder of a reward model's run"):
        resolve({"runs/nothing": 1.0}, own={}, columns=[])


def test_parts_of_one_model_share_a_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, passes = folder_of(tmp_path), []
    original = RewardModel.score

    def score(self: RewardModel, input_ids: Tensor, *masks: Tensor) -> Tensor:
        passes.append(len(input_ids))
        return original(self, input_ids, *masks)

    monkeypatch.setattr(RewardModel, "score", score)
    parts = [reward_function(folder, part=part) for part in ("helpful", "harmless", "disagreement")]
    for part in parts:
        part(["a", "b"], ["c", "d"])
    assert passes == [2]
    parts[0](["a", "b"], ["c", "e"])
    assert passes == [2, 2]
    lower = reward_function(folder, scoring=ScoringConfig(ensemble="min", length_penalty=1.0))
    (low,), (mean,) = lower(["a"], ["c"]), reward_function(folder)(["a"], ["c"])
    assert low is not None
    assert mean is not None
    assert low < mean - 2.0  # two tokens cost one each


def test_a_new_model_has_the_datas_characters() -> None:
    _, tokenizer = build_reward_model(ModelConfig(context=8), alphabet="xyz", objectives=("reward",), heads=1)
    assert tokenizer.encode("zyx") == character_tokenizer("xyz").encode("zyx")
