"""Several texts in one row, so that no column is spent on padding.

Attention is block-diagonal and positions restart with every text, so each text is computed as if it were alone.
"""

from __future__ import annotations

import bisect
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiment.errors import UserError
from llm_rlhf.data.texts import Encoded
from llm_rlhf.models.causal import LanguagePolicy

SHORT_ROW = 1024


@dataclass(frozen=True)
class PackedTexts:
    """N rows of texts, one after another, padded on the right.

    input_ids       [N, T] int
    position_ids    [N, T] int; from 0 in every text, and 0 on padding, where each column is a text of its own
    attention_mask  [N, T] int; 1 = a real token
    mask            [N, T] bool; True on the tokens that are learned
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def log_probs(self, policy: LanguagePolicy, rows: Tensor) -> Tensor:
        """Log-probs [B, T] of the learned tokens of the rows [B], 0 elsewhere."""
        return policy.packed_log_probs(self.input_ids[rows], self.position_ids[rows], self.mask[rows])


def assign(lengths: Sequence[int], *, width: int) -> list[list[int]]:
    """Which texts share a row of `width` tokens: the longest first, each where it leaves the least room (best-fit
    decreasing, as in 2404.10830). Texts are named by their places; the same lengths always give the same rows.

    Raises ValueError if a text is longer than a row.
    """
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # tokens left -> rows that have them left
    sizes: list[int] = []  # the keys of `room`, sorted
    for text in sorted(range(len(lengths)), key=lambda text: (-lengths[text], text)):
        length = lengths[text]
        if length > width:
            raise ValueError(f"a text of {length} tokens does not fit a row of {width}")
        place = bisect.bisect_left(sizes, length)
        if place == len(sizes):
            row, left = len(rows), width
            rows.append([])
        else:
            left = sizes[place]
            row = room[left].pop()
            if not room[left]:
                del room[left], sizes[place]
        rows[row].append(text)
        left -= length
        if left not in room:
            room[left] = []
            bisect.insort(sizes, left)
        room[left].append(row)
    return rows


def pack(texts: Sequence[Encoded], *, context: int, pad: int, width: int | None = None) -> PackedTexts:
    """Lay texts out in as few rows as best-fit finds.

    width   tokens of a row; None = 1024, or what the longest text needs, and never more than `context`

    Raises UserError if a text is longer than a row.
    """
    longest = max(len(text) for text in texts)
    size = min(context, max(SHORT_ROW, longest)) if width is None else min(width, context)
    if longest > size:
        raise UserError(
            f"texts.packed_length: a text has {longest} tokens, more than a row of {size}; cut it, or raise this"
        )
    rows = assign([len(text) for text in texts], width=size)
    used = max(sum(len(texts[text]) for text in row) for row in rows)
    shape = (len(rows), used)
    ids, positions = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    attention, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for row, members in enumerate(rows):
        start = 0
        for text in (texts[member] for member in members):
            learned, end = start + len(text.prompt), start + len(text)
            ids[row, start:end] = torch.tensor(text.prompt + text.completion)
            positions[row, start:end] = torch.arange(len(text))
            attention[row, start:end] = 1
            mask[row, learned:end] = torch.tensor(text.mask)
            start = end
    return PackedTexts(ids, positions, attention, mask)


@torch.no_grad()
def require_apart(policy: LanguagePolicy, texts: PackedTexts) -> None:
    """Raises UserError if the model lets texts of one row see each other (a recurrent state would, for one), or
    judges them as NaN."""
    name = type(policy.model).__name__
    if "position_ids" not in inspect.signature(policy.model.forward).parameters:
        raise UserError(f"texts.packing: {name} takes no positions, so texts in one row would mix; set it to false")
    row = next((i for i, positions in enumerate(texts.position_ids) if int((positions == 0).sum()) > 1), None)
    if row is None:
        return
    index = torch.tensor([row])
    together = texts.log_probs(policy, index)[0]
    if not bool(together.isfinite().all()):
        raise UserError(f"model.path: {name} gives a text the probability NaN; are all its weights finite?")
    starts = [*(texts.position_ids[row] == 0).nonzero().squeeze(1).tolist(), together.shape[0]]
    for start, end in itertools.pairwise(starts):
        ids, mask = texts.input_ids[index, start:end], texts.mask[index, start:end]
        if bool(mask.any()):
            alone = policy.packed_log_probs(ids, texts.position_ids[index, start:end], mask)[0]
            if not torch.allclose(alone, together[start:end], atol=1e-3, rtol=1e-3):
                raise UserError(f"texts.packing: {name} does not keep texts in one row apart; set it to false")
