"""Playing episodes of several turns: the policy writes, an environment answers, the policy goes on.

Decoding is one batch with a key-value cache in which every row takes one token a step, a drawn one where the policy
writes and one of the environment's where it is being answered. So rows may be at different places without a gap
between their tokens: column t of a row follows column t - 1, and padding is on the far left and far right only.
Where every row is being answered, what they all still have to read goes through the model at once.

The policy's own tokens are kept as they were drawn, never decoded and tokenised again; only the environment's text
is tokenised, apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.decoding import roomy_cache
from llm_rlhf.models.drawing import draw
from llm_rlhf.models.generation import Samples, left_pad
from llm_rlhf.models.tokenizer import decode_completions, pad_id
from llm_rlhf.turns.environments import Environment, Referee, Reply
from llm_rlhf.turns.episodes import Episodes, Turn, TurnsConfig, stop_ids


class _Writing:
    """Texts of tokens that come one at a time: what each token adds behind another one, where that can be said.

    Decoding a turn anew at every token would cost more than drawing it with a small model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.probe = [*tokenizer.encode("a", add_special_tokens=False)][-1:]
        self.before = self._decoded(self.probe)
        self.known: dict[int, str | None] = {}

    def text(self, tokens: Sequence[int]) -> str:
        """Without special tokens."""
        pieces = [self._piece(token) for token in tokens]
        if None in pieces:  # a part of a character: only together with its neighbours
            return self._decoded(tokens)
        return "".join(piece for piece in pieces if piece is not None)

    def _piece(self, token: int) -> str | None:
        if token not in self.known:
            both = self._decoded([*self.probe, token])
            whole = both.startswith(self.before) and "\ufffd" not in both
            self.known[token] = both[len(self.before) :] if whole else None
        return self.known[token]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return decode_completions(self.tokenizer, [list(tokens)])[0]


@dataclass
class _Seat:
    """One episode under way. room: tokens that may still follow; pending: the answer's that are still to be read;
    written: the policy's of the present turn; ends: columns of the turns' last tokens."""

    environment: Environment
    room: int
    pending: deque[int] = field(default_factory=deque)
    written: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    over: bool = False
    done: bool = False

    def end_turn(self, text: str, reply: Reply | None, answer: list[int], *, column: int, max_turns: int) -> None:
        """Take note of the turn that ended at `column`; `answer` is the reply's text in tokens."""
        self.turns.append(Turn(text, reply))
        self.ends.append(column)
        self.written = []
        if reply is None or reply.done:
            self.over, self.done = True, reply is not None
        elif len(self.turns) == max_turns or len(answer) >= self.room:  # nothing could be written after it
            self.over = True
            self.unread = answer if len(answer) <= self.room else []
        else:
            self.pending.extend(answer)


class _Columns:
    """What is recorded of every new column, over all rows, in the processor; rows that are over have padding."""

    def __init__(self, rows: int, *, pad: int) -> None:
        self.rows, self.pad = rows, pad
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, alive: Tensor, **columns: Tensor) -> None:
        """Columns [A, n] of the rows `alive` [A]."""
        for name, values in columns.items():
            filler = self.pad if name == "ids" else 0
            wide = torch.full((self.rows, values.shape[1]), filler, dtype=values.dtype)
            wide[alive.cpu()] = values.cpu()
            self.parts.setdefault(name, []).append(wide)

    def beside(self, prompt: Tensor | None, name: str) -> Tensor:
        """All columns of a name behind the prompt's [B, P] (zeros without one)."""
        new = torch.cat(self.parts[name], dim=1)
        return new if prompt is None else torch.cat([prompt.to(new.dtype), new], dim=1)


@torch.no_grad()
def play(
    policy: LanguagePolicy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[dict[str, Any]],
    *,
    referee: Referee,
    config: TurnsConfig,
    max_new_tokens: int,
    generator: torch.Generator | None,
    bootstrap: bool = False,
) -> Episodes:
    """Play an episode on every row; a prompt's episodes are neighbours, len(rows) / len(prompts) each.

    rows            what the environments are told, a row an episode
    max_new_tokens  longest completion, the environment's answers included; the model's context limits it, too
    generator       source of all randomness; None decodes greedily. What a row draws depends on its place in the
                    batch and its own tokens only, not on when others end
    bootstrap       compute final_values

    Raises UserError where the environment fails or a prompt leaves no room in the model's context.
    """
    count = len(rows) // len(prompts)
    device = policy.device
    longest = max(map(len, prompts))
    if longest >= policy.context:
        raise UserError(f"a prompt of {longest} tokens leaves no room in the model's context of {policy.context}")
    prompt_ids, prompt_mask = (tensor.to(device) for tensor in left_pad(prompts, pad=pad_id(tokenizer)))
    rooms = [min(max_new_tokens, policy.context - len(prompt)) for prompt in prompts for _ in range(count)]
    cache = roomy_cache(policy.model.config, longest + max(rooms))
    logits, hidden, cache = policy.step(prompt_ids, prompt_mask, cache=cache, use_cache=True, keep=1)
    if count > 1:
        cache.batch_repeat_interleave(count)
    logits, hidden, prompt_ids, prompt_mask = (
        tensor.repeat_interleave(count, dim=0) for tensor in (logits, hidden, prompt_ids, prompt_mask)
    )
    seats = [_Seat(*pair) for pair in zip(referee.begin(rows), rooms, strict=True)]
    table = _Table(policy, tokenizer, referee, config, seats)
    chances = None
    if generator is not None:
        chances = torch.rand(len(rows), max_new_tokens, generator=generator, dtype=torch.float64)
    columns = _Columns(len(rows), pad=pad_id(tokenizer))
    alive, mask, column = torch.arange(len(rows), device=device), prompt_mask, 0
    while True:
        listening = min(len(seats[row].pending) for row in alive.tolist())
        if listening:
            tokens = table.read(alive, columns, listening)
        else:
            chance = None if chances is None else chances[alive.cpu(), column].to(device)
            tokens = table.write(alive, columns, logits[:, -1], hidden[:, -1], chance, column=column)
        column += max(listening, 1)
        going_on = torch.tensor([not seats[row].over for row in alive.tolist()], device=device)
        if not bool(going_on.any()):
            break
        if not bool(going_on.all()):
            kept = going_on.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            alive, tokens, mask = alive[kept], tokens[kept], mask[kept]
        mask = torch.cat([mask, mask.new_ones(tokens.shape)], dim=1)
        logits, hidden, cache = policy.step(tokens, mask, cache=cache, use_cache=True, keep=1)
    return table.episodes(columns, prompt_ids.cpu(), prompt_mask.cpu(), per_prompt=count, bootstrap=bootstrap)


class _Table:
    """The seats of a batch, and who may do what at them."""

    def __init__(
        self,
        policy: LanguagePolicy,
        tokenizer: PreTrainedTokenizerBase,
        referee: Referee,
        config: TurnsConfig,
        seats: list[_Seat],
    ) -> None:
        self.policy, self.tokenizer, self.referee, self.config = policy, tokenizer, referee, config
        self.seats = seats
        self.writing = _Writing(tokenizer)
        self.stop_ids = stop_ids(config, tokenizer, policy.model)

    def read(self, alive: Tensor, columns: _Columns, count: int) -> Tensor:
        """`count` tokens of the answers that the rows `alive` have yet to read, [A, count]."""
        seats = [self.seats[row] for row in alive.tolist()]
        tokens = torch.tensor([[seat.pending.popleft() for _ in range(count)] for seat in seats]).to(alive.device)
        for seat in seats:
            seat.room -= count
        nothing = torch.zeros(tokens.shape, device=tokens.device)
        columns.add(
            alive,
            ids=tokens,
            real=torch.ones_like(tokens),
            drawn=torch.zeros_like(tokens, dtype=torch.bool),
            log_probs=nothing,
            entropy=nothing,
            values=nothing,
        )
        return tokens

    def write(
        self,
        alive: Tensor,
        columns: _Columns,
        logits: Tensor,
        hidden: Tensor,
        chance: Tensor | None,
        *,
        column: int,
    ) -> Tensor:
        """One token a row, [A, 1]: drawn from its logits [A, V], or the next of the answer that it is reading."""
        seats = [self.seats[row] for row in alive.tolist()]
        drawn = torch.tensor([not seat.pending for seat in seats], device=alive.device)
        scores = self.policy.decoding_logits(logits, hidden)
        tokens, log_probs, entropy = draw(scores, chance)
        given = torch.tensor([seat.pending.popleft() if seat.pending else 0 for seat in seats], device=alive.device)
        tokens = torch.where(drawn, tokens, given)
        values = torch.zeros_like(log_probs)
        if self.policy.value_head is not None:
            values = self.policy.value_head(hidden).squeeze(-1)
        columns.add(
            alive,
            ids=tokens.unsqueeze(1),
            real=torch.ones_like(tokens).unsqueeze(1),
            drawn=drawn.unsqueeze(1),
            **{
                name: torch.where(drawn, numbers, 0.0).unsqueeze(1)
                for name, numbers in (("log_probs", log_probs), ("entropy", entropy), ("values", values))
            },
        )
        writers = []
        for seat, token, own in zip(seats, tokens.tolist(), drawn.tolist(), strict=True):
            seat.room -= 1
            if own:
                seat.written.append(token)
                writers.append(seat)
        self._end_turns(writers, column)
        return tokens.unsqueeze(1)

    def _end_turns(self, seats: Sequence[_Seat], column: int) -> None:
        """Ask the environments of those whose turn ended with this column, and cut turns that may not go on."""
        ended: list[tuple[_Seat, str]] = []
        for seat in seats:
            text = self.writing.text(seat.written)
            if self._is_turn(seat, text):
                ended.append((seat, text))
            elif seat.room == 0 or len(seat.written) == self.config.max_turn_tokens:
                seat.end_turn(text, None, [], column=column, max_turns=self.config.max_turns)
        if not ended:
            return
        replies = self.referee.respond([seat.environment for seat, _ in ended], [text for _, text in ended])
        for (seat, text), reply in zip(ended, replies, strict=True):
            answer = [] if reply.done else list(self.tokenizer.encode(reply.text, add_special_tokens=False))
            seat.end_turn(text, reply, answer, column=column, max_turns=self.config.max_turns)

    def _is_turn(self, seat: _Seat, text: str) -> bool:
        return (
            seat.written[-1] in self.stop_ids
            or any(stop in text for stop in self.config.stop)
            or self.referee.ends_turn(seat.environment, text)
        )

    def episodes(
        self, columns: _Columns, prompt_ids: Tensor, prompt_mask: Tensor, *, per_prompt: int, bootstrap: bool
    ) -> Episodes:
        """Everything that was recorded, behind the prompts."""
        nothing = torch.zeros_like(prompt_mask)
        mask = columns.beside(nothing, "drawn")
        turn_rewards = torch.zeros(mask.shape)
        start = prompt_ids.shape[1]
        for row, seat in enumerate(self.seats):
            for turn, column in zip(seat.turns, seat.ends, strict=True):
                turn_rewards[row, start + column] = 0.0 if turn.reply is None else turn.reply.reward
        has_values = self.policy.value_head is not None
        samples = Samples(
            input_ids=columns.beside(prompt_ids, "ids"),
            attention_mask=columns.beside(prompt_mask, "real"),
            mask=mask,
            finished=torch.tensor([seat.done for seat in self.seats]),
            log_probs=columns.beside(nothing, "log_probs"),
            entropy=columns.beside(nothing, "entropy"),
            values=columns.beside(nothing, "values") if has_values else None,
            prompt=torch.arange(len(self.seats)) // per_prompt,
        )
        if has_values and bootstrap:
            samples = replace(samples, final_values=self._final_values(samples))
        return Episodes(samples, turn_rewards, [seat.turns for seat in self.seats])

    def _final_values(self, samples: Samples) -> Tensor:
        """[B]; the value of what an episode that was cut would have gone on from, 0 where it was not cut."""
        values = torch.zeros(len(self.seats))
        cut = [row for row, seat in enumerate(self.seats) if not seat.done]
        if not cut or self.policy.value_head is None:
            return values
        texts = [
            [*samples.input_ids[row][samples.attention_mask[row].bool()].tolist(), *self.seats[row].unread]
            for row in cut
        ]
        ids, mask = (tensor.to(self.policy.device) for tensor in left_pad(texts, pad=pad_id(self.tokenizer)))
        _, hidden, _ = self.policy.step(ids, mask, keep=1)
        values[cut] = self.policy.value_head(hidden[:, -1]).squeeze(-1).cpu()
        return values
