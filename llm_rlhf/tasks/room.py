"""Whether prompts leave room for an answer in a model's context, said before anything is trained or measured."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from llm_rlhf.data.texts import encode_prompts
from llm_rlhf.tasks.examples import Example


def leaving_room(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, context: int, max_new_tokens: int
) -> list[Example]:
    """The examples whose prompt fits `context` tokens together with an answer of `max_new_tokens`."""
    tokens = encode_prompts(tokenizer, [example.prompt for example in examples])
    return [example for example, ids in zip(examples, tokens, strict=True) if len(ids) + max_new_tokens <= context]


def skipping_long(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_new_tokens: int,
    what: str,
) -> Sequence[Example]:
    """`leaving_room`; says how many of `what` are left out. Where none would be left all stay, and `require_room`
    names one."""
    kept = leaving_room(examples, tokenizer, context=context, max_new_tokens=max_new_tokens)
    if not kept or len(kept) == len(examples):
        return examples
    print(
        f"{what}: {len(examples) - len(kept)} of {len(examples)} prompts leave no room for {max_new_tokens} new "
        f"tokens in the context of {context} and are left out",
        flush=True,
    )
    return kept


def require_room(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_new_tokens: int,
    limited_by: str,
    new_model: bool,
    known: Sequence[Sequence[int]] = (),
) -> None:
    """Raises UserError that names the longest prompt where it and an answer do not fit the model's context.

    max_new_tokens  longest answer, EOS included; limited_by: the setting that decides it, "" for none
    new_model       whether the context is a setting (model.context), and not a trained model's own
    known           token ids of the first examples' prompts, where they are there already
    """
    tokens = [*known, *encode_prompts(tokenizer, [example.prompt for example in examples[len(known) :]])]
    too_long = [row for row, ids in enumerate(tokens) if len(ids) + max_new_tokens > context]
    if not too_long:
        return
    longest = max(too_long, key=lambda row: len(tokens[row]))
    count, example = len(tokens[longest]), examples[longest]
    ways = []
    if limited_by and count < context:
        ways.append(f"set {limited_by} to at most {context - count}")
    if new_model:
        ways.append(f"set model.context to at least {count + max_new_tokens}")
    else:
        ways.append("take a model with a longer context")
    if count >= context:
        ways.append("leave that prompt out")
    answer = f"{max_new_tokens} new ones" if max_new_tokens > 1 else "an answer"
    raise UserError(
        f"{example.place or _excerpt(example.prompt)}: a prompt of {count} tokens and {answer}"
        f"{f' ({limited_by})' if limited_by else ''} do not fit the model's context of {context}, nor do "
        f"{len(too_long) - 1} others of {len(tokens)} prompts; {', or '.join(ways)}"
    )


def _excerpt(text: str, limit: int = 40) -> str:
    shown = " ".join(text.split())
    return repr(shown if len(shown) <= limit else shown[: limit - 3] + "...")
