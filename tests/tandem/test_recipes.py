"""The table of recipes, and how a configuration file is found and read."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import typing
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.run import RunConfig
from tandem.recipes import EVALUATORS, RECIPES, evaluator_for, find_config, read_plan, suggest


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_keeps_the_contract(recipe: str) -> None:
    module_name, class_name = RECIPES[recipe]
    if importlib.util.find_spec(module_name) is None:
        pytest.skip(f"{module_name} is not written yet")
    module = importlib.import_module(module_name)
    config_class = getattr(module, class_name)
    assert typing.get_type_hints(config_class)["run"] is RunConfig
    assert config_class.__dataclass_params__.frozen
    parameters = inspect.signature(module.train).parameters
    assert list(parameters) == ["config", "resume"]
    assert parameters["resume"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["resume"].default is None


@pytest.mark.parametrize("room", sorted(EVALUATORS))
def test_every_evaluator_keeps_the_contract(room: str) -> None:
    if importlib.util.find_spec(EVALUATORS[room]) is None:
        pytest.skip(f"{EVALUATORS[room]} is not written yet")
    module = importlib.import_module(EVALUATORS[room])
    assert dataclasses.is_dataclass(module.EvaluateConfig)
    assert list(inspect.signature(module.evaluate_run).parameters)[:2] == ["run_folder", "config"]


def test_every_recipe_has_an_evaluator() -> None:
    rooms = {recipe.partition("/")[0] for recipe in RECIPES}
    assert rooms <= EVALUATORS.keys() <= rooms | RECIPES.keys()
    assert evaluator_for("embodied/vla_ppo").__name__ == "embodied.evaluate_vla"
    assert evaluator_for("embodied/ppo").__name__ == "embodied.evaluate"


def test_an_unknown_room_has_none() -> None:
    with pytest.raises(UserError, match="no evaluation for recipe 'x/y'"):
        evaluator_for("x/y")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_an_unknown_recipe_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "# a comment\nrecipe: llm/sfd\n")
    with pytest.raises(UserError, match=r"c\.yaml:2: recipe: unknown recipe 'llm/sfd'; did you mean llm/sft\?"):
        read_plan(path)


def test_a_missing_recipe_lists_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"c\.yaml: missing key recipe; the recipes are embodied/awac"):
        read_plan(write(tmp_path, "run: {seed: 1}\n"))


def test_an_override_of_the_recipe_is_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"command line: recipe: unknown recipe 'llm/gpro'; did you mean llm/grpo\?"
    ):
        read_plan(write(tmp_path, "recipe: llm/sft\n"), ["recipe=llm/gpro"])


def test_plan(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, "recipe: llm/sft\nrun: {seed: 3}\n"), ["run.name=x"])
    assert plan.recipe == "llm/sft"
    assert plan.module.__name__ == "llm_rlhf.train_sft"
    assert (plan.config.run.seed, plan.config.run.name) == (3, "x")


def test_shipped_configurations_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped"
    (shipped / "demo").mkdir(parents=True)
    (shipped / "demo" / "walks_sft.yaml").write_text("recipe: llm/sft\n")
    monkeypatch.setattr("tandem.recipes.configs_folder", lambda: shipped)
    monkeypatch.chdir(tmp_path)
    for name in ("demo/walks_sft", "demo/walks_sft.yaml", "configs/demo/walks_sft.yaml"):
        assert find_config(name) == shipped / "demo" / "walks_sft.yaml"
    own = write(tmp_path, "")
    assert find_config("c.yaml").resolve() == own
    with pytest.raises(
        UserError, match=r"^demo/wlaks_sft: no such configuration file; did you mean demo/walks_sft\?$"
    ):
        find_config("demo/wlaks_sft")


def test_suggest() -> None:
    assert suggest("trian", ["train", "eval"]) == "did you mean train?"
    assert suggest("zzz", ["train", "eval"]) == "there are train, eval"
