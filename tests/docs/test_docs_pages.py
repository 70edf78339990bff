"""The pages of docs/: their code runs as printed and is short, their commands exist, their links lead somewhere."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from embodied.evaluate_vla import EvaluateVLAConfig, evaluate_policy
from embodied.policies.vla import VLAConfig, VLAPolicy, VLASpaces
from embodied.policies.words import Words
from embodied.recording.record import RecordConfig, record_expert
from embodied.vla.seats import TableConfig, make_table
from envs.randomization import KINDS
from envs.randomization.randomizer import WRITERS
from envs.table.language import TRAINING_WORDS
from envs.table.observations import PROPRIO, STATE
from envs.table.world import TableWorld
from experiment.config import build, read_tree
from tandem.cli import VERBS
from tandem.recipes import read_plan

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
OWN = ("new_task", "new_instruction", "new_randomization")
MOST_LINES = 30
FENCE = re.compile(r"^```(?P<kind>\w+)(?: (?P<file>\S+))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def files_of(page: str) -> dict[str, str]:
    """The files that a page prints in full, in their order."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return {block["file"]: block["text"] for block in FENCE.finditer(text) if block["file"]}


def write_files(page: str, folder: Path) -> dict[str, str]:
    files = files_of(page)
    for name, text in files.items():
        (folder / name).write_text(text)
    return files


def commands_of(path: Path) -> list[list[str]]:
    """The `tandem` commands in the page's shell blocks, as words."""
    blocks = [block["text"] for block in FENCE.finditer(path.read_text()) if block["kind"] == "sh"]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "tandem"]


@pytest.mark.parametrize("page", OWN)
def test_the_code_of_a_page_is_short_and_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    files = write_files(page, tmp_path)
    assert files
    assert {name: len(text.splitlines()) for name, text in files.items() if text.count("\n") >= MOST_LINES} == {}
    for name in files:
        if name.endswith(".py"):
            runpy.run_path(name, run_name="__main__")
            sys.modules.pop(name.removesuffix(".py"), None)
    printed = capsys.readouterr().out
    match page:
        case "new_task":
            assert printed.count("to the left edge") == 10
            assert int(re.findall(r"the expert did (\d+) of 10", printed)[0]) >= 9
        case "new_instruction":
            assert "Goal(task='push', thing=Thing(colour='blue', shape='bar'), pad='white'" in printed
            assert "pick red cube judged" in printed
        case _:
            assert printed.count("masses x") == 3


def test_the_code_of_the_robots_page_runs() -> None:
    page = (ROOT / "docs" / "robots.md").read_text()
    (code,) = [block["text"] for block in FENCE.finditer(page) if block["kind"] == "python"]
    scope: dict[str, Any] = {}
    exec(compile(code, "robots.md", "exec"), scope)
    assert set(scope["observation"]) == {"image", "proprio"}
    assert scope["env"].spec.max_episode_steps == 64
    assert (scope["terminated"], scope["truncated"], scope["info"]["success"]) == (False, False, False)
    scope["env"].close()


def test_the_names_of_the_fields_are_those_of_the_table() -> None:
    """The page's table: every field that has names, and only names that the model has."""
    model, told = TableWorld().model, set()
    for line in (ROOT / "docs" / "new_randomization.md").read_text().splitlines():
        if not re.match(r"\| .*`\w+`.* \| an? \w+ \|", line):
            continue
        _, fields, owner, names, _ = line.split("|")
        for field in re.findall(r"`(\w+)`", fields):
            told.add(field)
            assert owner.split()[-1] == KINDS[field].names_of
            there = WRITERS[field].candidates(model)
            for name in re.findall(r"`([\w*]+)`", names) if there else ():
                assert fnmatch.filter(there, name), (field, name)
    assert told == {field for field, kind in KINDS.items() if kind.names_of}


def test_the_printed_files_serve_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording and judging with all three at once: what the commands of the pages do."""
    monkeypatch.chdir(tmp_path)
    for page in OWN:
        write_files(page, tmp_path)
    own = {"tasks": ("edge.py:SLIDE", "pick"), "phrasing": "words.py:sentences", "randomization": "workshop.yaml"}
    make_table(TableConfig(**own), 16).close()  # type: ignore[arg-type]
    report = record_expert("demos", RecordConfig(**own, episodes=2, workers=0, image_size=16))  # type: ignore[arg-type]
    assert report.successes == {"edge.py:SLIDE": 1, "pick": 1}
    sizes = VLAConfig(chunk=16, channels=(4, 8), blocks=1, queries=2, words=8, hidden=(8,), critic_hidden=(8,))
    policy = VLAPolicy(VLASpaces(16, ("front",), PROPRIO, STATE, 4), sizes, Words(TRAINING_WORDS))
    config = EvaluateVLAConfig(
        **own,  # type: ignore[arg-type]
        episodes=1,
        suites=("normal", "held_out", "synonyms", "randomized", "swapped"),
        workers=0,
        count=2,
    )
    suites = evaluate_policy(policy, config)["suites"]
    assert list(suites) == list(config.suites)
    assert {tuple(sorted(found["tasks"])) for found in suites.values()} == {("pick", "slide")}
    assert all(goal.startswith(("pick ", "slide ")) for found in suites.values() for goal in found["goals"])


def test_the_two_forms_of_a_randomization_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files("new_randomization", tmp_path)
    from envs.table.randomization import specs_of

    printed = runpy.run_path("workshop.py")["WORKSHOP"]
    assert specs_of("workshop.yaml") == tuple(printed)


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_commands_exist_and_take_their_arguments(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value is checked against the configuration that it overrides; nothing is run."""
    monkeypatch.chdir(ROOT)
    for _, *words in commands_of(path):
        name = " ".join(words[:2]) if words[0] in ("data", "config") else words[0]
        if name == "config show":
            name = "config"
        rest = words[len(name.split()) :]
        parser = argparse.ArgumentParser(exit_on_error=False)
        VERBS[name].arguments(parser)
        arguments, unknown = parser.parse_known_intermixed_args(rest)
        assert unknown == [], shlex.join(words)
        if name == "train":
            read_plan(arguments.config, arguments.overrides)
        if name == "eval" and ("suites=" in shlex.join(words)):
            tree = dataclasses.replace(read_tree(os.devnull, arguments.overrides), source="command line")
            build(tree, EvaluateVLAConfig)


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_links_and_pictures_are_there(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    assert [target for target in targets if "://" not in target and not (path.parent / target).exists()] == []
