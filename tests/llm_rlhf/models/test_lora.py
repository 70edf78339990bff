"""Adapters: what learns, what is saved, who can load it, and what a later run takes as its reference."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from experiment.errors import UserError
from llm_rlhf.models.causal import LanguagePolicy, build_policy, frozen_copy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.lora import ADAPTER, WEIGHTS, LoRAConfig, add_lora, base_of, is_adapted, merge, merged_writer
from llm_rlhf.models.tokenizer import load_tokenizer
from llm_rlhf.train_sft import SupervisedConfig, make_optimizer

IDS = torch.tensor([[4, 9, 7, 5, 8, 6]])
LORA = LoRAConfig(rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and its tokenizer, as a plain folder."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    policy, tokenizer = build_policy(ModelConfig(layers=2, width=16, heads=2, context=24), alphabet="abcdefgh")
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


def adapted(base: Path, lora: LoRAConfig | None = LORA, **settings: Any) -> LanguagePolicy:
    torch.manual_seed(1)
    return build_policy(ModelConfig(path=str(base), lora=lora, **settings), alphabet="")[0]


def trained(base: Path) -> LanguagePolicy:
    """With an adapter that changes something."""
    policy = adapted(base)
    optimizer = make_optimizer(policy, SupervisedConfig(learning_rate=0.05))
    for _ in range(3):
        optimizer.zero_grad()
        (-log_probs(policy).mean()).backward()
        optimizer.step()
    return policy


def log_probs(policy: LanguagePolicy) -> Tensor:
    return policy.evaluate({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, IDS).log_probs[:, 1:]


def test_a_new_adapter_changes_nothing_and_only_it_learns(base: Path) -> None:
    plain, policy = adapted(base, lora=None), adapted(base)
    assert torch.equal(log_probs(policy), log_probs(plain))
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in names)
    # 2 layers x 4 linear layers x 2 matrices: attention in and out, and both of the feed-forward block
    assert len(names) == 16
    assert policy.model.get_submodule("transformer.h.0.attn.c_attn").scaling == {"default": 2.0}
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    after = trained(base).state_dict()
    for name, tensor in before.items():
        key = (
            name
            if name in after
            else name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        )
        assert torch.equal(tensor, after[key]), name
    assert (log_probs(trained(base)) - log_probs(plain)).abs().max() > 0.1


def test_peft_loads_the_adapter_and_merging_computes_the_same(tmp_path: Path, base: Path) -> None:
    policy = trained(base)
    policy.save_pretrained(tmp_path / "adapter")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {ADAPTER, WEIGHTS} <= files
    assert not files & {"config.json", "model.safetensors"}
    assert base_of(tmp_path / "adapter") == str(base.resolve())
    with torch.no_grad():
        expected = policy.model(input_ids=IDS).logits
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(str(base)), str(tmp_path / "adapter")
        )
        torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, atol=1e-6, rtol=0)
        again = LanguagePolicy.from_pretrained(tmp_path / "adapter")
        assert torch.equal(log_probs(again), log_probs(policy))
        merge(policy.model)
        torch.testing.assert_close(policy.model(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)
        policy.save_pretrained(tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)
    assert not any("lora" in name for name in plain.state_dict())
    assert not is_adapted(policy.model)


def test_an_adapter_that_was_loaded_is_merged_and_saved_whole(tmp_path: Path, base: Path) -> None:
    policy = trained(base)
    policy.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = policy.model(input_ids=IDS).logits
        loaded = LanguagePolicy.from_pretrained(tmp_path / "adapter")
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(log_probs(LanguagePolicy.from_pretrained(tmp_path / "again")), log_probs(policy))
        write = merged_writer(loaded.model, load_tokenizer(base), asked=True)["merged"]
        write(tmp_path / "written")
        merge(loaded.model)
        loaded.save_pretrained(tmp_path / "merged")
        for name in ("merged", "written"):
            plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / name))
            torch.testing.assert_close(plain(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)


def test_an_adapter_in_its_base_models_folder_is_merged_and_saved_whole(tmp_path: Path, base: Path) -> None:
    policy = trained(base)
    shutil.copytree(base, tmp_path / "both")
    policy.save_pretrained(tmp_path / "both")
    loaded = LanguagePolicy.from_pretrained(tmp_path / "both")
    assert torch.equal(log_probs(loaded), log_probs(policy))
    merge(loaded.model)
    loaded.save_pretrained(tmp_path / "merged")
    again = LanguagePolicy.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(log_probs(again), log_probs(policy), atol=1e-5, rtol=0)


def test_a_run_without_lora_learns_the_merged_weights(tmp_path: Path, base: Path) -> None:
    policy = trained(base)
    policy.save_pretrained(tmp_path / "adapter")
    whole = adapted(tmp_path / "adapter", lora=None)  # the tokenizer comes from the base model
    torch.testing.assert_close(log_probs(whole), log_probs(policy), atol=1e-5, rtol=0)
    assert all(parameter.requires_grad for parameter in whole.parameters())
    assert not any("lora" in name for name in whole.state_dict())


def test_the_reference_is_base_and_adapter_while_the_adapter_goes_on(tmp_path: Path, base: Path) -> None:
    """Not the base alone, which is what `disable_adapters` would give."""
    trained(base).save_pretrained(tmp_path / "sft")
    policy = adapted(tmp_path / "sft")
    reference = frozen_copy(policy)
    assert torch.equal(log_probs(reference), log_probs(policy))
    assert (log_probs(reference) - log_probs(adapted(base))).abs().max() > 0.1
    held = log_probs(reference).clone()
    optimizer = make_optimizer(policy, SupervisedConfig(learning_rate=0.05))
    (-log_probs(policy).mean()).backward()
    optimizer.step()
    assert torch.equal(log_probs(reference), held)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert (log_probs(policy) - held).abs().max() > 1e-3
    reference.save_pretrained(tmp_path / "reference")  # as a run keeps it
    assert torch.equal(log_probs(LanguagePolicy.from_pretrained(tmp_path / "reference")), held)


def test_gradient_checkpointing_changes_no_gradient_and_generation_keeps_its_cache(base: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = adapted(base, gradient_checkpointing=checkpointing)
        (-log_probs(policy).mean()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        with torch.no_grad():
            _, _, cache = policy.step(IDS, torch.ones_like(IDS), use_cache=True)
        assert cache.get_seq_length() == IDS.shape[1]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-7, rtol=1e-6)


def test_checkpointed_layers_are_computed_again(base: Path) -> None:
    policy = adapted(base, lora=None, gradient_checkpointing=True)
    calls = []
    policy.model.get_submodule("transformer.h.0.attn").register_forward_hook(lambda *_: calls.append(1))
    loss = -log_probs(policy).mean()
    before = len(calls)
    loss.backward()
    assert (before, len(calls)) == (1, 2)


def test_what_does_not_fit_is_said(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.lora: an adapter needs a trained model"):
        ModelConfig(lora=LORA)
    for bad, message in (({"rank": 0}, r"lora\.rank"), ({"alpha": 0.0}, r"lora\.alpha")):
        with pytest.raises(ValueError, match=message):
            LoRAConfig(**bad)
    with pytest.raises(UserError, match=r"model\.lora\.targets: q_proj cannot be adapted; .* c_attn, c_fc, c_proj"):
        adapted(base, LoRAConfig(targets=("q_proj",)))
    only = adapted(base, LoRAConfig(rank=3, alpha=6.0, targets=("c_attn",)))
    assert sum(parameter.requires_grad for parameter in only.parameters()) == 4
    only.save_pretrained(tmp_path / "a")
    assert is_adapted(adapted(tmp_path / "a").model)
    for config, message in (
        (LoRAConfig(rank=4, alpha=6.0), r"model\.lora\.rank: the adapter in .* it has 3, not 4"),
        (LoRAConfig(rank=3, alpha=6.0, targets=("c_fc",)), r"it has \['c_attn'\], not \['c_fc'\]"),
    ):
        with pytest.raises(UserError, match=message):
            adapted(tmp_path / "a", config)


def test_a_base_model_that_is_gone_is_said(tmp_path: Path, base: Path) -> None:
    policy = adapted(base)
    policy.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / ADAPTER
    settings = json.loads(file.read_text())
    for name, message in (
        (str(tmp_path / "none"), r"its base model .*none is not there"),
        (None, r"base_model_name_or_path is missing"),
    ):
        file.write_text(json.dumps({**settings, "base_model_name_or_path": name}))
        with pytest.raises(UserError, match=message):
            LanguagePolicy.from_pretrained(tmp_path / "a")
    file.write_text(json.dumps({**settings, "r": 5}))
    with pytest.raises(UserError, match="does not fit its base model"):
        LanguagePolicy.from_pretrained(tmp_path / "a")
    file.write_text(json.dumps(settings))
    (tmp_path / "a" / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"{WEIGHTS} is missing"):
        LanguagePolicy.from_pretrained(tmp_path / "a")


def test_a_merged_copy_leaves_the_model_alone(base: Path) -> None:
    policy = trained(base)
    before = log_probs(policy)
    whole = copy.deepcopy(policy.model)
    merge(whole)
    assert is_adapted(policy.model)
    assert torch.equal(log_probs(policy), before)


def test_the_same_seed_draws_the_same_adapter(base: Path) -> None:
    first, second = adapted(base), adapted(base)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    model = AutoModelForCausalLM.from_pretrained(str(base))
    torch.manual_seed(2)
    add_lora(model, LORA, base=str(base))
    key = "transformer.h.0.attn.c_attn.lora_A.default.weight"
    assert not torch.equal(model.state_dict()[key], first.model.state_dict()[key])
