"""A user's own objects by file and name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from envs.own import call_own, is_own, load_own


def test_a_name_is_found_in_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 3\nanswer = A()\n")
    assert load_own(f"{file}:answer").x == 3
    assert load_own(f"{file}:answer") is load_own(f"{file}:answer")  # the file is run once
    file.write_text("answer = 4\n")
    os.utime(file, (1, 1))
    assert load_own(f"{file}:answer") == 4
    assert is_own("mine.py:answer")
    assert not is_own("reach")


def test_a_file_may_import_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("answer = 5\n")
    (tmp_path / "mine.py").write_text("from neighbour_of_mine import answer\n")
    path = list(sys.path)
    try:
        assert load_own(f"{tmp_path}/mine.py:answer") == 5
    finally:
        sys.modules.pop("neighbour_of_mine", None)
    assert sys.path == path


def test_a_call_that_fails_is_told_in_one_line_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import json\ndef twice(text):\n    return 2 * json.loads(\n        text)\n")
    twice = load_own(f"{file}:twice")
    assert call_own("twice", twice, "3") == 6
    with pytest.raises(ValueError, match=r"^twice failed: JSONDecodeError: .* \(.*mine\.py, line 3\)$") as caught:
        call_own("twice", twice, "three")  # the place is the user's, not that of json
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^twice failed: TypeError: twice\(\) missing 1 .*text'$"):
        call_own("twice", twice)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "there is no file"),
        ("other = 1\n", "has no answer"),
        ("1 / 0\n", "importing .* failed: ZeroDivisionError: division by zero"),
        ("def answer(:\n", "importing .* failed: SyntaxError"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_own(f"{file}:answer")
    assert str(caught.value).startswith(f"{file}:answer: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_ends_the_process_is_told(tmp_path: Path) -> None:
    """It would end a run with exit code 0, and nobody would hear of it."""
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match=r"importing .*mine\.py failed: SystemExit: 0"):
        load_own(f"{tmp_path}/mine.py:anything")
