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

`load_algorithm` finds a class by name or path; `build_algorithm` checks its settings and makes it.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from shoal.algorithms.base import Algorithm, UpdateContext
from shoal.config import AlgorithmConfig
from shoal.errors import ConfigError
from shoal.imports import load_object
from shoal.networks.policy import Policy

__all__ = ["Algorithm", "UpdateContext", "build_algorithm", "load_algorithm"]

_METHODS = ("update", "get_state", "set_state")


def load_algorithm(name_or_path: str) -> type[Algorithm[Any]]:
    """The class of a built-in algorithm (`ppo`, `impala`, `appo`), or of `package.module:Class` or `file.py:Class`.

    Raises:
      ConfigError: if there is no such algorithm, or what is found lacks a method or `Config`, `modes`.
    """
    if ":" in name_or_path:
        found = load_object(name_or_path)
        missing = [m for m in ("Config", "modes", *_METHODS) if not hasattr(found, m)]
        if missing or not isinstance(found, type):
            what = f"a class without {', '.join(missing)}" if isinstance(found, type) else f"a {type(found).__name__}"
            raise ConfigError(
                f"algorithm.name: {name_or_path} is {what}; expected a subclass of shoal.algorithms.base.Algorithm or the same methods"
            )
        return found
    if name_or_path == "ppo":
        from shoal.algorithms.ppo import PPO

        return PPO
    if name_or_path == "impala":
        from shoal.algorithms.impala import IMPALA

        return IMPALA
    if name_or_path == "appo":
        from shoal.algorithms.appo import APPO

        return APPO
    raise ConfigError(f"algorithm.name: no algorithm {name_or_path!r}; expected ppo, impala, appo, package.module:Class or file.py:Class")


def build_algorithm(policy: Policy, config: AlgorithmConfig, algorithm: type[Algorithm[Any]] | None = None) -> Algorithm[Any]:
    """The algorithm that `config.name` names (or the class given), its settings checked by its own `Config`.

    Raises:
      ConfigError: if there is no such algorithm, or a setting is unknown or wrong.
    """
    algorithm = algorithm or load_algorithm(config.name)
    if not isinstance(config, algorithm.Config):
        try:
            config = algorithm.Config.model_validate(config.model_dump())
        except ValidationError as error:
            details = "; ".join(f"algorithm.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"{details} (settings of {config.name})") from error
    check_memory(policy, config.name, algorithm)
    return algorithm(policy, config)


def check_memory(policy: Policy, name: str, algorithm: type[Algorithm[Any]]) -> None:
    """Raise ConfigError where the policy has a memory and the algorithm would train it as if it had none."""
    if policy.initial_state(1) and not getattr(algorithm, "remembers", False):
        raise ConfigError(
            f"policy.memory: {name} does not train policies with memory; ppo, appo and impala do (one of your own says `remembers = True`, see "
            "shoal.algorithms.base.Algorithm), or leave policy.memory at none"
        )
