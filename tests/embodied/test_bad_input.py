"""Bad input through the command line: exit code 2, one line that says what to do, and nothing left behind.

One process imports everything once and forks a child for each case, so every case has its own exit code, output
and working folder, and none pays for the imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.embodied.datasets.conftest import fill

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # imports are slow on a busy machine

DRIVER = """
import json, os, sys
import embodied.train_bc, embodied.train_ppo, embodied.train_vla_bc, llm_rlhf.train_ppo
import embodied.train_iql, embodied.train_cql, embodied.train_td3_bc, embodied.train_awac, embodied.train_dt
import embodied.train_rlpd, embodied.train_backend, d3rlpy, stable_baselines3
from tandem.cli import main

results = {}
for name, folder, arguments in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for stream, file in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(f"../{name}.{file}", os.O_WRONLY | os.O_CREAT), stream)
        code = 1  # what an exception gives
        try:
            code = main(arguments)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    results[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(results))
"""

PPO = """\
recipe: embodied/ppo
run: {folder: run, wandb: disabled}
environment: {id: Pendulum-v1, count: 1, workers: 0}
horizon: 16
total_steps: 16
"""
BC = """\
recipe: embodied/bc
run: {folder: run, wandb: disabled}
environment: {id: Pendulum-v1, count: 1, workers: 0}
data: {path: demonstrations.hdf5}
updates: 1
episodes: 0
"""
TABLE = """\
recipe: embodied/vla_bc
run: {folder: run, wandb: disabled}
data: {path: demos}
grounding: {scenes: 0}
"""
LANGUAGE = """\
recipe: llm/ppo
run: {folder: run, wandb: disabled}
task: {name: random_walks, random_walks: {walks: 60}}
model: {path: model}
"""


OFFLINE = """\
recipe: embodied/{recipe}
run: {{folder: run, wandb: disabled}}
environment: {{id: Pendulum-v1, count: 1, workers: 0}}
data: {{path: demonstrations.hdf5}}
evaluate_every: 1
log_every: 1
episodes: 1
{more}
"""
RECIPES = {
    **dict.fromkeys(("iql", "cql", "td3_bc", "awac", "dt"), ("updates: 1",)),
    **dict.fromkeys(("rlpd", "iql_online", "awac_online"), ("total_steps: 8", "horizon: 8")),
    "d3rlpy": ("algorithm: d3rlpy/BC", "total: 1"),
    "sb3": ("algorithm: sb3/SAC", "total: 1", "options: {buffer_size: 1000}"),
}
"""What learns from logged data, and its own settings of a short run; the last two are of embodied/backend."""


def nothing(folder: Path) -> None:
    del folder


def demonstrations(*, observation: int = 3, action: int = 1, keep: float = 1.0) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "demonstrations.hdf5"
        with h5py.File(path, "w") as file:
            for number in range(2):
                demo = file.create_group(f"data/demo_{number}")
                demo["actions"] = np.zeros((200, action))
                demo["rewards"] = np.zeros(200)
                demo["obs/state"] = np.ones((200, observation))
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])

    return write


def episodes(*lengths: int, actions: Sequence[int] = (1,), value: float = 0.0) -> Callable[[Path], None]:
    """Recorded episodes of these lengths, all cut; the last action is `value`.

    actions: how many dimensions they have, one number an episode, in turn.
    """

    def write(folder: Path) -> None:
        with h5py.File(folder / "demonstrations.hdf5", "w") as file:
            for number, length in enumerate(lengths):
                demo = file.create_group(f"data/demo_{number}")
                demo["actions"] = np.linspace(-1, 1, length)[:, None].repeat(actions[number % len(actions)], 1)
                demo["rewards"] = np.arange(length, dtype=float)
                demo["obs/state"] = np.random.default_rng(number).standard_normal((length, 3))
            demo["actions"][-1] = value

    return write


def no_data_set(folder: Path) -> None:
    with h5py.File(folder / "demonstrations.hdf5", "w") as file:
        file["steps/reward"] = np.zeros(3)


def table_demonstrations(spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    """Three episodes in LeRobot's layout, a file each, of which one is spoiled."""

    def write(folder: Path) -> None:
        fill(folder / "demos", size=(16, 16))
        spoil(folder / "demos" / "data" / "chunk-000" / "file-001.parquet")

    return write


def other_actions(path: Path, *, value: float, size: int) -> None:
    """Write the actions anew: `size` numbers each, all `value`."""
    table = pq.read_table(path)
    actions = pa.array([[value] * size] * len(table), pa.list_(pa.float32(), size))
    pq.write_table(table.set_column(table.column_names.index("action"), "action", actions), path)


def folder_with(*files: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("{}")

    return make


@dataclass(frozen=True)
class Case:
    """config: the text of config.yaml; said: what the one line must contain, in this order."""

    config: str
    said: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    prepare: Callable[[Path], None] = nothing


CASES = {
    "unknown_key": Case(
        PPO + "ppo:\n  clip_rnage: 0.1\n", ("config.yaml:7: ", "ppo.clip_rnage", "unknown key", "ppo.clip_range")
    ),
    "unknown_override": Case(PPO, ("command line", "ppo.epocs", "ppo.epochs"), ("ppo.epocs=3",)),
    "wrong_type": Case(PPO + "ppo: {epochs: many}\n", ("config.yaml:6: ", "ppo.epochs", "many")),
    "wrong_choice": Case(PPO, ("command line", "policy.activation", "thah", "tanh"), ("policy.activation=thah",)),
    "impossible_number": Case(PPO, ("workers must be 0..count", "5"), ("environment.workers=5",)),
    "unknown_recipe": Case(PPO.replace("embodied/ppo", "embodied/pop"), ("unknown recipe", "embodied/ppo")),
    "no_recipe": Case(PPO.replace("embodied/ppo", "[1]"), ("unknown recipe [1]",)),
    "no_width": Case(PPO + "policy: {hidden: [0]}\n", ("policy.hidden must be widths of at least 1, got [0]",)),
    "unknown_environment": Case(
        PPO, ("Pendulum-v9", "did you mean 'Pendulum-v1'"), ("environment.id=Pendulum-v9",)
    ),
    "environment_not_installed": Case(
        PPO, ("ALE/Pong-v5", "pip install 'ale-py'"), ("environment.id=ALE/Pong-v5",)
    ),
    "package_not_installed": Case(
        PPO, ("'no_such_robots'", "pip install"), ("environment.id=no_such_robots:Arm-v0",)
    ),
    "wrong_options": Case(
        PPO, ("Pendulum-v1", "does not accept its options", "colour"), ("environment.options.colour=red",)
    ),
    "no_flat_observations": Case(PPO, ("Discrete(16)", "only a flat Box"), ("environment.id=FrozenLake-v1",)),
    "no_clone": Case(PPO, ("nowhere: no policy here", "policy.json is missing"), ("init=nowhere",)),
    "run_folder_taken": Case(
        PPO,
        ("taken: the run folder is not empty", "tandem resume taken"),
        ("run.folder=taken",),
        folder_with("taken/a"),
    ),
    "no_demonstrations_named": Case(BC.replace("data: {path: demonstrations.hdf5}\n", ""), ("data.path=PATH",)),
    "missing_demonstrations": Case(BC, ("demonstrations.hdf5: no such file",)),
    "truncated_demonstrations": Case(
        BC, ("demonstrations.hdf5", "damaged or cut off"), (), demonstrations(keep=0.6)
    ),
    "no_hdf5": Case(BC, ("config.yaml", "no data set that Tandem reads"), ("data.path=config.yaml",)),
    "other_observations": Case(
        BC,
        ("observations have 5 dimensions and actions 1", "Pendulum-v1 has 3 and 1", "choose the environment"),
        (),
        demonstrations(observation=5),
    ),
    "other_actions": Case(BC, ("actions 4", "Pendulum-v1 has 3 and 1"), (), demonstrations(action=4)),
    "discrete_cloning": Case(BC, ("discrete",), ("environment.id=CartPole-v1",), demonstrations()),
    "term_without_file": Case(PPO, ("none.hdf5: no such file",), ("demonstrations.path=none.hdf5",)),
    "kl_to_nothing": Case(PPO, ("kl.coef needs init",), ("kl.coef=0.1",)),
    "no_table_demonstrations": Case(TABLE, ("demos", "no such folder")),
    "a_file_of_them_is_missing": Case(
        TABLE, ("file-001.parquet",), (), table_demonstrations(lambda path: path.unlink())
    ),
    "one_is_half_written": Case(
        TABLE,
        ("file-001.parquet", "damaged or not finished"),
        (),
        table_demonstrations(lambda path: path.write_bytes(path.read_bytes()[:200])),
    ),
    "their_actions_are_nan": Case(
        TABLE,
        ("action", "not finite"),
        (),
        table_demonstrations(lambda path: other_actions(path, value=float("nan"), size=2)),
    ),
    "their_actions_have_another_shape": Case(
        TABLE, ("action",), (), table_demonstrations(lambda path: other_actions(path, value=0.0, size=3))
    ),
    "no_such_camera": Case(
        TABLE,
        ("demos", "no camera 'wrist'", "front"),
        ("data.cameras=[wrist]",),
        table_demonstrations(lambda path: None),
    ),
    "no_model": Case(LANGUAGE, ("model.path: ", "model does not exist")),
    "model_without_config": Case(
        LANGUAGE, ("model.path: model holds no config.json",), (), folder_with("model/model.safetensors")
    ),
    "model_without_tokenizer": Case(
        LANGUAGE, ("model: no tokenizer could be loaded",), (), folder_with("model/config.json")
    ),
}

MISTAKES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated": (demonstrations(keep=0.6), ("demonstrations.hdf5", "damaged or cut off")),
    "nan_actions": (episodes(5, 5, value=float("nan")), ("demonstrations.hdf5: data/demo_1", "actions", "finite")),
    "changing_shapes": (episodes(5, 5, actions=(1, 2)), ("data/demo_1: actions have 2 dim", "data/demo_0 1")),
    "single_steps": (episodes(1, 1, 1), ("every episode is one cut step",)),
    "unknown_format": (no_data_set, ("demonstrations.hdf5: this file is no data set that Tandem reads",)),
}
CLONES_SINGLE_STEPS = "single_steps_dt"
"""A Decision Transformer needs no next observation."""


def offline(recipe: str) -> str:
    """The text of a configuration that trains, given data."""
    name = "backend" if recipe in ("d3rlpy", "sb3") else recipe
    return OFFLINE.format(recipe=name, more="\n".join(RECIPES[recipe]))


CASES |= {
    f"{mistake}_{recipe}": Case(offline(recipe), said, (), prepare)
    for recipe in RECIPES
    for mistake, (prepare, said) in MISTAKES.items()
    if f"{mistake}_{recipe}" != CLONES_SINGLE_STEPS
}
GOOD = {
    **{f"good_{recipe}": Case(offline(recipe), (), (), episodes(5, 1, 6, value=0.3)) for recipe in RECIPES},
    CLONES_SINGLE_STEPS: Case(offline("dt"), (), (), episodes(1, 1, 1)),
}
"""The same without a mistake trains: the cases above fail rightly. A single episode of one step is no mistake."""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    left: list[str]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    root = tmp_path_factory.mktemp("bad")
    jobs, before = [], {}
    for name, case in {**CASES, **GOOD}.items():
        folder = root / name
        folder.mkdir()
        (folder / "config.yaml").write_text(case.config)
        case.prepare(folder)
        before[name] = set(folder.rglob("*"))
        jobs.append((name, str(folder), ["train", "config.yaml", *case.overrides]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(jobs),
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    return {
        name: Outcome(
            codes[name],
            (root / f"{name}.out.txt").read_text(),
            (root / f"{name}.err.txt").read_text(),
            sorted(str(path.relative_to(root / name)) for path in set((root / name).rglob("*")) - before[name]),
        )
        for name in codes
    }


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_left(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    lines = outcome.err.strip().splitlines()
    # a mistake that shows only when the model is read comes after the line that names the run
    assert len(lines) == (2 if "llm/" in CASES[name].config else 1), outcome.err
    assert lines[-1].startswith("error: ")
    position = 0
    for words in CASES[name].said:
        position = lines[-1].find(words, position)
        assert position >= 0, f"{words!r} is not said, or not in its place: {lines[-1]}"
    assert outcome.left == []


@pytest.mark.parametrize("name", GOOD)
def test_good_data_are_taken(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert outcome.code == 0, outcome.err
    assert "run/checkpoints/last" in outcome.left


def test_good_input_is_taken(tmp_path: Path) -> None:
    """The same configuration without a mistake trains, in a process of its own: the cases above fail rightly."""
    (tmp_path / "config.yaml").write_text(PPO)
    done = subprocess.run(
        [sys.executable, "-m", "tandem", "train", "config.yaml"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "last" / "policy" / "policy.json").is_file()


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(PPO)
    done = subprocess.run(
        [sys.executable, "-m", "tandem", "train", "config.yaml", "environment.id=Pendulum-v9"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]
