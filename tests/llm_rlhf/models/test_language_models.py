from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BioGptConfig,
    BloomConfig,
    FalconConfig,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    XGLMConfig,
)

from experiment.errors import UserError
from llm_rlhf.models.causal import LanguagePolicy, build_policy, frozen_copy, position_ids
from llm_rlhf.models.loading import ModelConfig, load_language_model, model_folder, without_dropout

ALPHABET = "0123456789+-*/="


def tiny_policy(*, value_head: bool = False, temperature: float = 1.0) -> LanguagePolicy:
    torch.manual_seed(0)
    config = ModelConfig(layers=2, width=16, heads=2, context=24)
    policy, _ = build_policy(config, alphabet=ALPHABET, value_head=value_head, temperature=temperature)
    for parameter in policy.parameters():  # GPT-2's own initialisation is nearly uniform over tokens
        parameter.data += 0.3 * torch.randn_like(parameter)
    return policy


def batch(rows: int, width: int, *, seed: int = 0) -> Tensor:
    return torch.randint(4, 19, (rows, width), generator=torch.Generator().manual_seed(seed))


def naive_log_probs(policy: LanguagePolicy, tokens: Tensor) -> Tensor:
    """One prefix at a time: log p(token_t | tokens before t), column 0 left 0."""
    result = torch.zeros(tokens.shape)
    for row, sequence in enumerate(tokens):
        for t in range(1, len(sequence)):
            prefix = sequence[:t].unsqueeze(0)
            logits = policy.model(input_ids=prefix, attention_mask=torch.ones_like(prefix)).logits[0, -1]
            result[row, t] = torch.log_softmax(logits / policy.temperature, -1)[sequence[t]]
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_column_t_holds_the_log_prob_of_token_t(temperature: float) -> None:
    policy = tiny_policy(temperature=temperature)
    tokens = batch(3, 7)
    with torch.no_grad():
        found = policy.evaluate({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens)
        expected = naive_log_probs(policy, tokens)
    torch.testing.assert_close(found.log_probs, expected, atol=1e-5, rtol=0)
    assert found.log_probs[:, 0].eq(0).all()
    assert found.values is None
    assert found.log_probs.std() > 0.1  # a uniform model would pass whatever the shift


def test_entropy_is_that_of_the_distribution_the_token_came_from() -> None:
    policy = tiny_policy(temperature=0.5)
    tokens = batch(2, 5)
    with torch.no_grad():
        found = policy.evaluate({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens).entropy
        logits = policy.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :-1]
    expected = torch.distributions.Categorical(logits=logits / 0.5).entropy()
    torch.testing.assert_close(found[:, 1:], expected, atol=1e-5, rtol=0)


def test_left_padding_changes_nothing() -> None:
    policy = tiny_policy(value_head=True)
    assert policy.value_head is not None
    torch.nn.init.normal_(policy.value_head.weight)
    tokens = batch(2, 6)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(tokens)], dim=1)
    # A row of full width keeps the padding from being cut off as a whole.
    wide = batch(1, 9, seed=1)
    padded, mask = torch.cat([padded, wide]), torch.cat([mask, torch.ones_like(wide)])
    with torch.no_grad():
        plain = policy.evaluate({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens)
        left = policy.evaluate({"input_ids": padded, "attention_mask": mask}, padded)
    assert left.values is not None
    assert plain.values is not None
    torch.testing.assert_close(left.log_probs[:2, 4:], plain.log_probs[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(left.entropy[:2, 4:], plain.entropy[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(left.values[:2, 4:], plain.values[:, 1:], atol=1e-5, rtol=0)


def test_gradients_through_left_padding_are_finite_and_equal() -> None:
    tokens = batch(2, 6)
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), tokens], dim=1)
    mask = torch.cat([torch.zeros(2, 2, dtype=torch.long), torch.ones_like(tokens)], dim=1)
    wide = batch(1, 8, seed=2)
    gradients = []
    for ids, attention, start in (
        (tokens, torch.ones_like(tokens), 3),
        (torch.cat([padded, wide]), torch.cat([mask, torch.ones_like(wide)]), 5),
    ):
        policy = tiny_policy()
        evaluation = policy.evaluate({"input_ids": ids, "attention_mask": attention}, ids)
        evaluation.log_probs[:2, start:].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert torch.isfinite(gradients[1]).all()
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


def test_only_decision_columns_are_computed_and_they_are_the_same() -> None:
    policy = tiny_policy(value_head=True)
    assert policy.value_head is not None
    torch.nn.init.normal_(policy.value_head.weight)
    tokens = batch(4, 9)
    decisions = torch.zeros(4, 9, dtype=torch.bool)
    decisions[:, 5:8] = True
    decisions[1, 7] = False
    whole = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        full = policy.evaluate(whole, tokens)
        part = policy.evaluate({**whole, "decisions": decisions}, tokens)
    assert part.values is not None
    assert full.values is not None
    torch.testing.assert_close(part.log_probs[:, 5:8], full.log_probs[:, 5:8], atol=1e-5, rtol=0)
    torch.testing.assert_close(part.values[:, 5:8], full.values[:, 5:8], atol=1e-5, rtol=0)
    assert part.log_probs[:, :5].eq(0).all()
    assert part.log_probs[:, 8:].eq(0).all()
    assert part.log_probs.shape == tokens.shape


@pytest.mark.parametrize("padding", [0, 2])
def test_shared_prefix_gives_the_same_log_probs_and_gradients(padding: int) -> None:
    """Rows of one prompt share its computation; a batch in which no prompt repeats does not."""
    prompts = batch(2, 5)
    prompts[0, :padding] = 0
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :padding] = 0
    index = torch.tensor([0, 1, 1, 0, 1, 0])
    tokens = torch.cat([prompts[index], batch(6, 4, seed=3)], dim=1)
    attention = mask[index]
    decisions = torch.zeros(6, 9, dtype=torch.bool)
    decisions[:, 5:] = True

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        policy = tiny_policy(value_head=True)
        observations = {
            "input_ids": tokens[rows],
            "attention_mask": attention[rows],
            "decisions": decisions[rows],
        }
        evaluation = policy.evaluate(observations, tokens[rows])
        (evaluation.log_probs.sum() + evaluation.entropy.sum()).backward()
        gradient = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
        return evaluation.log_probs.detach(), torch.cat(gradient)

    together, gradient = run(torch.arange(6))
    alone = [run(torch.tensor([row])) for row in range(6)]
    torch.testing.assert_close(together, torch.cat([log_probs for log_probs, _ in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, torch.stack([g for _, g in alone]).sum(0), atol=1e-3, rtol=1e-3)


def test_no_decision_at_all_is_zeros() -> None:
    policy = tiny_policy()
    tokens = batch(2, 4)
    observations = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "decisions": torch.zeros(2, 4, dtype=torch.bool),
    }
    assert policy.evaluate(observations, tokens).log_probs.eq(0).all()


def test_values_start_at_zero_and_only_the_head_is_the_critic() -> None:
    policy = tiny_policy()
    assert list(policy.critic_parameters()) == []
    policy = LanguagePolicy(policy.model, value_head=True)
    tokens = batch(2, 5)
    values = policy.evaluate({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens).values
    assert values is not None
    assert values.eq(0).all()
    assert len(list(policy.critic_parameters())) == 2


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]


def test_save_and_load_by_plain_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy, tokenizer = build_policy(ModelConfig(width=16, heads=2, context=24), alphabet=ALPHABET, value_head=True)
    assert policy.value_head is not None
    torch.nn.init.normal_(policy.value_head.weight)
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(str(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    ids = AutoTokenizer.from_pretrained(str(tmp_path))("12+34=", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        expected = policy.model(input_ids=ids.input_ids, attention_mask=torch.ones_like(ids.input_ids)).logits
        found = plain(input_ids=ids.input_ids, attention_mask=torch.ones_like(ids.input_ids)).logits
    assert torch.equal(found, expected)
    again = LanguagePolicy.from_pretrained(tmp_path, value_head=True)
    for (name, before), (_, after) in zip(policy.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(before, after), name


def test_frozen_copy_does_not_follow() -> None:
    policy = tiny_policy()
    reference = frozen_copy(policy)
    before = next(reference.parameters()).clone()
    next(policy.parameters()).data += 1.0
    assert torch.equal(next(reference.parameters()), before)
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_another_architecture_works_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=19,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    llama.save_pretrained(str(tmp_path))
    policy = LanguagePolicy.from_pretrained(tmp_path)
    tokens = batch(2, 6)
    with torch.no_grad():
        found = policy.evaluate({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens)
        expected = naive_log_probs(policy, tokens)
    torch.testing.assert_close(found.log_probs, expected, atol=1e-5, rtol=0)


def test_dropout_is_switched_off(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.model.config.resid_pdrop = policy.model.config.attn_pdrop = policy.model.config.embd_pdrop = 0.5
    policy.save_pretrained(tmp_path)
    loaded = LanguagePolicy(load_language_model(tmp_path)).train()
    tokens = batch(2, 6)
    observations = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    first, second = (loaded.evaluate(observations, tokens).log_probs for _ in range(2))
    assert torch.equal(first, second)
    assert loaded.model.dtype == torch.float32


SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}
WITH_DROPOUT: list[PretrainedConfig] = [
    BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.5, attention_dropout=0.5),
    FalconConfig(**SMALL, hidden_dropout=0.5, attention_dropout=0.5),
    GPTBigCodeConfig(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    ),
    XGLMConfig(
        **ENDS,
        vocab_size=32,
        d_model=16,
        ffn_dim=32,
        num_layers=2,
        attention_heads=2,
        dropout=0.5,
        attention_dropout=0.5,
        activation_dropout=0.5,
        layerdrop=0.5,
    ),
    BioGptConfig(
        **SMALL,
        **ENDS,
        intermediate_size=32,
        hidden_dropout_prob=0.5,
        attention_probs_dropout_prob=0.5,
        activation_dropout=0.5,
    ),
    OPTConfig(**SMALL, **ENDS, word_embed_proj_dim=16, ffn_dim=32, dropout=0.5, attention_dropout=0.5),
    GPTNeoXConfig(**SMALL, intermediate_size=32, hidden_dropout=0.5, attention_dropout=0.5),
    PhiConfig(**SMALL, **ENDS, intermediate_size=32, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5),
    MixtralConfig(
        **SMALL,
        intermediate_size=32,
        num_key_value_heads=2,
        num_local_experts=2,
        attention_dropout=0.5,
        router_jitter_noise=0.5,
    ),
]


@pytest.mark.parametrize("config", WITH_DROPOUT, ids=lambda config: str(config.model_type))
def test_no_architecture_drops_anything_while_it_learns(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    without_dropout(model)
    policy = LanguagePolicy(model)
    tokens = batch(2, 8)
    observations = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        expected = policy.evaluate(observations, tokens).log_probs
    policy.checkpoint_gradients()
    first, second = (policy.evaluate(observations, tokens).log_probs for _ in range(2))
    assert first.requires_grad  # computed in training mode, as checkpointing needs
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_policy().save_pretrained(tmp_path)
    weights = load_file(str(tmp_path / "model.safetensors"))
    renamed = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    capfd.readouterr()
    with pytest.raises(UserError, match=r"lacks \d+ of its model's weights, such as .*; they would be random$"):
        load_language_model(tmp_path)
    assert capfd.readouterr() == ("", "")  # the error's one line says it all


def test_a_model_that_sees_what_follows_is_refused(tmp_path: Path) -> None:
    """Trained as a causal one it would learn to look ahead, and say nothing of it."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(vocab_size=20, intermediate_size=16, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^model\.path: .* is no causal language model"):
        LanguagePolicy.from_pretrained(tmp_path)


def test_bad_model_paths_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_language_model(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        model_folder(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="could not be loaded"):
        load_language_model(tmp_path)
    assert model_folder("some-owner/some-model") == "some-owner/some-model"


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        ModelConfig(width=10, heads=4)
    with pytest.raises(ValueError, match="positive"):
        LanguagePolicy(tiny_policy().model, temperature=0.0)
