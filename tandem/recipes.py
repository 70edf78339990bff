"""Which module trains what: the table behind `recipe: NAME`, and how a YAML file becomes a configuration.

Recipes are imported only when they are needed, so that the command line starts at once.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from experiment.errors import UserError

# Recipe -> (module, name of its configuration class). The module has `train(config, *, resume=None)`.
RECIPES: dict[str, tuple[str, str]] = {
    "embodied/awac": ("embodied.train_awac", "TrainAWACConfig"),
    "embodied/awac_online": ("embodied.train_awac_online", "TrainAWACOnlineConfig"),
    "embodied/backend": ("embodied.train_backend", "TrainBackendConfig"),
    "embodied/bc": ("embodied.train_bc", "TrainBCConfig"),
    "embodied/cql": ("embodied.train_cql", "TrainCQLConfig"),
    "embodied/dt": ("embodied.train_dt", "TrainDTConfig"),
    "embodied/discrete_cql": ("embodied.train_discrete_cql", "TrainDiscreteCQLConfig"),
    "embodied/iql": ("embodied.train_iql", "TrainIQLConfig"),
    "embodied/iql_online": ("embodied.train_iql_online", "TrainIQLOnlineConfig"),
    "embodied/ppo": ("embodied.train_ppo", "TrainPPOConfig"),
    "embodied/rlpd": ("embodied.train_rlpd", "TrainRLPDConfig"),
    "embodied/td3_bc": ("embodied.train_td3_bc", "TrainTD3BCConfig"),
    "embodied/vla_bc": ("embodied.train_vla_bc", "TrainVLABCConfig"),
    "embodied/vla_ppo": ("embodied.train_vla_ppo", "TrainVLAPPOConfig"),
    "embodied/vla_grpo": ("embodied.train_vla_grpo", "TrainVLAGRPOConfig"),
    "llm/dpo": ("llm_rlhf.train_dpo", "TrainDPOConfig"),
    "llm/grpo": ("llm_rlhf.train_grpo", "TrainGRPOConfig"),
    "llm/ilql": ("llm_rlhf.train_ilql", "TrainILQLConfig"),
    "llm/iterative_dpo": ("llm_rlhf.train_iterative_dpo", "TrainIterativeDPOConfig"),
    "llm/kto": ("llm_rlhf.train_kto", "TrainKTOConfig"),
    "llm/ppo": ("llm_rlhf.train_ppo", "TrainPPOConfig"),
    "llm/process_reward": ("llm_rlhf.train_process_reward", "TrainProcessRewardConfig"),
    "llm/rejection": ("llm_rlhf.train_rejection", "TrainRejectionConfig"),
    "llm/reward": ("llm_rlhf.train_reward", "TrainRewardConfig"),
    "llm/sft": ("llm_rlhf.train_sft", "TrainSFTConfig"),
    "llm/turns_grpo": ("llm_rlhf.train_turns_grpo", "TrainTurnsGRPOConfig"),
    "llm/turns_ppo": ("llm_rlhf.train_turns_ppo", "TrainTurnsPPOConfig"),
    "llm/turns_sft": ("llm_rlhf.train_turns_sft", "TrainTurnsSFTConfig"),
}

# Recipe, or the first part of its name -> module with `EvaluateConfig` and `evaluate_run(run_folder, config)`,
# which writes RUN/eval.json. It may have its own `print_results(results)`.
EVALUATORS: dict[str, str] = {
    "embodied": "embodied.evaluate",
    "embodied/backend": "embodied.evaluate_backend",
    "embodied/dt": "embodied.evaluate_dt",
    "embodied/vla_bc": "embodied.evaluate_vla",
    "embodied/vla_grpo": "embodied.evaluate_vla",
    "embodied/vla_ppo": "embodied.evaluate_vla",
    "llm": "llm_rlhf.evaluate",
    "llm/dpo": "llm_rlhf.evaluate_preference",
    "llm/kto": "llm_rlhf.evaluate_preference",
    "llm/process_reward": "llm_rlhf.evaluate_process_reward",
    "llm/reward": "llm_rlhf.evaluate_reward",
    "llm/turns_grpo": "llm_rlhf.evaluate_turns",
    "llm/turns_ppo": "llm_rlhf.evaluate_turns",
    "llm/turns_sft": "llm_rlhf.evaluate_turns",
}


@dataclass(frozen=True)
class Plan:
    """A recipe with its configuration, ready to train.

    Attributes:
        recipe: a key of `RECIPES`.
        module: the recipe's module, imported.
        config: an instance of its configuration class; `config.run` is a `RunConfig`.
    """

    recipe: str
    module: ModuleType
    config: Any


def read_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a YAML file that begins with `recipe: NAME`, apply `a.b=c` overrides, and validate.

    Raises:
        UserError: no such file, recipe or key, or a value that does not fit.
    """
    from experiment.config import build, read_tree

    tree = read_tree(path, overrides)
    place, name = tree.where(("recipe",)), tree.pop("recipe", None)
    if name is None:
        raise UserError(f"{tree.source}: missing key recipe; the recipes are {', '.join(RECIPES)}")
    if not isinstance(name, str) or name not in RECIPES:
        raise UserError(f"{place}: recipe: unknown recipe {name!r}; {suggest(str(name), RECIPES)}")
    module_name, class_name = RECIPES[name]
    module = importlib.import_module(module_name)
    return Plan(name, module, build(tree, getattr(module, class_name)))


def evaluator_for(recipe: str) -> ModuleType:
    """The module that evaluates runs of `recipe`.

    Raises:
        UserError: the recipe belongs to no known room (a run folder made by hand, or by a newer version).
    """
    module = EVALUATORS.get(recipe) or EVALUATORS.get(recipe.partition("/")[0])
    if module is None:
        raise UserError(f"there is no evaluation for recipe {recipe!r}; the recipes are {', '.join(RECIPES)}")
    return importlib.import_module(module)


def configs_folder() -> Path:
    """The YAML files that come with Tandem: beside the rooms in a checkout, inside this package in a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """The file that the user means by `name`: a path, or a file that comes with Tandem.

    `configs/demo/walks_sft.yaml` and `demo/walks_sft` both work from any folder.

    Raises:
        UserError: there is no such file; the message names the nearest one.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = configs_folder()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if (shipped / f"{short}.yaml").is_file():
        return shipped / f"{short}.yaml"
    known = [path.relative_to(shipped).with_suffix("").as_posix() for path in sorted(shipped.rglob("*.yaml"))]
    raise UserError(f"{name}: no such configuration file; {suggest(short, known)}")


def suggest(wrong: str, known: Iterable[str]) -> str:
    """`did you mean X?` for the nearest known name, else the list of them all (`known` is not empty)."""
    choices = list(known)
    near = difflib.get_close_matches(wrong, choices, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"there are {', '.join(choices)}"
