"""Perplexity on a text file: what a model still knows of language that it was not trained on lately.

Every token of a document is judged once, after as much text as the context allows: windows of the context's length
move by `stride` tokens, and each judges the tokens that no window before it has (so every token but the first
window's has at least context - stride tokens before it). A document begins after the tokenizer's bos token, or its
eos where it has none. The perplexity per token depends on the tokenizer; per byte and per character it does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiment.errors import UserError
from llm_rlhf.data.files import SUFFIXES, read_rows, text_column
from llm_rlhf.evaluation.results import Measure, Result
from llm_rlhf.evaluation.subject import Subject
from llm_rlhf.models.generation import at_temperature
from llm_rlhf.models.tokenizer import pad_id


def read_documents(path: str | Path, *, column: str = "text") -> list[str]:
    """A plain text file as one document, or a file of rows with a column of texts; empty ones are left out.

    Raises UserError naming the file, and the row where there is one.
    """
    if str(path).endswith(SUFFIXES):
        texts = [text_column(row.columns, column, row.place) for row in read_rows(path)]
    else:
        try:
            texts = [Path(path).read_bytes().decode("utf-8")]
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"{path}: there is no text in it")
    return texts


@dataclass(frozen=True)
class Window:
    """tokens: what the model reads, the first `known` of them only read, the others judged."""

    tokens: list[int]
    known: int


def windows(ids: Sequence[int], *, start: int, context: int, stride: int) -> list[Window]:
    """Cut a document's tokens into windows that judge every token once; `start` stands before the first.

    Raises ValueError unless 1 <= stride < context.
    """
    if not 1 <= stride < context:
        raise ValueError(f"stride must be between 1 and the context less one ({context - 1}), got {stride}")
    whole = [start, *ids]
    found, judged = [], 1  # the start is never judged
    while judged < len(whole):
        end = min(len(whole), context if judged == 1 else judged + stride)
        begin = max(0, end - context)
        found.append(Window(whole[begin:end], judged - begin))
        judged = end
    return found


@torch.no_grad()
def token_log_probs(subject: Subject, document: Sequence[Window]) -> list[list[float]]:
    """Nats of every judged token, a list a window, at temperature 1."""
    policy, fill = subject.policy, pad_id(subject.tokenizer)
    found: list[list[float]] = []
    with at_temperature(policy, 1.0):
        for begin in range(0, len(document), subject.batch_size):
            batch = document[begin : begin + subject.batch_size]
            width = max(len(window.tokens) for window in batch)
            rest = [width - len(window.tokens) for window in batch]
            ids = [window.tokens + [fill] * right for window, right in zip(batch, rest, strict=True)]
            real = [[1] * len(window.tokens) + [0] * right for window, right in zip(batch, rest, strict=True)]
            tokens = torch.tensor(ids)
            observations = {"input_ids": tokens, "attention_mask": torch.tensor(real)}
            log_probs = policy.log_probs(observations, tokens).double().tolist()
            for row, window in zip(log_probs, batch, strict=True):
                found.append(row[window.known : len(window.tokens)])
    return found


def perplexity(subject: Subject, documents: Sequence[str], *, stride: int | None = None) -> Result:
    """exp of the mean negative log-likelihood.

    stride      None = half the context (which is the model's, at most 4096)

    Measures: perplexity (a token), byte_perplexity, character_perplexity, bits_per_byte; intervals by bootstrap
    over documents where there are at least 20, else over windows (which takes windows for independent). Raises
    UserError for a stride that does not fit the context, or if there is nothing to judge.
    """
    context = min(subject.policy.context, 4096)
    step = stride or max(1, context // 2)
    if not 1 <= step < context:
        raise UserError(f"--stride must be between 1 and {context - 1}, one less than the context; got {step}")
    tokenizer = subject.tokenizer
    start = int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)
    nats: list[float] = []
    tokens: list[float] = []
    sizes: list[float] = []
    lengths: list[float] = []
    unknown, rows = 0, []
    by_document = len(documents) >= 20
    for number, text in enumerate(documents):
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        if not ids:
            continue  # nothing that this tokenizer keeps
        unknown += sum(token == tokenizer.unk_token_id for token in ids)
        found = token_log_probs(subject, windows(ids, start=start, context=context, stride=step))
        lost = -math.fsum(value for window in found for value in window)
        size, length = float(len(text.encode())), float(len(text))
        rows.append({"document": number, "nats": lost, "tokens": len(ids), "bytes": size})
        parts = [[value for window in found for value in window]] if by_document else found
        for part in parts:  # bytes and characters go to windows by their share of the tokens
            share = len(part) / len(ids)
            nats.append(-math.fsum(part))
            tokens.append(float(len(part)))
            sizes.append(size * share)
            lengths.append(length * share)
    if not nats:
        raise UserError("perplexity: the tokenizer makes no token of these texts")
    measures = {
        "perplexity": Measure(nats, tokens, exponential=True),
        "byte_perplexity": Measure(nats, sizes, exponential=True),
        "character_perplexity": Measure(nats, lengths, exponential=True),
        "bits_per_byte": Measure([value / math.log(2) for value in nats], sizes),
    }
    counts: dict[str, Any] = {
        "documents": len(documents),
        "tokens": int(sum(tokens)),
        "bytes": round(sum(sizes)),
        "unknown_tokens": unknown,
    }
    notes = []
    if unknown:
        notes.append(f"{unknown} tokens are unknown to this tokenizer: per byte its perplexity is too low")
    if not by_document:
        notes.append("intervals are over windows of the text, since it is fewer than 20 documents")
        if len(nats) == 1:
            notes.append("the text fits one window, so its intervals say nothing: give more text")
    return Result(measures, counts, notes, rows)
