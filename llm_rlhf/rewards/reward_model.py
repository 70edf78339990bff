"""Reward models: a transformers trunk, an ensemble of linear heads on it, and how their scores become one number.

A folder that `RewardModel.save_pretrained` wrote is a plain transformers folder with two files beside the model:
`reward_heads.safetensors` and `reward.json`. As a reward it is named by its run or its folder; `FOLDER:NAME` is one
objective of it, and `FOLDER:disagreement` the standard deviation over its heads.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from experiment.config import build_from_dict
from experiment.device import find_device
from experiment.errors import UserError, first_line
from llm_rlhf.data.texts import Encoded, encode_drawn, fit, lay_out
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.loading import ModelConfig, model_folder, new_language_model, quietly, without_dropout
from llm_rlhf.models.lora import base_of
from llm_rlhf.models.precision import Precision, autocast
from llm_rlhf.models.reading import MALFORMED
from llm_rlhf.models.tokenizer import character_tokenizer, pad_id, read_tokenizer, require_known_tokens
from llm_rlhf.rewards.trunks import positions_of

HEADS, SETTINGS = "reward_heads.safetensors", "reward.json"
FOLDER = "reward_model"
"""The sub-folder of a checkpoint that holds a reward model."""
DISAGREEMENT = "disagreement"
Pooling = Literal["last", "mean", "completion"]


@dataclass(frozen=True)
class ScoringConfig:
    """How the scores of heads and objectives become one number a completion; objectives first, then heads.

    weights         objective -> weight; empty = their mean, objectives left out weigh 0
    ensemble        over heads: "mean", "min" (worst case), or "lower" (mean - deviations * standard deviation),
                    which keep a policy away from what the heads disagree on (Coste 2023, 2310.02743)
    length_penalty  subtracted for each token of a completion beyond the first `length_free`, its EOS included
    """

    weights: dict[str, float] = field(default_factory=dict)
    ensemble: Literal["mean", "min", "lower"] = "mean"
    deviations: float = 1.0
    length_penalty: float = 0.0
    length_free: int = 0

    def __post_init__(self) -> None:
        if not all(math.isfinite(weight) for weight in self.weights.values()):
            raise ValueError(f"scoring.weights must be finite numbers, got {self.weights}")
        if not (self.deviations >= 0 and self.length_penalty >= 0 and self.length_free >= 0):
            raise ValueError("scoring: deviations, length_penalty and length_free must not be negative")


def combine(
    scores: Tensor, lengths: Tensor, *, objectives: Sequence[str], config: ScoringConfig
) -> tuple[Tensor, Tensor]:
    """scores [B, K, M], lengths [B] tokens of the completions -> one number each [B] and the heads' disagreement
    [B].

    The disagreement is the standard deviation over heads (n - 1) of the weighted objectives, 0 for a single head.
    Raises UserError for a weight of an objective that there is not.
    """
    unknown = [name for name in config.weights if name not in objectives]
    if unknown:
        raise UserError(f"scoring.weights: there is no objective {unknown[0]!r}; there is {', '.join(objectives)}")
    even = 1.0 / len(objectives)
    weights = [config.weights.get(name, 0.0) if config.weights else even for name in objectives]
    heads = scores @ scores.new_tensor(weights)
    spread = heads.std(1) if heads.shape[1] > 1 else torch.zeros_like(heads[:, 0])
    values = heads.amin(1) if config.ensemble == "min" else heads.mean(1)
    if config.ensemble == "lower":
        values = values - config.deviations * spread
    return values - config.length_penalty * (lengths - config.length_free).clamp(min=0), spread


class RewardModel(nn.Module):
    """K heads for M objectives on the hidden states of one trunk.

    A causal trunk is read at the last real token, one that sees the whole text (an encoder) by the mean over its
    tokens, unless `pooling` says otherwise. Rows are packed first, so neither padding nor its side matters.

    causal          no hidden state depends on what comes after it
    pooling         "last": the last real token; "mean": over all; "completion": over the completion's, which have
                    seen the prompt, but do not drown in what two completions of it have in common

    objectives      M names
    temperature     by which score differences are divided to be logits of a preference
    offset          [K, M] what `score` subtracts, so that scores of the training texts have mean 0
    tie_level       [M] logarithm of the parameter of a model of ties
    max_prompt      longest prompt in tokens that it was trained on; a longer one keeps its end
    trained         the heads were read from a folder; they are new where not
    precision       of the trunk's forward pass; weights and heads are float32
    """

    offset: Tensor

    def __init__(
        self,
        trunk: PreTrainedModel,
        *,
        objectives: Sequence[str] = ("reward",),
        heads: int = 1,
        start: int | None = None,
        context: int = 2**31,
    ) -> None:
        """Heads begin with standard deviation 1 / sqrt(D + 1) and bias 0.

        start       token that goes before texts that do not begin with it (an encoder's CLS); None = nothing
        context     longest text in tokens, without `start`

        Raises UserError for a trunk that does not give one hidden state a token.
        """
        super().__init__()
        self.trunk, self.objectives, self.start, self.context = trunk, tuple(objectives), start, context
        without_dropout(trunk)
        self.width, sees_all = probe(trunk.eval())
        self.causal = not sees_all
        self.pooling: Pooling = "mean" if sees_all else "last"
        self.heads = nn.Linear(self.width, heads * len(self.objectives))
        nn.init.normal_(self.heads.weight, std=1.0 / math.sqrt(self.width + 1))
        nn.init.zeros_(self.heads.bias)
        self.tie_level = nn.Parameter(torch.zeros(len(self.objectives)))
        self.register_buffer("offset", torch.zeros(heads, len(self.objectives)))
        self.temperature = 1.0
        self.max_prompt: int | None = None
        self.trained = False
        self.gradient_checkpointing = False
        self.scoring = ScoringConfig()
        self.precision: Precision = "float32"

    @property
    def ensemble(self) -> int:
        """K, the number of heads."""
        return self.offset.shape[0]

    def place(self, device: torch.device) -> None:
        """Let the trunk compute there. Heads are small and stay, and scores are where the texts are."""
        nn.Module.to(self.trunk, device)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] -> hidden states [B, T', D] of the packed rows in float32, and which are real [B, T'] bool.

        Packed: real tokens first, `start` before them, padding after; T' is the longest row. Both are on the device
        of the trunk, which alone may be elsewhere.
        Raises ValueError for a row without tokens, or longer than the context.
        """
        real = attention_mask.bool()
        lengths = real.sum(1)
        if int(lengths.min()) < 1 or int(lengths.max()) > self.context:
            raise ValueError(f"texts of 1 to {self.context} tokens are needed, got {lengths.tolist()}")
        ids = input_ids.gather(1, packing(attention_mask)).to(self.trunk.device)
        lengths = lengths.to(ids.device)
        if self.start is not None:
            bare = ids[:, :1] != self.start  # some tokenizers begin their texts with it
            ids = torch.where(
                bare, nn.functional.pad(ids, (1, 0), value=self.start), nn.functional.pad(ids, (0, 1))
            )
            lengths = lengths + bare.squeeze(1)
        packed = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
        ids = torch.where(packed, ids, max(int(getattr(self.trunk.config, "pad_token_id", None) or 0), 0))
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": packed.long()}
        if self.causal:  # the padding comes after all that counts
            arguments |= {"attention_mask": torch.ones_like(ids), "use_cache": False}
        if self.gradient_checkpointing:  # transformers does it in training mode only; there is no dropout
            self.trunk.train(torch.is_grad_enabled())
        with autocast(self, self.precision):
            states = self.trunk(**arguments).last_hidden_state
        return states.float(), packed

    def features(self, input_ids: Tensor, attention_mask: Tensor, completion: Tensor | None = None) -> Tensor:
        """What the heads read of each text, [B, T] -> [B, D].

        completion [B, T] bool is needed, and must be True somewhere in every row, for that pooling alone. Raises
        ValueError where it is not.
        """
        states, counted = self.hidden(input_ids, attention_mask)
        if self.pooling == "last":
            last = states[torch.arange(len(states), device=states.device), counted.sum(1) - 1]
            return last.to(input_ids.device)
        if self.pooling == "completion":
            if completion is None:
                raise ValueError("pooling over completions needs to know where they are")
            own = (completion & attention_mask.bool()).gather(1, packing(attention_mask)).to(states.device)
            if self.start is not None:
                bare = counted.sum(1, keepdim=True) > attention_mask.sum(1, keepdim=True).to(counted.device)
                own = torch.where(bare, nn.functional.pad(own, (1, 0)), nn.functional.pad(own, (0, 1)))
            counted = own
            if not bool(counted.any(1).all()):
                raise ValueError("pooling over completions needs a token of one in every text")
        mean = torch.where(counted.unsqueeze(-1), states, 0.0).sum(1) / counted.sum(1, keepdim=True)
        return mean.to(input_ids.device)

    def raw(self, features: Tensor) -> Tensor:
        """The heads alone, before the offset: [..., D] -> [..., K, M]."""
        scores: Tensor = self.heads(features)
        return scores.unflatten(-1, tuple(self.offset.shape))

    def score(self, input_ids: Tensor, attention_mask: Tensor, completion: Tensor | None = None) -> Tensor:
        """input_ids, attention_mask, completion (see `features`) [B, T], padding anywhere -> scores [B, K, M]."""
        return self.raw(self.features(input_ids, attention_mask, completion)) - self.offset

    def checkpoint_gradients(self) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again there."""
        self.trunk.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.gradient_checkpointing = True

    def probability(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """That people prefer the first, by the fitted temperature, from scores of any equal shapes."""
        return torch.sigmoid((chosen - rejected) / self.temperature)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, completion: Tensor | None = None) -> Tensor:
        """`score`, under the name by which distributed wrappers call a module."""
        return self.score(input_ids, attention_mask, completion)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trunk as a plain transformers folder, the heads and `reward.json` beside it."""
        with quietly():
            self.trunk.save_pretrained(str(folder))
        state = {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        state |= {"offset": self.offset, "tie_level": self.tie_level}
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, str(Path(folder) / HEADS))
        settings = {
            "heads": self.ensemble,
            "objectives": list(self.objectives),
            "pooling": self.pooling,
            "start": self.start,
            "context": self.context,
            "max_prompt": self.max_prompt,
            "offset": self.offset.tolist(),
            "temperature": self.temperature,
            "scoring": dataclasses.asdict(self.scoring),
        }
        (Path(folder) / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> RewardModel:
        """Read what `save_pretrained` wrote, from its folder or a run's.

        Raises UserError where there is no reward model, or it is damaged.
        """
        folder = find_folder(path)
        if folder is None:
            raise UserError(f"{path}: there is no reward model here (no {SETTINGS}); train one with llm/reward")
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            state = load_file(str(folder / HEADS))
            model = cls(
                load_trunk(folder),
                objectives=settings["objectives"],
                heads=int(settings["heads"]),
                start=settings["start"],
                context=int(settings["context"]),
            )
            model.heads.load_state_dict({name: state[f"heads.{name}"].clone() for name in ("weight", "bias")})
            model.offset.copy_(state["offset"])
            with torch.no_grad():
                model.tie_level.copy_(state["tie_level"])
            model.temperature, model.trained = float(settings["temperature"]), True
            model.max_prompt = settings["max_prompt"]
            model.pooling = settings["pooling"]
            if model.pooling not in get_args(Pooling):
                raise ValueError(f"no pooling {model.pooling!r}")
            model.scoring = build_from_dict(settings["scoring"], ScoringConfig, str(folder / SETTINGS))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: a damaged reward model ({first_line(error)})") from error
        return model


def packing(attention_mask: Tensor) -> Tensor:
    """[B, T] -> the columns of each row's real tokens in their order, then padding's: [B, T'], the longest row."""
    real = attention_mask.bool()
    return real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]


# ---------------------------------------------------------------- loading


def find_folder(path: str | Path) -> Path | None:
    """The reward model's folder that `path` means: itself, or in a run the best checkpoint's, else the last's.

    None where there is no such folder.
    """
    folder = Path(path)
    inner = [folder / FOLDER, *(folder / "checkpoints" / link / FOLDER for link in ("best", "last"))]
    return next((place for place in (folder, *inner) if (place / SETTINGS).is_file()), None)


def load_trunk(path: str | Path) -> PreTrainedModel:
    """The hidden layers of any transformers model in float32.

    Raises UserError if it cannot be read, weights are missing in it, or it is an encoder-decoder.
    """
    source = model_folder(path)
    try:
        with quietly():
            loaded, report = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except MALFORMED as error:
        raise UserError(f"model.path: {path} could not be loaded as a model: {first_line(error)}") from error
    trunk = cast(PreTrainedModel, loaded)
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise UserError(
            f"model.path: {path} lacks {len(missing)} of its model's weights, such as {missing[0]}; "
            "they would be random"
        )
    for parameter in trunk.parameters():
        parameter.data = parameter.data.clone()  # aligned memory, as in models.load_language_model
    return trunk


def load_reward_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Where it has no eos token, its sep token ends texts; padding needs none.

    Raises UserError if there is no tokenizer, or it has neither token.
    """
    tokenizer = read_tokenizer(path)
    if tokenizer.eos_token_id is None:
        if tokenizer.sep_token_id is None:
            raise UserError(f"{path}: the tokenizer has neither an eos nor a sep token; set one and save it again")
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def build_reward_model(
    config: ModelConfig, *, alphabet: str, objectives: Sequence[str], heads: int
) -> tuple[RewardModel, PreTrainedTokenizerBase]:
    """The reward model of a recipe and its tokenizer.

    From `config.path` (any transformers folder, a language model's run, a reward model's), or new over `alphabet`.
    Heads are taken over from a reward model that has as many of the same objectives, and are new otherwise, from
    torch's global generator.
    """
    if config.path is None:
        tokenizer: PreTrainedTokenizerBase = character_tokenizer(alphabet)
        new = cast(PreTrainedModel, new_language_model(config, tokenizer).base_model.eval())
        return RewardModel(new, objectives=objectives, heads=heads, context=config.context), tokenizer
    known = find_folder(config.path)
    source = model_folder(config.path) if known is None else str(known)
    if known is not None:
        model, tokenizer = RewardModel.from_pretrained(known), load_reward_tokenizer(source)
        if model.objectives != tuple(objectives) or model.ensemble != heads:
            trunk, start, context, pooling = model.trunk, model.start, model.context, model.pooling
            model = RewardModel(trunk, objectives=objectives, heads=heads, start=start, context=context)
            model.pooling = pooling
        return model, tokenizer
    if base_of(source) is None:
        trunk, tokenizer = load_trunk(source), load_reward_tokenizer(source)
        require_known_tokens(tokenizer, trunk, path=config.path)
    else:  # a language model with an adapter, which is merged into the weights
        policy, tokenizer = build_policy(ModelConfig(path=source), alphabet=alphabet)
        trunk = cast(PreTrainedModel, policy.model.base_model)
    start = tokenizer.cls_token_id if probe(trunk)[1] else None
    longest = min(positions_of(trunk), int(tokenizer.model_max_length))
    context = longest - (start is not None)
    return RewardModel(trunk, objectives=objectives, heads=heads, start=start, context=context), tokenizer


def reward_writer(model: RewardModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Callable[[Path], None]]:
    """The checkpoint's `reward_model` folder: trunk, heads, settings, tokenizer."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))

    return {FOLDER: write}


@torch.no_grad()
def probe(trunk: PreTrainedModel) -> tuple[int, bool]:
    """Width of the hidden states, and whether a token's depends on what comes after it."""
    if getattr(trunk.config, "is_encoder_decoder", False):
        raise UserError(
            "model.path: an encoder-decoder has no one hidden state a token; use a decoder or an encoder"
        )
    size = int(trunk.config.get_text_config().vocab_size)
    probe = torch.tensor([[size - 1, size - 1], [size - 1, size - 2]], device=trunk.device)
    states = getattr(trunk(input_ids=probe, attention_mask=torch.ones_like(probe)), "last_hidden_state", None)
    if states is None:
        raise UserError(f"model.path: a {type(trunk).__name__} gives no hidden state a token")
    first, other = states[:, 0].float()
    return int(states.shape[-1]), not torch.allclose(first, other, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- scoring texts


@dataclass
class Scorer:
    """A reward model with its tokenizer: what scores texts. batch_size: texts of a forward pass."""

    model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 32
    latest: tuple[list[str], list[str], tuple[Tensor, Tensor]] | None = None  # what `scores_once` was asked last

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Scorer:
        """Of a run or a reward model's folder."""
        folder = find_folder(path)
        model = RewardModel.from_pretrained(path).requires_grad_(False).eval()
        model.place(find_device("auto", setting="device"))
        assert folder is not None
        return cls(model, load_reward_tokenizer(folder))

    def encode(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Encoded]:
        """Each text as in training: prompt and completion tokenized apart, then EOS, cut where it is too long.

        Of a conversation the model reads what the chat template shows; a policy may draw what it leaves out.
        """
        pairs = zip(prompts, completions, strict=True)
        whole = [encode_drawn(self.tokenizer, prompt, completion) for prompt, completion in pairs]
        return [fit([text], context=self.model.context, max_prompt=self.model.max_prompt)[0][0] for text in whole]

    @torch.no_grad()
    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Scores [B, K, M] and the completions' lengths [B] in tokens. Texts of like length are scored together."""
        texts = self.encode(prompts, completions)
        result = torch.zeros(len(texts), *self.model.offset.shape)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        for begin in range(0, len(order), self.batch_size):
            rows = order[begin : begin + self.batch_size]
            batch = lay_out([texts[row] for row in rows], pad=pad_id(self.tokenizer))
            result[rows] = self.model.score(batch.input_ids, batch.attention_mask, batch.mask)
        return result, torch.tensor([sum(text.mask) for text in texts])

    def scores_once(self, prompts: list[str], completions: list[str]) -> tuple[Tensor, Tensor]:
        """`scores`; several parts of one model, asked about the same texts in turn, cost one forward pass."""
        if self.latest is None or self.latest[:2] != (prompts, completions):
            self.latest = (list(prompts), list(completions), self.scores(prompts, completions))
        return self.latest[2]


def reward_function(
    model_folder: str | Path, *, part: str | None = None, scoring: ScoringConfig | None = None
) -> Callable[[list[str], list[str]], list[float | None]]:
    """A reward function for `llm_rlhf.rewards.functions` from a run or a reward model's folder.

    part        one objective, or "disagreement"; None = everything combined
    scoring     how; None = as reward.json says

    Raises UserError where there is no reward model, or it has no such part.
    """
    folder = find_folder(model_folder)
    if folder is None:
        raise UserError(f"{model_folder}: there is no reward model here (no {SETTINGS}); train one with llm/reward")
    if (folder / "process.json").is_file():
        raise UserError(f"{model_folder}: a process reward model scores steps; see process_reward.dense_rewards")
    scorer = _cached(folder.resolve(), (folder / SETTINGS).stat().st_mtime_ns)
    objectives, config = scorer.model.objectives, scoring or scorer.model.scoring
    if part is not None and part != DISAGREEMENT:
        if part not in objectives:
            raise UserError(
                f"{model_folder}: no objective {part!r}; there is {', '.join((*objectives, DISAGREEMENT))}"
            )
        config = dataclasses.replace(config, weights={part: 1.0})
    combine(torch.zeros(1, *scorer.model.offset.shape), torch.ones(1), objectives=objectives, config=config)

    def learned(prompts: list[str], completions: list[str]) -> list[float | None]:
        scores, lengths = scorer.scores_once(prompts, completions)
        values, spread = combine(scores, lengths, objectives=objectives, config=config)
        return list((spread if part == DISAGREEMENT else values).tolist())

    return learned


def named_reward(name: str) -> Callable[[list[str], list[str]], list[float | None]] | None:
    """The reward function that `FOLDER` or `FOLDER:PART` names; None where there is no reward model by that
    name."""
    if find_folder(name) is not None:
        return reward_function(name)
    folder, _, part = name.rpartition(":")
    return reward_function(folder, part=part) if folder and find_folder(folder) is not None else None


@lru_cache(maxsize=4)
def _cached(folder: Path, changed: int) -> Scorer:
    """changed: when the folder was."""
    return Scorer.from_pretrained(folder)
