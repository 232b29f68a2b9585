"""From measured costs, a configuration and what was asked to the numbers of the model (planning/system.py).

The costs are an answer of `shoal bench costs` (or `shoal bench train`, which has them too). They are of one core, so they hold for nodes with more
cores of the same kind; they do not hold for another environment, algorithm, group size or network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from shoal.config import Fraction, PositiveFloat, RunConfig, Weight
from shoal.engines.plan import Plan
from shoal.errors import ConfigError
from shoal.planning.system import Driver, Links, StepCosts, System, Way
from shoal.settings import WAITING_ACTORS_PER_CORE, check_spread

# Measured by benchmarks/planning.py: the first of two trainings (1,222 and 1,146), the second in the rows driver/*. What a rollout takes of the driver besides,
# `shoal bench costs` measures.
DRIVER_UPDATE_US = 1200.0  # metrics, rows of run.db, files of TensorBoard: of each update
DRIVER_LOOK_US = 0.4  # of each group, whenever the driver looks what may be begun
MESSAGE_US = 460.0  # of a core, at each end of a message through Ray: `benchmarks/clusters.py --link`, three times (455 to 480) while other programs ran
# One exchange of gloo's takes of a core of each of L learners (L - 1) times the first, and for each of the 2 (L - 1) / L times the weights' bytes the second: `exchange` of
# benching/shares.py with 2, 4 and 8 learners and up to 1.7 M weights, while other programs ran.
EXCHANGE_US, EXCHANGE_BYTE_US = 200.0, 0.00035
_AGAIN = "measure anew: shoal bench costs ENV --json > FILE"


class _Settings(BaseModel):
    env: str
    form: str
    algorithm: str
    mode: Literal["sync", "async"]
    groups: int = Field(gt=0)
    group_size: int = Field(gt=0)
    rollout_length: int = Field(gt=0)
    batch_env_steps: int = Field(gt=0)
    epochs: int = Field(gt=0)
    minibatch_size: int | None = Field(gt=0)
    actors: int
    learner_threads: int = Field(gt=0)
    policy: dict[str, Any]
    device: str
    env_kwargs: dict[str, Any]


class _StepCosts(BaseModel):
    e: PositiveFloat
    i: Weight
    l: PositiveFloat  # noqa: E741
    x: Weight


class _Transport(BaseModel):
    record: Weight
    words: Weight
    decide: Weight
    consume: Weight
    weights: Weight


class _Crossing(BaseModel):
    pack: Weight
    unpack: Weight


class _Learning(BaseModel):
    wall_us: dict[int, Weight] = Field(min_length=1)
    own_device: bool


class _Several(BaseModel):
    learners: int = Field(gt=1)
    share_us: Weight
    exchange_us: Weight
    exchanges: int = Field(gt=0)


class _Environment(BaseModel):
    wall_us: Weight
    waits: bool


class _Sizes(BaseModel):
    rollout_bytes: int = Field(gt=0)
    weights_bytes: int = Field(gt=0)


class Trial(BaseModel):
    """A short run of the training that was measured, see benching/trial.py."""

    env_steps_per_second: PositiveFloat
    actors: int = Field(gt=0)
    acting: Fraction
    learning: Fraction
    acting_us: Weight | None
    update_us: Weight | None
    max_policy_lag: int = Field(gt=0)


class Measured(BaseModel):
    """What a plan reads of an answer of `shoal bench costs`, in microseconds."""

    settings: _Settings
    machine: dict[str, Any]
    date: str
    cores: int = Field(gt=0)
    costs: _StepCosts
    mixed: Weight
    crowding: PositiveFloat
    transport: _Transport
    crossing: _Crossing
    learning: _Learning
    several: _Several | None = None
    environment: _Environment
    sizes: _Sizes
    trial: Trial | None = None


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for besides the configuration.

    Attributes:
      sizes: numbers of nodes. cores: of a node; None: as many as the machine has where the costs were measured.
      link_gbit, learner_gbit: Gbit/s each way, of a node and of a node with a learner (None: as a node).
      driver_us: microseconds of the driver for each rollout; None: as measured.
      message_us: microseconds of a core at each end of a message, on Ray; None: as measured once.
      one_machine: all nodes share the cores of one.
    """

    sizes: tuple[int, ...] = (1,)
    cores: int | None = None
    link_latency_us: float = 100.0
    link_gbit: float = 10.0
    learner_gbit: float | None = None
    driver_us: float | None = None
    message_us: float | None = None
    one_machine: bool = False


def measured_of(answer: Mapping[str, Any], source: str) -> Measured:
    """Raises ConfigError where it is no whole answer of the bench."""
    try:
        return Measured.model_validate(answer)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or "the object"
        raise ConfigError(f"{source}: {where}: {fault['msg']}; {_AGAIN}") from error


def read_costs(path: Path) -> Measured:
    """A file that `shoal bench costs ENV --json` wrote. Raises ConfigError."""
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); {_AGAIN}") from error
    if not isinstance(answer, dict):
        raise ConfigError(f"{path}: holds no JSON object; {_AGAIN}")
    return measured_of(answer, str(path))


def check_same(config: RunConfig, measured: Measured, source: str) -> None:
    """Raise ConfigError where the costs are those of something else than what is planned."""
    of = measured.settings
    planned = {
        "env.id": (_name(config.env.id), _name(of.env)),
        "env.form": (of.form if config.env.form == "auto" else config.env.form, of.form),
        "algorithm": (config.algorithm.name, of.algorithm),
        "sampling.group_size": (config.sampling.group_size, of.group_size),
        "algorithm.epochs": (getattr(config.algorithm, "epochs", 1), of.epochs),
        "algorithm.minibatch_size": (getattr(config.algorithm, "minibatch_size", None), of.minibatch_size),
        "device": (of.device if config.device == "auto" else config.device, of.device),
        "env.kwargs": (config.model_dump(mode="json")["env"]["kwargs"], of.env_kwargs),
        **{f"policy.{name}": (value, of.policy.get(name)) for name, value in _network(config).items()},
    }
    for key, (wanted, known) in planned.items():
        if wanted != known:
            raise ConfigError(f"{source}: costs of {key} {known}, and {wanted} is planned; give the same options, or {_AGAIN}")


def _network(config: RunConfig) -> dict[str, Any]:
    """The settings of the policy that costs depend on: all but where its actions are chosen, which a plan says for itself."""
    return config.policy.model_dump(mode="json", exclude={"inference"})


def _name(env: str) -> str:
    """An environment's name; of a factory in a file the file's own, wherever it lies."""
    return env.rpartition("/")[2] if ".py:" in env else env


def systems(config: RunConfig, measured: Measured, asked: Asked) -> dict[int, System]:
    """The run on each of the sizes. `sampling.groups` and `actors` are those of a node, `sampling.batch_rollouts` is the whole run's.

    Raises:
      ConfigError: what the model does not have, or what cannot be: also learners on nodes that are not there, as the run refuses them.
    """
    if config.policy.inference == "server":
        raise ConfigError("policy.inference: an inference server is no part of a plan; leave it out, and actors choose")
    if config.actors == 0:
        raise ConfigError("actors: a plan needs at least one actor in each node, got 0")
    if config.ray.learners_on == "nodes":
        check_spread(config, others=min(asked.sizes) - 1, tls=False)
    return {nodes: _system(config, measured, asked, nodes) for nodes in asked.sizes}


def several_measured(config: RunConfig, measured: Measured) -> bool:
    """Whether the costs are those of as many learners as are planned."""
    return measured.several is not None and measured.several.learners == config.learners


def _system(config: RunConfig, measured: Measured, asked: Asked, nodes: int) -> System:
    whole = config.model_copy(deep=True)
    groups = config.sampling.groups or 1
    whole.sampling.groups = nodes * groups
    mode = config.mode or measured.settings.mode
    whole.mode = mode
    plan = Plan.of(whole)
    cores, transport = asked.cores or measured.cores, measured.transport
    messages_us = (transport.words + transport.decide) * plan.rollout_length * plan.group_size
    # Publishing and reading are copies of the same numbers: the measured sum is one of each actor's and one more.
    copy = 1e-6 * transport.weights * measured.settings.batch_env_steps / (1 + max(1, measured.settings.actors))
    bandwidth = asked.link_gbit * 1e9 / 8
    learner_bandwidth = bandwidth if asked.learner_gbit is None else asked.learner_gbit * 1e9 / 8
    rollout_us = messages_us if asked.driver_us is None else asked.driver_us
    return System(
        plan=plan,
        nodes=nodes,
        cores=cores,
        actors=_actors(config, mode, measured.settings.form, cores),
        learners=config.learners,
        learners_on=config.ray.learners_on,
        exchange=_exchange(config, measured),
        costs=_step_costs(config, measured),
        links=Links(1e-6 * asked.link_latency_us, bandwidth, learner_bandwidth),
        driver=Driver(1e-6 * rollout_us, 1e-6 * DRIVER_UPDATE_US, 1e-6 * DRIVER_LOOK_US),
        publish=copy,
        refresh=copy,
        rollout_bytes=round(measured.sizes.rollout_bytes * plan.rollout_length / measured.settings.rollout_length),
        weights_bytes=measured.sizes.weights_bytes,
        epochs=measured.settings.epochs,
        minibatch_size=measured.settings.minibatch_size,
        way=_way(measured, asked, plan.rollout_length * plan.group_size) if nodes > 1 or config.engine == "ray" else None,
        one_machine=asked.one_machine,
    )


def _exchange(config: RunConfig, measured: Measured) -> float:
    """Seconds of a core that each learner takes for one exchange: as measured with as many, else as measured once."""
    several, learners = measured.several, config.learners
    if several is not None and several_measured(config, measured):
        return 1e-6 * several.exchange_us * measured.settings.batch_env_steps / several.exchanges
    moved = 2 * (learners - 1) / learners * measured.sizes.weights_bytes
    return 1e-6 * ((learners - 1) * EXCHANGE_US + moved * EXCHANGE_BYTE_US)


def _way(measured: Measured, asked: Asked, rollout_steps: int) -> Way:
    message_us = MESSAGE_US if asked.message_us is None else asked.message_us
    return Way(1e-6 * message_us, *(1e-6 * rollout_steps * us for us in (measured.crossing.pack, measured.crossing.unpack)))


def _actors(config: RunConfig, mode: str, form: str, cores: int) -> int:
    """Of a node: those asked for, else as shoal.settings chooses them on a machine with so many cores."""
    groups = config.sampling.groups or 1
    if config.engine == "ray":
        return min(groups, config.ray.actors_per_node or cores)
    if "actors" in config.model_fields_set and config.actors:
        return config.actors
    actors = min(groups, cores if mode == "sync" else max(2, cores + 1 - config.learners))
    return max(actors, min(groups, WAITING_ACTORS_PER_CORE * cores)) if form == "threads" else actors


def _step_costs(config: RunConfig, measured: Measured) -> StepCosts:
    costs, learning = measured.costs, measured.learning
    threads = 1 if learning.own_device else config.learner.threads
    sped_up = learning_speed(learning.wall_us, threads)
    acting = costs.e + costs.i + measured.transport.record + measured.mixed
    several = measured.several if several_measured(config, measured) and not learning.own_device else None
    return StepCosts(
        acting=1e-6 * acting,
        consume=1e-6 * measured.transport.consume,
        learning=1e-6 * costs.l / sped_up,
        learning_cores=sped_up,
        own_device=learning.own_device,
        blocking=1e-6 * measured.environment.wall_us if measured.environment.waits else None,
        crowding=max(1.0, measured.crowding),
        share=None if several is None else several.share_us / costs.l,
    )


def learning_speed(wall_us: Mapping[int, float], threads: int) -> float:
    """How many times as fast an update is with so many threads as with one, by Amdahl's law through the two that were measured."""
    most = max(wall_us)
    if most == 1 or threads == 1 or not wall_us[most]:
        return 1.0
    serial = min(1.0, max(0.0, (wall_us[most] / wall_us[1] - 1 / most) / (1 - 1 / most)))
    return 1.0 / (serial + (1.0 - serial) / threads)
