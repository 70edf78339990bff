"""The suites of `tandem benchmark`: what each reads, asks and measures.

A suite is prepared from its files, so that a mistake in one is told before a model is loaded; what it returns
measures a model, and measures the model before training by the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from experiment.errors import UserError, user_errors
from llm_rlhf.data.files import SUFFIXES
from llm_rlhf.evaluation import perplexity as text_perplexity
from llm_rlhf.evaluation import red_team
from llm_rlhf.evaluation.benchmarks import code, exact_answer, multiple_choice, pairwise
from llm_rlhf.evaluation.diversity import Unit, diversity
from llm_rlhf.evaluation.results import Measure, Result
from llm_rlhf.evaluation.sandbox import Limits
from llm_rlhf.evaluation.subject import Decoding, Subject, load_subject, question_of
from llm_rlhf.evaluation.win_rate import Judge, load_judge, paired, read_answers, win_rate
from llm_rlhf.rewards.rules import load_rule

Item = TypeVar("Item")
Prepared = Callable[[Subject], Result]


@dataclass(frozen=True)
class SuiteConfig:
    """What a suite may be told; each uses what concerns it.

    data            its questions, prompts or text
    limit           only the first so many items; None = all
    shots, shots_from   worked examples before a question, and the file (MMLU: or folder) that they come from
    primer          a text file that stands before every question (truthfulqa)
    options         mmlu: choose among the letters, as published, or among the options' texts
    reference       pairwise suites: the file of the other side's answers; win_rate: that, or a model
    judge, margin   `file.py:function` or a reward model's folder; scores nearer than the margin are a tie
    rules           red_team: `file.py:function`s
    stride          perplexity: tokens that a window moves by
    unit            diversity: what texts are taken apart into
    max_new_tokens, temperature, samples, seed      of what is written
    allow_code_execution, workers, seconds          of programs that are run
    """

    data: str
    limit: int | None = None
    shots: int = 0
    shots_from: str | None = None
    primer: str | None = None
    options: multiple_choice.Style = "letters"
    reference: str | None = None
    judge: str | None = None
    margin: float = 0.0
    rules: tuple[str, ...] = ()
    stride: int | None = None
    unit: Unit = "word"
    max_new_tokens: int = 256
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0
    allow_code_execution: bool = False
    workers: int = 1
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {self.limit}")
        if self.shots < 0 or self.workers < 1 or self.margin < 0:
            raise ValueError("--shots and --margin must not be negative, --workers must be at least 1")
        if self.shots and self.shots_from is None:
            raise ValueError("--shots: say with --shots-from which file the worked examples are in")

    def decoding(self, stop: tuple[str, ...] = ()) -> Decoding:
        """How completions are drawn. Raises UserError for numbers that do not fit."""
        with user_errors():
            return Decoding(self.max_new_tokens, self.temperature, self.samples, stop, self.seed)

    def some(self, items: Sequence[Item]) -> list[Item]:
        """The first `limit` items."""
        return list(items[: self.limit])


def mmlu(config: SuiteConfig) -> Prepared:
    """Multiple choice over subjects."""
    items = config.some(multiple_choice.read_mmlu(config.data))
    shots: list[multiple_choice.ChoiceItem] = []
    if config.shots and config.shots_from is not None:
        known = multiple_choice.read_mmlu(config.shots_from)
        for subject in {item.subject for item in items}:
            own = [shot for shot in known if shot.subject == subject][: config.shots]
            if len(own) < config.shots:
                raise UserError(f"{config.shots_from}: only {len(own)} worked examples of {subject!r}")
            shots += own

    def measure(subject: Subject) -> Result:
        found = multiple_choice.ask_mmlu(subject, items, shots=shots, style=config.options)
        return multiple_choice.score_mmlu(items, found)

    return measure


def truthfulqa(config: SuiteConfig) -> Prepared:
    """Multiple choice against common falsehoods."""
    items = config.some(multiple_choice.read_truthfulqa(config.data))
    primer = "" if config.primer is None else text_perplexity.read_documents(config.primer)[0]

    def measure(subject: Subject) -> Result:
        return multiple_choice.score_truthfulqa(
            items, multiple_choice.ask_truthfulqa(subject, items, primer=primer)
        )

    return measure


def gsm8k(config: SuiteConfig) -> Prepared:
    """Word problems with a number for an answer."""
    items = config.some(exact_answer.read_gsm8k(config.data))
    shots = exact_answer.read_gsm8k(config.shots_from)[: config.shots] if config.shots_from and config.shots else []
    if len(shots) < config.shots:
        raise UserError(f"{config.shots_from}: {len(shots)} worked examples, fewer than --shots")
    decoding = config.decoding(exact_answer.STOP)

    def measure(subject: Subject) -> Result:
        texts = subject.complete([exact_answer.gsm8k_prompt(item, shots) for item in items], decoding)
        return exact_answer.score_gsm8k(items, texts)

    return measure


def humaneval(config: SuiteConfig) -> Prepared:
    """Functions to complete, judged by running them."""
    code.require_allowed(config.allow_code_execution)
    items = config.some(code.read_humaneval(config.data))

    def measure(subject: Subject) -> Result:
        decoding = config.decoding(() if subject.chat else code.STOP)
        texts = subject.complete([item.prompt for item in items], decoding)
        limits = Limits(seconds=config.seconds)
        ran = code.run_all(items, texts, allowed=config.allow_code_execution, limits=limits, workers=config.workers)
        return code.score_humaneval(items, texts, ran)

    return measure


def alpaca_eval(config: SuiteConfig) -> Prepared:
    """Instructions; the reference's outputs are in the same file or in --reference."""
    questions, reference = pairwise.read_alpaca_eval(config.data)
    if config.reference is not None:
        _, reference = pairwise.read_alpaca_eval(config.reference)
    if not reference:
        raise UserError(f"{config.data}: there are no outputs in it; give the reference's with --reference")
    return _pairwise(config, questions, reference)


def open_questions(config: SuiteConfig) -> Prepared:
    """Arena-Hard's and MT-Bench's question.jsonl, with the reference's model_answer file."""
    if config.reference is None:
        raise UserError("--reference: give the reference model's file of answers (model_answer/NAME.jsonl)")
    questions = pairwise.read_questions(config.data)
    return _pairwise(config, questions, pairwise.read_model_answers(config.reference))


def _pairwise(config: SuiteConfig, questions: Sequence[pairwise.Question], reference: pairwise.Answers) -> Prepared:
    if config.samples != 1:
        raise UserError("--samples: this suite compares one answer a question")
    judge, decoding, asked = _judge(config), config.decoding(), config.some(questions)

    def measure(subject: Subject) -> Result:
        answers = pairwise.answer(subject, asked, decoding)
        source = config.reference or config.data
        return pairwise.compare(asked, answers, reference, judge, source=source, chat=subject.chat)

    return measure


def _judge(config: SuiteConfig) -> Judge:
    if config.judge is None:
        raise UserError("--judge: say who judges: path/to/file.py:function, or the folder of a reward model")
    return load_judge(config.judge, margin=config.margin)


def plain_win_rate(config: SuiteConfig) -> Prepared:
    """Any prompts; against another model (--reference MODEL), or answers in a file (--data's own completions)."""
    judge, decoding = _judge(config), config.decoding()
    other = config.reference
    if other is None or str(other).endswith(SUFFIXES):
        answers = {prompt: texts[: config.samples] for prompt, texts in read_answers(other or config.data).items()}
        prompts = config.some(list(answers))

        def against_file(subject: Subject) -> Result:
            theirs = {subject.asked(prompt): answers[prompt] for prompt in prompts}
            return win_rate(
                paired(_written(subject, prompts, decoding), theirs, source=other or config.data), judge
            )

        return against_file
    prompts = config.some(list(dict.fromkeys(red_team.read_prompts(config.data))))

    def measure(subject: Subject) -> Result:
        opponent = load_subject(other, chat=subject.chat, batch_size=subject.batch_size)
        theirs = _written(opponent, prompts, decoding)
        return win_rate(paired(_written(subject, prompts, decoding), theirs, source=other), judge)

    return measure


def _written(subject: Subject, prompts: Sequence[str], decoding: Decoding) -> dict[str, list[str]]:
    """Each prompt, as its judge must be given it -> what the model writes."""
    asked = [subject.asked(prompt) for prompt in prompts]
    return dict(zip(asked, subject.complete(asked, decoding), strict=True))


def perplexity(config: SuiteConfig) -> Prepared:
    """A text file, or rows with a column `text`."""
    documents = config.some(text_perplexity.read_documents(config.data))
    return lambda subject: text_perplexity.perplexity(subject, documents, stride=config.stride)


def variety(config: SuiteConfig) -> Prepared:
    """What is written to prompts: distinct n-grams, self-BLEU, lengths, repetition."""
    prompts = config.some(red_team.read_prompts(config.data))
    decoding = config.decoding()

    def measure(subject: Subject) -> Result:
        texts = subject.complete(list(prompts), decoding)
        asked = [prompt for prompt, found in zip(prompts, texts, strict=True) for _ in found]
        flat = [text for found in texts for text in found]
        figures = diversity(flat, unit=config.unit, prompts=asked if decoding.samples > 1 else None)
        rows = [
            {"prompt": question_of(prompt), "completion": text} for prompt, text in zip(asked, flat, strict=True)
        ]
        ended = Measure([float(bool(text.strip())) for text in flat])
        return Result({"written": ended}, figures, rows=rows)

    return measure


def attacks(config: SuiteConfig) -> Prepared:
    """Prompts meant to break rules, and how often they do."""
    prompts = config.some(red_team.read_prompts(config.data))
    rules = {name: load_rule(name, "--rule") for name in config.rules}
    decoding = config.decoding()
    if not rules:
        raise UserError("--rule: name at least one rule, as path/to/file.py:function")
    return lambda subject: red_team.attack_success(prompts, subject.complete(list(prompts), decoding), rules)


SUITES: dict[str, Callable[[SuiteConfig], Prepared]] = {
    "alpaca_eval": alpaca_eval,
    "arena_hard": open_questions,
    "diversity": variety,
    "gsm8k": gsm8k,
    "humaneval": humaneval,
    "mmlu": mmlu,
    "mt_bench": open_questions,
    "perplexity": perplexity,
    "red_team": attacks,
    "truthfulqa": truthfulqa,
    "win_rate": plain_win_rate,
}


def prepare(suite: str, config: SuiteConfig) -> Prepared:
    """Read a suite's files. Raises UserError for whatever is wrong with them, or an unknown suite."""
    if suite not in SUITES:
        raise UserError(f"--suite: unknown suite {suite!r}; there are {', '.join(SUITES)}")
    if not Path(config.data).exists():
        raise UserError(f"--data: {config.data}: no such file or folder")
    return SUITES[suite](config)
