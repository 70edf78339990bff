"""The doctor's judgements on made-up machines, and one examination of this one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tandem import doctor
from tandem.doctor import Check


@pytest.mark.parametrize(
    ("requirement", "installed", "level", "fix"),
    [
        ("mujoco!=4.0.0,<4,>=3.3", "3.17.0", "ok", ""),
        ("mujoco!=4.0.0,<4,>=3.3", "4.0.0", "fail", "pip install 'mujoco!=4.0.0,<4,>=3.3'"),
        ("d3rlpy!=2.8.1,>=2.8", "2.8.1", "fail", "pip install 'd3rlpy!=2.8.1,>=2.8'"),
        ("torch>=2.13", "2.13.0+cpu", "ok", ""),
        ("torch>=2.13", "2.12.1", "fail", "pip install 'torch>=2.13'"),
        ("rich", None, "fail", "pip install 'rich'"),
    ],
)
def test_requirements(requirement: str, installed: str | None, level: str, fix: str) -> None:
    check = doctor.check_requirement(requirement, installed)
    assert (check.level, check.fix) == (level, fix)


def test_every_declared_dependency_is_checked_and_no_extra() -> None:
    names = {check.name for check in doctor.check_packages()}
    assert {"tandem", "torch", "mujoco", "d3rlpy", "gymnasium", "wandb", "pydantic"} <= names
    assert "pytest" not in names


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-distribution")
    assert [check.fix for check in doctor.check_packages()] == ["pip install -e ."]


def test_python() -> None:
    assert doctor.check_python((3, 11, 0)).level == "ok"
    assert doctor.check_python((3, 10, 14)).level == "fail"


def test_threads() -> None:
    assert doctor.check_threads({}, 2).level == "ok"
    too_many = doctor.check_threads({"OMP_NUM_THREADS": "8"}, 2)
    assert (too_many.level, too_many.fix) == ("warn", "export OMP_NUM_THREADS=2")


def levels(results: dict[str, tuple[bool, str]], chosen: str = "") -> dict[str, tuple[str, str]]:
    checks = doctor.judge_graphics(results, chosen=chosen)
    return {check.name.removeprefix("MUJOCO_GL="): (check.level, check.fix) for check in checks}


def test_one_back_end_is_enough() -> None:
    found = levels({"egl": (True, "llvmpipe"), "osmesa": (False, "no library")})
    assert found["egl"] == ("ok", "")
    assert found["osmesa"] == ("warn", "sudo apt-get install libosmesa6 (or leave it: egl works)")


def test_no_back_end_is_a_failure_with_a_remedy_each() -> None:
    found = levels({"egl": (False, "x"), "osmesa": (False, "y")})
    assert found["egl"] == ("fail", "sudo apt-get install libegl1 libgl1-mesa-dri")
    assert found["osmesa"] == ("fail", "sudo apt-get install libosmesa6")


def test_the_chosen_back_end_must_work() -> None:
    found = levels({"egl": (False, "x"), "osmesa": (True, "llvmpipe")}, chosen="egl")
    assert found["egl"] == ("fail", "export MUJOCO_GL=osmesa")


@pytest.mark.parametrize(("free", "level"), [(0.5, "fail"), (5.0, "warn"), (50.0, "ok")])
def test_disk(free: float, level: str) -> None:
    check = doctor.check_disk(free, Path("/data"))
    assert check.level == level
    assert bool(check.fix) == (level != "ok")


def test_a_back_end_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GL_SECONDS", 0.01)
    assert doctor.probe("egl") == (False, "no frame within 0 seconds")


def test_a_back_end_that_crashes_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = subprocess.CompletedProcess([], -11, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: crash)
    assert doctor.probe("egl") == (False, "it crashed (exit code -11)")


def test_a_back_end_without_a_screen_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    works, text = doctor.probe("glfw")
    assert not works
    assert "OpenGL" in text


def test_a_frame_is_drawn_here() -> None:
    assert any(doctor.probe(backend)[0] for backend in ("egl", "osmesa"))


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_exit_code_and_one_line_a_check(
    level: doctor.Level, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [
        Check("ok", "first", "well"),
        Check(level, "second", "so " * 80 + "so", "mend it" if level != "ok" else ""),
    ]
    monkeypatch.setattr(doctor, "all_checks", lambda: iter(checks))
    assert doctor.examine() == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0] == "ok   first               well"
    assert ("fix: mend it" in lines[1]) == (level != "ok")
