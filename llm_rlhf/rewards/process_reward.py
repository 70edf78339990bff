"""Process reward models: a score for every step of a solution, and what they pay a policy for it.

Steps are the parts of a completion between separators (newlines, say); empty ones do not count. A step is judged
at its last token by a causal trunk, which has seen nothing after it (Lightman 2023, 2305.20050). A folder is a
reward model's (see `reward_model`) with one file more, `process.json`.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.device import find_device
from experiment.errors import UserError
from llm_rlhf.data.files import read_rows, text_column
from llm_rlhf.data.texts import Encoded, fit, lay_out
from llm_rlhf.models.tokenizer import pad_id
from llm_rlhf.rewards.reward_model import RewardModel, Scorer, load_reward_tokenizer
from llm_rlhf.tasks.rows import split_prompts

PROCESS, FOLDER = "process.json", "process_reward_model"
Form = Literal["probability", "log_odds", "change"]


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class StepsConfig:
    """path: a file of rows {prompt, steps: [text, ...], labels: [number in 0..1 or null, ...]}; of which kinds,
    `llm_rlhf.data.files` says.

    prompt, steps, labels   names of the columns; a null label is not trained on
    separator               between steps, in training as in what a policy writes
    validation, test        shares of the different prompts that are kept out of training
    """

    path: str = ""
    prompt: str = "prompt"
    steps: str = "steps"
    labels: str = "labels"
    separator: str = "\n"
    validation: float = 0.05
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.separator:
            raise ValueError("steps.separator must not be empty")
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError("steps: validation and test must be shares that leave something to train on")


@dataclass(frozen=True)
class Solution:
    """A prompt, the steps of one answer, and how right each is (1 right, 0 wrong, None unknown); `place` in a
    file."""

    prompt: str
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]
    place: str


@dataclass(frozen=True)
class StepData:
    """Solutions to train, to validate and to test on, no prompt in two of them, and every character that occurs."""

    train: list[Solution]
    validation: list[Solution]
    test: list[Solution]
    alphabet: str


def read_solutions(config: StepsConfig) -> StepData:
    """Read the file and split it by prompt. Raises UserError naming line and column for a row that cannot be
    used."""
    if not config.path:
        raise UserError("steps.path: give the file that holds your prompts, steps and labels")
    by_prompt: dict[str, list[Solution]] = {}
    for row in read_rows(config.path):
        solution = read_solution(row.columns, config, row.place)
        by_prompt.setdefault(solution.prompt, []).append(solution)
    parts = split_prompts(
        by_prompt, validation=config.validation, test=config.test, seed=config.seed, data=config.path
    )
    train, validation, test = ([s for prompt in part for s in by_prompt[prompt]] for part in parts)
    text = {character for s in [*train, *validation, *test] for part in (s.prompt, *s.steps) for character in part}
    return StepData(train, validation, test, "".join(sorted(text | set(config.separator))))


def read_solution(row: dict[str, Any], config: StepsConfig, place: str) -> Solution:
    """The solution in a row. Raises UserError naming `place` and the column that is wrong or missing."""
    prompt = text_column(row, config.prompt, place)
    for name in (config.steps, config.labels):
        if not isinstance(row.get(name), list) or not row[name]:
            raise UserError(f"{place}: column {name!r} must be a list that is not empty")
    steps, labels = row[config.steps], row[config.labels]
    if len(steps) != len(labels):
        raise UserError(f"{place}: there are {len(steps)} {config.steps!r} and {len(labels)} {config.labels!r}")
    for number, (step, label) in enumerate(zip(steps, labels, strict=True), start=1):
        if not isinstance(step, str) or not step.strip():
            raise UserError(f"{place}: column {config.steps!r}: step {number} is {step!r}, not a text")
        if config.separator in step:
            raise UserError(
                f"{place}: column {config.steps!r}: step {number} holds the separator {config.separator!r}"
            )
        if label is not None and not (isinstance(label, int | float) and 0 <= label <= 1):
            raise UserError(
                f"{place}: column {config.labels!r}: label {number} is {label!r}; it must be 0 to 1, or null"
            )
    if all(label is None for label in labels):
        raise UserError(f"{place}: column {config.labels!r} has nothing but null")
    return Solution(prompt, tuple(steps), tuple(None if x is None else float(x) for x in labels), place)


# ---------------------------------------------------------------- where steps end


def step_ends(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, separator: str) -> list[int]:
    """The index in a completion's tokens at which each of its steps ends.

    A step ends with the token that completes its separator; the last one, which may have none, with the last token
    that is not special (before EOS). Found in the decoded text, so any tokenizer will do.
    """

    def text(count: int) -> str:
        decoded = tokenizer.decode(
            list(tokens[:count]), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    pieces = text(len(tokens)).split(separator)
    ends, position = [], 0
    for number, piece in enumerate(pieces, start=1):
        position += len(piece) + (len(separator) if number < len(pieces) else 0)
        if piece.strip():
            count = bisect.bisect_left(range(len(tokens) + 1), position, key=lambda n: len(text(n)))
            ends.append(count - 1)
    return ends


@dataclass(frozen=True)
class TokenizedSteps:
    """Solutions as tokens.

    input_ids, attention_mask   [N, T] int
    labels                      [N, T] float, at the last token of a step that has one; NaN elsewhere
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


def tokenize_steps(solutions: Sequence[Solution], scorer: Scorer, separator: str) -> TokenizedSteps:
    """Prompt, steps and EOS as tokens. Raises UserError naming a row that does not fit, or whose steps are not
    found."""
    texts = scorer.encode([s.prompt for s in solutions], [separator.join(s.steps) for s in solutions])
    batch = lay_out(texts, pad=pad_id(scorer.tokenizer))
    labels = torch.full(batch.input_ids.shape, torch.nan)
    left = max(len(text.prompt) for text in texts)
    for row, (solution, text) in enumerate(zip(solutions, texts, strict=True)):
        ends = step_ends(text.completion, scorer.tokenizer, separator)
        if len(set(ends)) != len(solution.steps):
            raise UserError(
                f"{solution.place}: {len(solution.steps)} steps became {len(set(ends))} in tokens; the text does "
                f"not fit the model's context of {scorer.model.context}, or the tokenizer loses the separator"
            )
        for end, label in zip(ends, solution.labels, strict=True):
            if label is not None:
                labels[row, left + end] = label
    return TokenizedSteps(batch.input_ids, batch.attention_mask, labels)


# ---------------------------------------------------------------- scores


def token_scores(model: RewardModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The first head's logit that the step so far is right, after every token: [B, T] -> [B, T], 0 on padding."""
    states, _ = model.hidden(input_ids, attention_mask)
    packed = model.raw(states.to(input_ids.device))[..., 0, 0]
    place = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return torch.where(attention_mask.bool(), packed.gather(1, place), 0.0)


def step_loss(*, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Binary cross-entropy of steps (Lightman 2023, 2305.20050 appendix E; soft labels: Wang 2024, 2312.08935 eq.
    4).

    logits, labels  [...] any equal shapes; NaN = no label
    weights         [...] 1 / labelled steps of the whole optimizer step
    """
    known = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, torch.where(known, labels, 0.0), reduction="none")
    return (weights * torch.where(known, losses, 0.0)).sum()


@dataclass
class StepScorer:
    """A process reward model that scores texts."""

    scorer: Scorer
    separator: str

    @classmethod
    def from_pretrained(cls, path: str | Path) -> StepScorer:
        """Of a run (its best checkpoint, else the last) or a process reward model's folder.

        Raises UserError where there is none.
        """
        folder = find_process_folder(path)
        if folder is None:
            raise UserError(f"{path}: there is no process reward model here (no {PROCESS})")
        separator = json.loads((folder / PROCESS).read_text(encoding="utf-8"))["separator"]
        model = RewardModel.from_pretrained(folder).requires_grad_(False).eval()
        require_causal(model)
        model.place(find_device("auto", setting="device"))
        return cls(Scorer(model, load_reward_tokenizer(folder)), str(separator))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, tokenizer and separator."""
        self.scorer.model.save_pretrained(folder)
        self.scorer.tokenizer.save_pretrained(str(folder))
        text = json.dumps({"separator": self.separator}) + "\n"
        (Path(folder) / PROCESS).write_text(text, encoding="utf-8")

    def require_room(self, *, prompt: int, completion: int, setting: str) -> None:
        """Raises UserError where a completion of so many tokens would be cut behind a prompt of so many, which is
        cut first. setting: what names the model, for the message."""
        text = Encoded([0] * prompt, [0] * completion, [True] * completion)
        model = self.scorer.model
        (fitted,), _, (cut,) = fit([text], context=model.context, max_prompt=model.max_prompt)
        if cut:
            raise UserError(
                f"{setting}: the process reward model reads at most {model.context} tokens; a completion may have "
                f"{completion}, behind {len(fitted.prompt)} of its prompt"
            )

    @torch.no_grad()
    def step_logits(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[float] | None]:
        """For each completion, the logit of each of its steps; None where these are not found in the tokens,
        because the tokenizer loses characters of the text.

        Raises UserError for a completion that does not fit the model's context.
        """
        texts = self.scorer.encode(prompts, completions)
        result: list[list[float] | None] = []
        for begin in range(0, len(texts), self.scorer.batch_size):
            part = texts[begin : begin + self.scorer.batch_size]
            batch = lay_out(part, pad=pad_id(self.scorer.tokenizer))
            scores = token_scores(self.scorer.model, batch.input_ids, batch.attention_mask)
            left = max(len(text.prompt) for text in part)
            for row, (text, completion) in enumerate(zip(part, completions[begin:], strict=False)):
                ends = self._ends(text, completion)
                result.append(None if ends is None else [float(scores[row, left + end]) for end in ends])
        return result

    def _ends(self, text: Encoded, completion: str) -> list[int] | None:
        """Where the steps of a completion end in its tokens; None where there are more or fewer in these."""
        ends = step_ends(text.completion, self.scorer.tokenizer, self.separator)
        wanted = sum(bool(piece.strip()) for piece in completion.split(self.separator))
        if len(ends) == wanted:
            return ends
        if text.completion[-1:] != [self.scorer.tokenizer.eos_token_id]:  # it was cut
            raise UserError(
                f"process reward: a completion of {wanted} steps does not fit the model's context of "
                f"{self.scorer.model.context} tokens"
            )
        return None


def require_causal(model: RewardModel) -> None:
    """Raises UserError for a trunk whose tokens see what comes after them: a step's score would know later
    steps."""
    if not model.causal:
        raise UserError("model.path: a process reward model needs a causal language model; this is an encoder")


def find_process_folder(path: str | Path) -> Path | None:
    """The process reward model's folder that `path` means: itself, or a run's best checkpoint's, else its
    last's."""
    folder = Path(path)
    inner = [folder / FOLDER, *(folder / "checkpoints" / link / FOLDER for link in ("best", "last"))]
    return next((place for place in (folder, *inner) if (place / PROCESS).is_file()), None)


# ---------------------------------------------------------------- rewards


def paid(logits: Sequence[float], *, form: Form) -> list[float]:
    """What the steps of one completion earn.

    probability     that the step is right, 0..1: many steps earn more than few
    log_odds        the logit: wrong steps cost what right ones earn
    change          of the probability, from 0.5 before the first step: the sum is the last step's, however many
                    there are (potential-based shaping, Ng 1999)
    """
    if form == "log_odds":
        return list(logits)
    chances = torch.sigmoid(torch.tensor([0.0, *logits], dtype=torch.float64))
    return [float(x) for x in (chances[1:] if form == "probability" else chances.diff())]


def dense_rewards(
    scorer: StepScorer,
    *,
    prompts: Sequence[str],
    input_ids: Tensor,
    mask: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    form: Form = "change",
) -> tuple[Tensor, Tensor]:
    """Rewards [B, T] for PPO: each step's at its last token, 0 elsewhere; and which rows were paid, [B] bool.

    A row whose steps the reward model's tokenizer loses is not: nobody knows what they are worth.

    prompts         of each row
    input_ids       [B, T] a policy's tokens; mask [B, T] bool, True on its completion (EOS included)
    tokenizer       the policy's, which need not be the reward model's

    Raises UserError for a completion that does not fit the reward model's context.
    """
    drawn = [input_ids[row][mask[row]].tolist() for row in range(len(input_ids))]
    texts = [
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for ids in drawn
    ]
    logits = scorer.step_logits(prompts, texts)
    rewards = torch.zeros(mask.shape)
    for row, (ids, scores) in enumerate(zip(drawn, logits, strict=True)):
        if scores is None:
            continue
        columns = mask[row].nonzero().squeeze(1)
        ends = step_ends(ids, tokenizer, scorer.separator)
        for end, reward in zip(ends, paid(scores, form=form), strict=True):
            rewards[row, columns[end]] += reward  # one token may end two steps
    return rewards, torch.tensor([scores is not None for scores in logits])
