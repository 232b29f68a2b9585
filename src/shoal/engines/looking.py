"""What a training needs to know of its environment and its policy before memory is allocated: made once, looked at, and told as JSON."""

from __future__ import annotations

from typing import Any

from shoal.algorithms import check_remembers, load_algorithm
from shoal.config import RunConfig
from shoal.engines.roles import Blueprint, UserObjects
from shoal.engines.sizes import check_weights
from shoal.environments.probe import Tell, choose_form, probe, quiet
from shoal.errors import ConfigError
from shoal.networks.policy import policy_size


def look(config: RunConfig, objects: UserObjects, tell: Tell = quiet) -> dict[str, Any]:
    """Spec, form, and the sizes that memory is allocated from, as JSON."""
    found = probe(config.env, objects.env, tell=tell)
    tell("")
    blueprint = Blueprint(config, found.spec, objects, bytes(16))
    blueprint.device()
    blueprint.check_algorithm()
    if objects.network is None and config.policy.network is None:
        check_weights(
            policy_size(found.spec, config.policy, blueprint.network_kind),
            f"policy.hidden_sizes {config.policy.hidden_sizes} on this observation",
        )
    policy = blueprint.policy()
    blueprint.check_computing(policy)
    check_remembers(policy, config.algorithm.name, objects.algorithm or load_algorithm(config.algorithm.name))
    fields = [vars(f) | {"shape": list(f.shape)} for f in policy.fields()]
    form = choose_form(config.env, found)
    measured = {k: v for k, v in found.to_json().items() if k != "spec"}
    return {
        "spec": found.spec.to_json(),
        "fields": fields,
        "weights": blueprint.layout(policy).size,
        "form": form,
        "mode": chosen_mode(config, objects),
        "inference": blueprint.inference(policy),
        "measured": measured,
        "build": blueprint.build_facts(),
        "replay": None if blueprint.replay is None else blueprint.replay.model_dump(mode="json"),
        "rate": None if blueprint.rate is None else vars(blueprint.rate),
    }


def chosen_mode(config: RunConfig, objects: UserObjects) -> str:
    """The mode asked for, or the algorithm's first. Raises ConfigError where the algorithm has no such mode."""
    modes: tuple[str, ...] = (objects.algorithm or load_algorithm(config.algorithm.name)).modes
    mode = config.mode or modes[0]
    if mode not in modes:
        raise ConfigError(f"mode: {config.algorithm.name} runs in {' or '.join(modes)} mode, not {mode}")
    return mode
