"""HumanEval in its published format, and what a program that a model wrote cannot do."""

import json
import os
import socket
from pathlib import Path

import pytest

from experiment.errors import UserError
from llm_rlhf.evaluation import sandbox
from llm_rlhf.evaluation.benchmarks.code import (
    STOP,
    CodeItem,
    pass_at_k,
    program_of,
    read_humaneval,
    run_all,
    score_humaneval,
)
from llm_rlhf.evaluation.sandbox import Limits, Ran, protection, run_program
from llm_rlhf.evaluation.subject import cut_at

PROMPT = '''from typing import List


def largest(numbers: List[int]) -> int:
    """ The largest.
    >>> largest([1, 3])
    3
    """
'''
TEST = """METADATA = {}


def check(candidate):
    assert candidate([1, 3, 2]) == 3
    assert candidate([-1]) == -1
"""
ROW = {
    "task_id": "HumanEval/900",
    "prompt": PROMPT,
    "canonical_solution": "    return max(numbers)\n",
    "test": TEST,
    "entry_point": "largest",
}
ITEM = CodeItem(**ROW)
QUICK = Limits(seconds=20.0, cpu=2, memory=256, file=1)


def test_the_file(tmp_path: Path) -> None:
    (tmp_path / "h.jsonl").write_text(json.dumps(ROW) + "\n")
    assert read_humaneval(tmp_path / "h.jsonl") == [ITEM]
    (tmp_path / "h.jsonl").write_text(json.dumps({**ROW, "test": None}) + "\n")
    with pytest.raises(UserError, match=r"h\.jsonl:1: column 'test' is NoneType"):
        read_humaneval(tmp_path / "h.jsonl")


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)
    assert pass_at_k(5, 4, 2) == 1.0
    assert pass_at_k(5, 0, 5) == 0.0
    with pytest.raises(ValueError, match="pass@6"):
        pass_at_k(5, 2, 6)


def test_completions_and_conversations_make_programs() -> None:
    assert program_of(ITEM, "    return 1\n").startswith(ITEM.prompt + "    return 1\n\n\nMETADATA")
    said = "Sure!\n```python\ndef largest(numbers: List[int]) -> int:\n    return max(numbers)\n```\nIt uses max."
    program = program_of(ITEM, said)
    assert program.startswith(ITEM.prompt.rstrip() + "\n    pass\n\n\ndef largest")
    assert "Sure" not in program
    assert program.endswith("check(largest)\n")


def test_what_stands_before_a_closing_fence_is_the_body() -> None:
    body = "    return max(numbers)\n```\n"
    assert program_of(ITEM, body).startswith(ITEM.prompt + "    return max(numbers)\n\n")
    assert cut_at("    return 1\n```\nmore", STOP) == "    return 1"


def test_helpers_of_the_prompt_stay() -> None:
    prompt = 'def double(x):\n    return 2 * x\n\n\ndef four(x):\n    """Twice double."""\n'
    item = CodeItem("own/1", prompt, "", "def check(f):\n    assert f(1) == double(double(1))", "four")
    said = "```python\ndef four(x):\n    return double(double(x))\n```"
    (ran,) = run_all([item], [[said, "    return 4 * x\n"]], allowed=True, limits=QUICK)
    assert [one.outcome for one in ran] == ["passed", "passed"]


def test_right_wrong_and_cheating_programs() -> None:
    completions = [
        ITEM.canonical_solution,
        "```py\ndef largest(numbers: List[int]) -> int:\n    return max(numbers)\n```",
        "    return numbers[0]\n",
        "    raise SystemExit(0)\n",
        "    import os\n    os._exit(0)\n",
        "    return (\n",
    ]
    (ran,) = run_all([ITEM], [completions], allowed=True, limits=QUICK, workers=2)
    assert [one.outcome for one in ran] == ["passed", "passed", "failed", "failed", "failed", "failed"]
    assert "AssertionError" in ran[2].said
    assert ran[2].said.startswith("line ")
    assert "SystemExit" in ran[3].said
    assert "exit code 0 before it was done" in ran[4].said
    assert "SyntaxError" in ran[5].said
    result = score_humaneval([ITEM], [completions], [ran], ks=(1, 2, 10))
    assert result.figures()["pass@1"] == pytest.approx(2 / 6)
    assert result.figures()["pass@2"] == pytest.approx(1 - (4 * 3) / (6 * 5))
    assert "pass@10" not in result.measures
    assert "ran as" in result.notes[0]


def test_limits_hold() -> None:
    assert run_program("while True:\n    pass", Limits(seconds=30, cpu=1)).outcome == "failed"
    late = run_program("import time\ntime.sleep(60)", Limits(seconds=0.5))
    assert late == Ran("timeout", "longer than 0.5 s")
    assert "MemoryError" in run_program("x = bytearray(2**30)", QUICK).said
    assert run_program("open('big', 'wb').write(bytes(2**22))", QUICK).outcome == "failed"
    assert "signal SIGKILL" in run_program("import os\nos.kill(os.getpid(), 9)", QUICK).said


def test_there_is_no_network_and_no_environment() -> None:
    os.environ["TANDEM_SECRET"] = "x"
    try:
        program = "import os\nassert 'TANDEM_SECRET' not in os.environ and 'HOME' not in os.environ"
        assert run_program(program, QUICK).outcome == "passed"
    finally:
        del os.environ["TANDEM_SECRET"]
    if not protection().namespaces:
        pytest.skip("unshare does not work here, and the result would say so")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        said = run_program(f"import socket\nsocket.create_connection({address!r}, timeout=5)", QUICK)
    assert said.outcome == "failed"
    assert "OSError" in said.said


def test_nothing_is_left_behind() -> None:
    """Not even a process that it put into a session of its own."""
    if not protection().namespaces:
        pytest.skip("unshare does not work here, and the result would say so")
    marker = f"tandem-left-behind-{os.getpid()}"
    program = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n    os.setsid()\n"
        f"    os.execv('/bin/sh', ['sh', '-c', 'sleep 300; : {marker}'])\n"
        "print(os.getcwd())\n"
    )
    assert run_program(program, QUICK).outcome == "passed"
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not any(marker.encode() in line for line in lines)


def test_processes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0 and protection().user == "root":  # nobody cannot read this Python: try the system's
        system = Path("/usr/bin/python3")
        if not system.exists():
            pytest.skip("there is no Python that a user other than root could run")
        monkeypatch.setattr(sandbox, "_python", lambda: [str(system), "-I", "-S", "-B"])
        sandbox._shield.cache_clear()
    try:
        assert protection().user != "root"
        assert "AS ROOT" not in protection().line()
        fork = "    if os.fork() == 0:\n        time.sleep(20)\n        os._exit(0)\n"
        said = run_program(f"import os, time\nfor _ in range(100):\n{fork}", QUICK).said
        assert "BlockingIOError" in said
    finally:
        sandbox._shield.cache_clear()


def test_only_who_asks_for_it_runs_programs() -> None:
    with pytest.raises(UserError, match="--allow-code-execution"):
        run_all([ITEM], [["    return 1\n"]], allowed=False)
    with pytest.raises(ValueError, match="positive"):
        Limits(seconds=0)
    with pytest.raises(UserError, match="1 programs could not be started, the first: no python"):
        score_humaneval([ITEM], [["x"]], [[Ran("broken", "no python")]])
