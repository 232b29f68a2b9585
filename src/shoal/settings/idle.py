"""Keys that have no effect beside others: refused where the user gave them by hand, since what was asked for would not happen.

Presets, files (a run's own is whole, so each key stands in it) and defaults may say such keys: others of them decide.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoal.config import DQNConfig, OffPolicyConfig, QConfig, R2D2Config, RunConfig, SACConfig
from shoal.errors import ConfigError
from shoal.keys import Tree

Idle = tuple[str, tuple[str, ...], str]  # section, its keys, why they do nothing and what to give instead


def refuse_idle_keys(config: RunConfig, by_hand: Tree) -> None:
    """Raise ConfigError for the first key given by hand that does nothing in this configuration of a built-in algorithm."""
    for section, keys, why in (*_idle_in_run(config), *_idle_in_replay(config), *_idle_in_algorithm(config)):
        given = by_hand if not section else by_hand.get(section) or {}
        for key in keys:
            if given.get(key) is not None:
                raise ConfigError(f"{section}{'.' if section else ''}{key} has no effect: {why}, or leave it out")


def _idle_in_run(config: RunConfig) -> Iterator[Idle]:
    name, policy, replayed = config.algorithm.name, config.policy, isinstance(config.algorithm, OffPolicyConfig)
    if not replayed:
        yield "checkpoint", ("replay",), f"{name} learns from no replay; take dqn, r2d2, sac or td3"
    if replayed:
        asked = "--replay.tolerance, by which actors may run ahead" + ("" if config.mode == "async" else " with --mode async")
        yield "", ("max_policy_lag",), f"{name} learns from a replay, which takes samples of any age; give {asked}"
    if policy.memory == "none" and policy.network is None and not isinstance(config.algorithm, R2D2Config):
        able = "give --policy.memory lstm or gru with it" if not replayed else "take --algorithm r2d2, which has one"
        yield "policy", ("memory_size",), f"this policy has no memory (policy.memory none); {able}"


def _idle_in_replay(config: RunConfig) -> Iterator[Idle]:
    algorithm, replay = config.algorithm, config.replay
    if not isinstance(algorithm, OffPolicyConfig):
        return
    if config.mode == "sync":
        yield "replay", ("tolerance",), "it belongs to async mode, and in sync mode actors and learner take turns; take --mode async"
    if config.learners > 1:
        yield "replay", ("shards",), f"each of {config.learners} learners has a replay of its own, in one part; give --learners 1 with it"
    if not (algorithm.prioritised if replay.prioritised is None else replay.prioritised):
        uniform = "sampling is uniform (replay.prioritised false); give --replay.prioritised true with it"
        yield "replay", ("alpha", "beta"), uniform
        if isinstance(algorithm, R2D2Config):
            yield "algorithm", ("priority_eta",), uniform


def _idle_in_algorithm(config: RunConfig) -> Iterator[Idle]:
    a = config.algorithm
    if isinstance(a, QConfig):
        if a.target_tau is not None:
            follows = f"the target network goes the share {a.target_tau:g} of the way after each optimizer step (algorithm.target_tau)"
            yield "algorithm", ("target_update_steps",), f"{follows}, and is not copied; give --algorithm.target-tau none with it"
        if a.epsilon == "ladder":
            annealed = ("epsilon_initial", "epsilon_final", "epsilon_env_steps")
            yield "algorithm", annealed, "algorithm.epsilon is ladder; give --algorithm.epsilon annealed with it"
        else:
            ladder = ("epsilon_base", "epsilon_exponent")
            yield "algorithm", ladder, "algorithm.epsilon is annealed; give --algorithm.epsilon ladder with it"
    if isinstance(a, DQNConfig):
        if a.distribution == "none":
            none = "no distribution of returns is learned (algorithm.distribution none)"
            yield "algorithm", ("atoms",), f"{none}; give --algorithm.distribution c51 or quantile with it"
        if a.distribution != "c51":
            fixed = f"only c51 has atoms at fixed values, and algorithm.distribution is {a.distribution}"
            yield "algorithm", ("value_min", "value_max"), f"{fixed}; give --algorithm.distribution c51 with it"
    if isinstance(a, SACConfig) and a.temperature is not None:
        fixed = f"the temperature is fixed (algorithm.temperature {a.temperature:g})"
        yield "algorithm", ("target_entropy",), f"{fixed}; give --algorithm.temperature none with it, so that it is learned"
