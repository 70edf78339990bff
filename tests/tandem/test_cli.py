"""The command line: help without heavy imports, one-line errors, exit codes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings

import pytest

from experiment.errors import UserError
from tandem import cli

HEAVY = ("torch", "transformers", "gymnasium", "mujoco", "numpy", "pydantic", "yaml", "rich", "wandb", "matplotlib")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["trian"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        f"import sys\nfrom tandem.cli import main\ncode = main({words!r})\n"
        f"print('loaded', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().splitlines()[-1] == "loaded []", done.stderr


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for verb in (
        "doctor",
        "demo",
        "train CONFIG",
        "resume RUN",
        "eval RUN",
        "compare RUN RUN",
        "config show CONFIG",
    ):
        assert f"  {verb}" in out


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: tandem {verb}")
    assert cli.VERBS[verb].help in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "error: unknown verb 'trian'; did you mean train?"),
        (["--verzion"], "error: unknown option '--verzion'; did you mean --version?"),
        (["train"], "error: the following arguments are required: CONFIG; see `tandem train --help`"),
        (["train", "x", "--dryrun"], "error: tandem train: unknown argument '--dryrun'; did you mean --dry-run?"),
        (["config", "shwo", "x"], "error: tandem config: unknown verb 'shwo'; did you mean show?"),
        (["compare", "x"], "error: tandem compare: name at least two runs, as in `tandem compare RUN RUN`"),
        (["doctor", "x"], "error: tandem doctor: unknown argument 'x'; see `tandem doctor --help`"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [message]


def _replace_doctor(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> int:
        raise error

    monkeypatch.setattr("tandem.doctor.examine", fail)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("the file is\nempty"), 2, "error: the file is empty\n"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "error: the disk under runs/x is full"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_expected_failures_have_a_code_and_a_line(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _replace_doctor(monkeypatch, error)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err.startswith(message)


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_doctor(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_options_may_stand_between_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def record(config: str, overrides: list[str]) -> int:
        seen.append((config, overrides))
        return 0

    monkeypatch.setattr("tandem.verbs.dry_run", record)
    assert cli.main(["train", "a.yaml", "x.y=1", "--dry-run", "z=2"]) == 0
    assert seen == [("a.yaml", ["x.y=1", "z=2"])]


@pytest.mark.parametrize(
    ("display", "before", "libraries", "after"),
    [
        ("", None, ("EGL", "OSMesa"), "egl"),
        ("", None, ("OSMesa",), "osmesa"),
        ("", None, (), "egl"),
        (":0", None, ("EGL",), None),
        ("", "osmesa", ("EGL",), "osmesa"),
    ],
)
def test_rendering_without_a_screen(
    display: str,
    before: str | None,
    libraries: tuple[str, ...],
    after: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A verb begins with the back end that may work; what only prints does not look for libraries."""
    found: list[str | None] = []

    def examine() -> int:
        found.append(os.environ.get("MUJOCO_GL"))
        return 0

    monkeypatch.setattr("tandem.doctor.examine", examine)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name if name in libraries else None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.setenv("WAYLAND_DISPLAY", "")
    # Set first, so that monkeypatch puts back whatever main leaves behind.
    monkeypatch.setenv("MUJOCO_GL", before or "")
    if before is None:
        del os.environ["MUJOCO_GL"]
    cli.main(["--version"])
    assert os.environ.get("MUJOCO_GL") == before
    assert cli.main(["doctor"]) == 0
    assert found == [after]


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "import sys; from tandem.cli import main; sys.exit(main(['--help']))"
    reader = f'{sys.executable} -c "{code}" | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", reader], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() in ("0", "141")
    assert done.stderr == ""


def test_warnings_for_users_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a recording whose last episode was not finished; a deprecated call still names its place."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert cli.main(["--version"]) == 0
    told = warnings.formatwarning("demos: the last\nepisode is left out", UserWarning, "lerobot.py", 173)
    assert told == "warning: demos: the last episode is left out\n"
    assert "old.py:3: DeprecationWarning" in warnings.formatwarning(
        "call it so", DeprecationWarning, "old.py", 3, "f()"
    )
