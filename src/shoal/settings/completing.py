"""What follows from other keys, and what cannot go together."""

from __future__ import annotations

import os
from pathlib import Path

from shoal.config import BUILT_IN, CustomConfig, OffPolicyConfig, RayConfig, RunConfig, actor_bounds
from shoal.errors import ConfigError
from shoal.keys import Tree
from shoal.settings.idle import refuse_idle_keys
from shoal.urls import check_url, is_url

DEFAULT_GROUPS, DEFAULT_GROUP_SIZE = 4, 8
WAITING_ACTORS_PER_CORE = 8
NO_REPLAY_ON_NODES = "ray.learners_on: what learns from a replay keeps it beside its learners, on the driver's machine; leave it at driver, or take ppo, appo or impala"


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the container's quota where that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def _asked(trees: list[Tree], section: str, key: str) -> bool:
    """Whether a user gave this key (a preset or a default may be adapted, a wish may not)."""
    return any(isinstance(part := tree.get(section), dict) and part.get(key) is not None for tree in trees)


def complete(config: RunConfig, asked_for: list[Tree], *, resumed: bool) -> RunConfig:
    """Fill what follows from other keys, and refuse what cannot go together. Raises ConfigError.

    asked_for: what the user gave, layer by layer; the last was given by hand. resumed: the first of them is the run's own configuration.
    """
    if is_url(config.run_dir):
        config.run_dir = check_url(config.run_dir)
    own = isinstance(config.algorithm, CustomConfig)  # whose modes its class says, once torch is there (engines.looking.look)
    if not own:
        _choose_mode(config)
        _refuse_replay_keys(config, asked_for[-1])
        refuse_idle_keys(config, asked_for[-1])
    sampling = config.sampling
    sampling.groups = sampling.groups or DEFAULT_GROUPS
    sampling.group_size = sampling.group_size or DEFAULT_GROUP_SIZE
    _check_engine(config, asked_for, resumed)
    if not resumed:
        _check_shards(config, sampling.groups)
    if config.actors is not None and config.actors > sampling.groups:
        raise ConfigError(_too_many_actors(config.actors, sampling.groups, sampling.group_size))
    if config.actors is None and config.engine == "local":
        _choose_actors(config, sampling.groups)
    if config.autoscale is not None:
        said = asked_for[-1:] if resumed else asked_for
        _fit_to_bounds(config, config.autoscale, any(tree.get("actors") is not None for tree in said))
    _end_schedules(config)
    if config.mode == "sync" and not resumed:
        _refuse_async_keys(config, asked_for)
    if not own and not resumed:
        _fit_minibatch(config, _asked(asked_for, "algorithm", "minibatch_size"))
    return config


def _choose_mode(config: RunConfig) -> None:
    """The mode asked for, or the algorithm's first. Raises ConfigError where the algorithm has no such mode."""
    algorithm = config.algorithm
    if config.mode is None:
        config.mode = algorithm.modes[0]
    if config.mode not in algorithm.modes:
        *others, last = [name for name, model in BUILT_IN.items() if config.mode in model.modes]
        raise ConfigError(
            f"mode: {algorithm.name} runs in {' or '.join(algorithm.modes)} mode, not {config.mode}; for {config.mode} take --algorithm {', '.join(others)} or {last}"
        )


def _refuse_replay_keys(config: RunConfig, by_hand: Tree) -> None:
    """Of an algorithm that learns from no replay. Raises ConfigError."""
    given = {key for key, value in (by_hand.get("replay") or {}).items() if value is not None}
    if given and not isinstance(config.algorithm, OffPolicyConfig):
        able = ", ".join(name for name, model in BUILT_IN.items() if issubclass(model, OffPolicyConfig))
        raise ConfigError(
            f"replay.{sorted(given)[0]} is for what learns from a replay ({able}), and this run's algorithm is {config.algorithm.name}"
        )


def _check_shards(config: RunConfig, groups: int) -> None:
    """Each part of a replay holds whole groups. Raises ConfigError."""
    own = max(1, groups // config.learners)
    if config.replay.shards > own:
        whose = "" if config.learners == 1 else f" of each of {config.learners} learners"
        raise ConfigError(
            f"replay.shards: {own} groups{whose} (sampling.groups) cannot be spread over {config.replay.shards:,} parts; give --replay.shards {own} or less"
        )


def _choose_actors(config: RunConfig, groups: int) -> None:
    """One per core, as far as there are groups for them."""
    config.actors = min(available_cores(), groups)
    if config.mode == "async":  # in sync mode actors and learners take turns
        config.actors = max(1, min(available_cores() + 1 - config.learners, groups))
        config.actors = max(config.actors, min(2, groups))
    config.model_fields_set.discard("actors")  # nobody asked for it


def _end_schedules(config: RunConfig) -> None:
    """Schedules run to zero where the run ends, unless it is said otherwise. Raises ConfigError where nothing says it."""
    algorithm = config.algorithm
    schedules = [key for key in ("learning_rate_schedule", "clip_range_schedule") if getattr(algorithm, key, "constant") == "linear"]
    if schedules and algorithm.schedule_env_steps is None:
        if config.stop.env_steps is None:
            raise ConfigError(
                f"algorithm.{schedules[0]} is linear, and nothing says where it ends: give algorithm.schedule_env_steps or stop.env_steps"
            )
        algorithm.schedule_env_steps = config.stop.env_steps


def _too_many_actors(actors: int, groups: int, group_size: int) -> str:
    """What to give instead. Groups do not follow the number of actors, on which no weights may depend."""
    size, rest = divmod(groups * group_size, actors)
    same = "" if rest else f" --sampling.group-size {size} (as many environments as now)"
    return f"actors: {actors} processes cannot share {groups} groups; give --actors {groups} or less, or --sampling.groups {actors}{same}"


def _check_engine(config: RunConfig, asked_for: list[Tree], resumed: bool) -> None:
    """Raise ConfigError for what the engine that was asked for does not take. A run that goes on without its cluster forgets where that was."""
    if config.engine == "local":
        asked = asked_for[-1:] if resumed else asked_for
        given = [key for key in ("address", "nodes", "actors_per_node") if _asked(asked, "ray", key)]
        given += ["learners_on" for tree in asked if (tree.get("ray") or {}).get("learners_on") == "nodes"]  # driver is so here too
        if given:
            raise ConfigError(f"ray.{given[0]} says where on a cluster a run is placed: give --engine ray with it")
        config.ray = RayConfig()
        return
    if config.actors is not None and not resumed:
        raise ConfigError("actors: on a cluster they are counted by node; give --actors-per-node")
    if config.policy.inference == "server":
        raise ConfigError("policy.inference: on a cluster every actor has a policy of its own (actor); a server has no way to it")
    if config.ray.learners_on == "nodes" and config.learners == 1:
        raise ConfigError("ray.learners_on: a single learner is where the command runs; give --learners N with it, or leave it at driver")
    if config.ray.learners_on == "nodes" and isinstance(config.algorithm, OffPolicyConfig):
        raise ConfigError(NO_REPLAY_ON_NODES)
    config.policy.inference, config.actors = "actor", None


def _fit_to_bounds(config: RunConfig, bounds: str, wanted: bool) -> None:
    """A run that follows the load begins between its bounds; wanted: somebody said with how many actors. Raises ConfigError."""
    (least, most), groups = actor_bounds(bounds), config.sampling.groups or 1
    if most > groups:
        raise ConfigError(
            f"autoscale: {most} processes cannot share {groups} groups; give --autoscale {min(least, groups)}:{groups} or less, or --sampling.groups {most}"
        )
    if config.actors is None:
        return
    if wanted and not least <= config.actors <= most:
        outside = "runs all roles in one process" if config.actors == 0 else f"is outside of --autoscale {bounds}"
        raise ConfigError(
            f"actors: {config.actors} {outside}; it says with how many actors a run begins: give one from {least} to {most}, or --autoscale none"
        )
    asked = "actors" in config.model_fields_set
    config.actors = min(max(config.actors, least), most)
    if not asked:
        config.model_fields_set.discard("actors")


def adapt_actors(config: RunConfig) -> bool:
    """Once its form is known: environments that wait leave the cores idle, and a process steps one group at a time, so each group gets a process
    of its own, up to `WAITING_ACTORS_PER_CORE`, unless somebody asked for another number. Returns whether that changed it."""
    if config.env.form != "threads" or "actors" in config.model_fields_set or config.engine != "local":
        return False
    before = config.actors
    most = config.sampling.groups or 1 if config.autoscale is None else actor_bounds(config.autoscale)[1]
    config.actors = max(before or 0, min(most, WAITING_ACTORS_PER_CORE * available_cores()))
    return config.actors != before


def _refuse_async_keys(config: RunConfig, asked_for: list[Tree]) -> None:
    """What a user asked for is refused; what a preset says of async mode does not count in sync mode."""
    wanted = (("sampling.batch_rollouts", _asked(asked_for, "sampling", "batch_rollouts")),
              ("max_policy_lag", asked_for[-1].get("max_policy_lag") is not None))  # fmt: skip
    config.sampling.batch_rollouts = None
    other = "" if "async" in config.algorithm.modes else " with --algorithm appo or impala"
    for key, given in wanted:
        if given:
            raise ConfigError(
                f"{key} belongs to async mode, and this run is sync: an update takes one rollout of each of the {config.sampling.groups} groups, "
                f"without lag; leave it out, or take --mode async{other}"
            )


def _fit_minibatch(config: RunConfig, wanted: bool) -> None:
    """A minibatch is no longer than the batch of an update: refused where the user asked for it, else cut."""
    sampling, size = config.sampling, getattr(config.algorithm, "minibatch_size", None)
    rollouts = sampling.batch_rollouts or sampling.groups or 1
    batch = rollouts * (sampling.group_size or 1) * sampling.rollout_length
    if size is None or size <= batch:
        return
    if wanted:
        raise ConfigError(
            f"algorithm.minibatch_size: {size} is more than the {batch} env steps of an update ({rollouts} rollouts of {sampling.group_size} environments "
            f"and {sampling.rollout_length} steps); lower it, or raise sampling.groups, sampling.group_size or sampling.rollout_length"
        )
    config.algorithm.minibatch_size = batch  # type: ignore[attr-defined]
