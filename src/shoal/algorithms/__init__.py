"""Algorithms, one file each: the loss as a pure function at the top, below it the class whose `update` reads like the paper.

An algorithm of your own is a class with an `update` (and, where it has settings, a `Config`); from `base` it inherits the rest:

    from shoal.algorithms.base import Algorithm, cut_TN, discount_TN, minibatches, values_TN
    from shoal.config import AlgorithmConfig
    from shoal.ops.gae import gae

    class A2CConfig(AlgorithmConfig):
        gae_lambda: float = 0.95

    class A2C(Algorithm[A2CConfig]):
        Config = A2CConfig

        def update(self, batch, context):
            value_TN, next_value_TN = values_TN(self.policy, batch)
            discount = discount_TN(batch, self.config.gamma)
            returns = gae(value_TN, next_value_TN, batch.reward_TN, discount, cut_TN(batch), lambda_=self.config.gae_lambda)
            for rows in minibatches(batch, None, context.rng, advantage=returns.advantage_TB, target=returns.target_TB):
                distribution, value = self.policy.distribution_and_value(rows.observation, rows.action_mask)
                policy_loss = -(distribution.log_prob(rows.action) * rows["advantage"]).mean()
                value_loss = (value - rows["target"]).square().mean()
                self.optimizer.step(policy_loss + 0.5 * value_loss, self.config.learning_rate)
            return {"value_loss": value_loss.item()}

    shoal.train("CartPole-v1", algorithm={"name": "a2c.py:A2C", "gae_lambda": 0.9})

One that learns from a replay is a subclass of `OffPolicyAlgorithm` with a `learn` and its `optimizers` (algorithms/off_policy.py).
`load_algorithm` finds a class by name or path; `build_algorithm` checks its settings and makes it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeGuard

from pydantic import ValidationError

from shoal.algorithms.base import Algorithm, UpdateContext
from shoal.algorithms.off_policy import OffPolicyAlgorithm
from shoal.config import BUILT_IN, AlgorithmConfig, OffPolicyConfig
from shoal.errors import ConfigError
from shoal.imports import load_object
from shoal.keys import fault_lines
from shoal.networks.acting import Acting
from shoal.networks.policy import Policy
from shoal.types import LeafSpec

__all__ = [
    "Algorithm",
    "AnyAlgorithm",
    "OffPolicyAlgorithm",
    "UpdateContext",
    "build_algorithm",
    "check_actions",
    "check_class",
    "check_remembers",
    "checked_settings",
    "learns_from_replay",
    "load_algorithm",
]

_MODULES = {
    "ppo": ("ppo", "PPO"),
    "impala": ("impala", "IMPALA"),
    "appo": ("appo", "APPO"),
    "dqn": ("dqn", "DQN"),
    "r2d2": ("r2d2", "R2D2"),
    "sac": ("sac", "SAC"),
    "td3": ("td3", "TD3"),
}
AnyAlgorithm = Algorithm[Any] | OffPolicyAlgorithm[Any]


def load_algorithm(name_or_path: str) -> type[AnyAlgorithm]:
    """The class of a built-in algorithm, or of `package.module:Class` or `file.py:Class`.

    Raises:
      ConfigError: if there is no such algorithm, or what is found is none (`check_class`).
    """
    if ":" in name_or_path:
        return check_class(load_object(name_or_path), name_or_path)
    if name_or_path not in _MODULES:
        raise ConfigError(
            f"algorithm.name: no algorithm {name_or_path!r}; expected {', '.join(_MODULES)}, package.module:Class or file.py:Class"
        )
    module, name = _MODULES[name_or_path]
    found_class: type[AnyAlgorithm] = getattr(import_module(f"shoal.algorithms.{module}"), name)
    return found_class


def check_class(found: Any, name: str) -> type[AnyAlgorithm]:
    """`found` itself. Raises ConfigError where it is no algorithm: no class, or one that lacks a method or `Config`, `modes`.

    name: of the class, as the user gave it.
    """
    replayed = isinstance(found, type) and issubclass(found, OffPolicyAlgorithm)
    wanted = ("Config", "modes", "learn" if replayed else "update", "get_state", "set_state")
    missing = [m for m in wanted if not hasattr(found, m)]
    if isinstance(found, type) and not missing:
        return found
    what = f"a class without {', '.join(missing)}" if isinstance(found, type) else f"a {type(found).__name__}"
    raise ConfigError(
        f"algorithm.name: {name} is {what}; expected a subclass of shoal.algorithms.base.Algorithm or the same methods, or, where it learns from a "
        "replay, a subclass of shoal.algorithms.OffPolicyAlgorithm with a `learn`"
    )


def learns_from_replay(algorithm: type[AnyAlgorithm]) -> TypeGuard[type[OffPolicyAlgorithm[Any]]]:
    """Whether it samples what was done, instead of being given batches in order."""
    return issubclass(algorithm, OffPolicyAlgorithm)


def checked_settings(algorithm: type[AnyAlgorithm], config: AlgorithmConfig) -> AlgorithmConfig:
    """The settings as the algorithm's own `Config`. Raises ConfigError where one is unknown or wrong."""
    if isinstance(config, algorithm.Config):
        return config
    try:
        return algorithm.Config.model_validate(config.model_dump())
    except ValidationError as error:
        faults = "\n".join(fault_lines(error, algorithm.Config, "algorithm."))
        raise ConfigError(f"{faults} (settings of {config.name})") from error


def check_actions(config: AlgorithmConfig, action: LeafSpec) -> None:
    """Raise ConfigError where an algorithm cannot choose among actions of this kind; says which can."""
    off_policy = isinstance(config, OffPolicyConfig)
    if action.kind in config.actions and (action.kind != "box" or action.bounded or not off_policy):
        return
    able = [name for name, model in BUILT_IN.items() if action.kind in model.actions]
    if action.kind == "box" and not action.bounded:
        able = [name for name in able if not issubclass(BUILT_IN[name], OffPolicyConfig)]
    kind = {"box": "continuous (a Box)" if action.bounded else "continuous without bounds (a Box)"}.get(action.kind, action.kind)
    raise ConfigError(
        f"algorithm: {config.name} chooses among {' or '.join(_ACTIONS[kind] for kind in config.actions)} actions, and this environment's are "
        f"{kind}; {', '.join(able)} can serve them"
    )


_ACTIONS = {"box": "bounded continuous", "discrete": "discrete", "multi_discrete": "multi_discrete", "multi_binary": "multi_binary"}


def build_algorithm(policy: Policy, config: AlgorithmConfig, algorithm: type[Algorithm[Any]] | None = None) -> Algorithm[Any]:
    """The on-policy algorithm that `config.name` names (or the class given), its settings checked by its own `Config`.

    Raises:
      ConfigError: if there is no such algorithm, or a setting is unknown or wrong.
    """
    chosen: Any = algorithm or load_algorithm(config.name)
    settings = checked_settings(chosen, config)
    check_remembers(policy, config.name, chosen)
    built: Algorithm[Any] = chosen(policy, settings)
    return built


def check_remembers(policy: Acting, name: str, algorithm: type[AnyAlgorithm]) -> None:
    """Raise ConfigError where the policy has a memory and the algorithm would train it as if it had none."""
    if policy.initial_state(1) and not getattr(algorithm, "remembers", False):
        raise ConfigError(
            f"policy.memory: {name} does not train policies with memory; ppo, appo, impala and r2d2 do (one of your own says `remembers = True`, see "
            "shoal.algorithms.base.Algorithm), or leave policy.memory at none"
        )
