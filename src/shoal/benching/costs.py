"""`shoal bench costs`: what an environment step costs in each part, what the machine could do at most, and how bare loops compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from shoal.benching.ceilings import ceilings
from shoal.benching.measuring import machine
from shoal.config import RunConfig
from shoal.engines.plan import Plan
from shoal.engines.sizes import rollout_bytes
from shoal.errors import ConfigError
from shoal.settings import available_cores, resolve
from shoal.types import EnvironmentSpec

if TYPE_CHECKING:
    from shoal.benching.parts import PartCosts
    from shoal.engines.roles import Blueprint


def bench_costs(
    target: str, settings: Mapping[str, Any], *, seconds: float = 10.0, told: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure the parts of the training that `shoal train TARGET` with these settings would make, in this process, on one core; then make it for a short while.

    Args:
      seconds: for the parts, and as much for the trial; each of the bare loops takes a fifth of it.
      told: called with what is done at the moment.
    Returns:
      settings, machine, costs, mixed, crowding, transport, crossing, learning, several, environment, sizes, ceilings, references, trial: see docs/performance.md.
    Raises:
      ConfigError, EnvironmentFault: as `shoal.train`.
    """
    from shoal.benching.parts import measure_parts
    from shoal.benching.trial import trial
    from shoal.engines.looking import look
    from shoal.engines.roles import Blueprint, UserObjects

    config, _ = resolve(target, settings)
    told("costs: looking at the environment")
    facts = look(config, UserObjects())
    if facts["replay"] is not None:
        raise ConfigError(f"costs are taken apart for ppo, appo and impala; {config.algorithm.name} learns from a replay")
    config.mode, config.env.form, config.policy.inference = facts["mode"], facts["form"], facts["inference"]
    blueprint = Blueprint(config, EnvironmentSpec.from_json(facts["spec"]), UserObjects(), bytes(16))
    cores = available_cores()
    parts = measure_parts(blueprint, cores, seconds, told)
    told("costs: bare loops")
    references, blocking = _references(blueprint, facts["measured"], parts, seconds / 5)
    own_device = blueprint.device().type != "cpu"
    one, many = parts.learn_wall[1], parts.learn_wall[max(parts.learn_wall)]
    learning_cores = min(float(cores), max(1.0, one / many)) if many > 0 else 1.0
    costs = {"e": parts.environment, "i": parts.inference, "l": one if own_device else parts.learn, "x": parts.transport}
    plan = Plan.of(config)
    several = _several(config.learners, cores, parts)
    bound = ceilings(
        {**costs, "l": several["l_us"]} if several else costs, plan.mode, cores=cores,
        learning_cores=several["cores"] if several else learning_cores, num_envs=plan.num_groups * plan.group_size,
        blocking_us=blocking["wall_us"] if blocking["waits"] else None, own_device=own_device,
    )  # fmt: skip
    found = {
        "settings": _described(config, plan, blueprint.device().type),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {**machine(), "load": round(os.getloadavg()[0], 2)},
        "cores": cores,
        "costs": costs,
        "mixed": parts.mixed,
        "crowding": parts.crowding,
        "transport": {name: getattr(parts, name) for name in ("record", "words", "decide", "consume", "weights")},
        "crossing": {"pack": parts.pack, "unpack": parts.unpack},
        "learning": {"cores": learning_cores, "wall_us": {str(n): us for n, us in parts.learn_wall.items()}, "own_device": own_device},
        "several": several,
        "environment": {**blocking, "episode_steps": parts.episode_steps, "updates_measured": parts.cycles},
        "sizes": _sizes(blueprint),
        "ceilings": bound.to_json(),
        "references": references,
    }
    return {**found, "trial": trial(target, settings, config, found, seconds, told)}


def _several(learners: int, cores: int, parts: PartCosts) -> dict[str, Any] | None:
    """What several learners take, all together, in place of `l`: each its part, the exchanges, and a copy of the batch of its own."""
    if learners == 1:
        return None
    whole = learners * (parts.share + parts.exchange) + (learners - 1) * parts.consume
    return {
        "learners": learners,
        "share_us": parts.share,
        "exchange_us": parts.exchange,
        "exchanges": parts.exchanges,
        "l_us": whole,
        "cores": float(min(cores, learners)),
    }


def _described(config: RunConfig, plan: Plan, device: str) -> dict[str, Any]:
    """What the figures are figures of."""
    return {
        "env": config.env.id,
        "form": config.env.form,
        "algorithm": config.algorithm.name,
        "mode": plan.mode,
        "preset": config.preset or "none",
        "groups": plan.num_groups,
        "group_size": plan.group_size,
        "rollout_length": plan.rollout_length,
        "batch_env_steps": plan.batch_rollouts * plan.rollout_length * plan.group_size,
        "epochs": int(getattr(config.algorithm, "epochs", 1)),
        "minibatch_size": getattr(config.algorithm, "minibatch_size", None),
        "actors": config.actors,
        "learner_threads": config.learner.threads,
        "policy": config.policy.model_dump(mode="json", exclude={"inference"}),
        "device": device,
        "env_kwargs": config.model_dump(mode="json")["env"]["kwargs"],
    }


def _sizes(blueprint: Blueprint) -> dict[str, int]:
    """What crosses a link in a cluster: a whole rollout, and all weights of a version."""
    policy = blueprint.policy()
    return {"rollout_bytes": rollout_bytes(blueprint.schema(policy)), "weights_bytes": 4 * blueprint.layout(policy).size}


def _references(blueprint: Blueprint, probed: Mapping[str, Any], parts: PartCosts, seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The bare loops, each beside shoal's own cost (`times` as much); and what a step of one environment takes of wall and processor time."""
    from shoal.benching.references import BareNetwork, bare_environment, bare_forward, bare_update, random_group

    config, spec = blueprint.config, blueprint.spec
    bare, group = bare_environment(config, spec, seconds), random_group(blueprint, seconds)
    found: dict[str, Any] = {"environment": None, "inference": None, "learning": None, "missing": ""}
    waits = config.env.form == "threads"
    blocking: dict[str, Any] = {"wall_us": probed["step_wall_us"], "cpu_us": probed["step_cpu_us"], "waits": waits}
    if bare is not None and group is not None:
        found["environment"] = {**_beside(group.cpu_us, bare.cpu_us), "bare_episode_steps": bare.episode_steps}
        blocking |= {"wall_us": bare.wall_us, "cpu_us": bare.cpu_us}
    try:
        network = BareNetwork(spec, config, blueprint.device().type)
    except ValueError as error:
        found["missing"] = str(error)
        return found, blocking
    found["inference"] = _beside(parts.inference, bare_forward(network, config.sampling.group_size or 1, seconds))
    found["learning"] = _beside(parts.learn, bare_update(network, config, seconds))
    return found, blocking


def _beside(own: float, bare: float) -> dict[str, float]:
    return {"shoal_us": own, "bare_us": bare, "times": own / bare if bare > 0 else float("nan")}
