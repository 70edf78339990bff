"""What the study of RLHF reads and writes: texts of HH and GSM8K, a byte-pair tokenizer, pairs with noisy labels.

These files come of the two data sets, divided by document, so that nothing of a held-out one is seen in training:

    texts.jsonl     documents in pieces that fit the context: to pretrain on
    replies.jsonl   questions with a short reply, found in the dialogues: to fine-tune on
    prompts.jsonl   those questions alone: what policies answer
    documents.jsonl, held_out.jsonl     whole documents: to mix in beside PPO; to measure perplexity on
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from experiment.checkpoint import write_atomically
from llm_rlhf.data.files import read_rows, text_column
from llm_rlhf.models.tokenizer import BOS, EOS, PAD, UNKNOWN

HH, GSM8K = "hh_harmless_pairs.jsonl.gz", "gsm8k_train.jsonl.gz"
VOCABULARY = 1024
CONTEXT, PROMPT_TOKENS, REPLY_TOKENS = 64, 24, 24
PROBLEMS = 2500  # of GSM8K, about as many tokens as all of HH
HELD_OUT = 0.08  # of the documents
TURN = re.compile(r"\n\n(Human|Assistant):")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def read_documents(data: Path, rng: random.Random) -> tuple[list[str], list[str]]:
    """HH's dialogues (each question's chosen one) and PROBLEMS of GSM8K with their answers, calculator notes left
    out. Raises UserError naming file and line for rows that cannot be read."""
    dialogues = list(dict.fromkeys(text_column(row.columns, "chosen", row.place) for row in read_rows(data / HH)))
    problems = []
    for row in read_rows(data / GSM8K):
        question, answer = (text_column(row.columns, name, row.place) for name in ("question", "answer"))
        problems.append(f"{question}\n{re.sub(r'<<.*?>>', '', answer)}")
    return [text.strip() for text in dialogues], rng.sample(problems, min(PROBLEMS, len(problems)))


def byte_pair_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding with VOCABULARY tokens; pad, bos, eos and unknown are four of their own."""
    backend = Tokenizer(models.BPE(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def pieces(tokenizer: PreTrainedTokenizerBase, document: str, *, most: int) -> list[str]:
    """A document cut into texts of about `most` tokens; joined, they are the document."""
    encoded = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    cuts = [0, *ends[most - 1 : -1 : most], len(document)]
    return [document[a:b] for a, b in itertools.pairwise(cuts) if document[a:b].strip()]


def exchanges(tokenizer: PreTrainedTokenizerBase, dialogue: str) -> list[tuple[str, str]]:
    """(prompt, reply) of every short question of a dialogue; of the reply the first sentences that fit.

    A prompt is "Human: ...\\n\\nAssistant:", a reply begins with a space.
    """
    _, *parts = TURN.split(f"\n\n{dialogue}")
    turns = [(who, text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]
    found = []
    for (asker, question), (answerer, answer) in itertools.pairwise(turns):
        prompt = f"Human: {question}\n\nAssistant:"
        if (asker, answerer) != ("Human", "Assistant") or not question or not answer:
            continue
        if len(tokenizer.encode(prompt, add_special_tokens=False)) > PROMPT_TOKENS:
            continue
        reply = ""
        for sentence in SENTENCE_END.split(answer):
            longer = f"{reply} {sentence}"
            if len(tokenizer.encode(longer, add_special_tokens=False)) >= REPLY_TOKENS:
                break
            reply = longer
        if reply:
            found.append((prompt, reply))
    return found


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A jsonl file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(data: Path, folder: Path, *, seed: int) -> PreTrainedTokenizerFast:
    """Write the study's files into `folder`; returns the tokenizer, made of the training documents."""
    rng = random.Random(f"rlhf {seed}")
    kept: list[list[str]] = []
    held_out: list[str] = []
    for documents in read_documents(data, rng):
        rng.shuffle(documents)
        out = round(HELD_OUT * len(documents))
        held_out += documents[:out]
        kept.append(documents[out:])
    rng.shuffle(held_out)
    dialogues, problems = kept
    tokenizer = byte_pair_tokenizer([*dialogues, *problems])
    asked = list(dict.fromkeys(pair for dialogue in dialogues for pair in exchanges(tokenizer, dialogue)))
    texts = [text for one in (*dialogues, *problems) for text in pieces(tokenizer, one, most=CONTEXT - 3)]
    rng.shuffle(texts)
    write_rows(folder / "texts.jsonl", ({"text": text} for text in texts))
    write_rows(folder / "replies.jsonl", ({"prompt": prompt, "completion": reply} for prompt, reply in asked))
    write_rows(folder / "documents.jsonl", ({"text": text} for text in (*dialogues, *problems)))
    write_rows(folder / "held_out.jsonl", ({"text": text} for text in held_out))
    prompts = list(dict.fromkeys(prompt for prompt, _ in asked))
    rng.shuffle(prompts)
    write_rows(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
    return tokenizer
