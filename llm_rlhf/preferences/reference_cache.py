"""Log-probs of a frozen reference, computed once and kept in a file; no copy of its weights stays in memory.

The file is RUN/reference_log_probs.safetensors, or one beside the data that several runs share. It carries two
fingerprints, of the reference's weights and of the texts (with precision and temperature), and is read only where
both fit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiment.checkpoint import sync
from experiment.errors import UserError, storage_errors
from llm_rlhf.data.texts import TokenizedTexts
from llm_rlhf.models.causal import LanguagePolicy, build_policy, tokenizer_of
from llm_rlhf.models.loading import ModelConfig, model_folder
from llm_rlhf.models.lora import LoRAConfig, base_of
from llm_rlhf.preferences.learning import LearningConfig, all_log_probs

CACHE = "reference_log_probs.safetensors"


def fingerprint_of_weights(policy: LanguagePolicy) -> str:
    """A hash of every weight and buffer of the model by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_of_texts(sets: Mapping[str, Sequence[TokenizedTexts]], *settings: object) -> str:
    """A hash of all tokens and masks, and of settings that change log-probs."""
    digest = hashlib.sha256(repr(settings).encode())
    for name in sorted(sets):
        for texts in sets[name]:
            digest.update(f"{name} {tuple(texts.input_ids.shape)}".encode())
            for tensor in (texts.input_ids, texts.attention_mask, texts.mask):
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_cache(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Log-probs by name and the fingerprints `weights` and `texts` they belong to; None if there is no such file.

    Raises UserError for a file that is something else.
    """
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            found = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a file of reference log-probs ({error}); give another path") from error
    if not {"weights", "texts"} <= found.keys():
        raise UserError(f"{path}: not a file of reference log-probs; give another path")
    return tensors, found


def write_cache(path: Path, log_probs: Mapping[str, Tensor], fingerprints: Mapping[str, str]) -> None:
    """Write atomically. Raises UserError for a full or read-only disk."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: tensor.contiguous() for name, tensor in log_probs.items()},
                str(temporary),
                dict(fingerprints),
            )
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class ReferenceLogProbs:
    """by_set: log-probs of each set, as `all_log_probs` gives them; weights: fingerprint of the reference."""

    by_set: dict[str, Tensor]
    weights: str


@dataclass(frozen=True)
class ReferenceSource:
    """path    the reference's folder; policy: the one that training starts from
    named   it is another model than the one that training starts from: the setting `reference`
    is_policy   the policy, before its first update, is the reference itself; not so with a new adapter beside it
    lora        of the adapter in `path` that the policy goes on with: the reference computes with it as the policy
                does, since merged weights would round otherwise in bfloat16
    file    where its log-probs are kept; shared: the user named that file, so that other runs may read it, too
    """

    path: str
    policy: str
    named: bool
    is_policy: bool
    file: Path
    shared: bool
    lora: LoRAConfig | None = None

    @classmethod
    def of(
        cls, run_folder: Path, *, model: ModelConfig, reference: str | None, reference_cache: str | None
    ) -> ReferenceSource:
        """What a recipe's settings mean. The model's path must be given."""
        file = run_folder / CACHE if reference_cache is None else Path(reference_cache)
        goes_on = reference is None and base_of(model_folder(str(model.path))) is not None
        return cls(
            path=reference or str(model.path),
            policy=str(model.path),
            named=reference is not None,
            is_policy=reference is None and (model.lora is None or goes_on),
            file=file,
            shared=reference_cache is not None,
            lora=model.lora if goes_on else None,
        )


def reference_log_probs(
    policy: LanguagePolicy,
    sets: Mapping[str, Sequence[TokenizedTexts]],
    source: ReferenceSource,
    *,
    began_with: str | None,
    learning: LearningConfig,
) -> ReferenceLogProbs:
    """The reference's log-probs of `sets`, computed once and kept in a file with fingerprints.

    sets        name -> parts as `all_log_probs` takes them
    policy      what is trained; its temperature and vocabulary are the reference's, too
    began_with  fingerprint of the weights that a resumed (or evaluated) run began with; None at its start

    A resumed run reads the file and never the weights, unless the file is gone or belongs to other texts. Raises
    UserError if a named cache belongs to something else, or if the reference is no longer what it was.
    """
    file = source.file
    texts = fingerprint_of_texts(sets, learning.precision, policy.temperature)
    found = read_cache(file)
    if began_with is not None and found is not None and found[1] == {"weights": began_with, "texts": texts}:
        return ReferenceLogProbs(found[0], began_with)
    reference = policy if began_with is None and source.is_policy else _load_reference(source, policy)
    weights = fingerprint_of_weights(reference)
    if began_with not in (None, weights):
        raise UserError(
            f"{source.path} is no longer the model that this run began with, and {file} does not hold its "
            "log-probs of these texts; put one of them back"
        )
    if found is not None and found[1] == {"weights": weights, "texts": texts}:
        print(f"reference log-probs: read from {file}", flush=True)
        return ReferenceLogProbs(found[0], weights)
    if found is not None and source.shared:
        other = "another reference model" if found[1]["weights"] != weights else "other texts or another precision"
        raise UserError(f"reference_cache: {file} belongs to {other}; give another path, or delete it")
    why = "" if began_with is None else f"; {file} is gone or belongs to other texts"
    count = sum(len(part) for parts in sets.values() for part in parts)
    print(f"reference log-probs: computing those of {count} texts{why}", flush=True)
    log_probs = {
        name: all_log_probs(reference, parts, rows=learning.rows, precision=learning.precision)
        for name, parts in sets.items()
    }
    write_cache(file, log_probs, {"weights": weights, "texts": texts})
    return ReferenceLogProbs(log_probs, weights)


def _load_reference(source: ReferenceSource, policy: LanguagePolicy) -> LanguagePolicy:
    """The reference, for as long as it is measured. Raises UserError if it reads other tokens than the policy."""
    try:
        reference, tokenizer = build_policy(
            ModelConfig(path=source.path, lora=source.lora), alphabet="", temperature=policy.temperature
        )
    except UserError as error:
        raise UserError(str(error).replace("model.path", "reference", 1) if source.named else str(error)) from error
    ours, theirs = (_vocabulary(model) for model in (policy, reference))
    if ours != theirs:
        raise UserError(f"reference: {source.path} has a vocabulary of {theirs} tokens, the policy one of {ours}")
    if source.named and tokenizer.get_vocab() != tokenizer_of(model_folder(source.policy)).get_vocab():
        raise UserError(f"reference: {source.path} has other tokens than {source.policy}, the policy's start")
    return reference.eval()


def _vocabulary(policy: LanguagePolicy) -> int:
    weight = policy.model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]
