"""PPO-ptx: the likelihood of pretraining or supervised texts beside the policy gradient.

InstructGPT (Ouyang 2022, 2203.02155, eq. 2) adds gamma * E[log pi(x)] over texts x of the pretraining distribution
to PPO's objective, so that what reward does not ask for is not forgotten. It is `ppo.update`'s auxiliary loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from llm_rlhf.data.files import SUFFIXES, read_rows, text_column
from llm_rlhf.data.texts import Batches, encode_prompts
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.tokenizer import pad_id
from policy_core.bc import bc_loss


@dataclass(frozen=True)
class PretrainingMixConfig:
    """Which texts, and how much they weigh.

    coef        weight of the mean negative log-likelihood of a token, added to the loss of every optimizer step but
                the critic warm-up's; 0 = off
    path        a .txt file, documents between empty lines; or rows (`llm_rlhf.data.files` says in which files), of
                which each has a text (every token is learned) or a prompt and its completion (that is learned)
    batch_size  texts an optimizer step
    length      longest text in tokens, null = the model's context; longer texts are cut into several, none is lost
    text, prompt, completion    names of the columns
    """

    coef: float = 0.0
    path: str | None = None
    batch_size: int = 16
    length: int | None = None
    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"

    def __post_init__(self) -> None:
        if self.coef < 0 or self.batch_size < 1:
            raise ValueError("ptx: coef must not be negative and batch_size at least 1")
        if self.coef > 0 and self.path is None:
            raise ValueError("ptx.path: give the file of texts that ptx.coef weighs")
        if self.length is not None and self.length < 2:
            raise ValueError(f"ptx.length must be at least 2 tokens, got {self.length}")


class PretrainingMix:
    """Texts as tokens, one after another, and the loss on a batch of them.

    tokens      [all] int32, every text with what it starts from
    known       [all] bool; False: the tokenizer does not know the character, so it is read and not learned
    starts      [N + 1] int, where each text begins
    given       [N] int, how many of its first tokens are read and not learned
    """

    def __init__(
        self, config: PretrainingMixConfig, tokenizer: PreTrainedTokenizerBase, *, context: int, seed: int
    ) -> None:
        """Raises UserError for a file that cannot be read or holds no text, naming file and line."""
        assert config.path is not None
        self.config = config
        self.pad = pad_id(tokenizer)
        length = min(config.length or context, context)
        rows = [
            row
            for place, prompt, text in _texts(config)
            for row in _encode(tokenizer, prompt, text, length=length, place=place)
        ]
        if not rows:
            raise UserError(f"{config.path}: there is no text in it (ptx.path)")
        self.tokens = torch.tensor([token for _, tokens in rows for token in tokens], dtype=torch.int32)
        self.starts = torch.tensor([0, *(len(tokens) for _, tokens in rows)]).cumsum(0)
        self.given = torch.tensor([given for given, _ in rows])
        unknown = tokenizer.unk_token_id
        if unknown is None or unknown == tokenizer.eos_token_id:  # GPT-2's: one token for both, and none is unknown
            unknown = -1
        self.known = self.tokens != int(unknown)
        self.batches = Batches(len(rows), config.batch_size, seed=seed)
        if not self.known.any():
            raise UserError(f"{config.path}: the tokenizer knows no character of it (ptx.path)")

    def __len__(self) -> int:
        return len(self.given)

    @property
    def note(self) -> str:
        """What a run should say about the texts."""
        unknown = int((~self.known).sum())
        missed = f", {unknown:,} of them unknown to the tokenizer and not learned" if unknown else ""
        return f"ptx: {self.config.path}: {len(self):,} texts, {len(self.tokens):,} tokens{missed}"

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The texts `rows` [B] as observations, padded on the right, and their mask [B, T], True = learned."""
        starts, ends = self.starts[rows], self.starts[rows + 1]
        columns = torch.arange(int((ends - starts).max()))
        inside = columns < (ends - starts).unsqueeze(1)
        at = (starts.unsqueeze(1) + columns).clamp(max=len(self.tokens) - 1)
        ids = torch.where(inside, self.tokens[at].long(), self.pad)
        mask = inside & self.known[at] & (columns >= self.given[rows].unsqueeze(1))
        return {"input_ids": ids, "attention_mask": inside.long(), "decisions": mask}, mask

    def loss(self, policy: LanguagePolicy) -> tuple[Tensor, dict[str, Tensor]]:
        """coef times the mean negative log-likelihood of a token of the next batch, at temperature 1."""
        observations, mask = self.batch(self.batches.next())
        columns = policy.columns(observations)
        if columns is None:  # a batch of unknown characters
            return torch.zeros((), requires_grad=True), {}
        log_softmax = torch.log_softmax(columns.logits, dim=-1)
        window = slice(columns.first, columns.last)
        taken, mask = (part[:, window].to(log_softmax.device) for part in (observations["input_ids"], mask))
        log_probs = log_softmax.gather(-1, taken.unsqueeze(-1)).squeeze(-1)
        loss, _ = bc_loss(log_probs=log_probs, mask=mask)
        return self.config.coef * loss, {"ptx": loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        """Position in the texts."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Raises UserError if the texts have changed since."""
        self.batches.load_state_dict(state)


def _texts(config: PretrainingMixConfig) -> Iterator[tuple[str, str, str]]:
    """(place, what is given, what is learned) of every text of the file."""
    path = str(config.path)
    if not path.endswith(SUFFIXES) and not Path(path).is_dir():
        yield from ((place, "", text) for place, text in _documents(path))
        return
    for row in read_rows(path):
        columns, place = row.columns, row.place
        if columns.get(config.text) is not None:
            text, prompt = text_column(columns, config.text, place), ""
        elif columns.get(config.prompt) is not None:
            prompt, text = (text_column(columns, name, place) for name in (config.prompt, config.completion))
        else:
            wanted = f"{config.text!r} nor {config.prompt!r}"
            raise UserError(f"{place}: there is neither a column {wanted} (there is {', '.join(columns)})")
        if text:
            yield place, prompt, text


def _documents(path: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every document of a text file; empty lines part them."""
    try:
        content = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"ptx.path: {path} cannot be read: {error.strerror or error}") from error
    lines: list[str] = []
    begin = 1
    for number, said in enumerate([*content.split("\n"), ""], start=1):
        if said.strip():
            begin = begin if lines else number
            lines.append(said)
        elif lines:
            yield f"{path}:{begin}", "\n".join(lines)
            lines = []


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, *, length: int, place: str
) -> Iterator[tuple[int, list[int]]]:
    """(given, tokens) of a text with EOS at its end, in pieces of at most `length` tokens.

    Every token is learned once: a later piece begins with the last token of the one before, as given.
    Raises UserError where a prompt and its completion do not fit.
    """
    (before,) = encode_prompts(tokenizer, [prompt])
    tokens = [*tokenizer.encode(text, add_special_tokens=False), int(tokenizer.eos_token_id)]
    if prompt:
        if len(before) + len(tokens) > length:
            raise UserError(
                f"{place}: a prompt of {len(before)} tokens and a completion of {len(tokens)} do not fit {length} "
                "(ptx.length, or the model's context)"
            )
        yield len(before), before + tokens
        return
    for start in range(0, len(tokens), length - 1):
        previous = before[-1] if start == 0 else tokens[start - 1]
        yield 1, [previous, *tokens[start : start + length - 1]]
