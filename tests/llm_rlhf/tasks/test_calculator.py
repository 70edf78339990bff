import gzip
import json
import os
import random
from pathlib import Path

import pytest

from experiment.errors import UserError
from llm_rlhf.tasks.calculator import (
    CalculatorConfig,
    Expression,
    generated_expressions,
    is_kept,
    read_expressions,
    slipped,
    split_expressions,
    write_answer,
    write_prompt,
)
from llm_rlhf.tasks.task import Task, TaskConfig, build_task

DATA = Path(os.environ.get("TANDEM_DATA", Path(__file__).parents[4] / "shared" / "data"))
GSM8K = DATA / "gsm8k_train.jsonl.gz"
SMALL = CalculatorConfig(validation=50, test=100)


def write_jsonl(path: Path, answers: list[str]) -> Path:
    path.write_text("".join(json.dumps({"question": "?", "answer": answer}) + "\n" for answer in answers))
    return path


def test_expressions_are_read_from_annotations(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "a.jsonl",
        [
            "She sold 48/2 = <<48/2=24>>24 and <<48+24=72>>72.",
            "<<48+24=72>> again, <<3*4=13>> wrong, <<1.5*2=3>> decimal, <<1+2+3=6>> two operators",
            "<<1000+1=1001>> too large, <<999*999=998001>> too long, <<7/2=3.5>> no integer, <<5-2=3>>",
        ],
    )
    assert read_expressions(file) == [Expression(48, "/", 2), Expression(48, "+", 24), Expression(5, "-", 2)]


def test_results_and_limits() -> None:
    assert Expression(12, "-", 5).result() == 7
    assert Expression(5, "-", 12).result() is None
    assert Expression(7, "/", 0).result() is None
    assert Expression(7, "/", 2).result() is None
    assert Expression(42, "/", 6).result() == 7
    assert is_kept(Expression(99, "*", 101))
    assert not is_kept(Expression(100, "*", 100))
    assert not is_kept(Expression(1000, "-", 1))


@pytest.mark.parametrize(
    "padding, digits, prompt, answer",
    [
        ("zero", "plain", "012+345=", "0357"),
        ("zero", "reversed", "210+543=", "7530"),
        ("zero", "reversed_answer", "012+345=", "7530"),
        ("space", "reversed_answer", " 12+345=", "753"),
        ("none", "plain", "12+345=", "357"),
    ],
)
def test_formats(padding: str, digits: str, prompt: str, answer: str) -> None:
    config = CalculatorConfig(padding=padding, digits=digits)  # type: ignore[arg-type]
    assert write_prompt(Expression(12, "+", 345), config) == prompt
    assert write_answer(357, config) == answer


def test_slips_are_ten_off_and_keep_four_digits() -> None:
    assert slipped(357) == 367
    assert slipped(9989) == 9999
    assert slipped(9995) == 9985


def forms(prompts: list[str]) -> set[Expression]:
    found = set()
    for prompt in prompts:
        text = prompt[:-1]
        operator = next(character for character in text if character in "+-*/")
        left, right = (int(part[::-1]) for part in text.split(operator))
        found.add(Expression(left, operator, right).canonical())
    return found


def check_split(task: Task) -> None:
    train = forms([example.prompt for example in task.train])
    demonstrated = forms([example.prompt for example in task.demonstrations])
    validation = forms([example.prompt for example in task.splits["validation"]])
    test = forms([example.prompt for example in task.splits["test"]])
    assert train == demonstrated
    assert not train & test
    assert not train & validation
    assert not validation & test
    assert len(test) == len(task.splits["test"])


def test_no_twin_leaks_across_the_split() -> None:
    task = build_task(TaskConfig(calculator=SMALL, seed=3))
    check_split(task)
    assert len(task.splits["validation"]) == 50
    assert len(task.splits["test"]) == 100
    prompts = {example.prompt for example in task.train}
    assert "200+300=" not in prompts or "300+200=" in prompts
    assert task.notes[0].startswith("calculator: no task.data given, so 5000 generated")


@pytest.mark.needs_data
@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
def test_the_real_file() -> None:
    expressions = read_expressions(GSM8K)
    assert len(expressions) == 5227
    first, second = (build_task(TaskConfig(data=str(GSM8K), seed=seed)) for seed in (0, 1))
    check_split(first)
    assert len(first.splits["test"]) == 500
    assert first.splits["test"] != second.splits["test"]
    assert first == build_task(TaskConfig(data=str(GSM8K), seed=0))


def test_twins_share_a_side_even_when_both_are_written() -> None:
    twins = [Expression(i, "+", i + 1) for i in range(40)] + [Expression(i + 1, "+", i) for i in range(40)]
    train, validation, test = split_expressions(twins, validation=5, test=10, rng=random.Random(0))
    assert len(train) == 2 * 25
    held_out = {expression.canonical() for expression in [*validation, *test]}
    assert len(held_out) == 15
    assert not held_out & {expression.canonical() for expression in train}
    with pytest.raises(UserError, match="too few"):
        split_expressions(twins, validation=20, test=20, rng=random.Random(0))


def test_sixty_percent_of_the_demonstrations_slip_and_the_verifier_does_not() -> None:
    config = CalculatorConfig(validation=50, test=100, slip=0.6)
    task = build_task(TaskConfig(calculator=config))
    wrong = [example for example in task.demonstrations if example.completion != example.columns["answer"]]
    assert len(wrong) == round(0.6 * len(task.demonstrations))
    for example in wrong:
        shown, right = (int(text[::-1]) for text in (example.completion, example.columns["answer"]))
        assert abs(shown - right) == 10
    assert all(example.completion == example.columns["answer"] for example in task.train)
    assert all(example.completion == example.columns["answer"] for example in task.splits["test"])
    assert task.demonstrations == build_task(TaskConfig(calculator=config)).demonstrations


def test_generated_expressions_are_distinct_and_kept() -> None:
    expressions = generated_expressions(500, random.Random(0))
    assert len(set(expressions)) == 500
    assert all(is_kept(expression) for expression in expressions)
    assert {expression.operator for expression in expressions} == set("+-*/")


def test_without_a_file_expressions_are_generated_and_a_mistyped_one_is_an_error(tmp_path: Path) -> None:
    assert "no task.data given, so 5000 generated" in build_task(TaskConfig(calculator=SMALL)).notes[0]
    with pytest.raises(UserError, match=r"^task.data: .*gone.jsonl is not there; leave task.data out"):
        build_task(TaskConfig(data=str(tmp_path / "gone.jsonl"), calculator=SMALL))


def test_damaged_files_name_file_and_line(tmp_path: Path) -> None:
    good = json.dumps({"answer": "<<1+2=3>>"})
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{good}\n{{not json\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:2: not valid JSON"):
        read_expressions(file)
    file.write_text(f"{good}\n[1]\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:2: expected a JSON object"):
        read_expressions(file)
    file.write_text(f"{good}\n" + json.dumps({"question": "?"}) + "\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:2: column 'answer' is missing"):
        read_expressions(file)
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:1: not UTF-8"):
        read_expressions(file)
    file.write_text(json.dumps({"answer": "nothing here"}) + "\n")
    with pytest.raises(UserError, match="no <<expression=result>>"):
        read_expressions(file)
    whole = gzip.compress("".join(f"{good}\n" for _ in range(5000)).encode())
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: damaged or truncated gzip"):
        read_expressions(cut)
    cut.write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: damaged or truncated gzip"):
        read_expressions(cut)
    with pytest.raises(UserError, match="no such file"):
        read_expressions(tmp_path / "none.jsonl")


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="slip"):
        CalculatorConfig(slip=1.5)
    with pytest.raises(ValueError, match="at least 1"):
        CalculatorConfig(test=0)
