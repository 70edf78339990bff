"""A character-level tokenizer that is an ordinary transformers tokenizer, and loading of any other."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from experiment.errors import UserError, first_line
from llm_rlhf.models.reading import MALFORMED

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token per character of `alphabet`; pad, bos, eos and unknown are four tokens of their own.

    Nothing is added around a text: recipes append EOS and left-pad themselves. Saved with `save_pretrained`,
    loaded with `transformers.AutoTokenizer`.
    """
    characters = sorted(set(alphabet))
    if not characters:
        raise ValueError("alphabet: a tokenizer needs at least one character")
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, UNKNOWN, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Any transformers tokenizer from a local folder or a hub name. Raises UserError if there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path))
    except MALFORMED as error:
        raise UserError(f"{path}: no tokenizer could be loaded from here ({first_line(error)})") from error
    return tokenizer


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """As `read_tokenizer`. Raises UserError, too, if it has no eos token: completions could not end."""
    tokenizer = read_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no eos token; set one and save it again")
    return tokenizer


def require_known_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, path: str | Path) -> None:
    """UserError where the tokenizer has ids that the model has no embedding of: a token was added and no row."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= len(weight):
        raise UserError(
            f"{path}: the tokenizer goes up to id {highest} ({token!r}), the model has embeddings of {len(weight)} "
            f"tokens; call model.resize_token_embeddings({highest + 1}) and save it again, or take the model's own "
            "tokenizer"
        )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padding. Masks say what is padding, so the eos id will do where there is none."""
    padding = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if padding is None else padding)


def end_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end a completion: the tokenizer's eos, and those at which the model's own generation settings end
    a text, the end of a turn, say. Settings that name an ordinary word's id were made for another tokenizer (a
    configuration's default is id 2 or 50256); only the tokenizer's special tokens count.
    """
    settings = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    own = [] if named is None else [named] if isinstance(named, int) else list(named)
    special = {int(token) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return frozenset({int(tokenizer.eos_token_id), *special.intersection(own)})


def decode_completions(tokenizer: PreTrainedTokenizerBase, completions: list[list[int]]) -> list[str]:
    """Texts of completions, special tokens left out."""
    return list(tokenizer.batch_decode(completions, skip_special_tokens=True, clean_up_tokenization_spaces=False))
