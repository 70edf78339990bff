"""Updates of GRPO, PPO, SFT and DPO beside TRL's, on the same model, in turns; and beside plain transformers.

    python -m studies.language_speed --trl PYTHON --trl-ppo PYTHON [--cell grpo-small]

PYTHON is that of an environment with TRL 1.16.0, for `--trl-ppo` with 1.12.0 (later releases have no PPO). Random
GPT-2s, `small` with 4 layers of width 256 and `large` with 12 of 512, vocabulary 2,048, fused GELU; prompts and
answers of 32 tokens, 16 rows a batch (GRPO: four prompts, four answers each), two threads. Both sides sample,
score, judge by the reference and update; the peer is a process of its own (`studies.peers.trl_steps`) that waits
while ours runs. `floor` is a plain transformers forward and backward pass with fused AdamW on the same tokens.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from experiment.run import Run, RunConfig
from llm_rlhf import train_grpo, train_ppo, train_sft
from llm_rlhf.data.pairs import TokenizedPairs
from llm_rlhf.data.texts import Batches, TokenizedTexts
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.precision import Precision
from llm_rlhf.online.critic import CriticConfig
from llm_rlhf.online.learner import Learner, build_learner
from llm_rlhf.online.moved import Counters
from llm_rlhf.preferences.learning import LearningConfig, ReferencedPairs, pair_step
from llm_rlhf.preferences.learning import make_optimizer as make_preference_optimizer
from llm_rlhf.rewards.functions import RewardFunction
from llm_rlhf.rewards.reward_model import build_reward_model, reward_function
from llm_rlhf.tasks.examples import Example
from llm_rlhf.tasks.task import Task
from policy_core.grpo import GRPOConfig
from policy_core.kl import KLConfig
from policy_core.ppo import PPOConfig
from policy_core.preference import PreferenceConfig
from studies.cells import Figures, main

SIZES = {"small": (4, 256, 4), "large": (12, 512, 8)}
VOCABULARY, BATCH, LENGTH, GROUP, EPOCHS, ROWS = 2048, 16, 32, 4, 4, 1024
KINDS = ("grpo", "grpo-bf16", "ppo", "ppo_shared", "sft", "sft-bf16", "dpo", "dpo-bf16")
CELLS = [f"{size}-{kind}" for size in SIZES for kind in KINDS]
ROUNDS = 7
THREADS = 2  # of torch, on both sides
STEPS = {"small": 10, "large": 3}
Step = Callable[[], object]


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Medians of seconds a step, and of the rounds' ratios to ours."""
    size, algorithm, *narrow = cell.split("-")
    precision: Precision = "bf16" if narrow else "float32"
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        write_model(folder / "model", size)
        trainer = algorithm.removesuffix("_shared")
        peer = options.trl_ppo if trainer == "ppo" else options.trl
        trl = stack.enter_context(peer_process(peer, trainer, folder / "model", STEPS[size], precision == "bf16"))
        sides: dict[str, Step] = {"ours": stack.enter_context(OURS[algorithm](folder, precision))}
        if algorithm in FLOOR_ROWS:
            sides["floor"] = plain(folder / "model", precision, rows=FLOOR_ROWS[algorithm])
        for step in sides.values():
            measure(step, STEPS[size])
        rounds = []
        for _ in range(ROUNDS):
            seconds = {name: measure(step, STEPS[size]) for name, step in sides.items()}
            rounds.append({**seconds, "trl": trl() / STEPS[size]})
    figures: Figures = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    for name in figures.copy():
        figures[f"{name}_over_ours"] = statistics.median(r[name] / r["ours"] for r in rounds)
    return figures | {"rounds": rounds, "steps_a_round": STEPS[size]}


def measure(step: Step, steps: int) -> float:
    """Seconds a step."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps


@contextmanager
def peer_process(
    python: str | None, trainer: str, model: Path, steps: int, bf16: bool
) -> Iterator[Callable[[], float]]:
    """TRL in its own environment: a function that lets it take `steps` steps and returns their seconds."""
    if python is None:
        raise SystemExit("--trl and --trl-ppo: give the python of an environment with TRL 1.16.0, and with 1.12.0")
    program = Path(__file__).parent / "peers" / "trl_steps.py"
    command = [python, str(program), trainer, str(model), str(steps), *(["--bf16"] if bf16 else [])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    told, heard = process.stdin, process.stdout

    def turn() -> float:
        told.write("go\n")
        told.flush()
        return float(heard.readline())

    try:
        if not heard.readline():  # its first steps warm it up
            raise SystemExit(f"{python}: TRL did not start; its own message stands above")
        yield turn
    finally:
        told.close()
        process.wait(60)


def write_model(folder: Path, size: str) -> None:
    """A random model, and a tokenizer of which every word is one token."""
    layers, width, heads = SIZES[size]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(str(folder))
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=128,
    )
    tokenizer.save_pretrained(str(folder))


def prompts() -> list[Example]:
    """Texts of exactly 32 tokens."""
    rng = random.Random(1)
    return [Example(" ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(LENGTH)), "") for _ in range(ROWS)]


def even_words(prompts: list[str], completions: list[str]) -> list[float | None]:
    """How many words have even numbers."""
    return [
        float(sum(int(word[1:]) % 2 == 0 for word in text.split() if word[1:].isdigit())) for text in completions
    ]


def task(reward: RewardFunction = even_words) -> Task:
    """A task of the random prompts and their reward."""
    examples = prompts()
    return Task(
        demonstrations=[],
        train=examples,
        splits={"validation": examples[:1]},
        rewards={"reward": reward},
        gold={"reward": 1.0},
        max_new_tokens=LENGTH,
        alphabet="",
    )


@contextmanager
def ours_grpo(folder: Path, precision: Precision) -> Iterator[Step]:
    """`train_grpo.iterate`: what the recipe does an update."""
    config = train_grpo.TrainGRPOConfig(
        run=RunConfig(folder=str(folder / "grpo"), wandb="disabled", threads=THREADS),
        model=ModelConfig(path=str(folder / "model")),
        grpo=GRPOConfig(group_size=GROUP),
        ppo=PPOConfig(learning_rate=1e-6, epochs=1, minibatch_size=BATCH, gamma=1.0, normalize_advantages=False),
        kl=KLConfig(coef=0.04, placement="loss", estimator="k3"),
        sampling=train_grpo.SamplingConfig(prompts=BATCH // GROUP, skip_flat_groups=False, logprob_gap_every=0),
        precision=precision,
    )
    with online(config, train_grpo.RECIPE, task(), critic=None) as learner:
        yield lambda: train_grpo.iterate(config, learner, step=1)


@contextmanager
def ours_ppo(folder: Path, precision: Precision, critic: Literal["shared", "separate"]) -> Iterator[Step]:
    """`train_ppo.iterate`, scored by a random reward model of the same size."""
    scored = task(reward_function(random_reward_model(folder)))
    config = train_ppo.TrainPPOConfig(
        run=RunConfig(folder=str(folder / "ppo"), wandb="disabled", threads=THREADS),
        model=ModelConfig(path=str(folder / "model")),
        critic=CriticConfig(model=critic),
        ppo=PPOConfig(
            learning_rate=1e-6, epochs=EPOCHS, minibatch_size=BATCH, gamma=1.0, gae_lambda=0.95, max_grad_norm=1.0
        ),
        kl=KLConfig(coef=0.05),
        sampling=train_ppo.SamplingConfig(prompts=BATCH, logprob_gap_every=0),
        precision=precision,
    )
    with online(config, train_ppo.RECIPE, scored, critic=config.critic) as learner:
        yield lambda: train_ppo.iterate(config, learner, step=1)


@contextmanager
def online(config: Any, recipe: str, given: Task, *, critic: CriticConfig | None) -> Iterator[Learner]:
    """A recipe's learner, at its run's start."""
    with Run.start(config, recipe=recipe, resume=None) as started:
        yield build_learner(started, given, config, prompts=config.sampling.prompts, critic=critic)


def random_reward_model(folder: Path) -> Path:
    """A reward model of the policy's size."""
    config = ModelConfig(path=str(folder / "model"))
    model, tokenizer = build_reward_model(config, alphabet="", objectives=("reward",), heads=1)
    model.save_pretrained(folder / "reward_model")
    tokenizer.save_pretrained(str(folder / "reward_model"))
    return folder / "reward_model"


@contextmanager
def ours_dpo(folder: Path, precision: Precision) -> Iterator[Step]:
    """`preferences.learning.pair_step` on 16 pairs, the reference's log-probs known, as TRL is told to."""
    policy = LanguagePolicy.from_pretrained(folder / "model")
    learning = LearningConfig(batch_size=BATCH, learning_rate=1e-6, precision=precision)
    optimizer = make_preference_optimizer(policy, learning)
    data = ReferencedPairs(random_pairs(), torch.zeros(2, ROWS))

    def step() -> None:
        pair_step(
            policy,
            optimizer,
            data,
            torch.randint(ROWS, (BATCH,)),
            preference=PreferenceConfig(),
            nll_coef=0.0,
            learning=learning,
            rate=1e-6,
        )

    yield step


def random_pairs() -> TokenizedPairs:
    """Two answers of 32 tokens to each of 1,024 prompts of 32."""
    chosen, rejected = random_tokens(), random_tokens().roll(1, 0)
    rejected[:, :LENGTH] = chosen[:, :LENGTH]
    attention = torch.ones_like(chosen)
    mask = attention.bool().clone()
    mask[:, :LENGTH] = False
    return TokenizedPairs(
        chosen=TokenizedTexts(chosen, attention, mask),
        rejected=TokenizedTexts(rejected, attention, mask),
        margin=torch.full((ROWS,), float("nan")),
        tied=torch.zeros(ROWS, dtype=torch.bool),
        prompt=torch.arange(ROWS),
    )


@contextmanager
def ours_sft(folder: Path, precision: Precision) -> Iterator[Step]:
    """`train_sft.supervised_step` on 16 texts of 64 tokens, all but the first of which are learned."""
    policy = LanguagePolicy.from_pretrained(folder / "model")
    config = train_sft.SupervisedConfig(learning_rate=1e-6, batch_size=BATCH, precision=precision)
    optimizer = train_sft.make_optimizer(policy, config)
    tokens = random_tokens()
    attention = torch.ones_like(tokens)
    mask = attention.bool().clone()
    mask[:, 0] = False
    data, batches = TokenizedTexts(tokens, attention, mask), Batches(len(tokens), BATCH, seed=0)
    counters = Counters()

    def step() -> None:
        train_sft.supervised_step(policy, optimizer, data, batches, config, step=1, counters=counters)

    yield step


def plain(model: Path, precision: Precision, *, rows: int) -> Step:
    """Forward, backward, clip and fused AdamW of transformers' own model and loss, on `rows` texts of 64 tokens."""
    network = GPT2LMHeadModel.from_pretrained(str(model)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    tokens = random_tokens()

    def step() -> None:
        batch = tokens[torch.randint(ROWS, (rows,))]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = network(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def random_tokens() -> torch.Tensor:
    """Random tokens [1024, 64]."""
    return torch.randint(3, VOCABULARY, (ROWS, 2 * LENGTH), generator=torch.Generator().manual_seed(1))


OURS: dict[str, Any] = {
    "grpo": ours_grpo,
    "ppo": functools.partial(ours_ppo, critic="separate"),
    "ppo_shared": functools.partial(ours_ppo, critic="shared"),
    "sft": ours_sft,
    "dpo": ours_dpo,
}
FLOOR_ROWS = {"sft": BATCH, "dpo": 2 * BATCH}


def table(results: Mapping[str, Figures]) -> str:
    """Seconds a step, and how many times as long the others take."""
    lines = ["| update, model | ours, s | TRL, s | plain transformers, s |", "|---|---|---|---|"]
    for cell, figures in results.items():
        columns = [f"{figures['ours']:.3f}"]
        for name in ("trl", "floor"):
            columns.append(f"{figures[name]:.3f} ({figures[name + '_over_ours']:.2f}x)" if name in figures else "")
        lines.append(f"| {cell} | {' | '.join(columns)} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the peers' environments are."""
    parser.add_argument("--trl", metavar="PYTHON", help="of an environment with TRL 1.16.0")
    parser.add_argument("--trl-ppo", metavar="PYTHON", help="of an environment with TRL 1.12.0")


if __name__ == "__main__":
    main("language_speed", cells=CELLS, run=run, table=table, add_arguments=add_arguments)
